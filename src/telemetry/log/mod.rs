//! Log lines and what their levels mean.
//!
//! - error: an operator must act.
//! - warn: degraded, heals by itself; said when a state changes, not while it lasts.
//! - info: the gateway's life, and one line for each stream at its end.
//! - debug: whatever a peer can cause at will. Nothing above it can be provoked by a stranger who
//!   knows no build.

pub(crate) mod output;
pub(crate) mod writer;
pub(crate) mod stderr;
pub(crate) mod text_fields;
pub(crate) mod zuul_format;

pub(crate) use self::writer::LostLines;

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

use self::output::Followed;
use self::writer::{Output, Sink};
use self::text_fields::TextFields;
use self::zuul_format::{ZuulLine, local_zone};
use crate::config::{Log, LogFormat, LogOutput};
use crate::os::privileges::RunAsUser;

/// What operators can do about a log file that cannot be opened.
const MEND: &str = "create its directory, and let the user that this program runs as write to both; \
                    a file that root has written before belongs to root: chown USER FILE";

/// The log as it was started. Dropping it writes what is queued, within a bounded time.
pub(crate) struct Logging {
    sink: Sink,
    is_stderr: bool,
    volume: Volume,
}

impl Logging {
    /// Starts the thread that writes, unless it runs. Until then lines are queued. Call it after the
    /// last fork and after the last change of user.
    ///
    /// # Errors
    /// The kernel gives no thread.
    pub(crate) fn begin(&mut self) -> Result<()> {
        self.sink.begin().context("cannot start the log's thread")
    }

    /// How many lines were lost.
    pub(crate) fn lost_lines(&self) -> LostLines {
        self.sink.lost_lines()
    }

    /// Whether the log goes where standard error goes, so that a message there would appear twice.
    pub(crate) fn is_stderr(&self) -> bool {
        self.is_stderr
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

/// Sends log lines where `log` says, from now on. Call once. A log file is opened, and created if
/// there is none, with the permissions of `account`.
///
/// # Errors
/// The log file cannot be opened.
pub(crate) fn start(log: &Log, account: Option<&RunAsUser>) -> Result<Logging> {
    let Log { level, format, output, log_config: _ } = log;
    let level = *level;
    let output = match output {
        LogOutput::Stdout => Output::stdout().context("cannot use standard output for the log")?,
        LogOutput::Stderr => Output::stderr().context("cannot use standard error for the log")?,
        LogOutput::File(path) => Output::File(open(path, account)?),
    };
    let is_stderr = output.is_stderr();
    let colours = use_colours(output.is_terminal(), env::var_os("NO_COLOR").as_deref());
    let (writer, sink) = Sink::new(output);
    let (filter, handle) = reload::Layer::new(targets(level));
    let lines = tracing_subscriber::registry().with(filter);
    let layer = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(false);
    match format {
        LogFormat::Text => lines.with(layer.fmt_fields(TextFields).with_ansi(colours)).init(),
        LogFormat::Json => lines.with(layer.json().flatten_event(true)).init(),
        LogFormat::Zuul => {
            let (zone, problem) = local_zone();
            lines.with(layer.fmt_fields(TextFields).event_format(ZuulLine::new(zone))).init();
            if let Some(problem) = problem {
                warn!(
                    "log lines have times in UTC: {problem}; set TZ to a name such as Europe/Berlin"
                );
            }
        }
    }
    panic::set_hook(Box::new(log_panic));
    Ok(Logging { sink, is_stderr, volume: Volume(handle) })
}

/// Opens the log file with the permissions of `account`: it may write to the directory, and could have
/// root follow a link there. Root's own directories need root's permissions.
fn open(path: &Path, account: Option<&RunAsUser>) -> Result<Followed> {
    let mut opened = as_account(account, || Followed::open(path))?;
    if let Some(account) = account
        && denied(&opened)
        && output::is_controlled_by_root(path)
    {
        opened = Followed::open_for(path, account.ids());
    }
    opened.with_context(|| unusable(path))
}

/// Whether levels are coloured: on a terminal, unless `NO_COLOR` says otherwise (no-color.org).
fn use_colours(is_terminal: bool, no_color: Option<&OsStr>) -> bool {
    is_terminal && no_color.is_none_or(OsStr::is_empty)
}

fn denied<T>(result: &io::Result<T>) -> bool {
    result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
}

/// Logs a panic. The default hook writes to standard error, where a task that serves would wait for a
/// reader that stalls.
fn log_panic(panic: &panic::PanicHookInfo<'_>) {
    // "panicked at FILE:LINE:COLUMN:", and the message on the next line.
    let text = panic.to_string().replacen("panicked at ", "", 1).replacen('\n', " ", 1);
    let backtrace = Backtrace::capture();
    match backtrace.status() {
        BacktraceStatus::Captured => error!("panicked at {text}\n{backtrace}"),
        _ => error!("panicked at {text}"),
    }
}

/// Checks whether [`start`] would succeed.
///
/// # Errors
/// It would not.
pub(crate) fn check(log: &Log, account: Option<&RunAsUser>) -> Result<()> {
    match &log.output {
        LogOutput::Stdout | LogOutput::Stderr => Ok(()),
        LogOutput::File(path) => {
            let mut checked = as_account(account, || output::check(path))?;
            if account.is_some() && denied(&checked) && output::is_controlled_by_root(path) {
                checked = output::check(path);
            }
            checked.with_context(|| unusable(path))
        }
    }
}

/// Runs `action` with the permissions of `account`, if there is one.
fn as_account<T>(account: Option<&RunAsUser>, action: impl FnOnce() -> T) -> Result<T> {
    match account {
        Some(account) => Ok(account.impersonate(action)?),
        None => Ok(action()),
    }
}

fn unusable(path: &Path) -> String {
    format!("{}: cannot be opened as the log file ({MEND})", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_are_for_terminals_without_no_color() {
        assert!(use_colours(true, None) && use_colours(true, Some("".as_ref())));
        assert!(!use_colours(true, Some("1".as_ref())) && !use_colours(false, None));
    }
}
