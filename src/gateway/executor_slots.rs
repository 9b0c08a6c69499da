//! Slots for connections to executors: at most three connections to one executor wait for their first
//! byte at a time, over all builds and clients; more where it answers very quickly.
//!
//! An executor's log streamer listens with a backlog of 5 (`request_queue_size` of Python's
//! `socketserver`). A connection that finds it full is established for us, but the executor's kernel
//! has dropped it and takes it only when the client's kernel sends again, after 1, 3, 7 and 15
//! seconds. So of 100 clients that ask for one build in the same moment a third gets no log in time.
//! The same clients one after the other get it within a second.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore};
use tokio::time::{Instant, sleep_until};

use super::Context;
use crate::registry::build::{BuildId, Executor};

/// Slots of one executor at least. With three, two gateways that ask the same executor fit into its
/// backlog.
const SLOTS: usize = 3;

/// Slots at most, and the time within which a first byte has to come for there to be one more than
/// now, if clients wait; with each later one there is one less. In a crowd the time from the dial to
/// the first byte is about the number of slots times what one request costs the executor, so the
/// number settles at this time divided by that cost. It stays near three for Zuul's log streamer,
/// which starts a Python thread for each, and is no bottleneck for servers that are much faster.
const SLOTS_MAX: usize = 64;
const QUICK: Duration = Duration::from_micros(500);

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
    state: Mutex<State>,
    /// Wakes the waiters when a build is silent, and when the clock has moved for them.
    changed: Notify,
}

#[derive(Default)]
struct State {
    /// The number of the next holder or waiter.
    next: u64,
    /// The slots that there are, taken or free.
    limit: usize,
    /// Those whose slots are taken, the oldest first, with the time since when.
    taken: VecDeque<(u64, Instant)>,
    /// The deadlines of those that wait.
    waiting: BTreeSet<(Instant, u64)>,
    /// Whether [`Slots::watch_clock`] runs.
    clock_runs: bool,
    /// The build for which this executor has last sent nothing for the whole first-byte deadline.
    silent: Option<BuildId>,
}

/// One that waits for a slot.
struct Waiter<'s> {
    slots: &'s Slots,
    deadline: (Instant, u64),
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
        Some(ExecutorSlot::new(user))
    }

    /// Waits for a slot of `executor`, behind those that wait already.
    ///
    /// # Errors
    /// `None` after `patience`, or when another client has waited in vain for a first byte of `build`:
    /// this one would fare no better. That also ends a loop through a port forward that leads from the
    /// executor's address back to this gateway, where each request makes the next one. Else what
    /// `meanwhile` returns, which is polled in waits of more than [`HOLD`] only: most are over within
    /// a millisecond and must not cost more than the request itself.
    pub(crate) async fn acquire<T>(
        &self,
        executor: &Executor,
        build: &BuildId,
        patience: Duration,
        meanwhile: impl Future<Output = T>,
    ) -> Result<ExecutorSlot, Option<T>> {
        let deadline = Instant::now() + patience;
        let user = self.user(executor);
        {
            let slots = &user.slots;
            let _waiter = Waiter::new(slots, deadline);
            let mut permit = pin!(slots.free.acquire());
            let mut meanwhile = pin!(meanwhile);
            let mut is_long = false;
            loop {
                tokio::select! {
                    biased;
                    permit = &mut permit => match permit {
                        Ok(permit) => {
                            permit.forget();
                            break;
                        }
                        // The semaphore is never closed.
                        Err(_) => return Err(None),
                    },
                    () = slots.changed.notified() => {
                        let is_silent = slots.state().silent.as_ref() == Some(build);
                        if is_silent || Instant::now() >= deadline {
                            return Err(None);
                        }
                        is_long = true;
                    }
                    ended = &mut meanwhile, if is_long => return Err(Some(ended)),
                }
            }
        }
        Ok(ExecutorSlot::new(user))
    }

    /// Tells those that wait for a slot to ask `executor` for `build` that it has sent nothing for
    /// the whole first-byte deadline.
    pub(crate) fn report_silent(&self, executor: &Executor, build: &BuildId) {
        let key = (executor.hostname.clone(), executor.port);
        if let Some(entry) = self.lock().get(&key) {
            entry.slots.state().silent = Some(build.clone());
            entry.slots.changed.notify_waiters();
        }
    }

    fn user(&self, executor: &Executor) -> User {
        let key = (executor.hostname.clone(), executor.port);
        let mut executors = self.lock();
        let entry = executors.entry(key).or_insert_with_key(|key| {
            let slots = Slots {
                executor: key.clone(),
                free: Semaphore::new(SLOTS),
                state: Mutex::new(State { limit: SLOTS, ..State::default() }),
                changed: Notify::new(),
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

impl Context {
    /// A slot to ask `executor` for `build`, waiting for it up to the first-byte deadline. Fails as
    /// [`ExecutorSlots::acquire`] does.
    pub(super) async fn executor_slot<T>(
        &self,
        executor: &Executor,
        build: &BuildId,
        meanwhile: impl Future<Output = T>,
    ) -> Result<ExecutorSlot, Option<T>> {
        if let Some(slot) = self.executor_slots.try_acquire(executor) {
            return Ok(slot);
        }
        let began = Instant::now();
        let patience = self.limits.first_byte_timeout;
        let slot = self.executor_slots.acquire(executor, build, patience, meanwhile).await;
        self.metrics.waited_for_executor(began.elapsed());
        slot
    }
}

impl Slots {
    /// As long as there are waiters, frees slots that have been held for [`HOLD`] and wakes those whose
    /// deadline is over. One task for all: a timer for each waiter would cost more than most waits.
    async fn watch_clock(self: Arc<Self>) {
        loop {
            let next = {
                let mut state = self.state();
                let Some((deadline, _)) = state.waiting.first() else {
                    state.clock_runs = false;
                    return;
                };
                let oldest = state.taken.front().map(|(_, since)| *since);
                (*deadline).min(oldest.unwrap_or_else(Instant::now) + HOLD)
            };
            sleep_until(next).await;
            self.expire();
            self.changed.notify_waiters();
        }
    }

    /// Frees the slots that have been held for [`HOLD`].
    fn expire(&self) {
        let mut state = self.state();
        while let Some((_, since)) = state.taken.front()
            && since.elapsed() >= HOLD
        {
            state.taken.pop_front();
            self.free_one(&mut state, Some(HOLD));
        }
    }

    /// Frees a slot and adapts the number of slots to the time after which its first byte came, if
    /// it came.
    fn free_one(&self, state: &mut State, first_byte: Option<Duration>) {
        let permits = match first_byte {
            Some(time) if time >= QUICK && state.limit > SLOTS => 0,
            Some(time) if time < QUICK && state.limit < SLOTS_MAX && !state.waiting.is_empty() => 2,
            _ => 1,
        };
        state.limit = state.limit + permits - 1;
        self.free.add_permits(permits);
    }

    /// Frees the slot `number`, of a connection whose first byte has come or not, unless it has been
    /// freed already.
    fn release(&self, number: u64, has_answered: bool) {
        let mut state = self.state();
        let index = state.taken.iter().position(|(taken, _)| *taken == number);
        if let Some((_, since)) = index.and_then(|index| state.taken.remove(index)) {
            self.free_one(&mut state, has_answered.then(|| since.elapsed()));
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Consistent between any two statements.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ExecutorSlot {
    /// A slot for the permit that has just been forgotten.
    fn new(user: User) -> Self {
        let mut state = user.slots.state();
        let number = state.next;
        state.next += 1;
        state.taken.push_back((number, Instant::now()));
        drop(state);
        Self { user, number }
    }

    /// Frees the slot: the first byte has come.
    pub(crate) fn answered(self) {
        self.user.slots.release(self.number, true);
    }
}

impl<'s> Waiter<'s> {
    fn new(slots: &'s Arc<Slots>, deadline: Instant) -> Self {
        let mut state = slots.state();
        let deadline = (deadline, state.next);
        state.next += 1;
        state.waiting.insert(deadline);
        if !std::mem::replace(&mut state.clock_runs, true) {
            tokio::spawn(Arc::clone(slots).watch_clock());
        }
        Self { slots, deadline }
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.slots.state().waiting.remove(&self.deadline);
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
        self.user.slots.release(self.number, false);
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use futures_util::FutureExt;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    fn executor(port: u16) -> Executor {
        Executor { hostname: "ze01".to_owned(), port, zone: None }
    }

    fn build(id: &str) -> BuildId {
        BuildId::new(id).expect("a build id")
    }

    async fn acquire(slots: &ExecutorSlots, id: &str, patience: Duration) -> Option<ExecutorSlot> {
        slots.acquire(&executor(1), &build(id), patience, pending::<()>()).await.ok()
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
        let mut first = pin!(acquire(&slots, "ab", PATIENCE));
        let mut second = pin!(acquire(&slots, "ab", PATIENCE));
        assert!(first.as_mut().now_or_never().is_none());
        assert!(second.as_mut().now_or_never().is_none());
        held.pop();
        assert!(slots.try_acquire(&executor(1)).is_none(), "it belongs to a waiter");
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
            taken.push(acquire(&slots, "ab", PATIENCE).await.expect("a slot"));
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
        assert!(acquire(&slots, "ab", patience).await.is_none());
        drop(held);
        assert!(slots.lock().is_empty());
        assert_eq!(take_all(&slots, 1).len(), SLOTS);
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_executor_is_reported_to_those_that_wait_for_the_same_build() {
        let slots = ExecutorSlots::default();
        let _held = take_all(&slots, 1);
        let executor = executor(1);
        let silent = build("ab");
        slots.report_silent(&executor, &silent);
        let mut waiting = pin!(acquire(&slots, "ab", PATIENCE));
        let mut others = pin!(acquire(&slots, "cd", PATIENCE));
        assert!(waiting.as_mut().now_or_never().is_none(), "it came after the report");
        assert!(others.as_mut().now_or_never().is_none());
        slots.report_silent(&executor, &silent);
        assert!(waiting.now_or_never().expect("an answer").is_none());
        assert!(others.now_or_never().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_quick_executor_has_more_slots_as_long_as_it_is_quick() {
        let slots = ExecutorSlots::default();
        let mut held = take_all(&slots, 1);
        let mut waiting: Vec<_> =
            (0..2 * SLOTS).map(|_| Box::pin(acquire(&slots, "ab", PATIENCE))).collect();
        waiting.retain_mut(|wait| wait.as_mut().now_or_never().is_none());
        let limit = || slots.lock()[&("ze01".to_owned(), 1)].slots.state().limit;
        held.remove(0).answered();
        assert_eq!(limit(), SLOTS + 1);
        let mut served = Vec::new();
        for _ in 0..2 {
            served.push(waiting.remove(0).await.expect("the one that was freed, and a new one"));
        }
        tokio::time::advance(QUICK).await;
        held.remove(0).answered();
        assert_eq!(limit(), SLOTS, "it came late");
        drop(waiting);
        served.remove(0).answered();
        assert_eq!(limit(), SLOTS, "no less");
        drop((held, served));
        assert_eq!(take_all(&slots, 1).len(), SLOTS);
    }

    /// A client that leaves is noticed at the latest when a slot has been held for long.
    #[tokio::test(start_paused = true)]
    async fn something_else_ends_only_a_wait_that_is_long() {
        let slots = ExecutorSlots::default();
        let _held = take_all(&slots, 1);
        let (executor, build) = (executor(1), build("ab"));
        let patience = HOLD / 2;
        let waits = [patience, PATIENCE]
            .map(|patience| slots.acquire(&executor, &build, patience, ready("left")));
        let [mut short, mut long] = waits.map(Box::pin);
        assert!(short.as_mut().now_or_never().is_none() && long.as_mut().now_or_never().is_none());
        assert_eq!(short.await.err(), Some(None), "its patience is over");
        assert_eq!(long.await.err(), Some(Some("left")));
    }
}
