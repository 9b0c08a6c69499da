//! Decides which hop of a route is tried when. Pure: it takes the time and the results of attempts,
//! and returns the next step, which [`super::failover`] carries out.
//!
//! Hops are tried in the order of the route: the gateways, then the executor. Each gateway has a
//! hedge delay; when that has passed without a first byte the next gateway is tried concurrently, and
//! immediately when an attempt fails. So dead gateways cost a client little, whether they refuse
//! connections, drop packets, never finish a TLS handshake or never answer. The executor is tried
//! when all gateways have failed, or after the executor delay, however many gateways are left. All
//! attempts together have one deadline for the first byte.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use crate::config::Limits;

/// The number of attempts of one request that may run concurrently. A further one replaces the
/// oldest attempt at a gateway, so that one request in a zone of many silent gateways cannot use up
/// descriptors.
pub(super) const MAX_ATTEMPTS: usize = 4;

/// The delays of one request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timing {
    /// How long a gateway is tried before the next gateway is tried concurrently.
    hedge_delay: Duration,
    /// The hedge delay of a gateway that is backing off, which is tried because there is no better
    /// one.
    backing_off_delay: Duration,
    /// How long the gateways have before the executor is tried concurrently.
    executor_delay: Duration,
    /// How long all hops together have for a first byte.
    first_byte: Duration,
}

impl Timing {
    /// Derives the delays from `limits`. The deadline for the first byte is longer than a peer
    /// gateway needs to give up on its executor, so that its reply arrives.
    ///
    /// The deadline is not shortened when the executor stays silent for its `first_byte_timeout`: a
    /// log has a first line before the build is announced, so silence means a hung host or a
    /// middlebox that accepts connections for it, and a gateway may still get through.
    pub(super) fn new(limits: &Limits) -> Self {
        Self {
            hedge_delay: limits.connect_timeout / 5,
            backing_off_delay: limits.connect_timeout / 20,
            executor_delay: limits.connect_timeout,
            first_byte: limits.lookup_timeout
                + 2 * limits.connect_timeout
                + limits.first_byte_timeout,
        }
    }
}

/// A hop as the schedule sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Candidate {
    Gateway { backing_off: bool },
    Executor,
}

/// What to do next. Hops are named by their index in the route.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Start an attempt at `hop`, and give up `instead_of` for it.
    Try { hop: usize, instead_of: Option<Slow> },
    /// Wait until an attempt ends, at most until this time.
    Wait(Instant),
    /// Nothing is left to try, or the deadline has passed.
    End,
}

/// A running attempt at `hop` that has sent no first byte and is given up for another one, or is
/// slower than another one.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Slow {
    pub(super) hop: usize,
    pub(super) hedge_delay: Duration,
}

/// How an attempt or a request failed, as far as it decides the reply to the client. Ordered: of
/// several failures the greatest decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Failure {
    Unreachable,
    /// Too many other requests for the build wait for the hop.
    TooManyForBuild,
    /// The hop took the request and sent nothing, or the executor had no free slot.
    Silent,
    /// A gateway replied that it cannot serve the log. The first such reply is the client's.
    Refused,
}

/// The attempts of one request: those to come, and those that run.
#[derive(Debug)]
pub(super) struct AttemptSchedule {
    timing: Timing,
    /// The gateways to try, each with whether it is backing off.
    gateways: VecDeque<(usize, bool)>,
    /// The executor, until it is tried.
    executor: Option<usize>,
    executor_at: Instant,
    deadline: Instant,
    /// Running attempts, the oldest first.
    running: Vec<Attempt>,
    /// When the next gateway is tried though no attempt has failed.
    hedge_at: Instant,
    /// An attempt has failed, so the next gateway is tried immediately.
    retry_now: bool,
    failure: Failure,
}

#[derive(Debug)]
struct Attempt {
    hop: usize,
    is_executor: bool,
    started: Instant,
    hedge_delay: Duration,
}

impl AttemptSchedule {
    /// A schedule for `hops`, in the order to try them, that begins at `now`.
    pub(super) fn new(
        hops: impl IntoIterator<Item = Candidate>,
        timing: Timing,
        now: Instant,
    ) -> Self {
        let mut gateways = VecDeque::new();
        let mut executor = None;
        for (index, hop) in hops.into_iter().enumerate() {
            match hop {
                Candidate::Gateway { backing_off } => gateways.push_back((index, backing_off)),
                Candidate::Executor => executor = Some(index),
            }
        }
        let all_backing_off = gateways.iter().all(|(_, backing_off)| *backing_off);
        let executor_delay =
            if all_backing_off { timing.hedge_delay } else { timing.executor_delay };
        Self {
            timing,
            gateways,
            executor,
            executor_at: now + executor_delay,
            deadline: now + timing.first_byte,
            running: Vec::new(),
            hedge_at: now,
            retry_now: false,
            failure: Failure::Unreachable,
        }
    }

    /// Returns the next step at `now`. `may_hedge` is whether there is a descriptor for a
    /// concurrent attempt; without one, a new attempt replaces the oldest attempt at a gateway.
    pub(super) fn step(&mut self, now: Instant, may_hedge: bool) -> Step {
        if now >= self.deadline {
            return Step::End;
        }
        if let Some(attempt) = self.due(now) {
            let limit = if may_hedge { MAX_ATTEMPTS } else { 1 };
            let is_full = self.running.len() >= limit;
            let oldest = self.running.iter().position(|attempt| !attempt.is_executor);
            if !is_full || oldest.is_some() {
                let oldest = oldest.filter(|_| is_full).map(|index| self.running.remove(index));
                return Step::Try {
                    hop: self.start(attempt),
                    instead_of: oldest.as_ref().map(Attempt::slow),
                };
            }
            // Only the executor is being tried. No other hop has its log, so it is not given up.
            self.retry_now = false;
            self.hedge_at = now + self.timing.hedge_delay;
        }
        if self.running.is_empty() {
            return Step::End;
        }
        let hedge_at = (!self.gateways.is_empty()).then_some(self.hedge_at);
        let executor_at = self.executor.map(|_| self.executor_at);
        Step::Wait([hedge_at, executor_at].into_iter().flatten().fold(self.deadline, Ord::min))
    }

    /// The attempt to start at `now`, if it is time for one.
    fn due(&self, now: Instant) -> Option<Attempt> {
        let is_idle = self.running.is_empty();
        let Timing { hedge_delay, backing_off_delay, .. } = self.timing;
        if let Some(hop) = self.executor
            && (now >= self.executor_at || (is_idle && self.gateways.is_empty()))
        {
            return Some(Attempt { hop, is_executor: true, started: now, hedge_delay });
        }
        let (hop, backing_off) = *self.gateways.front()?;
        let hedge_delay = if backing_off { backing_off_delay } else { hedge_delay };
        let attempt = Attempt { hop, is_executor: false, started: now, hedge_delay };
        (is_idle || self.retry_now || now >= self.hedge_at).then_some(attempt)
    }

    /// Enters `attempt` as running and returns its hop.
    fn start(&mut self, attempt: Attempt) -> usize {
        if attempt.is_executor {
            self.executor = None;
        } else {
            self.gateways.pop_front();
        }
        self.retry_now = false;
        self.hedge_at = attempt.started + attempt.hedge_delay;
        let hop = attempt.hop;
        self.running.push(attempt);
        hop
    }

    /// Records that the attempt at `hop` has failed.
    pub(super) fn failed(&mut self, hop: usize, failure: Failure) {
        self.running.retain(|attempt| attempt.hop != hop);
        self.retry_now = true;
        self.failure = self.failure.max(failure);
    }

    /// Whether no attempt is running and none is left.
    pub(super) fn is_over(&self) -> bool {
        self.running.is_empty() && self.gateways.is_empty() && self.executor.is_none()
    }

    /// Returns how the request fails: the most specific failure of its attempts.
    pub(super) fn failure(&self) -> Failure {
        self.failure
    }

    /// The attempts that are older than the one at `hop`, which has the log at `now`, and whose
    /// hedge delay has passed.
    pub(super) fn slower_than(&self, hop: usize, now: Instant) -> Vec<Slow> {
        let older = self.running.iter().take_while(|attempt| attempt.hop != hop);
        let slow = older.filter(|attempt| now >= attempt.started + attempt.hedge_delay);
        slow.map(Attempt::slow).collect()
    }
}

impl Attempt {
    fn slow(&self) -> Slow {
        Slow { hop: self.hop, hedge_delay: self.hedge_delay }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GATEWAY: Candidate = Candidate::Gateway { backing_off: false };
    const BACKING_OFF: Candidate = Candidate::Gateway { backing_off: true };
    const EXECUTOR: Candidate = Candidate::Executor;

    /// With the delays of these limits: 1 s, 250 ms, 5 s, and a deadline of 45 s.
    fn timing() -> Timing {
        let seconds = Duration::from_secs;
        Timing::new(&Limits {
            lookup_timeout: seconds(5),
            connect_timeout: seconds(5),
            first_byte_timeout: seconds(30),
            ..Limits::default()
        })
    }

    /// A schedule and a clock that the test advances.
    struct Run {
        schedule: AttemptSchedule,
        began: Instant,
        milliseconds: u64,
        may_hedge: bool,
    }

    impl Run {
        fn new(hops: &[Candidate]) -> Self {
            let began = Instant::now();
            let schedule = AttemptSchedule::new(hops.iter().copied(), timing(), began);
            Self { schedule, began, milliseconds: 0, may_hedge: true }
        }

        fn now(&self) -> Instant {
            self.began + Duration::from_millis(self.milliseconds)
        }

        fn step(&mut self) -> Step {
            self.schedule.step(self.now(), self.may_hedge)
        }

        /// Moves the clock to the end of a wait, and returns that time in milliseconds.
        fn wait(&mut self) -> u64 {
            let Step::Wait(until) = self.step() else { panic!("an attempt is due already") };
            assert!(until > self.now(), "a wait that is over would spin");
            self.milliseconds = (until - self.began).as_millis().try_into().expect("a short time");
            self.milliseconds
        }

        /// The hop that is tried now, beside those that run.
        fn tries(&mut self) -> usize {
            match self.step() {
                Step::Try { hop, instead_of: None } => hop,
                step => panic!("{step:?}"),
            }
        }

        fn fails(&mut self, hop: usize) {
            self.schedule.failed(hop, Failure::Unreachable);
        }
    }

    #[test]
    fn hops_are_tried_a_hedge_delay_apart_and_the_executor_last() {
        let mut run = Run::new(&[GATEWAY, GATEWAY, EXECUTOR]);
        assert_eq!(run.tries(), 0);
        assert_eq!(run.wait(), 1000);
        assert_eq!(run.tries(), 1);
        assert_eq!(run.wait(), 5000, "no gateway is left, so the executor is next");
        assert_eq!(run.tries(), 2);
        assert_eq!(run.wait(), 45_000, "all are being tried");
        assert_eq!(run.step(), Step::End);
        assert!(!run.schedule.is_over(), "attempts are running");
    }

    #[test]
    fn failed_attempt_is_replaced_immediately() {
        let mut run = Run::new(&[GATEWAY, GATEWAY, EXECUTOR]);
        assert_eq!(run.tries(), 0);
        run.milliseconds = 10;
        run.fails(0);
        assert_eq!(run.tries(), 1);
        run.fails(1);
        assert_eq!(run.tries(), 2, "all gateways have failed");
        run.fails(2);
        assert!(run.schedule.is_over());
        assert_eq!((run.step(), run.schedule.failure()), (Step::End, Failure::Unreachable));
    }

    #[test]
    fn failure_beside_a_running_gateway_does_not_start_the_executor() {
        let mut run = Run::new(&[GATEWAY, GATEWAY, EXECUTOR]);
        assert_eq!(run.tries(), 0);
        run.wait();
        assert_eq!(run.tries(), 1);
        run.fails(0);
        assert_eq!(run.wait(), 5000);
        assert_eq!(run.tries(), 2);
    }

    #[test]
    fn executor_is_tried_after_its_delay_however_many_gateways_are_left() {
        let mut run = Run::new(&[GATEWAY; 30]);
        run.schedule.executor = Some(30);
        let mut tried = Vec::new();
        while !tried.contains(&30) {
            match run.step() {
                Step::Try { hop, .. } => tried.push(hop),
                Step::Wait(_) => _ = run.wait(),
                Step::End => panic!("the executor is left"),
            }
        }
        assert_eq!((tried, run.milliseconds), (vec![0, 1, 2, 3, 4, 30], 5000));
    }

    #[test]
    fn gateways_that_back_off_have_a_quarter_of_the_delay() {
        let mut run = Run::new(&[BACKING_OFF, BACKING_OFF, EXECUTOR]);
        assert_eq!(run.tries(), 0);
        assert_eq!(run.wait(), 250);
        assert_eq!(run.tries(), 1);
        assert_eq!(run.wait(), 1000, "the executor does not wait for its full delay either");
        assert_eq!(run.tries(), 2);
    }

    #[test]
    fn beyond_the_maximum_the_oldest_attempt_is_given_up() {
        let mut run = Run::new(&[GATEWAY; 6]);
        for hop in 0..MAX_ATTEMPTS {
            assert_eq!(run.tries(), hop);
            run.wait();
        }
        let hedge_delay = Duration::from_secs(1);
        let instead_of = Some(Slow { hop: 0, hedge_delay });
        assert_eq!(run.step(), Step::Try { hop: 4, instead_of });
        let running: Vec<_> = run.schedule.running.iter().map(|attempt| attempt.hop).collect();
        assert_eq!(running, [1, 2, 3, 4]);
    }

    #[test]
    fn without_a_descriptor_for_a_hedge_the_next_hop_takes_the_place_of_the_last() {
        let mut run = Run::new(&[GATEWAY, GATEWAY, EXECUTOR]);
        run.may_hedge = false;
        assert_eq!(run.tries(), 0);
        assert_eq!(run.wait(), 1000);
        let instead_of = Some(Slow { hop: 0, hedge_delay: Duration::from_secs(1) });
        assert_eq!(run.step(), Step::Try { hop: 1, instead_of });
    }

    #[test]
    fn executor_is_never_given_up() {
        let mut run = Run::new(&[EXECUTOR, GATEWAY]);
        run.may_hedge = false;
        run.milliseconds = 5000;
        assert_eq!(run.tries(), 0);
        assert_eq!(run.wait(), 6000);
        assert_eq!(run.wait(), 7000, "the gateway has no place");
        run.may_hedge = true;
        assert_eq!(run.tries(), 1);
    }

    #[test]
    fn refusal_is_the_failure_whatever_other_attempts_end_with() {
        let mut run = Run::new(&[GATEWAY, GATEWAY, EXECUTOR]);
        assert_eq!(run.tries(), 0);
        run.schedule.failed(0, Failure::Refused);
        assert_eq!(run.tries(), 1, "another gateway may have the log");
        run.schedule.failed(1, Failure::Silent);
        assert_eq!(run.tries(), 2);
        run.fails(2);
        assert_eq!((run.step(), run.schedule.failure()), (Step::End, Failure::Refused));
    }

    #[test]
    fn one_silent_hop_makes_the_failure_silent() {
        let mut run = Run::new(&[GATEWAY, EXECUTOR]);
        assert_eq!(run.tries(), 0);
        run.schedule.failed(0, Failure::Silent);
        assert_eq!(run.tries(), 1);
        run.fails(1);
        assert_eq!((run.step(), run.schedule.failure()), (Step::End, Failure::Silent));
    }

    #[test]
    fn only_older_attempts_that_had_their_delay_are_slower() {
        let mut run = Run::new(&[GATEWAY, BACKING_OFF, GATEWAY]);
        assert_eq!(run.tries(), 0);
        run.wait();
        assert_eq!(run.tries(), 1);
        run.milliseconds += 100;
        run.fails(0);
        assert_eq!(run.tries(), 2);
        assert_eq!(run.schedule.slower_than(2, run.now()), []);
        run.milliseconds += 150;
        let hedge_delay = Duration::from_millis(250);
        assert_eq!(run.schedule.slower_than(2, run.now()), [Slow { hop: 1, hedge_delay }]);
        assert_eq!(run.schedule.slower_than(1, run.now()), []);
    }
}
