//! Waits for a TLS client's first message, the ClientHello, and leaves it in the socket.
//!
//! The handshake starts only when all of it has arrived, so a client that sends it byte by byte, or
//! not at all, uses neither a handshake permit nor memory of this process.

use std::io;

use rustix::net::{RecvFlags, recv};
use tokio::io::Interest;
use tokio::net::TcpStream;

/// The longest ClientHello that is accepted, in bytes. With post-quantum key shares and a session
/// ticket it has about 2 KiB.
const HELLO_MAX: usize = 16 * 1024;

/// The header of a record: type, version, length (RFC 8446, section 5.1).
const RECORD_HEADER: usize = 5;

/// The header of a handshake message: type, length (RFC 8446, section 4).
const MESSAGE_HEADER: usize = 4;

/// The types of records (RFC 8446, appendix B.1; 24 is RFC 6520's).
const RECORD_OF_HANDSHAKE: u8 = 22;
const OTHER_RECORDS_MIN: u8 = 20;
const OTHER_RECORDS_MAX: u8 = 24;

/// What a TLS client has sent before the handshake starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arrival {
    /// The complete first record, or data that the TLS library refuses immediately.
    Complete,
    /// A ClientHello longer than [`HELLO_MAX`], or a record that may hide its length; the reason.
    Invalid(&'static str),
    /// The client closed the connection before the first byte.
    Closed,
}

/// Waits for the first record on `stream`. The caller sets the deadline.
///
/// # Errors
/// The connection failed.
pub(crate) async fn arrival(stream: &TcpStream) -> io::Result<Arrival> {
    loop {
        let ready = stream.ready(Interest::READABLE).await?;
        match stream.try_io(Interest::READABLE, || peek(stream)) {
            // No more data will arrive: the TLS library reports the end.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && ready.is_read_closed() => {
                return Ok(Arrival::Complete);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            arrival => return arrival,
        }
    }
}

/// Checks what `stream` has received, without reading it. Fails with `WouldBlock` while that is not
/// enough, so that tokio waits for the next segment.
fn peek(stream: &TcpStream) -> io::Result<Arrival> {
    let mut head = [0; RECORD_HEADER + MESSAGE_HEADER];
    let (_, count) = recv(stream, &mut head, RecvFlags::PEEK)?;
    if count == 0 {
        return Ok(Arrival::Closed);
    }
    let received = usize::try_from(rustix::io::ioctl_fionread(stream)?).unwrap_or(usize::MAX);
    classify(&head[..count], received).ok_or_else(|| io::ErrorKind::WouldBlock.into())
}

/// Classifies `received` bytes that begin with `head`. Returns `None` while more must arrive.
fn classify(head: &[u8], received: usize) -> Option<Arrival> {
    let (header, message) = head.split_at_checked(RECORD_HEADER)?;
    match header[0] {
        RECORD_OF_HANDSHAKE => {}
        // For such a record the TLS library would wait until it is complete; after an alert it
        // would wait for the next record.
        OTHER_RECORDS_MIN..=OTHER_RECORDS_MAX => {
            return Some(Arrival::Invalid("the first record is not a handshake record"));
        }
        _ => return Some(Arrival::Complete),
    }
    let record = usize::from(u16::from_be_bytes([header[3], header[4]]));
    // The TLS library refuses an empty record immediately. In a record shorter than the message
    // header the length of the message is unknown: `message` would end with the next record's
    // header.
    if (1..MESSAGE_HEADER).contains(&record) {
        return Some(Arrival::Invalid("the first record is too short"));
    }
    // The TLS library collects a message of any type before it checks the type.
    let message = match *message {
        [_, high, middle, low] => {
            MESSAGE_HEADER + u32::from_be_bytes([0, high, middle, low]) as usize
        }
        _ => 0,
    };
    match record.max(message) > HELLO_MAX {
        true => Some(Arrival::Invalid("the ClientHello is too long")),
        false => (received >= RECORD_HEADER + record).then_some(Arrival::Complete),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    /// A ClientHello of `length` bytes, in records of at most `record`.
    fn hello(length: usize, record: usize) -> Vec<u8> {
        let [_, _, _, _, _, high, middle, low] = (length as u64).to_be_bytes();
        let message = [&[1, high, middle, low], vec![0; length].as_slice()].concat();
        let mut bytes = Vec::new();
        for piece in message.chunks(record) {
            let [high, low] = u16::try_from(piece.len()).unwrap().to_be_bytes();
            bytes.extend([RECORD_OF_HANDSHAKE, 3, 1, high, low]);
            bytes.extend(piece);
        }
        bytes
    }

    #[test]
    fn first_record_must_be_complete() {
        let short = hello(200, 16_384);
        let head = |count: usize| &short[..count.min(9)];
        for count in 0..short.len() {
            assert_eq!(classify(head(count), count), None, "{count} bytes");
        }
        assert_eq!(classify(head(short.len()), short.len()), Some(Arrival::Complete));
        let split = hello(200, 100);
        assert_eq!(classify(&split[..9], 105), Some(Arrival::Complete), "of two records one");
    }

    fn is_invalid(bytes: &[u8]) -> bool {
        matches!(classify(&bytes[..9], 9), Some(Arrival::Invalid(_)))
    }

    #[test]
    fn what_is_too_long_is_known_from_its_head() {
        for (length, record, invalid) in [
            (HELLO_MAX - MESSAGE_HEADER, 16_384, false),
            (HELLO_MAX - MESSAGE_HEADER + 1, 16_384, true),
            (65_536, 16_384, true),
            (65_536, 512, true),
            (20_000, 65_535, true),
            (65_000, 4, true),
            (200, 4, false),
        ] {
            let mut bytes = hello(length, record);
            assert_eq!(is_invalid(&bytes), invalid, "{length} in {record}");
            bytes[RECORD_HEADER] = 2;
            assert_eq!(is_invalid(&bytes), invalid, "a ServerHello of {length} in {record}");
        }
    }

    /// A first record in which the length of the message is not whole, so that the next record's
    /// header would be taken for it.
    #[test]
    fn first_record_shorter_than_a_messages_header_is_invalid() {
        for record in 1..MESSAGE_HEADER {
            assert!(is_invalid(&hello(65_000, record)), "{record}");
        }
    }

    #[test]
    fn first_record_of_another_type_is_invalid() {
        let warning = [21, 3, 1, 0, 2, 1, 90];
        let followed = [&warning[..], &hello(65_000, 16_384)].concat();
        assert!(is_invalid(&followed));
        for kind in [20, 21, 23, 24] {
            assert!(is_invalid(&[kind, 3, 3, 0x40, 0, 0, 0, 0, 0]), "{kind}");
        }
    }

    #[test]
    fn what_is_no_handshake_is_left_to_the_tls_library() {
        for text in ["GET / HTTP/1.1\r\n", "e5d1b1a6\r\n", "\x16\x03\x01\0\0"] {
            let head = &text.as_bytes()[..text.len().min(9)];
            assert_eq!(classify(head, text.len()), Some(Arrival::Complete), "{text:?}");
        }
        assert_eq!(classify(b"GET ", 4), None);
    }

    #[tokio::test]
    async fn bytes_one_by_one_and_ends() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let connect = async || {
            let client = TcpStream::connect(address).await.unwrap();
            client.set_nodelay(true).unwrap();
            (client, listener.accept().await.unwrap().0)
        };
        let bytes = hello(40, 16_384);
        let (mut client, server) = connect().await;
        let sending = async {
            for byte in &bytes[..bytes.len() - 1] {
                client.write_all(&[*byte]).await.unwrap();
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            biased;
            _ = arrival(&server) => panic!("a byte is missing"),
            () = sending => {}
        }
        client.write_all(&bytes[bytes.len() - 1..]).await.unwrap();
        assert_eq!(arrival(&server).await.unwrap(), Arrival::Complete);

        let (client, server) = connect().await;
        drop(client);
        assert_eq!(arrival(&server).await.unwrap(), Arrival::Closed);
        let (mut client, server) = connect().await;
        client.write_all(&bytes[..20]).await.unwrap();
        drop(client);
        assert_eq!(arrival(&server).await.unwrap(), Arrival::Complete, "half of it, then the end");
    }
}
