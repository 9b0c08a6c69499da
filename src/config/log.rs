//! Settings of the log.

use std::fmt;
use std::path::PathBuf;

use tracing::Level;

/// What is logged, in which format and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Log {
    pub(crate) level: Level,
    pub(crate) format: LogFormat,
    pub(crate) output: LogOutput,
    /// The Python logging configuration that level and output are from, if there is one.
    pub(crate) log_config: Option<LogConfig>,
}

/// The `log_config` of a `zuul.conf`. Its level counts even with `-d`, as with Zuul's own gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LogConfig {
    pub(crate) file: String,
    /// The parts of it that have no effect and change which lines are logged, or where.
    pub(crate) ignored: Vec<String>,
}

/// The format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LogFormat {
    Text,
    Json,
    /// The format of Zuul's own services.
    Zuul,
}

/// The destination of log lines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LogOutput {
    Stdout,
    Stderr,
    /// A file to append to, opened again after it was rotated.
    File(PathBuf),
}

/// The file that Zuul's own gateway logs to after it has daemonized.
const DAEMON_LOG: &str = "/var/log/zuul/fingergw.log";

impl LogOutput {
    /// The output at `path`. The usual paths of the standard streams are symbolic links, which root
    /// does not follow, and cannot be opened where a stream is a socket, as under systemd.
    pub(super) fn from_path(path: PathBuf) -> Self {
        match path.to_str() {
            Some("/dev/stdout" | "/dev/fd/1" | "/proc/self/fd/1") => Self::Stdout,
            Some("/dev/stderr" | "/dev/fd/2" | "/proc/self/fd/2") => Self::Stderr,
            _ => Self::File(path),
        }
    }
}

impl fmt::Display for LogOutput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdout => f.write_str("standard output"),
            Self::Stderr => f.write_str("standard error"),
            Self::File(path) => write!(f, "{}", path.display()),
        }
    }
}

impl Log {
    /// These settings with the option `-d`, if it is `debug`.
    pub(crate) fn with_debug(self, debug: bool) -> Self {
        match self.log_config {
            None if debug => Self { level: self.level.max(Level::DEBUG), ..self },
            _ => self,
        }
    }

    /// Returns the warning about the parts of the `log_config` that have no effect, if there are
    /// any.
    pub(crate) fn ignored(&self) -> Option<String> {
        let LogConfig { file, ignored } = self.log_config.as_ref()?;
        if ignored.is_empty() {
            return None;
        }
        let (level, output) = (self.level.as_str().to_lowercase(), &self.output);
        Some(format!(
            "{file}: these have no effect: {}; lines go to {output} from level {level} on",
            ignored.join(", ")
        ))
    }

    /// Returns the warning of [`Self::ignored`], unless `before` has the same.
    pub(crate) fn new_warnings(&self, before: &Self) -> Option<String> {
        self.ignored().filter(|warning| before.ignored().as_ref() != Some(warning))
    }

    /// These settings for a process without a terminal: standard output and error become a file.
    pub(crate) fn for_daemon(self) -> Self {
        let output = match self.output {
            LogOutput::Stdout | LogOutput::Stderr => LogOutput::File(PathBuf::from(DAEMON_LOG)),
            file @ LogOutput::File(_) => file,
        };
        Self { output, ..self }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self {
            level: Level::INFO,
            format: LogFormat::Text,
            output: LogOutput::Stdout,
            log_config: None,
        }
    }
}
