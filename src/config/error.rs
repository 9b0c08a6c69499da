//! What is wrong with a configuration file.

use std::fmt;

/// One fault: where, what was found, what is allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ConfigError {
    pub(crate) file: String,
    /// Counted from 1; `None` where something is missing from the whole file.
    pub(crate) line: Option<usize>,
    /// With its table or section: `limits.grace`.
    pub(crate) key: String,
    /// As written, cut; `None` where nothing is.
    pub(crate) value: Option<String>,
    pub(crate) reason: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        f.write_str(": ")?;
        f.write_str(&self.key)?;
        if let Some(value) = &self.value {
            write!(f, " = {value}")?;
        }
        if self.key.is_empty() { f.write_str(&self.reason) } else { write!(f, ": {}", self.reason) }
    }
}

/// All faults of one file, in the order of their lines.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ConfigErrors(Vec<ConfigError>);

impl ConfigErrors {
    /// `Ok(value)` if there are none.
    pub(crate) fn ok_or_errors<T>(value: T, mut faults: Vec<ConfigError>) -> Result<T, Self> {
        if faults.is_empty() {
            return Ok(value);
        }
        faults.sort_by_key(|fault| fault.line.unwrap_or(usize::MAX));
        Err(Self(faults))
    }

    #[cfg(any(test, fuzzing))]
    pub(crate) fn list(&self) -> &[ConfigError] {
        &self.0
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, fault) in self.0.iter().enumerate() {
            let newline = if index > 0 { "\n" } else { "" };
            write!(f, "{newline}{fault}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

/// A value as it may be shown in a fault: as it is written, but one line, printable and at most 80
/// characters.
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
