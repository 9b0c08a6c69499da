//! Finds out where builds run: all zones and the unzoned queue are read in one round trip. If many
//! lookups are made at the same time, several of them share a round trip.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use zookeeper_client::{Client, Error, SessionId, SessionState};

use super::build_cache::BuildCache;
use super::read::{NodeData, multi_read, pipelined_read};
use super::retry::is_connection_loss;
use crate::model::build_id::BuildId;
use crate::model::build_request::{Build, BuildLocation};
use crate::model::component::Gateway;
use crate::registry::{LookupError, Outage};

/// The parent of one node per zone (`zuul/zk/executor.py`).
const ZONES: &str = "/zuul/executor/zones";
const UNZONED: &str = "/zuul/executor/unzoned";

/// The most concurrent reads. Lookups that are made while there are so many wait, and then share a
/// read, so that many clients at one moment need few reads. With fewer concurrent reads, lookups would
/// wait for each other without a need (docs/performance.md).
///
/// Also bounds what hangs with ZooKeeper: the client keeps a request until it is answered or the
/// connection is lost, also if the session that made it has given up.
const CONCURRENT_READS: usize = 16;

/// The most builds and nodes in one read, so that it takes ZooKeeper only about a millisecond.
const BUILDS_PER_READ: usize = 64;
const NODES_PER_READ: usize = 1024;

/// Above this number, lookups that were given up are removed from the waiting ones. The others are
/// bounded by `limits.lookups`.
const WAITING_MAX: usize = 4096;

/// Time to wait for a session to be closed.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Performs lookups in the current session, and holds what that session has read of the gateways.
pub(crate) struct BuildLookup {
    client: watch::Sender<Option<Client>>,
    /// Whether a session or a connection is being established and no attempt has failed yet. Lookups
    /// wait for it, and fail immediately otherwise.
    connecting: watch::Sender<bool>,
    /// `None` until they have been read for the first time.
    gateways: watch::Sender<Option<Arc<[Gateway]>>>,
    outage: watch::Sender<Option<Outage>>,
    /// The zones as the last lookup listed them.
    zones: watch::Sender<Arc<[String]>>,
    /// ZooKeeper before 3.6 does not support multi-reads.
    multi_read: AtomicBool,
    waiting: Mutex<Vec<WaitingLookup>>,
    /// A permit is released only while `waiting` is locked and empty, so that no lookup waits without a
    /// read that will take it.
    reads: Arc<Semaphore>,
    cache: Arc<BuildCache>,
}

/// A build and the path of its request.
type FoundBuild = (String, Build);

/// The result of a lookup.
type LookupResult = Result<Option<FoundBuild>, LookupError>;

/// A lookup that waits for a read.
struct WaitingLookup {
    build: BuildId,
    result: oneshot::Sender<Result<LookupResult, Error>>,
}

impl BuildLookup {
    pub(super) fn new() -> Self {
        Self {
            client: watch::Sender::new(None),
            connecting: watch::Sender::new(true),
            gateways: watch::Sender::new(None),
            outage: watch::Sender::new(None),
            zones: watch::Sender::new(Arc::default()),
            multi_read: AtomicBool::new(true),
            waiting: Mutex::default(),
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

    /// Sets whether lookups wait for a session or a connection, or fail immediately because attempts
    /// to establish one fail.
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

    /// Reads the request of `build` in the current session.
    ///
    /// # Errors
    /// The read has failed, for all lookups that share it.
    async fn read_build(self: &Arc<Self>, build: &BuildId) -> Result<LookupResult, Error> {
        let (sender, receiver) = oneshot::channel();
        let permit = {
            let mut waiting = self.lock_waiting();
            if waiting.len() >= WAITING_MAX {
                waiting.retain(|lookup| !lookup.result.is_closed());
            }
            waiting.push(WaitingLookup { build: build.clone(), result: sender });
            Arc::clone(&self.reads).try_acquire_owned().ok()
        };
        if let Some(permit) = permit {
            tokio::spawn(Arc::clone(self).read_waiting(permit));
        }
        receiver.await.unwrap_or_else(|_| {
            Err(Error::UnexpectedError("the task that reads has panicked".to_owned()))
        })
    }

    /// Reads until no lookup waits. A task of its own: those that wait may give up at any time.
    async fn read_waiting(self: Arc<Self>, permit: OwnedSemaphorePermit) {
        loop {
            let lookups = {
                let mut waiting = self.lock_waiting();
                waiting.retain(|lookup| !lookup.result.is_closed());
                if waiting.is_empty() {
                    drop(permit);
                    return;
                }
                let nodes_per_build = self.zones.borrow().len() + 1;
                let most = (NODES_PER_READ / nodes_per_build).clamp(1, BUILDS_PER_READ);
                let count = waiting.len().min(most);
                waiting.drain(..count).collect::<Vec<_>>()
            };
            let builds: Vec<_> = lookups.iter().map(|lookup| lookup.build.clone()).collect();
            let mut results = self.read_queues(&builds).await.map(Vec::into_iter);
            for lookup in lookups {
                let result = match &mut results {
                    Ok(results) => Ok(results.next().expect("one result per build")),
                    Err(error) => Err(error.clone()),
                };
                // The lookup may have been given up.
                let _ = lookup.result.send(result);
            }
        }
    }

    fn lock_waiting(&self) -> MutexGuard<'_, Vec<WaitingLookup>> {
        // Consistent after each statement, so it can be used after a panic.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the requests of `builds` from all queues. Returns one result per build.
    async fn read_queues(&self, builds: &[BuildId]) -> Result<Vec<LookupResult>, Error> {
        let client = self.client.borrow().clone().ok_or(Error::ClientClosed)?;
        let known = self.zones.borrow().clone();
        let paths = |build| {
            let zoned = known.iter().map(move |zone| request_path(zone, build));
            zoned.chain([format!("{UNZONED}/requests/{build}")])
        };
        let paths: Vec<_> = builds.iter().flat_map(paths).collect();
        let (zones, requests) = self.read(&client, true, &paths).await?;
        let mut results = first_builds(&paths, requests, known.len() + 1);
        if *zones == *known {
            return Ok(results);
        }
        let new_zones: Vec<_> =
            zones.iter().filter(|zone| !known.contains(zone)).cloned().collect();
        self.zones.send_replace(zones.into());
        let is_missing = |result: &LookupResult| !matches!(result, Ok(Some(_)));
        let missing = builds.iter().zip(&results).filter(|(_, result)| is_missing(result));
        let paths: Vec<_> = missing
            .flat_map(|(build, _)| new_zones.iter().map(move |zone| request_path(zone, build)))
            .collect();
        if paths.is_empty() {
            return Ok(results);
        }
        let (_, requests) = self.read(&client, false, &paths).await?;
        let found = first_builds(&paths, requests, new_zones.len());
        for (result, found) in results.iter_mut().filter(|result| is_missing(result)).zip(found) {
            if !matches!(found, Ok(None)) {
                *result = found;
            }
        }
        Ok(results)
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

/// Returns one result per build: the first valid request of each `per_build` ones, which were read from
/// `paths`.
fn first_builds(paths: &[String], requests: Vec<NodeData>, per_build: usize) -> Vec<LookupResult> {
    let mut nodes = paths.iter().zip(requests);
    (0..paths.len() / per_build).map(|_| first_build(nodes.by_ref().take(per_build))).collect()
}

/// Returns the first build of `nodes`. A request that cannot be read matters only if there is no other
/// one.
fn first_build<'a>(nodes: impl Iterator<Item = (&'a String, NodeData)>) -> LookupResult {
    let mut result = Ok(None);
    for (path, request) in nodes {
        // All nodes of a build must be taken from the iterator.
        if matches!(result, Ok(Some(_))) {
            continue;
        }
        let error = match request.map(|request| Build::from_json(&request)) {
            Ok(Ok(Some(build))) => {
                result = Ok(Some((path.clone(), build)));
                continue;
            }
            Ok(Ok(None)) => continue,
            Ok(Err(error)) => LookupError::Malformed(error.to_string()),
            // Affects this node only. Reporting it as unavailable would let clients that access rules
            // deny the build tell it from a missing one.
            Err(Error::NoAuth) => LookupError::Malformed(Error::NoAuth.to_string()),
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

    /// The builds in `requests`, which were read from the paths "0", "1", ...
    fn builds(requests: Vec<NodeData>, per_build: usize) -> Vec<LookupResult> {
        let paths: Vec<_> = (0..requests.len()).map(|number| number.to_string()).collect();
        first_builds(&paths, requests, per_build)
    }

    /// The one build in `requests`.
    fn first(requests: Vec<NodeData>) -> LookupResult {
        let per_build = requests.len();
        builds(requests, per_build).remove(0)
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

    #[test]
    fn each_build_gets_the_result_of_its_own_nodes() {
        let requests =
            nodes(&[QUEUED_JSON, QUEUED_JSON, b"", b"garbage", b"", QUEUED_JSON, b"", b""]);
        let results = builds(requests, 2);
        assert_eq!(results[0], Ok(Some(("0".to_owned(), QUEUED))));
        assert!(matches!(results[1], Err(LookupError::Malformed(_))), "{:?}", results[1]);
        assert_eq!(results[2], Ok(Some(("5".to_owned(), QUEUED))));
        assert_eq!(results[3], Ok(None));
        assert_eq!(results.len(), 4);
    }
}
