//! Reads values from a TOML document and collects all errors. Knows types and lines, but no keys.
//!
//! Not with serde, which stops at the first error. `eserde` goes on, but reports most errors
//! without their line, and stops at the first syntax error.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ops::{Range, RangeInclusive};
use std::path::PathBuf;
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::config::error::{ConfigError, excerpt};
use crate::config::parse::{self, Parsed};
use crate::config::{TlsFileKeys, TlsFiles};

/// A document being read.
pub(super) struct Document<'t> {
    file: &'t str,
    text: &'t str,
    tree: Spanned<DeTable<'t>>,
    errors: RefCell<Vec<ConfigError>>,
}

impl<'t> Document<'t> {
    /// Parses `text`; syntax errors become the first errors.
    pub(super) fn new(file: &'t str, text: &'t str) -> Self {
        let (tree, errors) = DeTable::parse_recoverable(text);
        let document = Self { file, text, tree, errors: RefCell::new(Vec::new()) };
        for error in errors {
            document.error(error.span(), String::new(), None, document.syntax_error(&error));
        }
        document
    }

    /// Describes a syntax error. The parser's message is replaced for a string without quotes,
    /// where it asks for a boolean, and for a second definition, of which it does not name the key.
    fn syntax_error(&self, error: &toml::de::Error) -> String {
        let message = error.message();
        let Some(span) = error.span() else { return message.to_owned() };
        let start = self.text[..span.start].rfind('\n').map_or(0, |end| end + 1);
        let line = self.text[start..].lines().next().unwrap_or_default();
        if message == "duplicate key" {
            return format!(
                "{}: is defined twice; remove one definition, or merge the two",
                excerpt(&self.text[span])
            );
        }
        match line.split_once('=').map(|(key, value)| (excerpt(key.trim()), value.trim())) {
            Some((key, value)) if value.starts_with(is_typographic_quote) => {
                format!("{key}: typographic quotes; write \"...\"")
            }
            Some((key, value)) if is_bare_word(value) => {
                format!("{key} = {}: a string must be in quotes: \"...\"", excerpt(value))
            }
            _ => message.to_owned(),
        }
    }

    fn error(
        &self,
        span: Option<Range<usize>>,
        key: String,
        value: Option<String>,
        reason: String,
    ) {
        let line = span.map(|span| self.line(span.start));
        let file = self.file.to_owned();
        self.errors.borrow_mut().push(ConfigError { file, line, key, value, reason });
    }

    /// The line of a byte, counted from 1.
    fn line(&self, at: usize) -> usize {
        let before = &self.text.as_bytes()[..at.min(self.text.len())];
        1 + before.iter().filter(|byte| **byte == b'\n').count()
    }

    /// The table of the keys before the first header.
    pub(super) fn root(&self) -> Table<'_> {
        Table::new(self, "", Some(self.tree.get_ref()))
    }

    pub(super) fn into_errors(self) -> Vec<ConfigError> {
        self.errors.into_inner()
    }
}

fn is_typographic_quote(char: char) -> bool {
    matches!(char, '\u{201c}'..='\u{201f}' | '\u{2018}'..='\u{201b}')
}

/// Whether a value begins with a word that has no meaning in TOML.
fn is_bare_word(value: &str) -> bool {
    let word = value.split(|c: char| c.is_whitespace() || c == '#').next().unwrap_or_default();
    word.starts_with(|c: char| c.is_alphabetic() || c == '/')
        && !["true", "false", "inf", "nan"].contains(&word)
}

/// A value in the document, with its position.
pub(super) type Found<'d> = &'d Spanned<DeValue<'d>>;

/// A table being read. It remembers the keys that were read, to report all others.
pub(super) struct Table<'d> {
    document: &'d Document<'d>,
    name: &'d str,
    table: Option<&'d DeTable<'d>>,
    known: BTreeSet<&'static str>,
}

impl<'d> Table<'d> {
    fn new(document: &'d Document<'d>, name: &'d str, table: Option<&'d DeTable<'d>>) -> Self {
        Self { document, name, table, known: BTreeSet::new() }
    }

    /// The table `name` below this one, the root; an empty table if there is none.
    pub(super) fn table(&mut self, name: &'static str) -> Self {
        let found = self.find(name);
        let table = found.and_then(|found| found.get_ref().as_table());
        if found.is_some() && table.is_none() {
            self.error(name, found, format!("must be a table: [{name}]"));
        }
        Self::new(self.document, name, table)
    }

    /// The tables of the array `key`, each with its position, called `name` in errors. Empty if
    /// there is no such array.
    pub(super) fn tables(&mut self, key: &'static str, name: &'d str) -> Vec<(Found<'d>, Self)> {
        let found = self.find(key);
        let items = match found.map(Spanned::get_ref) {
            None => return Vec::new(),
            Some(DeValue::Array(array)) => array,
            Some(_) => {
                self.error(key, found, format!("must be an array of tables: [[{name}]]"));
                return Vec::new();
            }
        };
        let mut tables = Vec::new();
        for item in items.iter() {
            match item.get_ref().as_table() {
                Some(table) => tables.push((item, Self::new(self.document, name, Some(table)))),
                None => self.error(key, Some(item), format!("must be a table: [[{name}]]")),
            }
        }
        tables
    }

    /// Reports the keys that were not read.
    pub(super) fn reject_unknown_keys(self) {
        for (key, _) in self.table.into_iter().flatten() {
            if self.known.contains(key.get_ref().as_ref()) {
                continue;
            }
            let known: Vec<_> = self.known.iter().copied().collect();
            let meant = parse::closest(key.get_ref(), known.iter().copied());
            let meant = meant.map_or(String::new(), |key| format!(" (did you mean {key}?)"));
            let reason = format!("unknown key{meant}; known here: {}", known.join(", "));
            let path = self.path(&excerpt(key.get_ref()));
            self.document.error(Some(key.span()), path, None, reason);
        }
    }

    /// Whether the document has `key` here, of whatever type.
    pub(super) fn has(&self, key: &str) -> bool {
        self.table.is_some_and(|table| table.contains_key(key))
    }

    fn path(&self, key: &str) -> String {
        if self.name.is_empty() { key.to_owned() } else { format!("{}.{key}", self.name) }
    }

    /// File, line and name of `key`, for messages.
    pub(super) fn location(&self, key: &str) -> String {
        let found = self.table.and_then(|table| table.get(key));
        let line = found.map_or(0, |found| self.document.line(found.span().start));
        format!("{}:{line}: {}", self.document.file, self.path(key))
    }

    /// The value of `key`.
    pub(super) fn find(&mut self, key: &'static str) -> Option<Found<'d>> {
        self.known.insert(key);
        self.table?.get(key)
    }

    /// Reports an error in the value of `key`.
    pub(super) fn error(&self, key: &str, found: Option<Found<'_>>, reason: String) {
        let span = found.map(Spanned::span);
        let value = span.clone().map(|span| excerpt(&self.document.text[span]));
        self.document.error(span, self.path(key), value, reason);
    }

    fn read<T>(
        &mut self,
        key: &'static str,
        read: impl Fn(&DeValue<'_>) -> Parsed<T>,
    ) -> Option<T> {
        let found = self.find(key)?;
        read(found.get_ref()).map_err(|reason| self.error(key, Some(found), reason)).ok()
    }

    /// A string that `parse` accepts.
    pub(super) fn text<T>(
        &mut self,
        key: &'static str,
        parse: impl Fn(&str) -> Parsed<T>,
    ) -> Option<T> {
        self.read(key, |value| value.as_str().ok_or_else(not_a_string).and_then(&parse))
    }

    /// A list of strings that `parse` accepts.
    pub(super) fn list<T>(
        &mut self,
        key: &'static str,
        parse: impl Fn(&str) -> Parsed<T>,
    ) -> Option<Vec<T>> {
        let found = self.find(key)?;
        let Some(items) = found.get_ref().as_array() else {
            self.error(key, Some(found), "must be a list of strings: [\"...\"]".to_owned());
            return None;
        };
        let mut list = Vec::new();
        for item in items.iter() {
            match item.get_ref().as_str().ok_or_else(not_a_string).and_then(&parse) {
                Ok(value) => list.push(value),
                Err(reason) => self.error(key, Some(item), reason),
            }
        }
        Some(list)
    }

    /// A list as of [`Self::list`], with at least one string.
    pub(super) fn non_empty_list<T>(
        &mut self,
        key: &'static str,
        parse: impl Fn(&str) -> Parsed<T>,
    ) -> Option<Vec<T>> {
        let found = self.find(key)?;
        if found.get_ref().as_array().is_some_and(|items| items.is_empty()) {
            self.error(key, Some(found), "must have at least one entry, or be left out".to_owned());
        }
        self.list(key, parse)
    }

    /// One of the names in `choices`.
    pub(super) fn choice<T: Copy>(
        &mut self,
        key: &'static str,
        choices: &[(&str, T)],
    ) -> Option<T> {
        self.text(key, |text| {
            let choice = choices.iter().find(|(name, _)| *name == text).map(|(_, choice)| *choice);
            choice.ok_or_else(|| {
                let names: Vec<_> = choices.iter().map(|(name, _)| format!("\"{name}\"")).collect();
                format!("must be one of {}", names.join(", "))
            })
        })
    }

    /// An absolute path.
    pub(super) fn path_of_file(&mut self, key: &'static str) -> Option<PathBuf> {
        self.text(key, |text| match text.starts_with('/') {
            true => Ok(PathBuf::from(text)),
            false => Err("must be an absolute path".to_owned()),
        })
    }

    /// `true` or `false`.
    pub(super) fn boolean(&mut self, key: &'static str) -> Option<bool> {
        self.read(key, |value| value.as_bool().ok_or("must be true or false".to_owned()))
    }

    /// A whole number in `range`.
    pub(super) fn integer<T: TryFrom<i64>>(
        &mut self,
        key: &'static str,
        range: RangeInclusive<i64>,
    ) -> Option<T> {
        self.read(key, |value| {
            value
                .as_integer()
                .and_then(|integer| i64::from_str_radix(integer.as_str(), integer.radix()).ok())
                .filter(|integer| range.contains(integer))
                .and_then(|integer| integer.try_into().ok())
                .ok_or_else(|| {
                    format!("must be a whole number from {} to {}", range.start(), range.end())
                })
        })
    }

    /// A duration in `range`.
    pub(super) fn duration_in(
        &mut self,
        key: &'static str,
        default: Duration,
        range: &RangeInclusive<Duration>,
    ) -> Duration {
        self.text(key, |text| parse::duration(text, range)).unwrap_or(default)
    }

    /// A duration from a millisecond to a day.
    pub(super) fn duration(&mut self, key: &'static str, default: Duration) -> Duration {
        let range = Duration::from_millis(1)..=Duration::from_secs(86_400);
        self.duration_in(key, default, &range)
    }

    /// A duration of up to 30 days; `None` for "never", which is the default.
    pub(super) fn duration_or_never(&mut self, key: &'static str) -> Option<Duration> {
        let range = Duration::from_millis(1)..=Duration::from_secs(30 * 86_400);
        let read = |text: &str| match text {
            "never" => Ok(None),
            _ => parse::duration(text, &range)
                .map(Some)
                .map_err(|reason| format!("{reason}, or \"never\"")),
        };
        self.text(key, read).flatten()
    }

    /// The three files of an identity, of which all are needed or, unless it is `required`, none.
    /// `None` also after an error.
    pub(super) fn identity(&mut self, keys: [&'static str; 3], required: bool) -> Option<TlsFiles> {
        let given = keys.map(|key| self.has(key));
        let files = keys.map(|key| self.path_of_file(key));
        for (key, _) in keys.iter().zip(given).filter(|(_, given)| !given) {
            if required || given.contains(&true) {
                let [cert, private, ca] = keys;
                let reason = format!("missing; {cert}, {private} and {ca} are needed together");
                self.error(key, None, reason);
            }
        }
        let [Some(cert), Some(key), Some(ca)] = files else { return None };
        let [cert_key, key_key, ca_key] = keys.map(|key| self.location(key));
        Some(TlsFiles {
            cert,
            key,
            ca,
            keys: TlsFileKeys { cert: cert_key, key: key_key, ca: ca_key },
        })
    }
}

fn not_a_string() -> String {
    "must be a string in quotes".to_owned()
}
