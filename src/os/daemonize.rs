//! Leaving the terminal: the process goes on by itself, and whoever started it hears how that went.

use std::env;
use std::fs::{self, File};
use std::io::{self, PipeWriter, Read, Write, pipe};
use std::process;

use anyhow::{Context, Result, bail};
use nix::unistd::{ForkResult, setsid};
use rustix::fs::Mode;
use rustix::process::umask;
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

/// A detached process that has not yet said that it is up. While there is one, standard error is
/// still that of whoever started it, who waits; dropping it tells them that nothing came of it.
pub(crate) struct DaemonizeGuard {
    starter: PipeWriter,
    null: File,
}

/// Goes on in a process of its own, in a session of its own; the one that was started stays until
/// the [`DaemonizeGuard`] is up or dropped, and ends. Call while there is one thread.
///
/// # Errors
/// There is more than one thread, or the kernel refuses.
pub(crate) fn daemonize() -> Result<DaemonizeGuard> {
    let null = File::options().read(true).write(true).open("/dev/null").context("/dev/null")?;
    let (mut outcome, starter) = pipe().context("a pipe")?;
    if let ForkResult::Parent { .. } = fork()? {
        drop(starter);
        let mut up = [1];
        // Ended without a word: it has said why on standard error.
        let told = outcome.read_exact(&mut up);
        process::exit(i32::from(told.is_err()));
    }
    setsid().context("setsid")?;
    // Whoever leads a session may be given a terminal again.
    if let ForkResult::Parent { .. } = fork()? {
        process::exit(0);
    }
    umask(Mode::WGRP | Mode::WOTH);
    env::set_current_dir("/").context("/")?;
    dup2_stdin(&null).context("standard input")?;
    Ok(DaemonizeGuard { starter, null })
}

impl DaemonizeGuard {
    /// Tells that all is well and lets go of the terminal.
    pub(crate) fn notify_parent(mut self) -> io::Result<()> {
        dup2_stdout(&self.null)?;
        dup2_stderr(&self.null)?;
        // Whoever started it may be gone, and then does not want to know.
        let _ = self.starter.write_all(&[0]);
        Ok(())
    }
}

#[expect(unsafe_code, reason = "what threads left behind would be broken; there are none")]
fn fork() -> Result<ForkResult> {
    let threads = fs::read_dir("/proc/self/task").map(Iterator::count);
    if threads.is_ok_and(|threads| threads != 1) {
        bail!("cannot detach: there are threads already");
    }
    // SAFETY: this is the only thread, so no other one can leave a lock or a half-written value
    // behind in the copy.
    unsafe { nix::unistd::fork() }.context("cannot detach: fork")
}
