//! Two zones, each with one of our gateways and one of Zuul's, with mutual TLS everywhere. A zone
//! that is migrated from one program to the other has both for a while.
//!
//! Both programs choose a gateway of a zone at random. If a test needs a certain one, the other one
//! of its zone does not run.

use std::net::SocketAddr;

use rustix::process::Signal;

use crate::executor::{Executor, Log, pieces};
use crate::support::certificates::Identity;
use crate::support::client::{Client, Ending};
use crate::support::gateway::{Builder, Gateway};
use crate::support::system::{Entry, System};
use crate::support::within;
use crate::zuul_conf::ZuulConf;
use crate::zuul_gateway::ZuulGateway;

const ZONES: [&str; 2] = ["west", "east"];

/// The requested gateway, and the one it has chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Ours,
    Theirs,
}

use Kind::{Ours, Theirs};

/// One zone; a gateway that has been stopped is `None`.
struct Zone {
    name: &'static str,
    ours: Option<Gateway>,
    theirs: Option<ZuulGateway>,
    executor: Executor,
}

/// Both zones, and the settings of their gateways.
struct Zones {
    system: System,
    identity: Identity,
    zones: [Zone; 2],
    /// Configurations of Zuul's gateways, in directories with their command sockets, without which
    /// the programs do not exit.
    confs: Vec<ZuulConf>,
}

impl Zones {
    /// Starts both zones' gateways in the given order, one zone after the other.
    async fn start(order: [Kind; 2]) -> Self {
        let system = System::new().await;
        let identity = system.zookeeper.authority.identity("gateway");
        let mut zones = Vec::new();
        for name in ZONES {
            let executor = Executor::start(&system, Some(name)).await;
            zones.push(Zone { name, ours: None, theirs: None, executor });
        }
        let zones = zones.try_into().unwrap_or_else(|_| unreachable!("as many as there are names"));
        let mut all = Self { system, identity, zones, confs: Vec::new() };
        for zone in [0, 1] {
            for kind in order {
                all.start_one(zone, kind).await;
            }
        }
        all
    }

    /// Starts one gateway, and waits until it and all others know each other.
    async fn start_one(&mut self, zone: usize, kind: Kind) {
        let Self { system, identity, zones, confs } = self;
        let Zone { name, ours, theirs, .. } = &mut zones[zone];
        match kind {
            Ours => {
                let mut builder = Builder::new(system).zone(name).tls(identity);
                builder = builder.listeners(&["tls = true"]).log("level = \"debug\"");
                *ours = Some(builder.ready().await);
            }
            Theirs => {
                let conf = ZuulConf::gateway(system, name, &identity.zuul_conf());
                *theirs = Some(ZuulGateway::start(system, &conf).await);
                confs.push(conf);
            }
        }
        let running = zones.iter().map(Zone::gateways).sum::<usize>();
        let all_run = |entries: &[Entry]| {
            entries.iter().filter(|entry| entry.content["state"] == "running").count() == running
        };
        let entries = system.until("all to run", all_run).await;
        for theirs in zones.iter_mut().filter_map(|zone| zone.theirs.as_mut()) {
            for entry in &entries {
                theirs.knows_running(&entry.name).await;
            }
        }
    }

    /// Stops one gateway cleanly, and waits until no other gateway chooses it.
    async fn stop_one(&mut self, zone: usize, kind: Kind) {
        let port = self.zones[zone].address(kind).port();
        let entries = self.system.entries().await;
        let its = |entry: &&Entry| entry.content["public_port"] == port;
        let name = entries.iter().find(its).expect("its entry").name.clone();
        match kind {
            Ours => {
                let mut gateway = self.zones[zone].ours.take().expect("it runs");
                gateway.signal(Signal::TERM);
                assert!(gateway.exit().await.success());
            }
            Theirs => self.zones[zone].theirs.take().expect("it runs").stop().await,
        }
        for theirs in self.zones.iter_mut().filter_map(|zone| zone.theirs.as_mut()) {
            theirs.logged(&format!("Noticed fingergw component {name} disappeared")).await;
        }
    }

    /// Creates a build in `there`, and a client that requests it from the gateway `kind` of `here`.
    async fn ask(&mut self, here: usize, kind: Kind, there: usize) -> (String, Log, Asking) {
        let (build, log) = self.zones[there].executor.run(Some(self.zones[there].name)).await;
        let address = self.zones[here].address(kind);
        let client = Client::ask_tls(address, &self.identity, &build).await;
        (build, log, client)
    }

    /// Checks that a whole log arrives through the gateway `kind` of `here`, and returns the
    /// gateway of the other zone that it passed.
    async fn across(&mut self, here: usize, kind: Kind) -> Kind {
        let there = 1 - here;
        let routed = self.zones[here]
            .theirs
            .as_ref()
            .map_or(0, |theirs| theirs.log().iter().filter(|line| line.contains(ROUTING)).count());
        let (build, log, mut client) = self.ask(here, kind, there).await;
        assert_eq!(log.grow(&at_once(), &mut client).await, ending(kind), "{kind:?} of {here}");
        let Zone { ours, theirs, .. } = &mut self.zones[here];
        let line = match kind {
            Ours => {
                let ours = ours.as_mut().expect("it was asked");
                ours.logged(&build, |line| line.contains(&build) && line.contains("ended")).await
            }
            Theirs => theirs.as_mut().expect("it was asked").logged_nth(ROUTING, routed).await,
        };
        let there = &self.zones[there];
        for kind in [Ours, Theirs] {
            let named =
                |address: SocketAddr| line.contains(&format!("localhost:{}", address.port()));
            if there.has(kind) && named(there.address(kind)) {
                return kind;
            }
        }
        panic!("by none of the other zone's gateways: {line}");
    }

    /// The same in the gateway's own zone, where no other gateway is involved.
    async fn within(&mut self, here: usize, kind: Kind) {
        let (build, log, mut client) = self.ask(here, kind, here).await;
        assert_eq!(log.grow(&at_once(), &mut client).await, ending(kind), "{kind:?} of {here}");
        if kind == Ours {
            let ours = self.zones[here].ours.as_mut().expect("it was asked");
            let line = |line: &str| line.contains(&build) && line.contains("hop=\"executor ");
            ours.logged("the direct way", line).await;
        }
    }
}

type Asking = Client<tokio_rustls::client::TlsStream<tokio::net::TcpStream>>;

/// What Zuul's gateway logs about each stream for another zone, followed by the chosen gateway.
const ROUTING: &str = "routing via ";

impl Zone {
    fn has(&self, kind: Kind) -> bool {
        match kind {
            Ours => self.ours.is_some(),
            Theirs => self.theirs.is_some(),
        }
    }

    fn gateways(&self) -> usize {
        [Ours, Theirs].into_iter().filter(|kind| self.has(*kind)).count()
    }

    fn address(&self, kind: Kind) -> SocketAddr {
        match kind {
            Ours => self.ours.as_ref().expect("ours runs").address(),
            Theirs => self.theirs.as_ref().expect("theirs runs").address,
        }
    }
}

/// How a log ends for a client of such a gateway: Python sends no close_notify.
fn ending(kind: Kind) -> Ending {
    match kind {
        Ours => Ending::Clean,
        Theirs => Ending::Truncated,
    }
}

/// A log that is complete from the start: the executor's streamer checks for more only twice a
/// second.
fn at_once() -> [Vec<u8>; 1] {
    [pieces().concat()]
}

/// All four gateways serve both zones' builds; over many requests, each chooses each gateway of the
/// other zone.
async fn all_serve(order: [Kind; 2]) {
    let mut zones = Zones::start(order).await;
    for here in [0, 1] {
        for kind in [Ours, Theirs] {
            zones.within(here, kind).await;
            let mut chosen = Vec::new();
            within("either gateway to be chosen", async {
                while !(chosen.contains(&Ours) && chosen.contains(&Theirs)) {
                    chosen.push(zones.across(here, kind).await);
                }
            })
            .await;
        }
    }
}

#[tokio::test]
async fn mixed_zones_serve_all_builds_when_ours_starts_first() {
    all_serve([Ours, Theirs]).await;
}

#[tokio::test]
async fn mixed_zones_serve_all_builds_when_zuuls_starts_first() {
    all_serve([Theirs, Ours]).await;
}

/// One gateway of the pair is stopped cleanly and returns. The other one takes over, and streams
/// through it are not affected.
async fn one_is_replaced(leaves: Kind, stays: Kind) {
    let mut zones = Zones::start([stays, leaves]).await;
    let (_, mut log, mut client) = zones.ask(0, stays, 0).await;
    log.write(b"before\n");
    client.expect(b"before\n").await;

    zones.stop_one(0, leaves).await;
    for kind in [Ours, Theirs] {
        assert_eq!(zones.across(1, kind).await, stays, "asked {kind:?}");
    }
    log.write(b"meanwhile\n");
    client.expect(b"meanwhile\n").await;
    // Also from the zone that still has both.
    zones.across(0, stays).await;
    zones.within(0, stays).await;

    zones.start_one(0, leaves).await;
    within("it to be chosen again", async {
        for kind in [Ours, Theirs] {
            while zones.across(1, kind).await != leaves {}
        }
    })
    .await;
    assert_eq!(log.grow(&pieces(), &mut client).await, ending(stays));
}

#[tokio::test]
async fn zuuls_gateway_leaves_and_returns() {
    one_is_replaced(Theirs, Ours).await;
}

#[tokio::test]
async fn own_gateway_leaves_and_returns() {
    one_is_replaced(Ours, Theirs).await;
}

/// The entry of a killed gateway exists until its session expires, so the other zone continues to
/// choose it. Our gateway then tries the other one, and every client gets its log.
#[tokio::test]
async fn dead_gateway_of_zuul_costs_no_stream() {
    let mut zones = Zones::start([Ours, Theirs]).await;
    let (_, mut other_log, mut other) = zones.ask(0, Ours, 0).await;
    let dead = zones.zones[0].theirs.take().expect("it runs");
    let entry = dead.entry.clone();
    dead.kill().await;

    let (build, mut log) = zones.zones[0].executor.run(Some(ZONES[0])).await;
    let asked = zones.zones[1].address(Ours);
    let mut clients = Vec::new();
    for _ in 0..24 {
        clients.push(Client::ask_tls(asked, &zones.identity, &build).await);
    }
    let [all] = at_once();
    log.write(&all);
    for client in &mut clients {
        client.expect(&all).await;
    }
    let entries = zones.system.entries().await;
    assert!(entries.iter().any(|other| other.name == entry), "its entry existed during the test");
    let asked = zones.zones[1].ours.as_ref().expect("it runs").log();
    let failed = asked.iter().filter(|line| line.contains("hop failed")).count();
    assert!(failed > 0, "the dead gateway was never tried, so this test has not tested failover");
    other_log.write(b"still here\n");
    other.expect(b"still here\n").await;
}
