//! Parses and writes the request line.
//!
//! Everything here is pure except [`read_request`], which takes any byte stream, so that each split
//! of the input can be tested.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::reply::ErrorReason;
use crate::model::build_id::BuildId;
use crate::model::excerpt::Excerpt;

/// The longest request that is accepted, its newline included, in bytes.
///
/// Zuul's own limit: a buffer of 1024 bytes is already too much (`zuul/lib/streamer_utils.py`).
pub(crate) const REQUEST_MAX: usize = 1023;

/// How many gateways may have sent a request.
///
/// One is needed: the gateway that a client asks knows the executor's zone, and a gateway of that
/// zone asks the executor. A second allows for two gateways that have read ZooKeeper at different
/// times. Each further one could multiply the requests by the number of gateways in a zone.
pub(crate) const MAX_HOPS: u8 = 2;

/// The bytes of a parameter's value that are not percent-encoded, besides letters and digits
/// (RFC 3986, section 2.3).
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// What a request line may consist of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RequestFormat {
    /// A build ID.
    Finger,
    /// A build ID and parameters, on connections that have negotiated the peer protocol.
    Peer,
}

impl RequestFormat {
    /// The format on a connection, by whether it has negotiated the peer protocol.
    pub(crate) fn negotiated(is_peer_gateway: bool) -> Self {
        if is_peer_gateway { Self::Peer } else { Self::Finger }
    }
}

/// A request for the log of a build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) build: BuildId,
    /// The zone whose gateway the asking gateway wants.
    pub(crate) zone: Option<String>,
    /// How many gateways have sent this request (`hops` on the wire); 0 if a client sent it.
    pub(crate) forwarded: u8,
}

/// Why no request was read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RequestError {
    /// Health checks and port scans do this.
    #[error("closed without a request")]
    Closed,
    /// No newline within [`REQUEST_MAX`] bytes.
    #[error("too long")]
    TooLong,
    /// A whole line without a build ID, or with a malformed parameter.
    #[error("not a build ID: {0}")]
    Malformed(Excerpt),
    #[error("{}", crate::tls::describe(.0))]
    Io(std::io::Error),
}

impl Request {
    fn new(build: BuildId) -> Self {
        Self { build, zone: None, forwarded: 0 }
    }

    /// Checks the parameters against the zone of this gateway.
    ///
    /// The zone is only checked if the asking gateway has shown a certificate (`authenticated`), so
    /// that others cannot find out the zone of this gateway.
    pub(crate) fn check(
        &self,
        own_zone: Option<&str>,
        authenticated: bool,
    ) -> Result<(), ErrorReason> {
        if authenticated && self.zone.is_some() && self.zone.as_deref() != own_zone {
            return Err(ErrorReason::WrongZone);
        }
        if self.forwarded > MAX_HOPS {
            return Err(ErrorReason::Loop);
        }
        Ok(())
    }

    /// Returns the line that sends this request.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn to_line(&self, format: RequestFormat) -> String {
        request_line(&self.build, self.zone.as_deref(), self.forwarded, format)
    }
}

/// Returns the line that requests `build` from a gateway of `zone`, after `forwarded` gateways
/// including this one have sent the request.
pub(crate) fn request_line(
    build: &BuildId,
    zone: Option<&str>,
    forwarded: u8,
    format: RequestFormat,
) -> String {
    if format == RequestFormat::Finger {
        return format!("{build}\n");
    }
    if let Some(zone) = zone {
        let zone = utf8_percent_encode(zone, ENCODED);
        let line = format!("{build} zone={zone} hops={forwarded}\r\n");
        if line.len() <= REQUEST_MAX {
            return line;
        }
    }
    format!("{build} hops={forwarded}\r\n")
}

/// Reads one request from `stream`, at most [`REQUEST_MAX`] bytes of it.
///
/// What follows the newline in the same read is dropped, as Zuul's gateway does. The caller sets
/// the deadline.
pub(crate) async fn read_request(
    stream: &mut (impl AsyncRead + Unpin),
    format: RequestFormat,
) -> Result<Request, RequestError> {
    let mut line = vec![0; REQUEST_MAX];
    let mut filled = 0;
    loop {
        let count = stream.read(&mut line[filled..]).await.map_err(RequestError::Io)?;
        if count == 0 {
            return Err(RequestError::Closed);
        }
        let fresh = &line[filled..filled + count];
        if let Some(newline) = fresh.iter().position(|byte| *byte == b'\n') {
            let line = &line[..filled + newline];
            let request = parse(line, format);
            return request.ok_or_else(|| RequestError::Malformed(Excerpt::new(line)));
        }
        filled += count;
        if filled == REQUEST_MAX {
            return Err(RequestError::TooLong);
        }
    }
}

/// Parses a request line without its LF.
///
/// `/W` in front (RFC 1288, section 2.5.4: "verbose") is accepted and ignored: a build has one log.
/// White space at the end, CR included, is dropped, as Zuul's gateway does; white space before the
/// build ID is malformed there, too.
fn parse(line: &[u8], format: RequestFormat) -> Option<Request> {
    let text = std::str::from_utf8(line).ok()?.trim_end_matches(is_python_space);
    let text = match text.strip_prefix("/W ").or_else(|| text.strip_prefix("/w ")) {
        Some(rest) => rest.trim_ascii_start(),
        None => text,
    };
    match format {
        RequestFormat::Finger => Some(Request::new(BuildId::new(text)?)),
        RequestFormat::Peer => {
            let (build, parameters) = text.split_once(' ').unwrap_or((text, ""));
            let mut request = Request::new(BuildId::new(build)?);
            read_parameters(parameters, &mut request)?;
            Some(request)
        }
    }
}

fn read_parameters(parameters: &str, request: &mut Request) -> Option<()> {
    let mut forwarded = None;
    for parameter in parameters.split(' ') {
        let (key, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        match key {
            "zone" => {
                let zone = percent_decode_str(value).decode_utf8().ok()?;
                if request.zone.replace(zone.into_owned()).is_some() {
                    return None;
                }
            }
            "hops" if forwarded.is_some() => return None,
            "hops" => forwarded = Some(value.parse().ok()?),
            _ => {}
        }
    }
    request.forwarded = forwarded.unwrap_or_default();
    Some(())
}

/// Returns whether Python's `str.isspace` is true: Unicode's `White_Space` and the four separators
/// of ASCII.
fn is_python_space(character: char) -> bool {
    character.is_whitespace() || matches!(character, '\u{1c}'..='\u{1f}')
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

    fn read(pieces: &[&[u8]], format: RequestFormat) -> Result<Request, RequestError> {
        let mut stream = Pieces(
            pieces.iter().filter(|piece| !piece.is_empty()).map(|piece| piece.to_vec()).collect(),
        );
        tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap()
            .block_on(read_request(&mut stream, format))
    }

    fn query(pieces: &[&[u8]]) -> Result<BuildId, RequestError> {
        read(pieces, RequestFormat::Finger).map(|request| request.build)
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
                matches!(query(&[form.as_bytes()]), Err(RequestError::Malformed(_))),
                "{form:?}: {}",
                build(form)
            );
        }
        assert!(matches!(query(&[b"\xff\xfe\n"]), Err(RequestError::Malformed(_))));
    }

    #[test]
    fn ends_and_limits() {
        assert!(matches!(query(&[]), Err(RequestError::Closed)));
        assert!(matches!(query(&[b"abc"]), Err(RequestError::Closed)));
        let padded = |length: usize| [vec![b'a'], vec![b' '; length - 2], vec![b'\n']].concat();
        assert_eq!(query(&[&padded(REQUEST_MAX)]).unwrap().as_str(), "a");
        assert!(matches!(query(&[&padded(REQUEST_MAX + 1)]), Err(RequestError::TooLong)));
        let digits = |count: usize| [vec![b'a'; count], vec![b'\n']].concat();
        assert!(query(&[&digits(BuildId::MAX)]).is_ok());
        assert!(matches!(query(&[&digits(BuildId::MAX + 1)]), Err(RequestError::Malformed(_))));
        let longer = [vec![b'a'; REQUEST_MAX], vec![b'\n']].concat();
        assert!(matches!(query(&[&longer]), Err(RequestError::TooLong)));
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
