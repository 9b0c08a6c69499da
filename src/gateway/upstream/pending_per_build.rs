//! Bounds the requests for one build that wait for the first byte from one gateway.
//!
//! If a registered address leads back to this gateway, such as through a wrong port forward, each
//! of our requests arrives here again and is sent again. Between peer gateways over TLS the number
//! of hops in the request ends such a loop, see [`protocol`](crate::gateway::protocol). A plain
//! finger request has no such number, so a loop looks the same as many clients that request one
//! build. Both are treated alike: requests beyond the bound wait. Requests of clients proceed when
//! others have received their first byte. In a loop no first byte ever comes, so the last request
//! fails, and its reply travels back through all the others.
//!
//! A full bound says nothing about the health of the gateway, so it is neither recorded as a
//! failure nor reported as misrouting.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use crate::config::Limits;
use crate::model::build_id::BuildId;
use crate::model::hop::Hop;

/// Returns how many requests for one build may wait for a gateway's first byte. A loop uses as many
/// of the connections that this gateway accepts.
fn slots(limits: &Limits) -> usize {
    (limits.connections / 64).clamp(8, 64)
}

/// Counts the requests that wait for a first byte, by build and gateway. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct PendingPerBuild(Arc<Mutex<Pending>>);

type Pending = HashMap<Key, Arc<Slots>>;

/// Build, host and port.
type Key = (BuildId, String, u16);

/// The slots of one build at one gateway.
struct Slots {
    free: Arc<Semaphore>,
    /// How often a slot has become free.
    freed: AtomicU64,
    /// Requests that hold or await a slot. Changed under the lock of the map only.
    users: AtomicUsize,
}

/// A request that waits for a first byte; its slot is free again when this is dropped.
pub(crate) struct PendingGuard {
    key: Key,
    pending: Arc<Mutex<Pending>>,
    slots: Arc<Slots>,
    permit: Option<OwnedSemaphorePermit>,
}

impl PendingPerBuild {
    /// Waits for a slot to request `build` from `hop`. Returns `None` when no slot at all has
    /// become free for the connect timeout. The caller bounds the whole wait.
    pub(crate) async fn acquire(
        &self,
        build: &BuildId,
        hop: &Hop,
        limits: &Limits,
    ) -> Option<PendingGuard> {
        let (hostname, port) = hop.address();
        let key = (build.clone(), hostname.to_owned(), port);
        let slots = {
            let mut pending = lock(&self.0);
            let slots = Arc::clone(pending.entry(key.clone()).or_insert_with(|| {
                let free = Arc::new(Semaphore::new(slots(limits)));
                let users = AtomicUsize::new(0);
                Arc::new(Slots { free, freed: AtomicU64::new(0), users })
            }));
            slots.users.fetch_add(1, Ordering::Relaxed);
            slots
        };
        // Created before the wait, so that a cancelled caller is removed from the map as well.
        let mut guard = PendingGuard { key, pending: Arc::clone(&self.0), slots, permit: None };
        let mut permit = pin!(Arc::clone(&guard.slots.free).acquire_owned());
        loop {
            let freed = guard.slots.freed.load(Ordering::Relaxed);
            match timeout(limits.connect_timeout, &mut permit).await {
                Ok(permit) => {
                    guard.permit = permit.ok();
                    return Some(guard);
                }
                Err(_) if guard.slots.freed.load(Ordering::Relaxed) != freed => {}
                Err(_) => return None,
            }
        }
    }
}

impl Drop for PendingGuard {
    fn drop(&mut self) {
        let mut pending = lock(&self.pending);
        if self.permit.take().is_some() {
            self.slots.freed.fetch_add(1, Ordering::Relaxed);
        }
        if self.slots.users.fetch_sub(1, Ordering::Relaxed) == 1 {
            pending.remove(&self.key);
        }
    }
}

/// Locks the map. It is consistent between any two statements, so a poisoned lock can be used.
fn lock(pending: &Mutex<Pending>) -> MutexGuard<'_, Pending> {
    pending.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::{Instant, sleep};

    use super::*;
    use crate::model::component::Gateway;

    fn gateway() -> Hop {
        Hop::Gateway(Gateway {
            hostname: "gw".to_owned(),
            port: 7979,
            zone: Some("west".to_owned()),
            tls: false,
        })
    }

    fn build(id: &str) -> BuildId {
        BuildId::new(id).expect("a build ID")
    }

    #[tokio::test(start_paused = true)]
    async fn slots_are_per_build_and_leave_nothing_in_the_map() {
        let (guard, limits) = (PendingPerBuild::default(), Limits::default());
        let abc = build("abc");
        let mut held = Vec::new();
        for _ in 0..slots(&limits) {
            held.push(guard.acquire(&abc, &gateway(), &limits).await.expect("a free slot"));
        }
        assert!(guard.acquire(&abc, &gateway(), &limits).await.is_none(), "all slots are taken");
        assert!(guard.acquire(&build("def"), &gateway(), &limits).await.is_some(), "another build");
        held.pop();
        assert!(guard.acquire(&abc, &gateway(), &limits).await.is_some(), "one slot is free");
        held.clear();
        assert!(lock(&guard.0).is_empty());
    }

    /// Eight rounds of requests whose first byte takes almost as long as a wait without a free slot
    /// may.
    #[tokio::test(start_paused = true)]
    async fn wait_goes_on_while_slots_become_free() {
        let (guard, limits) = (PendingPerBuild::default(), Limits::default());
        let first_byte = limits.connect_timeout - Duration::from_millis(1);
        let began = Instant::now();
        let mut requests = tokio::task::JoinSet::new();
        for _ in 0..8 * slots(&limits) {
            let (guard, limits) = (guard.clone(), limits.clone());
            requests.spawn(async move {
                let slot = guard.acquire(&build("abc"), &gateway(), &limits).await;
                sleep(first_byte).await;
                slot.is_some()
            });
        }
        assert!(requests.join_all().await.into_iter().all(|has_slot| has_slot));
        assert_eq!(began.elapsed().as_secs(), (8 * first_byte).as_secs());
    }
}
