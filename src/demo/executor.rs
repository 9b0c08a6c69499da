//! The log streamer of an executor, with the texts, chunk size and poll interval of
//! `zuul/lib/log_streamer.py`. Like it, this treats a client that closed its sending side as gone.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};
use tracing::debug;

/// The size of a read from the log, in bytes.
const CHUNK: usize = 4096;

/// The interval of polls for more.
const PAUSE: Duration = Duration::from_millis(500);

/// The time limit and the length limit of a request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
const REQUEST_MAX: usize = 1024;

const FAILURE: &str = "Internal streaming error";

/// Returns the path of the log of `build` on an executor.
pub(crate) fn log_of(builds: &Path, build: &str) -> PathBuf {
    builds.join(build).join("work/logs/job-output.txt")
}

/// Serves the logs below `builds` forever.
pub(crate) async fn serve(listener: TcpListener, builds: PathBuf) {
    loop {
        match listener.accept().await {
            Ok((client, _)) => {
                let builds = builds.clone();
                tokio::spawn(async move {
                    if let Err(error) = answer(client, &builds).await {
                        debug!(%error, "executor: a stream failed");
                    }
                });
            }
            Err(error) => {
                debug!(%error, "executor: cannot accept a connection");
                sleep(PAUSE).await;
            }
        }
    }
}

async fn answer(mut client: TcpStream, builds: &Path) -> io::Result<()> {
    let Ok(Ok(build)) = timeout(REQUEST_TIMEOUT, read_request(&mut client)).await else {
        return client.write_all(FAILURE.as_bytes()).await;
    };
    let text = if build.is_empty() || !build.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        format!("Build ID {build} is not valid")
    } else if !builds.join(&build).exists() {
        format!("Build ID {build} not found")
    } else {
        let path = log_of(builds, &build);
        match File::open(&path).await {
            Ok(log) => return stream(client, log, &path).await,
            Err(_) => format!("Log not found for build ID {build}"),
        }
    };
    client.write_all(text.as_bytes()).await
}

/// Reads one line, and strips its end.
async fn read_request(client: &mut TcpStream) -> io::Result<String> {
    let mut request = Vec::new();
    while request.len() < REQUEST_MAX {
        match client.read_u8().await? {
            b'\n' if !request.is_empty() => {
                let text = String::from_utf8(request).map_err(|_| ErrorKind::InvalidData)?;
                return Ok(text.trim_end().to_owned());
            }
            byte => request.push(byte),
        }
    }
    Err(ErrorKind::InvalidData.into())
}

/// Sends the log from its beginning and follows it, until the file is removed or the client has
/// left.
async fn stream(mut client: TcpStream, mut log: File, path: &Path) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    loop {
        loop {
            let count = log.read(&mut chunk).await?;
            if count == 0 {
                break;
            }
            client.write_all(&chunk[..count]).await?;
        }
        if !path.exists() {
            return Ok(());
        }
        sleep(PAUSE).await;
        match client.try_read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}
