//! Access rules by network, tenant and certificate, on each listener. A denied build must be
//! indistinguishable from one that does not exist.

use std::net::Ipv4Addr;
use std::time::Duration;

use rustix::process::Signal;

use crate::support::admin::{metric, until_metric};
use crate::support::certificates::{Authority, Identity};
use crate::support::client::{Client, Ending};
use crate::support::executor::{Executor, serves};
use crate::support::gateway::{Builder, Gateway};
use crate::support::program::program;
use crate::support::proxy_header::v2;
use crate::support::reloadable::Reloadable;
use crate::support::running_stream::RunningStream;
use crate::support::system::{System, TENANT, request_path};
use crate::support::zookeeper::ZooKeeper;
use crate::support::{Duplex, within};

const NOT_FOUND: &str = "Build not found\r\n";
const NOT_STARTED: &str = "Build did not start yet\r\n";
const LOG: &str = "log\n";
const DENIED: &str = "zuul_fingergw_requests_total{result=\"denied\"}";
const MISSING: &str = "zuul_fingergw_requests_total{result=\"not_found\"}";

/// Client addresses.
const HOME: Ipv4Addr = Ipv4Addr::LOCALHOST;
const AWAY: Ipv4Addr = Ipv4Addr::new(127, 9, 0, 1);

/// A system with an executor for the builds of several tenants.
struct Stage {
    system: System,
    executor: Executor,
}

impl Stage {
    async fn new() -> Self {
        Self { system: System::new().await, executor: Executor::start().await }
    }

    /// Creates a build of `tenant`, on the executor unless it is `waiting`.
    async fn build(&self, tenant: Option<&str>, waiting: bool) -> String {
        let build = format!("{:032x}", fastrand::u128(..));
        let worker = self.executor.worker(None);
        let worker = (!waiting).then_some(&worker);
        self.system.place_build_of(tenant, None, &build, worker).await;
        build
    }

    /// Starts a gateway with these listeners.
    async fn gateway(&self, listeners: &[&str]) -> Gateway {
        self.gateway_of(&self.system.zookeeper.authority.identity("gateway"), listeners).await
    }

    async fn gateway_of(&self, identity: &Identity, listeners: &[&str]) -> Gateway {
        let builder = Builder::new(&self.system).tls(identity).listeners(listeners);
        let mut builder = builder.log("level = \"debug\"");
        builder.admin = true;
        builder.ready().await
    }

    /// Returns the reply to a request for `build`: the log, if the executor is asked for it.
    async fn reply_to<S: Duplex>(&self, mut client: Client<S>, build: &str) -> String {
        client.send(format!("{build}\r\n").as_bytes()).await;
        let serving = async {
            self.executor.serve(LOG.as_bytes()).await;
            std::future::pending::<()>().await;
        };
        tokio::select! {
            text = client.text() => text,
            () = serving => unreachable!("pending"),
        }
    }

    /// Like [`Self::reply_to`], for a plain client from `from` on one of the listeners.
    async fn reply_from(
        &self,
        gateway: &Gateway,
        listener: usize,
        from: Ipv4Addr,
        build: &str,
    ) -> String {
        let client = Client::connect_from(&from.to_string(), gateway.addresses[listener]).await;
        self.reply_to(client, build).await
    }

    /// Like [`Self::reply_to`], for a TLS client that presents `identity`.
    async fn reply_with_certificate(
        &self,
        gateway: &Gateway,
        identity: Option<&Identity>,
        build: &str,
    ) -> String {
        let trusted = self.system.zookeeper.authority.identity("any client");
        let address = gateway.address();
        let client = Client::try_connect_tls(address, "localhost", &trusted, identity).await;
        self.reply_to(client.expect("a TLS connection"), build).await
    }
}

/// Waits for the log line of a denial with this reason.
async fn denied_because(gateway: &mut Gateway, build: &str, reason: &str) {
    let wanted = format!("{build}: denied: {reason}");
    let line = gateway.logged(&wanted, |line| line.contains(&wanted)).await;
    assert!(line.contains("DEBUG"), "a client must not be able to flood the log: {line}");
}

#[tokio::test]
async fn rule_by_network() {
    let stage = Stage::new().await;
    let rule = "[[listener.allow]]\nnetworks = [\"192.0.2.0/24\", \"127.0.0.1\"]";
    let mut gateway = stage.gateway(&[rule]).await;
    let build = stage.build(Some("a"), false).await;
    assert_eq!(stage.reply_from(&gateway, 0, HOME, &build).await, LOG);
    assert_eq!(stage.reply_from(&gateway, 0, AWAY, &build).await, NOT_FOUND);
    denied_because(&mut gateway, &build, "no rule allows this address").await;
    until_metric(&gateway, DENIED, 1.0).await;
    assert_eq!(metric(&gateway, MISSING).await, 0.0);
    assert_eq!(stage.reply_from(&gateway, 0, AWAY, "abcdef").await, NOT_FOUND);
    until_metric(&gateway, MISSING, 1.0).await;
    assert_eq!(metric(&gateway, DENIED).await, 1.0);
}

/// Also applies if the socket reports an IPv4-mapped IPv6 address.
#[tokio::test]
async fn rule_by_ipv4_network_on_a_dual_stack_listener() {
    let stage = Stage::new().await;
    let rule = "address = \"[::]:0\"\n[[listener.allow]]\nnetworks = [\"127.0.0.1\"]";
    let gateway = stage.gateway(&[rule]).await;
    let build = stage.build(Some("a"), false).await;
    let address = (HOME, gateway.port()).into();
    let client = Client::connect_from(&HOME.to_string(), address).await;
    assert_eq!(stage.reply_to(client, &build).await, LOG);
    let client = Client::connect_from(&AWAY.to_string(), address).await;
    assert_eq!(stage.reply_to(client, &build).await, NOT_FOUND);
}

#[tokio::test]
async fn rule_by_tenant() {
    let stage = Stage::new().await;
    let rule = "[[listener.allow]]\ntenants = [\"open one\", \"open two\"]";
    let mut gateway = stage.gateway(&[rule]).await;
    for tenant in ["open one", "open two"] {
        let build = stage.build(Some(tenant), false).await;
        assert_eq!(stage.reply_from(&gateway, 0, HOME, &build).await, LOG);
    }
    for (tenant, reason) in [
        (Some("secret"), "no rule allows tenant secret"),
        (Some("open ONE"), "no rule allows tenant open ONE"),
        (None, "no rule allows a build without a tenant"),
    ] {
        let build = stage.build(tenant, false).await;
        assert_eq!(stage.reply_from(&gateway, 0, HOME, &build).await, NOT_FOUND);
        denied_because(&mut gateway, &build, reason).await;
    }
    // Waiting builds, and build requests that cannot be read, are hidden as well.
    let waiting = stage.build(Some("open one"), true).await;
    assert_eq!(stage.reply_from(&gateway, 0, HOME, &waiting).await, NOT_STARTED);
    let waiting = stage.build(Some("secret"), true).await;
    assert_eq!(stage.reply_from(&gateway, 0, HOME, &waiting).await, NOT_FOUND);
    stage.system.put(&request_path(None, "bad"), b"{").await;
    assert_eq!(stage.reply_from(&gateway, 0, HOME, "bad").await, NOT_FOUND);
    until_metric(&gateway, DENIED, 5.0).await;
}

#[tokio::test]
async fn rule_by_certificate() {
    let stage = Stage::new().await;
    let rule = "tls = true\nclient_certificate = \"optional\"\n\
                [[listener.allow]]\nclients = [\"gw.east.example.org\", \"*.west.example.org\"]";
    let mut gateway = stage.gateway(&[rule]).await;
    let build = stage.build(Some("a"), false).await;
    let authority = &stage.system.zookeeper.authority;
    for identity in [
        authority.identity_only_for("gw.east.example.org"),
        authority.identity("GW.east.example.org"),
        authority.identity_only_for("gw1.west.example.org"),
        authority.common_name_only("gw.east.example.org"),
        authority.common_name_only("gw2.west.example.org"),
    ] {
        assert_eq!(stage.reply_with_certificate(&gateway, Some(&identity), &build).await, LOG);
    }
    let other = authority.identity_with("gw.east.example.org", |params| {
        let name = "other.example.org".try_into().expect("a name");
        params.subject_alt_names = vec![rcgen::SanType::DnsName(name)];
    });
    for (identity, reason) in [
        (None, "no rule allows a client without a certificate's name"),
        (Some(authority.identity_only_for("a.gw.west.example.org")), "no rule allows the client a"),
        (Some(authority.common_name_only("other")), "no rule allows the client other"),
        // A common name does not count if there is an alternative name.
        (Some(other), "no rule allows the client other.example.org"),
    ] {
        assert_eq!(
            stage.reply_with_certificate(&gateway, identity.as_ref(), &build).await,
            NOT_FOUND
        );
        denied_because(&mut gateway, &build, reason).await;
    }
}

/// Common names are ignored as they are for gateways that this one connects to.
#[tokio::test]
async fn common_name_beside_dns_names_does_not_match() {
    let stage = Stage::new().await;
    let rule = "tls = true\n[[listener.allow]]\nclients = [\"gw.example.org\"]";
    let build = stage.build(Some("a"), false).await;
    let authority = &stage.system.zookeeper.authority;
    let mut builder =
        Builder::new(&stage.system).tls(&authority.identity("gateway")).listeners(&[rule]);
    builder.common_name_fallback = false;
    let gateway = builder.ready().await;
    let (common, named) =
        (authority.common_name_only("gw.example.org"), authority.identity("gw.example.org"));
    assert_eq!(stage.reply_with_certificate(&gateway, Some(&common), &build).await, NOT_FOUND);
    assert_eq!(stage.reply_with_certificate(&gateway, Some(&named), &build).await, LOG);

    let bound = Authority::constrained("example.org");
    let own = bound.identity_only_for("own.example.org");
    let gateway = stage.gateway_of(&own, &[rule]).await;
    for (identity, expected) in [
        (bound.common_name_only("gw.example.org"), NOT_FOUND),
        (bound.identity_only_for("gw.example.org"), LOG),
    ] {
        let address = gateway.address();
        let client = Client::try_connect_tls(address, "own.example.org", &own, Some(&identity));
        let client = client.await.expect("a TLS connection");
        assert_eq!(stage.reply_to(client, &build).await, expected);
    }
}

/// On the listener for other zones, peer gateways may request every build; they are also identified
/// by a resumed session.
#[tokio::test]
async fn rules_apply_to_gateways_of_other_zones() {
    let stage = Stage::new().await;
    let authority = &stage.system.zookeeper.authority;
    let rule = "tls = true\n[[listener.allow]]\nclients = [\"gw.east.example.org\"]";
    let mut inner = Builder::new(&stage.system).zone("west").tls(&authority.identity("gateway"));
    inner.admin = true;
    let mut inner = inner.log("level = \"debug\"").listeners(&[rule]).ready().await;
    inner.until_running(&stage.system).await;
    let build = format!("{:032x}", fastrand::u128(..));
    let worker = stage.executor.worker(Some("west"));
    stage.system.place_build_of(Some("a"), Some("west"), &build, Some(&worker)).await;
    // On the listener for clients the tenant decides.
    let outer = async |name: &str, tenant: &str| {
        let rule = format!("[[listener.allow]]\ntenants = [\"{tenant}\"]");
        Builder::new(&stage.system)
            .zone("east")
            .tls(&authority.identity(name))
            .listeners(&[&rule])
            .ready()
            .await
    };
    let east = outer("gw.east.example.org", "a").await;
    for _ in 0..3 {
        assert_eq!(stage.reply_from(&east, 0, HOME, &build).await, LOG);
    }
    let resumed = "zuul_fingergw_tls_sessions_resumed_total{direction=\"inbound\"}";
    assert!(metric(&inner, resumed).await >= 1.0);

    let north = outer("gw.north.example.org", "a").await;
    assert_eq!(
        stage.reply_from(&north, 0, HOME, &build).await,
        NOT_FOUND,
        "the reply of the inner gateway"
    );
    denied_because(&mut inner, &build, "no rule allows the client gw.north.example.org").await;
    until_metric(&inner, DENIED, 1.0).await;
    let closed = outer("gw.east.example.org", "b").await;
    assert_eq!(stage.reply_from(&closed, 0, HOME, &build).await, NOT_FOUND);
    assert_eq!(metric(&inner, DENIED).await, 1.0, "no request was sent");
}

/// Each listener has its own rules. A rule applies if all of its conditions do; a listener allows a
/// request if one of its rules applies.
#[tokio::test]
async fn each_listener_has_its_rules() {
    let stage = Stage::new().await;
    let strict = "[[listener.allow]]\nnetworks = [\"127.0.0.1\"]\ntenants = [\"a\"]\n\
                  [[listener.allow]]\ntenants = [\"b\"]";
    let gateway = stage.gateway(&[strict, "", "[[listener.allow]]\ntenants = [\"c\"]"]).await;
    let builds = [
        stage.build(Some("a"), false).await,
        stage.build(Some("b"), false).await,
        stage.build(Some("c"), false).await,
    ];
    for (listener, from, expected) in [
        (0, HOME, [LOG, LOG, NOT_FOUND]),
        (0, AWAY, [NOT_FOUND, LOG, NOT_FOUND]),
        (1, HOME, [LOG, LOG, LOG]),
        (1, AWAY, [LOG, LOG, LOG]),
        (2, HOME, [NOT_FOUND, NOT_FOUND, LOG]),
    ] {
        for (build, expected) in builds.iter().zip(expected) {
            let reply = stage.reply_from(&gateway, listener, from, build).await;
            assert_eq!(reply, expected, "listener {listener}, {from}");
        }
    }
}

/// Certificate name, network and tenant in one rule.
#[tokio::test]
async fn network_certificate_and_tenant_combine() {
    let stage = Stage::new().await;
    let rule = "tls = true\n[[listener.allow]]\nclients = [\"one\"]\ntenants = [\"a\"]\n";
    let authority = &stage.system.zookeeper.authority;
    let (one, two) = (authority.identity("one"), authority.identity("two"));
    let (a, b) = (stage.build(Some("a"), false).await, stage.build(Some("b"), false).await);
    let here = stage.gateway(&[&format!("{rule}networks = [\"127.0.0.1\"]")]).await;
    assert_eq!(stage.reply_with_certificate(&here, Some(&one), &a).await, LOG);
    assert_eq!(stage.reply_with_certificate(&here, Some(&two), &a).await, NOT_FOUND);
    assert_eq!(stage.reply_with_certificate(&here, Some(&one), &b).await, NOT_FOUND);
    let elsewhere = stage.gateway(&[&format!("{rule}networks = [\"10.0.0.0/8\"]")]).await;
    assert_eq!(stage.reply_with_certificate(&elsewhere, Some(&one), &a).await, NOT_FOUND);
}

/// Returns everything received in reply to a request for `build`, and how it ended.
async fn answer<S: Duplex>(mut client: Client<S>, build: &str) -> (Vec<u8>, Ending) {
    client.send(format!("{build}\r\n").as_bytes()).await;
    client.rest().await
}

#[tokio::test]
async fn denied_build_gets_the_reply_of_an_unknown_one() {
    let stage = Stage::new().await;
    let rule = "[[listener.allow]]\ntenants = [\"a\"]";
    let gateway = stage.gateway(&[rule, &format!("tls = true\n{rule}")]).await;
    let identity = stage.system.zookeeper.authority.identity("client");
    let denied = stage.build(Some("b"), false).await;
    let (plain, tls) = (gateway.addresses[0], gateway.addresses[1]);
    let expected = (NOT_FOUND.as_bytes().to_vec(), Ending::Clean);
    // Request each build often, so that the denied build would be cached if it were allowed.
    for build in [denied.as_str(), "abcdef"].repeat(10) {
        for secure in [false, true] {
            let asked = std::time::Instant::now();
            let reply = match secure {
                false => answer(Client::connect(plain).await, build).await,
                true => answer(Client::connect_tls(tls, &identity).await, build).await,
            };
            assert_eq!(reply, expected);
            // Never earlier than the time step that hides how long the lookup takes.
            assert!(asked.elapsed() >= Duration::from_millis(50), "{build}");
        }
    }
    until_metric(&gateway, DENIED, 20.0).await;
    until_metric(&gateway, MISSING, 20.0).await;
}

/// A cached build is found without ZooKeeper. A denied request for it must get the reply of an
/// unknown build, at the same time: here, that ZooKeeper does not answer.
#[tokio::test]
async fn denied_build_takes_as_long_as_an_unknown_one() {
    let zookeeper = ZooKeeper::start().await;
    let system = System::on(zookeeper.clone()).await;
    let stage = Stage { system, executor: Executor::start().await };
    let rule = "[[listener.allow]]\nnetworks = [\"127.0.0.1\"]\ntenants = [\"a\"]";
    let builder = Builder::new(&stage.system).listeners(&[rule]).log("level = \"debug\"");
    let mut gateway = builder.limits("lookup_timeout = \"2s\"").ready().await;
    let build = stage.build(Some("a"), false).await;
    for _ in 0..2 {
        assert_eq!(stage.reply_from(&gateway, 0, HOME, &build).await, LOG);
    }
    gateway.logged("the build to be cached", |line| line.contains("build cached")).await;
    assert_eq!(stage.reply_from(&gateway, 0, AWAY, &build).await, NOT_FOUND);
    assert_eq!(stage.reply_from(&gateway, 0, HOME, &build).await, LOG, "cached with its tenant");

    zookeeper.pause().await;
    assert_eq!(stage.reply_from(&gateway, 0, HOME, &build).await, LOG);
    let hangs = "Internal streaming error: ZooKeeper cannot be reached\r\n";
    assert_eq!(stage.reply_from(&gateway, 0, AWAY, &build).await, hangs);
    assert_eq!(stage.reply_from(&gateway, 0, AWAY, "abcdef").await, hangs);
    zookeeper.resume().await;
}

/// A build request that exists and that ZooKeeper does not let the gateway read is an error of this
/// build, not of ZooKeeper: allowed clients get the error, denied clients get "not found".
#[tokio::test]
async fn build_request_that_may_not_be_read_is_an_error() {
    let stage = Stage::new().await;
    let by_tenant = "[[listener.allow]]\ntenants = [\"a\"]";
    let by_network = "[[listener.allow]]\nnetworks = [\"127.0.0.1\"]";
    let mut gateway = stage.gateway(&["", by_tenant, by_network]).await;
    let build = stage.build(Some("a"), false).await;
    stage.system.hide(&request_path(None, &build)).await;
    let unreadable = "Internal streaming error: the build's entry cannot be read\r\n";
    for (listener, from, expected) in
        [(0, HOME, unreadable), (1, HOME, NOT_FOUND), (2, HOME, unreadable), (2, AWAY, NOT_FOUND)]
    {
        let answer = stage.reply_from(&gateway, listener, from, &build).await;
        assert_eq!(answer, expected, "listener {listener}, {from}");
    }
    denied_because(&mut gateway, &build, "no rule allows a build without a tenant").await;
    // Other builds are not affected.
    let other = stage.build(Some("a"), false).await;
    assert_eq!(stage.reply_from(&gateway, 1, HOME, &other).await, LOG);
}

/// Rules apply to the client address in the PROXY header.
#[tokio::test]
async fn rules_apply_to_the_client_that_a_proxy_announces() {
    let stage = Stage::new().await;
    let listener = "proxy_protocol = [\"127.0.0.1\"]\n\
                    [[listener.allow]]\nnetworks = [\"192.0.2.0/24\"]";
    let gateway = stage.gateway(&[listener]).await;
    let build = stage.build(Some("a"), false).await;
    for (client, expected) in [([192, 0, 2, 1], LOG), ([198, 51, 100, 1], NOT_FOUND)] {
        let mut proxy = Client::connect(gateway.address()).await;
        proxy.send(&v2(client.into(), b"")).await;
        assert_eq!(stage.reply_to(proxy, &build).await, expected);
    }
    // The proxy's own address is not allowed, and other clients may not send a PROXY header.
    let mut proxy = Client::connect(gateway.address()).await;
    proxy.send(b"PROXY UNKNOWN\r\n").await;
    assert_eq!(stage.reply_to(proxy, &build).await, NOT_FOUND);
    let mut forger = Client::connect_from(&AWAY.to_string(), gateway.address()).await;
    forger.send(b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n").await;
    assert_eq!(stage.reply_to(forger, &build).await, NOT_FOUND);
}

#[tokio::test]
async fn reload_changes_rules_for_new_sessions() {
    let system = System::new().await;
    let rule = "[[listener.allow]]\ntenants = [\"tenant-one\"]";
    let served = Reloadable::start(Builder::new(&system).listeners(&[rule])).await;
    let address = served.gateway.address();
    let mut stream = RunningStream::start(&system, address).await;
    serves(&system, address).await;

    served.edit(&format!("\"{TENANT}\""), "\"other\"");
    assert_eq!(served.reloads().await, ["changed: listener.allow"]);
    let build = system.put_build(None, None).await;
    assert_eq!(Client::ask(address, &build).await.text().await, NOT_FOUND);
    stream.pass("for whom it was allowed\n").await;

    served.edit("tenants = [\"other\"]", "clients = [\"gw\"]");
    let refused = program(&["reload"], &served.config).await;
    let why = "this listener has no TLS";
    assert!(refused.code == Some(1) && refused.stderr.contains(why), "{}", refused.stderr);
    assert_eq!(Client::ask(address, &build).await.text().await, NOT_FOUND);

    served.edit("[[listener.allow]]\nclients = [\"gw\"]", "proxy_protocol = [\"127.0.0.2\"]");
    assert_eq!(served.reloads().await, ["changed: listener.proxy_protocol; listener.allow"]);
    assert_eq!(Client::ask(address, &build).await.text().await, NOT_STARTED);
    let mut proxy = Client::connect_from("127.0.0.2", address).await;
    proxy.send(format!("PROXY UNKNOWN\r\n{build}\r\n").as_bytes()).await;
    assert_eq!(proxy.text().await, NOT_STARTED);
    stream.finish().await;
}

/// A listener without rules beside one with rules is usually a mistake.
#[tokio::test]
async fn listener_without_rules_beside_others_is_a_warning() {
    let system = System::new().await;
    let builder = Builder::new(&system).listeners(&["[[listener.allow]]\ntenants = [\"a\"]", ""]);
    let config = builder.write();
    let checked = program(&["check"], &config).await;
    assert_eq!(checked.code, Some(0), "{}", checked.stderr);
    let warning =
        "has rules and the one on 127.0.0.1:0 has none: every client of that one can read";
    assert!(checked.stderr.contains(warning), "{}", checked.stderr);
    let mut gateway = builder.ready().await;
    let line = gateway.logged("the line", |line| line.contains(warning)).await;
    assert!(line.contains("WARN"), "{line}");
    gateway.signal(Signal::TERM);
    within("the gateway to exit", gateway.exit()).await;
}
