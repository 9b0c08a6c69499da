//! The log format of Zuul's services, for operators who read the logs of all of them together:
//! `2026-11-21 11:03:35,123 INFO zuul.fingergw: message field=value`.
//!
//! It is Python's `%(asctime)s %(levelname)s %(name)s: %(message)s` in local time. Each line of a
//! message gets the same prefix, and lines after the first are indented, as by Zuul's formatter.

use std::env;
use std::fmt;
use std::path::Path;

use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};
use tracing::{Event, Level, Subscriber};
use tracing_log::NormalizeEvent;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use crate::os::file;

pub(crate) struct ZuulFormat {
    /// Read once, as the C library does for Python: a change needs a restart.
    pub(crate) zone: TimeZone,
}

/// Returns the time zone of `TZ`, else of `/etc/localtime`, else UTC (tzset(3)). If `TZ` cannot be
/// used, returns UTC, as the C library does, and the reason.
pub(crate) fn local_zone() -> (TimeZone, Option<String>) {
    let Some(text) = env::var_os("TZ") else { return (TimeZone::system(), None) };
    match text.to_str().ok_or_else(|| "not UTF-8 text".to_owned()).and_then(parse_zone) {
        Ok(zone) => (zone, None),
        Err(reason) => {
            let text = text.to_string_lossy();
            (TimeZone::UTC, Some(format!("TZ={}: {reason}", text.escape_debug())))
        }
    }
}

/// Parses a value of `TZ`: a file, a name below /usr/share/zoneinfo, or a POSIX rule.
fn parse_zone(text: &str) -> Result<TimeZone, String> {
    let name = text.strip_prefix(':').unwrap_or(text);
    if name.is_empty() {
        return Ok(TimeZone::UTC);
    }
    if name.starts_with('/') {
        // jiff would read a device forever.
        let bytes = file::read(Path::new(name)).map_err(|error| error.to_string())?;
        return TimeZone::tzif(name, &bytes).map_err(|error| error.to_string());
    }
    // "posix/" has the same zones without leap seconds, which jiff ignores in all zones.
    TimeZone::get(name.strip_prefix("posix/").unwrap_or(name))
        .or_else(|_| TimeZone::posix(name))
        // The rules of the C library for a summer time without rules.
        .or_else(|_| TimeZone::posix(&format!("{name},M3.2.0,M11.1.0")))
        .map_err(|_| "neither a known time zone nor a POSIX rule".to_owned())
}

impl<S, N> FormatEvent<S, N> for ZuulFormat
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
        // Lines of the log crate have their level and target in fields.
        let normalized = event.normalized_metadata();
        let metadata = normalized.as_ref().unwrap_or_else(|| event.metadata());
        let prefix = prefix(&now, *metadata.level(), metadata.target());
        write_lines(&mut writer, &prefix, &text)
    }
}

/// Returns the part of a line before the message.
fn prefix(now: &Zoned, level: Level, target: &str) -> String {
    let time = now.strftime("%Y-%m-%d %H:%M:%S,%3f");
    format!("{time} {} {}: ", level_name(level), logger(target))
}

fn write_lines(writer: &mut impl fmt::Write, prefix: &str, text: &str) -> fmt::Result {
    for (index, line) in text.split('\n').enumerate() {
        let indent = if index > 0 { "  " } else { "" };
        writeln!(writer, "{prefix}{indent}{line}")?;
    }
    Ok(())
}

/// Returns Python's name of a level; it has none below DEBUG.
fn level_name(level: Level) -> &'static str {
    match level {
        Level::ERROR => "ERROR",
        Level::WARN => "WARNING",
        Level::INFO => "INFO",
        Level::DEBUG | Level::TRACE => "DEBUG",
    }
}

/// Returns the name of a Python logger for a module: for all of ours the one of Zuul's gateway,
/// which filters of operators know; for those of libraries their path.
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
        let time: Timestamp = time.parse().unwrap();
        time.to_zoned(TimeZone::posix(zone).unwrap())
    }

    #[test]
    fn prefix_is_that_of_zuuls_formatter() {
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
            assert_eq!(prefix(&now, level, target), expected);
        }
    }

    #[test]
    fn values_of_tz_mean_what_they_mean_to_the_c_library() {
        let offset = |tz: &str, time: &str| {
            let time: Timestamp = time.parse().unwrap();
            parse_zone(tz)
                .unwrap_or_else(|reason| panic!("{tz}: {reason}"))
                .to_offset(time)
                .seconds()
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
            assert!(parse_zone(tz).is_err(), "{tz}");
        }
    }

    #[test]
    fn every_line_of_a_message_has_the_prefix() {
        let mut lines = String::new();
        write_lines(&mut lines, "T INFO n: ", "one\ntwo\nkey=3").unwrap();
        assert_eq!(lines, "T INFO n: one\nT INFO n:   two\nT INFO n:   key=3\n");
    }
}
