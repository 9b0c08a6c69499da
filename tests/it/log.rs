//! What is logged, and what is not.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use rustix::process::Signal;
use serde_json::Value;

use crate::support::admin::{metric, with_admin};
use crate::support::client::Client;
use crate::support::executor::Executor;
use crate::support::gateway::{Builder, Gateway};
use crate::support::system::System;

/// Serves one whole stream of `log`.
async fn stream(system: &System, gateway: &Gateway, log: &[u8]) -> String {
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let mut client = Client::ask(gateway.address(), &build).await;
    let mut hop = executor.accept().await;
    hop.write(log).await;
    hop.finish().await;
    assert_eq!(client.rest().await.0, log);
    build
}

/// Stops the gateway and returns its whole log.
async fn whole_log(mut gateway: Gateway) -> Vec<String> {
    stop(&mut gateway).await;
    gateway.log()
}

async fn stop(gateway: &mut Gateway) {
    gateway.signal(Signal::TERM);
    assert!(gateway.exit().await.success());
}

#[tokio::test]
async fn each_stream_has_one_line() {
    let system = System::new().await;
    let gateway = Builder::new(&system).ready().await;
    let build = stream(&system, &gateway, b"12345").await;
    let log = whole_log(gateway).await;
    let lines: Vec<_> = log.iter().filter(|line| line.contains(&build)).collect();
    let [line] = lines[..] else { panic!("{lines:?}") };
    for part in [
        " INFO ",
        "stream ended",
        "peer=127.0.0.1:",
        "hop=\"executor 127.0.0.1:",
        "bytes=5",
        "seconds=",
        "end=finished",
    ] {
        assert!(line.contains(part), "{part} is not in {line}");
    }
}

#[tokio::test]
async fn json_lines_have_their_fields() {
    let system = System::new().await;
    let gateway = Builder::new(&system).log("format = \"json\"").ready().await;
    let build = stream(&system, &gateway, b"12345").await;
    let log: Vec<Value> = whole_log(gateway)
        .await
        .iter()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}")))
        .collect();
    let line = log.iter().find(|line| line["build"] == build.as_str()).expect("the stream's line");
    assert_eq!(line["message"], "stream ended");
    assert_eq!((&line["bytes"], &line["end"]), (&Value::from(5), &Value::from("finished")));
    assert!(line["peer"].is_string() && line["hop"].is_string());
    let hop = [&line["hop_kind"], &line["hop_host"], &line["hop_tls"]];
    assert_eq!(hop, [&Value::from("executor"), &Value::from("127.0.0.1"), &Value::from(false)]);
    assert!(line["hop_port"].is_u64());
    let seconds = line["seconds"].to_string();
    assert!(seconds.parse::<f64>().is_ok(), "{seconds}");
    assert!(seconds.split_once('.').is_none_or(|(_, decimals)| decimals.len() <= 3), "{seconds}");
    assert!(line["timestamp"].is_string() && line["level"] == "INFO");
}

/// Returns the lines of a log file.
fn read(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.lines().map(str::to_owned).collect()
}

/// Returns how many of the lines are about the build's stream.
fn ends(log: &[String], build: &str) -> usize {
    log.iter().filter(|line| line.contains("stream ended") && line.contains(build)).count()
}

#[tokio::test]
async fn rotated_log_file_is_reopened() {
    let system = System::new().await;
    let builder = Builder::new(&system);
    let path = builder.directory().join("gateway.log");
    let rotated = builder.directory().join("gateway.log.1");
    let output = format!("output = {path:?}\nformat = \"json\"");
    let mut gateway = builder.log(&output).ready().await;
    let first = stream(&system, &gateway, b"log").await;
    fs::rename(&path, &rotated).expect("rotation");
    let second = stream(&system, &gateway, b"log").await;
    stop(&mut gateway).await;
    let (old, new) = (read(&rotated), read(&path));
    // The first stream's line may be written after the client has seen its end, and so after the
    // rotation.
    assert_eq!(ends(&old, &first) + ends(&new, &first), 1, "{old:#?} {new:#?}");
    assert_eq!((ends(&old, &second), ends(&new, &second)), (0, 1), "{old:#?} {new:#?}");
    assert!(old.iter().any(|line| line.contains("registered as")), "{old:#?}");
    assert!(new.last().is_some_and(|line| line.contains("\"stopped\"")), "{new:#?}");
    for line in old.iter().chain(&new) {
        assert!(serde_json::from_str::<Value>(line).is_ok(), "{line}");
    }
    assert_eq!(gateway.log(), Vec::<String>::new(), "no output elsewhere");
    // Existing content is kept.
    let before = new.len();
    let gateway = Builder::new(&system).log(&output).ready().await;
    whole_log(gateway).await;
    assert!(read(&path).len() > before && read(&path).starts_with(&new));
}

#[tokio::test]
async fn log_file_is_reopened_after_its_directory_was_removed() {
    let system = System::new().await;
    let builder = with_admin(&system);
    let directory = builder.directory().join("zuul");
    fs::create_dir(&directory).expect("a directory");
    let path = directory.join("gateway.log");
    let mut gateway = builder.log(&format!("output = {path:?}")).ready().await;
    let lines_lost = "zuul_fingergw_log_lines_lost_total";
    assert_eq!(metric(&gateway, lines_lost).await, 0.0);
    // Renamed first, so that no file can be created in it during its removal.
    let going = directory.with_extension("going");
    fs::rename(&directory, &going).expect("no directory");
    fs::remove_dir_all(&going).expect("no old file either");
    // Streams continue, their log lines are lost.
    let lost = stream(&system, &gateway, b"log").await;
    let error = format!("{}: cannot be written: ", path.display());
    gateway.logged("the error on stderr", |line| line.starts_with(&error)).await;
    assert!(metric(&gateway, lines_lost).await >= 1.0);
    fs::create_dir(&directory).expect("a directory");
    let kept = stream(&system, &gateway, b"log").await;
    stop(&mut gateway).await;
    assert_eq!(gateway.log().len(), 1, "logged once");
    let log = read(&path);
    assert_eq!((ends(&log, &lost), ends(&log, &kept)), (0, 1), "{log:#?}");
    let losses: Vec<_> =
        log.iter().filter(|line| line.contains("cannot write log lines in time")).collect();
    assert!(losses.len() == 1 && losses[0].contains(" WARN "), "{log:#?}");
}

#[tokio::test]
async fn full_disk_does_not_stop_streams() {
    let system = System::new().await;
    let mut gateway = Builder::new(&system).log("output = \"/dev/full\"").ready().await;
    for _ in 0..3 {
        stream(&system, &gateway, b"log").await;
    }
    gateway.logged("the error on stderr", |line| line.contains("No space left")).await;
    assert_eq!(whole_log(gateway).await.len(), 1, "logged once");
}

/// Splits a line in Zuul's format, `%(asctime)s %(levelname)s %(name)s: %(message)s`, into time,
/// level, name and message.
fn parse_zuul_line(line: &str) -> Option<(DateTime, &str, &str, &str)> {
    const TIME: &str = "dddd-dd-dd dd:dd:dd,ddd";
    let (time, rest) = (line.get(..TIME.len())?, line.get(TIME.len()..)?);
    let like = |(c, pattern): (char, char)| match pattern {
        'd' => c.is_ascii_digit(),
        _ => c == pattern,
    };
    if !time.chars().zip(TIME.chars()).all(like) {
        return None;
    }
    let time = time.replace(',', ".").parse().ok()?;
    let (level, rest) = rest.strip_prefix(' ')?.split_once(' ')?;
    let (name, message) = rest.split_once(": ")?;
    ["DEBUG", "INFO", "WARNING", "ERROR"].contains(&level).then_some((time, level, name, message))
}

#[tokio::test]
async fn zuul_conf_selects_the_line_format_of_zuuls_gateway() {
    // Written by Zuul 14.3.0.
    let real = "2026-11-21 11:13:26,065 INFO zuul.fingergw: Starting finger gateway";
    let (.., level, name, message) = parse_zuul_line(real).expect("a line in Zuul's format");
    assert_eq!((level, name, message), ("INFO", "zuul.fingergw", "Starting finger gateway"));

    // A time zone that no machine uses, so that neither UTC nor this machine's local time passes.
    let zone = "XXX-03:21";
    let now = || Timestamp::now().to_zoned(TimeZone::posix(zone).expect("a zone")).datetime();
    let system = System::new().await;
    let before = now();
    let gateway = Builder::new(&system)
        .ready_from_zuul_conf("", |command| {
            command.arg("-d").env("TZ", zone);
        })
        .await;
    let build = stream(&system, &gateway, b"12345").await;
    let log = whole_log(gateway).await;
    let after = now();
    let mut names = BTreeSet::new();
    for line in &log {
        let (time, level, name, _) = parse_zuul_line(line).unwrap_or_else(|| panic!("{line}"));
        names.insert((level, name));
        // The formatted time is truncated, not rounded.
        let whole = before.with().subsec_nanosecond(0).build().expect("a time");
        assert!(whole <= time && time <= after, "{line}");
    }
    assert!(names.contains(&("INFO", "zuul.fingergw")), "{names:?}");
    assert!(names.iter().any(|(level, name)| *level == "DEBUG" && *name != "zuul.fingergw"));
    // rustls logs through the log crate.
    assert!(names.iter().all(|(_, name)| *name != "log"), "{names:?}");
    assert!(names.iter().any(|(_, name)| name.starts_with("rustls.")), "{names:?}");
    let line = log.iter().find(|line| line.contains(&build)).expect("the stream's line");
    let (.., message) = parse_zuul_line(line).expect("the shape");
    assert!(message.starts_with("stream ended peer=127.0.0.1:"), "{message}");
}

/// Everything that a client can do without knowing a build.
async fn provoke(plain: &Gateway) {
    let (address, tls) = (plain.addresses[0], plain.addresses[1]);
    let long = vec![b'a'; 5000];
    let requests: [&[u8]; 6] =
        [b"\n", b"abcdef\n", b"\x1b[31mred\x07\r\n", b"\xff\n", b"user@host\n", &long];
    for request in requests {
        let mut client = Client::connect(address).await;
        client.send(request).await;
        client.text().await;
    }
    drop(Client::connect(address).await);
    Client::connect(address).await.reset();
    let mut client = Client::connect(tls).await;
    client.send(b"GET / HTTP/1.0\r\n\r\n").await;
    client.rest().await;
    Client::connect(tls).await.reset();
}

#[tokio::test]
async fn unauthenticated_peers_cause_no_log_line() {
    let system = System::new().await;
    let identity = system.zookeeper.authority.identity("gateway");
    let builder = Builder::new(&system).tls(&identity).listeners(&["", "tls = true"]);
    let gateway = builder.ready().await;
    // The registration is logged a moment after the entry exists.
    let before = gateway.log().len();
    provoke(&gateway).await;
    let after = whole_log(gateway).await;
    let new: Vec<_> = after[before..].iter().filter(|line| !is_stopping(line)).collect();
    assert!(new.is_empty(), "{new:#?}");
}

/// Lines of a normal run, which clients cannot cause.
fn is_stopping(line: &str) -> bool {
    let parts = [
        "registered as",
        "stopping",
        "stopped",
        "registry entry deleted",
        "all streams have ended",
    ];
    parts.iter().chain(&["no longer accepting connections"]).any(|part| line.contains(part))
}

#[tokio::test]
async fn input_of_peers_is_escaped_and_truncated() {
    let system = System::new().await;
    let identity = system.zookeeper.authority.identity("gateway");
    let builder = Builder::new(&system).tls(&identity).listeners(&["", "tls = true"]);
    let gateway = builder.log("level = \"debug\"").ready().await;
    provoke(&gateway).await;
    let mut client = Client::connect(gateway.address()).await;
    client.send(&[vec![b'z'; 900], b"\n".to_vec()].concat()).await;
    client.text().await;
    let log = whole_log(gateway).await;
    assert!(log.iter().any(|line| line.contains(r"\\x1b[31mred\\x07")), "escaped");
    assert!(log.iter().all(|line| line.bytes().all(|byte| byte >= b' ')), "printable");
    let longest = "z".repeat(64) + "...";
    assert!(log.iter().any(|line| line.contains(&longest)), "cut");
    assert!(!log.iter().any(|line| line.contains(&"z".repeat(65))));
}

#[tokio::test]
async fn log_level_and_output_are_configurable() {
    let system = System::new().await;
    let quiet = Builder::new(&system).log("level = \"error\"").ready().await;
    stream(&system, &quiet, b"log").await;
    assert_eq!(whole_log(quiet).await, Vec::<String>::new());
    let other = Builder::new(&system).log("output = \"stderr\"").ready().await;
    let build = stream(&system, &other, b"log").await;
    assert!(whole_log(other).await.iter().any(|line| line.contains(&build)));
}

/// The three kinds of `log_config`, each with a file for lines from debug on and without
/// unsupported settings.
fn log_configs(log: &Path) -> [(&'static str, String); 3] {
    const FORMAT: &str = "%(asctime)s %(levelname)s %(name)s: %(message)s";
    let log = log.display();
    let yaml = format!(
        "version: 1\nformatters:\n  simple: {{format: '{FORMAT}'}}\n\
         handlers:\n  file:\n    class: logging.handlers.WatchedFileHandler\n    \
         filename: {log}\n    formatter: simple\n\
         loggers:\n  zuul: {{level: DEBUG, handlers: [file]}}\n"
    );
    let json = serde_json::json!({
        "version": 1,
        "formatters": {"simple": {"format": FORMAT}},
        "handlers": {
            "file": {
                "class": "logging.FileHandler",
                "filename": log.to_string(),
                "formatter": "simple"
            }
        },
        "root": {"level": "DEBUG", "handlers": ["file"]}
    });
    let ini = format!(
        "[loggers]\nkeys=root,zuul\n[handlers]\nkeys=file\n[formatters]\nkeys=simple\n\
         [logger_root]\nlevel=WARNING\nhandlers=\n\
         [logger_zuul]\nqualname=zuul\nlevel=DEBUG\nhandlers=file\n\
         [handler_file]\nclass=FileHandler\nformatter=simple\nargs=('{log}',)\n\
         [formatter_simple]\nformat={FORMAT}\n"
    );
    [("log.yaml", yaml), ("log.json", json.to_string()), ("log.conf", ini)]
}

#[tokio::test]
async fn log_config_sets_level_and_file() {
    let system = System::new().await;
    for index in 0..3 {
        let builder = Builder::new(&system);
        let path = builder.directory().join("gateway.log");
        let (name, text) = &log_configs(&path)[index];
        fs::write(builder.directory().join(name), text).expect("a log_config");
        // The file below the home directory.
        let home = builder.directory().to_owned();
        let option = format!("log_config = ~/{name}");
        let mut gateway = builder
            .ready_from_zuul_conf(&option, |command| {
                command.env("HOME", home);
            })
            .await;
        let build = stream(&system, &gateway, b"log").await;
        stop(&mut gateway).await;
        assert_eq!(gateway.log(), Vec::<String>::new(), "{name}");
        let log = read(&path);
        assert_eq!(ends(&log, &build), 1, "{name}: {log:#?}");
        let levels: BTreeSet<_> =
            log.iter().map(|line| parse_zuul_line(line).expect("the shape").1).collect();
        assert!(levels.contains("DEBUG"), "{name}: {levels:?}");
        assert!(!log.iter().any(|line| line.contains(name)), "{name}: no message expected");
    }
}

/// As in Zuul's program, `-d` has no effect if there is a `log_config`.
#[tokio::test]
async fn ignored_parts_of_a_log_config_are_one_warning() {
    let system = System::new().await;
    let builder = Builder::new(&system);
    let file = builder.directory().join("logging.yaml");
    let text = "version: 1\nhandlers:\n  console: {class: logging.StreamHandler}\n  \
                syslog: {class: logging.handlers.SysLogHandler}\n\
                loggers:\n  gerrit: {level: DEBUG}\n\
                root: {level: INFO, handlers: [syslog, console]}\n";
    fs::write(&file, text).expect("a log_config");
    let option = format!("log_config = {}", file.display());
    let gateway = builder
        .ready_from_zuul_conf(&option, |command| {
            command.arg("-d");
        })
        .await;
    let log = whole_log(gateway).await;
    let lines: Vec<_> = log.iter().map(|line| parse_zuul_line(line).expect("the shape")).collect();
    assert!(lines.iter().all(|(_, level, ..)| *level != "DEBUG"), "{log:#?}");
    let of_it = format!("{}: ", file.display());
    let reloads: Vec<_> =
        lines.iter().filter(|(.., message)| message.starts_with(&of_it)).collect();
    let [(_, "WARNING", _, message)] = reloads[..] else { panic!("{reloads:#?}") };
    for part in ["handler syslog", "-d (", "lines go to standard error from level info on"] {
        assert!(message.contains(part), "{part} is not in {message}");
    }
}
