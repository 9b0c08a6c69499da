//! The command socket: Zuul's (`zuul/lib/commandsocket.py`), with commands that reply.
//!
//! Only root and the user of the process may connect. Still every request has a deadline and a
//! length limit.

pub(crate) mod protocol;
pub(crate) mod socket_file;
pub(crate) mod status;
pub(crate) mod text;

use std::convert::Infallible;
use std::future::pending;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream as StdStream;
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

use self::protocol::{ErrorReport, REQUEST_MAX, ReloadReport, Reply, ReplyStatus, Request};
use self::status::StatusSource;
use crate::gateway::RouteExplainer;
use crate::gateway::routing::explain::BuildState;
use crate::model::build_id::BuildId;

/// The most connections that are served concurrently. More wait in the kernel.
const MAX_CONNECTIONS: usize = 8;

/// The time limit of reading a request, and that of writing a reply.
const IO_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a reply waits for a reload, which may wait for another reload and for slow disks. The
/// reload itself has no time limit.
const RELOAD_TIMEOUT: Duration = Duration::from_secs(20);

/// How long a client waits for a reply: longer than any reply takes.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(30);

/// The pause after a failed accept.
const ACCEPT_RETRY: Duration = Duration::from_secs(1);

/// The result of a reload, or why nothing was reloaded.
pub(crate) type ReloadResult = Result<ReloadReport, String>;

/// A request for a reload: where its result is sent to.
pub(crate) type ReloadRequest = oneshot::Sender<ReloadResult>;

/// Carries out commands.
pub(crate) struct CommandHandler {
    pub(crate) status: Arc<StatusSource>,
    /// Cancelled by the command `stop`.
    pub(crate) stop: CancellationToken,
    pub(crate) reload: mpsc::Sender<ReloadRequest>,
    pub(crate) routes: RouteExplainer,
}

/// Serves commands from `listener`; never returns.
pub(crate) async fn serve(listener: Arc<UnixListener>, handler: Arc<CommandHandler>) -> Infallible {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        // Fails only if the semaphore is closed, and nothing closes it.
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else {
            return pending().await;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let handler = Arc::clone(&handler);
                tokio::spawn(async move {
                    let _permit = permit;
                    if let Err(error) = handler.serve(stream).await {
                        debug!(%error, "command connection failed");
                    }
                });
            }
            Err(error) => {
                debug!(%error, "cannot accept a command connection");
                sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

impl CommandHandler {
    /// Serves one connection.
    async fn serve(&self, mut stream: UnixStream) -> io::Result<()> {
        let mut line = Vec::new();
        let mut request = BufReader::new((&mut stream).take(REQUEST_MAX));
        timeout(IO_TIMEOUT, request.read_until(b'\n', &mut line)).await??;
        let reply = match Request::parse(&line) {
            Ok(Request::Stop) => {
                info!("stop requested over the command socket");
                self.stop.cancel();
                return Ok(());
            }
            Ok(Request::Reload) => self.reload().await,
            Ok(Request::Status) => {
                let content = self.status.report();
                Reply { status: ReplyStatus::Ok, content }.to_line()
            }
            Ok(Request::Resolve(build)) => self.resolve(&build).await,
            Err(error) => {
                debug!(error, "invalid request on the command socket");
                let content = ErrorReport { error };
                Reply { status: ReplyStatus::InvalidRequest, content }.to_line()
            }
        };
        timeout(IO_TIMEOUT, stream.write_all(reply.as_bytes())).await?
    }

    async fn reload(&self) -> String {
        let (result_sender, result) = oneshot::channel();
        let reload = async {
            self.reload.send(result_sender).await.ok()?;
            result.await.ok()
        };
        let result = match timeout(RELOAD_TIMEOUT, reload).await {
            Ok(Some(result)) => result,
            Ok(None) => Err("not reloaded: the gateway is stopping".to_owned()),
            Err(_) => {
                Err(format!("no result of the reload within {RELOAD_TIMEOUT:?}; see the log"))
            }
        };
        match result {
            Ok(content) => Reply { status: ReplyStatus::Ok, content }.to_line(),
            Err(error) => {
                let content = ErrorReport { error };
                Reply { status: ReplyStatus::Failed, content }.to_line()
            }
        }
    }

    async fn resolve(&self, build: &BuildId) -> String {
        let content = self.routes.explain(build).await;
        let status = match content.state {
            BuildState::Running => ReplyStatus::Ok,
            BuildState::Queued | BuildState::Unknown => ReplyStatus::NotFound,
            BuildState::Error => ReplyStatus::Failed,
        };
        Reply { status, content }.to_line()
    }
}

/// Sends `request` to the gateway that listens on the command socket at `path`, and returns the
/// reply.
///
/// # Errors
/// No gateway listens there, or it does not reply in time.
pub(crate) fn send(path: &Path, request: &Request) -> Result<String> {
    let mut stream = StdStream::connect(path).map_err(|error| {
        let path = path.display();
        match error.kind() {
            ErrorKind::NotFound | ErrorKind::ConnectionRefused => anyhow!(
                "{path}: no gateway answers on this command socket: no gateway runs with this \
                 configuration, or it could not create the socket (its log has a warning), or the \
                 path was changed after its start (it keeps the old one until a restart; SIGTERM \
                 and SIGHUP always work)"
            ),
            ErrorKind::PermissionDenied => {
                anyhow!("{path}: only root and the user that the gateway runs as may send commands")
            }
            _ => anyhow!("{path}: {error}"),
        }
    })?;
    let mut reply = String::new();
    let sent = stream
        .set_read_timeout(Some(CLIENT_TIMEOUT))
        .and_then(|()| stream.set_write_timeout(Some(CLIENT_TIMEOUT)))
        .and_then(|()| stream.write_all(format!("{request}\n").as_bytes()))
        .and_then(|()| stream.read_to_string(&mut reply));
    sent.with_context(|| format!("{}: no reply to {request}", path.display()))?;
    Ok(reply)
}
