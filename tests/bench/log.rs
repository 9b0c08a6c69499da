//! The log of a build, encoded in the build's UUID: the executor needs no other information.

use serde::{Deserialize, Serialize};

/// The log of a build.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Log {
    /// Bytes at full speed for this number of milliseconds.
    Bulk(u32),
    /// This number of bytes, all available immediately.
    Short(u32),
    /// One line immediately, and further lines and the end when the driver requests them.
    Quiet,
}

/// The length of a line of an idle log with its newline, in bytes: that of a usual console line.
pub(crate) const LINE: usize = 100;

/// The default length of a short log, in bytes.
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

    /// The log of `build`, if it is a build of these measurements.
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
