use super::*;

/// As Software Factory installs it, and sf-operator with one more logger.
const SF_CONFIG: &str = "\
---
version: 1
formatters:
  console:
    class: 'zuul.lib.logutil.MultiLineFormatter'
    format: '%(asctime)s %(levelname)s %(name)s: %(message)s'
handlers:
  normal:
    class: logging.handlers.WatchedFileHandler
    formatter: console
    level: INFO
    filename: /var/log/zuul/fingergw.log
loggers:
  zuul:
    handlers: [normal]
    level: DEBUG
root:
  handlers: []
";

const OPERATOR: &str = "\
version: 1
formatters:
  console:
    format: '%(levelname)7s %(name)s: %(message)s'
handlers:
  console: {class: logging.StreamHandler, formatter: console, level: DEBUG, stream: ext://sys.stdout}
loggers:
  zuul.GerritConnection.io: &this
    handlers: [console]
    level: DEBUG
    propagate: 0
  zuul:
    <<: *this
root: {handlers: [console], level: WARNING}
";

/// As ansible-role-zuul and puppet-zuul install it.
const WINDMILL: &str = "\
[loggers]
keys=root,zuul,gerrit

[handlers]
keys=console,debug,normal

[formatters]
keys=simple

[logger_root]
level=WARNING
handlers=console

[logger_zuul]
level=DEBUG
handlers=debug,normal
qualname=zuul
propagate=0

[logger_gerrit]
level=DEBUG
handlers=debug,normal
qualname=gerrit

[handler_console]
level=WARNING
class=StreamHandler
formatter=simple
args=(sys.stdout,)

[handler_debug]
level=DEBUG
class=logging.handlers.WatchedFileHandler
formatter=simple
args=('/var/log/zuul/fingergw-debug.log',)

[handler_normal]
level=INFO
class=logging.handlers.TimedRotatingFileHandler
formatter=simple
args=('/var/log/zuul/fingergw.log', 'H', 8, 14,)

[formatter_simple]
format=%(asctime)s %(levelname)s %(name)s: %(message)s
datefmt=
";

/// Level, output and what is ignored.
fn settings(path: &str, text: &str) -> (Level, LogOutput, Vec<String>) {
    let log = read(path, text).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(log.format, LogFormat::Zuul);
    let LogConfig { file, ignored } = log.log_config.expect("the file");
    assert_eq!(file, path);
    (log.level, log.output, ignored)
}

fn error(path: &str, text: &str) -> String {
    match read(path, text) {
        Ok(log) => panic!("{log:?}"),
        Err(error) => error.to_string(),
    }
}

fn file(path: &str) -> LogOutput {
    LogOutput::File(path.into())
}

#[test]
fn files_of_known_deployments_give_level_and_output() {
    // The handler lets less through than the logger.
    let expected = (Level::INFO, file("/var/log/zuul/fingergw.log"), Vec::<String>::new());
    assert_eq!(settings("l.yaml", SF_CONFIG), expected);
    // The merged `propagate: 0` keeps the level and handlers of the root out.
    let expected = (Level::DEBUG, LogOutput::Stdout, Vec::new());
    assert_eq!(settings("l.yml", OPERATOR), expected);
    // The same handler at both loggers is not ignored at one of them.
    assert_eq!(settings("l.yml", &OPERATOR.replace("propagate: 0", "propagate: 1")), expected);
    let expected =
        (Level::DEBUG, file("/var/log/zuul/fingergw-debug.log"), vec!["handler normal".to_owned()]);
    assert_eq!(settings("l.conf", WINDMILL), expected);
    let rotating = WINDMILL.replace("handlers=debug,normal", "handlers=normal");
    let (level, output, ignored) = settings("l", &rotating);
    assert_eq!((level, output), (Level::INFO, file("/var/log/zuul/fingergw.log")));
    assert_eq!(ignored, ["rotation by handler normal (use logrotate)"]);
    let json = r#"{"version": 1, "root": {"level": "ERROR", "handlers": ["f"]},
        "handlers": {"f": {"class": "logging.FileHandler", "filename": "/f", "mode": "a"}}}"#;
    assert_eq!(settings("l.json", json), (Level::ERROR, file("/f"), Vec::new()));
    let tabs = json.replace(' ', "\t");
    assert_eq!(settings("l.json", &tabs), (Level::ERROR, file("/f"), Vec::new()));
}

/// What `loggers`, lines of YAML, give with handlers for a file, the streams and syslog.
fn of_loggers(loggers: &str) -> (Level, LogOutput) {
    let text = format!(
        "version: 1\nhandlers:\n  file: {{class: ours.ReopenableFileHandler, filename: /f}}\n  \
         out: {{class: logging.StreamHandler, stream: ext://sys.stdout}}\n  \
         err: {{class: logging.StreamHandler, level: WARNING}}\n  \
         syslog: {{class: logging.handlers.SysLogHandler, address: /dev/log}}\n{loggers}"
    );
    let (level, output, _) = settings("l.yaml", &text);
    (level, output)
}

#[test]
fn most_specific_logger_decides() {
    let (out, err) = (LogOutput::Stdout, LogOutput::Stderr);
    let cases = [
        ("", Level::WARN, out.clone()),
        ("root:\nloggers:\n  zuul: {level: , handlers: }", Level::WARN, out.clone()),
        (
            "root: {level: ERROR}\nroot: {level: INFO, handlers: [err, out]}",
            Level::WARN,
            err.clone(),
        ),
        ("root: {level: DEBUG}", Level::DEBUG, out.clone()),
        ("root: {level: NOTSET, handlers: [out]}", Level::DEBUG, out.clone()),
        ("root: {level: 20, handlers: [out]}", Level::INFO, out.clone()),
        ("root: {level: INFO, handlers: [err]}", Level::WARN, err.clone()),
        ("root: {level: INFO, handlers: [out, syslog, file]}", Level::INFO, file("/f")),
        ("root: {level: INFO, handlers: [syslog]}", Level::INFO, out.clone()),
        ("loggers: {zuul: {level: INFO}}\nroot: {handlers: [file]}", Level::INFO, file("/f")),
        ("loggers: {zuul: {level: NOTSET}}\nroot: {handlers: [out]}", Level::WARN, out.clone()),
        (
            "loggers: {zuul: {level: INFO, handlers: [err], propagate: no}}\n\
             root: {handlers: [file]}",
            Level::WARN,
            err.clone(),
        ),
        (
            "loggers: {zuul: {level: INFO, handlers: [err], propagate: 0}}\nroot: {handlers: [file]}",
            Level::WARN,
            err,
        ),
        (
            "loggers: {zuul: {level: CRITICAL}, zuul.fingergw: {level: DEBUG, handlers: [out]}}",
            Level::DEBUG,
            out.clone(),
        ),
        ("loggers: {zuul.executor: {level: DEBUG, handlers: [file]}}", Level::WARN, out),
    ];
    for (loggers, level, output) in cases {
        assert_eq!(of_loggers(loggers), (level, output), "{loggers}");
    }
}

/// As Python's `dictConfig` and `fileConfig` apply such files.
#[test]
fn root_logger_is_found_by_all_of_its_names() {
    for (loggers, level, output) in [
        ("loggers: {'': {level: INFO, handlers: [file]}}", Level::INFO, file("/f")),
        ("loggers: {root: {level: INFO, handlers: [file]}}", Level::INFO, file("/f")),
        // The key `root` comes last.
        (
            "loggers: {'': {level: INFO, handlers: [file]}}\nroot: {level: ERROR}",
            Level::ERROR,
            LogOutput::Stdout,
        ),
    ] {
        assert_eq!(of_loggers(loggers), (level, output), "{loggers}");
    }
    let ini = WINDMILL.replace("qualname=zuul\n", "qualname=\n").replace("level=WARNING\nh", "h");
    let (level, output, _) = settings("l.conf", &ini);
    assert_eq!((level, output), (Level::DEBUG, file("/var/log/zuul/fingergw-debug.log")));
}

/// PyYAML merges in every mapping before `dictConfig` looks.
#[test]
fn merged_mappings_count_wherever_they_are() {
    let text = "version: 1\nx-more: &more\n  file: {class: logging.FileHandler, filename: /f}\n\
                x-loggers: &loggers {zuul: {level: INFO, handlers: [file]}}\n\
                handlers:\n  <<: *more\n  out: {class: logging.StreamHandler}\n\
                loggers:\n  <<: [*loggers, {zuul: {level: ERROR}}]\n";
    assert_eq!(settings("l.yaml", text), (Level::INFO, file("/f"), Vec::new()));
    // A key of the mapping itself has precedence over a merged one.
    let own =
        text.replace("loggers:\n  <<", "loggers:\n  zuul: {level: DEBUG, handlers: [file]}\n  <<");
    assert_eq!(settings("l.yaml", &own).0, Level::DEBUG);
}

#[test]
fn level_that_is_a_reference_is_not_an_error() {
    let with_level = |level: &str| {
        let text = SF_CONFIG.replace("level: INFO", &format!("level: {level}"));
        let (level, output, ignored) = settings("l.yaml", &text);
        assert_eq!(output, file("/var/log/zuul/fingergw.log"));
        (level, ignored)
    };
    assert_eq!(with_level("ext://logging.WARNING"), (Level::WARN, Vec::new()));
    // The logger's own level remains.
    let ignored = vec!["level of handler normal".to_owned()];
    assert_eq!(with_level("ext://zuul.levels.normal"), (Level::DEBUG, ignored));
}

#[test]
fn names_of_standard_streams_are_not_files() {
    for (name, output) in [("/dev/stdout", LogOutput::Stdout), ("/dev/stderr", LogOutput::Stderr)] {
        let text = SF_CONFIG.replace("/var/log/zuul/fingergw.log", name);
        assert_eq!(settings("l.yaml", &text).1, output);
    }
}

/// If a file name is an expression, the next handler is used, with its own level.
#[test]
fn warning_says_where_lines_go_instead() {
    let ini = WINDMILL
        .replace("args=('/var/log/zuul/fingergw-debug.log',)", "args=(HOME,)")
        .replace("args=('/var/log/zuul/fingergw.log', 'H', 8, 14,)", "args=(HOME,)")
        .replace("propagate=0", "propagate=1");
    let warning = read("l.conf", &ini).map(|log| log.ignored());
    let expected = "l.conf: these have no effect: handler debug, handler normal; lines go to standard \
                    output from level warn on";
    assert_eq!(warning, Ok(Some(expected.to_owned())));
    assert_eq!(read("l.yaml", SF_CONFIG).map(|log| log.ignored()), Ok(None));
    let syslog = SF_CONFIG.replace("WatchedFileHandler", "SysLogHandler").replace("filename", "x");
    let (level, output, ignored) = settings("l.yaml", &syslog);
    assert_eq!((level, output), (Level::DEBUG, LogOutput::Stdout));
    let nowhere = "no handler of zuul.fingergw writes to a file or stream";
    assert_eq!(ignored, [nowhere, "handler normal"]);
    assert_eq!(settings("l.yaml", "version: 1").2, [nowhere]);
}

#[test]
fn file_names_in_arguments_of_file_config() {
    for (args, name) in [
        ("('/a',)", Some("/a")),
        (" ( \"/a\" ) ", Some("/a")),
        ("('/a', 'w', 'utf-8')", Some("/a")),
        ("['/a', 'a']", Some("/a")),
        ("(r'/a',)", Some("/a")),
        ("()", None),
        ("(sys.stdout,)", None),
        ("('/a' + x,)", None),
        ("('/a' '/b',)", None),
        (r"('/a\x41',)", None),
        ("(f'/a{x}',)", None),
        ("(b'/a',)", None),
        ("('/a'", None),
        ("'/a'", None),
        ("(os.path.join('a', 'b'),)", None),
        ("('é',)", Some("é")),
        ("(é", None),
    ] {
        assert_eq!(first_string(args), name, "{args}");
    }
}

/// Deeper than a stack.
#[test]
fn nesting_is_bounded() {
    for deep in ["- ".repeat(50_000), "[".repeat(50_000), "{a: ".repeat(50_000)] {
        let error = error("l.yaml", &format!("version: 1\nx:\n  {deep}"));
        assert!(error.starts_with("l.yaml:3: not a dictConfig: "), "{error}");
    }
}

/// Each line doubles what the one before stands for.
#[test]
fn aliases_of_aliases_are_bounded() {
    let mut text = "version: 1\nx0: &x0 [a]\n".to_owned();
    for number in 1..60 {
        let before = number - 1;
        text += &format!("x{number}: &x{number} [*x{before}, *x{before}]\n");
    }
    let bomb = error("l.yaml", &text);
    assert!(bomb.contains(": not a dictConfig: "), "{bomb}");
    let ignored = text.replace("x59: ", "handlers: ");
    let bomb = error("l.yaml", &ignored);
    assert!(bomb.contains(": not a dictConfig: "), "{bomb}");
    let _ = read("l.yaml", "version: 1\nx: &x [*x]\n");
}

/// Names from the file are shown on one line, and not too long.
#[test]
fn hostile_names_are_printable() {
    let yaml = "version: 1\nhandlers: {\"h\\e\": {class: SysLogHandler}}\n\
                root: {handlers: [\"h\\e\"]}\n";
    assert_eq!(settings("l.yaml", yaml).2[1], r"handler h\u{1b}");
    let missing = yaml.replace("{\"h\\e\":", "{x:");
    assert_eq!(error("l.yaml", &missing), r"l.yaml: no handler h\u{1b}");
    let level = "version: 1\nroot: {level: \"\\e\"}";
    let expected = r"l.yaml: level of logger root = \u{1b}: must be one of CRITICAL, ";
    assert!(error("l.yaml", level).starts_with(expected));
    let ini = WINDMILL.replace("keys=root,zuul,gerrit", "keys=root,zuul,gerrit\x1b");
    assert_eq!(error("l.conf", &ini), r"l.conf: [logger_gerrit\u{1b}] handlers: missing");
}

#[test]
fn files_that_python_refuses_are_refused() {
    for (text, expected) in [
        ("", "l.yaml:"),
        ("- a\n", "l.yaml:1: not a dictConfig: "),
        ("version: 1\n---\nversion: 1\n", "l.yaml:"),
        ("version: 1\nroot: [\n", "l.yaml:"),
        ("[!", "l.yaml:1: "),
        ("root: {}\n", "l.yaml:1: not a dictConfig: missing field `version`"),
        (
            "version: 1\nroot: {level: info}\n",
            "l.yaml: level of logger root = info: must be one of ",
        ),
        ("version: 1\nroot: {handlers: [x]}\n", "l.yaml: no handler x"),
        ("version: 1\nloggers: []\n", "l.yaml:2: not a dictConfig: "),
        ("version: 1\nloggers: {zuul: x}\n", "l.yaml:2: not a dictConfig: "),
    ] {
        let error = error("l.yaml", text);
        assert!(error.starts_with(expected), "{text:?}: {error}");
    }
    for (from, to, expected) in [
        ("[logger_root]\nlevel=WARNING\n", "", "l.conf: [logger_root] handlers: missing"),
        ("level=DEBUG", "level=loud", "l.conf: level of logger zuul = loud: must be one of "),
        ("[logger_zuul]", "[logger_zuul", "l.conf:14: neither \"option = value\" nor a [section]"),
        ("zuul/fingergw.log", "%h", "l.conf:41: a % must be"),
    ] {
        let error = error("l.conf", &WINDMILL.replacen(from, to, 1));
        assert!(error.starts_with(expected), "{expected}: {error}");
    }
    assert_eq!(error("l.conf", ""), "l.conf: [handlers] keys: missing");
}
