//! Build requests written by Zuul's own classes: in which queues the gateway finds them, and what
//! it makes of every step in a build's life.

use crate::executor::{Executor, new_build};
use crate::support::client::Client;
use crate::support::gateway::Builder;
use crate::support::system::System;

#[tokio::test]
async fn every_step_of_a_build_in_every_queue() {
    let system = System::new().await;
    let gateway = Builder::new(&system).zone("west").ready().await;
    let mut executor = Executor::start(&system, Some("west")).await;

    for queue in [None, Some("west"), Some("east")] {
        let build = new_build();
        let told = async || Client::ask(gateway.address(), &build).await.text().await;
        assert_eq!(told().await, "Build not found\r\n", "{queue:?}: not submitted");
        executor.submit(&build, queue).await;
        assert_eq!(told().await, "Build did not start yet\r\n", "{queue:?}: submitted");

        let line = format!("the log of {build}\n");
        let streamed = async || {
            Client::ask(gateway.address(), &build).await.expect(line.as_bytes()).await;
        };
        executor.log(&build).write(line.as_bytes());
        executor.take(&build).await;
        streamed().await;
        executor.pause(&build).await;
        streamed().await;
        // The log of a completed build is there until its executor has cleaned up.
        executor.complete(&build).await;
        streamed().await;

        executor.remove(&build).await;
        assert_eq!(told().await, "Build not found\r\n", "{queue:?}: removed");
    }
}
