//! Build IDs.

use std::fmt;

/// The UUID of a build as Zuul's executors accept it: 1 to [`BuildId::MAX`] hexadecimal digits.
/// Zuul itself makes 32.
///
/// It contains nothing else, so it is safe in a znode's path and on a log line. Upper and lower
/// case are preserved: znode names are case-sensitive.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct BuildId(String);

impl BuildId {
    /// The most digits. Bounded because an unauthenticated client chooses the ID, and it is part of
    /// one path per zone in a lookup.
    pub(crate) const MAX: usize = 64;

    /// Returns `text` as a build ID, or `None` if it is not one.
    pub(crate) fn new(text: &str) -> Option<Self> {
        let is_valid = (1..=Self::MAX).contains(&text.len())
            && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_valid.then(|| Self(text.to_owned()))
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for BuildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
