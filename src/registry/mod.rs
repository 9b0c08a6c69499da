//! What the gateway knows of the system: its own entry, the other gateways, where a build runs.
//!
//! Two registries have the same interface: Zuul's, in ZooKeeper, and one in memory for
//! `zuul-fingergw demo`. Either is split in two: a [`Registry`] answers questions and is handed
//! to every connection; a [`Registration`] is this gateway's own entry, and belongs to the daemon.

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

/// Answers where a build runs and which gateways there are. Cheap to clone.
#[derive(Clone)]
pub(crate) enum Registry {
    /// Zuul's own.
    ZooKeeper(Arc<zookeeper::build_lookup::BuildLookup>),
    /// In this process.
    #[cfg(any(feature = "demo", test))]
    InMemory(Arc<in_memory::InMemoryRegistry>),
}

/// Why the registry has no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LookupError {
    /// ZooKeeper does not answer, or not in time: what it was instead.
    Unavailable(String),
    /// The build's entry is there, but it cannot be read or understood: what is wrong with it.
    Malformed(String),
}

impl Registry {
    /// Where `build` runs; `None` if no queue knows it. The caller sets the deadline.
    pub(crate) async fn find_build(&self, build: &BuildId) -> Result<Option<Build>, LookupError> {
        match self {
            Self::ZooKeeper(lookup) => lookup.find_build(build).await,
            #[cfg(any(feature = "demo", test))]
            Self::InMemory(embedded) => Ok(embedded.find_build(build)),
        }
    }

    /// The same, asking the registry itself even if the build is kept.
    pub(crate) async fn find_build_uncached(
        &self,
        build: &BuildId,
    ) -> Result<Option<Build>, LookupError> {
        match self {
            Self::ZooKeeper(lookup) => lookup.find_build_uncached(build).await,
            #[cfg(any(feature = "demo", test))]
            Self::InMemory(embedded) => Ok(embedded.find_build(build)),
        }
    }

    /// The gateways that can be dialed now, as last heard; none until they have been read once.
    pub(crate) fn gateways(&self) -> Arc<[Gateway]> {
        match self {
            Self::ZooKeeper(lookup) => lookup.gateways(),
            #[cfg(any(feature = "demo", test))]
            Self::InMemory(embedded) => embedded.gateways(),
        }
    }

    /// Waits until the gateways have been read once. The caller sets the deadline.
    pub(crate) async fn wait_for_gateways(&self) {
        match self {
            Self::ZooKeeper(lookup) => lookup.wait_for_gateways().await,
            #[cfg(any(feature = "demo", test))]
            Self::InMemory(_) => {}
        }
    }

    /// Why there is no working session with the registry; `None` while there is one, and until the
    /// first attempt has failed.
    pub(crate) fn outage(&self) -> Option<Outage> {
        match self {
            Self::ZooKeeper(lookup) => lookup.outage(),
            #[cfg(any(feature = "demo", test))]
            Self::InMemory(_) => None,
        }
    }
}

/// Why there is no working session with the registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outage {
    /// When it was first noticed.
    pub(crate) since: Instant,
    /// The last known cause, for the operator: a phrase for each server.
    pub(crate) cause: String,
}

/// Where this gateway's own entry stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum RegistrationStatus {
    /// No session yet.
    Connecting,
    /// There is a session, but no service of Zuul has ever registered below this node.
    NoZuul(String),
    /// The entry is there, under this name.
    Registered(String),
    /// The connection is gone, the session and the entry may still live.
    ConnectionLost,
    /// The session is gone and the entry with it; a new one is on its way.
    SessionLost,
    /// The entry has been taken out, as asked.
    Withdrawn,
}

impl fmt::Display for RegistrationStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connecting => f.write_str("connecting"),
            Self::NoZuul(node) => write!(
                f,
                "connected, but no scheduler or executor is registered below {node}: is the path \
                 after the last server in zookeeper.hosts right?"
            ),
            Self::Registered(name) => write!(f, "registered as {name}"),
            Self::ConnectionLost => f.write_str("connection lost"),
            Self::SessionLost => f.write_str("session lost"),
            Self::Withdrawn => f.write_str("withdrawn"),
        }
    }
}

/// This gateway's own entry: kept in the registry by a task, for as long as this lives.
pub(crate) struct Registration {
    wanted: watch::Sender<State>,
    standing: watch::Receiver<RegistrationStatus>,
    close: CancellationToken,
    keeper: JoinHandle<()>,
}

impl Registration {
    /// Says that the gateway serves.
    pub(crate) fn running(&self) {
        self.wanted.send_replace(State::Running);
    }

    /// Follows what the entry says, or is to say.
    pub(crate) fn state(&self) -> watch::Receiver<State> {
        self.wanted.subscribe()
    }

    /// Follows where the entry stands.
    pub(crate) fn status(&self) -> watch::Receiver<RegistrationStatus> {
        self.standing.clone()
    }

    /// Takes the entry out: `stopped`, then gone. Look-ups go on. Waits for it up to `patience`
    /// and says whether it is out; if not, it goes with the session.
    pub(crate) async fn withdraw(&mut self, patience: Duration) -> bool {
        self.wanted.send_replace(State::Stopped);
        let withdrawn =
            self.standing.wait_for(|standing| *standing == RegistrationStatus::Withdrawn);
        matches!(tokio::time::timeout(patience, withdrawn).await, Ok(Ok(_)))
    }

    /// Ends the session with the registry, waiting for it up to `patience`.
    pub(crate) async fn close(self, patience: Duration) {
        self.close.cancel();
        // Past its patience the task ends with the process, and the session by its timeout.
        let _ = tokio::time::timeout(patience, self.keeper).await;
    }
}

/// The keeper's end of a [`Registration`].
struct RegistrationCommands {
    wanted: watch::Receiver<State>,
    standing: watch::Sender<RegistrationStatus>,
    close: CancellationToken,
}

/// Makes a registration kept by the task that `keeper` makes of its orders.
fn registration<Keeper>(keeper: impl FnOnce(RegistrationCommands) -> Keeper) -> Registration
where
    Keeper: Future<Output = ()> + Send + 'static,
{
    let (wanted, wanted_seen) = watch::channel(State::Initializing);
    let (standing, standing_seen) = watch::channel(RegistrationStatus::Connecting);
    let close = CancellationToken::new();
    let orders = RegistrationCommands { wanted: wanted_seen, standing, close: close.clone() };
    let keeper = tokio::spawn(keeper(orders));
    Registration { wanted, standing: standing_seen, close, keeper }
}
