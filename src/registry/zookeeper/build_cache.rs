//! Where builds run that are asked for more than once: what look-ups found, kept as long as a
//! ZooKeeper watch vouches for it.
//!
//! A build that people talk about is asked for by many of them, over minutes. The first request
//! for it costs one round trip; the second one sets a watch; the others cost ZooKeeper nothing.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::sleep;
use tracing::debug;
use zookeeper_client::{Client, EventType, SessionId, SessionState};

use super::build_lookup::BuildLookup;

use crate::model::build_id::BuildId;
use crate::model::build_request::{Build, BuildLocation};

/// Builds kept at once, each with a watch at the ZooKeeper server. The others are looked up.
const KEPT_MAX: usize = 1024;

/// Builds whose first request is remembered, so that the second one is known for it.
const FOUND_MAX: usize = 4096;

/// How long a build is kept that nobody asks for.
const IDLE: Duration = Duration::from_secs(60);

/// What is known without asking.
#[derive(Default)]
pub(crate) struct BuildCache(Mutex<Known>);

#[derive(Default)]
struct Known {
    found: HashMap<BuildId, HitCount>,
    kept: HashMap<BuildId, Arc<CacheEntry>>,
}

/// How often a build has been asked for.
#[derive(PartialEq, Eq)]
enum HitCount {
    Once,
    /// More than once: somebody sees to it that it is kept.
    Often,
}

/// A place that a watch vouches for.
struct CacheEntry {
    session: SessionId,
    found: Build,
    asked_for: AtomicBool,
}

impl BuildCache {
    /// Where `build` runs, if that is kept; only while `client` has a connection, since nobody
    /// would hear of a change without one.
    pub(crate) fn kept(&self, client: &Client, build: &BuildId) -> Option<Build> {
        let kept = self.lock().kept.get(build).cloned()?;
        if kept.session != client.session_id() || client.state() != SessionState::SyncConnected {
            return None;
        }
        kept.asked_for.store(true, Ordering::Relaxed);
        Some(kept.found.clone())
    }

    /// Notes that `build` has been found, and says whether the caller is to [`keep`] it: it has been
    /// asked for before, and nobody keeps it yet.
    pub(crate) fn is_popular(&self, build: &BuildId) -> bool {
        let mut known = self.lock();
        if known.found.len() >= FOUND_MAX {
            known.found.retain(|_, popularity| *popularity == HitCount::Often);
        }
        let full = known.kept.len() >= KEPT_MAX;
        match known.found.get_mut(build) {
            Some(once @ HitCount::Once) if !full => {
                *once = HitCount::Often;
                true
            }
            Some(_) => false,
            None => {
                known.found.insert(build.clone(), HitCount::Once);
                false
            }
        }
    }

    fn keep(&self, build: &BuildId, kept: &Arc<CacheEntry>) {
        self.lock().kept.insert(build.clone(), Arc::clone(kept));
    }

    /// Forgets `kept`, unless another one has taken its place.
    fn forget(&self, build: &BuildId, kept: &Arc<CacheEntry>) {
        let mut known = self.lock();
        if known.kept.get(build).is_some_and(|there| Arc::ptr_eq(there, kept)) {
            known.kept.remove(build);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        // Whole between any two statements.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Somebody who keeps a build; when this goes, the next request for it is another
/// reason to keep it.
struct CacheGuard {
    lookup: Arc<BuildLookup>,
    build: BuildId,
}

impl Drop for CacheGuard {
    fn drop(&mut self) {
        if let Some(popularity) = self.lookup.places.lock().found.get_mut(&self.build) {
            *popularity = HitCount::Once;
        }
    }
}

/// Keeps the place of `build`, whose request is at `path`, for as long as it is asked for and the
/// session of `client` lives. Holds no client while it waits: the session is to end when the last
/// one is dropped.
pub(crate) async fn keep(lookup: Arc<BuildLookup>, client: Client, build: BuildId, path: String) {
    let CacheGuard { lookup, build } = &CacheGuard { lookup, build };
    let session = client.session_id();
    let mut client = Some(client);
    while let Some(now) = client.take() {
        let Ok((request, _, watcher)) = now.get_and_watch_data(&path).await else { return };
        drop(now);
        let read = Build::from_json(&request);
        let Ok(Some(found @ Build { location: BuildLocation::Executor(_), .. })) = read else {
            return;
        };
        let kept = Arc::new(CacheEntry { session, found, asked_for: AtomicBool::new(false) });
        lookup.places.keep(build, &kept);
        debug!(%build, "place kept");
        let mut changed = std::pin::pin!(watcher.changed());
        let event = loop {
            tokio::select! {
                event = &mut changed => break Some(event),
                () = sleep(IDLE) => {
                    if !kept.asked_for.swap(false, Ordering::Relaxed) {
                        break None;
                    }
                }
            }
        };
        lookup.places.forget(build, &kept);
        debug!(%build, event = event.as_ref().map(|event| event.event_type.to_string()), "place forgotten");
        if event.is_some_and(|event| event.event_type == EventType::NodeDataChanged) {
            client = lookup.client().filter(|client| client.session_id() == session);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn build(text: &str) -> BuildId {
        BuildId::new(text).expect("a build id")
    }

    #[test]
    fn the_second_request_is_known_for_it() {
        let places = BuildCache::default();
        assert!(!places.is_popular(&build("abc")));
        assert!(!places.is_popular(&build("def")));
        assert!(places.is_popular(&build("abc")));
        assert!(!places.is_popular(&build("abc")), "somebody sees to it already");
        for number in 0..2 * FOUND_MAX {
            places.is_popular(&build(&format!("{number:x}")));
            assert!(places.lock().found.len() <= FOUND_MAX);
        }
        assert!(!places.is_popular(&build("abc")), "not forgotten with the others");
    }
}
