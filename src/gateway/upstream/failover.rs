//! Tries the hops of a route until one has the log: carries out what [`AttemptSchedule`] decides.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;

use thiserror::Error;
use tokio::sync::SemaphorePermit;
use tokio::time::{Instant, timeout_at};

use super::attempt::AttemptError;
use super::attempt_schedule::{AttemptSchedule, Candidate, Failure, Slow, Step, Timing};
use super::{ConnectObserver, ConnectParameters, Connector, Established};
use crate::gateway::health::{FailureKind, Health};
use crate::gateway::protocol::reply::{ErrorReason, GatewayReply, Reply};
use crate::model::hop::Hop;

/// The reply of a gateway at which too many other requests for the build wait for their first byte.
const TOO_MANY_FOR_BUILD: GatewayReply =
    GatewayReply::Known(Reply::Error(ErrorReason::TooManyForBuild));

/// All hops of a route failed, or one of them sent a final reply.
#[derive(Debug, Error)]
#[error("{error}")]
pub(crate) struct FailoverError {
    /// The hop that failed last, or whose reply is sent to the client.
    pub(crate) hop: Hop,
    pub(crate) error: AttemptError,
    /// The reply that the request is counted as.
    pub(crate) reply: Reply,
}

impl FailoverError {
    fn new(hop: &Hop, error: AttemptError, failure: Failure, hop_count: usize) -> Self {
        let reply = match (&error, failure) {
            (AttemptError::Replied { reply: GatewayReply::Known(reply), .. }, _) => *reply,
            (_, Failure::Silent) => Reply::Error(ErrorReason::ExecutorSilent),
            (_, Failure::TooManyForBuild) => Reply::Error(ErrorReason::TooManyForBuild),
            (_, Failure::Unreachable) if hop_count == 1 => {
                Reply::Error(ErrorReason::ExecutorUnreachable)
            }
            (_, Failure::Unreachable | Failure::Refused) => {
                Reply::Error(ErrorReason::ZoneUnreachable)
            }
        };
        Self { hop: hop.clone(), error, reply }
    }

    /// Returns the line for the client: that of the gateway that replied, unchanged, or our own.
    pub(crate) fn line(&self) -> &[u8] {
        match &self.error {
            AttemptError::Replied { line, .. } => line,
            _ => self.reply.line().as_bytes(),
        }
    }
}

/// An attempt under way.
struct RunningAttempt<'a, F> {
    hop: usize,
    attempt: Pin<Box<F>>,
    /// The permit for the socket of an attempt that was started while another one was running.
    permit: Option<SemaphorePermit<'a>>,
}

impl Connector {
    /// Returns the connection to the first of `hops` that sends the log. They are in the order to
    /// try them, the executor last; there is at least one. Dropping the future ends all attempts.
    ///
    /// # Errors
    /// No hop sent the log.
    pub(crate) async fn connect_any<'h, O: ConnectObserver>(
        &self,
        hops: &'h [Hop],
        parameters: &ConnectParameters<'_, O>,
    ) -> Result<Established<'h>, FailoverError> {
        let [hop] = hops else {
            // Boxed, because most routes have one hop and need no room for several.
            return Box::pin(self.fail_over(hops, parameters)).await;
        };
        match self.attempt(hop, parameters, &AtomicBool::default()).await {
            Ok(established) => {
                self.health.record_success(parameters.build, hop, Instant::now().into_std());
                Ok(established)
            }
            Err(error) => {
                self.attempt_failed(hop, &error, true, parameters);
                let failure = error.failure();
                Err(FailoverError::new(hop, error, failure, hops.len()))
            }
        }
    }

    /// Carries out an [`AttemptSchedule`] for `hops`.
    async fn fail_over<'h, O: ConnectObserver>(
        &self,
        hops: &'h [Hop],
        parameters: &ConnectParameters<'_, O>,
    ) -> Result<Established<'h>, FailoverError> {
        let kinds = hops.iter().map(|hop| match hop {
            Hop::Executor(_) => Candidate::Executor,
            Hop::Gateway(gateway) => {
                let health = self.health.health(gateway, Instant::now().into_std());
                Candidate::Gateway { backing_off: matches!(health, Health::BackingOff { .. }) }
            }
        });
        let mut schedule =
            AttemptSchedule::new(kinds, Timing::new(parameters.limits), Instant::now());
        let turns: Vec<_> = hops.iter().map(|_| AtomicBool::default()).collect();
        let has_turn = |hop: usize| turns[hop].load(Ordering::Relaxed);
        let report_failed = |hop: usize, error: &AttemptError, is_last: bool| {
            self.attempt_failed(&hops[hop], error, is_last, parameters);
        };
        let report_too_slow = |Slow { hop, hedge_delay }: Slow| {
            if has_turn(hop) {
                report_failed(hop, &AttemptError::TooSlow(hedge_delay), false);
            }
        };
        let mut running: Vec<RunningAttempt<'_, _>> = Vec::new();
        let mut refusal = None;
        let mut last = None;
        loop {
            let mut permit = self.spare_sockets.try_acquire().ok();
            let ended = match schedule.step(Instant::now(), permit.is_some()) {
                Step::Try { hop, instead_of } => {
                    if let Some(slow) = instead_of {
                        let index = running.iter().position(|attempt| attempt.hop == slow.hop);
                        let given_up = index.map(|index| running.remove(index));
                        permit = given_up.and_then(|attempt| attempt.permit).or(permit);
                        report_too_slow(slow);
                    }
                    parameters.observer.attempt_started(&hops[hop]);
                    let attempt = Box::pin(self.attempt(&hops[hop], parameters, &turns[hop]));
                    let permit = permit.filter(|_| !running.is_empty());
                    running.push(RunningAttempt { hop, attempt, permit });
                    continue;
                }
                Step::Wait(until) => {
                    drop(permit);
                    timeout_at(until, first_ended(&mut running)).await
                }
                Step::End => break,
            };
            match ended {
                Err(_) => {}
                Ok((hop, Err(error))) if !error.is_final() => {
                    schedule.failed(hop, error.failure());
                    let is_refusal = matches!(error, AttemptError::Replied { .. });
                    let is_last = !is_refusal && refusal.is_none() && schedule.is_over();
                    report_failed(hop, &error, is_last);
                    if is_refusal && refusal.is_none() {
                        refusal = Some((hop, error));
                    } else {
                        last = Some((hop, error));
                    }
                }
                Ok((hop, result)) => {
                    schedule.slower_than(hop, Instant::now()).into_iter().for_each(report_too_slow);
                    let now = Instant::now().into_std();
                    self.health.record_success(parameters.build, &hops[hop], now);
                    return result.map_err(|error| {
                        let failure = error.failure();
                        FailoverError::new(&hops[hop], error, failure, hops.len())
                    });
                }
            }
        }
        // The attempts that are still running have exceeded the deadline.
        while let Some(RunningAttempt { hop, .. }) = running.pop() {
            let silent = has_turn(hop);
            let error = if silent { AttemptError::Silent } else { AttemptError::TooManyForBuild };
            schedule.failed(hop, error.failure());
            report_failed(hop, &error, running.is_empty() && refusal.is_none());
            last = Some((hop, error));
        }
        let (hop, error) = refusal.or(last).expect("a route has at least one hop");
        Err(FailoverError::new(&hops[hop], error, schedule.failure(), hops.len()))
    }

    /// Reports a failed attempt and records it for the health of the hop. `is_last` means that the
    /// request fails with it.
    fn attempt_failed<O: ConnectObserver>(
        &self,
        hop: &Hop,
        error: &AttemptError,
        is_last: bool,
        parameters: &ConnectParameters<'_, O>,
    ) {
        parameters.observer.attempt_failed(hop, error, is_last);
        let kind = match error {
            // A full bound on requests says nothing about the health of the gateway.
            AttemptError::TooManyForBuild => return,
            AttemptError::Replied { reply, .. } if *reply == TOO_MANY_FOR_BUILD => return,
            AttemptError::Loop(_) | AttemptError::Ourselves => FailureKind::Loop,
            _ => FailureKind::Other,
        };
        let now = Instant::now().into_std();
        self.health.record_failure(parameters.build, hop, error, kind, now);
    }
}

/// Waits until one of `running` has ended, and removes it.
async fn first_ended<F: Future>(running: &mut Vec<RunningAttempt<'_, F>>) -> (usize, F::Output) {
    // There are few, so all are polled whenever one of them is woken.
    let (index, output) = poll_fn(|cx| {
        for (index, RunningAttempt { attempt, .. }) in running.iter_mut().enumerate() {
            if let Poll::Ready(output) = attempt.as_mut().poll(cx) {
                return Poll::Ready((index, output));
            }
        }
        Poll::Pending
    })
    .await;
    (running.remove(index).hop, output)
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use futures_util::FutureExt as _;
    use rustls::HandshakeKind;
    use tokio::io::AsyncWriteExt as _;

    use super::*;
    use crate::config::Limits;
    use crate::gateway::health::GatewayHealth;
    use crate::gateway::transport::connection::Connection;
    use crate::gateway::transport::in_memory;
    use crate::gateway::upstream::OwnAddresses;
    use crate::model::build_id::BuildId;
    use crate::model::build_request::Executor;
    use crate::model::component::Gateway;

    /// Records the events of a connect phase: the host, and for a failure its label and whether it
    /// is the last.
    #[derive(Default)]
    struct Events {
        started: Mutex<Vec<String>>,
        failed: Mutex<Vec<(String, &'static str, bool)>>,
    }

    impl ConnectObserver for Events {
        fn attempt_started(&self, hop: &Hop) {
            self.started.lock().expect("a lock").push(hop.address().0.to_owned());
        }

        fn executor_slot_awaited(&self, _: Duration) {}

        fn tls_established(&self, _: HandshakeKind) {}

        fn connected(&self, _: &Hop, _: Duration) {}

        fn attempt_failed(&self, hop: &Hop, error: &AttemptError, is_last: bool) {
            let failure = (hop.address().0.to_owned(), error.label(), is_last);
            self.failed.lock().expect("a lock").push(failure);
        }
    }

    fn gateway(host: &str) -> Hop {
        let zone = Some("west".to_owned());
        Hop::Gateway(Gateway { hostname: host.to_owned(), port: 7979, zone, tls: false })
    }

    fn executor(host: &str) -> Hop {
        Hop::Executor(Executor { hostname: host.to_owned(), port: 7900, zone: None })
    }

    /// Connects to `hops`: `dead` refuses connections, `silent` accepts them and sends nothing, and
    /// each other host sends its name. Returns the host and its first bytes, or the error, and how
    /// long that took.
    async fn connect(
        hops: &[Hop],
        events: &Events,
    ) -> (Result<(String, Vec<u8>), FailoverError>, Duration) {
        let own_addresses = OwnAddresses::new([], None);
        let health = Arc::new(GatewayHealth::default());
        let connector = Connector::new(None, own_addresses, health);
        for hop in hops {
            let host = hop.address().0.to_owned();
            // The peers stay connected until the dialer is dropped.
            let peers = Mutex::new(Vec::new());
            connector.dialer.add_host(
                &host.clone(),
                Box::new(move || {
                    if host.starts_with("dead") {
                        return Err(io::ErrorKind::ConnectionRefused.into());
                    }
                    let (Connection::Plain(socket), mut peer) = in_memory::connection(4096) else {
                        panic!("not a plain connection");
                    };
                    if !host.starts_with("silent") {
                        let sent = peer.stream.write_all(host.as_bytes()).now_or_never();
                        sent.expect("room for the bytes").expect("a connection");
                    }
                    peers.lock().expect("a lock").push(peer);
                    Ok(socket)
                }),
            );
        }
        let limits = Limits::default();
        let parameters = ConnectParameters {
            build: &BuildId::new("ab").expect("a build ID"),
            forwarded: 0,
            executor_is_gateway: false,
            client_is_tls: false,
            limits: &limits,
            observer: events,
        };
        let began = Instant::now();
        let result = connector.connect_any(hops, &parameters).await;
        let result = result.map(|established| {
            (established.hop.address().0.to_owned(), established.first.to_vec())
        });
        (result, began.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn silent_gateway_is_superseded_after_the_hedge_delay() {
        let events = Events::default();
        let hops = [gateway("silent"), gateway("log"), executor("executor")];
        let (result, time) = connect(&hops, &events).await;
        assert_eq!(result.expect("a log"), ("log".to_owned(), b"log".to_vec()));
        let hedge_delay = Limits::default().connect_timeout / 5;
        assert!(time >= hedge_delay && time < 2 * hedge_delay, "{time:?}");
        assert_eq!(*events.started.lock().expect("a lock"), ["silent", "log"]);
        let failed = [("silent".to_owned(), "slower", false)];
        assert_eq!(*events.failed.lock().expect("a lock"), failed);
    }

    #[tokio::test(start_paused = true)]
    async fn executor_is_tried_immediately_after_all_gateways_have_refused() {
        let events = Events::default();
        let hops = [gateway("dead1"), gateway("dead2"), executor("executor")];
        let (result, time) = connect(&hops, &events).await;
        assert_eq!(result.expect("a log").0, "executor");
        assert!(time < Duration::from_millis(100), "{time:?}");
        assert_eq!(*events.started.lock().expect("a lock"), ["dead1", "dead2", "executor"]);
        let failed = ["dead1", "dead2"].map(|host| (host.to_owned(), "connect", false));
        assert_eq!(*events.failed.lock().expect("a lock"), failed);
    }

    #[tokio::test(start_paused = true)]
    async fn request_fails_at_the_deadline_if_all_hops_are_silent() {
        let events = Events::default();
        let hops = [gateway("silent1"), gateway("silent2"), executor("silent3")];
        let (result, time) = connect(&hops, &events).await;
        let error = result.expect_err("no log");
        assert!(matches!(error.error, AttemptError::Silent), "{error}");
        assert_eq!(error.reply, Reply::Error(ErrorReason::ExecutorSilent));
        let limits = Limits::default();
        let deadline =
            limits.lookup_timeout + 2 * limits.connect_timeout + limits.first_byte_timeout;
        assert_eq!(time.as_secs(), deadline.as_secs());
        let failed = events.failed.lock().expect("a lock");
        assert_eq!(failed.len(), hops.len());
        assert_eq!(failed.iter().filter(|(_, _, is_last)| *is_last).count(), 1, "{failed:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn final_reply_of_a_gateway_ends_the_request() {
        let events = Events::default();
        let hops = [gateway("dead"), gateway("Build not found\r\n"), executor("executor")];
        let (result, _) = connect(&hops, &events).await;
        let error = result.expect_err("no log");
        assert_eq!(error.line(), b"Build not found\r\n");
        assert_eq!(events.started.lock().expect("a lock").len(), 2);
    }
}
