//! zuul-web's own handler, stream manager and streamer as the client: browsers get every byte when
//! it is written.
//!
//! zuul-web waits in poll(2) and then reads 1024 bytes once. Data that its TLS library has read
//! from the socket beyond that becomes visible only when more arrives, and a readable socket
//! without log data blocks all consoles.

use std::collections::HashMap;

use serde_json::{Value, json};

use crate::executor::{Executor, new_build};
use crate::script::Script;
use crate::support::executor;
use crate::support::gateway::{Builder, Gateway};
use crate::support::system::System;
use crate::zuul_conf::ZuulConf;

/// A zuul-web and its browsers, run by `web.py`.
struct Web {
    script: Script,
    /// Text that each build's browser has been sent and the test has not read yet.
    texts: HashMap<String, String>,
    closed: HashMap<String, String>,
}

impl Web {
    /// Starts zuul-web without a zone, with the certificates of its `zuul.conf`.
    async fn start(system: &System) -> Self {
        let identity = system.zookeeper.authority.identity("web");
        let conf = ZuulConf::new(system, &format!("[fingergw]\n{}", identity.zuul_conf()));
        let mut script = Script::start("web.py", [conf.path()]);
        assert_eq!(script.next().await["manager"], "running");
        Self { script, texts: HashMap::new(), closed: HashMap::new() }
    }

    /// A browser opens a build's console.
    async fn open(&mut self, build: &str) {
        self.script.ask(&format!("open {build}")).await;
    }

    /// The browser disconnects.
    async fn leave(&mut self, build: &str) {
        self.script.ask(&format!("leave {build}")).await;
    }

    /// Returns the state of the stream manager.
    async fn manager(&mut self) -> Value {
        self.script.ask("manager").await
    }

    /// Waits until a browser has been sent exactly `text`.
    async fn shows(&mut self, build: &str, text: &str) {
        while self.texts.get(build).map_or(0, String::len) < text.len() {
            assert_eq!(self.closed.get(build), None, "more text than expected");
            self.receive().await;
        }
        assert_eq!(self.texts.remove(build).as_deref(), Some(text));
    }

    /// Waits until zuul-web has closed a browser's console, and returns the text sent last and the
    /// close message.
    async fn closes(&mut self, build: &str) -> (String, String) {
        while !self.closed.contains_key(build) {
            self.receive().await;
        }
        let text = self.texts.remove(build).unwrap_or_default();
        (text, self.closed.remove(build).unwrap_or_default())
    }

    async fn receive(&mut self) {
        let message = self.script.next().await;
        let build = message["build"].as_str().expect("a build").to_owned();
        if let Some(text) = message["text"].as_str() {
            self.texts.entry(build).or_default().push_str(text);
        } else {
            self.closed.insert(build, format!("{} {}", message["closed"], message["reason"]));
        }
    }
}

/// zuul-web's close message for a log that has ended cleanly.
const NO_MORE: &str = r#"1000 "No more data""#;

/// A zone west with one executor and one gateway, and a zuul-web outside of it.
struct Site {
    system: System,
    gateway: Gateway,
    executor: Executor,
    web: Web,
}

impl Site {
    /// With a plain gateway, or with the TLS settings that zuul-web needs.
    async fn start(tls: bool) -> Self {
        let system = System::new().await;
        let mut gateway = Builder::new(&system).zone("west");
        if tls {
            let identity = system.zookeeper.authority.identity("gateway");
            gateway = gateway.tls(&identity).listeners(&["tls = true"]);
        }
        let gateway = gateway.ready().await;
        let executor = Executor::start(&system, Some("west")).await;
        let web = Web::start(&system).await;
        Self { system, gateway, executor, web }
    }
}

/// Sizes around the size of zuul-web's reads, of TLS records and of the streamer's reads, each
/// written in one piece.
fn pieces() -> impl Iterator<Item = String> {
    [1, 1023, 1024, 1025, 2048, 4096, 10_000, 16_384, 16_385, 70_000].into_iter().map(|size| {
        let text: String = (0..).map(|i| char::from(b'a' + (i % 26) as u8)).take(size).collect();
        // A three-byte character at the end crosses every boundary.
        text + "€"
    })
}

async fn every_byte_when_it_is_written(tls: bool) {
    let Site { mut gateway, mut executor, mut web, .. } = Site::start(tls).await;
    let (build, mut log) = executor.run(Some("west")).await;

    web.open(&build).await;
    for piece in pieces() {
        log.write(piece.as_bytes());
        web.shows(&build, &piece).await;
    }
    log.remove();
    assert_eq!(web.closes(&build).await, (String::new(), NO_MORE.to_owned()));
    gateway.logged("the stream's end", |line| line.contains("end=finished")).await;
}

#[tokio::test]
async fn log_is_shown_while_it_is_written_plain() {
    every_byte_when_it_is_written(false).await;
}

#[tokio::test]
async fn log_is_shown_while_it_is_written_tls() {
    every_byte_when_it_is_written(true).await;
}

/// A console without output does not block the others.
#[tokio::test]
async fn idle_builds_beside_busy_ones_are_shown_tls() {
    let Site { gateway: _gateway, mut executor, mut web, .. } = Site::start(true).await;
    let (silent, mut late) = executor.run(Some("west")).await;
    let (busy, mut log) = executor.run(Some("west")).await;

    web.open(&silent).await;
    web.open(&busy).await;
    for line in ["one\n", "two\n"] {
        log.write(line.as_bytes());
        web.shows(&busy, line).await;
    }
    late.write(b"at last\n");
    web.shows(&silent, "at last\n").await;
}

/// When a browser disconnects, zuul-web closes its connection without close_notify. The kernel
/// reports that only after the thread of zuul-web that still polls that connection has been woken:
/// here by another console.
#[tokio::test]
async fn browser_that_leaves_an_idle_build_ends_its_stream_tls() {
    let Site { mut gateway, mut executor, mut web, .. } = Site::start(true).await;
    let (build, mut log) = executor.run(Some("west")).await;
    let (other, _other_log) = executor.run(Some("west")).await;

    web.open(&build).await;
    log.write(b"a line\n");
    web.shows(&build, "a line\n").await;
    web.leave(&build).await;
    web.open(&other).await;
    leaves(&mut gateway).await;
}

/// Or by the next line of the log, which is not read: the connection is reset.
async fn a_browser_that_leaves_a_busy_build(tls: bool) {
    let Site { mut gateway, mut executor, mut web, .. } = Site::start(tls).await;
    let (build, mut log) = executor.run(Some("west")).await;

    web.open(&build).await;
    log.write(b"a line\n");
    web.shows(&build, "a line\n").await;
    web.leave(&build).await;
    log.write(b"another\n");
    leaves(&mut gateway).await;
}

#[tokio::test]
async fn browser_that_leaves_a_busy_build_ends_its_stream_plain() {
    a_browser_that_leaves_a_busy_build(false).await;
}

#[tokio::test]
async fn browser_that_leaves_a_busy_build_ends_its_stream_tls() {
    a_browser_that_leaves_a_busy_build(true).await;
}

async fn leaves(gateway: &mut Gateway) {
    let line = gateway.logged("the stream's end", |line| line.contains("stream ended")).await;
    assert!(line.contains("end=\"client left"), "{line}");
}

/// An executor's connection is reset during a log: the console of that build ends, and does not
/// look finished where Python can detect that. zuul-web's only thread continues to serve the
/// others. The executor is a fake, as a real one cannot be made to reset.
/// a real one cannot be made to reset.
async fn a_reset_ends_one_console(tls: bool) {
    let Site { system, mut gateway, mut executor, mut web } = Site::start(tls).await;
    let failing = executor::Executor::start().await;
    let (busy, mut log) = executor.run(Some("west")).await;
    let (silent, mut late) = executor.run(Some("west")).await;
    web.open(&busy).await;
    web.open(&silent).await;
    for round in ["first\n", "second\n"] {
        let cut = system.put_build(Some("west"), Some(&failing.worker(Some("west")))).await;
        web.open(&cut).await;
        let mut stream = failing.accept().await;
        // No partial character, which would cause an error in zuul-web even at a clean end.
        stream.write(b"half a line ").await;
        web.shows(&cut, "half a line ").await;
        stream.reset();
        let (text, close) = web.closes(&cut).await;
        assert_eq!(text, "", "no reply of the gateway");
        // Below TLS, Python up to 3.11.7 at least takes a reset for an end (cpython issue 115627).
        let as_an_end = tls && close == NO_MORE;
        assert!(as_an_end || close == r#"4011 "Unknown error""#, "{close}");
        gateway
            .logged("the cut", |l| l.contains(&cut) && l.contains("connection to the hop failed"))
            .await;

        log.write(round.as_bytes());
        web.shows(&busy, round).await;
        assert_eq!(web.manager().await, json!({ "alive": true, "streamers": 2 }));
    }
    late.write(b"at last\n");
    web.shows(&silent, "at last\n").await;
    for (build, log) in [(&busy, log), (&silent, late)] {
        log.remove();
        assert_eq!(web.closes(build).await, (String::new(), NO_MORE.to_owned()));
    }
    assert_eq!(web.manager().await, json!({ "alive": true, "streamers": 0 }));
}

#[tokio::test]
async fn reset_ends_one_console_plain() {
    a_reset_ends_one_console(false).await;
}

#[tokio::test]
async fn reset_ends_one_console_tls() {
    a_reset_ends_one_console(true).await;
}

/// The browser shows a reply of the gateway.
#[tokio::test]
async fn reply_is_shown_in_the_console() {
    let Site { gateway: _gateway, mut executor, mut web, .. } = Site::start(true).await;
    let build = new_build();
    executor.submit(&build, Some("west")).await;
    executor.take(&build).await;
    executor.kill().await;

    web.open(&build).await;
    let text = "Internal streaming error: the executor cannot be reached\r\n";
    assert_eq!(web.closes(&build).await, (text.to_owned(), NO_MORE.to_owned()));
}
