//! Host names beyond ASCII.

use std::borrow::Cow;

/// The name to resolve, and to check in a certificate, for `name`: its A-label form where it is not
/// ASCII (UTS 46). Python's codec `idna`, which Zuul's program dials with, does the same by an older
/// standard; letters such as the German sharp s differ.
///
/// `None` if the name has no such form.
pub(crate) fn to_ascii(name: &str) -> Option<Cow<'_, str>> {
    if name.is_ascii() {
        return Some(Cow::Borrowed(name));
    }
    idna::domain_to_ascii(name).ok().map(Cow::Owned)
}

#[cfg(test)]
mod tests {
    use super::to_ascii;

    #[test]
    fn names_beyond_ascii_become_a_labels() {
        for (name, expected) in [
            ("gw.example.org.", Some("gw.example.org.")),
            ("fe80::1%eth0", Some("fe80::1%eth0")),
            ("b\u{fc}cher.test", Some("xn--bcher-kva.test")),
            ("B\u{dc}CHER.test.", Some("xn--bcher-kva.test.")),
            ("\u{4f8b}\u{3048}.\u{30c6}\u{30b9}\u{30c8}", Some("xn--r8jz45g.xn--zckzah")),
            ("a\u{fffd}", None),
        ] {
            assert_eq!(to_ascii(name).as_deref(), expected, "{name}");
        }
    }
}
