//! Headers of the PROXY protocol, version 2.

use std::net::IpAddr;

/// Returns a version 2 header for a client at `ip`, port 12345, followed by the bytes `more`.
pub(crate) fn v2(ip: IpAddr, more: &[u8]) -> Vec<u8> {
    let (family, mut rest) = match ip {
        IpAddr::V4(ip) => (0x11, [ip.octets(), ip.octets()].concat()),
        IpAddr::V6(ip) => (0x21, [ip.octets(), ip.octets()].concat()),
    };
    rest.extend([0x30, 0x39, 0, 79]);
    rest.extend(more);
    raw_v2(0x21, family, &rest)
}

/// Returns a version 2 header with any command, family and content.
pub(crate) fn raw_v2(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
    let length = u16::try_from(rest.len()).expect("not that long").to_be_bytes();
    [b"\r\n\r\n\0\r\nQUIT\n".as_slice(), &[command, family], &length, rest].concat()
}
