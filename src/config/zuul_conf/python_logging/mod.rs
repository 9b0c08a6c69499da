//! `log_config` of a `zuul.conf`: a configuration of Python's logging, in one of its two languages
//! (`logging.config`'s `dictConfig` and `fileConfig`).
//!
//! It names Python classes and may hold Python expressions, so it cannot be carried out here. What
//! most files are there for is taken: the level, and where the lines go. All else is named to the
//! operator once. What Python would refuse is refused: a gateway that starts without its log
//! because of a slip in a file is found out when the log is needed.

pub(crate) mod dict_config;
pub(crate) mod file_config;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::{Path, PathBuf};

use tracing::Level;

use crate::config::error::{ConfigError, excerpt};
use crate::config::{Log, LogConfig, LogFormat, LogOutput};
use crate::os::file;

/// Reads the file called `path`.
///
/// # Errors
/// Why the file cannot be read, or all of its faults.
pub(crate) fn load(path: &str) -> Result<Log, Unusable> {
    let bytes = file::read(Path::new(path)).map_err(|error| Unusable::File(error.to_string()))?;
    let text = String::from_utf8(bytes)
        .map_err(|_| Unusable::File("the file is not UTF-8 text".to_owned()))?;
    read(path, &text).map_err(Unusable::Content)
}

/// Why there is nothing to take from a file.
pub(crate) enum Unusable {
    File(String),
    Content(Vec<ConfigError>),
}

pub(crate) fn read(path: &str, text: &str) -> Result<Log, Vec<ConfigError>> {
    // Upstream looks at the same three, in these letters.
    let is_dict = [".yaml", ".yml", ".json"].iter().any(|extension| path.ends_with(extension));
    let mut faults = Noted { file: path, faults: Vec::new() };
    let python = match is_dict {
        true => dict_config::read(text, &mut faults),
        false => file_config::read(text, &mut faults),
    };
    python.check(&mut faults);
    match faults.faults {
        none if none.is_empty() => Ok(python.settle(path)),
        faults => Err(faults),
    }
}

/// ConfigErrors of one file.
pub(crate) struct Noted<'t> {
    file: &'t str,
    faults: Vec<ConfigError>,
}

impl Noted<'_> {
    fn note(&mut self, line: Option<usize>, key: &str, value: Option<&str>, reason: &str) {
        self.faults.push(ConfigError {
            file: self.file.to_owned(),
            line,
            key: key.to_owned(),
            value: value.map(excerpt),
            reason: reason.to_owned(),
        });
    }
}

/// What both languages say.
#[derive(Debug, Default)]
pub(crate) struct Python {
    /// By name; the one above all is `root`.
    loggers: BTreeMap<String, Logger>,
    handlers: BTreeMap<String, Handler>,
    formatters: BTreeMap<String, Formatter>,
    /// Parts of the file that are none of these.
    rest: Vec<String>,
}

#[derive(Debug)]
struct Logger {
    /// How the file calls it: `loggers.zuul`, `[logger_zuul]`.
    place: String,
    level: Option<u32>,
    handlers: Vec<String>,
    propagate: bool,
}

#[derive(Debug)]
struct Handler {
    place: String,
    level: u32,
    formatter: Option<String>,
    target: Target,
    /// Settings of it that are not taken.
    rest: Vec<String>,
}

/// Where a handler's lines go, as far as that is plain.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Target {
    File(PathBuf),
    Stdout,
    Stderr,
    Other,
}

#[derive(Debug)]
struct Formatter {
    place: String,
    /// It makes the lines that we make.
    is_zuuls: bool,
}

/// The loggers that hear what upstream's gateway says, the nearest first.
const CHAIN: [&str; 3] = ["zuul.fingergw", "zuul", "root"];

/// What upstream writes without a `log_config`, and we with one.
const ZUULS_FORMAT: &str = "%(asctime)s %(levelname)s %(name)s: %(message)s";

impl Formatter {
    fn new(place: String, format: Option<&str>, class: Option<&str>, other: bool) -> Self {
        let class = class.unwrap_or_default().rsplit('.').next().unwrap_or_default();
        let known = ["", "Formatter", "MultiLineFormatter"].contains(&class);
        Self { place, is_zuuls: format == Some(ZUULS_FORMAT) && known && !other }
    }
}

impl Python {
    /// Adds what the file says of a logger. The root has three names in Python: its own, the empty
    /// one, and `root` among the others. What is said later replaces the handlers, and the level if
    /// it has one.
    fn add_logger(&mut self, name: &str, logger: Logger) {
        let name = if name.is_empty() { "root" } else { name };
        match self.loggers.entry(name.to_owned()) {
            Entry::Vacant(entry) => {
                entry.insert(logger);
            }
            Entry::Occupied(mut entry) => {
                let level = logger.level.or(entry.get().level);
                entry.insert(Logger { level, ..logger });
            }
        }
    }

    /// Notes names that mean nothing.
    fn check(&self, faults: &mut Noted<'_>) {
        for Logger { place, handlers, .. } in self.loggers.values() {
            for name in handlers.iter().filter(|name| !self.handlers.contains_key(*name)) {
                faults.note(None, place, Some(name), "there is no such handler");
            }
        }
        for Handler { place, formatter, .. } in self.handlers.values() {
            if let Some(name) =
                formatter.as_ref().filter(|name| !self.formatters.contains_key(*name))
            {
                faults.note(None, place, Some(name), "there is no such formatter");
            }
        }
    }

    /// What it comes to for this program.
    fn settle(self, path: &str) -> Log {
        let mut names: Vec<&String> = Vec::new();
        for logger in CHAIN.iter().filter_map(|name| self.loggers.get(*name)) {
            names.extend(&logger.handlers);
            if !logger.propagate {
                break;
            }
        }
        let target = |name: &&&String| &self.handlers[**name].target;
        let file = names.iter().find(|name| matches!(target(name), Target::File(_)));
        let chosen = file.or_else(|| names.iter().find(|name| *target(name) != Target::Other));

        let mut ignored = self.rest.clone();
        let set = |name: &str| self.loggers.get(name)?.level;
        // Of the nearest logger that has one; NOTSET is none, but at the root it is all.
        let nearer = CHAIN[..2].iter().find_map(|name| set(name).filter(|level| *level > 0));
        let mut level = nearer.or(set("root")).unwrap_or(PYTHONS_DEFAULT);
        let mut output = LogOutput::Stdout;
        if let Some(handler) = chosen.map(|name| &self.handlers[*name]) {
            level = level.max(handler.level);
            output = match &handler.target {
                Target::File(path) => LogOutput::at(path.clone()),
                Target::Stderr => LogOutput::Stderr,
                Target::Stdout | Target::Other => LogOutput::Stdout,
            };
            ignored.extend(handler.rest.iter().cloned());
            match handler.formatter.as_ref().map(|name| &self.formatters[name]) {
                Some(formatter) if formatter.is_zuuls => {}
                Some(formatter) => ignored.push(formatter.place.clone()),
                None => ignored.push(format!("that {} has no formatter", handler.place)),
            }
        } else {
            ignored.push(
                "that no handler of zuul.fingergw writes to a file, stdout or stderr".to_owned(),
            );
        }
        let others = self.handlers.iter().filter(|(name, _)| chosen.is_none_or(|c| c != name));
        ignored.extend(others.map(|(_, handler)| handler.place.clone()));
        let others = self.loggers.iter().filter(|(name, _)| !CHAIN.contains(&name.as_str()));
        ignored.extend(others.map(|(_, logger)| logger.place.clone()));
        Log {
            level: ours(level),
            format: LogFormat::Zuul,
            output,
            log_config: Some(LogConfig { file: path.to_owned(), ignored }),
        }
    }
}

/// Ours that lets through what Python's does.
fn ours(level: u32) -> Level {
    match level {
        0..=10 => Level::DEBUG,
        11..=20 => Level::INFO,
        21..=30 => Level::WARN,
        31.. => Level::ERROR,
    }
}

/// WARNING: what Python's root logger has if nobody says anything else.
const PYTHONS_DEFAULT: u32 = 30;

const LEVELS: &str = "must be CRITICAL, ERROR, WARNING, INFO, DEBUG or NOTSET";

fn level(name: &str) -> Option<u32> {
    Some(match name {
        "CRITICAL" | "FATAL" => 50,
        "ERROR" => 40,
        "WARNING" | "WARN" => 30,
        "INFO" => 20,
        "DEBUG" => 10,
        "NOTSET" => 0,
        _ => return None,
    })
}

/// What kind of handler a Python class is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Stream,
    File { rotates: bool },
    Other,
}

impl Class {
    /// By the last part of its name: `handlers.WatchedFileHandler` and any site's own are alike.
    fn of(name: &str) -> Self {
        let name = name.rsplit('.').next().unwrap_or_default();
        match name {
            "StreamHandler" => Self::Stream,
            _ if name.ends_with("FileHandler") => Self::File { rotates: name.contains("Rotating") },
            _ => Self::Other,
        }
    }
}

/// What is said of a handler that rotates its own file.
fn rotation(place: &str) -> String {
    format!("that {place} rotates its file (logrotate can)")
}
