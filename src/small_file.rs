//! Reading what operators name in a configuration: whole, and in bounded time and memory. A device or
//! a pipe under such a name is a slip, and reading it would not end.

use std::fs::OpenOptions;
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;

/// The longest file that is read, in bytes: many times what any configuration or certificate has.
pub(crate) const MAX: u64 = 1 << 20;

/// Reads the regular file at `path`, or what a link there leads to.
///
/// # Errors
/// It cannot be opened or read, is not a regular file, or is longer than [`MAX`].
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    // Opening a pipe would wait for somebody to write to it.
    let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(nonblocking).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(ErrorKind::InvalidInput, "not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX {
        return Err(io::Error::new(ErrorKind::FileTooLarge, format!("longer than {MAX} bytes")));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    #[test]
    fn as_long_as_may_be_and_longer() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let longest = vec![b'x'; usize::try_from(MAX).unwrap()];
        fs::write(&path, &longest).unwrap();
        assert!(read(&path).unwrap() == longest);
        fs::write(&path, [longest, vec![b'x']].concat()).unwrap();
        assert_eq!(read(&path).unwrap_err().to_string(), "longer than 1048576 bytes");
    }

    /// None of them would ever end.
    #[test]
    fn what_is_no_file() {
        let directory = tempfile::tempdir().unwrap();
        let pipe = directory.path().join("pipe");
        mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR, 0).unwrap();
        for path in [Path::new("/dev/zero"), &pipe, directory.path()] {
            assert_eq!(read(path).unwrap_err().to_string(), "not a regular file", "{path:?}");
        }
    }
}
