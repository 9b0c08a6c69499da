//! Zuul's gateway connects to a zone of ours through a router that passes TLS through, as an
//! OpenShift Route does.

use nix::sched::CloneFlags;

use crate::executor::{Executor, pieces};
use crate::support::certificates::Authority;
use crate::support::client::{Client, Ending};
use crate::support::gateway::Builder;
use crate::support::haproxy::{Haproxy, reserve};
use crate::support::namespace::{in_namespaces, resolve_locally};
use crate::support::system::System;
use crate::support::zookeeper::ZooKeeper;
use crate::zuul_conf::ZuulConf;
use crate::zuul_gateway::ZuulGateway;

const WEST: &str = "fingergw.west.example.org";

#[test]
fn zuuls_gateway_reaches_a_zone_by_server_name() {
    in_namespaces(CloneFlags::CLONE_NEWNS, async || {
        let _names = resolve_locally(&[WEST]);
        let system = System::on(ZooKeeper::start().await).await;
        let identity = system.zookeeper.authority.identity("theirs");
        let conf = ZuulConf::gateway(&system, "east", &identity.zuul_conf());
        let mut theirs = ZuulGateway::start(&system, &conf).await;
        let place = reserve();
        let own = system.zookeeper.authority.identity_only_for(WEST);
        let mut ours = Builder::new(&system).zone("west").tls(&own).listeners(&["tls = true"]);
        ours.hostname = WEST.to_owned();
        ours.root = format!("public_port = {}", place.0.port());
        let ours = ours.ready().await;
        let routers = Authority::new();
        let certificate = routers.identity("router");
        let router = Haproxy::router(place, &[(WEST, ours.address())], &certificate, "1h").await;
        let mut executor = Executor::start(&system, Some("west")).await;
        let (build, log) = executor.run(Some("west")).await;

        let mut client = Client::ask_tls(theirs.address, &identity, &build).await;
        // Zuul's gateway sends no close_notify.
        assert_eq!(log.grow(&pieces(), &mut client).await, Ending::Truncated);
        theirs.logged(&format!("routing via {WEST}:{}", router.address.port())).await;
    });
}
