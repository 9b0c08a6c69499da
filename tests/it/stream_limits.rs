//! Limits for idle time and total time of streams.

use std::cell::Cell;

use crate::support::admin::ended;
use crate::support::client::{Client, Ending};
use crate::support::executor::Executor;
use crate::support::gateway::{Builder, Gateway};
use crate::support::running_stream::RunningStream;
use crate::support::system::System;
use crate::support::within;

struct Site {
    system: System,
    gateway: Gateway,
    executor: Executor,
    build: String,
}

impl Site {
    async fn start(limits: &str) -> Self {
        let system = System::new().await;
        let mut builder = Builder::new(&system).limits(limits);
        builder.admin = true;
        let gateway = builder.ready().await;
        let executor = Executor::start().await;
        let build = system.put_build(None, Some(&executor.worker(None))).await;
        Self { system, gateway, executor, build }
    }

    /// Checks that a stream is reset that is idle after its first line.
    async fn silent_one_is_cut(&self) {
        let mut client = Client::ask(self.gateway.address(), &self.build).await;
        let mut stream = self.executor.begin(&mut client).await;
        assert_eq!(client.rest().await, (Vec::new(), Ending::Reset));
        stream.closed().await;
    }
}

/// An idle stream is reset while others continue, one with lines and one with bulk data through a
/// pipe.
#[tokio::test]
async fn idle_stream_is_aborted_and_an_active_one_is_not() {
    let site = Site::start("stream_idle = \"3s\"").await;
    let mut active = RunningStream::start(&site.system, site.gateway.address()).await;
    let piece = "a piece that is long enough for a pipe\n".repeat(1000);
    let cut = Cell::new(false);
    let silent = async {
        site.silent_one_is_cut().await;
        cut.set(true);
    };
    let pass = async {
        while !cut.get() {
            active.pass("a line\n").await;
            active.pass(&piece).await;
        }
    };
    tokio::join!(silent, pass);
    active.finish().await;
    ended(&site.gateway, "stream_idle", 1).await;
}

/// Before its first byte a stream has another deadline.
#[tokio::test]
async fn idle_time_counts_from_the_first_byte() {
    let site = Site::start("stream_idle = \"50ms\"").await;
    let mut late = Client::ask(site.gateway.address(), &site.build).await;
    let mut stream = site.executor.accept().await;
    site.silent_one_is_cut().await;
    site.silent_one_is_cut().await;
    stream.write(b"at last\n").await;
    stream.finish().await;
    assert_eq!(late.text().await, "at last\n");
    ended(&site.gateway, "stream_idle", 2).await;
}

/// An active stream is reset as well; everything sent before arrives.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stream_is_aborted_at_its_maximum_age() {
    let site = Site::start("stream_total = \"3s\"").await;
    let mut client = Client::ask(site.gateway.address(), &site.build).await;
    let mut stream = site.executor.begin(&mut client).await;
    let piece: Vec<u8> = (0..65_521u32).map(|index| (index % 251) as u8).collect();
    let sending = async { while stream.try_write(&piece).await {} };
    let reads = async {
        let (mut read, mut buffer) = (0, vec![0; 65_521]);
        loop {
            match client.read(&mut buffer).await {
                Ok(count) => {
                    for byte in &buffer[..count] {
                        assert_eq!(*byte, piece[read % piece.len()]);
                        read += 1;
                    }
                }
                Err(ending) => break ending,
            }
        }
    };
    let both = async { tokio::join!(sending, reads) };
    let ((), ending) = within("the cut", both).await;
    assert_eq!(ending, Ending::Reset);
    ended(&site.gateway, "stream_total", 1).await;
    // The next stream has its own time.
    let mut client = Client::ask(site.gateway.address(), &site.build).await;
    site.executor.serve(b"log\n").await;
    assert_eq!(client.text().await, "log\n");
}
