//! Every way in which a stream can end, as logged: the `end` of "stream ended", and of "hop
//! failed" after an attempt that failed. `docs/operating.md` lists them for operators.

use std::collections::BTreeSet;

use rustix::process::Signal;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::support::certificates::{Authority, Identity};
use crate::support::client::Client;
use crate::support::executor::full_listener;
use crate::support::executor::{Executor, acceptor, acceptor_with_protocols, unreachable};
use crate::support::gateway::{Builder, Gateway};
use crate::support::system::{System, Worker};
use crate::support::within;

const OPERATING: &str = include_str!("../../docs/operating.md");

const BUSY: &str = "too many requests wait for this executor's first byte";

/// A gateway of zone east with a plain listener and a TLS listener.
struct Site {
    system: System,
    identity: Identity,
    gateway: Gateway,
    executor: Executor,
}

impl Site {
    async fn start(limits: &str) -> Self {
        let system = System::new().await;
        let identity = system.zookeeper.authority.identity("gateway");
        let gateway = Builder::new(&system).zone("east").tls(&identity).limits(limits);
        let gateway = gateway.listeners(&["", "tls = true"]).ready().await;
        Self { system, identity, gateway, executor: Executor::start().await }
    }

    /// Returns a client that has requested a build on `worker`.
    async fn ask(&self, worker: &Worker) -> Client<TcpStream> {
        let build = self.system.put_build(None, Some(worker)).await;
        Client::ask(self.gateway.address(), &build).await
    }

    /// Returns the `end` of the first line with `event`.
    async fn end(&mut self, event: &str) -> String {
        let line = self.gateway.logged(event, |line| line.contains(event)).await;
        line.split_once(" end=").expect("why it ended").1.trim_matches('"').to_owned()
    }
}

impl Site {
    /// Sends more requests than the silent executor has slots; returns the `end` of a request that
    /// got none.
    async fn end_of_many_waiting(&mut self, worker: &Worker) -> String {
        // Three of the requests are sent to the executor in each second.
        let mut clients = Vec::new();
        for _ in 0..30 {
            clients.push(self.ask(worker).await);
        }
        self.end(BUSY).await
    }

    /// Starts more clients that do not read than may stall; returns the `end` of the first stream
    /// that ends.
    async fn end_of_many_stalled(&mut self, worker: &Worker) -> String {
        let build = self.system.put_build(None, Some(worker)).await;
        let (mut clients, mut logs) = (Vec::new(), JoinSet::new());
        for _ in 0..9 {
            let mut client = Client::connect_narrow(self.gateway.address()).await;
            client.send(format!("{build}\n").as_bytes()).await;
            clients.push(client);
            let mut stream = self.executor.accept().await;
            logs.spawn(async move { while stream.try_write(&[b'x'; 65536]).await {} });
        }
        self.end("stream ended").await
    }
}

/// Ways in which a stream from an executor ends.
#[derive(Clone, Copy, Debug)]
enum Stream {
    Finishes,
    ResetByExecutor,
    ResetBeforeItsFirstByte,
    ClosedBeforeItsFirstByte,
    Silent,
    WaitsForASlotInVain,
    ExecutorRefuses,
    ExecutorNeverConnects,
    ExecutorIsThisGateway,
    ClientResets,
    TlsClientCloses,
    ClientStalls,
    ManyClientsStall,
    GatewayStops,
    IdleForTooLong,
    RunsForTooLong,
}

impl Stream {
    const ALL: [Self; 16] = [
        Self::Finishes,
        Self::ResetByExecutor,
        Self::ResetBeforeItsFirstByte,
        Self::ClosedBeforeItsFirstByte,
        Self::Silent,
        Self::WaitsForASlotInVain,
        Self::ExecutorRefuses,
        Self::ExecutorNeverConnects,
        Self::ExecutorIsThisGateway,
        Self::ClientResets,
        Self::TlsClientCloses,
        Self::ClientStalls,
        Self::ManyClientsStall,
        Self::GatewayStops,
        Self::IdleForTooLong,
        Self::RunsForTooLong,
    ];

    fn limits(self) -> &'static str {
        match self {
            Self::Silent => "first_byte_timeout = \"200ms\"",
            Self::WaitsForASlotInVain => "first_byte_timeout = \"1500ms\"",
            Self::ExecutorNeverConnects => "connect_timeout = \"200ms\"",
            Self::ClientStalls => "write_timeout = \"200ms\"",
            // An eighth of the streams may stall.
            Self::ManyClientsStall => "connections_per_address = 64",
            Self::GatewayStops => "grace = \"50ms\"",
            Self::IdleForTooLong => "stream_idle = \"100ms\"",
            Self::RunsForTooLong => "stream_total = \"3s\"",
            _ => "",
        }
    }

    /// Causes this end and returns the logged reason.
    async fn end(self) -> String {
        let mut site = Site::start(self.limits()).await;
        let worker = site.executor.worker(None);
        match self {
            Self::Finishes => {
                let mut client = site.ask(&worker).await;
                site.executor.begin(&mut client).await.finish().await;
            }
            Self::ResetByExecutor => {
                let mut client = site.ask(&worker).await;
                site.executor.begin(&mut client).await.reset();
            }
            Self::ResetBeforeItsFirstByte => {
                let _client = site.ask(&worker).await;
                site.executor.accept().await.reset();
            }
            Self::ClosedBeforeItsFirstByte => {
                let _client = site.ask(&worker).await;
                site.executor.accept().await.finish().await;
            }
            Self::Silent => {
                let _client = site.ask(&worker).await;
                site.executor.accept().await.closed().await;
            }
            Self::WaitsForASlotInVain => return site.end_of_many_waiting(&worker).await,
            Self::ExecutorRefuses => {
                let _client = site.ask(&unreachable(None).await).await;
            }
            Self::ExecutorNeverConnects => {
                let (listener, _first) = full_listener().await;
                let address = listener.local_addr().expect("its address");
                let _client = site.ask(&Worker { port: address.port(), ..worker }).await;
                return site.end("stream ended").await;
            }
            Self::ExecutorIsThisGateway => {
                let port = site.gateway.port();
                let _client = site.ask(&Worker { port, ..worker }).await;
            }
            Self::ClientResets => {
                let mut client = site.ask(&worker).await;
                let _stream = site.executor.begin(&mut client).await;
                client.reset();
                return site.end("stream ended").await;
            }
            Self::TlsClientCloses => {
                let build = site.system.put_build(None, Some(&worker)).await;
                let address = site.gateway.addresses[1];
                let mut client = Client::ask_tls(address, &site.identity, &build).await;
                let _stream = site.executor.begin(&mut client).await;
                drop(client);
                return site.end("stream ended").await;
            }
            Self::ClientStalls => {
                let build = site.system.put_build(None, Some(&worker)).await;
                let mut client = Client::connect_narrow(site.gateway.address()).await;
                client.send(format!("{build}\n").as_bytes()).await;
                let mut stream = site.executor.accept().await;
                while stream.try_write(&[b'x'; 65536]).await {}
                return site.end("stream ended").await;
            }
            Self::ManyClientsStall => return site.end_of_many_stalled(&worker).await,
            Self::GatewayStops => {
                let mut client = site.ask(&worker).await;
                let _stream = site.executor.begin(&mut client).await;
                site.gateway.signal(Signal::TERM);
                return site.end("stream ended").await;
            }
            Self::IdleForTooLong | Self::RunsForTooLong => {
                let mut client = site.ask(&worker).await;
                let _stream = site.executor.begin(&mut client).await;
                return site.end("stream ended").await;
            }
        }
        site.end("stream ended").await
    }
}

/// Reasons for which a peer gateway is given up in favour of the executor.
#[derive(Clone, Copy, Debug)]
enum Hop {
    Refuses,
    NeverShakesHands,
    ClosesInTheHandshake,
    ShowsAnothersCertificate,
    WantsACertificateThatWeHaveNot,
    Closes,
    Resets,
    IsAskedTooOften,
    IsSlow,
    CannotServe,
    IsOfAnotherZone,
    ReportsALoop,
}

impl Hop {
    const ALL: [Self; 12] = [
        Self::Refuses,
        Self::NeverShakesHands,
        Self::ClosesInTheHandshake,
        Self::ShowsAnothersCertificate,
        Self::WantsACertificateThatWeHaveNot,
        Self::Closes,
        Self::Resets,
        Self::IsAskedTooOften,
        Self::IsSlow,
        Self::CannotServe,
        Self::IsOfAnotherZone,
        Self::ReportsALoop,
    ];

    async fn end(self) -> String {
        let system = System::new().await;
        let (gateway, executor) = (Executor::start().await, Executor::start().await);
        let tls = matches!(
            self,
            Self::NeverShakesHands
                | Self::ClosesInTheHandshake
                | Self::ShowsAnothersCertificate
                | Self::WantsACertificateThatWeHaveNot
                | Self::IsOfAnotherZone
                | Self::ReportsALoop
        );
        let identity = system.zookeeper.authority.identity("gateway");
        let north = Builder::new(&system).zone("north").tls(&identity).listeners(&["tls = true"]);
        let north = match self {
            Self::IsOfAnotherZone => Some(north.ready().await),
            _ => None,
        };
        let port = match self {
            Self::Refuses => unreachable(None).await.port,
            Self::IsOfAnotherZone => north.as_ref().expect("just started").port(),
            _ => gateway.address.port(),
        };
        system.put_gateway(Some("west"), Some(port), tls, "running").await;
        let mut builder = Builder::new(&system).zone("east");
        if !matches!(self, Self::WantsACertificateThatWeHaveNot) {
            builder = builder.tls(&identity);
        }
        builder = match self {
            Self::NeverShakesHands | Self::IsSlow => builder.limits("connect_timeout = \"300ms\""),
            Self::IsAskedTooOften => {
                builder.limits("connect_timeout = \"500ms\"\nconnections = 100")
            }
            _ => builder,
        };
        let mut asked = builder.ready().await;
        let build = system.put_build(Some("west"), Some(&executor.worker(Some("west")))).await;
        let mut waiting = Vec::new();
        if matches!(self, Self::IsAskedTooOften) {
            // As many as may wait for a first byte; none gets one.
            for _ in 0..8 {
                let client = Client::ask(asked.address(), &build).await;
                waiting.push((client, gateway.accept().await));
            }
        }
        let mut client = Client::ask(asked.address(), &build).await;
        self.answer(&gateway, &identity).await;
        let is_hop = |line: &str| line.contains(" end=") && !line.contains("stream ended");
        let mut line = None;
        if !matches!(self, Self::IsSlow) {
            // Earlier than the executor's reply.
            line = Some(asked.logged("the hop that failed", is_hop).await);
        }
        // The executor itself has the log, so the client gets it.
        for _ in 0..=waiting.len() {
            executor.serve(b"log\n").await;
        }
        assert_eq!(client.text().await, "log\n", "{self:?}");
        let line = match line {
            Some(line) => line,
            None => asked.logged("the hop that failed", is_hop).await,
        };
        line.split_once(" end=").expect("why").1.trim_matches('"').to_owned()
    }

    /// Causes the failure of the peer, if starting the peer does not suffice.
    async fn answer(self, gateway: &Executor, identity: &Identity) {
        match self {
            Self::ClosesInTheHandshake => {
                drop(
                    within("a connection", gateway.listener.accept()).await.expect("a connection"),
                );
            }
            Self::ShowsAnothersCertificate => {
                let foreign = Authority::new();
                let other = foreign.identity("localhost");
                let acceptor = acceptor(&Identity { ca: identity.ca.clone(), ..other });
                let (stream, _) =
                    within("a connection", gateway.listener.accept()).await.expect("a connection");
                assert!(within("a refusal", acceptor.accept(stream)).await.is_err());
            }
            Self::CannotServe => gateway.serve(b"Internal streaming error\n").await,
            Self::ReportsALoop => {
                let acceptor = acceptor_with_protocols(identity, &["zuul-fingergw/1"]);
                let mut stream = gateway.accept_tls(&acceptor).await;
                let line =
                    "Internal streaming error: too many gateways have forwarded the request\r\n";
                stream.write(line.as_bytes()).await;
                stream.finish().await;
            }
            Self::Closes => gateway.accept().await.finish().await,
            Self::Resets => gateway.accept().await.reset(),
            _ => {}
        }
    }
}

/// Whether the value `end` matches the table's `row`, where `...` stands for text of the system or
/// the TLS library.
fn matches(end: &str, row: &str) -> bool {
    match row.strip_suffix("...") {
        None => end == row,
        Some(start) => end.strip_prefix(start).is_some_and(|cause| !cause.is_empty()),
    }
}

/// Returns the values of the table in `docs/operating.md`.
fn documented() -> Vec<String> {
    let (_, section) = OPERATING.split_once("## How a stream ended").expect("the section");
    let section = section.split("\n## ").next().expect("its text");
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `"));
    // Skip the table's head.
    let rows = rows.skip(1).map(|row| row.split_once('`').expect("a value").0.to_owned());
    rows.collect()
}

#[tokio::test]
async fn every_end_is_provoked_and_documented() {
    let rows = documented();
    let mut provoked = BTreeSet::new();
    let mut is_documented = |case: String, end: String| {
        let row = rows.iter().find(|row| matches(&end, row));
        let row = row.unwrap_or_else(|| panic!("{case}: docs/operating.md lacks {end:?}"));
        provoked.insert(row.clone());
    };
    for stream in Stream::ALL {
        is_documented(format!("{stream:?}"), stream.end().await);
    }
    for hop in Hop::ALL {
        is_documented(format!("{hop:?}"), hop.end().await);
    }
    let unprovoked: Vec<_> = rows.iter().filter(|row| !provoked.contains(*row)).collect();
    assert!(
        unprovoked.is_empty(),
        "docs/operating.md lists ends that do not occur: {unprovoked:?}"
    );
}
