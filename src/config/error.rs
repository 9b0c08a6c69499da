//! Errors in a configuration file.

use std::fmt;

use thiserror::Error;

/// One error: where it is, what is there and what is allowed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub(crate) struct ConfigError {
    pub(crate) file: String,
    /// Counted from 1; `None` where something is missing from the whole file.
    pub(crate) line: Option<usize>,
    /// With its table or section, such as `limits.grace`; empty if the error is not that of a key.
    pub(crate) key: String,
    /// An [`excerpt`] of the value; `None` if there is no value.
    pub(crate) value: Option<String>,
    pub(crate) reason: String,
}

impl ConfigError {
    /// An error of the file as a whole, or of a line that has no key.
    pub(crate) fn of_file(file: &str, line: Option<usize>, reason: String) -> Self {
        Self { file: file.to_owned(), line, key: String::new(), value: None, reason }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        if !self.key.is_empty() {
            write!(f, ": {}", self.key)?;
        }
        if let Some(value) = &self.value {
            write!(f, " = {value}")?;
        }
        write!(f, ": {}", self.reason)
    }
}

/// All errors of one file, sorted by line. Displayed one per line.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
pub(crate) struct ConfigErrors(Vec<ConfigError>);

impl ConfigErrors {
    /// Returns `Ok(value)` if there are no errors.
    pub(crate) fn ok_or_errors<T>(value: T, mut errors: Vec<ConfigError>) -> Result<T, Self> {
        if errors.is_empty() {
            return Ok(value);
        }
        errors.sort_by_key(|error| error.line.unwrap_or(usize::MAX));
        Err(Self(errors))
    }

    #[cfg(any(test, fuzzing))]
    pub(crate) fn list(&self) -> &[ConfigError] {
        &self.0
    }
}

/// Shortens `value` to 80 characters for a message, and escapes what is not printable, so that it
/// stays on one line.
pub(crate) fn excerpt(value: &str) -> String {
    let mut text = String::new();
    for char in value.chars().take(80) {
        match char {
            '"' | '\'' | '\\' => text.push(char),
            _ => text.extend(char.escape_debug()),
        }
    }
    if value.chars().count() > 80 {
        text.push_str("...");
    }
    text
}
