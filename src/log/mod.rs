//! Log lines and what their levels mean.
//!
//! - error: an operator must act.
//! - warn: degraded, heals by itself; said when a state changes, not while it lasts.
//! - info: the gateway's life, and one line for each stream at its end.
//! - debug: whatever a peer can cause at will. Nothing above it can be provoked by a stranger who
//!   knows no build.

mod file;
mod zuul_line;

pub(crate) use self::file::LostLines;

use std::fmt;
use std::path::Path;

use anyhow::{Context, Result};
use tracing::Level;
use tracing_log::AsLog;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload::{self, Handle};
use tracing_subscriber::util::SubscriberInitExt;

use self::file::LogFile;
use self::zuul_line::ZuulLine;
use crate::config::{Log, LogFormat, LogOutput};
use crate::service::privileges::Account;

/// What people can do about a log file that cannot be opened.
const MEND: &str = "make its directory, or let the user this program runs as write there";

/// The log as it was started; to be kept to the end.
pub(crate) struct Logging {
    file: Option<LogFile>,
    volume: Volume,
}

impl Logging {
    /// Starts what writes. Call after the last fork and after the last change of user.
    ///
    /// # Errors
    /// The kernel gives no thread.
    pub(crate) fn begin(&mut self) -> Result<()> {
        self.file.as_mut().map_or(Ok(()), LogFile::begin).context("cannot start the log's thread")
    }

    /// How many lines were lost.
    pub(crate) fn lost_lines(&self) -> LostLines {
        self.file.as_ref().map(LogFile::lost_lines).unwrap_or_default()
    }

    /// What changes how much is logged.
    pub(crate) fn volume(&self) -> Volume {
        self.volume.clone()
    }
}

/// How much is logged. Lines that are not wanted cost as little as without it: each place in the
/// code remembers whether its line is, until that changes.
#[derive(Clone)]
pub(crate) struct Volume(Handle<Targets, tracing_subscriber::Registry>);

impl Volume {
    /// Logs what is of `level` or more urgent, from now on.
    pub(crate) fn set(&self, level: Level) {
        // Fails only where nothing is logged any more.
        let _ = self.0.reload(targets(level));
        // Libraries that speak through the log crate look there.
        tracing_log::log::set_max_level(LevelFilter::current().as_log());
    }
}

/// Libraries speak for themselves only when somebody looks into a fault: what operators need to
/// know of them, this program says, and a stranger can make the TLS library warn.
fn targets(level: Level) -> Targets {
    let libraries = if level >= Level::DEBUG { LevelFilter::DEBUG } else { LevelFilter::OFF };
    Targets::new().with_default(libraries).with_target("zuul_fingergw", level)
}

/// Sends log lines where `log` says, from now on. Call once. A log file that is made belongs to
/// `account`, who may have to make it again.
///
/// # Errors
/// The log file cannot be opened.
pub(crate) fn start(log: &Log, account: Option<&Account>) -> Result<Logging> {
    let Log { level, format, output, log_config: _ } = log;
    let level = *level;
    let mut file = None;
    let writer = match output {
        LogOutput::Stdout => BoxMakeWriter::new(std::io::stdout),
        LogOutput::Stderr => BoxMakeWriter::new(std::io::stderr),
        LogOutput::File(path) => {
            let (lines, opened) = file::open(path, account).with_context(|| unusable(path))?;
            file = Some(opened);
            BoxMakeWriter::new(lines)
        }
    };
    let (filter, handle) = reload::Layer::new(targets(level));
    let lines = tracing_subscriber::registry().with(filter);
    let layer = tracing_subscriber::fmt::layer().with_writer(writer);
    match format {
        LogFormat::Text => lines.with(layer.with_ansi(false)).init(),
        LogFormat::Json => lines.with(layer.json().flatten_event(true)).init(),
        LogFormat::Zuul => lines.with(layer.with_ansi(false).event_format(ZuulLine::new())).init(),
    }
    Ok(Logging { file, volume: Volume(handle) })
}

/// Whether [`start`] would succeed.
///
/// # Errors
/// It would not.
pub(crate) fn check(log: &Log) -> Result<()> {
    match &log.output {
        LogOutput::Stdout | LogOutput::Stderr => Ok(()),
        LogOutput::File(path) => file::check(path).with_context(|| unusable(path)),
    }
}

fn unusable(path: &Path) -> String {
    format!("{}: cannot be opened as the log file ({MEND})", path.display())
}

/// The first bytes of something a peer sent, made harmless for a log line: at most 64 bytes, all
/// printable ASCII.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Excerpt(String);

impl Excerpt {
    const MAX: usize = 64;

    pub(crate) fn new(bytes: &[u8]) -> Self {
        let mut text = bytes[..bytes.len().min(Self::MAX)].escape_ascii().to_string();
        if bytes.len() > Self::MAX {
            text.push_str("...");
        }
        Self(text)
    }
}

impl fmt::Display for Excerpt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Excerpt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn excerpts_are_short_and_printable() {
        assert_eq!(Excerpt::new(b"a\x1b[31m\n\xff").to_string(), r"a\x1b[31m\n\xff");
        let long = Excerpt::new(&[b'x'; 1000]).to_string();
        assert_eq!(long, format!("{}...", "x".repeat(64)));
    }
}
