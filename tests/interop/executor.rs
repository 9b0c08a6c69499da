//! A scheduler and an executor built of Zuul's own classes (`executor.py`), and the logs of their
//! builds.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::script::Script;
use crate::support::client::{Client, Ending};
use crate::support::system::System;
use crate::zuul_conf::ZuulConf;

pub(crate) struct Executor {
    script: Script,
    jobs: TempDir,
    port: u16,
}

impl Executor {
    /// Starts an executor of `zone` with its log streamer.
    pub(crate) async fn start(system: &System, zone: Option<&str>) -> Self {
        let conf = ZuulConf::new(system, "");
        let jobs = TempDir::new().expect("a directory for jobs");
        let args = [conf.path(), jobs.path()].into_iter().chain(zone.map(Path::new));
        let mut script = Script::start("executor.py", args);
        let port = script.next().await["port"].as_u64().expect("a port");
        Self { script, jobs, port: u16::try_from(port).expect("a port") }
    }

    /// The worker of build requests, as gateways connect to it.
    pub(crate) fn route(&self) -> String {
        format!("executor 127.0.0.1:{}", self.port)
    }

    /// The scheduler requests a build, in a zone's queue or the one without a zone. Returns the IDs
    /// of its trace, of its span, and of the span of the event that caused it.
    pub(crate) async fn submit(&mut self, build: &str, queue: Option<&str>) -> Value {
        self.script.ask(&format!("submit {build} {}", queue.unwrap_or_default())).await
    }

    /// Sets whether the traces of builds requested from now on are sampled.
    #[cfg(feature = "otlp")]
    pub(crate) async fn sampled(&mut self, wanted: bool) {
        let wanted = if wanted { "yes" } else { "no" };
        self.script.ask(&format!("sampled {wanted}")).await;
    }

    /// The executor accepts a build. Its log should exist before, as with the real one.
    pub(crate) async fn take(&mut self, build: &str) {
        self.script.ask(&format!("start {build}")).await;
    }

    pub(crate) async fn pause(&mut self, build: &str) {
        self.script.ask(&format!("pause {build}")).await;
    }

    pub(crate) async fn complete(&mut self, build: &str) {
        self.script.ask(&format!("complete {build}")).await;
    }

    /// The scheduler removes a build's request.
    pub(crate) async fn remove(&mut self, build: &str) {
        self.script.ask(&format!("remove {build}")).await;
    }

    /// Waits until the executor has logged `text`, and returns the whole log.
    pub(crate) async fn logs(&self, text: &str) -> String {
        self.script.logs(text).await
    }

    /// Kills the executor; its builds' requests stay.
    pub(crate) async fn kill(self) {
        self.script.kill().await;
    }

    /// Creates a build that runs here, requested in `queue`, with an empty log.
    pub(crate) async fn run(&mut self, queue: Option<&str>) -> (String, Log) {
        let build = new_build();
        let log = self.log(&build);
        self.submit(&build, queue).await;
        self.take(&build).await;
        (build, log)
    }

    /// Creates a job's directory with an empty log.
    pub(crate) fn log(&self, build: &str) -> Log {
        let directory = self.job(build).join("work/logs");
        fs::create_dir_all(&directory).expect("the job's directory");
        let path = directory.join("job-output.txt");
        let file = File::create(&path).expect("the log");
        Log { path, file }
    }

    /// Returns the executor's directory for a build.
    pub(crate) fn job(&self, build: &str) -> PathBuf {
        self.jobs.path().join(build)
    }
}

/// Returns a UUID in Zuul's format.
pub(crate) fn new_build() -> String {
    format!("{:032x}", fastrand::u128(..))
}

/// The log of a running build. Its stream ends when the log is removed.
pub(crate) struct Log {
    path: PathBuf,
    file: File,
}

impl Log {
    pub(crate) fn write(&mut self, bytes: &[u8]) {
        self.file.write_all(bytes).expect("the log takes it");
    }

    pub(crate) fn remove(self) {
        fs::remove_file(&self.path).expect("a log to remove");
    }

    /// Writes each piece after the previous one has arrived at the client completely; then removes
    /// the log, and returns how the stream ended.
    pub(crate) async fn grow<S>(mut self, pieces: &[Vec<u8>], client: &mut Client<S>) -> Ending
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        for piece in pieces {
            self.write(piece);
            client.expect(piece).await;
        }
        self.remove();
        let (after, ending) = client.rest().await;
        assert_eq!(after, b"", "after the end of the log");
        ending
    }
}

/// Contents of logs: lines, partial lines, colours, a character in two halves, every byte value,
/// sizes around those of all buffers.
pub(crate) fn pieces() -> Vec<Vec<u8>> {
    let (first, second) = "€".as_bytes().split_at(1);
    let mut pieces = vec![
        b"2026-01-02 03:04:05.678901 | Job console starting\n".to_vec(),
        [b"half a line, half a character: ", first].concat(),
        [second, b" \x1b[31mred\x1b[0m\r\n"].concat(),
        (0..=255).collect(),
    ];
    pieces.extend(
        [1023, 1024, 1025, 4097, 50_000].map(|size| {
            (0..size).map(|i: u32| u8::try_from(i % 251).expect("below 251")).collect()
        }),
    );
    pieces
}
