//! The line that Zuul's services write, for those who read one log of them all:
//! `2026-11-21 11:03:35,123 INFO zuul.fingergw: message field=value`.
//!
//! That is Python's `%(asctime)s %(levelname)s %(name)s: %(message)s` in local time, and what
//! upstream's formatter makes of a message of several lines: each gets the same beginning, the
//! later ones are indented, so that a reader of lines never meets one without a time.

use std::env;
use std::fmt::{self, Write as _};
use std::path::Path;

use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};
use tracing::{Event, Level, Subscriber};
use tracing_log::NormalizeEvent;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use crate::os::file;

/// Makes such lines.
pub(crate) struct ZuulLine {
    /// Found once, as the C library does for Python: a change needs a restart.
    zone: TimeZone,
}

impl ZuulLine {
    pub(crate) fn new(zone: TimeZone) -> Self {
        Self { zone }
    }
}

/// The time zone of `TZ`, else of `/etc/localtime`, else UTC (tzset(3)). The error is why `TZ` cannot
/// be used; UTC is used then, as by the C library.
pub(crate) fn local_zone() -> (TimeZone, Option<String>) {
    let Some(text) = env::var_os("TZ") else { return (TimeZone::system(), None) };
    match text.to_str().ok_or_else(|| "not UTF-8 text".to_owned()).and_then(zone) {
        Ok(zone) => (zone, None),
        Err(reason) => {
            let text = text.to_string_lossy();
            (TimeZone::UTC, Some(format!("TZ={}: {reason}", text.escape_debug())))
        }
    }
}

/// The zone that a value of `TZ` stands for: a file, a name below /usr/share/zoneinfo, or a POSIX rule.
fn zone(text: &str) -> Result<TimeZone, String> {
    let name = text.strip_prefix(':').unwrap_or(text);
    if name.is_empty() {
        return Ok(TimeZone::UTC);
    }
    if name.starts_with('/') {
        // Not by jiff, which would read a device without end.
        let bytes = file::read(Path::new(name)).map_err(|error| error.to_string())?;
        return TimeZone::tzif(name, &bytes).map_err(|error| error.to_string());
    }
    // "posix/" has the same zones without leap seconds, which is how jiff reads all of them.
    TimeZone::get(name.strip_prefix("posix/").unwrap_or(name))
        .or_else(|_| TimeZone::posix(name))
        // As the C library, for a summer time without rules.
        .or_else(|_| TimeZone::posix(&format!("{name},M3.2.0,M11.1.0")))
        .map_err(|_| "neither a known time zone nor a POSIX rule".to_owned())
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
    fn values_of_tz_are_understood_as_by_the_c_library() {
        let offset = |tz: &str, time: &str| {
            let time: Timestamp = time.parse().expect("a time");
            zone(tz).unwrap_or_else(|reason| panic!("{tz}: {reason}")).to_offset(time).seconds()
        };
        let (winter, summer) = ("2026-01-15T12:00:00Z", "2026-07-15T12:00:00Z");
        for (tz, in_winter, in_summer) in [
            ("CET-1CEST", 3600, 7200),
            ("CET-1CEST,M3.5.0,M10.5.0/3", 3600, 7200),
            (":Europe/Berlin", 3600, 7200),
            ("posix/Europe/Berlin", 3600, 7200),
            (":/usr/share/zoneinfo/Europe/Berlin", 3600, 7200),
            ("<+0330>-3:30", 12_600, 12_600),
            ("", 0, 0),
            ("UTC", 0, 0),
        ] {
            assert_eq!((offset(tz, winter), offset(tz, summer)), (in_winter, in_summer), "{tz}");
        }
        // The rules of the United States, by which summer begins on 8 March.
        assert_eq!(offset("CET-1CEST", "2026-03-10T12:00:00Z"), 7200);
        for tz in ["nonsense", "Europe/Nowhere", ":/dev/zero", ":/nowhere", "/etc"] {
            assert!(zone(tz).is_err(), "{tz}");
        }
    }

    #[test]
    fn every_line_of_a_message_has_the_start() {
        let mut lines = String::new();
        write(&mut lines, "T INFO n: ", "one\ntwo\nkey=3").expect("a string takes all");
        assert_eq!(lines, "T INFO n: one\nT INFO n:   two\nT INFO n:   key=3\n");
    }
}
