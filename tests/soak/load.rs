//! The clients: their requests, their behavior, and the check of what they receive.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustls::pki_types::ServerName;
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{sleep, timeout};

use crate::builds::{Build, Builds, Shape};
use crate::journal::{Outcome, Parts, Request};
use crate::lab::{GATEWAYS, Lab, WRITE_TIMEOUT};
use crate::log::{End, Log};
use crate::support::Duplex;

/// The time limit of a request, failures included; a longer one is a violation.
const HANG: Duration = Duration::from_secs(150);

/// The longest reply instead of a log, in bytes.
const LINE_MAX: usize = 256;

const NOT_FOUND: &str = "Build not found\r\n";
const NOT_STARTED: &str = "Build did not start yet\r\n";
const ERROR: &str = "Internal streaming error: ";
const TOO_LONG: &str = "Internal streaming error: the request is too long\r\n";
const NO_REQUEST: &str = "Internal streaming error: no request within the time allowed\r\n";

/// A kind of client.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// Reads a log to its end.
    Read(Shape),
    /// The same, with pauses shorter than the write timeout.
    Slow,
    /// Stops reading for longer than the write timeout.
    Stall,
    /// Resets at a random position of a log.
    Reset,
    /// Closes at a random position of a log.
    Close,
    Unknown,
    Garbage,
    /// Connects and sends nothing.
    Silent,
    /// Connects and disconnects.
    Probe,
}

/// The kinds with their names and weights.
const KINDS: [(Kind, &str, u32); 15] = [
    (Kind::Read(Shape::Short), "short log", 30),
    (Kind::Read(Shape::Slow), "trickling log", 16),
    (Kind::Read(Shape::Bulk), "bulk log", 6),
    (Kind::Read(Shape::ShortAborted), "short log that its executor cuts", 2),
    (Kind::Read(Shape::BulkAborted), "bulk log that its executor cuts", 2),
    (Kind::Read(Shape::Empty), "executor that closes without data", 2),
    (Kind::Read(Shape::Queued), "build that waits", 4),
    (Kind::Slow, "client that reads slowly", 2),
    (Kind::Stall, "client that stops reading", 1),
    (Kind::Reset, "client that resets", 6),
    (Kind::Close, "client that leaves", 6),
    (Kind::Unknown, "unknown build", 10),
    (Kind::Garbage, "garbage", 6),
    (Kind::Silent, "silent client", 2),
    (Kind::Probe, "health checker", 6),
];

/// A connection that can be reset below TLS.
struct Wire {
    stream: Box<dyn Duplex + Send>,
    socket: OwnedFd,
}

impl Wire {
    async fn connect(lab: &Lab, address: SocketAddr, tls: bool, narrow: bool) -> io::Result<Self> {
        let tcp = if narrow {
            let socket = TcpSocket::new_v4()?;
            socket.set_recv_buffer_size(1)?;
            socket.connect(address).await?
        } else {
            TcpStream::connect(address).await?
        };
        let socket = tcp.as_fd().try_clone_to_owned()?;
        let stream: Box<dyn Duplex + Send> = if tls {
            let name = ServerName::try_from("localhost").expect("a host name");
            Box::new(lab.connector.connect(name, tcp).await?)
        } else {
            Box::new(tcp)
        };
        Ok(Self { stream, socket })
    }

    fn reset(self) {
        // Fails if the connection has failed already.
        let _ = SockRef::from(&self.socket).set_linger(Some(Duration::ZERO));
    }
}

/// Sends random requests in sequence until `stop` is set.
pub(crate) async fn run(lab: &Lab, builds: &Builds, stop: &AtomicBool, mut rng: fastrand::Rng) {
    let sum: u32 = KINDS.iter().map(|(_, _, weight)| weight).sum();
    while !stop.load(Ordering::Relaxed) {
        let mut drawn = rng.u32(..sum);
        let (kind, name, _) = KINDS
            .iter()
            .find(|(_, _, weight)| match drawn.checked_sub(*weight) {
                None => true,
                Some(rest) => {
                    drawn = rest;
                    false
                }
            })
            .expect("less than the sum");
        let mut client = Client::draw(lab, builds, *kind, name, &mut rng);
        if timeout(HANG, client.request()).await.is_err() {
            lab.journal
                .violation(format!("{name}: not ended after {HANG:?}: {}", client.describe()));
        }
        sleep(Duration::from_millis(client.rng.u64(..100))).await;
        rng = client.rng;
    }
}

/// One request of one client.
struct Client<'a> {
    lab: &'a Lab,
    kind: Kind,
    name: &'static str,
    entry: usize,
    tls: bool,
    build: Option<Arc<Build>>,
    rng: fastrand::Rng,
    /// Bytes of the log, compared with what was sent.
    bytes: u64,
    /// Received bytes that are not the log.
    text: Vec<u8>,
    /// How it ended, for the report of a violation.
    end: String,
}

/// How reading ended.
enum Read {
    Clean,
    Cut(io::Error),
    /// The client stopped reading, as intended.
    Stopped,
}

impl<'a> Client<'a> {
    fn draw(
        lab: &'a Lab,
        builds: &Builds,
        kind: Kind,
        name: &'static str,
        rng: &mut fastrand::Rng,
    ) -> Self {
        let shape = match kind {
            Kind::Read(shape) => Some(shape),
            Kind::Slow | Kind::Stall => Some(Shape::Bulk),
            Kind::Reset | Kind::Close => Some(if rng.bool() { Shape::Bulk } else { Shape::Slow }),
            Kind::Unknown | Kind::Garbage | Kind::Silent | Kind::Probe => None,
        };
        Self {
            lab,
            kind,
            name,
            // Half of the requests go to the outer gateway, the others to any.
            entry: if rng.bool() { 0 } else { rng.usize(..GATEWAYS.len()) },
            tls: rng.u8(..3) == 0,
            build: shape.map(|shape| builds.draw(shape, rng)),
            rng: rng.fork(),
            bytes: 0,
            text: Vec::new(),
            end: String::new(),
        }
    }

    fn describe(&self) -> String {
        let build = self.build.as_ref().map(|build| build.id.as_str());
        format!(
            "{} of build {build:?} by {} ({}), {} bytes, {:?}, {}",
            self.name,
            GATEWAYS[self.entry].0,
            if self.tls { "TLS" } else { "plain" },
            self.bytes,
            self.text.escape_ascii().to_string(),
            self.end
        )
    }

    /// Performs the request and records its outcome.
    async fn request(&mut self) {
        let began = std::time::Instant::now();
        let outcome = match self.converse().await {
            Ok(read) => self.outcome(read),
            Err(error) => {
                self.end = error.to_string();
                Outcome::Nothing
            }
        };
        let (path, registry) = match &self.build {
            Some(build) => Parts::of(self.entry, build.zone),
            None => (Parts::gateway(self.entry), Parts::ZOOKEEPER.and(Parts::registry(self.entry))),
        };
        self.lab.journal.request(Request {
            kind: self.name,
            path,
            registry,
            entry: Parts::gateway(self.entry),
            tls: self.tls,
            began,
            ended: std::time::Instant::now(),
            bytes: self.bytes,
            outcome,
            expected: self.expects(outcome),
            detail: self.describe(),
        });
    }

    /// Performs the request.
    async fn converse(&mut self) -> io::Result<Read> {
        let address = self.lab.address(self.entry);
        let address = if self.tls { address.tls } else { address.plain };
        let narrow = matches!(self.kind, Kind::Slow | Kind::Stall);
        // A silent client does not begin the TLS handshake.
        let tls = self.tls && !matches!(self.kind, Kind::Silent);
        let mut wire = Wire::connect(self.lab, address, tls, narrow).await?;
        let line = match self.kind {
            Kind::Probe => return Ok(Read::Stopped),
            Kind::Silent => String::new(),
            Kind::Garbage => self.garbage(),
            Kind::Unknown => format!("{:032x}\n", self.rng.u128(..)),
            _ => format!("{}\r\n", self.build.as_ref().expect("it has one").id),
        };
        wire.stream.write_all(line.as_bytes()).await?;
        wire.stream.flush().await?;
        let read = self.read(&mut wire).await;
        if matches!((self.kind, &read), (Kind::Reset, Read::Stopped)) {
            wire.reset();
        }
        Ok(read)
    }

    fn garbage(&mut self) -> String {
        let letters = self.rng.usize(1..2000);
        let mut text: String = (0..letters).map(|_| self.rng.char('\u{0}'..'\u{2ff}')).collect();
        text.retain(|letter| letter != '\n');
        // "!" is not part of a build ID.
        format!("!{text}\n")
    }

    /// Reads and compares until the end, or until this client stops.
    async fn read(&mut self, wire: &mut Wire) -> Read {
        let log = self.build.as_ref().and_then(|build| Log::of(&build.id));
        let expected = log.map_or(&[][..], Log::bytes);
        let enough = match self.kind {
            Kind::Reset | Kind::Close => self.rng.usize(1..=expected.len()) as u64,
            _ => u64::MAX,
        };
        let pause_at = match self.kind {
            Kind::Slow | Kind::Stall => self.rng.u64(1..=expected.len() as u64),
            _ => u64::MAX,
        };
        let mut paused = false;
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let count = match wire.stream.read(&mut buffer).await {
                Ok(0) => return Read::Clean,
                Ok(count) => count,
                Err(error) => return Read::Cut(error),
            };
            let fresh = &buffer[..count];
            let at = self.bytes as usize;
            if self.text.is_empty() && expected.get(at..at + count) == Some(fresh) {
                self.bytes += count as u64;
            } else if self.bytes == 0 && self.text.len() + count <= LINE_MAX {
                self.text.extend_from_slice(fresh);
            } else {
                self.text = fresh[..count.min(80)].to_vec();
                let wrong = format!("wrong bytes from offset {at}: {}", self.describe());
                self.lab.journal.violation(wrong);
                return Read::Stopped;
            }
            if self.bytes >= enough {
                return Read::Stopped;
            }
            if self.bytes >= pause_at && !paused {
                paused = true;
                let pause = match self.kind {
                    Kind::Stall => WRITE_TIMEOUT * 2,
                    _ => WRITE_TIMEOUT / 6,
                };
                sleep(pause).await;
            }
        }
    }

    fn outcome(&mut self, read: Read) -> Outcome {
        self.end = match &read {
            Read::Clean => "clean end".to_owned(),
            Read::Cut(error) => error.to_string(),
            Read::Stopped => "stopped reading".to_owned(),
        };
        let log = self.build.as_ref().and_then(|build| Log::of(&build.id));
        match (read, log) {
            (Read::Stopped, _) => Outcome::Left,
            (Read::Clean, _) if !self.text.is_empty() => {
                if self.is_expected_reply() {
                    Outcome::AsExpected
                } else if !self.is_reply() {
                    let wrong = format!("neither log nor reply: {}", self.describe());
                    self.lab.journal.violation(wrong);
                    Outcome::Refused
                } else {
                    Outcome::Refused
                }
            }
            (Read::Clean, Some(log)) if self.bytes > 0 => {
                if log.end == End::Complete && self.bytes == u64::from(log.length) {
                    return Outcome::Complete;
                }
                if self.tls {
                    // Only the gateway itself can send close_notify.
                    let wrong =
                        format!("an incomplete log ended with close_notify: {}", self.describe());
                    self.lab.journal.violation(wrong);
                }
                Outcome::EndedShort
            }
            (Read::Cut(_), Some(_)) if self.bytes > 0 => Outcome::Cut,
            // After the reply, a client that sends more than the gateway reads is reset.
            (Read::Cut(_), None) if self.is_expected_reply() => Outcome::AsExpected,
            _ if self.is_expected_reply() => Outcome::AsExpected,
            _ => Outcome::Nothing,
        }
    }

    fn is_reply(&self) -> bool {
        std::str::from_utf8(&self.text).is_ok_and(|text| {
            text == NOT_FOUND
                || text == NOT_STARTED
                || (text.starts_with(ERROR) && text.ends_with("\r\n") && text.lines().count() == 1)
        })
    }

    /// Whether the client received the reply, or end, that is expected without failures.
    fn is_expected_reply(&self) -> bool {
        let text = std::str::from_utf8(&self.text).unwrap_or("?");
        match self.kind {
            Kind::Unknown => text == NOT_FOUND,
            Kind::Garbage => text == NOT_FOUND || text == TOO_LONG || text.is_empty(),
            // Without a handshake there is no reply.
            Kind::Silent => text == if self.tls { "" } else { NO_REQUEST },
            Kind::Read(Shape::Queued) => text == NOT_STARTED,
            Kind::Read(Shape::Empty | Shape::ShortAborted | Shape::BulkAborted) => {
                text.starts_with(ERROR)
            }
            _ => false,
        }
    }

    /// Whether this outcome is possible without failures.
    fn expects(&self, outcome: Outcome) -> bool {
        match self.kind {
            Kind::Read(Shape::ShortAborted | Shape::BulkAborted) => {
                matches!(outcome, Outcome::Cut | Outcome::AsExpected)
            }
            Kind::Read(Shape::Empty | Shape::Queued)
            | Kind::Unknown
            | Kind::Garbage
            | Kind::Silent => outcome == Outcome::AsExpected,
            Kind::Read(Shape::Short | Shape::Slow | Shape::Bulk) | Kind::Slow => {
                outcome == Outcome::Complete
            }
            Kind::Stall => matches!(outcome, Outcome::Complete | Outcome::Cut),
            Kind::Reset | Kind::Close | Kind::Probe => outcome == Outcome::Left,
        }
    }
}
