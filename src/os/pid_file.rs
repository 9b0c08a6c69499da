//! The pid file of a detached process: says who runs, and lets nobody else start.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, Write};
use std::iter;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use tracing::debug;

use super::file::open_for_writing;
use super::privileges::RunAsUser;

/// Longer than any number in a pid file.
const CONTENT_MAX: u64 = 32;

/// How often the file may be taken away between opening and locking it: by others that end.
const TRIES: usize = 10;

/// A pid file that is ours, by a lock that ends with the process; dropping it removes the file.
pub(crate) struct PidFile {
    path: PathBuf,
    file: File,
}

impl PidFile {
    /// Creates and locks the file at `path`, which then belongs to `account`. A file that an earlier
    /// process has left behind is used as it is.
    ///
    /// # Errors
    /// The file cannot be made, or is another process's.
    pub(crate) fn take(path: &Path, account: Option<&RunAsUser>) -> Result<Self> {
        // The working directory will be another.
        let path = std::path::absolute(path).with_context(|| place(path))?;
        for _ in 0..TRIES {
            let (file, is_new) = open(&path)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) => bail!(held(&path, number(&file))),
                locked => locked.with_context(|| format!("{}: cannot be locked", place(&path)))?,
            }
            if let Some(number) = number(&file).filter(|number| is_gateway(*number)) {
                bail!(held(&path, Some(number)));
            }
            // Gone meanwhile, and with it what the lock is good for.
            if !is_at(&path, &file) {
                continue;
            }
            // Never a file that was there: it may be one that a link or a rename has put here.
            if let Some((user, group)) = account.filter(|_| is_new).map(RunAsUser::ids) {
                fchown(&file, Some(user), Some(group)).with_context(|| place(&path))?;
            }
            return Ok(Self { path, file });
        }
        bail!("{}: others keep taking it away", place(&path))
    }

    /// Writes down who runs.
    pub(crate) fn write(&mut self, number: u32) -> Result<()> {
        let written = self
            .file
            .set_len(0)
            .and_then(|()| self.file.rewind())
            .and_then(|()| self.file.write_all(format!("{number}\n").as_bytes()));
        written.with_context(|| format!("{}: cannot be written", place(&self.path)))
    }
}

impl Drop for PidFile {
    /// A user who may not remove files from the directory can still empty this one.
    fn drop(&mut self) {
        if is_at(&self.path, &self.file)
            && let Err(error) = fs::remove_file(&self.path)
        {
            debug!(path = %self.path.display(), %error, "pid file emptied, not removed");
            let _ = self.file.set_len(0);
        }
    }
}

/// Opens the file without following links (the directory is often that of the unprivileged user, and
/// this process is root), and returns whether it was created.
fn open(path: &Path) -> Result<(File, bool)> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o644);
    let opened = match open_for_writing(path, options.clone().create_new(true), true) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            open_for_writing(path, options.create(true).truncate(false), true)
                .map(|file| (file, false))
        }
        created => created.map(|file| (file, true)),
    };
    let (file, is_new) = opened.with_context(|| {
        format!("{}: cannot be made (set pidfile, or stay in front with -f)", place(path))
    })?;
    if !file.metadata().is_ok_and(|metadata| metadata.is_file()) {
        bail!("{}: is not a file", place(path));
    }
    Ok((file, is_new))
}

fn place(path: &Path) -> String {
    format!("pid file {}", path.display())
}

fn held(path: &Path, number: Option<u32>) -> String {
    let who = number.map_or("another process".to_owned(), |number| format!("process {number}"));
    format!("{}: {who} holds it: a gateway runs already; stop that one first", place(path))
}

/// The number written in `file`.
fn number(file: &File) -> Option<u32> {
    let mut text = String::new();
    file.take(CONTENT_MAX).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

/// Whether the process is a finger gateway. Zuul's holds its pid file by running, without a lock.
fn is_gateway(number: u32) -> bool {
    let command = fs::read(format!("/proc/{number}/cmdline")).unwrap_or_default();
    number != std::process::id() && runs_gateway(&command)
}

/// Whether a command line (proc(5), `/proc/PID/cmdline`) is that of a finger gateway: this program, or
/// Zuul's, which Python runs as a script or as a module.
fn runs_gateway(command: &[u8]) -> bool {
    let mut words = command.split(|byte| *byte == 0);
    let mut next = || words.next().and_then(|word| word.rsplit(|byte| *byte == b'/').next());
    match next() {
        Some(b"zuul-fingergw") => true,
        // A few options of the interpreter may come before the script.
        Some(program) if program.starts_with(b"python") => iter::from_fn(next)
            .take(4)
            .any(|word| matches!(word, b"zuul-fingergw" | b"zuul.cmd.fingergw" | b"fingergw.py")),
        _ => false,
    }
}

/// Whether `file` is the one at `path`.
fn is_at(path: &Path, file: &File) -> bool {
    match (fs::symlink_metadata(path), file.metadata()) {
        (Ok(there), Ok(ours)) => (there.dev(), there.ino()) == (ours.dev(), ours.ino()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn one_holds_it_at_a_time() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("pid");
        let mut first = PidFile::take(&path, None).expect("the first");
        first.write(123).expect("a number");
        first.write(45).expect("a shorter one");
        assert_eq!(fs::read_to_string(&path).expect("the file"), "45\n");
        let refused = PidFile::take(&path, None).err().expect("a refusal").to_string();
        assert!(refused.contains("process 45 holds it"), "{refused}");
        drop(first);
        assert!(!path.exists());
        drop(PidFile::take(&path, None).expect("the next"));
    }

    #[test]
    fn one_that_was_left_behind_is_taken_over() {
        let directory = tempfile::tempdir().expect("a directory");
        for content in ["", "4194304000\n", "nonsense", "1\n"] {
            let path = directory.path().join("pid");
            fs::write(&path, content).expect("a file");
            PidFile::take(&path, None).expect("it is nobody's").write(7).expect("a number");
            assert!(!path.exists(), "{content:?}");
        }
    }

    #[test]
    fn only_gateways_hold_a_pid_file_without_a_lock() {
        for (command, is_one) in [
            ("/usr/bin/zuul-fingergw\0-f\0", true),
            ("/opt/zuul/bin/python3\0/opt/zuul/bin/zuul-fingergw\0-d\0", true),
            ("python3.11\0-u\0/usr/local/bin/zuul-fingergw\0", true),
            ("python3\0-m\0zuul.cmd.fingergw\0", true),
            ("less\0/var/log/zuul/fingergw.log\0", false),
            ("/usr/bin/vi\0/etc/systemd/system/zuul-fingergw.service\0", false),
            ("python3\0/opt/fingergw/check.py\0", false),
            ("bash\0", false),
            ("", false),
        ] {
            assert_eq!(runs_gateway(command.as_bytes()), is_one, "{command:?}");
        }
    }

    /// A dropped one leaves alone what another has put in its place.
    #[test]
    fn another_file_in_its_place() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("pid");
        let first = PidFile::take(&path, None).expect("the first");
        fs::remove_file(&path).expect("gone");
        let second = PidFile::take(&path, None).expect("the second");
        drop(first);
        assert!(path.exists());
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn links_and_directories_are_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        let (path, target) = (directory.path().join("pid"), directory.path().join("target"));
        fs::write(&target, "dear").expect("a file");
        symlink(&target, &path).expect("a link");
        assert!(PidFile::take(&path, None).is_err());
        assert!(PidFile::take(directory.path(), None).is_err());
        assert_eq!(fs::read_to_string(&target).expect("the file"), "dear");
        fs::remove_file(&target).expect("gone");
        assert!(PidFile::take(&path, None).is_err());
        assert!(!target.exists(), "nothing is made where a link leads");
        fs::remove_file(&path).expect("gone");
        fs::write(&target, "dear").expect("a file");
        fs::hard_link(&target, &path).expect("a hard link");
        assert!(PidFile::take(&path, None).is_err());
        assert_eq!(fs::read_to_string(&target).expect("the file"), "dear");
    }
}
