//! Logs that arrive byte for byte.

use crate::support::client::{Client, Ending};
use crate::support::executor::Executor;
use crate::support::gateway::Builder;
use crate::support::system::System;

#[tokio::test]
async fn a_log_arrives_while_it_grows() {
    let system = System::new().await;
    let gateway = Builder::new(&system).ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;

    let mut client = Client::ask(gateway.address(), &build).await;
    let mut stream = executor.accept().await;
    assert_eq!(stream.request, format!("{build}\n"));
    for line in ["first\n", "second\n"] {
        stream.write(line.as_bytes()).await;
        client.expect(line.as_bytes()).await;
    }
    stream.finish().await;
    assert_eq!(client.text().await, "");
}

/// The client reads nothing until the gateway is about to cut: the bytes wait in its socket.
#[tokio::test]
async fn a_cut_log_arrives_as_far_as_it_came() {
    let system = System::new().await;
    let mut gateway = Builder::new(&system).ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;

    let mut client = Client::connect_narrow(gateway.address()).await;
    client.send(format!("{build}\n").as_bytes()).await;
    let mut stream = executor.accept().await;
    // More than the client's side takes unread, less than both sides do.
    let log: Vec<u8> = (0..50_000u32).flat_map(u32::to_be_bytes).collect();
    stream.write(&log).await;
    stream.reset_when_taken().await;
    gateway.logged("the cut", |line| line.contains("cut by the next hop")).await;
    let (received, ending) = client.rest().await;
    assert!(received == log, "{} of {} bytes", received.len(), log.len());
    assert_eq!(ending, Ending::Reset);
}
