//! What the log of a build is like, written into the build's UUID: the executor needs no other
//! word to know what to send, whoever asks it and however often.

use serde::{Deserialize, Serialize};

/// The log of a build.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Log {
    /// As many bytes as fit through in so many milliseconds.
    Bulk(u32),
    /// So many bytes, all there at once.
    Short(u32),
    /// One line at once, another one whenever the driver says so, until it says that it is over.
    Quiet,
}

/// A line of a quiet log, its newline included, in bytes: that of a usual console line.
pub(crate) const LINE: usize = 100;

/// What a short log is taken to be where nothing else is said, in bytes.
pub(crate) const SHORT: u32 = 2048;

impl Log {
    /// A new build with this log.
    pub(crate) fn build(self) -> String {
        let (kind, size) = match self {
            Self::Bulk(milliseconds) => (0xb, milliseconds),
            Self::Short(bytes) => (0x5, bytes),
            Self::Quiet => (0x9, 0),
        };
        format!("{kind:x}{size:08x}{:023x}", fastrand::u128(..) >> 36)
    }

    /// The log of `build`, if it is one of ours.
    pub(crate) fn of(build: &str) -> Option<Self> {
        let size = u32::from_str_radix(build.get(1..9)?, 16).ok()?;
        match build.as_bytes().first()? {
            b'b' => Some(Self::Bulk(size)),
            b'5' => Some(Self::Short(size)),
            b'9' => Some(Self::Quiet),
            _ => None,
        }
    }
}
