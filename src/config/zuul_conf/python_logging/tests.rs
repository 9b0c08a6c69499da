use super::file_config::{Argument, arguments_of};
use super::*;

/// As Software Factory lays it down, and as sf-operator does but for its extra logger.
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

/// As ansible-role-zuul and puppet-zuul do: all in one file, what matters in another.
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

/// Level, output and what is not taken.
fn taken(path: &str, text: &str) -> (Level, LogOutput, Vec<String>) {
    let log = read(path, text).unwrap_or_else(|faults| panic!("{faults:#?}"));
    assert_eq!(log.format, LogFormat::Zuul);
    let LogConfig { file, ignored } = log.log_config.expect("it is from one");
    assert_eq!(file, path);
    (log.level, log.output, ignored)
}

fn file(path: &str) -> LogOutput {
    LogOutput::File(path.into())
}

#[test]
fn files_that_people_have() {
    // The handler lets less through than the logger.
    let expected = (Level::INFO, file("/var/log/zuul/fingergw.log"), Vec::<String>::new());
    assert_eq!(taken("l.yaml", SF_CONFIG), expected);
    let (level, output, rest) = taken("l.yml", OPERATOR);
    assert_eq!((level, output), (Level::DEBUG, LogOutput::Stdout));
    assert_eq!(rest, ["formatters.console", "loggers.zuul.GerritConnection.io"]);
    let (level, output, rest) = taken("l.conf", WINDMILL);
    assert_eq!((level, output), (Level::DEBUG, file("/var/log/zuul/fingergw-debug.log")));
    assert_eq!(rest, ["[handler_console]", "[handler_normal]", "[logger_gerrit]"]);
    // One that rotates by itself.
    let (level, output, rest) =
        taken("l", &WINDMILL.replace("handlers=debug,normal", "handlers=normal"));
    assert_eq!((level, output), (Level::INFO, file("/var/log/zuul/fingergw.log")));
    let rotates = "that [handler_normal] rotates its file (logrotate can)";
    assert_eq!(rest, [rotates, "[handler_console]", "[handler_debug]", "[logger_gerrit]"]);
    let json = r#"{"version": 1, "root": {"level": "ERROR", "handlers": ["f"]},
        "handlers": {"f": {"class": "logging.FileHandler", "filename": "/f", "mode": "a"}}}"#;
    let rest = vec!["that handlers.f has no formatter".to_owned()];
    assert_eq!(taken("l.json", json), (Level::ERROR, file("/f"), rest));
}

/// What counts of `loggers`, given as lines of YAML, with a file handler and streams there.
fn loggers(lines: &str) -> (Level, LogOutput) {
    let text = format!(
        "version: 1\nhandlers:\n  file: {{class: ours.ReopenableFileHandler, filename: /f}}\n  \
         out: {{class: logging.StreamHandler, stream: ext://sys.stdout}}\n  \
         err: {{class: logging.StreamHandler, level: WARNING}}\n  \
         syslog: {{class: logging.handlers.SysLogHandler, address: /dev/log}}\n{lines}"
    );
    let (level, output, _) = taken("l.yaml", &text);
    (level, output)
}

#[test]
fn the_nearest_logger_counts() {
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
        ("root: {level: 15, handlers: [out]}", Level::INFO, out.clone()),
        ("root: {level: INFO, handlers: [err]}", Level::WARN, err.clone()),
        ("root: {level: INFO, handlers: [out, syslog, file]}", Level::INFO, file("/f")),
        ("root: {level: INFO, handlers: [syslog]}", Level::INFO, out.clone()),
        ("loggers: {zuul: {level: INFO}}\nroot: {handlers: [file]}", Level::INFO, file("/f")),
        ("loggers: {zuul: {level: NOTSET}}\nroot: {handlers: [out]}", Level::WARN, out.clone()),
        (
            "loggers: {zuul: {level: INFO, handlers: [err], propagate: no}}\n\
             root: {handlers: [file]}",
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
    for (lines, level, output) in cases {
        assert_eq!(loggers(lines), (level, output), "{lines}");
    }
}

/// As for Python's `logging.getLogger`, and as `dictConfig` and `fileConfig` carry out such files.
#[test]
fn root_logger_is_found_by_all_of_its_names() {
    let file = || file("/f");
    for (lines, level, output) in [
        ("loggers: {'': {level: INFO, handlers: [file]}}", Level::INFO, file()),
        ("loggers: {root: {level: INFO, handlers: [file]}}", Level::INFO, file()),
        // The part `root` comes last: its handlers replace, its level does if there is one.
        (
            "loggers: {'': {level: INFO, handlers: [out]}}\nroot: {handlers: [file]}",
            Level::INFO,
            file(),
        ),
        (
            "loggers: {'': {level: INFO, handlers: [file]}}\nroot: {level: ERROR}",
            Level::ERROR,
            LogOutput::Stdout,
        ),
    ] {
        assert_eq!(loggers(lines), (level, output), "{lines}");
    }
    let ini = WINDMILL.replace("qualname=zuul\n", "qualname=\n").replace("level=WARNING\nh", "h");
    let (level, output, _) = taken("l.conf", &ini);
    assert_eq!(
        (level, output),
        (Level::DEBUG, LogOutput::File("/var/log/zuul/fingergw-debug.log".into()))
    );
}

/// PyYAML merges in every mapping before `dictConfig` looks.
#[test]
fn merged_mappings_count_wherever_they_are() {
    let text = "version: 1\nx-more: &more\n  file: {class: logging.FileHandler, filename: /f}\n\
                x-loggers: &loggers {zuul: {level: INFO, handlers: [file]}}\n\
                handlers:\n  <<: *more\n  out: {class: logging.StreamHandler}\n\
                loggers:\n  <<: [*loggers, {zuul: {level: ERROR}}]\n";
    let (level, output, rest) = taken("l.yaml", text);
    assert_eq!((level, output), (Level::INFO, file("/f")));
    assert_eq!(rest, ["that handlers.file has no formatter", "handlers.out"]);
    // A key of the mapping itself counts before a merged one.
    let own =
        text.replace("loggers:\n  <<", "loggers:\n  zuul: {level: DEBUG, handlers: [file]}\n  <<");
    assert_eq!(taken("l.yaml", &own).0, Level::DEBUG);
}

#[test]
fn level_that_is_a_reference_is_no_fault() {
    let level = |level: &str| {
        let text = SF_CONFIG.replace("level: INFO", &format!("level: {level}"));
        let (level, output, rest) = taken("l.yaml", &text);
        assert_eq!(output, file("/var/log/zuul/fingergw.log"));
        (level, rest)
    };
    assert_eq!(level("ext://logging.WARNING"), (Level::WARN, Vec::new()));
    // The logger's own is left.
    let named = vec!["handlers.normal.level".to_owned()];
    assert_eq!(level("ext://zuul.levels.normal"), (Level::DEBUG, named));
}

#[test]
fn names_of_standard_streams_are_no_files() {
    for (name, output) in [("/dev/stdout", LogOutput::Stdout), ("/dev/stderr", LogOutput::Stderr)] {
        let text = SF_CONFIG.replace("/var/log/zuul/fingergw.log", name);
        assert_eq!(taken("l.yaml", &text).1, output);
    }
}

/// An expression as the file name: another handler takes over, with its own level.
#[test]
fn warning_says_where_lines_go_instead() {
    let ini = WINDMILL
        .replace("args=('/var/log/zuul/fingergw-debug.log',)", "args=(HOME,)")
        .replace("args=('/var/log/zuul/fingergw.log', 'H', 8, 14,)", "args=(HOME,)")
        .replace("propagate=0", "propagate=1");
    let log = read("l.conf", &ini).unwrap_or_else(|faults| panic!("{faults:#?}"));
    let warning = log.ignored().expect("a warning");
    assert!(warning.contains("[handler_debug]"), "{warning}");
    assert!(warning.ends_with("; lines go to standard output from level warn on"), "{warning}");
    let none = read("l.yaml", SF_CONFIG).unwrap_or_else(|faults| panic!("{faults:#?}"));
    assert_eq!(none.ignored(), None);
}

#[test]
fn what_is_ignored_is_named() {
    let text = SF_CONFIG
        .replace("WatchedFileHandler", "RotatingFileHandler\n    maxBytes: 5\n    mode: w")
        .replace("level: INFO", "level: INFO\n    filters: [x]")
        .replace("loggers:", "filters: {x: {name: zuul}}\nloggers:\n  kazoo: {level: ERROR}");
    let (.., rest) = taken("l.yaml", &text);
    assert_eq!(
        rest,
        [
            "filters",
            "that handlers.normal rotates its file (logrotate can)",
            "handlers.normal.mode",
            "handlers.normal.filters",
            "loggers.kazoo"
        ]
    );
    let text = SF_CONFIG.replace("WatchedFileHandler", "SysLogHandler").replace("filename", "x");
    let (_, output, rest) = taken("l.yaml", &text);
    assert_eq!(output, LogOutput::Stdout);
    assert!(rest[0].starts_with("that no handler ") && rest[1] == "handlers.normal", "{rest:?}");
    let dates =
        SF_CONFIG.replace("formatters:\n  console:", "formatters:\n  console:\n    datefmt: '%H'");
    assert_eq!(taken("l.yaml", &dates).2, ["formatters.console"]);
}

/// Deeper than a stack.
#[test]
fn nesting_has_a_bound() {
    for deep in ["- ".repeat(100_000), "[".repeat(100_000), "{a: ".repeat(100_000)] {
        let found = faults("l.yaml", &format!("version: 1\nx:\n  {deep}"));
        assert!(found.len() == 1 && found[0].starts_with("l.yaml:3: "), "{found:?}");
    }
}

/// Each line doubles what the one before stands for.
#[test]
fn aliases_of_aliases_have_a_bound() {
    let mut text = "version: 1\nx0: &x0 [a]\n".to_owned();
    for number in 1..60 {
        let before = number - 1;
        text += &format!("x{number}: &x{number} [*x{before}, *x{before}]\n");
    }
    let found = faults("l.yaml", &text);
    assert!(found.len() == 1 && found[0].contains("too large"), "{found:?}");
    let itself = faults("l.yaml", "version: 1\nx: &x [*x]\n");
    assert!(itself.len() <= 1, "{itself:?}");
}

/// Names from the file are people's to read: on one line, and not too long.
#[test]
fn names_are_shown_harmless() {
    let yaml = "version: 1\nhandlers: {\"h\\e\": {class: X, \"k\\n\": 1}}\n\
                loggers: {\"l\\t\": {}}\nformatters: {\"f\\0\": []}\n";
    let found = faults("l.yaml", yaml);
    assert_eq!(found, [r"l.yaml: formatters.f\0: must be a mapping"]);
    let yaml = yaml.replace("[]", "{}").replace("class: X", "class: StreamHandler");
    let chosen = format!("{yaml}root: {{handlers: [\"h\\e\"]}}\n");
    let (.., rest) = taken("l.yaml", &chosen);
    assert_eq!(rest[0], r"handlers.h\u{1b}.k\n");
    assert!(rest.contains(&r"loggers.l\t".to_owned()), "{rest:?}");
    let ini = WINDMILL.replace("keys=root,zuul,gerrit", "keys=root,zuul,gerrit\x1b");
    assert!(faults("l.conf", &ini)[0].starts_with(r"l.conf: [logger_gerrit\u{1b}] "), "{ini}");
}

/// ConfigErrors as an operator sees them.
fn faults(path: &str, text: &str) -> Vec<String> {
    let faults = read(path, text).err().unwrap_or_default();
    faults.iter().map(ToString::to_string).collect()
}

#[test]
fn what_python_refuses_is_refused() {
    let cases = [
        ("", "l.yaml: must be one YAML mapping, as Python's dictConfig takes it"),
        ("- a\n", "l.yaml: must be one YAML mapping, as Python's dictConfig takes it"),
        ("version: 1\n---\nversion: 1\n", "l.yaml: must be one YAML mapping, as"),
        ("version: 1\nroot: [\n", "l.yaml:"),
        ("[!", "l.yaml:1: "),
        ("root: {}\n", "l.yaml: version: must be 1"),
        ("version: 1\nroot: {level: info}\n", "l.yaml: root.level = info: must be CRITICAL, "),
        ("version: 1\nroot: {handlers: [x]}\n", "l.yaml: root = x: there is no such handler"),
        ("version: 1\nhandlers: {x: {}}\n", "l.yaml: handlers.x.class: missing"),
        ("version: 1\nhandlers: {x: {class: FileHandler}}\n", "l.yaml: handlers.x.filename: "),
        (
            "version: 1\nhandlers: {x: {class: StreamHandler, formatter: f}}\n",
            "l.yaml: handlers.x = f: there is no such formatter",
        ),
        ("version: 1\nloggers: []\n", "l.yaml: loggers: must be a mapping"),
        ("version: 1\nloggers: {zuul: x}\n", "l.yaml: loggers.zuul: must be a mapping"),
    ];
    for (text, expected) in cases {
        let found = faults("l.yaml", text);
        assert!(found.len() == 1 && found[0].starts_with(expected), "{text:?}: {found:#?}");
    }
    let cases = [
        (
            "[logger_root]\nlevel=WARNING\n",
            "",
            "l.conf: [logger_root] handlers: missing (no such s",
        ),
        ("keys=root,zuul,", "keys=zuul,", "l.conf: [loggers] keys: must have root among them"),
        ("propagate=0", "propagate=no", "l.conf: [logger_zuul] propagate = no: must be 0 or 1"),
        ("qualname=zuul\n", "", "l.conf: [logger_zuul] qualname: missing"),
        ("level=INFO", "level=20", "l.conf: [handler_normal] level = 20: must be CRITICAL, "),
        ("[logger_zuul]", "[logger_zuul", "l.conf:14: neither \"option = value\" nor a [section]"),
        ("zuul/fingergw.log", "%h", "l.conf:41: [handler_normal] args: a % must be"),
    ];
    for (from, to, expected) in cases {
        let found = faults("l.conf", &WINDMILL.replacen(from, to, 1));
        assert!(found.iter().any(|fault| fault.starts_with(expected)), "{expected}: {found:#?}");
    }
    assert_eq!(faults("l.conf", "").len(), 3, "no section is there");
}

#[test]
fn python_expressions() {
    let text = |text: &str| Argument::Text(text.to_owned());
    let cases = [
        ("()", Argument::None, false),
        ("(sys.stdout,)", Argument::Name("sys.stdout"), false),
        (" ( sys.stderr ) ", Argument::Name("sys.stderr"), false),
        ("('/a',)", text("/a"), false),
        ("(\"/a\")", text("/a"), false),
        (r"('/a\'b\\c',)", text(r"/a'b\c"), false),
        ("('/a', 'a')", text("/a"), false),
        ("('/a', 'w')", text("/a"), true),
        ("('/a', 'H', 8, 14,)", text("/a"), true),
        ("('/a' + x,)", Argument::Other, false),
        ("('/a' \"/b\",)", text("/a/b"), false),
        ("['/a']", text("/a"), false),
        ("['/a', 'a']", text("/a"), false),
        (r"(r'/a\b',)", text(r"/a\b"), false),
        ("(f'/a',)", text("/a"), false),
        ("(f'/a{x}',)", Argument::Name(""), false),
        ("(b'/a',)", Argument::Name(""), false),
        (r"('/a\x41',)", Argument::Name(""), false),
        ("('/a'", Argument::Other, false),
        ("'/a'", Argument::Other, false),
        ("(os.path.join('a', 'b'),)", Argument::Other, false),
    ];
    for (expression, first, more) in cases {
        let found = arguments_of(expression);
        // A name that nobody knows is as good as anything else that is not understood.
        if first == Argument::Name("") {
            assert!(!matches!(found.0, Argument::Text(_) | Argument::None), "{expression}");
            continue;
        }
        assert_eq!(found, (first, more), "{expression}");
    }
    let keywords = |kwargs: &str| {
        let args = "args=('/var/log/zuul/fingergw-debug.log',)";
        let (_, output, rest) = taken("l", &WINDMILL.replace(args, &format!("kwargs={kwargs}")));
        (output, rest[0].clone())
    };
    let plain = keywords("{'filename': '/k', \"encoding\": 'utf-8'}");
    assert_eq!(plain, (file("/k"), "[handler_console]".to_owned()));
    let more = keywords("{'filename': '/k', 'delay': True}");
    assert_eq!(more, (file("/k"), "further arguments of [handler_debug]".to_owned()));
    let other = keywords("{'filename': HOME}");
    assert_eq!(other.0, file("/var/log/zuul/fingergw.log"), "the next file");
}
