//! Whether an accept loop moves: between its waits it answers a question that somebody else asks.

use std::fmt;
use std::net::SocketAddr;
use std::pin::pin;

use tokio::sync::{mpsc, oneshot};

/// Asks one accept loop.
pub(crate) struct Probe {
    address: SocketAddr,
    questions: mpsc::Sender<oneshot::Sender<()>>,
}

/// The accept loop's end of it.
pub(crate) struct Pulse(mpsc::Receiver<oneshot::Sender<()>>);

/// Both ends for the accept loop of the listener on `address`.
pub(crate) fn pulse(address: SocketAddr) -> (Probe, Pulse) {
    let (questions, asked) = mpsc::channel(1);
    (Probe { address, questions }, Pulse(asked))
}

impl Probe {
    /// Waits until the loop has answered, for as long as that takes. One that has ended has nothing
    /// to answer: whether it may is looked at elsewhere.
    pub(crate) async fn answered(&self) {
        let (question, answer) = oneshot::channel();
        if self.questions.send(question).await.is_ok() {
            let _ = answer.await;
        }
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the accept loop of {}", self.address)
    }
}

impl Pulse {
    /// Waits for `event` and answers meanwhile, also when events come one upon the other.
    pub(crate) async fn during<T>(&mut self, event: impl Future<Output = T>) -> T {
        let mut event = pin!(event);
        loop {
            tokio::select! {
                biased;
                Some(question) = self.0.recv() => {
                    let _ = question.send(());
                }
                done = &mut event => return done,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::future::pending;

    use tokio_util::task::TaskTracker;

    fn address() -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], 79))
    }

    #[tokio::test]
    async fn a_loop_that_waits_answers() {
        let (probe, mut pulse) = pulse(address());
        let waiting = TaskTracker::new();
        let task = waiting.spawn(async move { pulse.during(pending::<()>()).await });
        for _ in 0..3 {
            probe.answered().await;
        }
        task.abort();
        waiting.close();
        waiting.wait().await;
        // It has ended.
        probe.answered().await;
    }

    /// Asked first, as what it accepts may never come to an end.
    #[tokio::test]
    async fn a_loop_that_never_waits_answers() {
        let (probe, mut pulse) = pulse(address());
        let asking = tokio::spawn(async move { probe.answered().await });
        while !asking.is_finished() {
            pulse.during(std::future::ready(())).await;
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_loop_that_hangs_does_not() {
        let (probe, _pulse) = pulse(address());
        let hour = std::time::Duration::from_secs(3600);
        assert!(tokio::time::timeout(hour, probe.answered()).await.is_err());
        assert_eq!(probe.to_string(), "the accept loop of 127.0.0.1:79");
    }
}
