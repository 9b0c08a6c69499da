//! The PROXY protocol, versions 1 and 2: a header before everything else, in which a proxy gives
//! the address of the client that it has connected for (haproxy's `doc/proxy-protocol.txt`).
//!
//! The `ppp` crate parses a whole header. The end of a header is found here, because no byte after
//! it may be read: TLS or the request follows.

use std::io;
use std::net::SocketAddr;

use ppp::{v1, v2};
use thiserror::Error;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

/// The longest header of version 1, its CRLF included, in bytes (section 2.1).
const V1_MAX: usize = 107;

/// The length of the fixed part of a version 2 header, which has the length of the rest, in bytes.
const V2_FIXED: usize = 16;

/// The longest header that is accepted, in bytes: one of version 2. The mandatory parts fit into
/// 536 (section 2.2); the rest is for what proxies add about TLS sessions, such as the client's
/// certificate (haproxy's `proxy-v2-options ssl-cert`).
pub(crate) const HEADER_MAX: usize = 16 * 1024;

/// The most that is read of a header at a time, in bytes.
const PIECE: usize = 1024;

/// The beginning of a version 1 header.
const V1_PREFIX: &[u8] = b"PROXY ";

/// Why no PROXY header was read.
#[derive(Debug, Error)]
pub(crate) enum ProxyHeaderError {
    /// The peer left before it had sent anything: a health check of a proxy.
    #[error("closed before sending data")]
    Closed,
    /// The bytes are not a header, or the header is incomplete.
    #[error("{0}")]
    Malformed(&'static str),
    /// The connection failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Reads the header that `stream` begins with, and not one byte more. Returns the client's address,
/// or `None` if the proxy connects for itself (`LOCAL`) or does not give the address of a TCP
/// client (`UNKNOWN`). The caller sets the deadline.
///
/// # Errors
/// See [`ProxyHeaderError`].
pub(crate) async fn read_header(
    stream: &mut TcpStream,
) -> Result<Option<SocketAddr>, ProxyHeaderError> {
    let mut header = HeaderParser::default();
    let mut waiting = [0; PIECE];
    loop {
        // Bytes after the header must stay in the socket.
        let count = stream.peek(&mut waiting).await?;
        if count == 0 {
            let cut = ProxyHeaderError::Malformed("the PROXY header is incomplete");
            return Err(if header.0.is_empty() { ProxyHeaderError::Closed } else { cut });
        }
        let Consumed { count, whole } =
            header.take(&waiting[..count]).map_err(ProxyHeaderError::Malformed)?;
        stream.read_exact(&mut waiting[..count]).await?;
        if whole {
            return header.client().map_err(ProxyHeaderError::Malformed);
        }
    }
}

/// The part of a header that has been read.
#[derive(Default)]
pub(crate) struct HeaderParser(Vec<u8>);

/// How many of the received bytes belong to the header.
pub(crate) struct Consumed {
    pub(crate) count: usize,
    /// Whether the header ends with them.
    pub(crate) whole: bool,
}

impl HeaderParser {
    /// Consumes those of the next bytes that belong to the header: all of them, or those up to its
    /// end.
    ///
    /// # Errors
    /// The bytes are not a header, or it is too long.
    pub(crate) fn take(&mut self, waiting: &[u8]) -> Result<Consumed, &'static str> {
        let before = self.0.len();
        self.0.extend_from_slice(waiting);
        let end = self.end()?;
        self.0.truncate(end.unwrap_or(self.0.len()));
        Ok(Consumed { count: self.0.len() - before, whole: end.is_some() })
    }

    /// The length of the header, if all of it has been read.
    fn end(&self) -> Result<Option<usize>, &'static str> {
        let bytes = self.0.as_slice();
        let begins = |prefix: &[u8]| bytes.iter().zip(prefix).all(|(byte, wanted)| byte == wanted);
        let end = if begins(v2::PROTOCOL_PREFIX) {
            let Some(&[high, low]) = bytes.get(V2_FIXED - 2..V2_FIXED) else { return Ok(None) };
            let length = V2_FIXED + usize::from(u16::from_be_bytes([high, low]));
            if length > HEADER_MAX {
                return Err("the PROXY header is too long");
            }
            length
        } else if begins(V1_PREFIX) {
            match bytes.iter().take(V1_MAX).position(|byte| *byte == b'\n') {
                Some(newline) => newline + 1,
                None if bytes.len() >= V1_MAX => return Err("the PROXY header is too long"),
                None => return Ok(None),
            }
        } else {
            return Err("no PROXY header");
        };
        Ok((end <= bytes.len()).then_some(end))
    }

    /// The client's address in a whole header.
    ///
    /// # Errors
    /// The header is malformed.
    pub(crate) fn client(&self) -> Result<Option<SocketAddr>, &'static str> {
        let broken = "the PROXY header is malformed";
        let bytes = self.0.as_slice();
        if bytes.starts_with(V1_PREFIX) {
            let header = v1::Header::try_from(bytes).map_err(|_| broken)?;
            if header.header.len() != bytes.len() {
                return Err(broken);
            }
            return Ok(match header.addresses {
                v1::Addresses::Unknown => None,
                v1::Addresses::Tcp4(ip) => Some((ip.source_address, ip.source_port).into()),
                v1::Addresses::Tcp6(ip) => Some((ip.source_address, ip.source_port).into()),
            });
        }
        let header = v2::Header::try_from(bytes).map_err(|_| broken)?;
        Ok(match (header.command, header.protocol, header.addresses) {
            (v2::Command::Proxy, v2::Protocol::Stream, v2::Addresses::IPv4(ip)) => {
                Some((ip.source_address, ip.source_port).into())
            }
            (v2::Command::Proxy, v2::Protocol::Stream, v2::Addresses::IPv6(ip)) => {
                Some((ip.source_address, ip.source_port).into())
            }
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `bytes` come to, with how many of them were taken, in pieces of each size.
    fn read(bytes: &[u8]) -> Result<(Option<String>, usize), &'static str> {
        let mut results = (1..=bytes.len().max(1)).map(|size| {
            let (mut header, mut taken) = (HeaderParser::default(), 0);
            for piece in bytes.chunks(size) {
                let Consumed { count, whole } = header.take(piece)?;
                taken += count;
                if whole {
                    let client = header.client()?;
                    return Ok((client.map(|client| client.to_string()), taken));
                }
            }
            Err("unfinished")
        });
        let first = results.next().expect("one size at least");
        for (index, other) in results.enumerate() {
            assert_eq!(first, other, "pieces of {}", index + 2);
        }
        first
    }

    fn v2_header(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
        let length = u16::try_from(rest.len()).unwrap().to_be_bytes();
        [v2::PROTOCOL_PREFIX, &[0x20 | command, family], &length, rest].concat()
    }

    const IPV4: [u8; 12] = [192, 0, 2, 7, 198, 51, 100, 1, 0x30, 0x39, 0, 79];

    #[test]
    fn version_1() {
        let line = b"PROXY TCP4 192.0.2.7 198.51.100.1 12345 79\r\n";
        let client = Some("192.0.2.7:12345".to_owned());
        assert_eq!(read(line), Ok((client.clone(), line.len())));
        assert_eq!(read(&[line.as_slice(), b"abc\r\n"].concat()), Ok((client, line.len())));
        let line = b"PROXY TCP6 2001:db8::7 2001:db8::1 12345 79\r\n";
        assert_eq!(read(line), Ok((Some("[2001:db8::7]:12345".to_owned()), line.len())));
        let longest = format!("PROXY UNKNOWN {}\r\n", "x".repeat(V1_MAX - 16));
        for line in ["PROXY UNKNOWN\r\n", "PROXY UNKNOWN a b c\r\n", &longest] {
            assert_eq!(read(line.as_bytes()), Ok((None, line.len())), "{line:?}");
        }
    }

    #[test]
    fn version_2() {
        let header = v2_header(1, 0x11, &IPV4);
        let client = Some("192.0.2.7:12345".to_owned());
        assert_eq!(read(&header), Ok((client.clone(), header.len())));
        let followed = [header.as_slice(), b"\x16\x03\x01"].concat();
        assert_eq!(read(&followed), Ok((client.clone(), header.len())));
        let more = v2_header(1, 0x11, &[IPV4.as_slice(), &[4, 0, 1, 42]].concat());
        assert_eq!(read(&more), Ok((client, more.len())), "with a TLV");
        let mut addresses = [0; 36];
        addresses[..2].copy_from_slice(&[0x20, 0x01]);
        addresses[32..].copy_from_slice(&[0x30, 0x39, 0, 79]);
        let header = v2_header(1, 0x21, &addresses);
        assert_eq!(read(&header), Ok((Some("[2001::]:12345".to_owned()), header.len())));
        for (command, family, rest) in [
            (0, 0x00, &[][..]),
            (0, 0x11, &IPV4),
            (1, 0x00, &[1, 2, 3]),
            (1, 0x31, &[0; 216]),
            (1, 0x12, &IPV4),
            (0, 0x00, &[0; HEADER_MAX - V2_FIXED]),
        ] {
            let header = v2_header(command, family, rest);
            assert_eq!(read(&header), Ok((None, header.len())), "{command} {family}");
        }
    }

    #[test]
    fn broken_ones() {
        for bytes in [
            "GET / HTTP/1.1\r\n",
            "abcdef\r\n",
            "PROXX",
            "\r\n\r\n\0\r\nQUIX",
            "proxy TCP4 1.2.3.4 1.2.3.4 1 1\r\n",
        ] {
            assert_eq!(read(bytes.as_bytes()), Err("no PROXY header"), "{bytes:?}");
        }
        for line in [
            "PROXY TCP4 192.0.2.7 198.51.100.1 12345 79\n",
            "PROXY TCP4 192.0.2.7 198.51.100.1 12345 \r\n",
            "PROXY TCP4 192.0.2.7 198.51.100.1 12345 65536\r\n",
            "PROXY TCP4 192.0.2.777 198.51.100.1 12345 79\r\n",
            "PROXY TCP4 2001:db8::7 2001:db8::1 12345 79\r\n",
            "PROXY TCP6 192.0.2.7 198.51.100.1 12345 79\r\n",
            "PROXY UDP4 192.0.2.7 198.51.100.1 12345 79\r\n",
            "PROXY \r\n",
            "PROXY UNKNOWN\rx\n",
            "PROXY UNKNOWN\n",
            "PROXY TCP4 192.0.2.7 198.51.100.1 1 2\r\r\n",
        ] {
            assert_eq!(read(line.as_bytes()), Err("the PROXY header is malformed"), "{line:?}");
        }
        for header in [
            v2_header(2, 0x11, &IPV4),
            v2_header(1, 0x41, &IPV4),
            v2_header(1, 0x13, &IPV4),
            v2_header(1, 0x11, &IPV4[..11]),
            [v2::PROTOCOL_PREFIX, &[0x11, 0x11, 0, 0]].concat(),
        ] {
            assert_eq!(read(&header), Err("the PROXY header is malformed"), "{header:?}");
        }
        let long = format!("PROXY UNKNOWN {}", "x".repeat(V1_MAX));
        assert_eq!(read(long.as_bytes()), Err("the PROXY header is too long"));
        let long = v2_header(0, 0, &[0; HEADER_MAX - V2_FIXED + 1]);
        assert_eq!(read(&long), Err("the PROXY header is too long"));
        for bytes in ["", "P", "PROXY TCP4 192.0.2.7 198.51.100.1 12345 79\r", "\r\n\r\n\0"] {
            assert_eq!(read(bytes.as_bytes()), Err("unfinished"), "{bytes:?}");
        }
    }
}
