//! What the log of a build is like, written into the build's UUID: executor and client compute
//! each byte of it from there, and so need no word from each other to agree or to differ.

use std::sync::OnceLock;

/// All logs are pieces of this many random bytes, each from a place of its own. Longer than any
/// log, so that no two places of one log look alike.
const PATTERN: usize = 48 * 1024 * 1024;

/// The longest log, in bytes.
pub(crate) const LONGEST: u32 = 32 * 1024 * 1024;

/// How the executor ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// With the whole log.
    Whole,
    /// With a reset behind the last byte.
    Reset,
    /// Without a byte of the log.
    Mute,
}

/// The log of a build.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Log {
    pub(crate) end: End,
    /// Bytes.
    pub(crate) length: u32,
    /// Milliseconds between two lines; all at once if 0.
    pub(crate) pace: u16,
    /// Where in the pattern it begins.
    start: u32,
}

/// Of a log that trickles, in bytes.
pub(crate) const LINE: usize = 211;

impl Log {
    /// A new build with such a log.
    pub(crate) fn build(rng: &mut fastrand::Rng, end: End, length: u32, pace: u16) -> String {
        let kind = match end {
            End::Whole => 0xa,
            End::Reset => 0xc,
            End::Mute => 0xe,
        };
        let start = rng.u32(..PATTERN as u32 - LONGEST);
        format!("{kind:x}{length:08x}{pace:04x}{start:08x}{:011x}", rng.u64(..) >> 20)
    }

    /// The log of `build`, if it is one of ours.
    pub(crate) fn of(build: &str) -> Option<Self> {
        let end = match build.as_bytes().first()? {
            b'a' => End::Whole,
            b'c' => End::Reset,
            b'e' => End::Mute,
            _ => return None,
        };
        let number = |from, to| u32::from_str_radix(build.get(from..to)?, 16).ok();
        let (length, start) = (number(1, 9)?, number(13, 21)?);
        let pace = u16::try_from(number(9, 13)?).ok()?;
        let fits = length <= LONGEST && start < PATTERN as u32 - LONGEST;
        fits.then_some(Self { end, length, pace, start })
    }

    /// All of its bytes.
    pub(crate) fn bytes(self) -> &'static [u8] {
        &pattern()[self.start as usize..][..self.length as usize]
    }
}

/// The same in every process.
pub(crate) fn pattern() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| {
        let mut bytes = vec![0; PATTERN];
        fastrand::Rng::with_seed(79).fill(&mut bytes);
        bytes
    })
}
