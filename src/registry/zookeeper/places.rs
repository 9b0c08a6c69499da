//! Where builds run that are asked for more than once: look-ups under way are shared, and what they
//! found is kept as long as a ZooKeeper watch vouches for it.
//!
//! A build that people talk about is asked for by many of them, over minutes. The first request
//! for it costs one round trip; the second one sets a watch; the others cost ZooKeeper nothing.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;
use tracing::debug;
use zookeeper_client::{Client, EventType, SessionId, SessionState};

use super::Lookup;
use crate::registry::LookupError;
use crate::registry::build::{Build, BuildId, Executor};

/// Builds kept at once, each with a watch at the ZooKeeper server. The others are looked up.
const KEPT_MAX: usize = 1024;

/// Builds whose first request is remembered, so that the second one is known for it.
const FOUND_MAX: usize = 4096;

/// How long a build is kept that nobody asks for.
const IDLE: Duration = Duration::from_secs(60);

/// What a look-up has found.
pub(super) type Found = Result<Option<Build>, LookupError>;

/// What is known without asking.
#[derive(Default)]
pub(super) struct Places(Mutex<Known>);

#[derive(Default)]
struct Known {
    under_way: HashMap<BuildId, watch::Receiver<Option<Found>>>,
    found: HashSet<BuildId>,
    kept: HashMap<BuildId, Arc<Kept>>,
}

/// A place that a watch vouches for.
struct Kept {
    session: SessionId,
    executor: Executor,
    asked_for: AtomicBool,
}

impl Places {
    /// Where `build` runs, if that is kept; only while `client` has a connection, since nobody
    /// would hear of a change without one.
    pub(super) fn kept(&self, client: &Client, build: &BuildId) -> Option<Executor> {
        let kept = self.lock().kept.get(build).cloned()?;
        if kept.session != client.session_id() || client.state() != SessionState::SyncConnected {
            return None;
        }
        kept.asked_for.store(true, Ordering::Relaxed);
        Some(kept.executor.clone())
    }

    /// The result of the look-up for `build` that is under way, else of `look_up`, which then runs
    /// to its end whoever still waits for it.
    pub(super) async fn share<Finding>(
        self: &Arc<Self>,
        build: &BuildId,
        look_up: impl FnOnce() -> Finding,
    ) -> Found
    where
        Finding: Future<Output = Found> + Send + 'static,
    {
        let mut answer = {
            let mut known = self.lock();
            if let Some(answer) = known.under_way.get(build) {
                answer.clone()
            } else {
                let (sender, answer) = watch::channel(None);
                known.under_way.insert(build.clone(), answer.clone());
                let (under_way, finding) =
                    (UnderWay { places: Arc::clone(self), build: build.clone() }, look_up());
                tokio::spawn(async move {
                    let found = finding.await;
                    // Whoever comes now has to ask anew: this answer is as old as its question.
                    drop(under_way);
                    sender.send_replace(Some(found));
                });
                answer
            }
        };
        let found = answer.wait_for(Option::is_some).await.ok().and_then(|found| found.clone());
        found.unwrap_or_else(|| Err(LookupError::Away("the look-up failed".to_owned())))
    }

    /// Notes that `build` has been found, and says whether it is worth keeping: asked for before
    /// and not yet kept.
    pub(super) fn is_popular(&self, build: &BuildId) -> bool {
        let mut known = self.lock();
        if known.found.len() >= FOUND_MAX {
            known.found.clear();
        }
        !known.found.insert(build.clone())
            && !known.kept.contains_key(build)
            && known.kept.len() < KEPT_MAX
    }

    fn keep(&self, build: &BuildId, kept: &Arc<Kept>) {
        self.lock().kept.insert(build.clone(), Arc::clone(kept));
    }

    /// Forgets `kept`, unless another one has taken its place.
    fn forget(&self, build: &BuildId, kept: &Arc<Kept>) {
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

/// A look-up's entry among those under way; goes with it, even if it panics.
struct UnderWay {
    places: Arc<Places>,
    build: BuildId,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.places.lock().under_way.remove(&self.build);
    }
}

/// Keeps the place of `build`, whose request is at `path`, for as long as it is asked for and the
/// session of `client` lives. Holds no client while it waits: the session is to end when the last
/// one is dropped.
pub(super) async fn keep(lookup: Arc<Lookup>, client: Client, build: BuildId, path: String) {
    let session = client.session_id();
    let mut client = Some(client);
    while let Some(now) = client.take() {
        let Ok((request, _, watcher)) = now.get_and_watch_data(&path).await else { return };
        drop(now);
        let Ok(Some(Build::On(executor))) = Build::from_json(&request) else { return };
        let kept = Arc::new(Kept { session, executor, asked_for: AtomicBool::new(false) });
        lookup.places.keep(&build, &kept);
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
        lookup.places.forget(&build, &kept);
        debug!(%build, event = event.as_ref().map(|event| event.event_type.to_string()), "place forgotten");
        if event.is_some_and(|event| event.event_type == EventType::NodeDataChanged) {
            client = lookup.client().filter(|client| client.session_id() == session);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use tokio::sync::Semaphore;

    use super::*;

    fn build(text: &str) -> BuildId {
        BuildId::new(text).expect("a build id")
    }

    #[tokio::test]
    async fn look_ups_at_the_same_moment_are_one() {
        let places = Arc::new(Places::default());
        let (asked, gate) = (Arc::new(AtomicUsize::new(0)), Arc::new(Semaphore::new(0)));
        let look_up = || {
            let (asked, gate) = (Arc::clone(&asked), Arc::clone(&gate));
            move || async move {
                asked.fetch_add(1, Ordering::Relaxed);
                gate.acquire().await.expect("open").forget();
                Ok(Some(Build::Waiting))
            }
        };
        let (one, other) = (build("abc"), build("def"));
        let questions = async {
            tokio::join!(
                places.share(&one, look_up()),
                places.share(&one, look_up()),
                places.share(&other, look_up()),
                places.share(&one, look_up()),
            )
        };
        let answers = tokio::join!(questions, async { gate.add_permits(2) }).0;
        let waiting = || Ok(Some(Build::Waiting));
        assert_eq!(answers, (waiting(), waiting(), waiting(), waiting()));
        assert_eq!(asked.load(Ordering::Relaxed), 2, "one for each build");
        gate.add_permits(1);
        assert_eq!(places.share(&one, look_up()).await, waiting());
        assert_eq!(asked.load(Ordering::Relaxed), 3, "an answer is not older than its question");
        assert!(places.lock().under_way.is_empty());
    }

    #[tokio::test]
    async fn a_look_up_that_panics_harms_only_those_who_wait_for_it() {
        let places = Arc::new(Places::default());
        let found = places.share(&build("abc"), || async { panic!("on purpose") }).await;
        assert!(matches!(found, Err(LookupError::Away(_))));
        assert_eq!(places.share(&build("abc"), || async { Ok(None) }).await, Ok(None));
    }

    #[test]
    fn the_second_request_is_known_for_it() {
        let places = Places::default();
        assert!(!places.is_popular(&build("abc")));
        assert!(!places.is_popular(&build("def")));
        assert!(places.is_popular(&build("abc")));
        for number in 0..2 * FOUND_MAX {
            places.is_popular(&build(&format!("{number:x}")));
            assert!(places.lock().found.len() <= FOUND_MAX);
        }
    }
}
