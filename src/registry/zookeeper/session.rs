//! Zuul's registry in ZooKeeper: one session after the other, for as long as the gateway lives.
//!
//! [`register`] starts a task that connects, hands the session to [`BuildLookup`], follows the other
//! components ([`components`]) and keeps our own entry ([`entry`]). A lost session is terminal for
//! a client, so the task makes a new one; streams that run know nothing of it.

use std::convert::Infallible;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tracing::{debug, info, warn};
use zookeeper_client::{Client, Error, SessionState, TlsCerts, TlsDynamicCerts};

use super::build_lookup::BuildLookup;
use super::{component_watcher, registration as own_registration};

use super::connect_diagnostics::ConnectDiagnostics;
use super::registration::ModelApi;
use super::registration_status::StatusTracker;
use crate::config::Hosts;
use crate::model::component::{OwnComponent, State};
use crate::registry::{
    Registration, RegistrationCommands, RegistrationStatus, Registry, registration,
};
use crate::telemetry::metrics::Metrics;
use crate::tls;

/// How to reach ZooKeeper.
pub(crate) struct Settings {
    /// The servers, and the node below which Zuul lives.
    pub(crate) hosts: Hosts,
    /// The chain and names to trust, and who we are. What is put there later counts from the next
    /// connection on; one that is open stays.
    pub(crate) tls: watch::Receiver<Tls>,
    /// The session timeout asked for; the server may grant another.
    pub(crate) session_timeout: Duration,
    /// Counts sessions.
    pub(crate) metrics: Metrics,
}

/// TLS towards ZooKeeper.
#[derive(Clone)]
pub(crate) struct Tls {
    /// For the client.
    pub(crate) certs: TlsCerts,
    /// Whether a server's certificate must carry the name it is dialed by; counts from the next
    /// session on.
    pub(crate) verify_hostnames: bool,
    /// For a look of our own, with the same certificates and rules.
    pub(crate) connector: tls::Connector,
    /// Where the authorities are, to be named where they have not signed a server's certificate.
    pub(crate) ca_file: PathBuf,
}

/// The longest wait between two tries to get a session, and the shortest behind one that failed.
const RETRY_MAX: Duration = Duration::from_secs(8);
const RETRY_MIN: Duration = Duration::from_millis(250);

/// Over how long gateways that lost their sessions in one moment come back: each makes an entry, of
/// which all others read. Those that only lost their connections come back at once: that is a
/// handshake each, and the client's to decide.
const RETURN: Duration = Duration::from_secs(4);

/// How long a server that has too much to do is left alone.
const THROTTLED: Duration = Duration::from_secs(1);

/// How long the client is left to find its way back by itself, and how often it is looked whether
/// it could have.
const PATIENCE: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Between two looks at the servers while there is no session or no connection.
const DIAGNOSE_EVERY: Duration = Duration::from_secs(5);

/// Enters `announcement` into the registry, now or whenever ZooKeeper answers, and answers
/// questions from it.
pub(crate) fn register(settings: Settings, announcement: OwnComponent) -> (Registry, Registration) {
    let lookup = Arc::new(BuildLookup::new());
    let registry = Registry::ZooKeeper(Arc::clone(&lookup));
    let registration = registration(|orders| {
        let Settings { hosts, tls, .. } = &settings;
        let certs = TlsDynamicCerts::new(tls.borrow().certs.clone());
        let diagnosis = ConnectDiagnostics::new(hosts.servers.clone(), tls.clone());
        let left_behind = watch::Sender::new(None);
        let model_api = ModelApi::default();
        let keeper = SessionManager {
            settings,
            certs,
            diagnosis,
            announcement,
            lookup,
            orders,
            left_behind,
            model_api,
        };
        keeper.run()
    });
    (registry, registration)
}

/// How a session went.
enum SessionEnd {
    /// Our entry stood, was withdrawn on order, or waited for Zuul.
    Registered,
    /// There was a session, but no entry.
    Refused(Error),
}

/// Owns the sessions.
struct SessionManager {
    settings: Settings,
    /// What the client shows and trusts in its next connection.
    certs: TlsDynamicCerts,
    /// Finds out why no session comes about.
    diagnosis: ConnectDiagnostics,
    announcement: OwnComponent,
    lookup: Arc<BuildLookup>,
    orders: RegistrationCommands,
    /// The entry last made. Goes with its session, unless that was given up before its end.
    left_behind: watch::Sender<Option<String>>,
    model_api: ModelApi,
}

impl SessionManager {
    async fn run(self) {
        let close = self.orders.close.clone();
        tokio::select! {
            () = close.cancelled() => {}
            never = self.keep_sessions() => match never {},
            never = self.withdraw_without_session() => match never {},
            never = self.follow_tls() => match never {},
        }
        self.lookup.end_session().await;
    }

    /// Gives the client the newest certificates.
    async fn follow_tls(&self) -> Infallible {
        let mut tls = self.settings.tls.clone();
        while tls.changed().await.is_ok() {
            let certs = tls.borrow_and_update().certs.clone();
            self.certs.update(certs);
        }
        std::future::pending().await
    }

    /// Has one session after the other. Outage is told once, until there was a session in which
    /// our entry stood.
    async fn keep_sessions(&self) -> Infallible {
        let mut wait = RETRY_MIN;
        let mut said = false;
        let mut tls = self.settings.tls.clone();
        loop {
            tls.mark_unchanged();
            let trouble = match self.connect_reporting(&mut said).await {
                Ok(client) => match self.serve(client).await {
                    SessionEnd::Registered => {
                        (wait, said) = (RETRY_MIN, false);
                        tokio::time::sleep(full_jitter(RETURN)).await;
                        continue;
                    }
                    SessionEnd::Refused(error) => (error, false),
                },
                Err(error) => (error, true),
            };
            self.lookup.hope(false);
            match trouble {
                (error, sessionless) if !std::mem::replace(&mut said, true) => {
                    let cause = if sessionless {
                        self.diagnosis.why().await
                    } else {
                        "the session is refused what Zuul's services do".to_owned()
                    };
                    self.warn(&error, cause);
                }
                (error, _) => debug!(%error, "still not registered in ZooKeeper"),
            }
            tokio::select! {
                () = tokio::time::sleep(equal_jitter(wait)) => wait = (wait * 2).min(RETRY_MAX),
                // Perhaps these are better ones; if not, that is worth a new line.
                Ok(()) = tls.changed() => (wait, said) = (RETRY_MIN, false),
                never = self.keep_diagnosing() => match never {},
            }
        }
    }

    /// One try at every server. Where that takes long, its cause is looked for meanwhile and
    /// reported, unless it has been already.
    async fn connect_reporting(&self, said: &mut bool) -> Result<Client, Error> {
        let mut connecting = pin!(self.connect());
        if let Ok(connected) = tokio::time::timeout(PATIENCE, &mut connecting).await {
            return connected;
        }
        if !std::mem::replace(said, true) {
            let cause = tokio::select! {
                connected = &mut connecting => return connected,
                cause = self.diagnosis.why() => cause,
            };
            self.lookup.hope(false);
            self.warn(&Error::Timeout, cause);
        }
        connecting.await
    }

    fn warn(&self, error: &Error, cause: String) {
        let hosts = &self.settings.hosts;
        warn!(%hosts, %error, %cause, "not registered in ZooKeeper; trying on");
        self.lookup.set_outage(Some(cause));
    }

    /// Keeps the known cause of trouble up to date.
    async fn keep_diagnosing(&self) -> Infallible {
        loop {
            tokio::time::sleep(equal_jitter(DIAGNOSE_EVERY)).await;
            let cause = self.diagnosis.why().await;
            debug!(%cause, "no session with ZooKeeper");
            self.lookup.set_outage(Some(cause));
        }
    }

    /// One try at every server.
    async fn connect(&self) -> Result<Client, Error> {
        let Settings { hosts, tls, session_timeout, .. } = &self.settings;
        let tls = tls.borrow().clone();
        connect(hosts, &tls, *session_timeout, self.certs.clone()).await
    }

    /// Lives one session to its end.
    async fn serve(&self, client: Client) -> SessionEnd {
        debug!(session = %client.session_id(), timeout = ?client.session_timeout(), "session with ZooKeeper");
        self.settings.metrics.zookeeper_session();
        self.lookup.begin_session(client.clone());
        self.lookup.set_outage(None);
        let (snapshot, snapshot_seen) = watch::channel(None);
        let RegistrationCommands { wanted, standing, .. } = &self.orders;
        let presence = StatusTracker::new(standing);
        let chroot = &self.settings.hosts.chroot;
        let end = tokio::select! {
            error = component_watcher::follow(&client, &snapshot, &self.lookup, &presence, chroot) => error,
            error = own_registration::keep(&client, &self.announcement, wanted.clone(), &presence, snapshot_seen, &self.left_behind, &self.model_api) => error,
            error = self.follow_connection(&client, &presence) => error,
        };
        self.lookup.forget_session();
        if *wanted.borrow() == State::Stopped {
            standing.send_replace(RegistrationStatus::Withdrawn);
            return SessionEnd::Registered;
        }
        let before = standing.borrow().clone();
        match before {
            RegistrationStatus::Registered(_)
            | RegistrationStatus::ConnectionLost
            | RegistrationStatus::NoZuul(_) => {}
            RegistrationStatus::Connecting
            | RegistrationStatus::SessionLost
            | RegistrationStatus::Withdrawn => {
                return SessionEnd::Refused(end);
            }
        }
        if !presence.is_registered() {
            warn!(error = %end, "session with ZooKeeper lost while waiting for Zuul; starting a new one");
            standing.send_replace(RegistrationStatus::Connecting);
            return SessionEnd::Registered;
        }
        warn!(error = %end, "session with ZooKeeper lost, and our entry with it; starting a new one");
        standing.send_replace(RegistrationStatus::SessionLost);
        SessionEnd::Registered
    }

    /// Fulfils an order to withdraw that comes when there is no session: nothing holds an entry.
    async fn withdraw_without_session(&self) -> Infallible {
        let mut wanted = self.orders.wanted.clone();
        if wanted.wait_for(|state| *state == State::Stopped).await.is_ok()
            && !self.lookup.has_session()
        {
            self.orders.standing.send_replace(RegistrationStatus::Withdrawn);
        }
        std::future::pending().await
    }

    /// Tells losses of the connection apart from those of the session. Ends with the session, or
    /// when it is given up.
    async fn follow_connection(&self, client: &Client, presence: &StatusTracker<'_>) -> Error {
        let mut states = client.state_watcher();
        let mut state = states.changed().await;
        loop {
            match state {
                SessionState::Disconnected => {
                    presence.connection(false);
                    warn!(
                        "connection to ZooKeeper lost; running streams go on, new ones may be refused"
                    );
                    state = tokio::select! {
                        state = states.changed() => state,
                        () = self.overdue() => return Error::ConnectionLoss,
                        never = self.keep_diagnosing() => match never {},
                    };
                    continue;
                }
                SessionState::SyncConnected | SessionState::ConnectedReadOnly => {
                    info!("connection to ZooKeeper is back within the session");
                    self.lookup.set_outage(None);
                    self.lookup.hope(true);
                    presence.connection(true);
                }
                SessionState::Expired => return Error::SessionExpired,
                SessionState::AuthFailed => return Error::AuthFailed,
                SessionState::Closed => return Error::ClientClosed,
            }
            state = states.changed().await;
        }
    }

    /// Waits until a connection is overdue: a server gives sessions again and the client has not
    /// noticed.
    ///
    /// The client doubles its pauses without a bound, so that after an outage it may sleep for as
    /// long as that took. A server may take connections and have no quorum: only a session shows that
    /// ours is given up for a better one.
    async fn overdue(&self) {
        tokio::time::sleep(PATIENCE).await;
        self.lookup.hope(false);
        while self.connect().await.is_err() {
            tokio::time::sleep(equal_jitter(LOOK_EVERY)).await;
        }
        tokio::time::sleep(equal_jitter(LOOK_EVERY)).await;
    }
}

/// One try at every server of `hosts`.
pub(crate) async fn connect(
    hosts: &Hosts,
    tls: &Tls,
    session_timeout: Duration,
    certs: TlsDynamicCerts,
) -> Result<Client, Error> {
    Client::connector()
        .with_session_timeout(session_timeout)
        .with_tls(tls::zookeeper_options(certs, tls.verify_hostnames))
        .with_fail_eagerly()
        .secure_connect(&hosts.to_string())
        .await
}

/// Repeats `operation` over losses of the connection, as long as the session lives.
///
/// It cannot spin: a server that has too much to do is left alone for a while, and a request made without a connection waits in the client for the next one.
pub(crate) async fn retry<T, Operation>(
    mut operation: impl FnMut() -> Operation,
) -> Result<T, Error>
where
    Operation: Future<Output = Result<T, Error>>,
{
    loop {
        match operation().await {
            Err(error) if is_connection_loss(&error) => debug!(%error, "asking ZooKeeper again"),
            Err(Error::Throttled) => tokio::time::sleep(equal_jitter(THROTTLED)).await,
            result => return result,
        }
    }
}

/// Whether `error` says that the session has ended or that nothing sensible comes from it any
/// more; any other concerns only what was asked.
pub(crate) fn ends_session(error: &Error) -> bool {
    matches!(
        error,
        Error::AuthFailed
            | Error::ClientClosed
            | Error::NoHosts
            | Error::RuntimeInconsistent
            | Error::SessionExpired
            | Error::SessionMoved
            | Error::UnexpectedError(_)
            | Error::UnmarshalError { .. }
    )
}

/// Whether `error` says that the connection broke with the answer outstanding. The client hands on
/// whatever ended the connection, I/O errors and its own time-outs as `Custom` ones.
pub(crate) fn is_connection_loss(error: &Error) -> bool {
    matches!(error, Error::ConnectionLoss | Error::Custom(_) | Error::Timeout)
}

/// A wait of up to `whole`, any as likely as any other.
fn full_jitter(whole: Duration) -> Duration {
    whole.mul_f64(fastrand::f64())
}

/// `wait` and up to as much again.
fn equal_jitter(wait: Duration) -> Duration {
    wait.mul_f64(1.0 + fastrand::f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of fifty gateways come in the busiest second, on average, when each waits as `wait`
    /// says.
    fn busiest(wait: impl Fn() -> Duration) -> usize {
        const ROUNDS: usize = 200;
        let busiest = |_| {
            let waits: Vec<_> = (0..50).map(|_| wait()).collect();
            let in_second = |from: &Duration| {
                let second = *from..*from + Duration::from_secs(1);
                waits.iter().filter(|wait| second.contains(*wait)).count()
            };
            waits.iter().map(in_second).max().expect("fifty")
        };
        (0..ROUNDS).map(busiest).sum::<usize>() / ROUNDS
    }

    /// All that lost their sessions at once, and all whose tries have failed for a while.
    #[test]
    fn fifty_gateways_do_not_come_back_in_one_second() {
        fastrand::seed(1);
        for busiest in [busiest(|| full_jitter(RETURN)), busiest(|| equal_jitter(RETRY_MAX))] {
            assert!((6..25).contains(&busiest), "{busiest}");
        }
        assert_eq!(busiest(|| equal_jitter(RETRY_MIN)), 50, "what the others are for");
    }

    #[test]
    fn waits_fill_the_range_they_are_drawn_from() {
        fastrand::seed(1);
        let range = |wait: &dyn Fn() -> Duration| {
            let waits: Vec<_> = (0..1000).map(|_| wait()).collect();
            (*waits.iter().min().expect("waits"), *waits.iter().max().expect("waits"))
        };
        let (least, most) = range(&|| full_jitter(RETURN));
        assert!(least < RETURN / 100 && RETURN * 99 / 100 < most && most < RETURN);
        let (least, most) = range(&|| equal_jitter(RETRY_MAX));
        assert!(RETRY_MAX <= least && least < RETRY_MAX * 101 / 100);
        assert!(RETRY_MAX * 199 / 100 < most && most < 2 * RETRY_MAX);
    }
}
