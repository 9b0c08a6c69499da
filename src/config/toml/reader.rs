//! A TOML document read by hand rather than through serde, which stops at the first fault; an
//! operator wants them all. Knows types and spans, but no key.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ops::{Range, RangeInclusive};
use std::path::PathBuf;
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::config::error::{ConfigError, excerpt};
use crate::config::parse;
use crate::config::parse::Parsed;
use crate::config::{TlsFileKeys, TlsFiles};

/// A document being read.
pub(crate) struct Document<'t> {
    file: &'t str,
    text: &'t str,
    tree: Spanned<DeTable<'t>>,
    faults: RefCell<Vec<ConfigError>>,
}

impl<'t> Document<'t> {
    /// Parses `text`; syntax faults are the first to be noted.
    pub(crate) fn new(file: &'t str, text: &'t str) -> Self {
        let (tree, errors) = DeTable::parse_recoverable(text);
        let document = Self { file, text, tree, faults: RefCell::new(Vec::new()) };
        for error in errors {
            let reason = document.syntax_problem(&error);
            document.fault(error.span(), String::new(), None, reason);
        }
        document
    }

    /// Describes a syntax error, in other words than the parser's for two common mistakes: a string
    /// without quotes, for which it expects a boolean, and a second definition, of which it does not
    /// say what is there twice.
    fn syntax_problem(&self, error: &toml::de::Error) -> String {
        let message = error.message();
        let Some(span) = error.span() else { return message.to_owned() };
        let start = self.text[..span.start].rfind('\n').map_or(0, |end| end + 1);
        let line = self.text[start..].lines().next().unwrap_or_default();
        if message == "duplicate key" {
            let name = excerpt(&self.text[span]);
            return format!("{name}: there is one already; remove one, or merge the two");
        }
        let value = line.split_once('=').map(|(key, value)| (key.trim(), value.trim()));
        match value {
            Some((key, value)) if value.starts_with(is_typographic_quote) => {
                format!("{}: typographic quotes; write \"...\"", excerpt(key))
            }
            Some((key, value)) if is_bare_word(value) => {
                format!(
                    "{} = {}: a string must be in quotes: \"...\"",
                    excerpt(key),
                    excerpt(value)
                )
            }
            _ => message.to_owned(),
        }
    }

    fn fault(
        &self,
        span: Option<Range<usize>>,
        key: String,
        value: Option<String>,
        reason: String,
    ) {
        let line = span.map(|span| self.line(span.start));
        let file = self.file.to_owned();
        self.faults.borrow_mut().push(ConfigError { file, line, key, value, reason });
    }

    /// The line of a byte, counted from 1.
    fn line(&self, at: usize) -> usize {
        let before = &self.text.as_bytes()[..at.min(self.text.len())];
        1 + before.iter().filter(|byte| **byte == b'\n').count()
    }

    /// The table of keys before the first header.
    pub(crate) fn root(&self) -> Table<'_> {
        Table::new(self, "", Some(self.tree.get_ref()))
    }

    /// Everything noted.
    pub(crate) fn into_faults(self) -> Vec<ConfigError> {
        self.faults.into_inner()
    }
}

fn is_typographic_quote(char: char) -> bool {
    matches!(char, '\u{201c}'..='\u{201f}' | '\u{2018}'..='\u{201b}')
}

/// Whether a value of this text is a word that TOML has no meaning for.
fn is_bare_word(value: &str) -> bool {
    let word = value.split(|c: char| c.is_whitespace() || c == '#').next().unwrap_or_default();
    word.starts_with(|c: char| c.is_alphabetic() || c == '/')
        && !["true", "false", "inf", "nan"].contains(&word)
}

/// One table being read: remembers which keys were asked for, so that others can be refused.
pub(crate) struct Table<'d> {
    document: &'d Document<'d>,
    name: &'d str,
    table: Option<&'d DeTable<'d>>,
    asked: BTreeSet<&'static str>,
}

pub(crate) type Found<'d> = &'d Spanned<DeValue<'d>>;

impl<'d> Table<'d> {
    fn new(document: &'d Document<'d>, name: &'d str, table: Option<&'d DeTable<'d>>) -> Self {
        Self { document, name, table, asked: BTreeSet::new() }
    }

    /// A table inside this one, under the name it has in faults.
    pub(crate) fn inner(&self, name: &'d str, table: Option<&'d DeTable<'d>>) -> Self {
        Self::new(self.document, name, table)
    }

    /// Whether the document has `key` here, of whatever type.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.table.is_some_and(|table| table.contains_key(key))
    }

    fn path(&self, key: &str) -> String {
        if self.name.is_empty() { key.to_owned() } else { format!("{}.{key}", self.name) }
    }

    /// The value of `key`.
    pub(crate) fn find(&mut self, key: &'static str) -> Option<Found<'d>> {
        self.asked.insert(key);
        self.table?.get(key)
    }

    /// Notes a fault in the value of `key`.
    pub(crate) fn refuse(&self, key: &str, found: Option<Found<'_>>, reason: String) {
        let span = found.map(Spanned::span);
        let value = span.clone().map(|span| excerpt(&self.document.text[span]));
        self.document.fault(span, self.path(key), value, reason);
    }

    fn read<T>(
        &mut self,
        key: &'static str,
        read: impl Fn(&DeValue<'_>) -> Parsed<T>,
    ) -> Option<T> {
        let found = self.find(key)?;
        read(found.get_ref()).map_err(|reason| self.refuse(key, Some(found), reason)).ok()
    }

    /// A string that `read` understands.
    pub(crate) fn text<T>(
        &mut self,
        key: &'static str,
        read: impl Fn(&str) -> Parsed<T>,
    ) -> Option<T> {
        self.read(key, |value| match value.as_str() {
            Some(text) => read(text),
            None => Err("must be a string in quotes".to_owned()),
        })
    }

    /// A list of strings, of one at least, that `read` understands.
    pub(crate) fn non_empty_list<T>(
        &mut self,
        key: &'static str,
        read: impl Fn(&str) -> Parsed<T>,
    ) -> Option<Vec<T>> {
        let found = self.find(key)?;
        if found.get_ref().as_array().is_some_and(|items| items.is_empty()) {
            self.refuse(key, Some(found), "must name one at least, or be left out".to_owned());
        }
        self.list(key, read)
    }

    /// The tables of the array `key`, each where it was found and to be read as `name`; none if there
    /// is no such array.
    pub(crate) fn tables(&mut self, key: &'static str, name: &'d str) -> Vec<(Found<'d>, Self)> {
        let found = self.find(key);
        let items = match found.map(Spanned::get_ref) {
            None => return Vec::new(),
            Some(DeValue::Array(array)) => array,
            Some(_) => {
                self.refuse(key, found, format!("must be an array of tables: [[{name}]]"));
                return Vec::new();
            }
        };
        let mut tables = Vec::new();
        for item in items.iter() {
            match item.get_ref().as_table() {
                Some(table) => tables.push((item, self.inner(name, Some(table)))),
                None => self.refuse(key, Some(item), format!("must be a table: [[{name}]]")),
            }
        }
        tables
    }

    /// An absolute path.
    pub(crate) fn path_of_file(&mut self, key: &'static str) -> Option<PathBuf> {
        self.text(key, |text| match text.starts_with('/') {
            true => Ok(PathBuf::from(text)),
            false => Err("must be an absolute path".to_owned()),
        })
    }

    /// `true` or `false`.
    pub(crate) fn boolean(&mut self, key: &'static str, default: bool) -> bool {
        self.some_boolean(key).unwrap_or(default)
    }

    /// `true` or `false`, if it is there.
    pub(crate) fn some_boolean(&mut self, key: &'static str) -> Option<bool> {
        self.read(key, |value| value.as_bool().ok_or("must be true or false".to_owned()))
    }

    /// A whole number in `range`.
    pub(crate) fn integer(&mut self, key: &'static str, range: RangeInclusive<i64>) -> Option<i64> {
        self.read(key, |value| {
            value
                .as_integer()
                .and_then(|integer| i64::from_str_radix(integer.as_str(), integer.radix()).ok())
                .filter(|integer| range.contains(integer))
                .ok_or_else(|| {
                    format!("must be a whole number from {} to {}", range.start(), range.end())
                })
        })
    }

    /// A time from a millisecond to a day.
    pub(crate) fn duration(&mut self, key: &'static str, default: Duration) -> Duration {
        let day = Duration::from_millis(1)..=Duration::from_secs(86_400);
        self.duration_in(key, default, &day)
    }

    /// A time in `range`.
    pub(crate) fn duration_in(
        &mut self,
        key: &'static str,
        default: Duration,
        range: &RangeInclusive<Duration>,
    ) -> Duration {
        self.text(key, |text| parse::duration(text, range)).unwrap_or(default)
    }

    /// A time of up to 30 days, or "never".
    pub(crate) fn duration_or_never(&mut self, key: &'static str) -> Option<Duration> {
        let range = Duration::from_millis(1)..=Duration::from_secs(30 * 86_400);
        let read = |text: &str| match text {
            "never" => Ok(None),
            _ => parse::duration(text, &range)
                .map(Some)
                .map_err(|reason| format!("{reason}, or \"never\"")),
        };
        self.text(key, read).flatten()
    }

    /// A list of strings that `read` understands.
    pub(crate) fn list<T>(
        &mut self,
        key: &'static str,
        read: impl Fn(&str) -> Parsed<T>,
    ) -> Option<Vec<T>> {
        let found = self.find(key)?;
        let Some(items) = found.get_ref().as_array() else {
            self.refuse(key, Some(found), "must be a list of strings: [\"...\"]".to_owned());
            return None;
        };
        let mut all = Vec::new();
        for item in items.iter() {
            let text = item.get_ref().as_str().ok_or("must be a string in quotes".to_owned());
            match text.and_then(&read) {
                Ok(value) => all.push(value),
                Err(reason) => self.refuse(key, Some(item), reason),
            }
        }
        Some(all)
    }

    /// One of the names in `choices`.
    pub(crate) fn choice<T: Copy>(
        &mut self,
        key: &'static str,
        choices: &[(&str, T)],
    ) -> Option<T> {
        self.text(key, |text| {
            choices.iter().find(|(name, _)| *name == text).map(|(_, choice)| *choice).ok_or_else(
                || {
                    let names: Vec<_> =
                        choices.iter().map(|(name, _)| format!("\"{name}\"")).collect();
                    format!("must be one of {}", names.join(", "))
                },
            )
        })
    }

    /// The table `name` below the root; an empty one if there is none.
    pub(crate) fn table(&mut self, name: &'static str) -> Self {
        let table = self.find(name).and_then(|found| {
            let table = found.get_ref().as_table();
            if table.is_none() {
                self.refuse(name, Some(found), format!("must be a table: [{name}]"));
            }
            table
        });
        self.inner(name, table)
    }

    /// Refuses what nobody asked for.
    pub(crate) fn finish(self) {
        for (key, _) in self.table.into_iter().flatten() {
            if !self.asked.contains(key.get_ref().as_ref()) {
                let known: Vec<_> = self.asked.iter().copied().collect();
                let meant = parse::closest(key.get_ref(), known.iter().copied());
                let meant = meant.map_or(String::new(), |key| format!(" (did you mean {key}?)"));
                let reason = format!("unknown key{meant}; known here: {}", known.join(", "));
                let path = self.path(&excerpt(key.get_ref()));
                self.document.fault(Some(key.span()), path, None, reason);
            }
        }
    }

    /// The three files of an identity: all or none. `None` is also what a fault leaves.
    pub(crate) fn identity(&mut self, keys: [&'static str; 3], required: bool) -> Option<TlsFiles> {
        let [cert, key, ca] = keys;
        let given = keys.map(|key| self.has(key));
        let files = (self.path_of_file(cert), self.path_of_file(key), self.path_of_file(ca));
        for (name, given_here) in keys.iter().zip(given) {
            if !given_here && (required || given.contains(&true)) {
                let reason = format!("missing; {cert}, {key} and {ca} are needed together");
                self.refuse(name, None, reason);
            }
        }
        match files {
            (Some(cert), Some(key), Some(ca)) => {
                let [cert_key, key_key, ca_key] = keys.map(|key| self.place(key));
                let keys = TlsFileKeys { cert: cert_key, key: key_key, ca: ca_key };
                Some(TlsFiles { cert, key, ca, keys })
            }
            _ => None,
        }
    }

    /// Where `key` is, for messages.
    fn place(&self, key: &str) -> String {
        let found = self.table.and_then(|table| table.get(key));
        let line = found.map_or(0, |found| self.document.line(found.span().start));
        format!("{}:{line}: {}", self.document.file, self.path(key))
    }
}
