//! Watches Zuul's component registry: which gateways there are, and which data model the system
//! uses.
//!
//! Uses one-shot watches, which every ZooKeeper server supports: on the list of kinds, on the list
//! of each kind, and on each entry. The client sets them again after a reconnection. An event is
//! only a reason to read again; its content is not used.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt};
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::sync::watch;
use tracing::{debug, warn};
use zookeeper_client::{Acls, Client, CreateMode, CreateOptions, Error, EventType, WatchedEvent};

use super::build_lookup::BuildLookup;
use super::retry::{ends_session, equal_jitter, retry};
use crate::model::component::{self, Component, FINGERGW, Gateway};

/// The parent of one node per kind of component.
pub(super) const COMPONENTS: &str = "/zuul/components";

/// Zuul sets no ACLs: any client with a certificate of ZooKeeper's CA may do everything.
pub(super) const DIRECTORY: CreateOptions<'static> =
    CreateMode::Persistent.with_acls(Acls::anyone_all());

/// Time until a node that could not be read, such as one with an ACL, is read again. A change of it
/// cannot be watched.
const RETRY_UNREADABLE: Duration = Duration::from_secs(5);

/// What is known of the components of the system.
#[derive(Clone, Debug, Default)]
pub(super) enum Components {
    /// They have not been read yet.
    #[default]
    Unknown,
    /// No component of Zuul has ever registered below this node.
    NoZuul(String),
    Known(ComponentsSnapshot),
}

/// What our own entry depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ComponentsSnapshot {
    /// The data model to announce.
    pub(super) model_api: u64,
    /// The names of the entries of all gateways, including ours.
    pub(super) gateways: BTreeSet<String>,
}

/// Watches the components until the session ends, and returns why it ended.
pub(super) async fn watch(
    client: &Client,
    components: &watch::Sender<Components>,
    lookup: &BuildLookup,
    chroot: &str,
) -> Error {
    lookup.load_zones(client).await;
    if let Err(error) = wait_for_zuul(client, components, chroot).await {
        return error;
    }
    let mut watcher = ComponentWatcher::new(client);
    // The gateways first: clients may wait for them already.
    watcher.read(Read::Kind(FINGERGW.to_owned()));
    if let Err(error) = watcher.settle().await {
        return error;
    }
    lookup.set_gateways(watcher.tree.gateways());
    watcher.read(Read::Kinds);
    loop {
        if let Err(error) = watcher.settle().await {
            return error;
        }
        lookup.set_gateways(watcher.tree.gateways());
        // Even if it has not changed: our own entry may have been created and deleted in between.
        components.send_replace(Components::Known(watcher.tree.snapshot()));
        if let Err(error) = watcher.wait().await {
            return error;
        }
    }
}

/// Waits until a component of Zuul has registered below `chroot`. Each creates the nodes of all
/// kinds of components when it starts (`zuul/zk/components.py`), and they are never deleted.
///
/// Without them, the path in `zookeeper.hosts` is wrong or Zuul has not been started yet.
/// Registering would make the gateway look healthy and leave its parent nodes behind. The node of
/// finger gateways alone does not count: an older version of this program may have created it.
async fn wait_for_zuul(
    client: &Client,
    components: &watch::Sender<Components>,
    chroot: &str,
) -> Result<(), Error> {
    let mut warned = false;
    loop {
        let (stat, created) = retry(|| client.check_and_watch_stat(COMPONENTS)).await?;
        let changed = if stat.is_none() {
            created
        } else {
            match retry(|| client.get_and_watch_children(COMPONENTS)).await {
                Ok((kinds, ..)) if kinds.iter().any(|kind| kind != FINGERGW) => return Ok(()),
                Ok((_, _, changed)) => changed,
                Err(Error::NoNode) => continue,
                Err(error) => return Err(error),
            }
        };
        if !warned {
            warned = true;
            let path = format!("{chroot}{COMPONENTS}");
            warn!(
                path,
                "no scheduler or executor is registered below this path; waiting for Zuul before \
                 registering: check the path after the last server in zookeeper.hosts"
            );
            components.send_replace(Components::NoZuul(path));
        }
        if changed.changed().await.event_type == EventType::Session {
            return Err(Error::SessionExpired);
        }
    }
}

/// Reads what [`ComponentTree`] asks for, and forwards events to it.
struct ComponentWatcher<'a> {
    client: &'a Client,
    tree: ComponentTree,
    reads: FuturesUnordered<BoxFuture<'a, Result<Answer, Error>>>,
    /// Polled here and not by tasks of their own: an event that the client has received must be
    /// seen by the next poll.
    watches: FuturesUnordered<BoxFuture<'static, WatchedEvent>>,
}

impl<'a> ComponentWatcher<'a> {
    fn new(client: &'a Client) -> Self {
        Self {
            client,
            tree: ComponentTree::default(),
            reads: FuturesUnordered::new(),
            watches: FuturesUnordered::new(),
        }
    }

    /// Starts a read. Concurrent reads are pipelined by the client.
    fn read(&mut self, read: Read) {
        self.reads.push(perform(self.client, read).boxed());
    }

    /// Finishes all reads and handles all events that have been received.
    ///
    /// ZooKeeper sends an event before any data that was written after the change. So after this,
    /// the tree is the registry as it was at one moment. Before, it may combine states that never
    /// existed together.
    async fn settle(&mut self) -> Result<(), Error> {
        loop {
            if let Some(answer) = self.reads.next().await {
                let answer = answer?;
                if let Some(watch) = answer.watch {
                    self.watches.push(watch);
                }
                for read in self.tree.apply(answer.read, answer.content) {
                    self.read(read);
                }
            } else if let Some(Some(event)) = self.watches.next().now_or_never() {
                self.handle_event(&event)?;
            } else {
                return Ok(());
            }
        }
    }

    /// Waits for the next event, or for the time to read unreadable nodes again.
    async fn wait(&mut self) -> Result<(), Error> {
        tokio::select! {
            // There always is one: the list of kinds is always watched.
            Some(event) = self.watches.next() => self.handle_event(&event)?,
            () = tokio::time::sleep(equal_jitter(RETRY_UNREADABLE)),
                if !self.tree.unreadable.is_empty() =>
            {
                for read in self.tree.unreadable.clone() {
                    self.read(read);
                }
            }
        }
        Ok(())
    }

    fn handle_event(&mut self, event: &WatchedEvent) -> Result<(), Error> {
        if event.event_type == EventType::Session {
            // One-shot watches report no state of a session but its end.
            return Err(Error::SessionExpired);
        }
        debug!(path = event.path, event = %event.event_type, "component registry changed");
        if let Some(read) = self.tree.changed(&event.path) {
            self.read(read);
        }
        Ok(())
    }
}

/// A node, or the list of its children, to read.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Read {
    /// The kinds of components.
    Kinds,
    /// The names of the entries of a kind.
    Kind(String),
    /// An entry: its kind and name.
    Entry(String, String),
}

impl Read {
    fn path(&self) -> String {
        match self {
            Self::Kinds => COMPONENTS.to_owned(),
            Self::Kind(kind) => format!("{COMPONENTS}/{kind}"),
            Self::Entry(kind, name) => format!("{COMPONENTS}/{kind}/{name}"),
        }
    }
}

/// What was read.
#[derive(Debug)]
enum Content {
    /// The names of the children.
    Names(Vec<String>),
    /// The content of an entry.
    Json(Vec<u8>),
    /// There is no such node.
    Missing,
    /// ZooKeeper refuses to return it.
    Refused(Error),
}

struct Answer {
    read: Read,
    content: Content,
    watch: Option<BoxFuture<'static, WatchedEvent>>,
}

/// # Errors
/// The session has ended, or the list of kinds cannot be read.
async fn perform(client: &Client, read: Read) -> Result<Answer, Error> {
    let path = read.path();
    let result = match &read {
        Read::Kinds => {
            // So that the kind of gateways is there, and watched, before the first one registers.
            let gateways = format!("{COMPONENTS}/{FINGERGW}");
            retry(|| client.mkdir(&gateways, &DIRECTORY)).await?;
            let (names, _, watcher) = retry(|| client.get_and_watch_children(COMPONENTS)).await?;
            Ok((Content::Names(names), watcher))
        }
        Read::Kind(_) => retry(|| client.get_and_watch_children(&path))
            .await
            .map(|(names, _, watcher)| (Content::Names(names), watcher)),
        Read::Entry(..) => retry(|| client.get_and_watch_data(&path))
            .await
            .map(|(json, _, watcher)| (Content::Json(json), watcher)),
    };
    match result {
        Ok((content, watcher)) => {
            Ok(Answer { read, content, watch: Some(watcher.changed().boxed()) })
        }
        Err(Error::NoNode) => Ok(Answer { read, content: Content::Missing, watch: None }),
        Err(error) if ends_session(&error) => Err(error),
        Err(error) => Ok(Answer { read, content: Content::Refused(error), watch: None }),
    }
}

/// The component registry as last read. Pure: answers and events in, reads out.
#[derive(Default)]
struct ComponentTree {
    /// The entries by kind and name. `None` stands for an entry that is watched but invalid.
    kinds: BTreeMap<String, BTreeMap<String, Option<Component>>>,
    /// Nodes that ZooKeeper refused to return.
    unreadable: BTreeSet<Read>,
}

impl ComponentTree {
    /// What to read after an event for `path`.
    fn changed(&self, path: &str) -> Option<Read> {
        let below = path.strip_prefix(COMPONENTS)?;
        match below.split('/').skip(1).collect::<Vec<_>>()[..] {
            [] => Some(Read::Kinds),
            [kind] => Some(Read::Kind(kind.to_owned())),
            [kind, name] => Some(Read::Entry(kind.to_owned(), name.to_owned())),
            _ => None,
        }
    }

    /// Applies what was read, and returns what to read next.
    fn apply(&mut self, read: Read, content: Content) -> Vec<Read> {
        if let Content::Refused(error) = &content {
            let path = read.path();
            if self.unreadable.insert(read.clone()) {
                warn!(path, %error, "cannot read node of the component registry, retrying");
            } else {
                debug!(path, %error, "still cannot read node of the component registry");
            }
        } else {
            self.unreadable.remove(&read);
        }
        match read {
            Read::Kinds => self.apply_kinds(content),
            Read::Kind(kind) => self.apply_kind(kind, content),
            Read::Entry(kind, name) => {
                self.apply_entry(&kind, name, content);
                Vec::new()
            }
        }
    }

    fn apply_kinds(&mut self, content: Content) -> Vec<Read> {
        let Content::Names(names) = content else { return Vec::new() };
        self.kinds.retain(|kind, _| names.contains(kind));
        let added = names.into_iter().filter(|kind| !self.kinds.contains_key(kind));
        added.map(Read::Kind).collect()
    }

    fn apply_kind(&mut self, kind: String, content: Content) -> Vec<Read> {
        let names = match content {
            Content::Names(names) => names,
            Content::Missing => {
                self.kinds.remove(&kind);
                return Vec::new();
            }
            // Entries that were read before are still watched, each by itself.
            Content::Refused(_) | Content::Json(_) => return Vec::new(),
        };
        let entries = self.kinds.entry(kind.clone()).or_default();
        entries.retain(|name, _| names.contains(name));
        let added = names.into_iter().filter(|name| !entries.contains_key(name));
        added.map(|name| Read::Entry(kind.clone(), name)).collect()
    }

    fn apply_entry(&mut self, kind: &str, name: String, content: Content) {
        // The kind may have been deleted in the meantime.
        let Some(entries) = self.kinds.get_mut(kind) else { return };
        let Content::Json(json) = content else {
            entries.remove(&name);
            return;
        };
        let entry = Component::from_json(kind, &name, &json).inspect_err(|error| {
            let path = format!("{COMPONENTS}/{kind}/{name}");
            warn!(path, %error, "ignoring invalid component entry");
        });
        entries.insert(name, entry.ok());
    }

    fn valid_entries(&self) -> impl Iterator<Item = (&str, &Component)> {
        self.kinds.iter().flat_map(|(kind, entries)| {
            entries.values().flatten().map(move |entry| (kind.as_str(), entry))
        })
    }

    /// The gateways that can be dialed.
    fn gateways(&self) -> Arc<[Gateway]> {
        self.valid_entries().filter_map(|(_, entry)| entry.gateway.clone()).collect()
    }

    fn snapshot(&self) -> ComponentsSnapshot {
        let models = self.valid_entries().map(|(kind, entry)| (kind, entry.model_api));
        let gateways = self.kinds.get(FINGERGW).into_iter().flat_map(BTreeMap::keys);
        ComponentsSnapshot {
            model_api: component::model_api(models),
            gateways: gateways.cloned().collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(kind: &str) -> Read {
        Read::Kind(kind.to_owned())
    }

    fn entry(kind: &str, name: &str) -> Read {
        Read::Entry(kind.to_owned(), name.to_owned())
    }

    fn names(names: &[&str]) -> Content {
        Content::Names(names.iter().map(|name| (*name).to_owned()).collect())
    }

    fn json(json: &str) -> Content {
        Content::Json(json.as_bytes().to_vec())
    }

    fn refused() -> Content {
        Content::Refused(Error::NoAuth)
    }

    fn gateway(hostname: &str) -> Content {
        json(&format!(r#"{{"hostname": "{hostname}", "public_port": 79, "state": "running"}}"#))
    }

    fn hostnames(tree: &ComponentTree) -> Vec<String> {
        tree.gateways().iter().map(|gateway| gateway.hostname.clone()).collect()
    }

    /// A registry of two gateways and a scheduler.
    fn tree() -> ComponentTree {
        let mut tree = ComponentTree::default();
        let reads = tree.apply(kind("fingergw"), names(&["gw1", "gw2"]));
        assert_eq!(reads, [entry("fingergw", "gw1"), entry("fingergw", "gw2")]);
        tree.apply(entry("fingergw", "gw1"), gateway("gw1"));
        tree.apply(entry("fingergw", "gw2"), gateway("gw2"));
        let reads = tree.apply(Read::Kinds, names(&["fingergw", "scheduler"]));
        assert_eq!(reads, [kind("scheduler")], "gateways are known");
        let reads = tree.apply(kind("scheduler"), names(&["zs1"]));
        assert_eq!(reads, [entry("scheduler", "zs1")]);
        tree.apply(entry("scheduler", "zs1"), json(r#"{"model_api": 36}"#));
        tree
    }

    #[test]
    fn event_leads_to_a_read_of_its_node() {
        let tree = tree();
        for (path, read) in [
            ("/zuul/components", Some(Read::Kinds)),
            ("/zuul/components/merger", Some(kind("merger"))),
            ("/zuul/components/merger/zm1", Some(entry("merger", "zm1"))),
            ("/zuul/components/merger/zm1/below", None),
            ("/zuul/other", None),
        ] {
            assert_eq!(tree.changed(path), read, "{path}");
        }
    }

    #[test]
    fn snapshot_has_all_gateways_and_the_data_model_of_the_others() {
        let tree = tree();
        let gateways = ["gw1", "gw2"].map(str::to_owned).into();
        assert_eq!(tree.snapshot(), ComponentsSnapshot { model_api: 36, gateways });
        assert_eq!(hostnames(&tree), ["gw1", "gw2"]);
    }

    #[test]
    fn only_new_entries_of_a_list_are_read() {
        let mut tree = tree();
        let reads = tree.apply(kind("fingergw"), names(&["gw2", "gw3"]));
        assert_eq!(reads, [entry("fingergw", "gw3")]);
        assert_eq!(hostnames(&tree), ["gw2"]);
    }

    #[test]
    fn deleted_kind_takes_its_entries_along() {
        let mut tree = tree();
        tree.apply(kind("scheduler"), Content::Missing);
        assert_eq!(tree.snapshot().model_api, component::MODEL_API);
        let reads = tree.apply(Read::Kinds, names(&["scheduler"]));
        assert_eq!(reads, [kind("scheduler")], "created again");
        assert!(tree.gateways().is_empty(), "not listed any more");
    }

    #[test]
    fn late_answer_does_not_create_a_deleted_kind_again() {
        for late in [json(r#"{"model_api": 20}"#), Content::Missing, refused()] {
            let mut tree = tree();
            tree.apply(kind("scheduler"), Content::Missing);
            tree.apply(entry("scheduler", "zs1"), late);
            let reads = tree.apply(Read::Kinds, names(&["fingergw", "scheduler"]));
            assert_eq!(reads, [kind("scheduler")]);
        }
    }

    #[test]
    fn invalid_entry_is_ignored_until_it_is_valid_again() {
        let mut tree = tree();
        tree.apply(entry("scheduler", "zs1"), json("{"));
        assert_eq!(tree.snapshot().model_api, component::MODEL_API);
        let reads = tree.apply(kind("scheduler"), names(&["zs1"]));
        assert_eq!(reads, [], "it is watched");
        assert!(tree.unreadable.is_empty());
        tree.apply(entry("scheduler", "zs1"), json(r#"{"model_api": 37}"#));
        assert_eq!(tree.snapshot().model_api, 37);
    }

    #[test]
    fn kind_that_cannot_be_listed_is_read_again_and_keeps_its_entries() {
        let mut tree = tree();
        tree.apply(kind("fingergw"), refused());
        assert_eq!(Vec::from_iter(&tree.unreadable), [&kind("fingergw")]);
        assert_eq!(hostnames(&tree), ["gw1", "gw2"]);
        tree.apply(kind("fingergw"), refused());
        let reads = tree.apply(kind("fingergw"), names(&["gw1", "gw3"]));
        assert_eq!(reads, [entry("fingergw", "gw3")]);
        assert!(tree.unreadable.is_empty());
    }

    #[test]
    fn entry_that_cannot_be_read_is_read_again() {
        let mut tree = tree();
        tree.apply(entry("fingergw", "gw1"), refused());
        assert_eq!(Vec::from_iter(&tree.unreadable), [&entry("fingergw", "gw1")]);
        assert_eq!(hostnames(&tree), ["gw2"]);
        tree.apply(entry("fingergw", "gw1"), gateway("gw1"));
        assert_eq!(hostnames(&tree), ["gw1", "gw2"]);
        assert!(tree.unreadable.is_empty());
    }

    #[test]
    fn unreadable_node_that_is_deleted_is_forgotten() {
        let mut tree = tree();
        tree.apply(entry("fingergw", "gw1"), refused());
        tree.apply(kind("scheduler"), refused());
        tree.apply(entry("fingergw", "gw1"), Content::Missing);
        tree.apply(kind("scheduler"), Content::Missing);
        assert!(tree.unreadable.is_empty());
    }
}
