//! Locations of builds that are requested repeatedly, each valid for as long as a ZooKeeper watch
//! confirms it.
//!
//! The first request for a build costs one round trip, the second one also sets a watch, and
//! further requests cost ZooKeeper nothing.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;
use tracing::debug;
use zookeeper_client::{Client, EventType, SessionId, SessionState};

use crate::model::build_id::BuildId;
use crate::model::build_request::{Build, BuildLocation};

/// The most cached builds, each of which costs the ZooKeeper server a watch. Others are looked up.
const CACHED_MAX: usize = 1024;

/// The most builds whose hits are counted.
const COUNTED_MAX: usize = 4096;

/// A build that is not requested for this long is removed from the cache.
const IDLE: Duration = Duration::from_secs(60);

#[derive(Default)]
pub(super) struct BuildCache(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    hits: HashMap<BuildId, HitCount>,
    entries: HashMap<BuildId, Arc<CacheEntry>>,
}

/// How often a build has been found.
#[derive(PartialEq, Eq)]
enum HitCount {
    Once,
    /// A task caches the build.
    Repeatedly,
}

/// A location that a watch confirms.
struct CacheEntry {
    /// The session of the watch.
    session: SessionId,
    build: Build,
    /// Whether it was requested since the last idle check.
    used: AtomicBool,
}

impl BuildCache {
    /// The cached location of `build`. `None` while `client` has no connection: a change would not
    /// be noticed.
    pub(super) fn get(&self, client: &Client, build: &BuildId) -> Option<Build> {
        let entry = self.lock().entries.get(build).cloned()?;
        if entry.session != client.session_id() || client.state() != SessionState::SyncConnected {
            return None;
        }
        entry.used.store(true, Ordering::Relaxed);
        Some(entry.build.clone())
    }

    /// Counts that `build` was found. From the second time on, spawns a task that caches it, unless
    /// there is one.
    ///
    /// `path` is that of its request, found in the session of `client`. `clients` is the current
    /// client.
    pub(super) fn found(
        self: &Arc<Self>,
        build: &BuildId,
        path: String,
        client: Client,
        clients: watch::Receiver<Option<Client>>,
    ) {
        if self.count_hit(build) {
            let guard = CacheGuard { cache: Arc::clone(self), build: build.clone() };
            tokio::spawn(keep_entry(guard, path, client, clients));
        }
    }

    /// Returns whether the caller must cache the build.
    fn count_hit(&self, build: &BuildId) -> bool {
        let mut inner = self.lock();
        if inner.hits.len() >= COUNTED_MAX {
            inner.hits.retain(|_, count| *count == HitCount::Repeatedly);
        }
        let is_full = inner.entries.len() >= CACHED_MAX;
        match inner.hits.get_mut(build) {
            Some(count @ HitCount::Once) if !is_full => {
                *count = HitCount::Repeatedly;
                true
            }
            Some(_) => false,
            None => {
                inner.hits.insert(build.clone(), HitCount::Once);
                false
            }
        }
    }

    fn insert(&self, build: &BuildId, entry: &Arc<CacheEntry>) {
        self.lock().entries.insert(build.clone(), Arc::clone(entry));
    }

    /// Removes `entry`, unless another one has replaced it.
    fn remove(&self, build: &BuildId, entry: &Arc<CacheEntry>) {
        let mut inner = self.lock();
        if inner.entries.get(build).is_some_and(|current| Arc::ptr_eq(current, entry)) {
            inner.entries.remove(build);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Consistent after each statement, so it can be used after a panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Marks a build as cached. After it is dropped, the next request may cache it again.
struct CacheGuard {
    cache: Arc<BuildCache>,
    build: BuildId,
}

impl Drop for CacheGuard {
    fn drop(&mut self) {
        if let Some(count) = self.cache.lock().hits.get_mut(&self.build) {
            *count = HitCount::Once;
        }
    }
}

/// Keeps a build in the cache for as long as it is requested and the session lives. Holds no client
/// while it waits: the session must end when the last one is dropped.
async fn keep_entry(
    guard: CacheGuard,
    path: String,
    client: Client,
    clients: watch::Receiver<Option<Client>>,
) {
    let CacheGuard { cache, build } = &guard;
    let session = client.session_id();
    let mut next_client = Some(client);
    while let Some(client) = next_client.take() {
        let Ok((json, _, watcher)) = client.get_and_watch_data(&path).await else { return };
        drop(client);
        let Ok(Some(found @ Build { location: BuildLocation::Executor(_), .. })) =
            Build::from_json(&json)
        else {
            return;
        };
        let entry = Arc::new(CacheEntry { session, build: found, used: AtomicBool::new(false) });
        cache.insert(build, &entry);
        debug!(%build, "build cached");
        let mut changed = std::pin::pin!(watcher.changed());
        let event = loop {
            tokio::select! {
                event = &mut changed => break Some(event),
                () = sleep(IDLE) => {
                    if !entry.used.swap(false, Ordering::Relaxed) {
                        break None;
                    }
                }
            }
        };
        cache.remove(build, &entry);
        let reason = event.as_ref().map(|event| event.event_type.to_string());
        debug!(%build, event = reason, "build removed from the cache");
        if event.is_some_and(|event| event.event_type == EventType::NodeDataChanged) {
            let current = clients.borrow().clone();
            next_client = current.filter(|client| client.session_id() == session);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn build(text: &str) -> BuildId {
        BuildId::new(text).expect("a build ID")
    }

    #[test]
    fn second_request_for_a_build_caches_it() {
        let cache = Arc::new(BuildCache::default());
        assert!(!cache.count_hit(&build("abc")));
        assert!(!cache.count_hit(&build("def")));
        assert!(cache.count_hit(&build("abc")));
        assert!(!cache.count_hit(&build("abc")), "already being cached");
        drop(CacheGuard { cache: Arc::clone(&cache), build: build("abc") });
        assert!(cache.count_hit(&build("abc")), "no longer cached");
    }

    #[test]
    fn counted_builds_are_bounded_and_cached_ones_kept() {
        let cache = BuildCache::default();
        cache.count_hit(&build("abc"));
        cache.count_hit(&build("abc"));
        for number in 0..2 * COUNTED_MAX {
            cache.count_hit(&build(&format!("{number:x}")));
            assert!(cache.lock().hits.len() <= COUNTED_MAX);
        }
        assert!(!cache.count_hit(&build("abc")), "still marked as cached");
    }
}
