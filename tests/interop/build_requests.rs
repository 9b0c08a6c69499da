//! Build requests written by Zuul's own classes: the queues in which the gateway finds them, and
//! its reply at each step of a build.

use nix::sched::CloneFlags;

use crate::executor::{Executor, new_build};
use crate::support::client::Client;
use crate::support::gateway::Builder;
use crate::support::namespace::in_namespaces;
use crate::support::system::System;
use crate::support::zookeeper::ZooKeeper;

/// In a network namespace, because each request leaves a pair of ports in TIME_WAIT for a minute,
/// and other programs on this machine may have used up the rest.
#[test]
fn each_step_of_a_build_is_seen_in_each_queue() {
    in_namespaces(CloneFlags::CLONE_NEWNET, async || {
        let system = System::on(ZooKeeper::start().await).await;
        let gateway = Builder::new(&system).zone("west").ready().await;
        let mut executor = Executor::start(&system, Some("west")).await;
        for queue in [None, Some("west"), Some("east")] {
            let build = new_build();
            let reply = async || Client::ask(gateway.address(), &build).await.text().await;
            assert_eq!(reply().await, "Build not found\r\n", "{queue:?}: not submitted");
            executor.submit(&build, queue).await;
            assert_eq!(reply().await, "Build did not start yet\r\n", "{queue:?}: submitted");

            let line = format!("the log of {build}\n");
            let streamed = async || {
                Client::ask(gateway.address(), &build).await.expect(line.as_bytes()).await;
            };
            executor.log(&build).write(line.as_bytes());
            executor.take(&build).await;
            streamed().await;
            executor.pause(&build).await;
            streamed().await;
            // The log of a completed build exists until its executor removes it.
            executor.complete(&build).await;
            streamed().await;

            executor.remove(&build).await;
            assert_eq!(reply().await, "Build not found\r\n", "{queue:?}: removed");
        }
    });
}
