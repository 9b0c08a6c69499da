//! The TLS sessions that other gateways offer to resume.
//!
//! A ticket is good for one connection. rustls's own store keeps eight for each server; people who
//! come at one moment would have all but the first eight wait for a whole handshake each.
//!
//! Nobody's certificate is verified when a session is resumed. So a session is only offered while
//! the certificates of both sides are valid; after that the next handshake is a full one.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustls::NamedGroup;
use rustls::client::{ClientSessionStore, Tls12ClientSessionValue, Tls13ClientSessionValue};
use rustls::pki_types::ServerName;
use rustls::time_provider::TimeProvider;

use super::certificate_names::Validity;

/// Gateways whose sessions are remembered. Beyond this all are forgotten together, which costs a
/// handshake each.
const SERVERS: usize = 256;

/// Tickets kept for each. One is some 2 KiB.
const TICKETS: usize = 256;

/// How long a server that has refused all protocols (ALPN) is offered none. What ends TLS in front
/// of a gateway may be taken away.
const WITHOUT_PROTOCOLS: Duration = Duration::from_secs(3600);

/// Sessions by the name that was dialed.
pub(crate) struct Sessions {
    servers: Mutex<HashMap<ServerName<'static>, Server>>,
    /// When our own certificate is valid.
    own: Validity,
    clock: Arc<dyn TimeProvider>,
}

#[derive(Default)]
struct Server {
    /// When the chain that was verified in the last full handshake is valid; no session is kept
    /// without it.
    validity: Option<Validity>,
    /// Since when it is offered no protocols.
    without_protocols: Option<Instant>,
    /// It has chosen our protocol in a handshake, so it is a gateway of our own kind.
    is_peer_gateway: bool,
    group: Option<NamedGroup>,
    tls12: Option<Tls12ClientSessionValue>,
    tickets: Vec<Tls13ClientSessionValue>,
}

impl Sessions {
    /// No sessions yet; `own` is when our certificate is valid.
    pub(crate) fn new(own: Validity, clock: Arc<dyn TimeProvider>) -> Self {
        Self { servers: Mutex::default(), own, clock }
    }

    /// Keeps the sessions of the server `name` within `validity`, that of the chain that it has
    /// shown in a full handshake.
    pub(crate) fn limit(&self, name: &ServerName<'_>, validity: Validity) {
        self.with(name.to_owned(), |server| server.validity = Some(validity));
    }

    /// Records that the server `name` has chosen our protocol.
    pub(crate) fn set_peer_gateway(&self, name: &ServerName<'_>) {
        self.with(name.to_owned(), |server| {
            server.is_peer_gateway = true;
            server.without_protocols = None;
        });
    }

    /// Records that the server `name` refuses all protocols. Returns `false`, which means not to
    /// dial it again, if none were offered, or if it has chosen ours before.
    ///
    /// The alert comes before the server has proved who it is. An attacker on the path can send it,
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

    /// Whether the server `name` has refused all protocols lately.
    pub(crate) fn omits_protocols(&self, name: &ServerName<'_>) -> bool {
        let since = self.lock().get(name).and_then(|server| server.without_protocols);
        since.is_some_and(|since| since.elapsed() < WITHOUT_PROTOCOLS)
    }

    /// What `take` finds of the server `name`, whose sessions are dropped instead if a certificate
    /// is not valid now.
    fn valid<T>(
        &self,
        name: &ServerName<'static>,
        take: impl FnOnce(&mut Server) -> Option<T>,
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

    /// Changes the server `name`, unless no chain of it is remembered: a session comes after the
    /// handshake, and the server may have been forgotten in between.
    fn with_verified(&self, name: &ServerName<'static>, change: impl FnOnce(&mut Server)) {
        if let Some(server) = self.lock().get_mut(name)
            && server.validity.is_some()
        {
            change(server);
        }
    }

    fn with<T>(&self, name: ServerName<'static>, change: impl FnOnce(&mut Server) -> T) -> T {
        let mut servers = self.lock();
        if servers.len() >= SERVERS && !servers.contains_key(&name) {
            servers.clear();
        }
        change(servers.entry(name).or_default())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ServerName<'static>, Server>> {
        // Whole between any two statements.
        self.servers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Sessions {
    /// Without the sessions, whose secrets have no place in a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sessions").finish_non_exhaustive()
    }
}

impl ClientSessionStore for Sessions {
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
        // The newest: the others may have outlived the server's keys.
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
    fn protocols_are_offered_for_ever_to_a_server_that_has_chosen_ours() {
        let clock = Arc::new(rustls::time_provider::DefaultTimeProvider);
        let sessions = Sessions::new(Validity::default(), clock);
        let (one, other) = (name("one.example.org"), name("other.example.org"));
        assert!(sessions.omit_protocols(&one));
        assert!(!sessions.omit_protocols(&one), "none were offered");
        assert!(sessions.omits_protocols(&one));
        // Of two handshakes at one time the one is refused and the other is not.
        sessions.set_peer_gateway(&one);
        assert!(!sessions.omits_protocols(&one));
        assert!(!sessions.omit_protocols(&one));
        assert!(!sessions.omits_protocols(&one));
        assert!(sessions.omit_protocols(&other));
    }

    /// Sessions themselves only a handshake can make: `tests/it/tls.rs` resumes them.
    #[test]
    fn servers_are_apart_and_bounded() {
        let clock = Arc::new(rustls::time_provider::DefaultTimeProvider);
        let sessions = Sessions::new(Validity::default(), clock);
        sessions.set_kx_hint(name("one.example.org"), NamedGroup::X25519);
        assert_eq!(sessions.kx_hint(&name("one.example.org")), Some(NamedGroup::X25519));
        assert_eq!(sessions.kx_hint(&name("other.example.org")), None);
        assert!(sessions.take_tls13_ticket(&name("one.example.org")).is_none());
        for number in 0..2 * SERVERS {
            sessions.set_kx_hint(name(&format!("gw{number}.example.org")), NamedGroup::X25519);
            assert!(sessions.lock().len() <= SERVERS);
        }
    }
}
