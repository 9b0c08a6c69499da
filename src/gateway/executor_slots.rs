//! Slots for connections to executors: at most [`SLOTS`] connections to one executor wait for their
//! first byte at a time, over all builds and clients.
//!
//! An executor's log streamer listens with a backlog of 5 (`request_queue_size` of Python's
//! `socketserver`). A connection that finds it full is established for us, but the executor's kernel
//! has dropped it and takes it only when the client's kernel sends again, after 1, 3, 7 and 15
//! seconds. So of 100 clients that ask for one build in the same moment a third gets no log in time.
//! The same clients one after the other get it within a second.

use std::collections::{HashMap, VecDeque};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, sleep_until};

use crate::registry::build::{BuildId, Executor};

/// Slots of one executor. With three, two gateways that ask the same executor fit into its backlog.
const SLOTS: usize = 3;

/// How long a slot is held at most: an executor that does not answer delays the next client by no
/// more than this.
const HOLD: Duration = Duration::from_secs(1);

/// The slots of all executors that are being asked. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct ExecutorSlots(Arc<Mutex<Executors>>);

/// By host and port. An entry exists as long as it has users.
type Executors = HashMap<(String, u16), Entry>;

struct Entry {
    slots: Arc<Slots>,
    /// The [`User`]s of `slots`.
    users: usize,
}

/// The slots of one executor.
struct Slots {
    executor: (String, u16),
    /// Its waiters get a permit in the order in which they came. A permit is forgotten when it has
    /// become a holder.
    free: Semaphore,
    holders: Mutex<Holders>,
    /// The build for which this executor has last sent nothing for the whole first-byte deadline.
    silent: watch::Sender<Option<BuildId>>,
}

#[derive(Default)]
struct Holders {
    next: u64,
    /// Those whose slots are taken, the oldest first, with the time since when.
    taken: VecDeque<(u64, Instant)>,
}

/// Keeps the slots of an executor in the table.
struct User {
    slots: Arc<Slots>,
    table: ExecutorSlots,
}

/// A slot, free again when this is dropped, or after [`HOLD`].
pub(crate) struct ExecutorSlot {
    user: User,
    number: u64,
}

impl ExecutorSlots {
    /// Takes a slot of `executor` if one is free and no client waits for it.
    pub(crate) fn try_acquire(&self, executor: &Executor) -> Option<ExecutorSlot> {
        let user = self.user(executor);
        user.slots.free.try_acquire().ok()?.forget();
        Some(user.hold())
    }

    /// Waits for a slot of `executor`, behind those that wait already. Returns `None` after
    /// `patience`, or when another client has waited in vain for a first byte of `build`: this one
    /// would fare no better.
    ///
    /// The latter also ends a loop through a port forward that leads from the executor's address
    /// back to this gateway, where each request makes the next one.
    pub(crate) async fn acquire(
        &self,
        executor: &Executor,
        build: &BuildId,
        patience: Duration,
    ) -> Option<ExecutorSlot> {
        let deadline = Instant::now() + patience;
        let user = self.user(executor);
        let mut silent = user.slots.silent.subscribe();
        {
            let mut permit = pin!(user.slots.free.acquire());
            loop {
                tokio::select! {
                    biased;
                    permit = &mut permit => {
                        permit.ok()?.forget();
                        break;
                    }
                    changed = silent.changed() => {
                        changed.ok()?;
                        if silent.borrow_and_update().as_ref() == Some(build) {
                            return None;
                        }
                    }
                    () = sleep_until(user.slots.next_expiry().min(deadline)) => {
                        if Instant::now() >= deadline {
                            return None;
                        }
                        user.slots.expire();
                    }
                }
            }
        }
        Some(user.hold())
    }

    /// Tells those that wait for a slot to ask `executor` for `build` that it has sent nothing for
    /// the whole first-byte deadline.
    pub(crate) fn report_silent(&self, executor: &Executor, build: &BuildId) {
        let key = (executor.hostname.clone(), executor.port);
        if let Some(entry) = self.lock().get(&key) {
            entry.slots.silent.send_replace(Some(build.clone()));
        }
    }

    fn user(&self, executor: &Executor) -> User {
        let key = (executor.hostname.clone(), executor.port);
        let mut executors = self.lock();
        let entry = executors.entry(key).or_insert_with_key(|key| {
            let slots = Slots {
                executor: key.clone(),
                free: Semaphore::new(SLOTS),
                holders: Mutex::default(),
                silent: watch::Sender::new(None),
            };
            Entry { slots: Arc::new(slots), users: 0 }
        });
        entry.users += 1;
        User { slots: Arc::clone(&entry.slots), table: self.clone() }
    }

    fn lock(&self) -> MutexGuard<'_, Executors> {
        // The table is consistent between any two statements.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slots {
    /// When the oldest holder loses its slot; about that where there is none, because a permit is
    /// just becoming a holder.
    fn next_expiry(&self) -> Instant {
        let oldest = self.holders().taken.front().map(|(_, since)| *since);
        oldest.unwrap_or_else(Instant::now) + HOLD
    }

    /// Frees the slots that have been held for [`HOLD`].
    fn expire(&self) {
        let mut holders = self.holders();
        while let Some((_, since)) = holders.taken.front()
            && since.elapsed() >= HOLD
        {
            holders.taken.pop_front();
            self.free.add_permits(1);
        }
    }

    /// Frees the slot `number` unless it has been freed already.
    fn release(&self, number: u64) {
        let mut holders = self.holders();
        if let Some(index) = holders.taken.iter().position(|(taken, _)| *taken == number) {
            holders.taken.remove(index);
            self.free.add_permits(1);
        }
    }

    fn holders(&self) -> MutexGuard<'_, Holders> {
        // Consistent between any two statements.
        self.holders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl User {
    /// Makes a slot of the permit that has just been forgotten.
    fn hold(self) -> ExecutorSlot {
        let mut holders = self.slots.holders();
        let number = holders.next;
        holders.next += 1;
        holders.taken.push_back((number, Instant::now()));
        drop(holders);
        ExecutorSlot { user: self, number }
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let mut executors = self.table.lock();
        if let Some(entry) = executors.get_mut(&self.slots.executor) {
            entry.users -= 1;
            if entry.users == 0 {
                executors.remove(&self.slots.executor);
            }
        }
    }
}

impl Drop for ExecutorSlot {
    fn drop(&mut self) {
        self.user.slots.release(self.number);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    fn executor(port: u16) -> Executor {
        Executor { hostname: "ze01".to_owned(), port, zone: None }
    }

    fn build(id: &str) -> BuildId {
        BuildId::new(id).expect("a build id")
    }

    fn take_all(slots: &ExecutorSlots, port: u16) -> Vec<ExecutorSlot> {
        (0..SLOTS).map(|_| slots.try_acquire(&executor(port)).expect("a free slot")).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_released_slot_goes_to_the_first_waiter() {
        let slots = ExecutorSlots::default();
        let mut held = take_all(&slots, 1);
        assert!(slots.try_acquire(&executor(1)).is_none(), "all are taken");
        assert!(slots.try_acquire(&executor(2)).is_some(), "another executor");
        let (executor, build) = (executor(1), build("ab"));
        let mut first = pin!(slots.acquire(&executor, &build, PATIENCE));
        let mut second = pin!(slots.acquire(&executor, &build, PATIENCE));
        assert!(first.as_mut().now_or_never().is_none());
        assert!(second.as_mut().now_or_never().is_none());
        held.pop();
        assert!(slots.try_acquire(&executor).is_none(), "it belongs to a waiter");
        assert!(second.as_mut().now_or_never().is_none(), "the other one came first");
        assert!(first.now_or_never().flatten().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_slot_held_for_a_second_goes_to_a_waiter_and_is_freed_only_once() {
        let slots = ExecutorSlots::default();
        let held = take_all(&slots, 1);
        let began = Instant::now();
        let mut taken = Vec::new();
        for _ in 0..2 * SLOTS {
            taken.push(slots.acquire(&executor(1), &build("ab"), PATIENCE).await.expect("a slot"));
        }
        assert_eq!(began.elapsed().as_secs(), 2, "three a second");
        drop(held);
        assert!(slots.try_acquire(&executor(1)).is_none(), "these were freed before");
        drop(taken);
        assert_eq!(take_all(&slots, 1).len(), SLOTS);
        assert!(slots.lock().is_empty(), "no executor is asked any more");
    }

    #[tokio::test(start_paused = true)]
    async fn a_waiter_gives_up_after_its_patience_and_leaves_no_trace() {
        let slots = ExecutorSlots::default();
        let held = take_all(&slots, 1);
        let patience = HOLD / 2;
        assert!(slots.acquire(&executor(1), &build("ab"), patience).await.is_none());
        drop(held);
        assert!(slots.lock().is_empty());
        assert_eq!(take_all(&slots, 1).len(), SLOTS);
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_executor_is_reported_to_those_that_wait_for_the_same_build() {
        let slots = ExecutorSlots::default();
        let _held = take_all(&slots, 1);
        let executor = executor(1);
        let (silent, other) = (build("ab"), build("cd"));
        slots.report_silent(&executor, &silent);
        let mut waiting = pin!(slots.acquire(&executor, &silent, PATIENCE));
        let mut others = pin!(slots.acquire(&executor, &other, PATIENCE));
        assert!(waiting.as_mut().now_or_never().is_none(), "it came after the report");
        assert!(others.as_mut().now_or_never().is_none());
        slots.report_silent(&executor, &silent);
        assert!(waiting.now_or_never().expect("an answer").is_none());
        assert!(others.now_or_never().is_none());
    }
}
