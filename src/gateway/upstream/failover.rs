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
use super::{ConnectObserver, ConnectRequest, Connector, Established};
use crate::gateway::health::{FailureKind, Health};
use crate::gateway::protocol::reply::{PeerReply, Reply, ReplyError};
use crate::model::hop::Hop;

/// The reply of a gateway at which too many other requests for the build wait for their first byte.
const TOO_MANY_FOR_BUILD: PeerReply = PeerReply::Known(Reply::Error(ReplyError::TooManyForBuild));

/// All hops of a route failed, or one of them sent a final reply.
#[derive(Debug, Error)]
#[error("{error}")]
pub(crate) struct FailoverError {
    /// The hop that failed last, or whose reply is sent to the client.
    pub(crate) hop: Hop,
    #[source]
    pub(crate) error: AttemptError,
    /// The reply that the request is counted as.
    pub(crate) reply: Reply,
}

impl FailoverError {
    fn new(hop: &Hop, error: AttemptError, failure: Failure, hops: usize) -> Self {
        let reply = match (&error, failure) {
            (AttemptError::Replied { reply: PeerReply::Known(reply), .. }, _) => *reply,
            (_, Failure::Silent) => Reply::Error(ReplyError::ExecutorSilent),
            (_, Failure::Busy) => Reply::Error(ReplyError::TooManyForBuild),
            (_, Failure::Unreachable) if hops == 1 => Reply::Error(ReplyError::ExecutorUnreachable),
            (_, Failure::Unreachable | Failure::Refused) => {
                Reply::Error(ReplyError::ZoneUnreachable)
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
struct Running<'a, F> {
    hop: usize,
    attempt: Pin<Box<F>>,
    /// The permit for the socket of an attempt that was started while another one was running.
    permit: Option<SemaphorePermit<'a>>,
}

impl Connector {
    /// Returns the connection to the first of `hops` that sends the log. They are in the order to try
    /// them, the executor last; there is at least one. Dropping the future ends all attempts.
    ///
    /// # Errors
    /// No hop sent the log.
    pub(crate) async fn connect_any<'h, O: ConnectObserver>(
        &self,
        hops: &'h [Hop],
        request: &ConnectRequest<'_, O>,
    ) -> Result<Established<'h>, FailoverError> {
        let [hop] = hops else {
            // Boxed, because most routes have one hop and need no room for several.
            return Box::pin(self.fail_over(hops, request)).await;
        };
        match self.attempt(hop, request, &AtomicBool::default()).await {
            Ok(established) => {
                self.health.record_success(request.build, hop, Instant::now().into_std());
                Ok(established)
            }
            Err(error) => {
                self.attempt_failed(hop, &error, true, request);
                let failure = error.failure();
                Err(FailoverError::new(hop, error, failure, hops.len()))
            }
        }
    }

    /// Carries out an [`AttemptSchedule`] for `hops`.
    async fn fail_over<'h, O: ConnectObserver>(
        &self,
        hops: &'h [Hop],
        request: &ConnectRequest<'_, O>,
    ) -> Result<Established<'h>, FailoverError> {
        let kinds = hops.iter().map(|hop| match hop {
            Hop::Executor(_) => Candidate::Executor,
            Hop::Gateway(gateway) => {
                let health = self.health.health(gateway, Instant::now().into_std());
                Candidate::Gateway { backing_off: matches!(health, Health::BackingOff { .. }) }
            }
        });
        let mut schedule = AttemptSchedule::new(kinds, Timing::new(request.limits), Instant::now());
        let turns: Vec<_> = hops.iter().map(|_| AtomicBool::default()).collect();
        let has_turn = |hop: usize| turns[hop].load(Ordering::Relaxed);
        let failed = |hop: usize, error: &AttemptError, is_last: bool| {
            self.attempt_failed(&hops[hop], error, is_last, request);
        };
        let too_slow = |Slow { hop, hedge_delay }: Slow| {
            if has_turn(hop) {
                failed(hop, &AttemptError::TooSlow(hedge_delay), false);
            }
        };
        let mut running: Vec<Running<'_, _>> = Vec::new();
        let mut refusal = None;
        let mut last = None;
        loop {
            let mut permit = self.spare_sockets.try_acquire().ok();
            let ended = match schedule.step(Instant::now(), permit.is_some()) {
                Step::Try { hop, instead_of } => {
                    if let Some(slow) = instead_of {
                        let index = running.iter().position(|attempt| attempt.hop == slow.hop);
                        let ended = index.map(|index| running.remove(index));
                        permit = ended.and_then(|ended| ended.permit).or(permit);
                        too_slow(slow);
                    }
                    request.observer.attempt_started(&hops[hop]);
                    let attempt = Box::pin(self.attempt(&hops[hop], request, &turns[hop]));
                    let permit = permit.filter(|_| !running.is_empty());
                    running.push(Running { hop, attempt, permit });
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
                    failed(hop, &error, is_last);
                    if is_refusal && refusal.is_none() {
                        refusal = Some((hop, error));
                    } else {
                        last = Some((hop, error));
                    }
                }
                Ok((hop, result)) => {
                    schedule.slower_than(hop, Instant::now()).into_iter().for_each(too_slow);
                    let now = Instant::now().into_std();
                    self.health.record_success(request.build, &hops[hop], now);
                    let failed = |error: AttemptError| {
                        let failure = error.failure();
                        FailoverError::new(&hops[hop], error, failure, hops.len())
                    };
                    return result.map_err(failed);
                }
            }
        }
        // The attempts that are still running have exceeded the deadline.
        while let Some(Running { hop, .. }) = running.pop() {
            let silent = has_turn(hop);
            let error = if silent { AttemptError::Silent } else { AttemptError::TooManyForBuild };
            schedule.failed(hop, error.failure());
            failed(hop, &error, running.is_empty() && refusal.is_none());
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
        request: &ConnectRequest<'_, O>,
    ) {
        request.observer.attempt_failed(hop, error, is_last);
        let kind = match error {
            // A full bound on requests says nothing about the health of the gateway.
            AttemptError::TooManyForBuild => return,
            AttemptError::Replied { reply, .. } if *reply == TOO_MANY_FOR_BUILD => return,
            AttemptError::Loop(_) | AttemptError::Ourselves => FailureKind::Loop,
            _ => FailureKind::Other,
        };
        let now = Instant::now().into_std();
        self.health.record_failure(request.build, hop, error, kind, now);
    }
}

/// Waits until one of `running` has ended, and removes it.
async fn first_ended<F: Future>(running: &mut Vec<Running<'_, F>>) -> (usize, F::Output) {
    // There are few, so all are polled whenever one of them is woken.
    let (index, output) = poll_fn(|cx| {
        for (index, Running { attempt, .. }) in running.iter_mut().enumerate() {
            if let Poll::Ready(output) = attempt.as_mut().poll(cx) {
                return Poll::Ready((index, output));
            }
        }
        Poll::Pending
    })
    .await;
    (running.remove(index).hop, output)
}
