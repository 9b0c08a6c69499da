//! The command socket: upstream's (`zuul/lib/commandsocket.py`), whose one command is `stop`, with
//! commands that answer.
//!
//! A connection carries one request, `name[ json-array]` and a newline. Only the owner of the
//! process and root may connect. Still everything a connection can take is bounded.

pub(crate) mod socket_file;
pub(crate) mod status;

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use self::status::StatusSource;
use crate::gateway::routing::explain::Decider;
use crate::model::build_request::BuildId;

/// The longest request, its newline included.
const REQUEST_MAX: u64 = 1024;

/// Connections at once. More wait in the kernel, as all but one do with upstream's.
const CONNECTIONS: usize = 8;

/// For a request, and for its answer to be taken.
const PATIENCE: Duration = Duration::from_secs(5);

/// For a reload, which may wait for another one and for slow disks. It goes on all the same.
const RELOAD_PATIENCE: Duration = Duration::from_secs(20);

/// What a client waits for an answer: longer than any that comes.
const CLIENT_PATIENCE: Duration = Duration::from_secs(30);

/// Between two accepts when the last one failed.
const PAUSE: Duration = Duration::from_secs(1);

/// What can be asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// As SIGTERM does. No answer.
    Stop,
    /// As SIGHUP does. The answer begins with [`RELOADED`] if it was done.
    Reload,
    /// How things stand.
    Status { json: bool },
    /// Which way a build's log would take.
    Resolve { build: BuildId, json: bool },
}

/// How the answer to a reload begins that was done.
pub(crate) const RELOADED: &str = "reloaded ";

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stop => f.write_str("stop"),
            Self::Reload => f.write_str("reload"),
            Self::Status { json: false } => f.write_str("status"),
            Self::Status { json: true } => f.write_str("status [\"json\"]"),
            Self::Resolve { build, json: false } => write!(f, "resolve [\"{build}\"]"),
            Self::Resolve { build, json: true } => write!(f, "resolve [\"{build}\", \"json\"]"),
        }
    }
}

impl Request {
    /// Reads a line. What is wrong with it is said in one line.
    pub(crate) fn parse(line: &[u8]) -> Result<Self, String> {
        let Some(line) = line.strip_suffix(b"\n") else {
            return Err(format!("a request is one line of at most {REQUEST_MAX} bytes"));
        };
        let line = str::from_utf8(line).map_err(|_| "a request is UTF-8 text".to_owned())?.trim();
        let (name, arguments) = line.split_once(' ').unwrap_or((line, "[]"));
        let arguments: Vec<String> = serde_json::from_str(arguments).map_err(|_| {
            "behind the command comes a JSON list of strings, or nothing".to_owned()
        })?;
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        match (name, arguments.as_slice()) {
            ("stop", []) => Ok(Self::Stop),
            ("reload", []) => Ok(Self::Reload),
            ("status", []) => Ok(Self::Status { json: false }),
            ("status", ["json"]) => Ok(Self::Status { json: true }),
            ("resolve", [build] | [build, "json"]) => {
                let build = BuildId::new(build).ok_or("resolve: not the UUID of a build")?;
                Ok(Self::Resolve { build, json: arguments.len() > 1 })
            }
            ("stop" | "reload" | "status" | "resolve", _) => {
                Err(format!("{name}: arguments it does not know"))
            }
            _ => Err("unknown command; known are stop, reload, status, status [\"json\"], \
                     resolve [\"UUID\"] and resolve [\"UUID\", \"json\"]"
                .to_owned()),
        }
    }
}

/// A reload that somebody asks for: who is told, in lines, how it went.
pub(crate) type Reload = oneshot::Sender<String>;

/// What can be asked of the gateway.
pub(crate) struct CommandHandler {
    pub(crate) sources: Arc<StatusSource>,
    /// Cancelled when it is told to stop.
    pub(crate) stop: CancellationToken,
    pub(crate) reload: mpsc::Sender<Reload>,
    pub(crate) decider: Decider,
}

/// Answers requests for as long as the process runs.
///
/// # Errors
/// The listener cannot be handed to the runtime.
pub(crate) fn spawn(listener: StdListener, gateway: CommandHandler) -> Result<()> {
    let listener = UnixListener::from_std(listener).context("the command socket")?;
    let gateway = Arc::new(gateway);
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    tokio::spawn(async move {
        while let Ok(place) = Arc::clone(&places).acquire_owned().await {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let gateway = Arc::clone(&gateway);
                    tokio::spawn(async move {
                        let _place = place;
                        if let Err(error) = gateway.answer(stream).await {
                            debug!(%error, "command not answered");
                        }
                    });
                }
                Err(error) => {
                    debug!(%error, "no connection to the command socket");
                    sleep(PAUSE).await;
                }
            }
        }
    });
    Ok(())
}

impl CommandHandler {
    async fn answer(&self, mut stream: UnixStream) -> io::Result<()> {
        let mut line = Vec::new();
        let mut bytes = BufReader::new((&mut stream).take(REQUEST_MAX));
        timeout(PATIENCE, bytes.read_until(b'\n', &mut line)).await??;
        let reply = match Request::parse(&line) {
            Ok(Request::Stop) => {
                info!("told to stop by the command socket");
                self.stop.cancel();
                return Ok(());
            }
            Ok(Request::Reload) => self.reloaded().await,
            Ok(Request::Status { json: true }) => self.sources.now().json(),
            Ok(Request::Status { json: false }) => self.sources.now().text(),
            Ok(Request::Resolve { build, json }) => {
                let decision = self.decider.decide(&build).await;
                if json { decision.json() } else { decision.text() }
            }
            Err(fault) => {
                debug!(fault, "not a command");
                format!("{fault}\n")
            }
        };
        timeout(PATIENCE, stream.write_all(reply.as_bytes())).await?
    }

    /// Has a reload done and says how that went.
    async fn reloaded(&self) -> String {
        let (done, outcome) = oneshot::channel();
        let asked = async {
            self.reload.send(done).await.ok()?;
            outcome.await.ok()
        };
        match timeout(RELOAD_PATIENCE, asked).await {
            Ok(Some(outcome)) => outcome,
            Ok(None) => "not reloaded: the gateway is stopping\n".to_owned(),
            Err(_) => format!("not reloaded within {RELOAD_PATIENCE:?}; its log will tell more\n"),
        }
    }
}

/// Sends `request` to the gateway that listens at `path`, and returns what it answers.
///
/// # Errors
/// Nobody listens, or does not answer.
pub(crate) fn ask(path: &Path, request: &Request) -> Result<String> {
    let place = path.display();
    let mut stream = StdStream::connect(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
            anyhow!(
                "{place}: no gateway answers: none runs with this configuration, or it could not \
                 create this socket (its log has a warning then)"
            )
        }
        ErrorKind::PermissionDenied => {
            anyhow!("{place}: only root and the gateway's own user may command it")
        }
        _ => anyhow!("{place}: {error}"),
    })?;
    let mut reply = String::new();
    let asked = stream
        .set_read_timeout(Some(CLIENT_PATIENCE))
        .and_then(|()| stream.set_write_timeout(Some(CLIENT_PATIENCE)))
        .and_then(|()| stream.write_all(format!("{request}\n").as_bytes()))
        .and_then(|()| stream.read_to_string(&mut reply));
    asked.with_context(|| format!("{place}: no answer to {request}"))?;
    Ok(reply)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn requests() {
        let resolve =
            |json| Request::Resolve { build: BuildId::new("ab").expect("a build id"), json };
        let good: [(&[u8], _); 9] = [
            (b"resolve [\"ab\"]\n", resolve(false)),
            (b"resolve [\"ab\", \"json\"]\n", resolve(true)),
            (b"stop\n", Request::Stop),
            (b"stop\r\n", Request::Stop),
            (b"stop []\n", Request::Stop),
            (b"reload\n", Request::Reload),
            (b"status\n", Request::Status { json: false }),
            (b"status [\"json\"]\n", Request::Status { json: true }),
            (b" status  [ \"json\" ] \n", Request::Status { json: true }),
        ];
        for (line, request) in good {
            assert_eq!(Request::parse(line), Ok(request), "{}", line.escape_ascii());
        }
        let bad: [&[u8]; 15] = [
            b"resolve\n",
            b"resolve [\"x\"]\n",
            b"resolve [\"ab\", \"text\"]\n",
            b"",
            b"\n",
            b"stop",
            b"stopp\n",
            b"STOP\n",
            b"_stop\n",
            b"stop [1]\n",
            b"stop [\"x\"]\n",
            b"stop x\n",
            b"reload [\"x\"]\n",
            b"status {}\n",
            b"\xff\n",
        ];
        for line in bad {
            assert!(Request::parse(line).is_err(), "{}", line.escape_ascii());
        }
    }

    #[test]
    fn what_is_sent_is_understood() {
        let statuses = [false, true].map(|json| Request::Status { json });
        let build = BuildId::new("ab").expect("a build id");
        let resolves = [false, true].map(|json| Request::Resolve { build: build.clone(), json });
        let others = [Request::Stop, Request::Reload];
        for request in statuses.into_iter().chain(resolves).chain(others) {
            assert_eq!(Request::parse(format!("{request}\n").as_bytes()), Ok(request));
        }
    }

    proptest! {
        /// Whatever comes, the answer is one line and repeats nothing that was sent.
        #[test]
        fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Err(fault) = Request::parse(&bytes) {
                prop_assert!(!fault.is_empty() && !fault.contains('\n'));
            }
        }
    }
}
