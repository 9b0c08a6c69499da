//! The lame duck period between the removal of the registry entry and that of the listeners:
//! clients that have just read the entry are still served.

use rustix::process::Signal;
use tokio::net::TcpStream;

use crate::support::admin::readiness;
use crate::support::certificates::Identity;
use crate::support::client::{Client, Ending};
use crate::support::executor::{Executor, serves};
use crate::support::gateway::Builder;
use crate::support::running_stream::RunningStream;
use crate::support::system::{Entry, System};

const LAME: &str = "still accepting connections";

async fn until_gone(system: &System) {
    system.until("the entry to be removed", <[Entry]>::is_empty).await;
}

/// A client that looked up the gateway before it stopped and connects afterwards is served; load
/// balancers see that it is stopping.
#[tokio::test]
async fn clients_are_served_during_the_lame_duck_time() {
    let system = System::new().await;
    let identity = system.zookeeper.authority.identity("localhost");
    let builder = Builder::new(&system).tls(&identity).listeners(&["", "tls = true"]);
    let mut builder = builder.limits("lame_duck = \"1h\"\ngrace = \"1h\"");
    builder.admin = true;
    let mut gateway = builder.ready().await;
    assert_eq!(readiness(&gateway).await, "HTTP/1.1 200 OK");
    let mut early = RunningStream::start(&system, gateway.address()).await;

    gateway.signal(Signal::TERM);
    until_gone(&system).await;
    gateway.logged("the lame duck", |line| line.contains(LAME)).await;
    assert_eq!(readiness(&gateway).await, "HTTP/1.1 503 Service Unavailable");
    for _ in 0..3 {
        RunningStream::start(&system, gateway.address()).await.finish().await;
        let client: &Identity = &system.zookeeper.identity;
        RunningStream::start_tls(&system, gateway.addresses[1], client).await.finish().await;
    }
    early.pass("meanwhile\n").await;
    assert!(!gateway.log().iter().any(|line| line.contains("no longer accepting connections")));

    // A second signal skips the rest of the period.
    gateway.signal(Signal::TERM);
    assert_eq!(gateway.exit().await.code(), Some(1));
    assert_eq!(early.client.rest().await, (Vec::new(), Ending::Reset));
}

/// The period ends by itself, and the steps of a shutdown happen in order.
#[tokio::test]
async fn listeners_close_after_the_lame_duck_time() {
    let system = System::new().await;
    let limits = "lame_duck = \"200ms\"";
    let mut gateway = Builder::new(&system).limits(limits).ready().await;
    serves(&system, gateway.address()).await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let mut client = Client::ask(gateway.address(), &build).await;
    let mut log = executor.begin(&mut client).await;
    gateway.signal(Signal::TERM);
    gateway
        .logged("the end of the lame duck period", |line| {
            line.contains("no longer accepting connections")
        })
        .await;
    // The listener is closed by its accept loop, which has been notified by then.
    let refused = async { while TcpStream::connect(gateway.address()).await.is_ok() {} };
    crate::support::within("new connections to be refused", refused).await;
    log.write(b"after\n").await;
    log.finish().await;
    assert_eq!(client.text().await, "after\n");
    drop(client);
    assert!(gateway.exit().await.success());
    let log = gateway.log();
    let steps = [
        "registry entry deleted",
        LAME,
        "no longer accepting",
        "all streams have ended",
        " stopped",
    ];
    let at = |step: &str| log.iter().position(|line| line.contains(step));
    let order: Vec<_> = steps.into_iter().map(at).collect();
    assert!(order.is_sorted() && order.iter().all(Option::is_some), "{order:?}");
}
