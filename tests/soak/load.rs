//! The clients: what they ask for, how they behave, and what they make of what comes.

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

/// Longer than any request takes, faults included; what is over it hangs.
const HANG: Duration = Duration::from_secs(150);

/// The longest line that stands for a log, in bytes.
const LINE_MAX: usize = 256;

const NOT_FOUND: &str = "Build not found\r\n";
const NOT_STARTED: &str = "Build did not start yet\r\n";
const FAULT: &str = "Internal streaming error: ";
const TOO_LONG: &str = "Internal streaming error: the request is too long\r\n";
const NO_REQUEST: &str = "Internal streaming error: no request within the time allowed\r\n";

/// What a client does.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// Reads a log to its end.
    Read(Shape),
    /// The same, with pauses that are not too long.
    Slow,
    /// Stops reading for longer than anybody waits.
    Stall,
    /// Resets, somewhere in a log.
    Reset,
    /// Closes, somewhere in a log.
    Close,
    Unknown,
    Garbage,
    /// Connects and says nothing.
    Silent,
    /// Connects and leaves.
    Look,
}

/// How often each is drawn, of their sum.
const KINDS: [(Kind, &str, u32); 15] = [
    (Kind::Read(Shape::Short), "short log", 30),
    (Kind::Read(Shape::Trickle), "trickling log", 16),
    (Kind::Read(Shape::Bulk), "bulk log", 6),
    (Kind::Read(Shape::ShortCut), "short log that its executor cuts", 2),
    (Kind::Read(Shape::BulkCut), "bulk log that its executor cuts", 2),
    (Kind::Read(Shape::Mute), "executor that closes without a word", 2),
    (Kind::Read(Shape::Waiting), "build that waits", 4),
    (Kind::Slow, "client that reads slowly", 2),
    (Kind::Stall, "client that stops reading", 1),
    (Kind::Reset, "client that resets", 6),
    (Kind::Close, "client that leaves", 6),
    (Kind::Unknown, "unknown build", 10),
    (Kind::Garbage, "garbage", 6),
    (Kind::Silent, "silent client", 2),
    (Kind::Look, "health checker", 6),
];

/// A connection that can be reset whatever is on top of it.
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
        // One that has failed already needs none.
        let _ = SockRef::from(&self.socket).set_linger(Some(Duration::ZERO));
    }
}

/// Clients, one request after the other each, until they are told to stop.
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
            lab.journal.violation(format!("{name}: hangs for {HANG:?}: {}", client.describe()));
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
    /// Of the log, compared.
    bytes: u64,
    /// What came and is no log.
    text: Vec<u8>,
    /// How it ended, for whoever looks into a violation.
    end: String,
}

/// How reading ended.
enum Read {
    Clean,
    Cut(io::Error),
    /// This client had enough.
    Enough,
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
            Kind::Reset | Kind::Close => {
                Some(if rng.bool() { Shape::Bulk } else { Shape::Trickle })
            }
            Kind::Unknown | Kind::Garbage | Kind::Silent | Kind::Look => None,
        };
        Self {
            lab,
            kind,
            name,
            // Half of them from outside, the others anywhere.
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

    /// Goes through with it and writes down what came of it.
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

    /// Everything but the judgement.
    async fn converse(&mut self) -> io::Result<Read> {
        let address = self.lab.address(self.entry);
        let address = if self.tls { address.tls } else { address.plain };
        let narrow = matches!(self.kind, Kind::Slow | Kind::Stall);
        // Silence begins before the handshake.
        let tls = self.tls && !matches!(self.kind, Kind::Silent);
        let mut wire = Wire::connect(self.lab, address, tls, narrow).await?;
        let line = match self.kind {
            Kind::Look => return Ok(Read::Enough),
            Kind::Silent => String::new(),
            Kind::Garbage => self.garbage(),
            Kind::Unknown => format!("{:032x}\n", self.rng.u128(..)),
            _ => format!("{}\r\n", self.build.as_ref().expect("it has one").id),
        };
        wire.stream.write_all(line.as_bytes()).await?;
        wire.stream.flush().await?;
        let read = self.read(&mut wire).await;
        if matches!((self.kind, &read), (Kind::Reset, Read::Enough)) {
            wire.reset();
        }
        Ok(read)
    }

    fn garbage(&mut self) -> String {
        let letters = self.rng.usize(1..2000);
        let mut text: String = (0..letters).map(|_| self.rng.char('\u{0}'..'\u{2ff}')).collect();
        text.retain(|letter| letter != '\n');
        // Never a build, by any accident.
        format!("!{text}\n")
    }

    /// Reads on, comparing, until there is an end or enough.
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
                let wrong = format!("not what was sent, at byte {at}: {}", self.describe());
                self.lab.journal.violation(wrong);
                return Read::Enough;
            }
            if self.bytes >= enough {
                return Read::Enough;
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
            Read::Enough => "enough".to_owned(),
        };
        let log = self.build.as_ref().and_then(|build| Log::of(&build.id));
        match (read, log) {
            (Read::Enough, _) => Outcome::Left,
            (Read::Clean, _) if !self.text.is_empty() => {
                if self.is_due() {
                    Outcome::AsDue
                } else if !self.is_a_line_of_ours() {
                    let wrong = format!("neither log nor reply: {}", self.describe());
                    self.lab.journal.violation(wrong);
                    Outcome::Refused
                } else {
                    Outcome::Refused
                }
            }
            (Read::Clean, Some(log)) if self.bytes > 0 => {
                if log.end == End::Whole && self.bytes == u64::from(log.length) {
                    return Outcome::Whole;
                }
                if self.tls {
                    // Nobody can make a close_notify but the gateway itself.
                    let wrong = format!("a log that is not whole ended so: {}", self.describe());
                    self.lab.journal.violation(wrong);
                }
                Outcome::EndedShort
            }
            (Read::Cut(_), Some(_)) if self.bytes > 0 => Outcome::Cut,
            // The reply, and then the reset that a client gets who sends more than is read.
            (Read::Cut(_), None) if self.is_due() => Outcome::AsDue,
            _ if self.is_due() => Outcome::AsDue,
            _ => Outcome::Nothing,
        }
    }

    fn is_a_line_of_ours(&self) -> bool {
        std::str::from_utf8(&self.text).is_ok_and(|text| {
            text == NOT_FOUND
                || text == NOT_STARTED
                || (text.starts_with(FAULT) && text.ends_with("\r\n") && text.lines().count() == 1)
        })
    }

    /// Whether this client got what it has to get when nothing is broken, a log aside.
    fn is_due(&self) -> bool {
        let text = std::str::from_utf8(&self.text).unwrap_or("?");
        match self.kind {
            Kind::Unknown => text == NOT_FOUND,
            Kind::Garbage => text == NOT_FOUND || text == TOO_LONG || text.is_empty(),
            // There is no word before a handshake.
            Kind::Silent => text == if self.tls { "" } else { NO_REQUEST },
            Kind::Read(Shape::Waiting) => text == NOT_STARTED,
            Kind::Read(Shape::Mute | Shape::ShortCut | Shape::BulkCut) => text.starts_with(FAULT),
            _ => false,
        }
    }

    /// Whether it could have come to this with nothing broken.
    fn expects(&self, outcome: Outcome) -> bool {
        match self.kind {
            Kind::Read(Shape::ShortCut | Shape::BulkCut) => {
                matches!(outcome, Outcome::Cut | Outcome::AsDue)
            }
            Kind::Read(Shape::Mute | Shape::Waiting)
            | Kind::Unknown
            | Kind::Garbage
            | Kind::Silent => outcome == Outcome::AsDue,
            Kind::Read(Shape::Short | Shape::Trickle | Shape::Bulk) | Kind::Slow => {
                outcome == Outcome::Whole
            }
            Kind::Stall => matches!(outcome, Outcome::Whole | Outcome::Cut),
            Kind::Reset | Kind::Close | Kind::Look => outcome == Outcome::Left,
        }
    }
}
