//! Where a build runs: all zones and the unzoned queue asked in one round trip.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use zookeeper_client::{Client, Error, MultiReadResult, SessionState};

use super::places::{self, Found, Places};
use crate::registry::LookupError;
use crate::registry::build::{Build, BuildId};
use crate::registry::component::Gateway;

/// The parent of one node per zone (`zuul/zk/executor.py`).
const ZONES: &str = "/zuul/executor/zones";
const UNZONED: &str = "/zuul/executor/unzoned";

/// Look-ups under way at once.
const LOOKUPS: usize = 1024;

/// How long the end of a session is waited for.
const CLOSE_PATIENCE: Duration = Duration::from_secs(1);

/// Answers from the current session, if there is one.
pub(crate) struct Lookup {
    client: watch::Sender<Option<Client>>,
    gateways: watch::Sender<Arc<[Gateway]>>,
    /// The zones of the last look-up: what the next one asks. Each look-up lists the zones again
    /// in the same round trip and asks those it did not know in a second one, so this may be old.
    zones: watch::Sender<Arc<[String]>>,
    /// ZooKeeper before 3.6 knows no multi-read; its refusal is remembered.
    multi_read: AtomicBool,
    pub(super) places: Arc<Places>,
    permits: Arc<Semaphore>,
}

impl Lookup {
    pub(super) fn new() -> Self {
        Self {
            client: watch::Sender::new(None),
            gateways: watch::Sender::new(Arc::from([])),
            zones: watch::Sender::new(Arc::from([])),
            multi_read: AtomicBool::new(true),
            places: Arc::default(),
            permits: Arc::new(Semaphore::new(LOOKUPS)),
        }
    }

    /// Answers from `client` from now on.
    pub(super) fn begin_session(&self, client: Client) {
        // The server may be another one, and newer.
        self.multi_read.store(true, Ordering::Relaxed);
        self.client.send_replace(Some(client));
    }

    /// Learns the zones, so that already the first look-up asks them all at once.
    pub(super) async fn learn_zones(&self, client: &Client) {
        // Without them it asks twice.
        if let Ok((zones, _)) = self.read(client, Some(ZONES), &[]).await {
            self.zones.send_replace(zones.into());
        }
    }

    /// The current session's client.
    pub(super) fn client(&self) -> Option<Client> {
        self.client.borrow().clone()
    }

    pub(super) fn has_session(&self) -> bool {
        self.client.borrow().is_some()
    }

    pub(super) fn forget_session(&self) {
        self.client.send_replace(None);
    }

    /// Ends the session and waits a moment for ZooKeeper to know.
    pub(super) async fn end_session(&self) {
        let Some(client) = self.client.send_replace(None) else { return };
        let mut states = client.state_watcher();
        drop(client);
        let ended = async { while !states.changed().await.is_terminated() {} };
        // Not ended in time: it ends by its timeout, and the entry is out already.
        let _ = tokio::time::timeout(CLOSE_PATIENCE, ended).await;
    }

    pub(super) fn set_gateways(&self, gateways: Arc<[Gateway]>) {
        self.gateways.send_replace(gateways);
    }

    pub(crate) fn gateways(&self) -> Arc<[Gateway]> {
        self.gateways.borrow().clone()
    }

    /// See [`crate::registry::Registry::find_build`].
    ///
    /// A request that has been handed to the client stays in its queue until ZooKeeper answers or
    /// the session ends, whoever waits for it. So nothing is handed over while there is no
    /// connection, and what has been keeps its permit among [`LOOKUPS`] until it is answered.
    pub(crate) async fn find_build(
        self: &Arc<Self>,
        build: &BuildId,
    ) -> Result<Option<Build>, LookupError> {
        let client = self.client();
        let client = client.ok_or_else(|| LookupError::Away("no session".to_owned()))?;
        if let Some(executor) = self.places.kept(&client, build) {
            return Ok(Some(Build::On(executor)));
        }
        let permit = Arc::clone(&self.permits).acquire_owned().await;
        connected(&client).await;
        let (this, wanted) = (Arc::clone(self), build.clone());
        let look_up = || async move {
            let _permit = permit;
            this.find(&client, &wanted).await
        };
        self.places.share(build, look_up).await
    }

    async fn find(self: &Arc<Self>, client: &Client, build: &BuildId) -> Found {
        let (path, found) = self.search(client, build).await?;
        if matches!(found, Some(Build::On(_))) && self.places.is_popular(build) {
            tokio::spawn(places::keep(Arc::clone(self), client.clone(), build.clone(), path));
        }
        Ok(found)
    }

    /// The path that is found comes with what was found there.
    async fn search(
        &self,
        client: &Client,
        build: &BuildId,
    ) -> Result<(String, Option<Build>), LookupError> {
        let known = self.zones.borrow().clone();
        let mut paths: Vec<String> = known.iter().map(|zone| request_in(zone, build)).collect();
        paths.push(format!("{UNZONED}/requests/{build}"));
        let (zones, requests) = self.read(client, Some(ZONES), &paths).await?;
        let found = first(paths, requests);
        if matches!(found, Ok((_, Some(_)))) {
            return found;
        }
        let fresh: Vec<String> = zones
            .iter()
            .filter(|zone| !known.contains(zone))
            .map(|zone| request_in(zone, build))
            .collect();
        if zones.len() != known.len() || !fresh.is_empty() {
            self.zones.send_replace(zones.into());
        }
        if fresh.is_empty() {
            return found;
        }
        let (_, requests) = self.read(client, None, &fresh).await?;
        match first(fresh, requests) {
            Ok((_, None)) => found,
            elsewhere => elsewhere,
        }
    }

    /// Reads the children of `directory` and the data of `paths`, missing nodes as empty.
    async fn read(
        &self,
        client: &Client,
        directory: Option<&str>,
        paths: &[String],
    ) -> Result<(Vec<String>, Vec<Vec<u8>>), LookupError> {
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
                Err(error) if super::is_connection_loss(&error) => {}
                Err(error) => return Err(LookupError::Away(error.to_string())),
            }
        }
    }
}

/// Waits for a connection; not for one that will never be.
async fn connected(client: &Client) {
    let mut states = client.state_watcher();
    let mut state = client.state();
    while state == SessionState::Disconnected {
        state = states.changed().await;
    }
}

fn request_in(zone: &str, build: &BuildId) -> String {
    format!("{ZONES}/{zone}/requests/{build}")
}

/// The first build among `requests`, read from `paths`, with its path. A request that cannot be
/// read matters only if there is no other one.
fn first(
    paths: Vec<String>,
    requests: Vec<Vec<u8>>,
) -> Result<(String, Option<Build>), LookupError> {
    let mut fault = None;
    for (path, request) in paths.into_iter().zip(requests) {
        match Build::from_json(&request) {
            Ok(Some(build)) => return Ok((path, Some(build))),
            Ok(None) => {}
            Err(error) => fault = fault.or(Some(error)),
        }
    }
    fault.map_or(Ok((String::new(), None)), |fault| Err(LookupError::Unreadable(fault)))
}

type Answer = Result<(Vec<String>, Vec<Vec<u8>>), Error>;

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
            MultiReadResult::Data { data: content, .. } => data.push(content),
            MultiReadResult::Error { err: Error::NoNode } if listing => {}
            MultiReadResult::Error { err: Error::NoNode } => data.push(Vec::new()),
            MultiReadResult::Error { err } => return Err(err),
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
            Err(Error::NoNode) => Vec::new(),
            content => content?.0,
        });
    }
    Ok((children, data))
}

#[cfg(test)]
mod tests {
    use super::*;

    const WAITING: &[u8] = br#"{"worker_info": null}"#;

    #[test]
    fn the_first_request_that_can_be_read_counts() {
        let first = |requests: &[&[u8]]| {
            let paths = (0..requests.len()).map(|number| number.to_string()).collect();
            first(paths, requests.iter().map(|r| r.to_vec()).collect())
        };
        let nothing = || Ok((String::new(), None));
        let second = || Ok(("1".to_owned(), Some(Build::Waiting)));
        assert_eq!(first(&[]), nothing());
        assert_eq!(first(&[b"", b""]), nothing());
        assert_eq!(first(&[b"", WAITING]), second());
        assert_eq!(first(&[b"garbage", WAITING]), second(), "garbage elsewhere");
        assert!(matches!(first(&[b"", b"garbage", b""]), Err(LookupError::Unreadable(_))));
    }
}
