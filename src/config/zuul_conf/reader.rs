//! Reads options of a `zuul.conf` and collects all errors.

use std::path::PathBuf;

use super::configparser::{Ini, IniError, Value};
use crate::config::error::{ConfigError, excerpt};
use crate::config::parse::Parsed;
use crate::config::{TlsFileKeys, TlsFiles};

pub(super) struct Reader<'t> {
    pub(super) file: &'t str,
    pub(super) ini: Ini,
    pub(super) errors: Vec<ConfigError>,
    /// The options that were read.
    #[cfg(test)]
    pub(super) known: std::collections::BTreeSet<(&'static str, &'static str)>,
}

impl<'t> Reader<'t> {
    pub(super) fn new(file: &'t str, ini: Ini) -> Self {
        Self {
            file,
            ini,
            errors: Vec::new(),
            #[cfg(test)]
            known: std::collections::BTreeSet::new(),
        }
    }

    /// The value of `option`, with its references replaced.
    pub(super) fn value(&mut self, section: &'static str, option: &'static str) -> Option<Value> {
        #[cfg(test)]
        self.known.insert((section, option));
        self.ini.get(section, option).unwrap_or_else(|IniError { line, reason }| {
            self.error(line, format!("[{section}] {option}"), None, reason);
            None
        })
    }

    pub(super) fn string(&mut self, section: &'static str, option: &'static str) -> Option<String> {
        self.value(section, option).map(|value| value.text)
    }

    /// A value that is not empty.
    pub(super) fn non_empty(
        &mut self,
        section: &'static str,
        option: &'static str,
    ) -> Option<String> {
        self.string(section, option).filter(|text| !text.is_empty())
    }

    /// A value that `parse` accepts.
    pub(super) fn read<T>(
        &mut self,
        section: &'static str,
        option: &'static str,
        parse: impl Fn(&str) -> Parsed<T>,
    ) -> Option<T> {
        let value = self.value(section, option)?;
        let parsed = parse(&value.text);
        parsed.map_err(|reason| self.invalid(section, option, &value, reason)).ok()
    }

    /// A value as of `ConfigParser.getboolean`.
    pub(super) fn boolean(
        &mut self,
        section: &'static str,
        option: &'static str,
        default: bool,
    ) -> bool {
        let parse = |text: &str| match text.to_lowercase().as_str() {
            "1" | "yes" | "true" | "on" => Ok(true),
            "0" | "no" | "false" | "off" => Ok(false),
            _ => Err("must be yes, true, on, 1 or no, false, off, 0".to_owned()),
        };
        self.read(section, option, parse).unwrap_or(default)
    }

    /// A path; `None` if it is empty, which switches off what it is for.
    pub(super) fn path(
        &mut self,
        section: &'static str,
        option: &'static str,
        default: &str,
    ) -> Option<PathBuf> {
        let path = self.string(section, option).unwrap_or_else(|| default.to_owned());
        (!path.is_empty()).then(|| PathBuf::from(path))
    }

    /// The files of one identity. Zuul takes two of the three for none, and uses plain text where
    /// the operator asked for TLS; that is an error here.
    pub(super) fn files(&mut self, section: &'static str, required: bool) -> Option<TlsFiles> {
        let options = ["tls_cert", "tls_key", "tls_ca"];
        let values = options.map(|option| self.value(section, option));
        let files = values.map(|value| value.filter(|value| !value.text.is_empty()));
        let needed = required || files.iter().any(Option::is_some);
        for (option, _) in options.iter().zip(&files).filter(|(_, file)| needed && file.is_none()) {
            self.missing(
                section,
                option,
                "missing; tls_cert, tls_key and tls_ca are needed together",
            );
        }
        let [Some(cert), Some(key), Some(ca)] = files else { return None };
        let keys = TlsFileKeys {
            cert: self.location(section, options[0], &cert),
            key: self.location(section, options[1], &key),
            ca: self.location(section, options[2], &ca),
        };
        let [cert, key, ca] = [cert, key, ca].map(|value| PathBuf::from(value.text));
        Some(TlsFiles { cert, key, ca, keys })
    }

    /// File, line and name of an option, for messages.
    pub(super) fn location(&self, section: &str, option: &str, value: &Value) -> String {
        match value.line {
            // From the environment.
            0 => format!("{}: [{section}] {option}", self.file),
            line => format!("{}:{line}: [{section}] {option}", self.file),
        }
    }

    /// Reports an error in the value of an option.
    pub(super) fn invalid(&mut self, section: &str, option: &str, value: &Value, reason: String) {
        let key = format!("[{section}] {option}");
        self.error(value.line, key, Some(excerpt(&value.text)), reason);
    }

    /// Reports an option that is missing.
    pub(super) fn missing(&mut self, section: &str, option: &str, reason: &str) {
        let no_section = if self.ini.has_section(section) { "" } else { " (no such section)" };
        self.error(0, format!("[{section}] {option}"), None, format!("{reason}{no_section}"));
    }

    /// `line` is 0 if the error is on none.
    pub(super) fn error(
        &mut self,
        line: usize,
        key: String,
        value: Option<String>,
        reason: String,
    ) {
        let line = (line > 0).then_some(line);
        self.errors.push(ConfigError { file: self.file.to_owned(), line, key, value, reason });
    }
}
