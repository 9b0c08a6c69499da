//! The build's job on its executor: a log that grows in a job directory, and is gone in the end.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use tokio::time::{Interval, MissedTickBehavior, interval};

use super::Options;
use super::executor::log_of;
use crate::model::build_id::BuildId;

/// Between two lines of the made-up log.
const LINE_EVERY: Duration = Duration::from_millis(300);

/// The lines of the made-up log when it is to end.
const LINES: u32 = 12;

/// A job whose log somebody streams.
pub(crate) struct Job {
    directory: PathBuf,
    log: Content,
    /// The log that is streamed, open for reading. `None` where the user's own file is followed,
    /// which may be changed in any way.
    source: Option<File>,
    once: bool,
    ended: bool,
}

enum Content {
    /// The user's file: itself, or a copy of what it holds now.
    Users { length: Option<u64> },
    /// A log we write, line by line.
    MadeUp { file: File, lines: u32, length: u64, clock: Interval },
}

impl Job {
    /// Makes the job directory below `root`, with the log that `options` ask for.
    pub(crate) fn prepare(root: &Path, build: &BuildId, options: &Options) -> Result<Self> {
        let builds = root.join("builds");
        let log = log_of(&builds, build.as_str());
        fs::create_dir_all(log.parent().context("a log is in a directory")?)?;
        let content = match &options.log {
            None => {
                let mut clock = interval(LINE_EVERY);
                clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
                Content::MadeUp { file: File::create(&log)?, lines: 0, length: 0, clock }
            }
            Some(file) => {
                let named = || format!("{}: cannot be read", file.display());
                if file.is_dir() {
                    bail!("{}: is a directory", file.display());
                }
                let length = if options.once {
                    let mut file = File::open(file).with_context(named)?;
                    Some(io::copy(&mut file, &mut File::create(&log)?).with_context(named)?)
                } else {
                    let file = fs::canonicalize(file).with_context(named)?;
                    File::open(&file).with_context(named)?;
                    std::os::unix::fs::symlink(file, &log)?;
                    None
                };
                Content::Users { length }
            }
        };
        let directory = builds.join(build.as_str());
        let is_ours = options.log.is_none() || options.once;
        let source = is_ours.then(|| File::open(&log)).transpose()?;
        let mut job = Self { directory, log: content, source, once: options.once, ended: false };
        // As a real executor's: there is a first line before anybody can ask.
        job.write_line()?;
        Ok(job)
    }

    /// The log's length, where it is known to be whole.
    pub(crate) fn length(&self) -> Option<u64> {
        match &self.log {
            Content::Users { length } => *length,
            Content::MadeUp { length, .. } => self.ended.then_some(*length),
        }
    }

    /// Whether [`Self::contains`] can be asked.
    pub(crate) fn is_comparable(&self) -> bool {
        self.source.is_some()
    }

    /// Whether the log has `bytes` at `offset`; also after the job's directory is gone. Never, where
    /// the log is not comparable.
    pub(crate) fn contains(&self, bytes: &[u8], offset: u64) -> io::Result<bool> {
        let Some(source) = &self.source else { return Ok(false) };
        let mut own = vec![0; bytes.len()];
        match source.read_exact_at(&mut own, offset) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(false),
            read => read.map(|()| own == bytes),
        }
    }

    /// Takes the job one step further, when it is time for it. `streaming` says that somebody has
    /// the log open: from then on its directory may vanish, as a finished build's does.
    pub(crate) async fn go_on(&mut self, streaming: bool) -> Result<()> {
        let finished = match &mut self.log {
            _ if self.ended => return std::future::pending().await,
            Content::Users { .. } => true,
            Content::MadeUp { lines, clock, .. } => {
                clock.tick().await;
                *lines == LINES
            }
        };
        if self.once && finished {
            if !streaming {
                return std::future::pending().await;
            }
            self.ended = true;
            fs::remove_dir_all(&self.directory)?;
            return Ok(());
        }
        match self.log {
            Content::Users { .. } => std::future::pending().await,
            Content::MadeUp { .. } => self.write_line(),
        }
    }

    fn write_line(&mut self) -> Result<()> {
        let Content::MadeUp { file, lines, length, .. } = &mut self.log else { return Ok(()) };
        let time = clock_time();
        let line = match *lines {
            0 => format!("{time} | Job console starting\n"),
            number => format!("{time} | west: task {number} says h\u{e9}llo to east\n"),
        };
        file.write_all(line.as_bytes())?;
        *lines += 1;
        *length += line.len() as u64;
        Ok(())
    }
}

/// The time of day (UTC) as job logs show it.
fn clock_time() -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let seconds = now.as_secs() % 86_400;
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    format!("{hours:02}:{minutes:02}:{:02}.{:06}", seconds % 60, now.subsec_micros())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_log_contains_its_own_bytes_and_no_others() {
        let directory = tempfile::tempdir().expect("a directory");
        let log = directory.path().join("log");
        fs::write(&log, "one\ntwo\n").expect("a log");
        let build = BuildId::new("abc").expect("a build id");
        let prepare = |once| {
            let options = Options { log: Some(log.clone()), once };
            Job::prepare(&directory.path().join(once.to_string()), &build, &options).expect("a job")
        };
        let job = prepare(true);
        for (bytes, offset, expected) in [
            ("one\ntwo\n", 0, true),
            ("two", 4, true),
            ("two", 0, false),
            ("two\nx", 4, false),
            ("x", 8, false),
        ] {
            let contains = job.contains(bytes.as_bytes(), offset).expect("a readable log");
            assert_eq!(contains, expected, "{bytes:?} at {offset}");
        }
        assert!(job.is_comparable() && !prepare(false).is_comparable());
    }
}
