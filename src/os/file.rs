//! Opens the files that a configuration names.
//!
//! Files are read whole, in bounded time and memory: a device or a FIFO under such a name is a
//! mistake, and reading it would never end. Files that are written (log, pid file) may be in a
//! directory of an unprivileged user.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{Access, AtFlags, CWD, OFlags, accessat};
use rustix::io::Errno;

/// The most bytes that are read of a file: many times the size of any configuration or certificate.
pub(crate) const MAX: u64 = 1 << 20;

/// Reads the regular file at `path`; symbolic links are followed.
///
/// # Errors
/// The file cannot be opened or read, is not a regular file, or is longer than [`MAX`].
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    // Without O_NONBLOCK, opening a FIFO would wait for a writer.
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

/// Opens the file at `path` with `options`, without waiting for the reader of a FIFO. With
/// `refuse_links`, a symbolic link and a file with other names (hard links) are refused: root must
/// not write where an unprivileged user points it.
///
/// # Errors
/// The file cannot be opened, or is neither a regular file nor a character device.
pub(crate) fn open_for_writing(
    path: &Path,
    options: &mut OpenOptions,
    refuse_links: bool,
) -> io::Result<File> {
    let refused = |reason| Err(io::Error::new(ErrorKind::InvalidInput, reason));
    let mut flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    flags.set(OFlags::NOFOLLOW, refuse_links);
    let file = match options.custom_flags(flags.bits().cast_signed()).open(path) {
        // ENXIO: a FIFO without a reader, or a socket (open(2)).
        Err(error) if error.raw_os_error() == Some(Errno::NXIO.raw_os_error()) => {
            return refused("not a regular file");
        }
        Err(error) if refuse_links && error.raw_os_error() == Some(Errno::LOOP.raw_os_error()) => {
            return refused("is a symbolic link, and links are not followed here");
        }
        opened => opened?,
    };
    let metadata = file.metadata()?;
    let kind = metadata.file_type();
    if !kind.is_file() && !kind.is_char_device() {
        return refused("not a regular file");
    }
    if refuse_links && kind.is_file() && metadata.nlink() > 1 {
        return refused("has other names (hard links), which could be another user's files");
    }
    Ok(file)
}

/// Checks that this process may create files in `directory`.
pub(crate) fn check_writable(directory: &Path) -> io::Result<()> {
    Ok(accessat(CWD, directory, Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::fs;

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    #[test]
    fn file_of_the_maximum_length_is_read_and_a_longer_one_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let longest = vec![b'x'; usize::try_from(MAX).unwrap()];
        fs::write(&path, &longest).unwrap();
        assert!(read(&path).unwrap() == longest);
        fs::write(&path, [longest, vec![b'x']].concat()).unwrap();
        assert_eq!(read(&path).unwrap_err().to_string(), "longer than 1048576 bytes");
    }

    #[test]
    fn device_a_fifo_and_a_directory_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let pipe = directory.path().join("pipe");
        mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR, 0).unwrap();
        for path in [Path::new("/dev/zero"), &pipe, directory.path()] {
            assert_eq!(read(path).unwrap_err().to_string(), "not a regular file", "{path:?}");
        }
    }
}
