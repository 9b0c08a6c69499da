//! The message and fields of a line that is not JSON: `message name=value name="a value with
//! blanks"`.

use std::fmt::{self, Debug};

use tracing::field::{Field, Visit};
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::fmt::FormatFields;
use tracing_subscriber::fmt::format::Writer;

/// Formats fields so that a program can parse the line: a value that is empty or contains blanks,
/// quotes, `=` or control characters is quoted, with the escapes of Rust strings.
pub(super) struct TextFields;

impl<'writer> FormatFields<'writer> for TextFields {
    fn format_fields<R: RecordFields>(&self, writer: Writer<'writer>, fields: R) -> fmt::Result {
        let mut line = Line { writer, is_empty: true, result: Ok(()) };
        fields.record(&mut line);
        line.result
    }
}

struct Line<'writer> {
    writer: Writer<'writer>,
    is_empty: bool,
    result: fmt::Result,
}

impl Line<'_> {
    fn write(&mut self, field: &Field, value: fmt::Arguments<'_>) -> fmt::Result {
        if !self.is_empty {
            self.writer.write_char(' ')?;
        }
        self.is_empty = false;
        match field.name() {
            "message" => self.writer.write_fmt(value),
            name => write!(self.writer, "{}={value}", name.trim_start_matches("r#")),
        }
    }

    fn add(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        if self.result.is_ok() && !is_hidden(field.name()) {
            self.result = self.write(field, value);
        }
    }
}

/// Returns whether a field is omitted: the origin of a line of the log crate, which the formatter
/// shows elsewhere, and the parts of `hop`, which are for programs that read JSON.
fn is_hidden(name: &str) -> bool {
    name.starts_with("log.") || name.starts_with("hop_")
}

impl Visit for Line<'_> {
    /// Adds all values that have no method below, those recorded by their `Display` included.
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == "message" {
            return self.add(field, format_args!("{value:?}"));
        }
        if is_hidden(field.name()) {
            return;
        }
        let text = format!("{value:?}");
        if is_plain(&text) || is_quoted(&text) {
            self.add(field, format_args!("{text}"));
        } else {
            self.add(field, format_args!("{text:?}"));
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => self.add(field, format_args!("{value}")),
            _ => self.add(field, format_args!("{value:?}")),
        }
    }

    /// Adds a number of seconds; there are no other floating point values.
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.add(field, format_args!("{value:.3}"));
    }
}

fn is_plain(text: &str) -> bool {
    let is_special = |character: char| {
        character.is_whitespace() || character.is_control() || matches!(character, '"' | '=')
    };
    !text.is_empty() && !text.contains(is_special)
}

/// Returns whether `text` is a quoted string already, as the `Debug` format of strings is.
fn is_quoted(text: &str) -> bool {
    let Some(inner) = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')) else {
        return false;
    };
    let mut escaped = false;
    for character in inner.chars() {
        if character.is_control() || (character == '"' && !escaped) {
            return false;
        }
        escaped = character == '\\' && !escaped;
    }
    !escaped
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};
    use std::sync::{Arc, Mutex};

    use proptest::prelude::*;
    use tracing_subscriber::fmt::MakeWriter;

    use super::*;

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl MakeWriter<'_> for Buffer {
        type Writer = Self;

        fn make_writer(&self) -> Self {
            self.clone()
        }
    }

    /// Returns the message and the fields of one line.
    fn line(log: impl FnOnce()) -> String {
        let buffer = Buffer::default();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(buffer.clone())
            .fmt_fields(TextFields)
            .with_ansi(false)
            .without_time()
            .with_level(false)
            .with_target(false)
            .finish();
        tracing::subscriber::with_default(subscriber, log);
        let bytes = buffer.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap().trim_end().to_owned()
    }

    #[test]
    fn values_with_special_characters_are_quoted() {
        let none: Option<&str> = None;
        let line = line(|| {
            tracing::info!(
                user = "nobody",
                hop = %"gateway h:79 of zone west (TLS)",
                end = %"finished",
                none,
                bytes = 5_u64,
                seconds = 1.506_018_822,
                escaped = ?"a\"b",
                odd = %"\"a\" and \"b\"",
                empty = %"",
                hop_kind = "gateway",
                "stream ended"
            );
        });
        assert_eq!(
            line,
            "stream ended user=\"nobody\" hop=\"gateway h:79 of zone west (TLS)\" end=finished \
             bytes=5 seconds=1.506 escaped=\"a\\\"b\" odd=\"\\\"a\\\" and \\\"b\\\"\" empty=\"\""
        );
    }

    proptest! {
        #[test]
        fn next_field_is_found_after_any_value(value in any::<String>(), shown in any::<bool>()) {
            let line = line(|| match shown {
                true => tracing::info!(value = display(&value), next = 1, "m"),
                false => tracing::info!(value = debug(&value), next = 1, "m"),
            });
            let rest = line.strip_prefix("m value=").unwrap();
            let text = rest.strip_suffix(" next=1").unwrap();
            prop_assert!(is_plain(text) || is_quoted(text), "{}", text);
        }
    }
}
