//! What this gateway knows of the Zuul system: where builds run, which other gateways there are,
//! and its own registration.
//!
//! There are two implementations: Zuul's registry in ZooKeeper, and one in memory for the demo.
//! Each has two sides. A [`Registry`] answers lookups and is shared by all sessions. A
//! [`Registration`] is the entry of this gateway and belongs to the daemon.

#[cfg(any(feature = "demo", test))]
pub(crate) mod in_memory;
pub(crate) mod zookeeper;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::model::build_id::BuildId;
use crate::model::build_request::Build;
use crate::model::component::{Gateway, State};
use crate::model::json::EntryError;

/// Finds builds and gateways. Cheap to clone.
#[derive(Clone)]
pub(crate) enum Registry {
    ZooKeeper(Arc<zookeeper::BuildLookup>),
    #[cfg(any(feature = "demo", test))]
    InMemory(Arc<in_memory::InMemoryRegistry>),
}

/// Why a lookup has no result.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LookupError {
    /// There is no session with ZooKeeper, or it does not answer.
    #[error("ZooKeeper is unavailable: {0}")]
    Unavailable(String),
    /// There is a build request, but it cannot be read or is invalid.
    #[error("the build request cannot be used: {0}")]
    Malformed(#[source] MalformedRequest),
}

/// Why a build request cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum MalformedRequest {
    #[error(transparent)]
    Content(EntryError),
    #[error("its ACL does not let this gateway read it")]
    NoAuth,
}

impl Registry {
    /// Finds where `build` runs. Returns `None` if it is in no queue. The caller sets the deadline.
    pub(crate) async fn find_build(&self, build: &BuildId) -> Result<Option<Build>, LookupError> {
        match self {
            Self::ZooKeeper(lookup) => lookup.find_build(build).await,
            #[cfg(any(feature = "demo", test))]
            Self::InMemory(registry) => Ok(registry.find_build(build)),
        }
    }

    /// As [`Self::find_build`], without using the cache.
    pub(crate) async fn find_build_uncached(
        &self,
        build: &BuildId,
    ) -> Result<Option<Build>, LookupError> {
        match self {
            Self::ZooKeeper(lookup) => lookup.find_build_uncached(build).await,
            #[cfg(any(feature = "demo", test))]
            Self::InMemory(registry) => Ok(registry.find_build(build)),
        }
    }

    /// The gateways that can be dialed, as last read; none before the first read.
    pub(crate) fn gateways(&self) -> Arc<[Gateway]> {
        match self {
            Self::ZooKeeper(lookup) => lookup.gateways(),
            #[cfg(any(feature = "demo", test))]
            Self::InMemory(registry) => registry.gateways(),
        }
    }

    /// Waits until the gateways have been read for the first time. The caller sets the deadline.
    pub(crate) async fn wait_for_gateways(&self) {
        match self {
            Self::ZooKeeper(lookup) => lookup.wait_for_gateways().await,
            #[cfg(any(feature = "demo", test))]
            Self::InMemory(_) => {}
        }
    }

    /// Why there is no working session with ZooKeeper. `None` while there is one, and until the
    /// first attempt has failed.
    pub(crate) fn outage(&self) -> Option<Outage> {
        match self {
            Self::ZooKeeper(lookup) => lookup.outage(),
            #[cfg(any(feature = "demo", test))]
            Self::InMemory(_) => None,
        }
    }
}

/// Why there is no working session with ZooKeeper.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outage {
    /// When it was noticed.
    pub(crate) since: Instant,
    /// The last known cause, for the operator: one phrase per server.
    pub(crate) cause: String,
}

/// The state of this gateway's registration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum RegistrationStatus {
    /// There has been no session yet.
    Connecting,
    /// There is a session, but no component of Zuul has ever registered below this node.
    NoZuul(String),
    /// The entry exists and has this name.
    Registered(String),
    /// The connection is lost. Session and entry may still exist.
    ConnectionLost,
    /// The session is lost, and the entry with it. A new session is being established.
    SessionLost,
    /// The entry was deleted as requested.
    Withdrawn,
}

impl fmt::Display for RegistrationStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connecting => f.write_str("connecting"),
            Self::NoZuul(node) => write!(
                f,
                "connected, but no scheduler or executor is registered below {node}: check the \
                 path after the last server in zookeeper.hosts"
            ),
            Self::Registered(name) => write!(f, "registered as {name}"),
            Self::ConnectionLost => f.write_str("connection lost"),
            Self::SessionLost => f.write_str("session lost"),
            Self::Withdrawn => f.write_str("withdrawn"),
        }
    }
}

/// The entry of this gateway in the component registry, kept by a task.
pub(crate) struct Registration {
    state: watch::Sender<State>,
    status: watch::Receiver<RegistrationStatus>,
    close: CancellationToken,
    task: JoinHandle<()>,
}

impl Registration {
    /// Spawns the task that `keep_entry` returns. It receives the commands.
    fn spawn<Task>(keep_entry: impl FnOnce(RegistrationCommands) -> Task) -> Self
    where
        Task: Future<Output = ()> + Send + 'static,
    {
        let (state, state_receiver) = watch::channel(State::Initializing);
        let (status_sender, status) = watch::channel(RegistrationStatus::Connecting);
        let close = CancellationToken::new();
        let commands = RegistrationCommands {
            state: state_receiver,
            status: status_sender,
            close: close.clone(),
        };
        let task = tokio::spawn(keep_entry(commands));
        Self { state, status, close, task }
    }

    /// Announces that the gateway serves.
    pub(crate) fn set_running(&self) {
        self.state.send_replace(State::Running);
    }

    /// The state that the entry announces, or will announce.
    pub(crate) fn state(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }

    pub(crate) fn status(&self) -> watch::Receiver<RegistrationStatus> {
        self.status.clone()
    }

    /// Announces `stopped`, then deletes the entry. Lookups continue to work. Waits at most
    /// `timeout` and returns whether the entry is deleted; if not, it ends with the session.
    pub(crate) async fn withdraw(&mut self, timeout: Duration) -> bool {
        self.state.send_replace(State::Stopped);
        let withdrawn = self.status.wait_for(|status| *status == RegistrationStatus::Withdrawn);
        matches!(tokio::time::timeout(timeout, withdrawn).await, Ok(Ok(_)))
    }

    /// Closes the session with the registry. Waits at most `timeout`.
    pub(crate) async fn close(self, timeout: Duration) {
        self.close.cancel();
        // On a timeout the task ends with the process, and ZooKeeper expires the session.
        let _ = tokio::time::timeout(timeout, self.task).await;
    }
}

/// The task's side of a [`Registration`].
struct RegistrationCommands {
    /// The state to announce.
    state: watch::Receiver<State>,
    status: watch::Sender<RegistrationStatus>,
    /// Cancelled when the session must be closed.
    close: CancellationToken,
}
