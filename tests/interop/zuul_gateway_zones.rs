//! Zuul's own `zuul-fingergw` as the gateway of the other zone, as client and as server of ours.
//!
//! The executor is in zone west; the client asks the gateway of zone east.

use crate::executor::{Executor, new_build, pieces};
use crate::support::client::{Client, Ending};
use crate::support::gateway::Builder;
use crate::support::system::System;
use crate::zuul_conf::ZuulConf;
use crate::zuul_gateway::ZuulGateway;

#[tokio::test]
async fn log_from_zuuls_gateway_plain() {
    let system = System::new().await;
    let mut theirs = ZuulGateway::start(&system, &ZuulConf::gateway(&system, "west", "")).await;
    let mut ours = Builder::new(&system).zone("east").ready().await;
    let mut executor = Executor::start(&system, Some("west")).await;
    let (build, log) = executor.run(Some("west")).await;

    let mut client = Client::ask(ours.address(), &build).await;
    assert_eq!(log.grow(&pieces(), &mut client).await, Ending::Clean);
    let route = format!("gateway localhost:{} of zone west (plain)", theirs.address.port());
    ours.logged(&route, |line| line.contains(&route) && line.contains("end=finished")).await;
    theirs.logged("no routing is needed").await;
}

#[tokio::test]
async fn log_from_zuuls_gateway_by_mutual_tls() {
    let system = System::new().await;
    let identity = system.zookeeper.authority.identity("gateway");
    let conf = ZuulConf::gateway(&system, "west", &identity.zuul_conf());
    let mut theirs = ZuulGateway::start(&system, &conf).await;
    let ours = Builder::new(&system).zone("east").tls(&identity).listeners(&["tls = true"]);
    let mut ours = ours.ready().await;
    let mut executor = Executor::start(&system, Some("west")).await;
    let (build, log) = executor.run(Some("west")).await;

    let mut client = Client::ask_tls(ours.address(), &identity, &build).await;
    // Zuul's gateway closes without close_notify, which nevertheless ends a log; ours sends one.
    assert_eq!(log.grow(&pieces(), &mut client).await, Ending::Clean);
    let route = format!("gateway localhost:{} of zone west (TLS)", theirs.address.port());
    ours.logged(&route, |line| line.contains(&route) && line.contains("end=finished")).await;
    theirs.logged("no routing is needed").await;
}

#[tokio::test]
async fn log_to_zuuls_gateway_plain() {
    let system = System::new().await;
    let mut theirs = ZuulGateway::start(&system, &ZuulConf::gateway(&system, "east", "")).await;
    let mut ours = Builder::new(&system).zone("west").ready().await;
    let mut executor = Executor::start(&system, Some("west")).await;
    let (build, log) = executor.run(Some("west")).await;

    let mut client = Client::ask(theirs.address, &build).await;
    assert_eq!(log.grow(&pieces(), &mut client).await, Ending::Clean);
    theirs.logged(&format!("routing via localhost:{}", ours.port())).await;
    let route = executor.route();
    ours.logged(&route, |line| line.contains(&route) && line.contains("end=finished")).await;
}

#[tokio::test]
async fn log_to_zuuls_gateway_by_mutual_tls() {
    let system = System::new().await;
    let identity = system.zookeeper.authority.identity("gateway");
    let conf = ZuulConf::gateway(&system, "east", &identity.zuul_conf());
    let mut theirs = ZuulGateway::start(&system, &conf).await;
    let ours = Builder::new(&system).zone("west").tls(&identity).listeners(&["tls = true"]);
    let mut ours = ours.ready().await;
    let mut executor = Executor::start(&system, Some("west")).await;
    let (build, log) = executor.run(Some("west")).await;

    let mut client = Client::ask_tls(theirs.address, &identity, &build).await;
    // Zuul's gateway sends no close_notify.
    assert_eq!(log.grow(&pieces(), &mut client).await, Ending::Truncated);
    theirs.logged(&format!("routing via localhost:{}", ours.port())).await;
    let route = executor.route();
    ours.logged(&route, |line| line.contains(&route) && line.contains("end=finished")).await;
}

/// Gateways must not change replies: the executor's through both gateways in either order, ours
/// through Zuul's.
#[tokio::test]
async fn replies_cross_both_gateways() {
    let system = System::new().await;
    let theirs = ZuulGateway::start(&system, &ZuulConf::gateway(&system, "east", "")).await;
    let ours = Builder::new(&system).zone("west").ready().await;
    let mut there = Executor::start(&system, Some("west")).await;
    let mut here = Executor::start(&system, Some("east")).await;
    for (executor, address) in [(&mut there, theirs.address), (&mut here, ours.address())] {
        let build = new_build();
        executor.submit(&build, None).await;
        executor.take(&build).await;
        let text = Client::ask(address, &build).await.text().await;
        assert_eq!(text, format!("Build ID {build} not found"));
    }

    let (build, _log) = there.run(Some("west")).await;
    there.kill().await;
    let text = Client::ask(theirs.address, &build).await.text().await;
    assert_eq!(text, "Internal streaming error: the executor cannot be reached\r\n");
}
