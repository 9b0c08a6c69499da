//! Finds out where builds run: all zones and the unzoned queue are read in one round trip.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, watch};
use zookeeper_client::{Client, Error, SessionId, SessionState};

use super::build_cache::BuildCache;
use super::read::{NodeData, multi_read, pipelined_read};
use super::retry::is_connection_loss;
use crate::model::build_id::BuildId;
use crate::model::build_request::{Build, BuildLocation};
use crate::model::component::Gateway;
use crate::registry::{LookupError, MalformedRequest, Outage};

/// The parent of one node per zone (`zuul/zk/executor.py`).
const ZONES: &str = "/zuul/executor/zones";
const UNZONED: &str = "/zuul/executor/unzoned";

/// The most concurrent reads; further lookups wait. Bounds what hangs with ZooKeeper: the client
/// keeps a request until it is answered or the connection is lost, also if the session that made it
/// has given up.
const CONCURRENT_READS: usize = 16;

/// Time to wait for a session to be closed.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Performs lookups in the current session, and holds what that session has read of the gateways.
pub(crate) struct BuildLookup {
    client: watch::Sender<Option<Client>>,
    /// Whether a session or a connection is being established and no attempt has failed yet.
    /// Lookups wait for it, and fail immediately otherwise.
    connecting: watch::Sender<bool>,
    /// `None` until they have been read for the first time.
    gateways: watch::Sender<Option<Arc<[Gateway]>>>,
    outage: watch::Sender<Option<Outage>>,
    /// The zones as the last lookup listed them.
    zones: watch::Sender<Arc<[String]>>,
    /// ZooKeeper before 3.6 does not support multi-reads.
    multi_read: AtomicBool,
    /// [`CONCURRENT_READS`] permits.
    reads: Arc<Semaphore>,
    cache: Arc<BuildCache>,
}

/// A build and the path of its request.
type FoundBuild = (String, Build);

/// The result of a lookup.
type LookupResult = Result<Option<FoundBuild>, LookupError>;

impl BuildLookup {
    pub(super) fn new() -> Self {
        Self {
            client: watch::Sender::new(None),
            connecting: watch::Sender::new(true),
            gateways: watch::Sender::new(None),
            outage: watch::Sender::new(None),
            zones: watch::Sender::new(Arc::default()),
            multi_read: AtomicBool::new(true),
            reads: Arc::new(Semaphore::new(CONCURRENT_READS)),
            cache: Arc::default(),
        }
    }

    /// Uses the session of `client` from now on.
    pub(super) fn set_session(&self, client: Client) {
        // The server may be another one, and newer.
        self.multi_read.store(true, Ordering::Relaxed);
        self.client.send_replace(Some(client));
        self.connecting.send_replace(true);
    }

    pub(super) fn clear_session(&self) {
        self.client.send_replace(None);
    }

    pub(super) fn has_session(&self) -> bool {
        self.client.borrow().is_some()
    }

    /// Closes the session, and waits briefly for ZooKeeper to confirm that.
    pub(super) async fn close_session(&self) {
        let Some(client) = self.client.send_replace(None) else { return };
        let mut states = client.state_watcher();
        drop(client);
        let closed = async { while !states.changed().await.is_terminated() {} };
        // On a timeout ZooKeeper expires the session. Our entry is deleted already.
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, closed).await;
    }

    /// Sets whether lookups wait for a session or a connection, or fail immediately because
    /// attempts to establish one fail.
    pub(super) fn set_connecting(&self, connecting: bool) {
        self.connecting.send_replace(connecting);
    }

    pub(super) fn set_gateways(&self, gateways: Arc<[Gateway]>) {
        self.gateways.send_replace(Some(gateways));
    }

    /// See [`crate::registry::Registry::gateways`].
    pub(crate) fn gateways(&self) -> Arc<[Gateway]> {
        self.gateways.borrow().clone().unwrap_or_default()
    }

    /// See [`crate::registry::Registry::wait_for_gateways`].
    pub(crate) async fn wait_for_gateways(&self) {
        // Cannot fail: `self` holds the sender.
        let _ = self.gateways.subscribe().wait_for(Option::is_some).await;
    }

    /// Sets why there is no working session; `None` if there is one.
    pub(super) fn set_outage(&self, cause: Option<String>) {
        self.outage.send_modify(|outage| {
            let since = outage.as_ref().map_or_else(Instant::now, |outage| outage.since);
            *outage = cause.map(|cause| Outage { since, cause });
        });
    }

    /// See [`crate::registry::Registry::outage`].
    pub(crate) fn outage(&self) -> Option<Outage> {
        self.outage.borrow().clone()
    }

    /// Reads the zones, so that the first lookup finds all builds in one round trip.
    pub(super) async fn load_zones(&self, client: &Client) {
        // If it fails, the first lookup takes two.
        if let Ok((zones, _)) = self.read(client, true, &[]).await {
            self.zones.send_replace(zones.into());
        }
    }

    /// See [`crate::registry::Registry::find_build`].
    pub(crate) async fn find_build(
        self: &Arc<Self>,
        build: &BuildId,
    ) -> Result<Option<Build>, LookupError> {
        let client = self.session(None).await?;
        match self.cache.get(&client, build) {
            Some(found) => Ok(Some(found)),
            None => self.find_in_session(client, build).await,
        }
    }

    /// See [`crate::registry::Registry::find_build_uncached`].
    pub(crate) async fn find_build_uncached(
        self: &Arc<Self>,
        build: &BuildId,
    ) -> Result<Option<Build>, LookupError> {
        let client = self.session(None).await?;
        self.find_in_session(client, build).await
    }

    /// Looks up `build` with `client`, or with the client of the next session if its session ends.
    async fn find_in_session(
        self: &Arc<Self>,
        mut client: Client,
        build: &BuildId,
    ) -> Result<Option<Build>, LookupError> {
        loop {
            self.wait_connected(&client).await?;
            let error = match self.read_build(build).await {
                Ok(found) => {
                    let Some((path, found)) = found? else { return Ok(None) };
                    if matches!(found.location, BuildLocation::Executor(_)) {
                        self.cache.found(build, path, client, self.client.subscribe());
                    }
                    return Ok(Some(found));
                }
                Err(error) => error,
            };
            if !self.is_current(&client) {
                client = self.session(Some(client.session_id())).await?;
            } else if !is_connection_loss(&error) {
                return Err(LookupError::Unavailable(error.to_string()));
            }
        }
    }

    /// Returns the current client, waiting while a session other than `ended` is being established.
    async fn session(&self, ended: Option<SessionId>) -> Result<Client, LookupError> {
        let is_usable = |client: &Client| Some(client.session_id()) != ended;
        if let Some(client) = self.client.borrow().clone().filter(is_usable) {
            return Ok(client);
        }
        let mut clients = self.client.subscribe();
        let mut connecting = self.connecting.subscribe();
        let client = tokio::select! {
            biased;
            Ok(client) = clients.wait_for(|client| client.as_ref().is_some_and(is_usable)) => {
                client.clone()
            }
            _ = connecting.wait_for(|connecting| !connecting) => None,
        };
        client.ok_or_else(|| LookupError::Unavailable("no session".to_owned()))
    }

    /// Whether `client` is that of the current session, which has not ended.
    fn is_current(&self, client: &Client) -> bool {
        let current = self.client.borrow().as_ref().map(Client::session_id);
        current == Some(client.session_id()) && !client.state().is_terminated()
    }

    /// Waits while `client` is reconnecting. Does not wait for the end of an outage.
    async fn wait_connected(&self, client: &Client) -> Result<(), LookupError> {
        if client.state() != SessionState::Disconnected {
            return Ok(());
        }
        let mut states = client.state_watcher();
        let mut connecting = self.connecting.subscribe();
        let connected = async {
            let mut state = client.state();
            while state == SessionState::Disconnected {
                state = states.changed().await;
            }
        };
        tokio::select! {
            biased;
            () = connected => Ok(()),
            _ = connecting.wait_for(|connecting| !connecting) => {
                Err(LookupError::Unavailable("no connection".to_owned()))
            }
        }
    }

    /// Reads the request of `build` in the current session, after earlier reads if there are many.
    async fn read_build(self: &Arc<Self>, build: &BuildId) -> Result<LookupResult, Error> {
        let permit = Arc::clone(&self.reads).acquire_owned().await;
        let lookup = Arc::clone(self);
        let build = build.clone();
        // A task of its own: a lookup may be given up, but its read still occupies ZooKeeper.
        let read = tokio::spawn(async move {
            let _permit = permit;
            lookup.read_queues(&build).await
        });
        read.await.unwrap_or_else(|error| Err(Error::UnexpectedError(error.to_string())))
    }

    /// Reads the request of `build` from all queues.
    async fn read_queues(&self, build: &BuildId) -> Result<LookupResult, Error> {
        let client = self.client.borrow().clone().ok_or(Error::ClientClosed)?;
        let known = self.zones.borrow().clone();
        let mut paths: Vec<_> = known.iter().map(|zone| request_path(zone, build)).collect();
        paths.push(format!("{UNZONED}/requests/{build}"));
        let (zones, requests) = self.read(&client, true, &paths).await?;
        let result = first_build(paths, requests);
        if *zones == *known {
            return Ok(result);
        }
        let new_zones = zones.iter().filter(|zone| !known.contains(zone));
        let paths: Vec<_> = new_zones.map(|zone| request_path(zone, build)).collect();
        self.zones.send_replace(zones.into());
        if matches!(result, Ok(Some(_))) || paths.is_empty() {
            return Ok(result);
        }
        let (_, requests) = self.read(&client, false, &paths).await?;
        Ok(match first_build(paths, requests) {
            Ok(None) => result,
            found => found,
        })
    }

    /// Lists the zones if `list_zones` is set, and reads the nodes at `paths`. An error of one node
    /// does not affect the others.
    ///
    /// Fails as soon as `client` is not the current one any more: its requests may wait forever.
    async fn read(
        &self,
        client: &Client,
        list_zones: bool,
        paths: &[String],
    ) -> Result<(Vec<String>, Vec<NodeData>), Error> {
        let is_other = |current: &Option<Client>| {
            current.as_ref().map(Client::session_id) != Some(client.session_id())
        };
        let mut clients = self.client.subscribe();
        let reading = async {
            let directory = list_zones.then_some(ZONES);
            if self.multi_read.load(Ordering::Relaxed) {
                match multi_read(client, directory, paths).await {
                    Err(Error::Unimplemented) => self.multi_read.store(false, Ordering::Relaxed),
                    result => return result,
                }
            }
            pipelined_read(client, directory, paths).await
        };
        tokio::select! {
            biased;
            result = reading => result,
            _ = clients.wait_for(is_other) => Err(Error::ClientClosed),
        }
    }
}

/// The path of the request of `build` in the queue of `zone`.
fn request_path(zone: &str, build: &BuildId) -> String {
    format!("{ZONES}/{zone}/requests/{build}")
}

/// Returns the first build of `requests`, which were read from `paths`. A request that cannot be
/// read matters only if there is no other one.
fn first_build(paths: Vec<String>, requests: Vec<NodeData>) -> LookupResult {
    let mut result = Ok(None);
    for (path, request) in paths.into_iter().zip(requests) {
        let error = match request.map(|request| Build::from_json(&request)) {
            Ok(Ok(Some(build))) => return Ok(Some((path, build))),
            Ok(Ok(None)) => continue,
            Ok(Err(error)) => LookupError::Malformed(MalformedRequest::Content(error)),
            // Affects this node only. Reporting it as unavailable would let clients that access
            // rules deny the build distinguish it from a missing one.
            Err(Error::NoAuth) => LookupError::Malformed(MalformedRequest::NoAuth),
            Err(error) => LookupError::Unavailable(error.to_string()),
        };
        result = result.and(Err(error));
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUEUED_JSON: &[u8] = br#"{"worker_info": null}"#;
    const QUEUED: Build =
        Build { tenant: None, location: BuildLocation::Queued, trace_parent: None };

    fn nodes(contents: &[&[u8]]) -> Vec<NodeData> {
        contents.iter().map(|content| Ok(content.to_vec())).collect()
    }

    /// The build in `requests`, which were read from the paths "0", "1", ...
    fn first(requests: Vec<NodeData>) -> LookupResult {
        let paths = (0..requests.len()).map(|number| number.to_string()).collect();
        first_build(paths, requests)
    }

    #[test]
    fn first_valid_request_is_the_build() {
        assert_eq!(first(nodes(&[b"", b""])), Ok(None));
        let second = Ok(Some(("1".to_owned(), QUEUED)));
        assert_eq!(first(nodes(&[b"", QUEUED_JSON, QUEUED_JSON])), second);
        assert_eq!(first(nodes(&[b"garbage", QUEUED_JSON])), second);
        assert_eq!(first(vec![Err(Error::NoAuth), Ok(QUEUED_JSON.to_vec())]), second);
    }

    #[test]
    fn request_that_cannot_be_read_is_an_error_if_there_is_no_other() {
        let garbage = first(nodes(&[b"", b"garbage"]));
        assert!(matches!(garbage, Err(LookupError::Malformed(_))), "{garbage:?}");
        let denied = first(vec![Err(Error::NoAuth), Ok(Vec::new())]);
        assert!(matches!(denied, Err(LookupError::Malformed(_))), "{denied:?}");
        let expired = first(vec![Err(Error::SessionExpired), Err(Error::NoAuth)]);
        assert!(matches!(expired, Err(LookupError::Unavailable(_))), "{expired:?}");
    }
}
