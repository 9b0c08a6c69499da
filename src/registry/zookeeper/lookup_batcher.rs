//! Questions that share round trips: those that come while others are on their way go together
//! when one of these is back, and the same question is asked once. A quiet gateway asks at once, a
//! busy one asks ZooKeeper less often.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// Round trips at once: the next one is on its way while an answer is read.
const TRIPS: usize = 2;

/// Different questions at once. Who asks gives up after a while, but what has been asked stays until
/// it is answered, so strangers could pile it up while ZooKeeper hangs. More than there are
/// connections by default, so that a crowd alone does not reach it; some 200 bytes each.
const QUESTIONS: usize = 16_384;

/// Questions of one kind.
pub(crate) struct LookupBatcher<Q, A>(Mutex<State<Q, A>>);

struct State<Q, A> {
    /// Those that wait for a trip, in their order.
    waiting: Vec<Q>,
    /// Who waits for an answer, to those questions and to those on their way.
    asking: HashMap<Q, Vec<oneshot::Sender<A>>>,
    trips: usize,
}

impl<Q, A> Default for LookupBatcher<Q, A> {
    fn default() -> Self {
        Self(Mutex::new(State { waiting: Vec::new(), asking: HashMap::new(), trips: 0 }))
    }
}

impl<Q, A> LookupBatcher<Q, A>
where
    Q: Clone + Eq + Hash + Send + 'static,
    A: Clone + Send + 'static,
{
    /// The answer to `question`; `None` if too many wait already, or `trip` panics. A trip takes up to `most` questions
    /// and returns as many answers in the same order. It runs to its end, whoever still waits.
    pub(crate) async fn ask<Trip, Answers>(
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
        if self.goes(question, sender) {
            let batches = Arc::clone(self);
            tokio::spawn(async move {
                let mut traveller = BatchWorker { batches, questions: Vec::new() };
                while traveller.next(most) {
                    let answers = trip(traveller.questions.clone()).await;
                    traveller.hand_out(answers);
                }
            });
        }
        answer.await.ok()
    }

    /// Notes the question, and says whether it needs a traveller of its own.
    fn goes(&self, question: Q, sender: oneshot::Sender<A>) -> bool {
        let mut state = self.lock();
        if let Some(senders) = state.asking.get_mut(&question) {
            senders.push(sender);
            return false;
        }
        if state.asking.len() >= QUESTIONS {
            return false;
        }
        state.asking.insert(question.clone(), vec![sender]);
        state.waiting.push(question);
        let goes = state.trips < TRIPS;
        state.trips += usize::from(goes);
        goes
    }
}

impl<Q, A> LookupBatcher<Q, A> {
    fn lock(&self) -> MutexGuard<'_, State<Q, A>> {
        // Whole between any two statements.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes one trip after the other.
struct BatchWorker<Q: Eq + Hash, A> {
    batches: Arc<LookupBatcher<Q, A>>,
    /// Those on their way.
    questions: Vec<Q>,
}

impl<Q: Clone + Eq + Hash, A: Clone> BatchWorker<Q, A> {
    /// Takes what goes next. With `false` it has none and is no longer counted.
    fn next(&mut self, most: usize) -> bool {
        let mut state = self.batches.lock();
        let count = state.waiting.len().min(most.max(1));
        self.questions = state.waiting.drain(..count).collect();
        if count == 0 {
            // Under the same lock: a question that comes now needs a traveller of its own.
            state.trips -= 1;
        }
        count > 0
    }

    fn hand_out(&mut self, answers: Vec<A>) {
        let mut state = self.batches.lock();
        for (question, answer) in self.questions.drain(..).zip(answers) {
            for sender in state.asking.remove(&question).unwrap_or_default() {
                // Whoever asked may have given up.
                let _ = sender.send(answer.clone());
            }
        }
    }
}

impl<Q: Eq + Hash, A> Drop for BatchWorker<Q, A> {
    /// With questions on their way only after a panic: whoever waits for them learns of it.
    fn drop(&mut self) {
        if !self.questions.is_empty() {
            let mut state = self.batches.lock();
            state.trips -= 1;
            for question in self.questions.drain(..) {
                state.asking.remove(&question);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Waker};

    use tokio::sync::{Semaphore, mpsc};

    use super::*;

    type Doubles = Arc<LookupBatcher<u32, u32>>;

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
            asking.push((number, ask(number)));
            assert_eq!(left.recv().await, Some(1), "nobody is on the way yet");
        }
        // The first one is on its way, the last one waits: neither goes twice.
        asking.extend([2, 3, 4, 5, 6, 7, 8, 9, 0, 9].map(|number| (number, ask(number))));
        // They run before the permits below let anybody go on: this runtime has one thread.
        tokio::task::yield_now().await;
        gate.add_permits(4);
        for (number, asked) in asking {
            assert_eq!(asked.await.expect("an answer"), Some(2 * number));
        }
        assert_eq!((left.recv().await, left.recv().await), (Some(5), Some(3)));
        gate.add_permits(1);
        assert_eq!(ask(0).await.expect("an answer"), Some(0));
        assert_eq!(left.recv().await, Some(1), "an answer is not older than its question");
        assert!(batches.lock().trips == 0 && batches.lock().asking.is_empty());
    }

    #[tokio::test]
    async fn questions_are_bounded() {
        let batches = Doubles::default();
        let hangs = |_| std::future::pending();
        for number in 0..u32::try_from(QUESTIONS).expect("not so many") {
            let asked = std::pin::pin!(batches.ask(number, 5, hangs));
            assert!(asked.poll(&mut Context::from_waker(Waker::noop())).is_pending());
        }
        assert_eq!(batches.ask(u32::MAX, 5, hangs).await, None);
    }

    #[tokio::test]
    async fn a_trip_that_panics_takes_only_its_own_along() {
        let batches = Doubles::default();
        for number in 0..2 * u32::try_from(TRIPS).expect("few") {
            let panics = |_| async { panic!("on purpose") };
            assert_eq!(batches.ask(number, 5, panics).await, None);
        }
        let echo = |questions: Vec<u32>| async { questions };
        assert_eq!(batches.ask(0, 5, echo).await, Some(0));
        assert!(batches.lock().trips == 0 && batches.lock().asking.is_empty());
    }
}
