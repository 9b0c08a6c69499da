//! Log lines and what their levels mean.
//!
//! - error: an operator must act.
//! - warn: degraded, heals by itself; said when a state changes, not while it lasts.
//! - info: the gateway's life, and one line for each stream at its end.
//! - debug: whatever a peer can cause at will. Nothing above it can be provoked by a stranger who
//!   knows no build.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::fchown;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use tracing::Level;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::{Log, LogFormat, LogOutput};
use crate::service::privileges::Account;

/// Where upstream's gateway logs when it has detached.
pub(crate) const DETACHED: &str = "/var/log/zuul/fingergw.log";

/// Sends log lines where `log` says, or to the end of `file`, from now on. Call once.
pub(crate) fn start(log: Log, file: Option<File>) {
    let Log { level, format, output } = log;
    let writer = match (file, output) {
        (Some(file), _) => BoxMakeWriter::new(Arc::new(file)),
        (None, LogOutput::Stdout) => BoxMakeWriter::new(std::io::stdout),
        (None, LogOutput::Stderr) => BoxMakeWriter::new(std::io::stderr),
    };
    // Libraries speak for themselves only when somebody looks into a fault: what operators need
    // to know of them, this program says, and a stranger can make the TLS library warn.
    let libraries = if level >= Level::DEBUG { LevelFilter::DEBUG } else { LevelFilter::OFF };
    let targets = Targets::new().with_default(libraries).with_target("zuul_fingergw", level);
    let lines = tracing_subscriber::registry().with(targets);
    let layer = tracing_subscriber::fmt::layer().with_writer(writer);
    match format {
        LogFormat::Text => lines.with(layer.with_ansi(false)).init(),
        LogFormat::Json => lines.with(layer.json().flatten_event(true)).init(),
    }
}

/// Opens the log of a detached process. A new one is `account`'s, so that it can be opened again.
///
/// # Errors
/// It cannot be written.
pub(crate) fn open(path: &Path, account: Option<&Account>) -> Result<File> {
    let is_new = !path.exists();
    let opened = File::options().append(true).create(true).open(path).and_then(|file| {
        if let Some((user, group)) = account.filter(|_| is_new).map(Account::ids) {
            fchown(&file, Some(user), Some(group))?;
        }
        Ok(file)
    });
    opened.with_context(|| {
        format!(
            "{}: cannot be written, and a process that detaches logs there (make its directory, \
             or stay in front with -f)",
            path.display()
        )
    })
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
