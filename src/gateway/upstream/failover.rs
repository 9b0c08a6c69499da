//! Several next hops for one log: the first that sends some of it is the one.
//!
//! Hops are asked in order. Each has a head start of [`head_start`], then the next one is asked
//! beside it, and at once where one fails: so dead gateways cost a client little, whether they
//! refuse, swallow packets, never end a handshake, or say nothing behind it. The executor is asked
//! when all gateways have failed, or [`executor_after`] has passed, however many are still to be
//! asked. All together have [`patience`]. What of a gateway failed, [`crate::gateway::health`] remembers.

use std::collections::VecDeque;
use std::fmt;
use std::future::pending;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::time::{Instant, sleep_until, timeout, timeout_at};
use tracing::debug;

use super::misrouting;
use super::{DialError, Upstream};
use crate::config::Limits;
use crate::gateway::health::FailureKind;
use crate::gateway::protocol::reply::{FirstBytes, PeerReply, Reply, ReplyError, classify};
use crate::gateway::relay::EndReason;
use crate::gateway::session::stream_table::Listed;
use crate::gateway::session::{Asked, Caller, log_stream};
use crate::gateway::transport::buffer_pool::Chunk;
use crate::gateway::transport::connection::{Connection, read_size};
use crate::model::excerpt::Excerpt;
use crate::telemetry::metrics::{Direction, Route};
use crate::tls;
use crate::tls::HandshakeFailure;

/// A reply that says nothing about the gateway.
const TOO_MANY_FOR_BUILD: PeerReply = PeerReply::Known(Reply::Error(ReplyError::TooManyForBuild));

/// How long a hop is asked alone: a fifth of the connect deadline; a quarter of that for one that is
/// avoided, and is asked for want of a better one.
fn head_start(limits: &Limits, avoided: bool) -> Duration {
    limits.connect_timeout / if avoided { 20 } else { 5 }
}

/// How long gateways have before the executor is asked beside them.
fn executor_after(limits: &Limits, all_avoided: bool) -> Duration {
    if all_avoided { head_start(limits, false) } else { limits.connect_timeout }
}

/// For a first byte from whichever hop: longer than a gateway of our kind on the way takes to find
/// the executor dead or silent, so that its words arrive.
///
/// No shorter where the executor has been silent for its `first_byte_timeout`. A log has a first line
/// before anybody is told of it, so that is no young build but a host that hangs, or something
/// on our way to it that takes connections for it; behind that a gateway may still do better.
fn patience(limits: &Limits) -> Duration {
    limits.lookup_timeout + 2 * limits.connect_timeout + limits.first_byte_timeout
}

/// How the wait for a hop that sends nothing ends.
pub(crate) const SILENT: &str = "the next hop said nothing";

/// The hop that has the log.
pub(crate) struct Answered {
    pub(crate) hop: Upstream,
    pub(crate) route: Route,
    pub(crate) connection: Connection,
    pub(crate) listed: Listed,
    pub(crate) first: Chunk,
}

/// How asking several hops ended.
pub(crate) enum Raced {
    Answered(Box<Answered>),
    /// Not one has it.
    Failed(ReplyError),
    /// The client left, or we stop.
    Over(EndReason),
}

/// Why a hop brought no log.
enum Miss {
    Dial(DialError),
    /// It closed without a byte, or said nothing in time.
    Silent,
    /// The connection failed.
    Cut(io::Error),
    /// Another hop had sent something before it did.
    Overtaken(Duration),
    /// It has the line of a gateway that cannot serve the log.
    Refused(PeerReply, Box<Answered>),
}

impl fmt::Display for Miss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dial(error) => write!(f, "{error}"),
            Self::Silent => f.write_str(SILENT),
            Self::Cut(error) => write!(f, "cut by the next hop: {}", tls::describe(error)),
            Self::Overtaken(after) => {
                write!(f, "overtaken: nothing within {after:?}, when another hop had the log")
            }
            Self::Refused(_, answered) => {
                let line = answered.first.split(|byte| b"\r\n".contains(byte)).next();
                write!(f, "the gateway answered: {}", Excerpt::new(line.unwrap_or_default()))
            }
        }
    }
}

impl Miss {
    /// The value of the metric label `reason`.
    fn label(&self) -> &'static str {
        match self {
            Self::Dial(error) => error.label(),
            Self::Silent => "silent",
            Self::Cut(_) => "cut",
            Self::Overtaken(_) => "slower",
            Self::Refused(..) => "refused",
        }
    }
}

/// A hop that is being asked.
struct Runner {
    hop: Upstream,
    since: Instant,
    head_start: Duration,
    over: bool,
    /// It has a slot among the requests for the build, so it can be slow or silent.
    has_slot: Arc<AtomicBool>,
}

/// Asks `hops` until one has sent something.
pub(crate) async fn race(hops: &[Upstream], client: &mut Connection, asked: &Asked<'_>) -> Raced {
    let Asked { cx, .. } = asked;
    let began = Instant::now();
    let mut race = Race::new(hops, client.is_tls(), asked, began);
    let mut running = FuturesUnordered::new();
    running.extend(race.next());
    loop {
        let next = race.next_at();
        let outcome = tokio::select! {
            biased;
            () = cx.cut.cancelled() => return race.over(EndReason::Stopped),
            Some((index, outcome)) = running.next() => {
                race.runners[index].over = true;
                Some((index, outcome))
            }
            reason = client.wait_closed() => return race.over(EndReason::ClientLeft(reason)),
            () = sleep_until(next.unwrap_or(began)), if next.is_some() => None,
            () = sleep_until(began + patience(&cx.limits)) => return race.late(),
        };
        match outcome {
            None => running.extend(race.next()),
            Some((index, Ok(answered))) => return race.won(index, Box::new(answered)),
            Some((index, Err(miss))) => {
                let idle = running.is_empty();
                if let Some(raced) = race.missed(index, miss, idle) {
                    return raced;
                }
                if idle || !race.waiting.is_empty() {
                    running.extend(race.next());
                }
            }
        }
    }
}

/// Who is asked, and who is to be asked.
struct Race<'a> {
    asked: &'a Asked<'a>,
    tls_client: bool,
    hops: usize,
    /// Gateways that are to be asked, and whether each is avoided.
    waiting: VecDeque<(Upstream, bool)>,
    /// The executor, until it is asked.
    executor: Option<Upstream>,
    /// When the executor is asked, whatever has become of the gateways by then.
    executor_at: Instant,
    runners: Vec<Runner>,
    /// A gateway's own line, for when nobody has better.
    refusal: Option<Box<Answered>>,
    silent: bool,
    /// A hop was not asked because too many requests for the build wait for it.
    busy: bool,
}

impl<'a> Race<'a> {
    fn new(hops: &[Upstream], tls_client: bool, asked: &'a Asked<'a>, began: Instant) -> Self {
        let mut waiting: VecDeque<_> = asked.cx.resolver.order(hops).into();
        // What comes behind the executor leads back to us.
        let executor = waiting.iter().position(|(hop, _)| matches!(hop, Upstream::Executor(_)));
        let executor = executor.and_then(|index| waiting.drain(index..).next());
        let all_avoided = waiting.iter().all(|(_, avoided)| *avoided);
        Self {
            asked,
            tls_client,
            hops: hops.len(),
            waiting,
            executor: executor.map(|(hop, _)| hop),
            executor_at: began + executor_after(&asked.cx.limits, all_avoided),
            runners: Vec::new(),
            refusal: None,
            silent: false,
            busy: false,
        }
    }

    /// Asks the next hop, if there is one.
    fn next(&mut self) -> Option<impl Future<Output = (usize, Result<Answered, Miss>)> + use<'a>> {
        let late = self.waiting.is_empty() || self.executor_at <= Instant::now();
        let (hop, avoided) = match self.executor.take_if(|_| late) {
            Some(executor) => (executor, false),
            None => self.waiting.pop_front()?,
        };
        let asked = self.asked;
        let index = self.runners.len();
        let has_slot = Arc::<AtomicBool>::default();
        self.runners.push(Runner {
            hop: hop.clone(),
            since: Instant::now(),
            head_start: head_start(&asked.cx.limits, avoided),
            over: false,
            has_slot: Arc::clone(&has_slot),
        });
        let route = hop.route(self.hops);
        let listed = asked.listed(&hop);
        let is_tls = matches!(&hop, Upstream::Gateway(gateway) if gateway.tls);
        let room = read_size(is_tls, self.tls_client);
        Some(async move { (index, ask(hop, route, listed, room, asked, &has_slot).await) })
    }

    /// When the next hop is to be asked, though nobody has failed.
    fn next_at(&self) -> Option<Instant> {
        let executor = self.executor.is_some().then_some(self.executor_at);
        let last = self.runners.last().filter(|_| !self.waiting.is_empty());
        executor.into_iter().chain(last.map(|last| last.since + last.head_start)).min()
    }

    /// Notes that a hop brought nothing.
    fn note(&self, hop: &Upstream, miss: &Miss) {
        let Asked { build, span, cx, .. } = self.asked;
        let (host, port) = hop.address();
        span.attempt_failed(host, port, miss);
        let kind = match miss {
            Miss::Dial(DialError::TooManyForBuild) | Miss::Refused(TOO_MANY_FOR_BUILD, _) => None,
            Miss::Dial(DialError::Loop(_) | DialError::Ourselves) => Some(FailureKind::Loop),
            _ => Some(FailureKind::Other),
        };
        if let Some(kind) = kind {
            cx.resolver.memory().failed(build, hop, miss, kind);
        }
        if let (Upstream::Executor(_), Miss::Dial(DialError::Ourselves)) = (hop, miss) {
            cx.metrics.misrouted("loop");
        }
        if let Upstream::Gateway(gateway) = hop {
            cx.metrics.failed_over(miss.label());
            match miss {
                Miss::Dial(DialError::WrongZone(found)) => {
                    misrouting::found_elsewhere(gateway, found, cx);
                }
                Miss::Dial(DialError::Loop(found)) => misrouting::found_circle(gateway, found, cx),
                Miss::Dial(DialError::Ourselves) => {
                    misrouting::found_circle(gateway, &cx.resolver.own(), cx);
                }
                _ => {}
            }
        }
    }

    /// Takes it that a hop has failed, and says how the race ended if it was the last one.
    fn missed(&mut self, index: usize, miss: Miss, idle: bool) -> Option<Raced> {
        let Asked { caller: Caller { peer, logged, .. }, build, .. } = self.asked;
        let hop = self.runners[index].hop.clone();
        let silent = matches!(miss, Miss::Silent);
        self.note(&hop, &miss);
        self.silent |= silent || matches!(miss, Miss::Dial(DialError::Busy));
        self.busy |= matches!(miss, Miss::Dial(DialError::TooManyForBuild));
        let last = idle && self.waiting.is_empty() && self.executor.is_none();
        if !last || matches!(miss, Miss::Refused(..)) || self.refusal.is_some() {
            log_stream!(
                *logged, %peer, %build, route = %hop, end = %miss, "hop failed"
            );
        }
        if !last {
            if let Miss::Refused(_, answered) = miss {
                self.refusal.get_or_insert(answered);
            }
            return None;
        }
        if let Miss::Refused(_, answered) = miss {
            return Some(Raced::Answered(self.refusal.take().unwrap_or(answered)));
        }
        if let Some(refusal) = self.refusal.take() {
            return Some(Raced::Answered(refusal));
        }
        self.asked.ended(&hop, hop.route(self.hops), 0, &miss);
        Some(self.failed())
    }

    fn failed(&self) -> Raced {
        Raced::Failed(match self.hops {
            _ if self.silent => ReplyError::ExecutorSilent,
            _ if self.busy => ReplyError::TooManyForBuild,
            1 => ReplyError::ExecutorUnreachable,
            _ => ReplyError::ZoneUnreachable,
        })
    }

    /// Takes it that nobody has said anything in time.
    fn late(&mut self) -> Raced {
        for runner in self.runners.iter().filter(|runner| !runner.over) {
            if !runner.has_slot.load(Ordering::Relaxed) {
                self.busy = true;
                continue;
            }
            self.silent = true;
            self.note(&runner.hop, &Miss::Silent);
            let route = runner.hop.route(self.hops);
            self.asked.ended(&runner.hop, route, 0, &SILENT);
        }
        self.refusal.take().map_or_else(|| self.failed(), Raced::Answered)
    }

    /// Takes it that a hop has the log.
    fn won(&mut self, index: usize, answered: Box<Answered>) -> Raced {
        let Asked { caller: Caller { peer, logged, .. }, build, span, cx, .. } = self.asked;
        let before = self.runners[..index].iter().filter(|runner| !runner.over);
        let before = before.filter(|runner| runner.has_slot.load(Ordering::Relaxed));
        for runner in before.filter(|runner| runner.since.elapsed() >= runner.head_start) {
            let miss = Miss::Overtaken(runner.head_start);
            log_stream!(
                *logged, %peer, %build, route = %runner.hop, end = %miss, "hop failed"
            );
            self.note(&runner.hop, &miss);
        }
        cx.resolver.memory().answered(build, &answered.hop);
        cx.metrics.first_byte(answered.listed.age(), span.trace_id());
        span.first_byte();
        Raced::Answered(answered)
    }

    fn over(&self, end: EndReason) -> Raced {
        if let Some(Runner { hop, .. }) = self.runners.last() {
            self.asked.ended(hop, hop.route(self.hops), 0, &end);
        }
        Raced::Over(end)
    }
}

/// Asks one hop and waits for the first bytes, at most `room`.
async fn ask(
    hop: Upstream,
    route: Route,
    listed: Listed,
    room: usize,
    asked: &Asked<'_>,
    has_slot: &AtomicBool,
) -> Result<Answered, Miss> {
    let Asked { build, span, cx, .. } = asked;
    let may_lead_back = match &hop {
        Upstream::Gateway(_) => true,
        Upstream::Executor(executor) => cx.resolver.is_gateway(executor),
    };
    let in_flight = if may_lead_back {
        let slot = cx.loop_guard.acquire(build, &hop, &cx.limits).await;
        Some(slot.ok_or(Miss::Dial(DialError::TooManyForBuild))?)
    } else {
        None
    };
    has_slot.store(true, Ordering::Relaxed);
    let deadline = cx.first_byte_deadline();
    let mut slot = match &hop {
        Upstream::Gateway(_) => None,
        Upstream::Executor(executor) => {
            // The race itself ends when the client leaves.
            let slot = cx.executor_slot(executor, build, pending::<()>()).await;
            Some(slot.map_err(|_| Miss::Dial(DialError::Busy))?)
        }
    };
    let dialed = Instant::now();
    let mut connection = hop.ask(asked).await.map_err(Miss::Dial)?;
    // The number of hops in the request ends loops.
    let in_flight = in_flight.filter(|_| !connection.is_peer_gateway());
    cx.metrics.connected(route, dialed.elapsed());
    let (host, port) = hop.address();
    span.connected(host, port);
    let read = connection.read_chunk(room);
    let read = match &hop {
        // Bounded by the patience with all.
        Upstream::Gateway(_) => read.await,
        Upstream::Executor(_) => {
            let patience = cx.first_byte_patience(deadline);
            timeout(patience, read).await.map_err(|_| {
                if let Some(slot) = slot.take_if(|_| patience == cx.limits.first_byte_timeout) {
                    slot.silent(build);
                }
                Miss::Silent
            })?
        }
    };
    drop(in_flight);
    if let (Some(slot), Ok(_)) = (slot, &read) {
        slot.answered();
    }
    let mut piece = match read {
        Ok(piece) if piece.is_empty() => return Err(Miss::Silent),
        Ok(piece) => piece,
        Err(error) => {
            if let (Upstream::Gateway(_), Some(late)) =
                (&hop, HandshakeFailure::after_handshake(&error))
            {
                cx.metrics.handshake_failed(Direction::Outbound, late.label());
                return Err(Miss::Dial(DialError::Tls(error)));
            }
            return Err(Miss::Cut(error));
        }
    };
    debug!(%build, route = %hop, bytes = piece.len(), "first bytes");
    let first = match &hop {
        Upstream::Executor(_) => FirstBytes::Log,
        Upstream::Gateway(_) => {
            complete_reply(&mut piece, &mut connection).await.map_err(Miss::Cut)?
        }
    };
    let found = || tls::names_of_peer(connection.peer_certificates());
    let is_peer = connection.is_peer_gateway();
    match first {
        FirstBytes::Reply(PeerReply::Known(Reply::Error(ReplyError::WrongZone))) if is_peer => {
            Err(Miss::Dial(DialError::WrongZone(found())))
        }
        FirstBytes::Reply(PeerReply::Known(Reply::Error(ReplyError::Loop))) if is_peer => {
            Err(Miss::Dial(DialError::Loop(found())))
        }
        FirstBytes::Reply(reply) if reply.allows_failover() => {
            let answered = Answered { hop, route, connection, listed, first: piece };
            Err(Miss::Refused(reply, Box::new(answered)))
        }
        _ => Ok(Answered { hop, route, connection, listed, first: piece }),
    }
}

/// How long the rest of a line is waited for that may become a reply. No log of Zuul's begins as a
/// reply does, so this delays none.
const REPLY_WAIT: Duration = Duration::from_millis(500);

/// The most that is read of the rest of a reply, in bytes.
const REPLY_READ: usize = 1024;

/// Classifies the first bytes from a gateway, after reading the rest of a reply that came in parts.
async fn complete_reply(
    first: &mut Chunk,
    connection: &mut Connection,
) -> Result<FirstBytes, io::Error> {
    let deadline = Instant::now() + REPLY_WAIT;
    loop {
        let classified = classify(first, false);
        if classified != FirstBytes::Incomplete {
            return Ok(classified);
        }
        match timeout_at(deadline, connection.read_chunk(REPLY_READ)).await {
            Ok(Ok(more)) if !more.is_empty() => first.append(&more),
            Ok(Err(error)) => {
                return match classify(first, true) {
                    FirstBytes::Reply(reply) => Ok(FirstBytes::Reply(reply)),
                    _ => Err(error),
                };
            }
            Ok(Ok(_)) | Err(_) => return Ok(classify(first, true)),
        }
    }
}
