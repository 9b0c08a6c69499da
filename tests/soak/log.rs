//! The log of a build, encoded in the build's UUID: executor and client compute each byte of it
//! independently.

use std::sync::OnceLock;

/// The length of the random bytes of which all logs are parts. It is longer than any log, so that
/// no two parts of a log are equal.
const PATTERN: usize = 48 * 1024 * 1024;

/// The longest log, in bytes.
pub(crate) const LONGEST: u32 = 32 * 1024 * 1024;

/// How the executor ends a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// After the complete log.
    Complete,
    /// With a reset after the last byte.
    Reset,
    /// Before the first byte.
    Empty,
}

/// The log of a build.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Log {
    pub(crate) end: End,
    /// Its length in bytes.
    pub(crate) length: u32,
    /// Milliseconds between two lines; 0 is no pause.
    pub(crate) pace: u16,
    /// Its offset in the pattern.
    start: u32,
}

/// The length of a line of a slow log, in bytes.
pub(crate) const LINE: usize = 211;

impl Log {
    /// A new build with this log.
    pub(crate) fn build(rng: &mut fastrand::Rng, end: End, length: u32, pace: u16) -> String {
        let kind = match end {
            End::Complete => 0xa,
            End::Reset => 0xc,
            End::Empty => 0xe,
        };
        let start = rng.u32(..PATTERN as u32 - LONGEST);
        format!("{kind:x}{length:08x}{pace:04x}{start:08x}{:011x}", rng.u64(..) >> 20)
    }

    /// The log of `build`, if it is a build of this test.
    pub(crate) fn of(build: &str) -> Option<Self> {
        let end = match build.as_bytes().first()? {
            b'a' => End::Complete,
            b'c' => End::Reset,
            b'e' => End::Empty,
            _ => return None,
        };
        let number = |from, to| u32::from_str_radix(build.get(from..to)?, 16).ok();
        let (length, start) = (number(1, 9)?, number(13, 21)?);
        let pace = u16::try_from(number(9, 13)?).ok()?;
        let fits = length <= LONGEST && start < PATTERN as u32 - LONGEST;
        fits.then_some(Self { end, length, pace, start })
    }

    /// All its bytes.
    pub(crate) fn bytes(self) -> &'static [u8] {
        &pattern()[self.start as usize..][..self.length as usize]
    }
}

/// The random bytes, which are the same in every process.
pub(crate) fn pattern() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| {
        let mut bytes = vec![0; PATTERN];
        fastrand::Rng::with_seed(79).fill(&mut bytes);
        bytes
    })
}
