//! Pings the watchdog of the service manager (sd_watchdog_enabled(3)), which kills and restarts a
//! process that stops pinging.
//!
//! A ping is withheld while a worker thread of the runtime hangs. ZooKeeper, executors and other
//! gateways do not matter: a restart would not fix their absence.

use std::convert::Infallible;
use std::time::Duration;

use tokio::runtime::{Handle, RuntimeMetrics};
use tokio::time::{Instant, MissedTickBehavior, interval_at};
use tracing::{error, info};

use super::sd_notify::ServiceManager;

/// Pings the watchdog of `manager`, which has this `timeout`, as long as all workers of the runtime
/// make progress.
pub(crate) async fn run(manager: &ServiceManager, timeout: Duration) -> Infallible {
    // Half the timeout, as sd_watchdog_enabled(3) recommends.
    let period = timeout / 2;
    let mut ticks = interval_at(Instant::now() + period, period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut workers = Workers::new(&Handle::current());
    let mut healthy = true;
    loop {
        ticks.tick().await;
        let stalled = workers.stalled();
        if stalled == 0 {
            manager.ping_watchdog().await;
        }
        match (healthy, stalled) {
            // Logged once: the service manager kills the process soon.
            (true, 1..) => error!(stalled, "watchdog ping withheld: workers of the runtime hang"),
            (false, 0) => info!("watchdog pinged again"),
            _ => {}
        }
        healthy = stalled == 0;
    }
}

/// The workers of the runtime and their counters at the last check.
struct Workers {
    metrics: RuntimeMetrics,
    last: Vec<WorkerSample>,
}

/// The counters of a worker.
#[derive(PartialEq, Eq)]
struct WorkerSample {
    /// How often it has parked and unparked, together: odd while it is parked.
    park_unpark: u64,
    /// Its busy time, which it updates whenever it looks for more work.
    busy: Duration,
}

impl Workers {
    fn new(runtime: &Handle) -> Self {
        let metrics = runtime.metrics();
        Self { last: sample(&metrics), metrics }
    }

    /// Returns how many workers have been in one poll of a task since the last call.
    fn stalled(&mut self) -> usize {
        let now = sample(&self.metrics);
        let pairs = now.iter().zip(&self.last);
        let stalled = pairs.filter(|(now, last)| now.park_unpark.is_multiple_of(2) && now == last);
        let count = stalled.count();
        self.last = now;
        count
    }
}

fn sample(metrics: &RuntimeMetrics) -> Vec<WorkerSample> {
    let sample = |worker| WorkerSample {
        park_unpark: metrics.worker_park_unpark_count(worker),
        busy: metrics.worker_total_busy_duration(worker),
    };
    (0..metrics.num_workers()).map(sample).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    use std::sync::mpsc;

    use tokio::time::sleep;

    #[tokio::test(start_paused = true)]
    async fn watchdog_is_pinged_at_half_its_timeout() {
        let name = format!("zuul-fingergw-watchdog-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).expect("an abstract name");
        let socket = UnixDatagram::bind_addr(&address).expect("a socket");
        socket.set_nonblocking(true).expect("a socket");
        let timeout = Duration::from_secs(30);
        let manager = ServiceManager::at(&format!("@{name}"), Some(timeout));
        tokio::select! {
            never = run(&manager, timeout) => match never {},
            () = sleep(2 * timeout + timeout / 4) => {}
        }
        let mut pings = 0;
        let mut buffer = [0; 64];
        while let Ok(length) = socket.recv(&mut buffer) {
            assert_eq!(&buffer[..length], b"WATCHDOG=1\n");
            pings += 1;
        }
        assert_eq!(pings, 4);
    }

    #[test]
    fn worker_that_hangs_in_a_task_is_counted_until_it_returns() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(3).build();
        let runtime = runtime.expect("a runtime");
        let mut workers = Workers::new(runtime.handle());
        // Workers that do not hang park sooner or later; no event reports when.
        let mut until_stalled = |count| {
            while workers.stalled() != count {
                std::thread::yield_now();
            }
        };
        until_stalled(0);
        let (begin, begun) = mpsc::channel();
        let (end, ended) = mpsc::channel::<()>();
        let hanging = runtime.spawn(async move {
            begin.send(()).expect("the test waits");
            ended.recv()
        });
        begun.recv().expect("the task runs");
        until_stalled(1);
        // Work of the other workers does not hide it.
        runtime.block_on(async { tokio::spawn(async {}).await }).expect("another worker");
        until_stalled(1);
        end.send(()).expect("the task waits");
        runtime.block_on(hanging).expect("the task ends").expect("a message");
        until_stalled(0);
    }
}
