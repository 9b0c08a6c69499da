//! The line that Zuul's services write, for those who read one log of them all:
//! `2026-11-21 11:03:35,123 INFO zuul.fingergw: message field=value`.
//!
//! That is Python's `%(asctime)s %(levelname)s %(name)s: %(message)s` in local time, and what
//! upstream's formatter makes of a message of several lines: each gets the same beginning, the
//! later ones are indented, so that a reader of lines never meets one without a time.

use std::fmt::{self, Write as _};

use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};
use tracing::{Event, Level, Subscriber};
use tracing_log::NormalizeEvent;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// Makes such lines.
pub(super) struct ZuulLine {
    /// Found once, as the C library does for Python: a change needs a restart.
    zone: TimeZone,
}

impl ZuulLine {
    /// In the time zone of `TZ`, else of `/etc/localtime`, else UTC.
    pub(super) fn new() -> Self {
        Self { zone: TimeZone::system() }
    }
}

impl<S, N> FormatEvent<S, N> for ZuulLine
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut text = String::new();
        context.field_format().format_fields(Writer::new(&mut text), event)?;
        let now = Timestamp::now().to_zoned(self.zone.clone());
        // A line that comes through the log crate has its own level and target inside.
        let normalized = event.normalized_metadata();
        let metadata = normalized.as_ref().unwrap_or_else(|| event.metadata());
        let start = start(&now, *metadata.level(), metadata.target());
        write(&mut writer, &start, &text)
    }
}

/// Everything before the message.
fn start(now: &Zoned, level: Level, target: &str) -> String {
    let mut start = String::new();
    let (date, time) = (now.date(), now.time());
    let _ = write!(
        start,
        "{date} {:02}:{:02}:{:02},{:03} {} {}: ",
        time.hour(),
        time.minute(),
        time.second(),
        time.millisecond(),
        level_name(level),
        logger(target)
    );
    start
}

fn write(writer: &mut impl fmt::Write, start: &str, text: &str) -> fmt::Result {
    for (index, line) in text.split('\n').enumerate() {
        let indent = if index > 0 { "  " } else { "" };
        writeln!(writer, "{start}{indent}{line}")?;
    }
    Ok(())
}

/// As Python spells it. There is nothing below DEBUG there, and readers know no other names.
fn level_name(level: Level) -> &'static str {
    match level {
        Level::ERROR => "ERROR",
        Level::WARN => "WARNING",
        Level::INFO => "INFO",
        Level::DEBUG | Level::TRACE => "DEBUG",
    }
}

/// The name of the Python logger that stands for a module: one for all of ours, because upstream's
/// filters know that one; the path for a library's.
fn logger(target: &str) -> String {
    match target.split("::").next() {
        Some("zuul_fingergw") => "zuul.fingergw".to_owned(),
        _ => target.replace("::", "."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(time: &str, zone: &str) -> Zoned {
        let time: Timestamp = time.parse().expect("a time");
        time.to_zoned(TimeZone::posix(zone).expect("a zone"))
    }

    #[test]
    fn the_start_is_what_python_makes_of_upstreams_format() {
        let berlin = "CET-1CEST,M3.5.0,M10.5.0/3";
        let cases = [
            (
                at("2026-11-21T10:03:05.0079Z", berlin),
                Level::WARN,
                "zuul_fingergw::daemon",
                "2026-11-21 11:03:05,007 WARNING zuul.fingergw: ",
            ),
            (
                at("2026-07-31T22:30:00.999999Z", berlin),
                Level::INFO,
                "zuul_fingergw",
                "2026-08-01 00:30:00,999 INFO zuul.fingergw: ",
            ),
            (
                at("2026-01-02T03:04:05Z", "UTC0"),
                Level::TRACE,
                "rustls::client::hs",
                "2026-01-02 03:04:05,000 DEBUG rustls.client.hs: ",
            ),
            (
                at("2026-01-02T03:04:05Z", "EST5"),
                Level::ERROR,
                "zuul_fingergw_else",
                "2026-01-01 22:04:05,000 ERROR zuul_fingergw_else: ",
            ),
        ];
        for (now, level, target, expected) in cases {
            assert_eq!(start(&now, level, target), expected);
        }
    }

    #[test]
    fn every_line_of_a_message_has_the_start() {
        let mut lines = String::new();
        write(&mut lines, "T INFO n: ", "one\ntwo\nkey=3").expect("a string takes all");
        assert_eq!(lines, "T INFO n: one\nT INFO n:   two\nT INFO n:   key=3\n");
    }
}
