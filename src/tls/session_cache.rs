//! Caches TLS sessions of other gateways for resumption.
//!
//! A ticket can be used for one connection. The store of rustls keeps eight tickets for each
//! server, so of many concurrent requests all but eight would wait for a full handshake.
//!
//! No certificate is verified when a session is resumed. Therefore a session is offered only while
//! the certificates of both sides are valid; afterwards the next handshake is a full one.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustls::NamedGroup;
use rustls::client::{ClientSessionStore, Tls12ClientSessionValue, Tls13ClientSessionValue};
use rustls::pki_types::ServerName;
use rustls::time_provider::TimeProvider;

use super::certificate_names::Validity;

/// The most servers in the cache. One more clears it, which costs each server one full handshake.
const SERVERS: usize = 256;

/// The most tickets for each server. A ticket takes about 2 KiB.
const TICKETS: usize = 256;

/// How long no ALPN protocols are offered to a server that has refused all of them. Limited because
/// a proxy that terminates TLS in front of a gateway may be removed again.
const WITHOUT_PROTOCOLS: Duration = Duration::from_secs(3600);

/// The sessions of servers, by the name that was dialed.
pub(crate) struct SessionCache {
    servers: Mutex<HashMap<ServerName<'static>, ServerSessions>>,
    /// The validity of our own certificate.
    own: Validity,
    clock: Arc<dyn TimeProvider>,
}

#[derive(Default)]
struct ServerSessions {
    /// The validity of the chain that the last full handshake verified. Without it no session is
    /// cached.
    validity: Option<Validity>,
    /// When the server refused all protocols.
    without_protocols: Option<Instant>,
    /// It has selected our protocol in a handshake, so it is a peer gateway.
    is_peer_gateway: bool,
    group: Option<NamedGroup>,
    tls12: Option<Tls12ClientSessionValue>,
    tickets: Vec<Tls13ClientSessionValue>,
}

impl SessionCache {
    /// Returns an empty cache; `own` is the validity of our own certificate.
    pub(crate) fn new(own: Validity, clock: Arc<dyn TimeProvider>) -> Self {
        Self { servers: Mutex::default(), own, clock }
    }

    /// Limits the sessions of the server `name` to `validity`, that of the chain that it presented
    /// in a full handshake.
    pub(crate) fn limit(&self, name: &ServerName<'_>, validity: Validity) {
        self.with(name.to_owned(), |server| server.validity = Some(validity));
    }

    /// Records that the server `name` has selected our protocol.
    pub(crate) fn set_peer_gateway(&self, name: &ServerName<'_>) {
        self.with(name.to_owned(), |server| {
            server.is_peer_gateway = true;
            server.without_protocols = None;
        });
    }

    /// Records that the server `name` refuses all protocols. Returns `false`, which means that it
    /// must not be dialed again, if none were offered, or if it has selected ours before.
    ///
    /// The alert comes before the server has authenticated. An attacker on the path can send it,
    /// and without our protocol the end of TCP would count as the end of a log.
    pub(crate) fn omit_protocols(&self, name: &ServerName<'_>) -> bool {
        let known = self.omits_protocols(name);
        self.with(name.to_owned(), |server| {
            if server.is_peer_gateway {
                return false;
            }
            server.without_protocols = Some(Instant::now());
            !known
        })
    }

    /// Whether the server `name` has refused all protocols within [`WITHOUT_PROTOCOLS`].
    pub(crate) fn omits_protocols(&self, name: &ServerName<'_>) -> bool {
        let since = self.lock().get(name).and_then(|server| server.without_protocols);
        since.is_some_and(|since| since.elapsed() < WITHOUT_PROTOCOLS)
    }

    /// Calls `take` for the server `name`. If a certificate is not valid now, drops the server's
    /// sessions instead.
    fn valid<T>(
        &self,
        name: &ServerName<'static>,
        take: impl FnOnce(&mut ServerSessions) -> Option<T>,
    ) -> Option<T> {
        let mut servers = self.lock();
        let server = servers.get_mut(name)?;
        let valid = server.validity.map(|validity| self.own.and(validity));
        let now = self.clock.current_time();
        if valid.zip(now).is_some_and(|(valid, now)| valid.contains(now)) {
            return take(server);
        }
        server.tls12 = None;
        server.tickets.clear();
        None
    }

    /// Changes the server `name` if its chain is known. Sessions arrive after the handshake, and
    /// the cache may have been cleared in between.
    fn with_verified(&self, name: &ServerName<'static>, change: impl FnOnce(&mut ServerSessions)) {
        if let Some(server) = self.lock().get_mut(name)
            && server.validity.is_some()
        {
            change(server);
        }
    }

    fn with<T>(
        &self,
        name: ServerName<'static>,
        change: impl FnOnce(&mut ServerSessions) -> T,
    ) -> T {
        let mut servers = self.lock();
        if servers.len() >= SERVERS && !servers.contains_key(&name) {
            servers.clear();
        }
        change(servers.entry(name).or_default())
    }

    /// Removes everything.
    pub(crate) fn clear(&self) {
        *self.lock() = HashMap::new();
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ServerName<'static>, ServerSessions>> {
        // Consistent between any two statements, so poisoning does no harm.
        self.servers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for SessionCache {
    /// Omits the sessions, because they hold secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SessionCache").finish_non_exhaustive()
    }
}

impl ClientSessionStore for SessionCache {
    fn set_kx_hint(&self, name: ServerName<'static>, group: NamedGroup) {
        self.with(name, |server| server.group = Some(group));
    }

    fn kx_hint(&self, name: &ServerName<'_>) -> Option<NamedGroup> {
        self.lock().get(name)?.group
    }

    fn set_tls12_session(&self, name: ServerName<'static>, session: Tls12ClientSessionValue) {
        self.with_verified(&name, |server| server.tls12 = Some(session));
    }

    fn tls12_session(&self, name: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        self.valid(&name.to_owned(), |server| server.tls12.clone())
    }

    fn remove_tls12_session(&self, name: &ServerName<'static>) {
        if let Some(server) = self.lock().get_mut(name) {
            server.tls12 = None;
        }
    }

    fn insert_tls13_ticket(&self, name: ServerName<'static>, ticket: Tls13ClientSessionValue) {
        self.with_verified(&name, |server| {
            if server.tickets.len() < TICKETS {
                server.tickets.push(ticket);
            }
        });
    }

    fn take_tls13_ticket(&self, name: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        // The newest one, because the server may have replaced the keys of older ones.
        self.valid(name, |server| server.tickets.pop())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(host: &str) -> ServerName<'static> {
        ServerName::try_from(host.to_owned()).expect("a name")
    }

    #[test]
    fn protocols_stay_offered_to_a_server_that_has_selected_ours() {
        let clock = Arc::new(rustls::time_provider::DefaultTimeProvider);
        let sessions = SessionCache::new(Validity::default(), clock);
        let (one, other) = (name("one.example.org"), name("other.example.org"));
        assert!(sessions.omit_protocols(&one));
        assert!(!sessions.omit_protocols(&one), "none were offered");
        assert!(sessions.omits_protocols(&one));
        // Of two concurrent handshakes one is refused and the other is not.
        sessions.set_peer_gateway(&one);
        assert!(!sessions.omits_protocols(&one));
        assert!(!sessions.omit_protocols(&one));
        assert!(!sessions.omits_protocols(&one));
        assert!(sessions.omit_protocols(&other));
    }

    /// Only handshakes can make sessions: `resumption` and `tests/it/tls.rs` test those.
    #[test]
    fn servers_are_separate_and_bounded() {
        let clock = Arc::new(rustls::time_provider::DefaultTimeProvider);
        let sessions = SessionCache::new(Validity::default(), clock);
        sessions.set_kx_hint(name("one.example.org"), NamedGroup::X25519);
        assert_eq!(sessions.kx_hint(&name("one.example.org")), Some(NamedGroup::X25519));
        assert_eq!(sessions.kx_hint(&name("other.example.org")), None);
        sessions.clear();
        assert_eq!(sessions.kx_hint(&name("one.example.org")), None);
        assert!(sessions.take_tls13_ticket(&name("one.example.org")).is_none());
        for number in 0..2 * SERVERS {
            sessions.set_kx_hint(name(&format!("gw{number}.example.org")), NamedGroup::X25519);
            assert!(sessions.lock().len() <= SERVERS);
        }
    }
}
