//! Daemonizing: the process continues in the background, and the one that was started reports the
//! result of the start (daemon(7), "SysV Daemons").

use std::env;
use std::fs::{self, File};
use std::io::{self, PipeWriter, Read, Write, pipe};
use std::process;

use anyhow::{Context, Result, bail};
use nix::unistd::{ForkResult, setsid};
use rustix::fs::Mode;
use rustix::process::umask;
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

/// The daemon's side of daemonizing. Until [`Self::notify_parent`] the parent process waits and
/// standard error is still its own; dropping this makes the parent exit with status 1.
pub(crate) struct DaemonizeGuard {
    parent: PipeWriter,
    null: File,
}

/// Continues in a process and a session of its own. The parent process does not return from here:
/// it waits for the [`DaemonizeGuard`] and exits. Must be called while there is one thread.
///
/// # Errors
/// There is more than one thread, or the kernel refuses.
pub(crate) fn daemonize() -> Result<DaemonizeGuard> {
    let null = File::options().read(true).write(true).open("/dev/null").context("/dev/null")?;
    let (mut result, parent) = pipe().context("cannot create a pipe")?;
    if let ForkResult::Parent { .. } = fork()? {
        drop(parent);
        // The end of the pipe without a byte means that the daemon has failed, and has written the
        // reason to standard error.
        let notified = result.read_exact(&mut [0]);
        process::exit(i32::from(notified.is_err()));
    }
    setsid().context("setsid")?;
    // A second fork, because a session leader can acquire a controlling terminal.
    if let ForkResult::Parent { .. } = fork()? {
        process::exit(0);
    }
    umask(Mode::WGRP | Mode::WOTH);
    env::set_current_dir("/").context("/")?;
    dup2_stdin(&null).context("standard input")?;
    Ok(DaemonizeGuard { parent, null })
}

impl DaemonizeGuard {
    /// Redirects standard output and error to `/dev/null`, and makes the parent exit with status 0.
    pub(crate) fn notify_parent(mut self) -> io::Result<()> {
        dup2_stdout(&self.null)?;
        dup2_stderr(&self.null)?;
        // Fails if the parent was killed, which does not concern the daemon.
        let _ = self.parent.write_all(&[0]);
        Ok(())
    }
}

#[expect(unsafe_code, reason = "fork is sound only while single-threaded, which is checked here")]
fn fork() -> Result<ForkResult> {
    let threads = fs::read_dir("/proc/self/task").map(Iterator::count);
    if threads.is_ok_and(|threads| threads != 1) {
        bail!("cannot daemonize: there is more than one thread");
    }
    // SAFETY: this is the only thread, so no other thread can leave a lock held or a value
    // half-written in the copy.
    unsafe { nix::unistd::fork() }.context("cannot daemonize: fork")
}
