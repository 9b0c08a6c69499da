//! The replies that a gateway sends instead of a log, and how it recognizes those of other
//! gateways.
//!
//! # Wire format
//!
//! The lines in [`Reply::line`] are part of the protocol: gateways of other versions compare them
//! byte for byte. Never change one, and never build one from text that is written for people. The
//! first words of each are those of Zuul's gateway, which people and programs know; CRLF ends the
//! line (RFC 1288, section 2.2), and a line never contains an address.

/// Instead of a log a client gets one of these lines, and then the end of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    /// No queue has the build, or the request was not a build ID.
    NotFound,
    /// The build is queued and no executor has taken it.
    NotStarted,
    /// The rules of the listener do not allow the request. A client cannot tell this from
    /// [`Self::NotFound`].
    Denied,
    /// Everything else.
    Error(ErrorReason),
}

/// The reasons for an internal streaming error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ErrorReason {
    RequestTooLong,
    NoRequest,
    TooManyConnections,
    TooManyFromAddress,
    TooManyLookups,
    /// Too many requests for the build wait for the next gateway.
    TooManyForBuild,
    RegistryUnavailable,
    MalformedEntry,
    ExecutorUnreachable,
    ZoneUnreachable,
    ExecutorSilent,
    /// A peer gateway wanted a gateway of another zone.
    WrongZone,
    /// A peer gateway has sent a request that too many gateways have sent before.
    Loop,
}

impl Reply {
    /// All replies, except that [`Self::Denied`] has the line of [`Self::NotFound`].
    pub(crate) const ALL: [Self; 15] = [
        Self::NotFound,
        Self::NotStarted,
        Self::Error(ErrorReason::RequestTooLong),
        Self::Error(ErrorReason::NoRequest),
        Self::Error(ErrorReason::TooManyConnections),
        Self::Error(ErrorReason::TooManyFromAddress),
        Self::Error(ErrorReason::TooManyLookups),
        Self::Error(ErrorReason::TooManyForBuild),
        Self::Error(ErrorReason::RegistryUnavailable),
        Self::Error(ErrorReason::MalformedEntry),
        Self::Error(ErrorReason::ExecutorUnreachable),
        Self::Error(ErrorReason::ZoneUnreachable),
        Self::Error(ErrorReason::ExecutorSilent),
        Self::Error(ErrorReason::WrongZone),
        Self::Error(ErrorReason::Loop),
    ];

    /// The bytes on the wire. See the module's "Wire format" before you change one.
    pub(crate) const fn line(self) -> &'static str {
        match self {
            Self::NotFound | Self::Denied => "Build not found\r\n",
            Self::NotStarted => "Build did not start yet\r\n",
            Self::Error(error) => match error {
                ErrorReason::RequestTooLong => {
                    "Internal streaming error: the request is too long\r\n"
                }
                ErrorReason::NoRequest => {
                    "Internal streaming error: no request within the time allowed\r\n"
                }
                ErrorReason::TooManyConnections => {
                    "Internal streaming error: too many connections\r\n"
                }
                ErrorReason::TooManyFromAddress => {
                    "Internal streaming error: too many connections from this address\r\n"
                }
                ErrorReason::TooManyLookups => {
                    "Internal streaming error: too many requests at this moment\r\n"
                }
                ErrorReason::TooManyForBuild => {
                    "Internal streaming error: too many requests for this build\r\n"
                }
                ErrorReason::RegistryUnavailable => {
                    "Internal streaming error: ZooKeeper cannot be reached\r\n"
                }
                ErrorReason::MalformedEntry => {
                    "Internal streaming error: the build's entry cannot be read\r\n"
                }
                ErrorReason::ExecutorUnreachable => {
                    "Internal streaming error: the executor cannot be reached\r\n"
                }
                ErrorReason::ZoneUnreachable => {
                    "Internal streaming error: the zone's gateways cannot be reached\r\n"
                }
                ErrorReason::ExecutorSilent => {
                    "Internal streaming error: the executor does not answer\r\n"
                }
                ErrorReason::WrongZone => {
                    "Internal streaming error: this gateway serves another zone\r\n"
                }
                ErrorReason::Loop => {
                    "Internal streaming error: too many gateways have forwarded the request\r\n"
                }
            },
        }
    }
}

/// The beginning of every error line, and all of the line of Zuul's gateway.
const ERROR: &[u8] = b"Internal streaming error";

/// The longest error line that is recognized, in bytes. Those of later versions may be longer than
/// the ones above.
const LINE_MAX: usize = 200;

/// A reply of another gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GatewayReply {
    /// One of the lines above, from Zuul's gateway or a peer gateway. Never [`Reply::Denied`].
    Known(Reply),
    /// An internal streaming error of Zuul's gateway or of another version of this program.
    OtherError,
}

impl GatewayReply {
    /// Returns whether another hop may have the log. Replies that follow from ZooKeeper are final,
    /// because all gateways read the same; so are those about the executor, which come from a
    /// gateway of its zone.
    pub(crate) fn allows_failover(self) -> bool {
        !matches!(
            self,
            Self::Known(
                Reply::NotFound
                    | Reply::NotStarted
                    | Reply::Denied
                    | Reply::Error(ErrorReason::ExecutorUnreachable | ErrorReason::ExecutorSilent)
            )
        )
    }
}

/// What the first bytes from another gateway are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FirstBytes {
    Log,
    Reply(GatewayReply),
    /// The beginning of a line that may become a reply.
    Incomplete,
}

/// Recognizes a reply in the first bytes from another gateway.
///
/// Only a line that nothing follows is a reply. `is_last` says that no more bytes are coming: then
/// a reply need not be ended by CRLF, as those of Zuul's gateway are not.
pub(crate) fn classify(bytes: &[u8], is_last: bool) -> FirstBytes {
    for reply in Reply::ALL {
        let line = reply.line().as_bytes();
        if bytes == line || is_last && Some(bytes) == line.strip_suffix(b"\r\n") {
            return FirstBytes::Reply(GatewayReply::Known(reply));
        }
    }
    if bytes.len() > LINE_MAX {
        return FirstBytes::Log;
    }
    if bytes.starts_with(ERROR) {
        let newline = bytes.iter().position(|byte| *byte == b'\n');
        return match newline {
            Some(newline) if newline + 1 < bytes.len() => FirstBytes::Log,
            None if !is_last => FirstBytes::Incomplete,
            _ => FirstBytes::Reply(GatewayReply::OtherError),
        };
    }
    let continues = |reply: &Reply| reply.line().as_bytes().starts_with(bytes);
    if !is_last && !bytes.is_empty() && Reply::ALL.iter().any(continues) {
        return FirstBytes::Incomplete;
    }
    FirstBytes::Log
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(reply: Reply) -> FirstBytes {
        FirstBytes::Reply(GatewayReply::Known(reply))
    }

    /// A changed line is a changed protocol.
    #[test]
    fn lines_are_distinct_and_begin_as_those_of_zuul() {
        for (index, reply) in Reply::ALL.iter().enumerate() {
            let line = reply.line();
            let text = line.strip_suffix("\r\n").expect("ended by CRLF");
            assert!(text.bytes().all(|byte| (b' '..=b'~').contains(&byte)), "{text}");
            assert!(line.len() <= LINE_MAX, "{text}");
            let begins = match reply {
                Reply::Error(_) => text.starts_with("Internal streaming error: "),
                Reply::NotStarted => text == "Build did not start yet",
                Reply::NotFound | Reply::Denied => text == "Build not found",
            };
            assert!(begins, "{text}");
            let others = &Reply::ALL[index + 1..];
            assert!(others.iter().all(|other| other.line() != line), "{text}");
        }
        assert_eq!(Reply::Denied.line(), Reply::NotFound.line());
    }

    #[test]
    fn whole_line_is_a_reply_however_it_is_split() {
        for reply in Reply::ALL {
            let line = reply.line().as_bytes();
            assert_eq!(classify(line, false), known(reply));
            assert_eq!(classify(line, true), known(reply));
            for cut in 1..line.len() {
                assert_eq!(classify(&line[..cut], false), FirstBytes::Incomplete, "{cut}");
            }
            let more = [line, b"more"].concat();
            assert_eq!(classify(&more, false), FirstBytes::Log);
        }
    }

    #[test]
    fn lines_of_zuul_and_of_other_versions_are_replies() {
        assert_eq!(classify(b"Build not found", true), known(Reply::NotFound));
        assert_eq!(classify(b"Build did not start yet", true), known(Reply::NotStarted));
        let other = FirstBytes::Reply(GatewayReply::OtherError);
        assert_eq!(classify(b"Internal streaming error", true), other);
        assert_eq!(classify(b"Internal streaming error: something new\r\n", false), other);
        assert_eq!(classify(b"Internal streaming error: somethi", false), FirstBytes::Incomplete);
    }

    #[test]
    fn logs_are_not_replies() {
        let long = [ERROR, &[b'x'; LINE_MAX]].concat();
        for log in [
            &b"2026-01-01 00:00:00.000000 | Job console starting\n"[..],
            b"Build ID 2200 not found",
            b"Log not found for build ID 2200",
            b"Builds\n",
            b"Internal streaming error\nbut not the end\n",
            b"internal streaming error\r\n",
            &long,
        ] {
            assert_eq!(classify(log, false), FirstBytes::Log, "{}", log.escape_ascii());
        }
        assert_eq!(classify(b"I", true), FirstBytes::Log);
        assert_eq!(classify(b"", true), FirstBytes::Log);
    }

    #[test]
    fn replies_about_the_build_or_the_executor_are_final() {
        let allows = |reply| GatewayReply::Known(reply).allows_failover();
        assert!(!allows(Reply::NotFound) && !allows(Reply::NotStarted));
        assert!(!allows(Reply::Error(ErrorReason::ExecutorSilent)));
        assert!(allows(Reply::Error(ErrorReason::RegistryUnavailable)));
        assert!(allows(Reply::Error(ErrorReason::TooManyForBuild)));
        assert!(GatewayReply::OtherError.allows_failover());
    }

    #[test]
    fn manual_page_lists_every_reply() {
        let page = include_str!("../../../docs/zuul-fingergw.8");
        for reply in Reply::ALL {
            let line = reply.line().trim_end().replace('\'', "\\(aq");
            assert!(page.contains(&format!(".TP\n.B {line}\n")), "{line}");
        }
    }
}
