//! Slots for connections to executors: at most three connections to one executor wait for their first
//! byte at a time, over all builds and clients.
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

use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep_until};

use crate::model::build_id::BuildId;
use crate::model::build_request::Executor;

/// Slots of one executor. With three, two gateways that ask the same executor fit into its backlog
/// and the connection that it is accepting.
const SLOTS: usize = 3;

/// How long a slot is held at most while other requests wait: an executor that does not answer
/// delays the next request by no more than this.
const HOLD: Duration = Duration::from_secs(1);

/// The slots of all executors that are being asked. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct ExecutorSlots(Arc<Mutex<Executors>>);

/// Executors that are not being asked keep their entries up to this number, so that a request allocates
/// nothing. There are not more executors in the registry of most systems.
const IDLE_MAX: usize = 1024;

type Executors = HashMap<Executor, Arc<Slots>>;

/// The slots of one executor.
struct Slots {
    /// A permit for each free slot, given to waiters in the order in which they came. It is forgotten
    /// when the slot enters [`State::taken`].
    free: Semaphore,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Numbers what happens, to compare what came first.
    last: u64,
    /// The slots that are taken, the oldest first: the number of the request, and since when.
    taken: VecDeque<(u64, Instant)>,
    /// The executor's last first byte.
    answered: u64,
    /// The last report that a build got no first byte in time. A later answer removes it.
    silent: Option<(u64, BuildId)>,
}

/// A slot, free again when this is dropped, or after [`HOLD`] if a request waits for it.
pub(crate) struct ExecutorSlot {
    slots: Arc<Slots>,
    /// That of the wait for the slot, or of the request once the slot is taken.
    number: u64,
}

impl ExecutorSlots {
    /// Takes a slot of `executor` if one is free and no request waits for it.
    pub(crate) fn try_acquire(&self, executor: &Executor) -> Option<ExecutorSlot> {
        let mut slot = self.slot(executor);
        slot.slots.free.try_acquire().ok()?.forget();
        slot.take();
        Some(slot)
    }

    /// Waits for a slot of `executor` after the requests that wait already.
    ///
    /// Returns `None` at `deadline`, or when a request for `build` has meanwhile been reported to get
    /// no first byte: this one would not either. That is checked only in waits of about [`HOLD`] and
    /// more: most are over within a millisecond and must not cost more than the request itself.
    pub(crate) async fn acquire(
        &self,
        executor: &Executor,
        build: &BuildId,
        deadline: Instant,
    ) -> Option<ExecutorSlot> {
        let mut slot = self.slot(executor);
        slot.number = slot.slots.state().next();
        {
            let slots = &slot.slots;
            let mut permit = pin!(slots.free.acquire());
            loop {
                tokio::select! {
                    biased;
                    permit = &mut permit => {
                        // The semaphore is never closed.
                        let permit = permit.ok()?;
                        if slots.is_silent(build, slot.number) {
                            return None;
                        }
                        permit.forget();
                        break;
                    }
                    () = sleep_until(deadline.min(slots.next_release())) => {
                        if Instant::now() >= deadline || slots.is_silent(build, slot.number) {
                            return None;
                        }
                        slots.release_held();
                    }
                }
            }
        }
        slot.take();
        Some(slot)
    }

    /// A slot of `executor` that is not yet taken.
    fn slot(&self, executor: &Executor) -> ExecutorSlot {
        let mut executors = self.lock();
        if let Some(slots) = executors.get(executor) {
            return ExecutorSlot { slots: Arc::clone(slots), number: 0 };
        }
        if executors.len() >= IDLE_MAX {
            // References are only added under the lock of the table.
            executors.retain(|_, slots| Arc::strong_count(slots) > 1);
        }
        let slots = Arc::new(Slots { free: Semaphore::new(SLOTS), state: Mutex::default() });
        executors.insert(executor.clone(), Arc::clone(&slots));
        ExecutorSlot { slots, number: 0 }
    }

    fn lock(&self) -> MutexGuard<'_, Executors> {
        // The table is consistent between any two statements.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slots {
    /// When the slot that is held for longest has been held for [`HOLD`].
    fn next_release(&self) -> Instant {
        let oldest = self.state().taken.front().map(|(_, since)| *since);
        oldest.unwrap_or_else(Instant::now) + HOLD
    }

    /// Frees the slots that have been held for [`HOLD`].
    fn release_held(&self) {
        let mut state = self.state();
        while let Some((_, since)) = state.taken.front()
            && since.elapsed() >= HOLD
        {
            state.taken.pop_front();
            self.free.add_permits(1);
        }
    }

    /// Whether a request for `build` has been reported to get no first byte after `number`.
    fn is_silent(&self, build: &BuildId, number: u64) -> bool {
        let state = self.state();
        state.silent.as_ref().is_some_and(|(report, silent)| *report > number && silent == build)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Consistent between any two statements.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn next(&mut self) -> u64 {
        self.last += 1;
        self.last
    }
}

impl ExecutorSlot {
    /// Enters this slot, whose permit has been forgotten, as taken.
    fn take(&mut self) {
        let mut state = self.slots.state();
        self.number = state.next();
        state.taken.push_back((self.number, Instant::now()));
    }

    /// Frees the slot: the first byte has come.
    pub(crate) fn answered(self) {
        let mut state = self.slots.state();
        state.answered = state.next();
        state.silent = None;
    }

    /// Frees the slot and lets requests for `build` that wait for one fail: this one got no byte
    /// within the first-byte timeout. Ignored if the executor has answered another one meanwhile.
    pub(crate) fn silent(self, build: &BuildId) {
        let mut state = self.slots.state();
        if state.answered < self.number {
            state.silent = Some((state.next(), build.clone()));
        }
    }
}

impl Drop for ExecutorSlot {
    fn drop(&mut self) {
        let mut state = self.slots.state();
        if let Some(index) = state.taken.iter().position(|(number, _)| *number == self.number) {
            state.taken.remove(index);
            self.slots.free.add_permits(1);
        }
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

    async fn acquire(slots: &ExecutorSlots, id: &str, patience: Duration) -> Option<ExecutorSlot> {
        let deadline = Instant::now() + patience;
        slots.acquire(&executor(1), &build(id), deadline).await
    }

    fn take_all(slots: &ExecutorSlots, port: u16) -> Vec<ExecutorSlot> {
        (0..SLOTS).map(|_| slots.try_acquire(&executor(port)).expect("a free slot")).collect()
    }

    /// Requests that have held their slots for too long, and those that have them now.
    async fn hanging(slots: &ExecutorSlots) -> (Vec<ExecutorSlot>, Vec<ExecutorSlot>) {
        let hanging = take_all(slots, 1);
        let mut held = Vec::new();
        for _ in 0..SLOTS {
            held.push(acquire(slots, "ab", PATIENCE).await.expect("a slot"));
        }
        (hanging, held)
    }

    #[tokio::test(start_paused = true)]
    async fn released_slot_goes_to_the_first_waiter() {
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
    async fn slot_held_for_a_second_goes_to_a_waiter_and_is_freed_only_once() {
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
    }

    #[tokio::test(start_paused = true)]
    async fn waiter_gives_up_after_its_patience_and_leaves_no_trace() {
        let slots = ExecutorSlots::default();
        let held = take_all(&slots, 1);
        let patience = HOLD / 2;
        assert!(acquire(&slots, "ab", patience).await.is_none());
        drop(held);
        assert_eq!(take_all(&slots, 1).len(), SLOTS);
    }

    #[tokio::test(start_paused = true)]
    async fn report_of_silence_ends_the_waits_for_the_same_build_that_began_before() {
        let slots = ExecutorSlots::default();
        let (mut hanging, _held) = hanging(&slots).await;
        let mut waiting = pin!(acquire(&slots, "ab", PATIENCE));
        let mut others = pin!(acquire(&slots, "cd", PATIENCE));
        assert!(waiting.as_mut().now_or_never().is_none());
        assert!(others.as_mut().now_or_never().is_none());
        hanging.remove(0).silent(&build("ab"));
        let later = acquire(&slots, "ab", PATIENCE);
        let (waited, other, later) = tokio::join!(waiting, others, later);
        assert!(waited.is_none());
        assert!(other.is_some(), "another build");
        assert!(later.is_some(), "it came after the report");
    }

    #[tokio::test(start_paused = true)]
    async fn answer_withdraws_a_report_of_silence_and_older_ones_are_ignored() {
        let slots = ExecutorSlots::default();
        let (mut hanging, mut held) = hanging(&slots).await;
        let mut first = pin!(acquire(&slots, "cd", PATIENCE));
        let mut waiting = pin!(acquire(&slots, "ab", PATIENCE));
        assert!(first.as_mut().now_or_never().is_none());
        assert!(waiting.as_mut().now_or_never().is_none());
        hanging.remove(0).silent(&build("ab"));
        held.remove(0).answered();
        hanging.remove(0).silent(&build("ab"));
        let _first = first.await.expect("the slot of the one that was answered");
        assert!(waiting.await.is_some(), "the executor answers again");
    }

    #[test]
    fn entries_of_executors_that_are_not_asked_are_bounded() {
        let slots = ExecutorSlots::default();
        let held = slots.try_acquire(&executor(1)).expect("a free slot");
        for port in 2..10_000 {
            drop(slots.try_acquire(&executor(port)).expect("a free slot"));
            assert!(slots.lock().len() <= IDLE_MAX);
        }
        assert!(slots.lock().contains_key(&executor(1)), "it is being asked");
        drop(held);
    }
}
