//! From a host name to a connection: name servers asked in moderation, addresses tried beside each
//! other (RFC 8305).

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::{TcpStream, lookup_host};
use tokio::sync::OnceCell;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

/// How long one address of a next hop has before another is tried beside it.
const STAGGER: Duration = Duration::from_millis(250);

/// How long a name's addresses are believed. getaddrinfo(3) tells no lifetime; this is short enough
/// for an executor that moves, and saves a burst of clients a burst of questions.
const KEEP: Duration = Duration::from_secs(5);

/// Names remembered. They come from Zuul's registry, so there are not many; beyond this all are
/// forgotten together.
const REMEMBERED: usize = 1024;

/// Dials hosts.
#[derive(Default)]
pub(crate) struct Dialer(Mutex<HashMap<String, Arc<Name>>>);

/// One name's addresses, once somebody has asked for them.
struct Name {
    asked: Instant,
    addresses: OnceCell<Vec<IpAddr>>,
}

impl Dialer {
    /// Connects to the first address of `host` that answers.
    ///
    /// Addresses are tried in the resolver's order, the families in turn, each a quarter of a
    /// second behind the one before or as soon as that has failed, so that one that swallows
    /// packets does not hide the others (RFC 8305, sections 4 and 5).
    ///
    /// # Errors
    /// The name has no address, or the last address that was tried failed like this.
    pub(crate) async fn connect(&self, host: &str, port: u16) -> io::Result<TcpStream> {
        if let Ok(address) = host.parse::<IpAddr>() {
            return TcpStream::connect((address, port)).await;
        }
        let addresses = self.addresses(host, port).await?;
        let connected = race(interleaved(&addresses), port).await;
        if connected.is_err() {
            // It may have moved.
            self.lock().remove(host);
        }
        connected
    }

    /// The addresses of `host`. One question for all who ask within [`KEEP`].
    async fn addresses(&self, host: &str, port: u16) -> io::Result<Vec<IpAddr>> {
        let name = {
            let mut names = self.lock();
            match names.get(host) {
                Some(name) if name.asked.elapsed() < KEEP => Arc::clone(name),
                _ => {
                    if names.len() >= REMEMBERED {
                        names.clear();
                    }
                    let name = Arc::new(Name { asked: Instant::now(), addresses: OnceCell::new() });
                    names.insert(host.to_owned(), Arc::clone(&name));
                    name
                }
            }
        };
        let ask = || async {
            let found = lookup_host((host, port)).await?;
            Ok::<_, io::Error>(found.map(|address| address.ip()).collect())
        };
        name.addresses.get_or_try_init(ask).await.cloned()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Name>>> {
        // Whole between any two statements.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The families in turn, beginning with that of the first address (RFC 8305, section 4).
fn interleaved(addresses: &[IpAddr]) -> Vec<IpAddr> {
    let first_is_ipv6 = addresses.first().is_some_and(IpAddr::is_ipv6);
    let (first, second): (Vec<IpAddr>, Vec<IpAddr>) =
        addresses.iter().partition(|address| address.is_ipv6() == first_is_ipv6);
    let (mut first, mut second) = (first.into_iter(), second.into_iter());
    let mut all = Vec::with_capacity(addresses.len());
    while all.len() < addresses.len() {
        all.extend(first.next());
        all.extend(second.next());
    }
    all
}

async fn race(addresses: Vec<IpAddr>, port: u16) -> io::Result<TcpStream> {
    if let [address] = addresses[..] {
        return TcpStream::connect((address, port)).await;
    }
    let mut addresses = addresses.into_iter().map(|address| SocketAddr::new(address, port));
    let mut attempts = JoinSet::new();
    let mut failure = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    loop {
        match addresses.next() {
            Some(address) => {
                attempts.spawn(TcpStream::connect(address));
            }
            None if attempts.is_empty() => return Err(failure),
            None => {}
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
            // Time for the next address.
            Ok(None) | Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    fn ips(list: &str) -> Vec<IpAddr> {
        list.split_whitespace().map(|address| address.parse().expect("an address")).collect()
    }

    #[test]
    fn the_families_take_turns() {
        let cases = [
            ("", ""),
            ("192.0.2.1", "192.0.2.1"),
            ("::1 ::2 192.0.2.1 ::3", "::1 192.0.2.1 ::2 ::3"),
            ("192.0.2.1 192.0.2.2 ::1", "192.0.2.1 ::1 192.0.2.2"),
        ];
        for (given, expected) in cases {
            assert_eq!(interleaved(&ips(given)), ips(expected), "{given}");
        }
    }

    #[tokio::test]
    async fn one_that_refuses_makes_way_at_once() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("its address").port();
        // Nobody listens on the first two.
        let stream = race(ips("127.0.0.2 127.0.0.3 127.0.0.1"), port).await.expect("connected");
        assert_eq!(stream.peer_addr().expect("an address").ip(), ips("127.0.0.1")[0]);
        drop(listener);
        assert!(race(ips("127.0.0.2 127.0.0.1"), port).await.is_err());
        assert!(race(Vec::new(), port).await.is_err());
    }

    #[tokio::test]
    async fn names_are_kept_and_forgotten() {
        let dialer = Dialer::default();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("its address").port();
        dialer.connect("localhost", port).await.expect("connected");
        assert!(dialer.lock().contains_key("localhost"));
        dialer.connect("127.0.0.1", port).await.expect("connected");
        assert_eq!(dialer.lock().len(), 1, "an address is no name");
        drop(listener);
        dialer.connect("localhost", port).await.expect_err("nobody listens");
        assert!(dialer.lock().is_empty(), "it may have moved");
        for number in 0..2 * REMEMBERED {
            let name = Arc::new(Name { asked: Instant::now(), addresses: OnceCell::new() });
            dialer.lock().insert(number.to_string(), name);
        }
        dialer.connect("localhost", port).await.expect_err("nobody listens");
        assert!(dialer.lock().len() <= 1);
    }
}
