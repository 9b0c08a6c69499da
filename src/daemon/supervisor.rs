//! Supervises the tasks that run as long as the process: one that panics is started again.
//!
//! The registry's task and the accept loops are not among them. They cannot start again, so the
//! gateway stops in order when one of them ends (see `daemon::run`).

use std::convert::Infallible;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::sleep;
use tracing::error;

use crate::telemetry::metrics::Metrics;

/// The pause before a task is started again, so that one that always panics does not use up a CPU.
const RESTART_DELAY: Duration = Duration::from_secs(1);

/// The supervised tasks. Dropping it aborts them.
pub(super) struct Supervisor {
    tasks: JoinSet<Infallible>,
    metrics: Metrics,
}

impl Supervisor {
    pub(super) fn new(metrics: Metrics) -> Self {
        Self { tasks: JoinSet::new(), metrics }
    }

    /// Starts the task that `make` returns, and starts it again whenever it panics.
    pub(super) fn spawn<T>(&mut self, name: &'static str, make: impl Fn() -> T + Send + 'static)
    where
        T: Future<Output = Infallible> + Send + 'static,
    {
        let metrics = self.metrics.clone();
        self.tasks.spawn(async move {
            loop {
                // A set of one: aborting the outer task aborts the task in it as well.
                let mut task = JoinSet::new();
                task.spawn(make());
                // The task never returns, so it has panicked. The panic hook has logged the place.
                task.join_next().await;
                metrics.panicked();
                error!(task = name, "task panicked and is restarted; please report this");
                sleep(RESTART_DELAY).await;
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::mpsc;

    #[tokio::test(start_paused = true)]
    async fn task_that_panics_is_counted_and_started_again() {
        let (sender, mut starts) = mpsc::unbounded_channel();
        let count = Arc::new(AtomicUsize::new(0));
        let metrics = Metrics::default();
        let mut supervisor = Supervisor::new(metrics.clone());
        supervisor.spawn("test", move || {
            let number = count.fetch_add(1, Ordering::Relaxed);
            let sender = sender.clone();
            async move {
                sender.send(number).expect("the test listens");
                assert!(number >= 2, "this panic is part of the test");
                std::future::pending().await
            }
        });
        for number in 0..3 {
            assert_eq!(starts.recv().await, Some(number));
        }
        assert_eq!(metrics.panics(), 2);
        // The third start is waiting; dropping the supervisor aborts it.
        drop(supervisor);
        assert_eq!(starts.recv().await, None);
    }
}
