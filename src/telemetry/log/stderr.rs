//! Messages on standard error outside the log: why the start fails, why the log cannot be written.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// What a pipe accepts without blocking after poll(2) has reported it writable (`PIPE_BUF` of
/// pipe(7)).
const ATOMIC: usize = 4096;

/// Writes `text` and a newline to standard error. Waits at most `timeout` for a reader that stalls.
/// Errors are ignored, because there is no other place to report them; `eprintln!` would panic.
pub(crate) fn write(text: &str, timeout: Duration) {
    // Not with `io::stderr`, whose lock another thread may hold while it waits.
    if let Ok(stderr) = io::stderr().as_fd().try_clone_to_owned() {
        let _ = write_to(&stderr.into(), text, timeout);
    }
}

fn write_to(mut file: &File, text: &str, timeout: Duration) -> io::Result<()> {
    for chunk in format!("{text}\n").as_bytes().chunks(ATOMIC) {
        wait_writable(file, Some(timeout))?;
        file.write_all(chunk)?;
    }
    Ok(())
}

/// Waits until `file` can be written, forever without a `timeout`.
///
/// # Errors
/// `file` cannot be written within `timeout` (`TimedOut`), or poll(2) fails.
pub(super) fn wait_writable(file: &File, timeout: Option<Duration>) -> io::Result<()> {
    let timeout = timeout.map(Timespec::try_from).transpose().map_err(io::Error::other)?;
    let mut polled = [PollFd::new(file, PollFlags::OUT)];
    match rustix::io::retry_on_intr(|| poll(&mut polled, timeout.as_ref()))? {
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::io::{Read, pipe};
    use std::os::fd::OwnedFd;

    #[test]
    fn full_pipe_is_an_error_without_waiting() {
        let (mut reader, writer) = pipe().unwrap();
        let file = File::from(OwnedFd::from(writer));
        let text = "x".repeat(ATOMIC - 1);
        let mut written = 0;
        let error = loop {
            match write_to(&file, &text, Duration::ZERO) {
                Ok(()) => written += ATOMIC,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(written > 0);
        drop(file);
        let mut read = Vec::new();
        assert_eq!(reader.read_to_end(&mut read).unwrap(), written, "only whole texts are written");
    }
}
