//! The addresses that this gateway listens on and is registered with, to detect connections that
//! lead back to it.
//!
//! A registry entry may have this gateway's own address for an executor or for a gateway of another
//! zone. A request that is sent there arrives here and is sent there again, until it uses all
//! connections that the limit permits.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;

use tokio::net::TcpStream;

/// Addresses that no host has (RFC 5737, RFC 3849).
const DOCUMENTATION: [&str; 2] = ["192.0.2.1", "2001:db8::1"];

/// The addresses of this gateway. Cheap to clone.
#[derive(Clone)]
pub(crate) struct OwnAddresses {
    listeners: Arc<[SocketAddr]>,
    /// Host name and port in the registry.
    registered: Option<(Arc<str>, u16)>,
}

impl OwnAddresses {
    pub(crate) fn new(
        listeners: impl IntoIterator<Item = SocketAddr>,
        registered: Option<(&str, u16)>,
    ) -> Self {
        let registered = registered.map(|(host, port)| (host.into(), port));
        Self { listeners: listeners.into_iter().collect(), registered }
    }

    /// Returns whether this gateway is registered with `host` and `port`.
    pub(crate) fn is_registered_as(&self, host: &str, port: u16) -> bool {
        self.registered.as_ref().is_some_and(|own| *own.0 == *host && own.1 == port)
    }

    /// Returns whether `stream`, which was connected to `port`, leads to one of the listeners.
    pub(crate) fn are_dialed_by(&self, stream: &TcpStream, port: u16) -> bool {
        if self.listeners.iter().all(|listener| listener.port() != port) {
            return false;
        }
        let (Ok(local), Ok(peer)) = (stream.local_addr(), stream.peer_addr()) else { return false };
        let [local, peer] = [local, peer].map(|address| address.ip().to_canonical());
        self.accept(peer, port) && (peer == local || is_own(peer))
    }

    /// Returns whether one of the listeners accepts connections to `ip`, an address of this host,
    /// and `port`.
    fn accept(&self, ip: IpAddr, port: u16) -> bool {
        self.listeners.iter().any(|listener| {
            listener.port() == port
                && match listener.ip() {
                    // Such a listener accepts IPv4, too.
                    IpAddr::V6(any) if any.is_unspecified() => true,
                    IpAddr::V4(any) if any.is_unspecified() => ip.is_ipv4(),
                    listener => listener.to_canonical() == ip,
                }
        })
    }
}

/// Returns whether `ip` is an address of this host: the kernel binds sockets to no other addresses.
/// With `net.ipv4.ip_nonlocal_bind` it binds to any address, and this returns false for all but
/// loopback.
fn is_own(ip: IpAddr) -> bool {
    let can_bind = |ip| UdpSocket::bind(SocketAddr::new(ip, 0)).is_ok();
    let binds_any = || {
        let any = DOCUMENTATION.iter().filter_map(|address| address.parse::<IpAddr>().ok());
        any.filter(|any| any.is_ipv4() == ip.is_ipv4()).any(can_bind)
    };
    ip.is_loopback() || can_bind(ip) && !binds_any()
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[test]
    fn listener_accepts_the_addresses_that_it_is_bound_to() {
        for (listener, dialed, accepts) in [
            ("[::]:79", "192.0.2.1", true),
            ("[::]:79", "2001:db8::1", true),
            ("0.0.0.0:79", "192.0.2.1", true),
            ("0.0.0.0:79", "2001:db8::1", false),
            ("192.0.2.1:79", "192.0.2.1", true),
            ("192.0.2.1:79", "192.0.2.2", false),
            ("0.0.0.0:7900", "192.0.2.1", false),
        ] {
            let own = OwnAddresses::new([listener.parse().expect("an address")], None);
            assert_eq!(
                own.accept(dialed.parse().expect("an IP address"), 79),
                accepts,
                "{listener}"
            );
        }
    }

    #[tokio::test]
    async fn connection_to_any_address_of_this_host_is_found() {
        let listener = TcpListener::bind("0.0.0.0:0").await.expect("a listener");
        let port = listener.local_addr().expect("its address").port();
        let own = OwnAddresses::new([listener.local_addr().expect("its address")], None);
        let other = OwnAddresses::new([SocketAddr::from(([127, 0, 0, 9], port))], None);
        for dialed in ["127.0.0.1", "127.0.0.2"] {
            let stream = TcpStream::connect((dialed, port)).await.expect("a connection");
            assert!(own.are_dialed_by(&stream, port), "{dialed}");
            assert!(!other.are_dialed_by(&stream, port), "{dialed}: bound to another address");
        }
    }

    #[test]
    fn addresses_of_other_hosts_are_not_ours() {
        for address in DOCUMENTATION {
            assert!(!is_own(address.parse().expect("an IP address")));
        }
    }
}
