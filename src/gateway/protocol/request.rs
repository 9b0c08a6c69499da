//! The finger request and the few words this gateway says itself (RFC 1288; Zuul's texts).
//!
//! A request is one line: a build's UUID, ended by LF or CRLF. Everything here is pure but
//! [`read_query`], which takes any byte stream, so that each split of the input can be tested.

use std::fmt;

use tokio::io::{AsyncRead, AsyncReadExt};

use crate::model::build_id::BuildId;
use crate::model::excerpt::Excerpt;

/// The longest request accepted, its newline included, in bytes.
///
/// Zuul's own limit: a buffer of 1024 bytes is already too much (`zuul/lib/streamer_utils.py`).
pub(crate) const QUERY_MAX: usize = 1023;

/// Why a peer's bytes are no request for a build.
#[derive(Debug)]
pub(crate) enum QueryError {
    /// The peer closed before it had sent a whole line: a health checker, a port scan.
    Closed,
    /// No newline within [`QUERY_MAX`] bytes.
    TooLong,
    /// A whole line, but no build id.
    NotABuild(Excerpt),
    /// The connection failed.
    Io(std::io::Error),
}

/// Reads one request from `stream`, at most [`QUERY_MAX`] bytes of it.
///
/// What the peer sent behind the newline in the same breath is dropped, as upstream does. The
/// caller sets the deadline.
pub(crate) async fn read_query(
    stream: &mut (impl AsyncRead + Unpin),
) -> Result<BuildId, QueryError> {
    let mut line = vec![0; QUERY_MAX];
    let mut filled = 0;
    loop {
        match stream.read(&mut line[filled..]).await {
            Ok(0) => return Err(QueryError::Closed),
            Ok(count) => {
                let fresh = &line[filled..filled + count];
                if let Some(newline) = fresh.iter().position(|byte| *byte == b'\n') {
                    return parse(&line[..filled + newline]);
                }
                filled += count;
            }
            Err(error) => return Err(QueryError::Io(error)),
        }
        if filled == QUERY_MAX {
            return Err(QueryError::TooLong);
        }
    }
}

/// Understands one request line without its LF.
///
/// `/W` in front (RFC 1288, section 2.5.4: "verbose") is accepted and changes nothing: a build has
/// one log. White space after the id is dropped, CR with it, as Zuul's gateway does; white space
/// before the id does not make a build there either.
fn parse(line: &[u8]) -> Result<BuildId, QueryError> {
    let build = || {
        let text = std::str::from_utf8(line).ok()?.trim_end_matches(is_python_space);
        let text = match text.strip_prefix("/W ").or_else(|| text.strip_prefix("/w ")) {
            Some(rest) => rest.trim_ascii_start(),
            None => text,
        };
        BuildId::new(text)
    };
    build().ok_or_else(|| QueryError::NotABuild(Excerpt::new(line)))
}

/// What Python's `str.isspace` calls white space: Unicode's `White_Space` and the four separators
/// of ASCII.
fn is_python_space(character: char) -> bool {
    character.is_whitespace() || matches!(character, '\u{1c}'..='\u{1f}')
}

/// What a client is told instead of a log: one line, ended by CRLF (RFC 1288, section 2.2).
///
/// The first words are upstream's, because people and programs know them; behind the last one
/// comes the class of the fault, never an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    /// No queue knows the build, or the request was no build id.
    NotFound,
    /// The build is queued, no executor has taken it.
    NotStarted,
    /// The listener's rules do not allow it: in the client's eyes the same as not found.
    Denied,
    /// Everything else.
    Error(Fault),
}

/// The classes of fault a client is told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    TooLong,
    NoRequest,
    TooManyConnections,
    TooManyFromAddress,
    TooManyLookups,
    RegistryAway,
    UnreadableEntry,
    ExecutorUnreachable,
    ZoneUnreachable,
    ExecutorSilent,
    /// Another gateway of this kind wanted one of another zone, by TLS.
    OtherZone,
}

impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFound | Self::Denied => f.write_str("Build not found\r\n"),
            Self::NotStarted => f.write_str("Build did not start yet\r\n"),
            Self::Error(fault) => write!(f, "Internal streaming error: {fault}\r\n"),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TooLong => "the request is too long",
            Self::NoRequest => "no request within the time allowed",
            Self::TooManyConnections => "too many connections",
            Self::TooManyFromAddress => "too many connections from this address",
            Self::TooManyLookups => "too many requests at this moment",
            Self::RegistryAway => "ZooKeeper cannot be reached",
            Self::UnreadableEntry => "the build's entry cannot be read",
            Self::ExecutorUnreachable => "the executor cannot be reached",
            Self::ZoneUnreachable => "the zone's gateways cannot be reached",
            Self::ExecutorSilent => "the executor does not answer",
            Self::OtherZone => "this gateway serves another zone",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A stream that hands out the given pieces one read at a time, then ends.
    struct Pieces(std::collections::VecDeque<Vec<u8>>);

    impl AsyncRead for Pieces {
        fn poll_read(
            mut self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
            buffer: &mut tokio::io::ReadBuf<'_>,
        ) -> std::task::Poll<std::io::Result<()>> {
            if let Some(mut piece) = self.0.pop_front() {
                let rest = piece.split_off(piece.len().min(buffer.remaining()));
                buffer.put_slice(&piece);
                if !rest.is_empty() {
                    self.0.push_front(rest);
                }
            }
            std::task::Poll::Ready(Ok(()))
        }
    }

    fn query(pieces: &[&[u8]]) -> Result<BuildId, QueryError> {
        let mut stream = Pieces(
            pieces.iter().filter(|piece| !piece.is_empty()).map(|piece| piece.to_vec()).collect(),
        );
        tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap()
            .block_on(read_query(&mut stream))
    }

    fn build(id: &str) -> String {
        query(&[id.as_bytes()]).map(|build| build.to_string()).unwrap_or_else(|e| format!("{e:?}"))
    }

    #[test]
    fn forms_of_a_request() {
        let id = "e5d1b1a6e2b84a0f8a0f5b9b5ad3a6c1";
        for form in ["ID\n", "ID\r\n", "ID  \r\n", "ID\nmore\n", "/W ID\r\n", "/w  ID\n", "ID\t\n"]
        {
            assert_eq!(build(&form.replace("ID", id)), id, "{form:?}");
        }
        for space in
            ['\u{a0}', '\u{b}', '\u{c}', '\u{1c}', '\u{1f}', '\u{85}', '\u{2007}', '\u{3000}']
        {
            assert_eq!(build(&format!("{id}{space} \r\n")), id, "{space:?}");
        }
        assert_eq!(build("ABCdef0\n"), "ABCdef0", "case is kept");
    }

    #[test]
    fn no_builds() {
        let forms = [
            "\n",
            "\r\n",
            " \n",
            " abc\n",
            "\u{a0}abc\n",
            "abc\u{200b}\n",
            "abc\u{feff}\n",
            "abc@host\n",
            "a/b\n",
            "..\n",
            "ab-cd\n",
            "xyz\n",
            "/W\n",
            "/Wabc\n",
            "a\0b\n",
            "a b\n",
            "\u{e9}\n",
            "/W /W abc\n",
        ];
        for form in forms {
            assert!(
                matches!(query(&[form.as_bytes()]), Err(QueryError::NotABuild(_))),
                "{form:?}: {}",
                build(form)
            );
        }
        assert!(matches!(query(&[b"\xff\xfe\n"]), Err(QueryError::NotABuild(_))));
    }

    #[test]
    fn ends_and_limits() {
        assert!(matches!(query(&[]), Err(QueryError::Closed)));
        assert!(matches!(query(&[b"abc"]), Err(QueryError::Closed)));
        let padded = |length: usize| [vec![b'a'], vec![b' '; length - 2], vec![b'\n']].concat();
        assert_eq!(query(&[&padded(QUERY_MAX)]).unwrap().as_str(), "a");
        assert!(matches!(query(&[&padded(QUERY_MAX + 1)]), Err(QueryError::TooLong)));
        let digits = |count: usize| [vec![b'a'; count], vec![b'\n']].concat();
        assert!(query(&[&digits(BuildId::MAX)]).is_ok());
        assert!(matches!(query(&[&digits(BuildId::MAX + 1)]), Err(QueryError::NotABuild(_))));
        let longer = [vec![b'a'; QUERY_MAX], vec![b'\n']].concat();
        assert!(matches!(query(&[&longer]), Err(QueryError::TooLong)));
    }

    #[test]
    fn replies_are_upstreams_words_ended_by_crlf() {
        assert_eq!(Reply::NotFound.to_string(), "Build not found\r\n");
        assert_eq!(Reply::NotStarted.to_string(), "Build did not start yet\r\n");
        assert_eq!(Reply::Denied.to_string(), Reply::NotFound.to_string());
        assert_eq!(
            Reply::Error(Fault::ExecutorUnreachable).to_string(),
            "Internal streaming error: the executor cannot be reached\r\n"
        );
    }

    proptest! {
        /// However a request arrives in pieces, it is understood the same.
        #[test]
        fn every_split_is_the_same_request(
            line in prop_oneof![
                "[0-9a-fA-F]{1,40}\r?\n(tail)?",
                "(/W )?[0-9a-f]{32}\r\n",
                "[ -~]{0,40}\n?",
            ],
            cuts in prop::collection::vec(0usize..80, 0..6),
        ) {
            let bytes = line.as_bytes();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|w| &bytes[w[0]..w[1]]).collect();
            prop_assert_eq!(format!("{:?}", query(&pieces)), format!("{:?}", query(&[bytes])));
        }

        /// Any bytes at all are refused or give hexadecimal digits; nothing panics.
        #[test]
        fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..1200)) {
            if let Ok(build) = query(&[&bytes]) {
                prop_assert!(build.as_str().bytes().all(|byte| byte.is_ascii_hexdigit()));
            }
        }
    }

    #[test]
    fn every_split_of_one_request() {
        let line = b"/W e5d1b1a6e2b84a0f8a0f5b9b5ad3a6c1\r\n";
        for cut in 0..=line.len() {
            assert!(query(&[&line[..cut], &line[cut..]]).is_ok(), "cut at {cut}");
        }
    }
}
