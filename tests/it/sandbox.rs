//! Sandboxes and kernels without the system calls that the gateway uses if available: logs arrive
//! without them.

use nix::libc;

use crate::support::client::{Client, Ending};
use crate::support::executor::Executor;
use crate::support::gateway::Builder;
use crate::support::sandbox::{Denied, without};
use crate::support::system::System;

/// Checks that a large log arrives, then one line, and both again.
async fn serves() {
    let system = System::new().await;
    let identity = system.zookeeper.authority.identity("gateway");
    let gateway = Builder::new(&system).tls(&identity).listeners(&["", "tls = true"]).ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let log: Vec<u8> = (0..3_000_000_u32).map(|index| (index % 251) as u8).collect();
    for _ in 0..2 {
        let mut client = Client::ask(gateway.addresses[0], &build).await;
        let (received, ()) = tokio::join!(client.rest(), executor.serve(&log));
        assert!(received == (log.clone(), Ending::Clean), "{} bytes", received.0.len());
        let mut client = Client::ask_tls(gateway.addresses[1], &identity, &build).await;
        // The stream is idle for a while, so keepalive is enabled.
        let stream = executor.begin(&mut client).await;
        stream.finish().await;
        assert_eq!(client.rest().await, (Vec::new(), Ending::Clean));
    }
}

#[test]
fn logs_are_copied_without_splice() {
    for errno in [libc::EPERM, libc::EACCES, libc::ENOSYS, libc::EINVAL, libc::EOPNOTSUPP] {
        without(Denied::Splice, errno, serves);
    }
}

#[test]
fn logs_arrive_without_optional_tcp_options() {
    for errno in [libc::EPERM, libc::ENOPROTOOPT] {
        without(Denied::OptionalTcpOptions, errno, serves);
    }
}
