//! Slots for connections to executors: at most three connections to one executor wait for their
//! first byte at a time, over all builds and clients.
//!
//! An executor's log streamer listens with a backlog of 5 (`request_queue_size` of Python's
//! `socketserver`). A connection that finds it full is established for us, but the executor's
//! kernel has dropped it and accepts it only when our kernel retransmits, after 1, 3, 7 and 15
//! seconds. So of 100 clients that request one build at the same moment, a third gets no log in
//! time. The same clients one after the other get it within a second.

use std::collections::{HashMap, VecDeque};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep_until};

use crate::model::build_id::BuildId;
use crate::model::build_request::Executor;

/// The number of slots of one executor. With three, the connections of two gateways fit into the
/// executor's backlog of five and the connection that it is accepting.
const SLOTS: usize = 3;

/// How long a slot is held while other requests wait: an executor that sends nothing delays the
/// next request by no more than this.
const HOLD: Duration = Duration::from_secs(1);

/// The slots of all executors. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct ExecutorSlots(Arc<Mutex<Executors>>);

/// Up to this number, executors without requests keep their entries, so that a request allocates
/// nothing. Most systems have fewer executors.
const IDLE_MAX: usize = 1024;

type Executors = HashMap<Executor, Arc<Slots>>;

/// The slots of one executor.
struct Slots {
    /// A permit for each free slot, in the order of the waits. It is forgotten when the slot enters
    /// [`State::taken`].
    free: Semaphore,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The number of the last event. Requests that take a slot, first bytes and reports of silence
    /// are events, numbered in their order.
    last: u64,
    /// The slots that are taken, the oldest first: the number of the request, and when it took the
    /// slot.
    taken: VecDeque<(u64, Instant)>,
    /// The event number of the executor's latest first byte.
    answered: u64,
    /// The last report of a build without a first byte in time. A later first byte removes it.
    silent: Option<(u64, BuildId)>,
}

/// A slot, free again when this is dropped, or after [`HOLD`] if a request waits for it.
pub(crate) struct ExecutorSlot {
    slots: Arc<Slots>,
    /// The number of the wait for the slot, then that of the request that has taken it.
    number: u64,
}

impl ExecutorSlots {
    /// Takes a slot of `executor` if one is free and no request waits for one.
    pub(crate) fn try_acquire(&self, executor: &Executor) -> Option<ExecutorSlot> {
        let mut slot = self.slot(executor);
        slot.slots.free.try_acquire().ok()?.forget();
        slot.take();
        Some(slot)
    }

    /// Waits for a slot of `executor`, after the requests that wait already.
    ///
    /// Returns `None` at `deadline`, or when another request for `build` has meanwhile received no
    /// first byte in time, because this request would receive none either. That is checked only in
    /// waits of about [`HOLD`] and more: most waits end within a millisecond and must not cost more
    /// than the request itself.
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

    /// Returns a slot of `executor` that is not yet taken.
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
    /// Returns when the oldest of the taken slots will have been held for [`HOLD`].
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

    /// Returns whether [`ExecutorSlot::silent`] was called for `build` after event `number`.
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
    /// Returns the number of a new event.
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

    /// Frees the slot after the first byte was received.
    pub(crate) fn answered(self) {
        let mut state = self.slots.state();
        state.answered = state.next();
        state.silent = None;
    }

    /// Frees the slot after no byte was received within the first-byte timeout, and makes the
    /// requests for `build` that wait for a slot fail. Ignored if the executor has sent a first
    /// byte to another request meanwhile.
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

    const LONG_WAIT: Duration = Duration::from_secs(30);

    fn executor(port: u16) -> Executor {
        Executor { hostname: "ze01".to_owned(), port, zone: None }
    }

    fn build(id: &str) -> BuildId {
        BuildId::new(id).expect("a build ID")
    }

    async fn acquire(slots: &ExecutorSlots, id: &str, timeout: Duration) -> Option<ExecutorSlot> {
        let deadline = Instant::now() + timeout;
        slots.acquire(&executor(1), &build(id), deadline).await
    }

    fn take_all(slots: &ExecutorSlots, port: u16) -> Vec<ExecutorSlot> {
        (0..SLOTS).map(|_| slots.try_acquire(&executor(port)).expect("a free slot")).collect()
    }

    /// Returns the slots of requests that were held for too long, and those that are taken now.
    async fn hanging(slots: &ExecutorSlots) -> (Vec<ExecutorSlot>, Vec<ExecutorSlot>) {
        let hanging = take_all(slots, 1);
        let mut held = Vec::new();
        for _ in 0..SLOTS {
            held.push(acquire(slots, "ab", LONG_WAIT).await.expect("a slot"));
        }
        (hanging, held)
    }

    #[tokio::test(start_paused = true)]
    async fn released_slot_goes_to_the_first_waiter() {
        let slots = ExecutorSlots::default();
        let mut held = take_all(&slots, 1);
        assert!(slots.try_acquire(&executor(1)).is_none(), "all are taken");
        assert!(slots.try_acquire(&executor(2)).is_some(), "another executor");
        let mut first = pin!(acquire(&slots, "ab", LONG_WAIT));
        let mut second = pin!(acquire(&slots, "ab", LONG_WAIT));
        assert!(first.as_mut().now_or_never().is_none());
        assert!(second.as_mut().now_or_never().is_none());
        held.pop();
        assert!(slots.try_acquire(&executor(1)).is_none(), "the slot belongs to a waiter");
        assert!(second.as_mut().now_or_never().is_none(), "the first waiter came before");
        assert!(first.now_or_never().flatten().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn slot_held_for_a_second_goes_to_a_waiter_and_is_freed_only_once() {
        let slots = ExecutorSlots::default();
        let held = take_all(&slots, 1);
        let began = Instant::now();
        let mut taken = Vec::new();
        for _ in 0..2 * SLOTS {
            taken.push(acquire(&slots, "ab", LONG_WAIT).await.expect("a slot"));
        }
        assert_eq!(began.elapsed().as_secs(), 2, "three slots are freed in a second");
        drop(held);
        assert!(slots.try_acquire(&executor(1)).is_none(), "these slots were freed before");
        drop(taken);
        assert_eq!(take_all(&slots, 1).len(), SLOTS);
    }

    #[tokio::test(start_paused = true)]
    async fn waiter_that_reaches_its_deadline_leaves_no_entry() {
        let slots = ExecutorSlots::default();
        let held = take_all(&slots, 1);
        assert!(acquire(&slots, "ab", HOLD / 2).await.is_none());
        drop(held);
        assert_eq!(take_all(&slots, 1).len(), SLOTS);
    }

    #[tokio::test(start_paused = true)]
    async fn report_of_silence_ends_the_waits_for_the_same_build_that_began_before() {
        let slots = ExecutorSlots::default();
        let (mut hanging, _held) = hanging(&slots).await;
        let mut waiting = pin!(acquire(&slots, "ab", LONG_WAIT));
        let mut others = pin!(acquire(&slots, "cd", LONG_WAIT));
        assert!(waiting.as_mut().now_or_never().is_none());
        assert!(others.as_mut().now_or_never().is_none());
        hanging.remove(0).silent(&build("ab"));
        let later = acquire(&slots, "ab", LONG_WAIT);
        let (waited, other, later) = tokio::join!(waiting, others, later);
        assert!(waited.is_none());
        assert!(other.is_some(), "another build");
        assert!(later.is_some(), "it began after the report");
    }

    #[tokio::test(start_paused = true)]
    async fn first_byte_withdraws_a_report_of_silence_and_older_reports_are_ignored() {
        let slots = ExecutorSlots::default();
        let (mut hanging, mut held) = hanging(&slots).await;
        let mut first = pin!(acquire(&slots, "cd", LONG_WAIT));
        let mut waiting = pin!(acquire(&slots, "ab", LONG_WAIT));
        assert!(first.as_mut().now_or_never().is_none());
        assert!(waiting.as_mut().now_or_never().is_none());
        hanging.remove(0).silent(&build("ab"));
        held.remove(0).answered();
        hanging.remove(0).silent(&build("ab"));
        let _first = first.await.expect("the slot that was freed by the first byte");
        assert!(waiting.await.is_some(), "the executor sends logs again");
    }

    #[test]
    fn entries_of_executors_without_requests_are_bounded() {
        let slots = ExecutorSlots::default();
        let held = slots.try_acquire(&executor(1)).expect("a free slot");
        for port in 2..10_000 {
            drop(slots.try_acquire(&executor(port)).expect("a free slot"));
            assert!(slots.lock().len() <= IDLE_MAX);
        }
        assert!(slots.lock().contains_key(&executor(1)), "it has a request");
        drop(held);
    }
}
