//! Sessions with ZooKeeper, one after the other for as long as the gateway runs.
//!
//! [`register`] spawns a task that establishes a session, gives its client to [`BuildLookup`],
//! watches the other components and keeps our own entry. A client ends with its session, so the
//! task then establishes another one. Running streams are not affected.

use std::convert::Infallible;
use std::mem;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tracing::{debug, info, warn};
use zookeeper_client::{Client, Error, SessionState, TlsDynamicCerts};

use super::build_lookup::BuildLookup;
use super::component_watcher;
use super::component_watcher::Components;
use super::connect::{Tls, connect};
use super::connect_diagnostics::ConnectDiagnostics;
use super::registration::{EntryHistory, OwnEntry, StatusTracker};
use super::retry::{equal_jitter, full_jitter};
use crate::config::Hosts;
use crate::model::component::{OwnComponent, State};
use crate::registry::{Registration, RegistrationCommands, RegistrationStatus, Registry};
use crate::telemetry::metrics::Metrics;

/// Wait between two attempts to establish a session: doubles from the minimum to the maximum.
const BACKOFF_MIN: Duration = Duration::from_millis(250);
const BACKOFF_MAX: Duration = Duration::from_secs(8);

/// Jitter before a new session is used: every new registration makes all other gateways read, so
/// gateways that lost their sessions together must not return together.
const RECONNECT_JITTER: Duration = Duration::from_secs(4);

/// Time that the client has to reconnect within its session, or to establish one, before the
/// servers are diagnosed. Longer than the connection timeout of one server, so that the client gets
/// past a server that hangs.
const RECONNECT_GRACE: Duration = Duration::from_secs(8);

/// Wait between two attempts to establish a session in place of one without a connection.
const REPLACE_INTERVAL: Duration = Duration::from_millis(500);

/// Wait between two diagnoses of the servers while there is no session or no connection.
const DIAGNOSE_INTERVAL: Duration = Duration::from_secs(5);

/// How to reach ZooKeeper.
pub(crate) struct SessionSettings {
    /// The servers, and the node below which Zuul's nodes are.
    pub(crate) hosts: Hosts,
    /// New values take effect with the next connection.
    pub(crate) tls: watch::Receiver<Tls>,
    /// The session timeout to request. The server may grant another one.
    pub(crate) session_timeout: Duration,
    /// Counts sessions.
    pub(crate) metrics: Metrics,
}

/// Registers `own`, immediately or as soon as ZooKeeper can be reached. The returned registry finds
/// builds and gateways.
pub(crate) fn register(settings: SessionSettings, own: OwnComponent) -> (Registry, Registration) {
    let lookup = Arc::new(BuildLookup::new());
    let registry = Registry::ZooKeeper(Arc::clone(&lookup));
    let registration = Registration::spawn(|commands| {
        let certs = TlsDynamicCerts::new(settings.tls.borrow().certs.clone());
        let servers = settings.hosts.servers.clone();
        let diagnostics = ConnectDiagnostics::new(servers, settings.tls.clone());
        SessionManager { settings, certs, diagnostics, own, lookup, commands }.run()
    });
    (registry, registration)
}

/// How a session ended.
enum SessionEnd {
    /// It was lost or given up, after our entry had been created or could have been. The session
    /// that replaces it, if there is one already.
    Lost(Option<Client>),
    /// It could not be used to register.
    NotRegistered(Error),
}

struct SessionManager {
    settings: SessionSettings,
    /// What the client uses for its next connection.
    certs: TlsDynamicCerts,
    diagnostics: ConnectDiagnostics,
    own: OwnComponent,
    lookup: Arc<BuildLookup>,
    commands: RegistrationCommands,
}

impl SessionManager {
    async fn run(self) {
        tokio::select! {
            () = self.commands.close.cancelled() => {}
            never = self.session_loop() => match never {},
            never = self.withdraw_without_session() => match never {},
            never = self.watch_certificates() => match never {},
        }
        self.lookup.close_session().await;
    }

    /// Gives the client new certificates when they change.
    async fn watch_certificates(&self) -> Infallible {
        let mut tls = self.settings.tls.clone();
        while tls.changed().await.is_ok() {
            let certs = tls.borrow_and_update().certs.clone();
            self.certs.update(certs);
        }
        std::future::pending().await
    }

    /// Establishes one session after the other. Logs one warning about failed attempts, until there
    /// was a session in which our entry was created.
    async fn session_loop(&self) -> Infallible {
        let mut history = EntryHistory::default();
        let mut tls = self.settings.tls.clone();
        let mut backoff = BACKOFF_MIN;
        let mut warned = false;
        let mut replacement = None;
        loop {
            tls.mark_unchanged();
            let connected = match replacement.take() {
                Some(client) => Ok(client),
                None => self.connect(&mut warned).await,
            };
            let (error, cause) = match connected {
                Ok(client) => match self.serve(client, &mut history).await {
                    SessionEnd::Lost(client) => {
                        if let Some(client) = &client {
                            self.lookup.set_session(client.clone());
                        }
                        replacement = client;
                        backoff = BACKOFF_MIN;
                        warned = false;
                        sleep(full_jitter(RECONNECT_JITTER)).await;
                        continue;
                    }
                    SessionEnd::NotRegistered(error) => {
                        let cause = "ZooKeeper refuses what Zuul's services are allowed to do";
                        (error, Some(cause.to_owned()))
                    }
                },
                Err(error) => (error, None),
            };
            self.lookup.set_connecting(false);
            if warned {
                debug!(%error, "still cannot register in ZooKeeper");
            } else {
                warned = true;
                let cause = match cause {
                    Some(cause) => cause,
                    None => self.diagnostics.run().await.text,
                };
                self.warn(&error, cause);
            }
            tokio::select! {
                () = sleep(equal_jitter(backoff)) => backoff = (backoff * 2).min(BACKOFF_MAX),
                // The new certificates may work. If they do not, that is worth a new warning.
                Ok(()) = tls.changed() => {
                    backoff = BACKOFF_MIN;
                    warned = false;
                }
                never = self.keep_diagnosing() => match never {},
            }
        }
    }

    /// Establishes a session. If that takes longer than [`RECONNECT_GRACE`], the servers are
    /// diagnosed at the same time, and the cause is logged unless `warned` is set.
    async fn connect(&self, warned: &mut bool) -> Result<Client, Error> {
        let mut connecting = pin!(self.try_connect());
        if let Ok(connected) = timeout(RECONNECT_GRACE, &mut connecting).await {
            return connected;
        }
        if !*warned {
            let causes = tokio::select! {
                connected = &mut connecting => return connected,
                causes = self.diagnostics.run() => causes,
            };
            *warned = true;
            self.lookup.set_connecting(false);
            self.warn(&Error::Timeout, causes.text);
        }
        connecting.await
    }

    async fn try_connect(&self) -> Result<Client, Error> {
        let tls = self.settings.tls.borrow().clone();
        let SessionSettings { hosts, session_timeout, .. } = &self.settings;
        connect(hosts, &tls, *session_timeout, self.certs.clone()).await
    }

    fn warn(&self, error: &Error, cause: String) {
        let hosts = &self.settings.hosts;
        warn!(%hosts, %error, %cause, "cannot register in ZooKeeper, retrying");
        self.lookup.set_outage(Some(cause));
    }

    /// Updates the known cause of an outage.
    async fn keep_diagnosing(&self) -> Infallible {
        loop {
            sleep(equal_jitter(DIAGNOSE_INTERVAL)).await;
            let cause = self.diagnostics.run().await.text;
            debug!(%cause, "no session or no connection to ZooKeeper");
            self.lookup.set_outage(Some(cause));
        }
    }

    /// Uses one session until it ends.
    async fn serve(&self, client: Client, history: &mut EntryHistory) -> SessionEnd {
        debug!(
            session = %client.session_id(),
            timeout = ?client.session_timeout(),
            "session with ZooKeeper established"
        );
        self.settings.metrics.zookeeper_session();
        self.lookup.set_session(client.clone());
        self.lookup.set_outage(None);
        let RegistrationCommands { state, status, .. } = &self.commands;
        let tracker = StatusTracker::new(status);
        let entry = OwnEntry::new(&client, &self.own, &tracker, history);
        let (components, components_receiver) = watch::channel(Components::default());
        let chroot = &self.settings.hosts.chroot;
        let (error, replacement) = tokio::select! {
            error = component_watcher::watch(&client, &components, &self.lookup, chroot) => {
                (error, None)
            }
            error = entry.keep(state.clone(), components_receiver) => (error, None),
            ended = self.watch_connection(&client, &tracker) => ended,
        };
        self.lookup.clear_session();
        if *state.borrow() == State::Stopped {
            status.send_replace(RegistrationStatus::Withdrawn);
            return SessionEnd::Lost(replacement);
        }
        if !tracker.has_result() && replacement.is_none() {
            return SessionEnd::NotRegistered(error);
        }
        warn!(%error, "session with ZooKeeper lost, starting a new one");
        status.send_if_modified(|status| {
            let lost = match status {
                RegistrationStatus::Connecting | RegistrationStatus::NoZuul(_) => {
                    RegistrationStatus::Connecting
                }
                _ => RegistrationStatus::SessionLost,
            };
            mem::replace(status, lost.clone()) != lost
        });
        SessionEnd::Lost(replacement)
    }

    /// Completes a request to withdraw that is made while there is no session, and thus no entry.
    async fn withdraw_without_session(&self) -> Infallible {
        let mut state = self.commands.state.clone();
        if state.wait_for(|state| *state == State::Stopped).await.is_ok()
            && !self.lookup.has_session()
        {
            self.commands.status.send_replace(RegistrationStatus::Withdrawn);
        }
        std::future::pending().await
    }

    /// Follows the state of the connection until the session ends, or until another session could
    /// be established while the connection was lost. Returns why, and the other session.
    async fn watch_connection(
        &self,
        client: &Client,
        tracker: &StatusTracker<'_>,
    ) -> (Error, Option<Client>) {
        let mut states = client.state_watcher();
        let mut state = states.changed().await;
        loop {
            match state {
                SessionState::Disconnected => {
                    tracker.set_connected(false);
                    warn!(
                        "connection to ZooKeeper lost: running streams continue, new requests may \
                         be refused"
                    );
                    state = tokio::select! {
                        state = states.changed() => state,
                        replacement = self.replace_session() => {
                            return (Error::ConnectionLoss, Some(replacement));
                        }
                        never = self.keep_diagnosing() => match never {},
                    };
                    continue;
                }
                SessionState::SyncConnected | SessionState::ConnectedReadOnly => {
                    info!("connection to ZooKeeper restored within the session");
                    self.lookup.set_outage(None);
                    self.lookup.set_connecting(true);
                    tracker.set_connected(true);
                }
                SessionState::Expired => return (Error::SessionExpired, None),
                SessionState::AuthFailed => return (Error::AuthFailed, None),
                SessionState::Closed => return (Error::ClientClosed, None),
            }
            state = states.changed().await;
        }
    }

    /// Establishes another session while the client has no connection.
    ///
    /// The client doubles its pauses between attempts without a bound, so after an outage it may
    /// sleep for as long as the outage took. Only a session shows that ZooKeeper works again: a
    /// server without a quorum accepts connections as well.
    async fn replace_session(&self) -> Client {
        sleep(RECONNECT_GRACE).await;
        self.lookup.set_connecting(false);
        loop {
            let connected = self.try_connect().await;
            // After a success, too: the client may be about to reconnect, which keeps our entry.
            sleep(equal_jitter(REPLACE_INTERVAL)).await;
            if let Ok(client) = connected {
                return client;
            }
        }
    }
}
