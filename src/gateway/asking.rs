//! Requests for a build that wait for the first byte from another gateway: a bounded number.
//!
//! A wiring mistake, such as a port forward that leads back to us, makes a circle: each of our
//! requests comes in again and asks again, until all connections are used up. Finger carries no
//! hop count that would show it. But in a circle no first byte ever comes, so the places run out,
//! the last request waits in vain, and its refusal travels back through all the others.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tracing::warn;

use super::upstream::Upstream;
use crate::registry::build::BuildId;

/// Places for one build. People who ask for a build at the same moment take turns in them for the
/// few milliseconds up to a first byte.
const PLACES: usize = 16;

/// All builds that are being asked for at other gateways.
#[derive(Clone, Default)]
pub(crate) struct Asking(Arc<Mutex<Builds>>);

type Builds = HashMap<BuildId, Arc<Semaphore>>;

/// A place among those who wait for a first byte; free again when dropped.
pub(crate) struct Place {
    _taken: Option<Taken>,
}

struct Taken {
    build: BuildId,
    builds: Arc<Mutex<Builds>>,
    permit: Option<OwnedSemaphorePermit>,
}

impl Asking {
    /// A place to ask `hop` for `build` from; `None` if none is free within `patience`. Executors
    /// ask nobody else, so they cannot be part of a circle and need none.
    pub(crate) async fn place(
        &self,
        build: &BuildId,
        hop: &Upstream,
        patience: Duration,
    ) -> Option<Place> {
        if matches!(hop, Upstream::Executor(_)) {
            return Some(Place { _taken: None });
        }
        let places = {
            let mut builds = lock(&self.0);
            let places = builds.entry(build.clone());
            Arc::clone(places.or_insert_with(|| Arc::new(Semaphore::new(PLACES))))
        };
        match timeout(patience, places.acquire_owned()).await {
            Ok(permit) => {
                let (build, builds) = (build.clone(), Arc::clone(&self.0));
                Some(Place { _taken: Some(Taken { build, builds, permit: permit.ok() }) })
            }
            Err(_) => {
                // A peer can bring this about only with a build that the system knows, and only
                // once in `patience`.
                warn!(
                    %build, route = %hop,
                    "{PLACES} requests for one build wait for this gateway: does its address \
                     lead back to us, or to a gateway that leads here?"
                );
                None
            }
        }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        drop(self.permit.take());
        let mut builds = lock(&self.builds);
        if let Some(places) = builds.get(&self.build) {
            // Nobody else holds or awaits one: only the map knows it.
            if Arc::strong_count(places) == 1 {
                builds.remove(&self.build);
            }
        }
    }
}

/// The map is whole between any two statements, so a poisoned lock is as good as any.
fn lock(builds: &Mutex<Builds>) -> MutexGuard<'_, Builds> {
    builds.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::component::Gateway;

    fn gateway() -> Upstream {
        Upstream::Gateway(Gateway {
            hostname: "gw".to_owned(),
            port: 7979,
            zone: Some("west".to_owned()),
            tls: false,
        })
    }

    #[tokio::test(start_paused = true)]
    async fn places_run_out_come_back_and_leave_nothing() {
        let asking = Asking::default();
        let build = BuildId::new("abc").expect("a build id");
        let patience = Duration::from_secs(5);
        let mut places = Vec::new();
        for _ in 0..PLACES {
            places.push(asking.place(&build, &gateway(), patience).await.expect("a place"));
        }
        assert!(asking.place(&build, &gateway(), patience).await.is_none(), "one too many");
        let other = BuildId::new("def").expect("a build id");
        assert!(asking.place(&other, &gateway(), patience).await.is_some(), "another build");
        places.pop();
        assert!(asking.place(&build, &gateway(), patience).await.is_some());
        places.clear();
        assert!(lock(&asking.0).is_empty());
    }
}
