//! The service manager's watchdog (sd_watchdog_enabled(3)): it is told that we are alive only behind
//! signs of life from whatever must move, so that a gateway that hangs is killed and started again.
//!
//! What must move are the workers of the runtime and the accept loops. ZooKeeper, executors and other
//! gateways are none of it: being without them is nothing that a restart mends.

use std::time::Duration;

use futures_util::future::join_all;
use tokio::runtime::{Handle, RuntimeMetrics};
use tokio::time::{Instant, MissedTickBehavior, interval_at, timeout};
use tracing::{error, info};

use super::sd_notify::ServiceManager;
use crate::gateway::accept::heartbeat::Probe;

/// Feeds the watchdog, if the service manager has one, for as long as the accept loops that `probes`
/// ask and the runtime's workers move. Ends only if there is none.
pub(crate) async fn feed(manager: &ServiceManager, probes: Vec<Probe>) {
    let Some(period) = manager.watchdog() else { return };
    // Half of it, as sd_watchdog_enabled(3) says.
    let time = period / 2;
    // The first when there is something to compare with.
    let mut ticks = interval_at(Instant::now() + time, time);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut life = Life { probes, workers: Workers::of(&Handle::current()) };
    let mut well = true;
    loop {
        ticks.tick().await;
        let faults = life.faults(time).await;
        if faults.is_empty() {
            manager.ping_watchdog().await;
        }
        match (well, faults.is_empty()) {
            // Once: soon it is killed.
            (true, false) => error!("the watchdog is not fed: {}", faults.join(", ")),
            (false, true) => info!("the watchdog is fed again"),
            _ => {}
        }
        well = faults.is_empty();
    }
}

/// What must move.
struct Life {
    probes: Vec<Probe>,
    workers: Workers,
}

impl Life {
    /// What has not moved within `time`, or since it was asked last.
    async fn faults(&mut self, time: Duration) -> Vec<String> {
        // First, so that a late answer leaves no less than `time` between two looks.
        let stuck = self.workers.stuck();
        let answers = join_all(self.probes.iter().map(|probe| timeout(time, probe.answered())));
        let answers = self.probes.iter().zip(answers.await);
        let silent = answers.filter(|(_, answer)| answer.is_err());
        let mut faults: Vec<_> =
            silent.map(|(probe, _)| format!("{probe} does not answer")).collect();
        if stuck > 0 {
            faults.push(format!("{stuck} of {} workers hang", self.workers.last.len()));
        }
        faults
    }
}

/// The runtime's workers, as they stood when somebody looked last.
struct Workers {
    metrics: RuntimeMetrics,
    last: Vec<Moment>,
}

/// What a worker has counted at one moment.
#[derive(PartialEq, Eq)]
struct Moment {
    /// How often it went to sleep and woke up, together: odd while it sleeps.
    turns: u64,
    /// How long it had been busy when it looked for other work last.
    busy: Duration,
}

impl Workers {
    fn of(runtime: &Handle) -> Self {
        let metrics = runtime.metrics();
        Self { last: moments(&metrics), metrics }
    }

    /// How many have been awake since this was asked last, and have not come round even once: in one
    /// and the same task, most likely.
    fn stuck(&mut self) -> usize {
        let now = moments(&self.metrics);
        let stuck = |(now, last): &(&Moment, &Moment)| now.turns.is_multiple_of(2) && now == last;
        let count = now.iter().zip(&self.last).filter(stuck).count();
        self.last = now;
        count
    }
}

fn moments(metrics: &RuntimeMetrics) -> Vec<Moment> {
    let moment = |worker| Moment {
        turns: metrics.worker_park_unpark_count(worker),
        busy: metrics.worker_total_busy_duration(worker),
    };
    (0..metrics.num_workers()).map(moment).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::future::pending;
    use std::net::SocketAddr;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr as UnixAddr, UnixDatagram};
    use std::pin::pin;
    use std::sync::mpsc;

    use tokio::time::sleep;

    use crate::gateway::accept::heartbeat::pulse;

    const TIME: Duration = Duration::from_secs(15);

    /// A manager, and the socket where it would listen.
    fn manager(watchdog: Option<Duration>) -> (ServiceManager, UnixDatagram) {
        let name = format!("zuul-fingergw-watchdog-{}", fastrand::u64(..));
        let address = UnixAddr::from_abstract_name(&name).expect("an abstract name");
        let socket = UnixDatagram::bind_addr(&address).expect("a socket");
        socket.set_nonblocking(true).expect("a socket");
        (ServiceManager::at(&format!("@{name}"), watchdog), socket)
    }

    /// How often the manager was told since this was asked last.
    fn told(socket: &UnixDatagram) -> usize {
        let mut buffer = [0; 64];
        let mut count = 0;
        while let Ok(length) = socket.recv(&mut buffer) {
            assert_eq!(&buffer[..length], b"WATCHDOG=1\n");
            count += 1;
        }
        count
    }

    /// One accept loop always answers, the other one does, hangs, and does again.
    #[tokio::test(start_paused = true)]
    async fn fed_while_the_accept_loops_answer() {
        let ends = || pulse(SocketAddr::from(([127, 0, 0, 1], 79)));
        let ((probe, mut first), (other, mut second)) = (ends(), ends());
        tokio::spawn(async move { first.during(pending::<()>()).await });
        let (manager, socket) = manager(Some(2 * TIME));
        let mut feeding = pin!(feed(&manager, vec![probe, other]));
        // The last question is still open when it goes on.
        for (answers, expected) in [(true, 4), (false, 0), (true, 5)] {
            // Time stands still while anything moves.
            let over = sleep(4 * TIME + TIME / 2);
            tokio::select! {
                () = &mut feeding => panic!("it ends"),
                () = second.during(pending()), if answers => {}
                () = over => {}
            }
            assert_eq!(told(&socket), expected, "{answers}");
        }
        // One that has ended is none that hangs: that is the end of the gateway, or a stop.
        drop(second);
        assert!(timeout(2 * TIME, feeding).await.is_err());
        assert_eq!(told(&socket), 2);
    }

    #[tokio::test]
    async fn nobody_watches() {
        let (manager, socket) = manager(None);
        feed(&manager, Vec::new()).await;
        assert_eq!(told(&socket), 0);
    }

    /// A worker that does not come back from a task is found, and no other.
    #[test]
    fn a_worker_that_hangs() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(3).build();
        let runtime = runtime.expect("a runtime");
        let mut workers = Workers::of(runtime.handle());
        // What is not stuck moves on or sleeps sooner or later, and nothing tells when.
        let mut until = |count| {
            while workers.stuck() != count {
                std::thread::yield_now();
            }
        };
        until(0);
        let (begin, begun) = mpsc::channel();
        let (end, ended) = mpsc::channel::<()>();
        let hanging = runtime.spawn(async move {
            begin.send(()).expect("the test waits");
            ended.recv()
        });
        begun.recv().expect("the task runs");
        until(1);
        // And it stays so while others work.
        runtime.block_on(async { tokio::spawn(async {}).await }).expect("another worker");
        until(1);
        end.send(()).expect("the task waits");
        runtime.block_on(hanging).expect("the task ends").expect("a word");
        until(0);
    }
}
