//! Reads level and output from the `log_config` of a `zuul.conf`, a Python logging configuration
//! (`Lib/logging/config.py`): `dictConfig` in YAML or JSON, or `fileConfig`. It names Python
//! classes and contains Python expressions, so it cannot be executed here. Formats and filters are
//! never used; one warning lists outputs and levels that are not.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_saphyr::options::DuplicateKeyPolicy;
use tracing::Level;

use super::configparser::{Ini, IniError};
use crate::config::error::{ConfigError, excerpt};
use crate::config::{Log, LogConfig, LogFormat, LogOutput};

/// The part of `dictConfig`'s schema that is used; `fileConfig` is translated to it.
#[derive(Default, Deserialize)]
struct PythonLogging {
    #[serde(rename = "version")]
    _version: u32,
    handlers: Option<BTreeMap<String, Handler>>,
    loggers: Option<BTreeMap<String, Logger>>,
    root: Option<Logger>,
}

#[derive(Deserialize)]
struct Handler {
    #[serde(alias = "()")]
    class: Option<String>,
    level: Option<String>,
    filename: Option<String>,
    stream: Option<String>,
}

#[derive(Deserialize)]
struct Logger {
    level: Option<String>,
    handlers: Option<Vec<String>>,
    propagate: Option<String>,
}

/// Reads `text`, whose kind depends on the name of its file as in Zuul
/// (`zuul/ansible/logconfig.py`).
pub(in crate::config) fn read(path: &str, text: &str) -> Result<Log, ConfigError> {
    let is_dict = [".yaml", ".yml", ".json"].iter().any(|extension| path.ends_with(extension));
    let config = if is_dict { dict_config(path, text)? } else { file_config(path, text)? };
    config.into_log(path).map_err(|reason| ConfigError::of_file(path, None, reason))
}

/// Parses YAML, of which JSON is a part, like PyYAML. The bounds are far above any real file and
/// far below what exhausts the stack or memory: a few lines of aliases can stand for gigabytes.
fn dict_config(path: &str, text: &str) -> Result<PythonLogging, ConfigError> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! { max_depth: 64, max_nodes: 100_000 },
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: 100_000 },
        duplicate_keys: DuplicateKeyPolicy::LastWins,
    };
    serde_saphyr::from_str_with_options(text, options).map_err(|error| {
        let line = error.location().and_then(|location| location.line().try_into().ok());
        let message = excerpt(&error.without_snippet().to_string());
        ConfigError::of_file(path, line, format!("not a dictConfig: {message}"))
    })
}

fn file_config(path: &str, text: &str) -> Result<PythonLogging, ConfigError> {
    let invalid = |error: IniError| ConfigError::of_file(path, Some(error.line), error.reason);
    let ini = Ini::parse(text, []).map_err(|mut errors| invalid(errors.swap_remove(0)))?;
    let get = |section: &str, option: &str| {
        let value = ini.get(section, option).map_err(invalid)?;
        Ok::<_, ConfigError>(value.map(|value| value.text).filter(|text| !text.is_empty()))
    };
    let list = |section: &str, option: &str| {
        let missing = format!("[{}] {option}: missing", excerpt(section));
        let names = ini.raw(section, option).ok_or(ConfigError::of_file(path, None, missing))?;
        let names = names.split(',').map(str::trim).filter(|name| !name.is_empty());
        Ok::<Vec<_>, ConfigError>(names.map(str::to_owned).collect())
    };
    let mut config = PythonLogging::default();
    for name in list("handlers", "keys")? {
        let section = format!("handler_{name}");
        let args = get(&section, "args")?.unwrap_or_default();
        let handler = Handler {
            class: get(&section, "class")?,
            level: get(&section, "level")?,
            filename: first_string(&args).map(str::to_owned),
            stream: args.contains("sys.stdout").then(|| "ext://sys.stdout".to_owned()),
        };
        config.handlers.get_or_insert_default().insert(name, handler);
    }
    for name in list("loggers", "keys")? {
        let section = format!("logger_{name}");
        let logger = Logger {
            level: get(&section, "level")?,
            handlers: Some(list(&section, "handlers")?),
            propagate: get(&section, "propagate")?,
        };
        match get(&section, "qualname")?.filter(|qualname| qualname != "root" && name != "root") {
            Some(qualname) => drop(config.loggers.get_or_insert_default().insert(qualname, logger)),
            None => config.root = Some(logger),
        }
    }
    Ok(config)
}

/// The first of the arguments `(...)` or `[...]`, if it is a Python string without escapes.
fn first_string(args: &str) -> Option<&str> {
    let first = args.trim_start().strip_prefix(['(', '['])?.trim_start();
    let literal = first.trim_start_matches(['r', 'u']);
    let quote = literal.chars().next().filter(|c| matches!(c, '\'' | '"'))?;
    let (string, rest) = literal[1..].split_once(quote)?;
    (rest.trim_start().starts_with([',', ')', ']']) && !string.contains('\\')).then_some(string)
}

impl PythonLogging {
    fn into_log(self, path: &str) -> Result<Log, String> {
        let handlers = self.handlers.unwrap_or_default();
        let mut loggers = self.loggers.unwrap_or_default();
        // The root logger has three names in Python.
        if let Some(root) = self.root.or_else(|| loggers.remove("")) {
            loggers.insert("root".to_owned(), root);
        }
        let mut ignored = Vec::new();
        let mut level = None;
        let mut propagates = true;
        let mut used = Vec::new();
        // The loggers that get the lines of Zuul's gateway, the most specific first.
        for place in ["zuul.fingergw", "zuul", "root"] {
            let Some(logger) = loggers.remove(place) else { continue };
            level = level.or(read_level(&logger.level, &format!("logger {place}"), &mut ignored)?);
            for name in logger.handlers.into_iter().flatten().filter(|_| propagates) {
                let handler = handlers.get(&name);
                let handler = handler.ok_or_else(|| format!("no handler {}", excerpt(&name)))?;
                used.push((format!("handler {}", excerpt(&name)), handler, handler.output()));
            }
            let propagate = logger.propagate.unwrap_or_default().to_ascii_lowercase();
            propagates &= !["0", "false", "no", "off"].contains(&propagate.as_str());
        }
        // The level of Python's root logger if none is configured.
        let mut level = level.unwrap_or(Level::WARN);
        let mut output = LogOutput::Stdout;
        let file = used.iter().position(|(.., output)| matches!(output, Some(LogOutput::File(_))));
        let chosen = file.or_else(|| used.iter().position(|(.., output)| output.is_some()));
        if chosen.is_none() {
            ignored.push("no handler of zuul.fingergw writes to a file or stream".to_owned());
        }
        if let Some((place, handler, its_output)) = chosen.map(|index| used.remove(index)) {
            output = its_output.unwrap_or(output);
            used.retain(|(other, ..)| *other != place);
            level = level.min(read_level(&handler.level, &place, &mut ignored)?.unwrap_or(level));
            if handler.class.as_ref().is_some_and(|class| class.contains("Rotating")) {
                ignored.push(format!("rotation by {place} (use logrotate)"));
            }
        }
        ignored.extend(used.into_iter().map(|(place, ..)| place));
        let log_config = Some(LogConfig { file: path.to_owned(), ignored });
        Ok(Log { level, format: LogFormat::Zuul, output, log_config })
    }
}

impl Handler {
    fn output(&self) -> Option<LogOutput> {
        let path = self.filename.as_ref().filter(|name| !name.is_empty() && !name.contains("://"));
        let file = path.map(|path| LogOutput::from_path(path.into()));
        // The last part of the name: file handlers of a site's own are files as well.
        let class = self.class.as_ref().and_then(|class| class.rsplit('.').next());
        match (class.unwrap_or_default(), self.stream.as_deref()) {
            ("StreamHandler", Some("ext://sys.stdout")) => Some(LogOutput::Stdout),
            ("StreamHandler", None | Some("ext://sys.stderr")) => Some(LogOutput::Stderr),
            (class, _) if class.ends_with("FileHandler") => file,
            _ => None,
        }
    }
}

const ALLOWED: &str = "must be one of CRITICAL, ERROR, WARNING, INFO, DEBUG, NOTSET";

/// Reads the level of `place`. One that refers to a Python object outside of `logging` is ignored.
fn read_level(
    level: &Option<String>,
    place: &str,
    ignored: &mut Vec<String>,
) -> Result<Option<Level>, String> {
    let text = level.as_deref().unwrap_or_default();
    Ok(Some(match text.strip_prefix("ext://logging.").unwrap_or(text) {
        "CRITICAL" | "FATAL" | "50" | "ERROR" | "40" => Level::ERROR,
        "WARNING" | "WARN" | "30" => Level::WARN,
        "INFO" | "20" => Level::INFO,
        "DEBUG" | "10" => Level::DEBUG,
        "NOTSET" | "0" if place == "logger root" => Level::DEBUG,
        "" | "NOTSET" | "0" => return Ok(None),
        other if other.contains("://") => {
            ignored.push(format!("level of {place}"));
            return Ok(None);
        }
        other => return Err(format!("level of {place} = {}: {ALLOWED}", excerpt(other))),
    }))
}

#[cfg(test)]
mod tests;
