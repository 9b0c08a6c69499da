//! The service manager's watchdog: pinged while the program works, whatever the state of ZooKeeper.
//! (`system::boot` tests with systemd what happens to a gateway that hangs.)

use rustix::process::Signal;

use crate::support::gateway::{Builder, Gateway};
use crate::support::running_stream::RunningStream;
use crate::support::system::System;
use crate::support::zookeeper::ZooKeeper;

/// Returns the number of watchdog pings.
fn fed(messages: &[String]) -> usize {
    messages.iter().filter(|line| *line == "WATCHDOG=1").count()
}

/// Waits for `times` further pings.
async fn fed_more(gateway: &mut Gateway, times: usize) {
    let before = fed(&gateway.notice("anything", |_| true).await.messages);
    gateway.notice("the watchdog fed", |notices| fed(&notices.messages) >= before + times).await;
}

#[tokio::test]
async fn pinged_while_zookeeper_is_down() {
    let zookeeper = ZooKeeper::start().await;
    let system = System::on(zookeeper.clone()).await;
    let builder = Builder::new(&system).zookeeper("session_timeout = \"2s\"");
    let mut gateway = builder
        .start_changed(|command| {
            command.env("WATCHDOG_USEC", "400000");
        })
        .await;
    gateway.ready().await;
    fed_more(&mut gateway, 3).await;
    zookeeper.kill().await;
    gateway.status("the problem", |status| !status.contains("registered as")).await;
    fed_more(&mut gateway, 5).await;
}

/// A drain has no accept loops, and pings continue: a log may run for hours.
#[tokio::test]
async fn pinged_while_streams_drain() {
    let system = System::new().await;
    let builder = Builder::new(&system).limits("grace = \"1h\"");
    let mut gateway = builder
        .start_changed(|command| {
            command.env("WATCHDOG_USEC", "400000");
        })
        .await;
    gateway.ready().await;
    let stream = RunningStream::start(&system, gateway.address()).await;
    gateway.signal(Signal::TERM);
    gateway
        .logged("the accept loops to end", |line| line.contains("no longer accepting connections"))
        .await;
    fed_more(&mut gateway, 5).await;
    stream.finish().await;
    assert!(gateway.exit().await.success());
}

/// A watchdog of another process, whose environment this one has inherited, and a disabled one.
#[tokio::test]
async fn not_pinged_without_a_watchdog() {
    let system = System::new().await;
    for (time, pid) in [("1000", "1"), ("0", "")] {
        let change = |command: &mut tokio::process::Command| {
            command.env("WATCHDOG_USEC", time);
            if !pid.is_empty() {
                command.env("WATCHDOG_PID", pid);
            }
        };
        let mut gateway = Builder::new(&system).start_changed(change).await;
        gateway.ready().await;
        gateway.signal(Signal::TERM);
        assert!(gateway.exit().await.success());
        let notices = gateway.notice("the shutdown", |notices| notices.stopping).await;
        assert_eq!(fed(&notices.messages), 0, "{time}: {:?}", notices.messages);
    }
}
