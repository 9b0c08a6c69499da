//! Where a build runs: all zones and the unzoned queue asked in one round trip, in systems of very
//! many zones in two, for all builds that are asked for at the moment.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use zookeeper_client::{Client, Error, MultiReadResult, SessionId, SessionState};

use super::build_cache;
use super::build_cache::BuildCache;
use super::lookup_batcher::LookupBatcher;
use super::session::is_connection_loss;
use crate::model::build_id::BuildId;
use crate::model::build_request::{Build, BuildLocation};
use crate::model::component::Gateway;
use crate::registry::{LookupError, Outage};

/// The parent of one node per zone (`zuul/zk/executor.py`).
const ZONES: &str = "/zuul/executor/zones";
const UNZONED: &str = "/zuul/executor/unzoned";

/// Zones asked in the first round trip; up to that many zones are asked in one. In a system of more
/// the builds that people look at are mostly in a few: those where builds were found last come first,
/// and the others cost a second round trip, but only those who are not found in the first. Each node
/// that is not there costs ZooKeeper some 4 µs, so asking two hundred zones every time would cost
/// everybody more than the second trip costs a few (docs/performance.md).
const FIRST: usize = 16;

/// Nodes asked for in one multi-read, and builds: what a server reads in well under a millisecond.
const NODES: usize = 1024;
const BUILDS: usize = 64;

/// How long the end of a session is waited for.
const CLOSE_PATIENCE: Duration = Duration::from_secs(1);

/// Answers from the current session, if there is one.
pub(crate) struct BuildLookup {
    client: watch::Sender<Option<Client>>,
    /// A session, or its connection, is on its way, and no try to get it has failed yet: worth
    /// waiting for.
    hopeful: watch::Sender<bool>,
    /// `None` until they have been read once: no gateway is another thing than not knowing them.
    gateways: watch::Sender<Option<Arc<[Gateway]>>>,
    trouble: watch::Sender<Option<Outage>>,
    /// The zones of the last look-up that listed them, as each does that asks all of them, in the same
    /// round trip. It asks those it did not know in one more, so this may be old.
    zones: watch::Sender<Arc<Zones>>,
    /// ZooKeeper before 3.6 knows no multi-read; its refusal is remembered.
    multi_read: AtomicBool,
    pub(crate) places: BuildCache,
    batches: Arc<LookupBatcher<BuildId, LookupResult>>,
}

/// The zones there are.
#[derive(Default)]
struct Zones {
    /// As ZooKeeper lists them, in an order that stays as long as they do.
    listed: Vec<String>,
    /// In the order in which they are asked.
    order: Vec<String>,
}

/// A build with the path of its request, if there is one.
type LookupResult = Result<(String, Option<Build>), LookupError>;

impl BuildLookup {
    pub(crate) fn new() -> Self {
        Self {
            client: watch::Sender::new(None),
            hopeful: watch::Sender::new(true),
            gateways: watch::Sender::new(None),
            trouble: watch::Sender::new(None),
            zones: watch::Sender::default(),
            multi_read: AtomicBool::new(true),
            places: BuildCache::default(),
            batches: Arc::default(),
        }
    }

    /// Answers from `client` from now on.
    pub(crate) fn begin_session(&self, client: Client) {
        // The server may be another one, and newer.
        self.multi_read.store(true, Ordering::Relaxed);
        self.client.send_replace(Some(client));
        self.hopeful.send_replace(true);
    }

    /// Learns the zones, so that already the first look-up asks them all at once.
    pub(crate) async fn learn_zones(&self, client: &Client) {
        // Without them it asks twice.
        if let Ok((zones, _)) = self.read(client, Some(ZONES), &[]).await {
            self.zones.send_replace(Arc::new(Zones { order: zones.clone(), listed: zones }));
        }
    }

    /// The current session's client.
    pub(crate) fn client(&self) -> Option<Client> {
        self.client.borrow().clone()
    }

    /// The current session's client, waiting for the session that may be there in a moment: at the
    /// start, and when one was lost, which is `ended`. Whoever had to wait for a restart is not to
    /// hear of it.
    async fn session(&self, ended: Option<SessionId>) -> Result<Client, LookupError> {
        let is_another = |client: &Client| Some(client.session_id()) != ended;
        if let Some(client) = self.client().filter(is_another) {
            return Ok(client);
        }
        let (mut clients, mut hopeful) = (self.client.subscribe(), self.hopeful.subscribe());
        let client = tokio::select! {
            biased;
            Ok(client) = clients.wait_for(|client| client.as_ref().is_some_and(is_another)) => client.clone(),
            _ = hopeful.wait_for(|hopeful| !hopeful) => None,
        };
        client.ok_or_else(|| LookupError::Unavailable("no session".to_owned()))
    }

    /// Whether answers of `client` still count: neither has its session ended, nor was it given up for
    /// another one.
    fn is_current(&self, client: &Client) -> bool {
        let current = self.client.borrow().as_ref().map(Client::session_id);
        current == Some(client.session_id()) && !client.state().is_terminated()
    }

    /// Whether look-ups wait for a session or a connection, or are told at once that there is none:
    /// so while tries to get one fail.
    pub(crate) fn hope(&self, hopeful: bool) {
        self.hopeful.send_replace(hopeful);
    }

    /// Waits for a connection; not for one that will never be, nor for one that is long overdue.
    async fn connected(&self, client: &Client) -> Result<(), LookupError> {
        if client.state() != SessionState::Disconnected {
            return Ok(());
        }
        let mut states = client.state_watcher();
        let mut hopeful = self.hopeful.subscribe();
        let connected = async {
            let mut state = client.state();
            while state == SessionState::Disconnected {
                state = states.changed().await;
            }
        };
        tokio::select! {
            biased;
            () = connected => Ok(()),
            _ = hopeful.wait_for(|hopeful| !hopeful) => {
                Err(LookupError::Unavailable("no connection".to_owned()))
            }
        }
    }

    pub(crate) fn has_session(&self) -> bool {
        self.client.borrow().is_some()
    }

    pub(crate) fn forget_session(&self) {
        self.client.send_replace(None);
    }

    /// Ends the session and waits a moment for ZooKeeper to know.
    pub(crate) async fn end_session(&self) {
        let Some(client) = self.client.send_replace(None) else { return };
        let mut states = client.state_watcher();
        drop(client);
        let ended = async { while !states.changed().await.is_terminated() {} };
        // Not ended in time: it ends by its timeout, and the entry is out already.
        let _ = tokio::time::timeout(CLOSE_PATIENCE, ended).await;
    }

    pub(crate) fn set_gateways(&self, gateways: Arc<[Gateway]>) {
        self.gateways.send_replace(Some(gateways));
    }

    pub(crate) fn gateways(&self) -> Arc<[Gateway]> {
        self.gateways.borrow().clone().unwrap_or_default()
    }

    /// See [`crate::registry::Registry::wait_for_gateways`].
    pub(crate) async fn wait_for_gateways(&self) {
        // Cannot fail: the sender is ours.
        let _ = self.gateways.subscribe().wait_for(Option::is_some).await;
    }

    /// Notes why there is no working session, or that there is one again.
    pub(crate) fn set_outage(&self, cause: Option<String>) {
        self.trouble.send_modify(|trouble| {
            let since = trouble.as_ref().map_or_else(Instant::now, |before| before.since);
            *trouble = cause.map(|cause| Outage { since, cause });
        });
    }

    /// See [`crate::registry::Registry::trouble`].
    pub(crate) fn outage(&self) -> Option<Outage> {
        self.trouble.borrow().clone()
    }

    /// See [`crate::registry::Registry::find_build`].
    ///
    /// A request that has been handed to the client stays in its queue until ZooKeeper answers or
    /// the session ends. So nothing is handed over while there is no connection, and no more than a
    /// few batches.
    pub(crate) async fn find_build(
        self: &Arc<Self>,
        build: &BuildId,
    ) -> Result<Option<Build>, LookupError> {
        self.find(build, true).await
    }

    /// See [`crate::registry::Registry::find_build_uncached`].
    pub(crate) async fn find_build_uncached(
        self: &Arc<Self>,
        build: &BuildId,
    ) -> Result<Option<Build>, LookupError> {
        self.find(build, false).await
    }

    async fn find(
        self: &Arc<Self>,
        build: &BuildId,
        may_be_kept: bool,
    ) -> Result<Option<Build>, LookupError> {
        let mut client = self.session(None).await?;
        loop {
            match self.find_with(&client, build, may_be_kept).await {
                // It ended while it was asked: the next one may be there in a moment.
                Err(LookupError::Unavailable(_)) if !self.is_current(&client) => {
                    client = self.session(Some(client.session_id())).await?;
                }
                found => return found,
            }
        }
    }

    async fn find_with(
        self: &Arc<Self>,
        client: &Client,
        build: &BuildId,
        may_be_kept: bool,
    ) -> Result<Option<Build>, LookupError> {
        if may_be_kept && let Some(kept) = self.places.kept(client, build) {
            return Ok(Some(kept));
        }
        self.connected(client).await?;
        let most = (NODES / (self.zones.borrow().order.len() + 1)).clamp(1, BUILDS);
        let this = Arc::clone(self);
        let trip = move |builds: Vec<BuildId>| {
            let this = Arc::clone(&this);
            async move {
                let located = this.locate(&builds).await;
                located.unwrap_or_else(|away| vec![Err(away); builds.len()])
            }
        };
        let located = self.batches.ask(build.clone(), most, trip).await;
        let too_many = || Err(LookupError::Unavailable("too many look-ups wait".to_owned()));
        let (path, found) = located.unwrap_or_else(too_many)?;
        let placed = matches!(found, Some(Build { location: BuildLocation::Executor(_), .. }));
        if placed && self.places.is_popular(build) {
            tokio::spawn(build_cache::keep(Arc::clone(self), client.clone(), build.clone(), path));
        }
        Ok(found)
    }

    /// Where each of `builds` runs, in their order: all zones that are known, and which there are. A
    /// build in a new one costs one more trip.
    async fn locate(&self, builds: &[BuildId]) -> Result<Vec<LookupResult>, LookupError> {
        let client =
            self.client().ok_or_else(|| LookupError::Unavailable("no session".to_owned()))?;
        let known = self.zones.borrow().clone();
        let (first, later) = known.order.split_at(FIRST.min(known.order.len()));
        let in_first = |build| {
            let zoned = first.iter().map(move |zone| request_in(zone, build));
            zoned.chain([format!("{UNZONED}/requests/{build}")])
        };
        let first_paths: Vec<_> = builds.iter().flat_map(in_first).collect();
        let mut hits = Vec::new();
        let listing = later.is_empty().then_some(ZONES);
        let (mut zones, requests) = self.read(&client, listing, &first_paths).await?;
        let mut located = each(&first_paths, requests, first.len() + 1);
        if !later.is_empty() {
            if located.iter().all(is_there) {
                return Ok(located);
            }
            let paths = in_each(missing(builds, &located), later);
            let (listed, requests) = self.read(&client, Some(ZONES), &paths).await?;
            hits.extend(complete(&mut located, later, &paths, requests));
            zones = listed;
        }
        if zones != known.listed && !located.iter().all(is_there) {
            let fresh = zones.iter().filter(|zone| !known.order.contains(zone));
            let fresh: Vec<_> = fresh.cloned().collect();
            if !fresh.is_empty() {
                let paths = in_each(missing(builds, &located), &fresh);
                let (_, requests) = self.read(&client, None, &paths).await?;
                hits.extend(complete(&mut located, &fresh, &paths, requests));
            }
        }
        if zones != known.listed || !hits.is_empty() {
            self.zones.send_modify(|known| {
                let order = reordered(&known.order, &zones, &hits);
                *known = Arc::new(Zones { order, listed: zones });
            });
        }
        Ok(located)
    }

    /// Reads the children of `directory` and the data of `paths`, missing nodes as empty. A node
    /// that cannot be read concerns nobody else.
    ///
    /// Ends with the session, also with one that is given up: what its client has been asked may wait
    /// there for long, and whoever asks for the same later would wait along.
    async fn read(
        &self,
        client: &Client,
        directory: Option<&str>,
        paths: &[String],
    ) -> Result<(Vec<String>, Vec<Data>), LookupError> {
        let is_over = |now: &Option<Client>| {
            now.as_ref().map(Client::session_id) != Some(client.session_id())
        };
        let mut clients = self.client.subscribe();
        tokio::select! {
            biased;
            answer = self.read_on(client, directory, paths) => answer,
            _ = clients.wait_for(is_over) => Err(LookupError::Unavailable("session given up".to_owned())),
        }
    }

    async fn read_on(
        &self,
        client: &Client,
        directory: Option<&str>,
        paths: &[String],
    ) -> Result<(Vec<String>, Vec<Data>), LookupError> {
        loop {
            let multi_read = self.multi_read.load(Ordering::Relaxed);
            let answer = if multi_read {
                read_at_once(client, directory, paths).await
            } else {
                read_pipelined(client, directory, paths).await
            };
            match answer {
                Ok(answer) => return Ok(answer),
                Err(Error::Unimplemented) if multi_read => {
                    self.multi_read.store(false, Ordering::Relaxed);
                }
                Err(error) if is_connection_loss(&error) => {}
                Err(error) => return Err(LookupError::Unavailable(error.to_string())),
            }
        }
    }
}

/// The zones that there are `now`, those with `hits` first and then in their order so far.
fn reordered(known: &[String], now: &[String], hits: &[String]) -> Vec<String> {
    let mut order: Vec<String> = Vec::with_capacity(now.len());
    for zone in hits.iter().chain(known).chain(now) {
        if now.contains(zone) && !order.contains(zone) {
            order.push(zone.clone());
        }
    }
    order
}

/// Whether `path` is that of a request in the queue of `zone`.
fn is_in(path: &str, zone: &str) -> bool {
    let rest = path.strip_prefix(ZONES).and_then(|rest| rest.strip_prefix('/'));
    rest.and_then(|rest| rest.strip_prefix(zone)).is_some_and(|rest| rest.starts_with('/'))
}

fn request_in(zone: &str, build: &BuildId) -> String {
    format!("{ZONES}/{zone}/requests/{build}")
}

/// Those of `builds` that have not been `located`.
fn missing<'a>(
    builds: &'a [BuildId],
    located: &'a [LookupResult],
) -> impl Iterator<Item = &'a BuildId> {
    builds.iter().zip(located).filter(|(_, located)| !is_there(located)).map(|(build, _)| build)
}

/// The requests of each of `builds` in each of `zones`.
fn in_each<'a>(builds: impl Iterator<Item = &'a BuildId>, zones: &[String]) -> Vec<String> {
    builds.flat_map(|build| zones.iter().map(move |zone| request_in(zone, build))).collect()
}

/// Adds to `located` what `requests`, read from `paths` in `zones`, say of those that are missing.
/// Returns the zones where they are.
fn complete(
    located: &mut [LookupResult],
    zones: &[String],
    paths: &[String],
    requests: Vec<Data>,
) -> Vec<String> {
    let mut hits = Vec::new();
    let missing = located.iter_mut().filter(|located| !is_there(located));
    for (located, elsewhere) in missing.zip(each(paths, requests, zones.len())) {
        if let Ok((path, Some(_))) = &elsewhere {
            hits.extend(zones.iter().find(|zone| is_in(path, zone)).cloned());
        }
        if !matches!(elsewhere, Ok((_, None))) {
            *located = elsewhere;
        }
    }
    hits
}

fn is_there(located: &LookupResult) -> bool {
    matches!(located, Ok((_, Some(_))))
}

/// What `requests`, read from `paths`, say of each build; so many of them belong to each.
fn each(paths: &[String], requests: Vec<Data>, to_each: usize) -> Vec<LookupResult> {
    let mut requests = requests.into_iter();
    paths.chunks(to_each).map(|paths| first(paths, &mut requests)).collect()
}

/// The first build in the next `requests`, one for each of `paths`. A request that cannot be read
/// matters only if there is no other one.
fn first(paths: &[String], requests: &mut impl Iterator<Item = Data>) -> LookupResult {
    let (mut found, mut fault) = (None, None);
    // All of them, found or not: the next ones are others'.
    for (path, request) in paths.iter().zip(requests) {
        match request.map(|request| Build::from_json(&request)) {
            Ok(Ok(Some(build))) => found = found.or_else(|| Some((path.clone(), Some(build)))),
            Ok(Ok(None)) => {}
            Ok(Err(error)) => fault = fault.or(Some(LookupError::Malformed(error.to_string()))),
            // This node's affair alone. Told as if ZooKeeper were away, it would be told from one that
            // is not there by those whom rules deny it.
            Err(error @ Error::NoAuth) => {
                fault = fault.or(Some(LookupError::Malformed(error.to_string())));
            }
            Err(error) => fault = fault.or(Some(LookupError::Unavailable(error.to_string()))),
        }
    }
    match (found, fault) {
        (Some(found), _) => Ok(found),
        (None, Some(fault)) => Err(fault),
        (None, None) => Ok((String::new(), None)),
    }
}

/// What was read of one node.
type Data = Result<Vec<u8>, Error>;

type Answer = Result<(Vec<String>, Vec<Data>), Error>;

/// One multi-read (ZooKeeper 3.6 and later).
async fn read_at_once(client: &Client, directory: Option<&str>, paths: &[String]) -> Answer {
    let mut reader = client.new_multi_reader();
    if let Some(directory) = directory {
        reader.add_get_children(directory)?;
    }
    for path in paths {
        reader.add_get_data(path)?;
    }
    let (mut children, mut data) = (Vec::new(), Vec::with_capacity(paths.len()));
    for (index, result) in reader.commit().await?.into_iter().enumerate() {
        let listing = directory.is_some() && index == 0;
        match result {
            MultiReadResult::Children { children: names } => children = names,
            MultiReadResult::Data { data: content, .. } => data.push(Ok(content)),
            MultiReadResult::Error { err: Error::NoNode } if listing => {}
            MultiReadResult::Error { err: Error::NoNode } => data.push(Ok(Vec::new())),
            MultiReadResult::Error { err } if listing => return Err(err),
            MultiReadResult::Error { err } => data.push(Err(err)),
            _ => return Err(Error::Unimplemented),
        }
    }
    Ok((children, data))
}

/// Single reads, all on their way before the first answer: the client sends a request when its
/// future is made.
async fn read_pipelined(client: &Client, directory: Option<&str>, paths: &[String]) -> Answer {
    let listing = directory.map(|directory| client.list_children(directory));
    let reads: Vec<_> = paths.iter().map(|path| client.get_data(path)).collect();
    let children = match listing {
        None => Vec::new(),
        Some(listing) => match listing.await {
            Err(Error::NoNode) => Vec::new(),
            names => names?,
        },
    };
    let mut data = Vec::with_capacity(paths.len());
    for read in reads {
        data.push(match read.await {
            Err(Error::NoNode) => Ok(Vec::new()),
            // The whole answer is lost, and asked for again.
            Err(error) if is_connection_loss(&error) => return Err(error),
            content => content.map(|(content, _)| content),
        });
    }
    Ok((children, data))
}

#[cfg(test)]
mod tests {
    use super::*;
    const WAITING: &[u8] = br#"{"worker_info": null}"#;
    const WAITS: Build =
        Build { tenant: None, location: BuildLocation::Queued, trace_parent: None };

    fn paths(count: usize) -> Vec<String> {
        (0..count).map(|number| number.to_string()).collect()
    }

    fn data(requests: &[&[u8]]) -> Vec<Data> {
        requests.iter().map(|request| Ok(request.to_vec())).collect()
    }

    #[test]
    fn the_first_request_that_can_be_read_counts() {
        let first = |requests: Vec<Data>| first(&paths(requests.len()), &mut requests.into_iter());
        let nothing = || Ok((String::new(), None));
        let second = || Ok(("1".to_owned(), Some(WAITS)));
        assert_eq!(first(data(&[])), nothing());
        assert_eq!(first(data(&[b"", b""])), nothing());
        assert_eq!(first(data(&[b"", WAITING, WAITING])), second());
        assert_eq!(first(data(&[b"garbage", WAITING])), second(), "garbage elsewhere");
        assert!(matches!(first(data(&[b"", b"garbage"])), Err(LookupError::Malformed(_))));
        let denied = vec![Err(Error::NoAuth), Ok(Vec::new())];
        assert!(matches!(first(denied), Err(LookupError::Malformed(_))));
        let denied = vec![Err(Error::NoAuth), Ok(WAITING.to_vec())];
        assert_eq!(first(denied), second(), "denied elsewhere");
        let over = vec![Err(Error::SessionExpired), Ok(Vec::new())];
        assert!(matches!(first(over), Err(LookupError::Unavailable(_))));
    }

    #[test]
    fn zones_with_hits_come_first() {
        let reordered = |known: &str, now: &str, hits: &str| {
            let list = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
            reordered(&list(known), &list(now), &list(hits)).join(" ")
        };
        assert_eq!(reordered("a b c", "c b a", ""), "a b c", "the order so far");
        assert_eq!(reordered("a b c", "c b a", "c"), "c a b");
        assert_eq!(reordered("a b c", "a c d", "d"), "d a c", "one is gone, one is new");
        assert_eq!(reordered("", "a b", "gone"), "a b");
        let path = request_in("west", &BuildId::new("ab").unwrap());
        assert!(is_in(&path, "west") && !is_in(&path, "wes") && !is_in(&path, "western"));
    }

    #[test]
    fn each_build_gets_its_own() {
        let requests = data(&[WAITING, WAITING, b"", b"garbage", b"", WAITING, b"", b""]);
        let located = each(&paths(8), requests, 2);
        assert_eq!(located[0], Ok(("0".to_owned(), Some(WAITS))));
        assert!(matches!(located[1], Err(LookupError::Malformed(_))));
        assert_eq!(located[2], Ok(("5".to_owned(), Some(WAITS))));
        assert_eq!(located[3], Ok((String::new(), None)));
    }
}
