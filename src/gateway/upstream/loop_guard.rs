//! Requests for a build that wait for the first byte from another gateway: a bounded number.
//!
//! A wiring mistake, such as a port forward that leads back to us, makes a circle: each of our
//! requests comes in again and asks again, until all connections are used up. Finger carries no
//! hop count that would show it. But in a circle no first byte ever comes, so the places run out,
//! the last request waits in vain, and its refusal travels back through all the others.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::Upstream;
use crate::model::build_id::BuildId;

/// Places for one build. People who ask for a build at the same moment take turns in them for the
/// few milliseconds up to a first byte.
const PLACES: usize = 16;

/// All builds that are being asked for at other gateways.
#[derive(Clone, Default)]
pub(crate) struct Asking(Arc<Mutex<Builds>>);

/// By build and gateway.
type Builds = HashMap<Asked, Arc<Places>>;

type Asked = (BuildId, String, u16);

/// The places for one build at one gateway.
struct Places {
    free: Arc<Semaphore>,
    /// How often one became free.
    freed: AtomicU64,
    /// Requests that hold or await one. Changed under the lock of the map only.
    users: AtomicUsize,
}

/// A place among those who wait for a first byte; free again when dropped.
pub(crate) struct Place {
    asked: Asked,
    builds: Arc<Mutex<Builds>>,
    places: Arc<Places>,
    permit: Option<OwnedSemaphorePermit>,
}

impl Asking {
    /// A place to ask `hop` for `build` from; `None` if none becomes free within `patience`. Executors
    /// ask nobody else and need none, unless they are registered with a gateway's address.
    pub(crate) async fn place(
        &self,
        build: &BuildId,
        hop: &Upstream,
        patience: Duration,
    ) -> Option<Place> {
        let (hostname, port) = hop.address();
        let asked = (build.clone(), hostname.to_owned(), port);
        let places = {
            let mut builds = lock(&self.0);
            let places = Arc::clone(builds.entry(asked.clone()).or_insert_with(|| {
                let free = Arc::new(Semaphore::new(PLACES));
                let users = AtomicUsize::new(0);
                Arc::new(Places { free, freed: AtomicU64::new(0), users })
            }));
            places.users.fetch_add(1, Ordering::Relaxed);
            places
        };
        // Whoever gives up leaves nothing behind, either.
        let mut taken = Place { asked, builds: Arc::clone(&self.0), places, permit: None };
        let mut place = pin!(Arc::clone(&taken.places.free).acquire_owned());
        loop {
            let freed = taken.places.freed.load(Ordering::Relaxed);
            match timeout(patience, &mut place).await {
                Ok(permit) => {
                    taken.permit = permit.ok();
                    return Some(taken);
                }
                Err(_) if taken.places.freed.load(Ordering::Relaxed) != freed => {}
                Err(_) => return None,
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut builds = lock(&self.builds);
        if self.permit.take().is_some() {
            self.places.freed.fetch_add(1, Ordering::Relaxed);
        }
        if self.places.users.fetch_sub(1, Ordering::Relaxed) == 1 {
            builds.remove(&self.asked);
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
    use crate::model::component::Gateway;

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
