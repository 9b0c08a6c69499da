//! `fileConfig`: an ini file whose handlers have Python expressions for arguments.

use super::{Class, Formatter, Handler, LEVELS, Logger, Noted, Python, Target, level, rotation};
use crate::config::error::excerpt;
use crate::config::zuul_conf::configparser::{Ini, IniError};

/// Reads `text`, as far as it can be.
pub(crate) fn read(text: &str, faults: &mut Noted<'_>) -> Python {
    let mut python = Python::default();
    let ini = match Ini::parse(text, []) {
        Ok(ini) => ini,
        Err(errors) => {
            for IniError { line, reason } in errors {
                faults.note(Some(line), "", None, &reason);
            }
            return python;
        }
    };
    let mut reader = Reader { ini: &ini, faults };
    for name in reader.keys("formatters") {
        let section = format!("formatter_{name}");
        // RawValue, because it is full of references that are not the file's.
        let raw = |option| ini.raw(&section, option).filter(|value| !value.is_empty());
        let other = raw("datefmt").is_some() || raw("style").is_some_and(|style| style != "%");
        let place = place(&section);
        let formatter = Formatter::new(place, raw("format"), raw("class"), other);
        python.formatters.insert(name, formatter);
    }
    for name in reader.keys("handlers") {
        let handler = reader.handler(&format!("handler_{name}"));
        python.handlers.insert(name, handler);
    }
    let names = reader.keys("loggers");
    if ini.has_section("loggers") && !names.iter().any(|name| name == "root") {
        reader.faults.note(None, "[loggers] keys", None, "must have root among them");
    }
    for name in names {
        let section = format!("logger_{name}");
        let logger = reader.logger(&section);
        let name = match name.as_str() {
            "root" => Some(name),
            _ => reader.needed(&section, "qualname"),
        };
        if let Some(name) = name {
            python.add_logger(&name, logger);
        }
    }
    python
}

struct Reader<'r, 't> {
    ini: &'r Ini,
    faults: &'r mut Noted<'t>,
}

impl Reader<'_, '_> {
    fn get(&mut self, section: &str, option: &str) -> Option<String> {
        match self.ini.get(section, option) {
            Ok(value) => value.map(|value| value.text),
            Err(IniError { line, reason }) => {
                self.faults.note(
                    Some(line),
                    &format!("{} {option}", place(section)),
                    None,
                    &reason,
                );
                None
            }
        }
    }

    fn needed(&mut self, section: &str, option: &str) -> Option<String> {
        if !matches!(self.ini.get(section, option), Ok(None)) {
            return self.get(section, option);
        }
        let there = self.ini.has_section(section);
        let reason = if there { "missing" } else { "missing (no such section)" };
        self.faults.note(None, &format!("{} {option}", place(section)), None, reason);
        None
    }

    /// The names in `keys` of `section`.
    fn keys(&mut self, section: &str) -> Vec<String> {
        names(&self.needed(section, "keys").unwrap_or_default())
    }

    fn level(&mut self, section: &str) -> Option<u32> {
        let text = self.get(section, "level")?;
        let read = level(&text);
        if read.is_none() {
            self.faults.note(None, &format!("{} level", place(section)), Some(&text), LEVELS);
        }
        read
    }

    fn logger(&mut self, section: &str) -> Logger {
        Logger {
            place: place(section),
            level: self.level(section),
            handlers: names(&self.needed(section, "handlers").unwrap_or_default()),
            propagate: self.propagate(section),
        }
    }

    fn propagate(&mut self, section: &str) -> bool {
        let Some(text) = self.get(section, "propagate") else { return true };
        match text.trim().parse::<i64>() {
            Ok(number) => number != 0,
            Err(_) => {
                let key = format!("{} propagate", place(section));
                self.faults.note(None, &key, Some(&text), "must be 0 or 1");
                true
            }
        }
    }

    fn handler(&mut self, section: &str) -> Handler {
        let place = place(section);
        let class = self.needed(section, "class").map_or(Class::Other, |name| Class::of(&name));
        let arguments = self.get(section, "args").unwrap_or_else(|| "()".to_owned());
        let named = self.get(section, "kwargs").filter(|text| text.trim() != "{}");
        let mut rest = Vec::new();
        let (first, mut more) = arguments_of(&arguments);
        let mut filename = first.clone();
        if let (Argument::None, Some(named)) = (&first, &named) {
            (filename, more) = file_name_in(named);
        } else {
            more |= named.is_some();
        }
        let target = match (class, &first, filename) {
            (Class::Stream, Argument::Name("sys.stdout"), _) => Target::Stdout,
            (Class::Stream, Argument::Name("sys.stderr") | Argument::None, _) => Target::Stderr,
            (Class::File { .. }, _, Argument::Text(name)) if !name.is_empty() => {
                Target::File(name.into())
            }
            _ => Target::Other,
        };
        match class {
            Class::File { rotates: true } => rest.push(rotation(&place)),
            _ if more => rest.push(format!("further arguments of {place}")),
            _ => {}
        }
        Handler {
            place,
            level: self.level(section).unwrap_or(0),
            formatter: self.get(section, "formatter").filter(|name| !name.is_empty()),
            target,
            rest,
        }
    }
}

/// How a section is called in what people read.
fn place(section: &str) -> String {
    format!("[{}]", excerpt(section))
}

/// Names between commas.
fn names(text: &str) -> Vec<String> {
    let names = text.split(',').map(|name| name.trim().to_owned());
    names.filter(|name| !name.is_empty()).collect()
}

/// A Python expression, as far as it is understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Argument<'t> {
    None,
    Text(String),
    Name(&'t str),
    Other,
}

/// The first argument in `(...)` or `[...]`, and whether there are more that matter.
pub(crate) fn arguments_of(text: &str) -> (Argument<'_>, bool) {
    let between = |open, close| text.trim().strip_prefix(open)?.strip_suffix(close);
    let inner = between('(', ')').or_else(|| between('[', ']'));
    let Some(inner) = inner.map(str::trim) else { return (Argument::Other, false) };
    if inner.is_empty() {
        return (Argument::None, false);
    }
    let (argument, rest) = match literal(inner) {
        Some((text, rest)) => (Argument::Text(text), rest),
        None => {
            let is_name = |c: char| c.is_alphanumeric() || c == '_' || c == '.';
            let end = inner.find(|c| !is_name(c)).unwrap_or(inner.len());
            (Argument::Name(&inner[..end]), &inner[end..])
        }
    };
    match rest.trim().strip_prefix(',') {
        None if rest.trim().is_empty() => (argument, false),
        None => (Argument::Other, false),
        // A file's mode: what we do anyway.
        Some(more) => {
            let more = more.trim().trim_end_matches(',').trim_end();
            (argument, !["", "'a'", "\"a\""].contains(&more))
        }
    }
}

/// The file name in `{'filename': '...'}`, and whether there is more.
fn file_name_in(text: &str) -> (Argument<'_>, bool) {
    let inner = text.trim().strip_prefix('{').and_then(|text| text.strip_suffix('}'));
    let mut rest = inner.unwrap_or_default().trim();
    let (mut found, mut more) = (Argument::Other, false);
    while let Some((key, after)) = literal(rest) {
        let value =
            after.trim_start().strip_prefix(':').and_then(|text| literal(text.trim_start()));
        let Some((value, after)) = value else { break };
        match key.as_str() {
            "filename" => found = Argument::Text(value),
            "mode" if value == "a" => {}
            "encoding" => {}
            _ => more = true,
        }
        rest = after.trim_start().trim_start_matches(',').trim_start();
    }
    (found, more || !rest.is_empty())
}

/// The Python string at the start of `text`, of adjacent ones all together, and what follows it.
/// `None` also where it is a formatted string with something to put in.
fn literal(text: &str) -> Option<(String, &str)> {
    let (mut whole, mut rest) = one_literal(text)?;
    while let Some((more, after)) = one_literal(rest.trim_start()) {
        whole.push_str(&more);
        rest = after;
    }
    Some((whole, rest))
}

fn one_literal(text: &str) -> Option<(String, &str)> {
    let at = text.find(['\'', '"'])?;
    let (prefix, body) = text.split_at(at);
    let (raw, formatted) = match prefix.to_ascii_lowercase().as_str() {
        "" | "u" => (false, false),
        "r" => (true, false),
        "f" => (false, true),
        "fr" | "rf" => (true, true),
        _ => return None,
    };
    let quote = body.chars().next()?;
    let mut value = String::new();
    let mut chars = body.char_indices().skip(1);
    while let Some((at, c)) = chars.next() {
        match c {
            _ if c == quote => return Some((value, &body[at + 1..])),
            '{' | '}' if formatted => return None,
            '\\' => match chars.next() {
                Some((_, escaped)) if raw => value.extend(['\\', escaped]),
                Some((_, escaped @ ('\\' | '\'' | '"'))) => value.push(escaped),
                _ => return None,
            },
            _ => value.push(c),
        }
    }
    None
}
