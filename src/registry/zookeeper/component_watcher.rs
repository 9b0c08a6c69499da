//! The other components, followed by watches: which gateways there are, which data model they all
//! speak.
//!
//! One-shot watches, as any ZooKeeper server knows them: on the list of kinds, on each kind's
//! list, on each entry. The client sets them again after a reconnection. What an event says is
//! never used but as a reason to read again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures_util::future::{BoxFuture, FutureExt};
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::sync::watch;
use tracing::{debug, warn};
use zookeeper_client::{Acls, Client, CreateMode, CreateOptions, Error, EventType, WatchedEvent};

use super::build_lookup::BuildLookup;
use super::registration_status::StatusTracker;
use super::session::{ends_session, is_connection_loss, retry};
use crate::model::component;
use crate::model::component::{Component, FINGERGW, Gateway};

/// The parent of one node per kind of component.
pub(crate) const COMPONENTS: &str = "/zuul/components";

/// Zuul sets no ACLs: who holds a client certificate of ZooKeeper's CA may do everything.
pub(crate) const DIRECTORY: CreateOptions<'static> =
    CreateMode::Persistent.with_acls(Acls::anyone_all());

/// What our own entry depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ComponentsSnapshot {
    /// The data model to announce.
    pub(crate) model_api: u64,
    /// The names of all gateways' entries, ours among them.
    pub(crate) gateways: BTreeSet<String>,
}

/// Follows the components until the session ends, and says why it ended.
pub(crate) async fn follow(
    client: &Client,
    snapshot: &watch::Sender<Option<ComponentsSnapshot>>,
    lookup: &BuildLookup,
    presence: &StatusTracker<'_>,
    chroot: &str,
) -> Error {
    lookup.learn_zones(client).await;
    if let Err(error) = until_zuul_is_there(client, presence, chroot).await {
        return error;
    }
    let mut view =
        ComponentTree { client, kinds: BTreeMap::new(), watches: FuturesUnordered::new() };
    // The gateways first: clients may wait for them already.
    if let Err(error) = view.read_kind(&FINGERGW.to_owned()).await {
        return error;
    }
    lookup.set_gateways(view.gateways());
    if let Err(error) = view.read_kinds().await {
        return error;
    }
    loop {
        // ZooKeeper tells of a change before anybody can read what came after it. So once all that
        // it told has been heeded, the view is the registry as it was at one moment. Before that it
        // may lack what is older than something it has, and never was.
        while let Some(Some(event)) = view.watches.next().now_or_never() {
            if let Err(error) = view.heed(&event).await {
                return error;
            }
        }
        lookup.set_gateways(view.gateways());
        // Even if it is as before: an entry may have come and gone between two looks.
        snapshot.send_replace(Some(view.snapshot()));
        // Always: the list of kinds is always watched.
        let Some(event) = view.watches.next().await else {
            return Error::UnexpectedError("a watch ended".to_owned());
        };
        if let Err(error) = view.heed(&event).await {
            return error;
        }
    }
}

/// Waits until a service of Zuul has registered below `chroot`. Each makes the nodes of all kinds of
/// components when it starts (`zuul/zk/components.py`), and nobody removes them.
///
/// Where there are none, the path in `zookeeper.hosts` is wrong or Zuul has not been started yet. An
/// entry would tell the operator that all is well, and its parents would stay behind. The node of
/// gateways alone proves nothing: another one of this kind, of an older version, may have made it.
async fn until_zuul_is_there(
    client: &Client,
    presence: &StatusTracker<'_>,
    chroot: &str,
) -> Result<(), Error> {
    let mut said = false;
    loop {
        let (there, appears) = retry(|| client.check_and_watch_stat(COMPONENTS)).await?;
        let changes = if there.is_none() {
            appears
        } else {
            match retry(|| client.get_and_watch_children(COMPONENTS)).await {
                Ok((kinds, ..)) if kinds.iter().any(|kind| kind != FINGERGW) => return Ok(()),
                Ok((_, _, changes)) => changes,
                Err(Error::NoNode) => continue,
                Err(error) => return Err(error),
            }
        };
        if !std::mem::replace(&mut said, true) {
            let path = format!("{chroot}{COMPONENTS}");
            warn!(
                path,
                "no scheduler or executor registered below this path: is the path after the last \
                 server in zookeeper.hosts right? Not registering; waiting for Zuul"
            );
            presence.without_zuul(path);
        }
        if changes.changed().await.event_type == EventType::Session {
            return Err(Error::SessionExpired);
        }
    }
}

/// The registry as last read. An entry that cannot be understood is kept as `None`, so that it is
/// known to be watched.
struct ComponentTree<'a> {
    client: &'a Client,
    kinds: BTreeMap<String, BTreeMap<String, Option<Component>>>,
    /// No tasks of their own: a task runs when it pleases, and an event that has come must be there.
    watches: FuturesUnordered<BoxFuture<'static, WatchedEvent>>,
}

impl ComponentTree<'_> {
    fn entries(&self) -> impl Iterator<Item = (&str, &Component)> {
        self.kinds.iter().flat_map(|(kind, entries)| {
            entries.values().flatten().map(move |entry| (kind.as_str(), entry))
        })
    }

    /// Those that can be dialed.
    fn gateways(&self) -> Arc<[Gateway]> {
        self.entries().filter_map(|(_, entry)| entry.gateway.clone()).collect()
    }

    fn snapshot(&self) -> ComponentsSnapshot {
        let models = self.entries().map(|(kind, entry)| (kind, entry.model_api));
        let gateways = self.kinds.get(FINGERGW);
        ComponentsSnapshot {
            model_api: component::model_api(models),
            gateways: gateways.into_iter().flat_map(|names| names.keys().cloned()).collect(),
        }
    }

    /// Reads again what `event` says has changed.
    async fn heed(&mut self, event: &WatchedEvent) -> Result<(), Error> {
        if event.event_type == EventType::Session {
            // One-shot watches tell only of a session that has ended.
            return Err(Error::SessionExpired);
        }
        debug!(path = event.path, event = %event.event_type, "component registry changed");
        let below = event.path.strip_prefix(COMPONENTS).unwrap_or_default();
        match below.split('/').skip(1).collect::<Vec<_>>()[..] {
            [] => self.read_kinds().await,
            [kind] => self.read_kind(&kind.to_owned()).await,
            [kind, name, ..] => {
                let (kind, name) = (kind.to_owned(), name.to_owned());
                self.read_entries(&kind, &[name]).await
            }
        }
    }

    async fn read_kinds(&mut self) -> Result<(), Error> {
        let (client, own) = (self.client, format!("{COMPONENTS}/{FINGERGW}"));
        retry(|| client.mkdir(&own, &DIRECTORY)).await?;
        let (kinds, _, watcher) = retry(|| client.get_and_watch_children(COMPONENTS)).await?;
        self.watches.push(watcher.changed().boxed());
        self.kinds.retain(|kind, _| kinds.contains(kind));
        for kind in kinds {
            if !self.kinds.contains_key(&kind) {
                self.read_kind(&kind).await?;
            }
        }
        Ok(())
    }

    async fn read_kind(&mut self, kind: &String) -> Result<(), Error> {
        let (client, path) = (self.client, format!("{COMPONENTS}/{kind}"));
        let names = match retry(|| client.get_and_watch_children(&path)).await {
            Err(error) if ends_session(&error) => return Err(error),
            Err(error) => {
                if error != Error::NoNode {
                    warn!(path, %error, "components cannot be listed; ignored");
                }
                self.kinds.remove(kind);
                return Ok(());
            }
            Ok((names, _, watcher)) => {
                self.watches.push(watcher.changed().boxed());
                names
            }
        };
        let entries = self.kinds.entry(kind.clone()).or_default();
        entries.retain(|name, _| names.contains(name));
        let fresh: Vec<_> = names.into_iter().filter(|name| !entries.contains_key(name)).collect();
        self.read_entries(kind, &fresh).await
    }

    /// Reads the entries `names`, all at once, and watches each.
    async fn read_entries(&mut self, kind: &str, names: &[String]) -> Result<(), Error> {
        let client = self.client;
        let paths: Vec<_> =
            names.iter().map(|name| format!("{COMPONENTS}/{kind}/{name}")).collect();
        // A future that is made is a request that is sent.
        let reads: Vec<_> = paths.iter().map(|path| client.get_and_watch_data(path)).collect();
        for ((name, path), read) in names.iter().zip(&paths).zip(reads) {
            let read = match read.await {
                Err(error) if is_connection_loss(&error) => {
                    retry(|| client.get_and_watch_data(path)).await
                }
                read => read,
            };
            let entries = self.kinds.entry(kind.to_owned()).or_default();
            match read {
                Err(error) if ends_session(&error) => return Err(error),
                Err(error) => {
                    // Unknown again, it is read with the next change of the list.
                    entries.remove(name);
                    if error != Error::NoNode {
                        warn!(path, %error, "component entry cannot be read; ignored");
                    }
                }
                Ok((json, _, watcher)) => {
                    self.watches.push(watcher.changed().boxed());
                    let entry = Component::from_json(kind, name, &json)
                        .inspect_err(|fault| warn!(path, %fault, "component entry ignored"));
                    entries.insert(name.clone(), entry.ok());
                }
            }
        }
        Ok(())
    }
}
