//! Connects to hosts by name: caches addresses for a short time and tries several addresses
//! concurrently (RFC 8305, "Happy Eyeballs").

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use socket2::SockRef;
use tokio::net::{TcpSocket, lookup_host};
use tokio::sync::{OnceCell, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use crate::config::to_ascii;
use crate::gateway::transport::socket::Socket;

/// How long one address of a host is tried before the next one is tried concurrently (RFC 8305,
/// section 5: the connection attempt delay).
const STAGGER: Duration = Duration::from_millis(250);

/// How long a name's addresses are cached. getaddrinfo(3) returns no lifetime; this is short enough
/// for an executor that moves, and long enough for a burst of clients to cause one query.
const CACHE_TIME: Duration = Duration::from_secs(5);

/// The number of names in the cache. They come from Zuul's registry, so there are few; a further
/// one clears the cache.
const CACHE_MAX: usize = 1024;

/// Connects to hosts.
#[derive(Default)]
pub(crate) struct Dialer {
    cache: Mutex<HashMap<String, Arc<CachedAddresses>>>,
    /// Hosts that unit tests reach without a network.
    #[cfg(test)]
    in_memory: Mutex<HashMap<String, InMemoryHost>>,
}

/// Accepts or refuses a connection to a host in memory.
#[cfg(test)]
pub(super) type InMemoryHost = Box<dyn Fn() -> io::Result<Socket> + Send>;

/// The addresses of one name, once the query has been answered.
struct CachedAddresses {
    queried: Instant,
    addresses: OnceCell<Vec<SocketAddr>>,
}

impl Dialer {
    /// Connects to the first address of `host` that accepts, with a receive buffer of `buffer`
    /// bytes.
    ///
    /// Addresses are tried in the resolver's order, alternating between the families, each a
    /// quarter of a second after the previous one or as soon as that has failed, so that an address
    /// that drops packets does not block the others (RFC 8305, sections 4 and 5).
    ///
    /// # Errors
    /// The name has no address, or the attempt at the last address failed with this error.
    pub(crate) async fn connect(
        &self,
        host: &str,
        port: u16,
        buffer: usize,
        spare_sockets: &Arc<Semaphore>,
    ) -> io::Result<Socket> {
        #[cfg(test)]
        if let Some(host) = self.in_memory.lock().expect("no panic").get(host) {
            return host();
        }
        if let Ok(address) = host.parse::<IpAddr>() {
            return connect_to(SocketAddr::new(address, port), buffer).await;
        }
        let name = to_ascii(host).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidInput, "the name has no ASCII form (IDNA)")
        })?;
        let host = name.as_ref();
        let addresses = self.addresses(host, port).await?;
        let connected = race(interleaved(&addresses), buffer, spare_sockets).await;
        if connected.is_err() {
            // The host may have moved.
            self.lock().remove(host);
        }
        connected
    }

    /// Returns the addresses of `host` with `port`. A link-local address has the interface that the
    /// name specifies (`fe80::1%eth0`, RFC 4007, section 11). All requests within [`CACHE_TIME`]
    /// share one query.
    async fn addresses(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        let name = {
            let mut names = self.lock();
            match names.get(host) {
                Some(name) if name.queried.elapsed() < CACHE_TIME => Arc::clone(name),
                _ => {
                    if names.len() >= CACHE_MAX {
                        names.clear();
                    }
                    let name = Arc::new(CachedAddresses {
                        queried: Instant::now(),
                        addresses: OnceCell::new(),
                    });
                    names.insert(host.to_owned(), Arc::clone(&name));
                    name
                }
            }
        };
        let query = || async { Ok::<_, io::Error>(lookup_host((host, port)).await?.collect()) };
        let mut addresses = name.addresses.get_or_try_init(query).await?.clone();
        // One query serves all ports.
        addresses.iter_mut().for_each(|address| address.set_port(port));
        Ok(addresses)
    }

    /// Adds a host in memory.
    #[cfg(test)]
    pub(super) fn add_host(&self, name: &str, host: InMemoryHost) {
        self.in_memory.lock().expect("no panic").insert(name.to_owned(), host);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<CachedAddresses>>> {
        // Consistent between any two statements.
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Alternates between the families, beginning with that of the first address (RFC 8305, section 4).
fn interleaved(addresses: &[SocketAddr]) -> Vec<SocketAddr> {
    let first_is_ipv6 = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let (first, second): (Vec<SocketAddr>, Vec<SocketAddr>) =
        addresses.iter().partition(|address| address.is_ipv6() == first_is_ipv6);
    let (mut first, mut second) = (first.into_iter(), second.into_iter());
    let mut all = Vec::with_capacity(addresses.len());
    while all.len() < addresses.len() {
        all.extend(first.next());
        all.extend(second.next());
    }
    all
}

/// Connects to `address` with a receive buffer of `buffer` bytes, the kernel's bookkeeping
/// included. The buffer is set before connecting, because the receive window never grows beyond its
/// initial size once the buffer is set (tcp(7)).
async fn connect_to(address: SocketAddr, buffer: usize) -> io::Result<Socket> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    // The kernel doubles the number (socket(7)). If it cannot be set, the kernel's default is the
    // bound.
    let _ = SockRef::from(&socket).set_recv_buffer_size(buffer / 2);
    socket.connect(address).await.map(Socket::from_hop)
}

/// Connects to the first of `addresses` that accepts. A concurrent attempt needs one of the
/// `spare_sockets`; without one, an address is tried after the previous one has failed.
async fn race(
    addresses: Vec<SocketAddr>,
    buffer: usize,
    spare_sockets: &Arc<Semaphore>,
) -> io::Result<Socket> {
    if let [address] = addresses[..] {
        return connect_to(address, buffer).await;
    }
    let mut addresses = addresses.into_iter();
    let mut attempts = JoinSet::new();
    let mut failure = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    loop {
        let spare = Arc::clone(spare_sockets).try_acquire_owned().ok();
        let is_first = attempts.is_empty();
        if is_first || spare.is_some() {
            match addresses.next() {
                Some(address) => {
                    let spare = spare.filter(|_| !is_first);
                    attempts.spawn(async move {
                        let _spare = spare;
                        connect_to(address, buffer).await
                    });
                }
                None if is_first => return Err(failure),
                None => {}
            }
        }
        let attempt = if addresses.len() > 0 {
            timeout(STAGGER, attempts.join_next()).await
        } else {
            Ok(attempts.join_next().await)
        };
        match attempt {
            Ok(Some(Ok(Ok(stream)))) => return Ok(stream),
            Ok(Some(Ok(Err(error)))) => failure = error,
            Ok(Some(Err(panic))) => failure = io::Error::other(panic),
            // The next address is due.
            Ok(None) | Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    const BUFFER: usize = 1024 * 1024;

    fn spare(sockets: usize) -> Arc<Semaphore> {
        Arc::new(Semaphore::new(sockets))
    }

    fn addresses(list: &str, port: u16) -> Vec<SocketAddr> {
        let ip = |text: &str| text.parse::<IpAddr>().expect("an address");
        list.split_whitespace().map(|text| SocketAddr::new(ip(text), port)).collect()
    }

    #[test]
    fn address_families_alternate() {
        let cases = [
            ("", ""),
            ("192.0.2.1", "192.0.2.1"),
            ("::1 ::2 192.0.2.1 ::3", "::1 192.0.2.1 ::2 ::3"),
            ("192.0.2.1 192.0.2.2 ::1", "192.0.2.1 ::1 192.0.2.2"),
        ];
        for (given, expected) in cases {
            assert_eq!(interleaved(&addresses(given, 79)), addresses(expected, 79), "{given}");
        }
    }

    #[tokio::test]
    async fn next_address_is_tried_immediately_after_a_refusal() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("its address").port();
        // There are no listeners on the first two.
        let stream =
            race(addresses("127.0.0.2 127.0.0.3 127.0.0.1", port), BUFFER, &spare(1)).await;
        let stream = stream.expect("connected");
        assert_eq!(
            [stream.tcp().expect("TCP").peer_addr().expect("an address")][..],
            addresses("127.0.0.1", port)
        );
        drop(listener);
        assert!(race(addresses("127.0.0.2 127.0.0.1", port), BUFFER, &spare(1)).await.is_err());
        assert!(race(Vec::new(), BUFFER, &spare(1)).await.is_err());
    }

    #[tokio::test]
    async fn addresses_are_cached_and_forgotten() {
        let dialer = Dialer::default();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("its address").port();
        dialer.connect("localhost", port, BUFFER, &spare(1)).await.expect("connected");
        assert!(dialer.lock().contains_key("localhost"));
        dialer.connect("127.0.0.1", port, BUFFER, &spare(1)).await.expect("connected");
        assert_eq!(dialer.lock().len(), 1, "an address is not cached");
        drop(listener);
        dialer.connect("localhost", port, BUFFER, &spare(1)).await.expect_err("no listener");
        assert!(dialer.lock().is_empty(), "the host may have moved");
        for number in 0..2 * CACHE_MAX {
            let name =
                Arc::new(CachedAddresses { queried: Instant::now(), addresses: OnceCell::new() });
            dialer.lock().insert(number.to_string(), name);
        }
        dialer.connect("localhost", port, BUFFER, &spare(1)).await.expect_err("no listener");
        assert!(dialer.lock().len() <= 1);
    }
}
