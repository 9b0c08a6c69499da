//! The job of the build on its executor: a log that grows in a job directory, which is removed at
//! the end.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use tokio::time::{Interval, MissedTickBehavior, interval};

use super::executor::log_of;
use crate::model::build_id::BuildId;

/// The interval of lines in the generated log.
const LINE_EVERY: Duration = Duration::from_millis(300);

/// The number of lines of a generated log that ends.
const LINES: u32 = 12;

/// A job whose log is streamed.
pub(crate) struct Job {
    directory: PathBuf,
    log: Content,
    /// The log, open for reading. `None` if the user's own file is followed, which may change in
    /// any way.
    source: Option<File>,
    once: bool,
    ended: bool,
}

enum Content {
    /// The user's file, or a copy of its present content.
    User { length: Option<u64> },
    /// A log that we write line by line.
    Generated { file: File, lines: u32, length: u64, clock: Interval },
}

impl Job {
    /// Creates the job directory below `root`, with `log_file` as its log or a generated
    /// one. With `once` the job ends when its log does.
    pub(crate) fn prepare(
        root: &Path,
        build: &BuildId,
        log_file: Option<&Path>,
        once: bool,
    ) -> Result<Self> {
        let builds = root.join("builds");
        let log = log_of(&builds, build.as_str());
        fs::create_dir_all(log.parent().context("a log is in a directory")?)?;
        let content = match log_file {
            None => {
                let mut clock = interval(LINE_EVERY);
                clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
                Content::Generated { file: File::create(&log)?, lines: 0, length: 0, clock }
            }
            Some(file) => {
                let named = || format!("{}: cannot be read", file.display());
                if file.is_dir() {
                    bail!("{}: is a directory", file.display());
                }
                let length = if once {
                    let mut file = File::open(file).with_context(named)?;
                    Some(io::copy(&mut file, &mut File::create(&log)?).with_context(named)?)
                } else {
                    let file = fs::canonicalize(file).with_context(named)?;
                    File::open(&file).with_context(named)?;
                    std::os::unix::fs::symlink(file, &log)?;
                    None
                };
                Content::User { length }
            }
        };
        let directory = builds.join(build.as_str());
        let is_ours = log_file.is_none() || once;
        let source = is_ours.then(|| File::open(&log)).transpose()?;
        let mut job = Self { directory, log: content, source, once, ended: false };
        // As on a real executor: the first line is written before the build is announced.
        job.write_line()?;
        Ok(job)
    }

    /// Returns the length of the log, if it is complete.
    pub(crate) fn length(&self) -> Option<u64> {
        match &self.log {
            Content::User { length } => *length,
            Content::Generated { length, .. } => self.ended.then_some(*length),
        }
    }

    /// Returns whether [`Self::contains`] can compare the log.
    pub(crate) fn is_comparable(&self) -> bool {
        self.source.is_some()
    }

    /// Returns whether the log has `bytes` at `offset`, also after the job's directory was removed.
    /// Always false if the log is not comparable.
    pub(crate) fn contains(&self, bytes: &[u8], offset: u64) -> io::Result<bool> {
        let Some(source) = &self.source else { return Ok(false) };
        let mut own = vec![0; bytes.len()];
        match source.read_exact_at(&mut own, offset) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(false),
            read => read.map(|()| own == bytes),
        }
    }

    /// Waits for the next step of the job, and takes it. Once the log is `streaming`, the directory
    /// of a finished job is removed, as an executor does.
    pub(crate) async fn advance(&mut self, streaming: bool) -> Result<()> {
        let finished = match &mut self.log {
            _ if self.ended => return std::future::pending().await,
            Content::User { .. } => true,
            Content::Generated { lines, clock, .. } => {
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
            Content::User { .. } => std::future::pending().await,
            Content::Generated { .. } => self.write_line(),
        }
    }

    fn write_line(&mut self) -> Result<()> {
        let Content::Generated { file, lines, length, .. } = &mut self.log else { return Ok(()) };
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

/// Returns the time of day (UTC) in the format of job logs.
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
    async fn log_contains_only_its_own_bytes() {
        let directory = tempfile::tempdir().expect("a directory");
        let log = directory.path().join("log");
        fs::write(&log, "one\ntwo\n").expect("a log");
        let build = BuildId::new("abc").expect("a build id");
        let prepare = |once: bool| {
            let root = directory.path().join(once.to_string());
            Job::prepare(&root, &build, Some(&log), once).expect("a job")
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
