//! Questions that share round trips: those that come while others are on their way go together
//! when one of these is back. A quiet gateway asks at once, a busy one asks ZooKeeper less often.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// Round trips at once: the next one is on its way while an answer is read.
const TRIPS: usize = 2;

/// Questions of one kind.
pub(super) struct Batches<Q, A>(Mutex<Waiting<Q, A>>);

struct Waiting<Q, A> {
    questions: Vec<(Q, oneshot::Sender<A>)>,
    trips: usize,
}

impl<Q, A> Default for Batches<Q, A> {
    fn default() -> Self {
        Self(Mutex::new(Waiting { questions: Vec::new(), trips: 0 }))
    }
}

impl<Q, A> Batches<Q, A>
where
    Q: Send + 'static,
    A: Send + 'static,
{
    /// The answer to `question`; `None` only if `trip` panics. A trip takes up to `most` questions
    /// and returns as many answers in the same order.
    pub(super) async fn ask<Trip, Answers>(
        self: &Arc<Self>,
        question: Q,
        most: usize,
        trip: Trip,
    ) -> Option<A>
    where
        Trip: Fn(Vec<Q>) -> Answers + Send + 'static,
        Answers: Future<Output = Vec<A>> + Send,
    {
        let (sender, answer) = oneshot::channel();
        let goes = {
            let mut waiting = self.lock();
            waiting.questions.push((question, sender));
            let goes = waiting.trips < TRIPS;
            waiting.trips += usize::from(goes);
            goes
        };
        if goes {
            let under_way = UnderWay(Arc::clone(self));
            tokio::spawn(async move {
                while let Some((questions, senders)) = under_way.0.next(most) {
                    for (sender, answer) in senders.into_iter().zip(trip(questions).await) {
                        // Whoever asked may have given up.
                        let _ = sender.send(answer);
                    }
                }
                under_way.over();
            });
        }
        answer.await.ok()
    }

    /// What goes next. At `None` the trips of the caller are over, and counted so.
    fn next(&self, most: usize) -> Option<(Vec<Q>, Vec<oneshot::Sender<A>>)> {
        let mut waiting = self.lock();
        let count = waiting.questions.len().min(most.max(1));
        if count == 0 {
            // Under the same lock: a question that comes now has to go by itself.
            waiting.trips -= 1;
            return None;
        }
        Some(waiting.questions.drain(..count).unzip())
    }

    fn lock(&self) -> MutexGuard<'_, Waiting<Q, A>> {
        // Whole between any two statements.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One that makes trips; its place is free again even if one of them panics.
struct UnderWay<Q: Send + 'static, A: Send + 'static>(Arc<Batches<Q, A>>);

impl<Q: Send + 'static, A: Send + 'static> UnderWay<Q, A> {
    /// Its place has been given back.
    fn over(self) {
        std::mem::forget(self);
    }
}

impl<Q: Send + 'static, A: Send + 'static> Drop for UnderWay<Q, A> {
    fn drop(&mut self) {
        self.0.lock().trips -= 1;
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::{Semaphore, mpsc};

    use super::*;

    type Doubles = Arc<Batches<u32, u32>>;

    #[tokio::test]
    async fn what_comes_while_others_are_on_their_way_goes_together() {
        let batches = Doubles::default();
        let gate = Arc::new(Semaphore::new(0));
        let (trips, mut left) = mpsc::unbounded_channel();
        let ask = |number| {
            let (batches, gate, trips) = (batches.clone(), gate.clone(), trips.clone());
            tokio::spawn(async move {
                let trip = move |questions: Vec<u32>| {
                    trips.send(questions.len()).expect("the test listens");
                    let gate = gate.clone();
                    async move {
                        gate.acquire().await.expect("open").forget();
                        questions.into_iter().map(|question| 2 * question).collect()
                    }
                };
                batches.ask(number, 5, trip).await
            })
        };
        let mut asking = Vec::new();
        for number in 0..2 {
            asking.push(ask(number));
            assert_eq!(left.recv().await, Some(1), "nobody is on the way yet");
        }
        asking.extend((2..10).map(ask));
        // They run before the permits below let anybody go on: this runtime has one thread.
        tokio::task::yield_now().await;
        gate.add_permits(4);
        for (number, asked) in (0..).zip(asking) {
            assert_eq!(asked.await.expect("an answer"), Some(2 * number));
        }
        assert_eq!((left.recv().await, left.recv().await), (Some(5), Some(3)));
        assert_eq!(batches.lock().trips, 0);
    }

    #[tokio::test]
    async fn a_trip_that_panics_takes_only_its_own_along() {
        let batches = Doubles::default();
        for number in 0..2 * u32::try_from(TRIPS).expect("few") {
            let panics = |_| async { panic!("on purpose") };
            assert_eq!(batches.ask(number, 5, panics).await, None);
        }
        let echo = |questions: Vec<u32>| async { questions };
        assert_eq!(batches.ask(7, 5, echo).await, Some(7));
        assert_eq!(batches.lock().trips, 0);
    }
}
