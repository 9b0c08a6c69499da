//! The log of the program.
//!
//! - error: an operator must act.
//! - warn: degraded, recovers without help; logged when a state changes, not while it lasts.
//! - info: start, stop, changes of state, and one line at the end of each stream.
//! - debug: everything else that a peer can cause. A client that knows no build cannot cause a line
//!   of a higher level.

mod output;
pub(crate) mod stderr;
mod text_fields;
mod writer;
mod zuul_format;

use std::backtrace::{Backtrace, BacktraceStatus};
use std::env;
use std::ffi::OsStr;
use std::io;
use std::panic;
use std::path::Path;

use anyhow::{Context, Result};
use tracing::{Level, error, warn};
use tracing_log::AsLog;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload::{self, Handle};
use tracing_subscriber::util::SubscriberInitExt;

use self::output::Output;
use self::text_fields::TextFields;
pub(crate) use self::writer::LostLines;
use self::writer::WriterThread;
use self::zuul_format::{ZuulFormat, local_zone};
use crate::config::{Log, LogFormat, LogOutput};
use crate::os::privileges::RunAsUser;

/// What operators can do about a log file that cannot be opened.
const FIX: &str = "create its directory, and let the user that this program runs as write to both; a \
                   file that root has created belongs to root: chown USER FILE";

/// The started log. Dropping it writes the queued lines, within a time limit.
pub(crate) struct LogGuard {
    writer_thread: WriterThread,
    /// Whether the log goes where standard error goes, so that a message there would appear twice.
    pub(crate) is_stderr: bool,
    pub(crate) level: LevelHandle,
}

impl LogGuard {
    /// Starts the thread that writes the lines, which are queued until then. Call this after the
    /// last fork and the last change of user. Later calls do nothing.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub(crate) fn start_writer(&mut self) -> Result<()> {
        self.writer_thread.start().context("cannot start the thread of the log")
    }

    /// Returns the counter of lost lines.
    pub(crate) fn lost_lines(&self) -> LostLines {
        self.writer_thread.lost_lines()
    }
}

/// Changes the level of the log.
#[derive(Clone)]
pub(crate) struct LevelHandle(Handle<Targets, tracing_subscriber::Registry>);

impl LevelHandle {
    /// Logs lines of `level` and more severe ones from now on.
    pub(crate) fn set(&self, level: Level) {
        // Fails only after the end of the log.
        let _ = self.0.reload(targets(level));
        // The maximum level of libraries that use the log crate.
        tracing_log::log::set_max_level(LevelFilter::current().as_log());
    }
}

/// Returns the filter for `level`. Libraries log at debug level only: this program logs what
/// operators need to know of them, and clients can make the TLS library warn.
fn targets(level: Level) -> Targets {
    let libraries = if level >= Level::DEBUG { LevelFilter::DEBUG } else { LevelFilter::OFF };
    Targets::new().with_default(libraries).with_target("zuul_fingergw", level)
}

/// Starts the log according to `log`. Call this once. A log file is opened, or created, with the
/// permissions of `user`.
///
/// # Errors
/// The log file cannot be opened.
pub(crate) fn start(log: &Log, user: Option<&RunAsUser>) -> Result<LogGuard> {
    let output = match &log.output {
        LogOutput::Stdout => Output::stdout().context("cannot use standard output for the log")?,
        LogOutput::Stderr => Output::stderr().context("cannot use standard error for the log")?,
        LogOutput::File(path) => open(path, user)?,
    };
    let is_stderr = output.is_stderr();
    let use_colors = use_colors(output.is_terminal(), env::var_os("NO_COLOR").as_deref());
    let (writer, writer_thread) = writer::new(output);
    let (filter, handle) = reload::Layer::new(targets(log.level));
    let subscriber = tracing_subscriber::registry().with(filter);
    let layer = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(false);
    match log.format {
        LogFormat::Text => {
            subscriber.with(layer.fmt_fields(TextFields).with_ansi(use_colors)).init();
        }
        LogFormat::Json => subscriber.with(layer.json().flatten_event(true)).init(),
        LogFormat::Zuul => {
            let (zone, problem) = local_zone();
            let format = ZuulFormat { zone };
            subscriber.with(layer.fmt_fields(TextFields).event_format(format)).init();
            if let Some(problem) = problem {
                warn!(
                    "log lines have times in UTC: {problem}; set TZ to a name such as Europe/Berlin"
                );
            }
        }
    }
    panic::set_hook(Box::new(log_panic));
    Ok(LogGuard { writer_thread, is_stderr, level: LevelHandle(handle) })
}

/// Opens the log file with the permissions of `user`, who may be able to write to the directory and
/// could have root follow a link there. In directories that only root controls, the file is opened
/// by root and created for `user`.
fn open(path: &Path, user: Option<&RunAsUser>) -> Result<Output> {
    let mut opened = run_as(user, || Output::open(path))?;
    if let Some(user) = user
        && is_denied(&opened)
        && output::is_controlled_by_root(path)
    {
        opened = Output::open_for(path, user.ids());
    }
    opened.with_context(|| cannot_open(path))
}

/// Checks whether [`start`] would succeed.
///
/// # Errors
/// It would not.
pub(crate) fn check(log: &Log, user: Option<&RunAsUser>) -> Result<()> {
    let LogOutput::File(path) = &log.output else { return Ok(()) };
    let mut checked = run_as(user, || output::check(path))?;
    if user.is_some() && is_denied(&checked) && output::is_controlled_by_root(path) {
        checked = output::check(path);
    }
    checked.with_context(|| cannot_open(path))
}

/// Runs `action` with the permissions of `user`, if there is one.
fn run_as<T>(user: Option<&RunAsUser>, action: impl FnOnce() -> T) -> Result<T> {
    match user {
        Some(user) => Ok(user.impersonate(action)?),
        None => Ok(action()),
    }
}

fn is_denied<T>(result: &io::Result<T>) -> bool {
    result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
}

fn cannot_open(path: &Path) -> String {
    format!("{}: cannot be opened as the log file ({FIX})", path.display())
}

/// Returns whether levels are colored: on a terminal, unless `NO_COLOR` is set (no-color.org).
fn use_colors(is_terminal: bool, no_color: Option<&OsStr>) -> bool {
    is_terminal && no_color.is_none_or(OsStr::is_empty)
}

/// Logs a panic. The default hook writes to standard error, where a task that serves would wait for
/// a stalled reader.
fn log_panic(panic: &panic::PanicHookInfo<'_>) {
    // "panicked at FILE:LINE:COLUMN:", and the message on the next line.
    let text = panic.to_string().replacen("panicked at ", "", 1).replacen('\n', " ", 1);
    let backtrace = Backtrace::capture();
    match backtrace.status() {
        BacktraceStatus::Captured => error!("panicked at {text}\n{backtrace}"),
        _ => error!("panicked at {text}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_colored_on_terminals_without_no_color() {
        assert!(use_colors(true, None) && use_colors(true, Some("".as_ref())));
        assert!(!use_colors(true, Some("1".as_ref())) && !use_colors(false, None));
    }
}
