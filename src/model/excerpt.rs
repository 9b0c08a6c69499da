//! Excerpts of untrusted input for log lines and error messages.

use std::fmt;

/// The beginning of untrusted bytes, at most [`Excerpt::MAX`] of them, escaped to printable ASCII.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Excerpt(String);

impl Excerpt {
    const MAX: usize = 64;

    pub(crate) fn new(bytes: &[u8]) -> Self {
        let mut text = bytes[..bytes.len().min(Self::MAX)].escape_ascii().to_string();
        if bytes.len() > Self::MAX {
            text.push_str("...");
        }
        Self(text)
    }
}

impl fmt::Display for Excerpt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Excerpt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn excerpts_are_short_and_printable() {
        assert_eq!(Excerpt::new(b"a\x1b[31m\n\xff").to_string(), r"a\x1b[31m\n\xff");
        let long = Excerpt::new(&[b'x'; 1000]).to_string();
        assert_eq!(long, format!("{}...", "x".repeat(64)));
    }
}
