//! The syntax of `zuul.conf`, as Python's `ConfigParser` reads it.
//!
//! No library reads real files as Python does: they remove inline comments and quotes that Python
//! keeps, or lose continuation lines. The rules are those of CPython's `Lib/configparser.py` with
//! its defaults, which Zuul does not change.

#[cfg(test)]
mod differential;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use crate::config::error::excerpt;

/// A parsed file. Values are raw: as in Python, references `%(...)s` are replaced when a value is
/// read, so that a stray `%` is an error of its option only.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Ini {
    defaults: Options,
    sections: BTreeMap<String, Options>,
}

type Options = BTreeMap<String, RawValue>;

/// A value as written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct RawValue {
    /// The line of its option; 0 for one from the environment.
    line: usize,
    value: String,
}

/// A value with its references replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Value {
    pub(crate) line: usize,
    pub(crate) text: String,
}

/// Why a file, or one value, cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {reason}")]
pub(crate) struct IniError {
    pub(crate) line: usize,
    pub(crate) reason: String,
}

/// The section whose options are options of every section.
const DEFAULT: &str = "DEFAULT";

/// `MAX_INTERPOLATION_DEPTH` of `configparser`.
const DEPTH_MAX: usize = 10;

/// Limits of one value, in bytes and in references replaced. Python has none: ten levels of
/// references can make a small file exceed any memory.
const VALUE_MAX: usize = 1024 * 1024;
const REFERENCES_MAX: usize = 10_000;

impl Ini {
    /// Parses `text`. Every section has the options `defaults` as well.
    ///
    /// # Errors
    /// All lines that Python would refuse. Python refuses the whole file for each of them.
    pub(crate) fn parse(
        text: &str,
        defaults: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, Vec<IniError>> {
        let (ini, errors) = Self::parse_recoverable(text, defaults);
        if errors.is_empty() { Ok(ini) } else { Err(errors) }
    }

    /// Parses `text` like [`Self::parse`], and returns both the valid parts and the errors.
    pub(crate) fn parse_recoverable(
        text: &str,
        defaults: impl IntoIterator<Item = (String, String)>,
    ) -> (Self, Vec<IniError>) {
        let mut parser = Parser::default();
        for (name, value) in defaults {
            parser.ini.defaults.insert(name.to_lowercase(), RawValue { line: 0, value });
        }
        let text = text.replace("\r\n", "\n").replace('\r', "\n");
        for (index, line) in text.split('\n').enumerate() {
            parser.line(index + 1, line);
        }
        parser.end_option();
        (parser.ini, parser.errors)
    }

    /// Returns the value of `option` in `section` with its references replaced, if there is one.
    ///
    /// # Errors
    /// A `%` that is neither `%%` nor a reference to an option.
    pub(crate) fn get(&self, section: &str, option: &str) -> Result<Option<Value>, IniError> {
        let Some(options) = self.sections.get(section) else { return Ok(None) };
        let raw = |name: &str| options.get(name).or_else(|| self.defaults.get(name));
        let Some(RawValue { line, value }) = raw(option) else { return Ok(None) };
        let mut result = Interpolated::default();
        interpolate(value, &|name| raw(name).map(|raw| raw.value.as_str()), 1, &mut result)
            .map_err(|reason| IniError { line: *line, reason })?;
        Ok(Some(Value { line: *line, text: result.text }))
    }

    /// The value of `option` in `section` as written.
    pub(crate) fn raw(&self, section: &str, option: &str) -> Option<&str> {
        let options = self.sections.get(section)?;
        options.get(option).or_else(|| self.defaults.get(option)).map(|raw| raw.value.as_str())
    }

    /// The options that the file itself has in `section`, with their lines.
    pub(crate) fn options(&self, section: &str) -> impl Iterator<Item = (&str, usize)> {
        let options = self.sections.get(section).into_iter().flatten();
        options.map(|(name, raw)| (name.as_str(), raw.line))
    }

    /// Whether a value in `section` refers to `option`.
    pub(crate) fn is_referenced(&self, section: &str, option: &str) -> bool {
        let reference = format!("%({option})s");
        let mut options = self.sections.get(section).into_iter().flatten();
        options.any(|(_, raw)| raw.value.to_lowercase().contains(&reference))
    }

    /// The names of all sections except `[DEFAULT]`.
    pub(crate) fn sections(&self) -> impl Iterator<Item = &str> {
        self.sections.keys().map(String::as_str)
    }

    /// Whether the file has the section.
    pub(crate) fn has_section(&self, section: &str) -> bool {
        self.sections.contains_key(section)
    }
}

#[derive(Default)]
struct Parser {
    ini: Ini,
    errors: Vec<IniError>,
    section: Option<String>,
    option: Option<OpenOption>,
    indent: usize,
}

/// An option whose value may continue on the next line.
struct OpenOption {
    name: String,
    line: usize,
    values: Vec<String>,
}

impl Parser {
    fn line(&mut self, number: usize, line: &str) {
        let text = line.trim_matches(is_space);
        if text.starts_with(['#', ';']) {
            return;
        }
        if text.is_empty() {
            if let Some(option) = &mut self.option {
                option.values.push(String::new());
            }
            return;
        }
        let indent = line.chars().take_while(|c| is_space(*c)).count();
        if let Some(option) = self.option.as_mut().filter(|_| indent > self.indent) {
            option.values.push(text.to_owned());
            return;
        }
        self.indent = indent;
        if let Some(header) = header(text) {
            self.end_option();
            self.begin_section(number, header);
        } else if self.section.is_none() {
            self.error(number, "no [section] before it");
        } else {
            self.end_option();
            self.begin_option(number, text);
        }
    }

    fn begin_section(&mut self, number: usize, header: &str) {
        self.section = Some(header.to_owned());
        if header == DEFAULT {
            return;
        }
        match self.ini.sections.entry(header.to_owned()) {
            Entry::Vacant(entry) => {
                entry.insert(Options::new());
            }
            Entry::Occupied(_) => self.error(number, "the section is defined twice"),
        }
    }

    fn begin_option(&mut self, number: usize, text: &str) {
        let Some((name, value)) = text.split_once(['=', ':']) else {
            self.error(number, "neither \"option = value\" nor a [section]");
            return;
        };
        let name = name.trim_end_matches(is_space).to_lowercase();
        if name.is_empty() {
            self.error(number, "an option without a name");
            return;
        }
        let twice = self.options().is_some_and(|options| {
            // Those of the environment, of line 0, may be overridden.
            options.get(&name).is_some_and(|raw| raw.line != 0)
        });
        if twice {
            self.error(number, "the option is set twice");
        }
        let values = vec![value.trim_matches(is_space).to_owned()];
        self.option = Some(OpenOption { name, line: number, values });
    }

    fn end_option(&mut self) {
        let Some(OpenOption { name, line, values }) = self.option.take() else { return };
        let value = values.join("\n").trim_end_matches(is_space).to_owned();
        if let Some(options) = self.options() {
            options.insert(name, RawValue { line, value });
        }
    }

    /// The options of the current section.
    fn options(&mut self) -> Option<&mut Options> {
        match self.section.as_deref()? {
            DEFAULT => Some(&mut self.ini.defaults),
            section => self.ini.sections.get_mut(section),
        }
    }

    fn error(&mut self, line: usize, reason: &str) {
        self.errors.push(IniError { line, reason: reason.to_owned() });
    }
}

/// White space as of Python's `str.isspace`, which has four separators more than Unicode.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// The name in a section header: everything up to the last bracket, so that of `[a]b] c` it is
/// `a]b`.
fn header(text: &str) -> Option<&str> {
    let inner = text.strip_prefix('[')?;
    let end = inner.rfind(']')?;
    (end > 0).then(|| &inner[..end])
}

/// A value whose references are being replaced.
#[derive(Default)]
struct Interpolated {
    text: String,
    references: usize,
}

/// Replaces the references in `value`, as `BasicInterpolation` of `Lib/configparser.py`.
fn interpolate<'a>(
    value: &'a str,
    option: &dyn Fn(&str) -> Option<&'a str>,
    depth: usize,
    result: &mut Interpolated,
) -> Result<(), String> {
    if depth > DEPTH_MAX {
        return Err(format!("references are nested deeper than {DEPTH_MAX} levels"));
    }
    let mut rest = value;
    while let Some(percent) = rest.find('%') {
        result.text.push_str(&rest[..percent]);
        rest = &rest[percent + 1..];
        if let Some(after) = rest.strip_prefix('%') {
            result.text.push('%');
            rest = after;
        } else if let Some((name, after)) = reference(rest) {
            let name = name.to_lowercase();
            let value = option(&name)
                .ok_or_else(|| format!("%({})s refers to no option", excerpt(&name)))?;
            if value.contains('%') {
                interpolate(value, option, depth + 1, result)?;
            } else {
                result.text.push_str(value);
            }
            result.references += 1;
            if result.references > REFERENCES_MAX || result.text.len() > VALUE_MAX {
                return Err("too long once its references are replaced".to_owned());
            }
            rest = after;
        } else {
            return Err("a % must be %% or %(option)s".to_owned());
        }
    }
    result.text.push_str(rest);
    Ok(())
}

/// The name in a reference `(name)s` at the start of `text`, and what follows it.
fn reference(text: &str) -> Option<(&str, &str)> {
    let (name, after) = text.strip_prefix('(')?.split_once(')')?;
    if name.is_empty() { None } else { Some((name, after.strip_prefix('s')?)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Ini, Vec<IniError>> {
        Ini::parse(text, [("ZUUL_HOME".to_owned(), "/srv/%(base)s".to_owned())])
    }

    fn get(text: &str, option: &str) -> Result<Option<String>, String> {
        let value = parse(text).map_err(|errors| errors[0].reason.clone())?.get("s", option);
        value.map(|value| value.map(|value| value.text)).map_err(|error| error.reason)
    }

    #[test]
    fn values_are_read_as_by_python() {
        let cases = [
            ("[s]\nport = 79 ; x", "79 ; x"),
            ("[s]\nport: a = b", "a = b"),
            ("[s]\nport = a : b", "a : b"),
            ("[s]\nPort=\"79\"", "\"79\""),
            ("[s]\nport =", ""),
            ("[s]\nport = a\\n", "a\\n"),
            ("[s] after\nport = 1", "1"),
            ("[s]\nport = a\n  b\n\n  [c]\n  # dropped\n d = e\n", "a\nb\n\n[c]\nd = e"),
            ("[s]\nport = a\n# not the end\n b", "a\nb"),
            ("[DEFAULT]\nport = 1\n[s]\nx = 1", "1"),
            ("[DEFAULT]\nport = 1\n[s]\nport = 2", "2"),
            ("[s]\r\nport = 79\r\n", "79"),
            ("[s]\nport = 50%%", "50%"),
            ("[s]\nport = %(A)sb\na = 1", "1b"),
            ("[s]\nport = %(zuul_home)s/x\nbase = b", "/srv/b/x"),
            ("  [s]\n  port = 1\n  x = 2", "1"),
        ];
        for (text, value) in cases {
            assert_eq!(get(text, "port"), Ok(Some(value.to_owned())), "{text:?}");
        }
        assert_eq!(get("[s]\nx = 1", "port"), Ok(None));
        assert_eq!(
            get("[default]\nport = 1\n[s]\nx = 1", "port"),
            Ok(None),
            "names are case-sensitive"
        );
    }

    #[test]
    fn files_that_python_refuses_are_refused_at_the_same_line() {
        let cases = [
            ("port = 1", 1),
            ("\u{feff}[s]\nport = 1", 1),
            ("[s]\nport = 1\nPORT = 2", 3),
            ("[s]\n[t]\n[s]", 3),
            ("[s]\nport", 2),
            ("[s]\n= 1", 2),
        ];
        for (text, line) in cases {
            assert_eq!(parse(text).unwrap_err()[0].line, line, "{text:?}");
        }
        assert!(parse("[DEFAULT]\na = 1\n[DEFAULT]\nb = 1\nzuul_home = 2").is_ok());
    }

    #[test]
    fn invalid_reference_is_an_error_of_its_option_only() {
        let text = "[s]\nbad = 5%\nworse = %(nothing)s\nloop = %(loop)s\nhalf = %(x\nport = 1";
        assert_eq!(get(text, "port"), Ok(Some("1".to_owned())));
        for option in ["bad", "worse", "loop", "half"] {
            assert!(get(text, option).is_err(), "{option}");
        }
    }

    /// Eight levels of thirty references each, to a text and to an empty one.
    #[test]
    fn references_that_multiply_are_bounded() {
        for base in ["", &"x".repeat(1000)] {
            let mut text = format!("[s]\na0 = {base}\n");
            for level in 1..=8 {
                let references = format!("%(a{})s", level - 1).repeat(30);
                text.push_str(&format!("a{level} = {references}\n"));
            }
            assert_eq!(get(&text, "a1"), Ok(Some(base.repeat(30))));
            assert_eq!(
                get(&text, "a8"),
                Err("too long once its references are replaced".to_owned())
            );
        }
    }

    /// The name in a reference is shortened, and shown on one line.
    #[test]
    fn error_with_a_hostile_name_is_printable() {
        let text = format!("[s]\na = %(x\u{1b}[31m{})s", "y".repeat(10_000));
        let error = get(&text, "a").unwrap_err();
        assert!(error.starts_with("%(x\\u{1b}[31myyy"), "{error}");
        assert!(error.len() < 200, "{error}");
    }
}
