//! Prometheus and promtool of Debian's package `prometheus`: on PATH, or unpacked by `tests/run`.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

use super::checkout::installed;
use super::within;

fn program(name: &str) -> PathBuf {
    let unpacked = installed("prometheus/usr/bin").join(name);
    if unpacked.exists() { unpacked } else { PathBuf::from(name) }
}

/// Runs promtool with `arguments` in `directory`; it must succeed.
pub(crate) async fn promtool(directory: &Path, arguments: &[&str]) {
    let mut command = Command::new(program("promtool"));
    command.args(arguments).current_dir(directory).kill_on_drop(true).stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let promtool = command.spawn().expect("promtool (tests/run unpacks it)");
    let output = within("promtool", promtool.wait_with_output()).await.expect("its output");
    let Output { status, stdout, stderr } = &output;
    let printed = [stdout, stderr].map(|text| String::from_utf8_lossy(text));
    assert!(status.success(), "promtool {arguments:?}:\n{}", printed.concat());
}

/// A Prometheus server, killed when this is dropped.
pub(crate) struct Prometheus {
    _child: Child,
    _data: TempDir,
    address: SocketAddr,
}

impl Prometheus {
    /// Starts it with this configuration file and waits until it is ready.
    pub(crate) async fn start(config: &Path) -> Self {
        let data = TempDir::new().expect("a directory for Prometheus");
        let mut command = Command::new(program("prometheus"));
        command.arg("--web.listen-address=127.0.0.1:0").kill_on_drop(true).stdin(Stdio::null());
        command.arg(format!("--config.file={}", config.display()));
        command.arg(format!("--storage.tsdb.path={}", data.path().display()));
        let child = command.stderr(Stdio::piped()).spawn();
        let mut child = child.expect("prometheus (tests/run unpacks it)");
        let mut lines = BufReader::new(child.stderr.take().expect("stderr is piped")).lines();
        let mut log = Vec::new();
        let ready = within("Prometheus to be ready", async {
            let mut address = None;
            while let Some(line) = lines.next_line().await.expect("its log") {
                if line.contains("msg=\"Listening on\"") {
                    let (_, word) = line.rsplit_once("address=").expect("an address");
                    address = Some(word.parse().expect("an address"));
                }
                if line.contains("Server is ready to receive web requests") {
                    return address;
                }
                log.push(line);
            }
            None
        });
        let address = ready.await;
        // Read on, because a full pipe would block it.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        let address = address.unwrap_or_else(|| panic!("Prometheus:\n{}", log.join("\n")));
        Self { _child: child, _data: data, address }
    }

    /// Evaluates `expression` now and returns the resulting series.
    pub(crate) async fn query(&self, expression: &str) -> Vec<Value> {
        let mut query = String::new();
        for byte in expression.bytes() {
            query.push_str(&format!("%{byte:02X}"));
        }
        let request = format!("GET /api/v1/query?query={query} HTTP/1.0\r\n\r\n");
        let answer = within("Prometheus to answer", async {
            let mut stream = TcpStream::connect(self.address).await?;
            stream.write_all(request.as_bytes()).await?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await?;
            std::io::Result::Ok(answer)
        });
        let answer = answer.await.expect("an HTTP answer");
        let (_, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
        let mut answer: Value = serde_json::from_str(body).expect(body);
        assert_eq!(answer["status"], "success", "{expression}: {body}");
        match answer["data"]["result"].take() {
            Value::Array(series) => series,
            other => panic!("{expression}: {other}"),
        }
    }
}
