//! Limits that change while connections are open.

use crate::support::client::{Client, Ending, client_hello};
use crate::support::executor::Executor;
use crate::support::gateway::Builder;
use crate::support::limits::{TOO_MANY, ask_while_it_hangs, begin_handshakes};
use crate::support::reloadable::Reloadable;
use crate::support::running_stream::RunningStream;
use crate::support::system::System;
use crate::support::zookeeper::ZooKeeper;

#[tokio::test]
async fn reload_changes_limits_per_address() {
    let system = System::new().await;
    let limits = "connections_per_address = 1\nexempt_networks = []\nipv6_prefix = 64";
    let served = Reloadable::start(Builder::new(&system).limits(limits)).await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let ask = async || Client::ask_from("127.0.0.2", served.address(), &build).await;
    let refused = async || ask().await.text().await == TOO_MANY;
    let mut streams = Vec::new();
    let mut begins = async || {
        let mut client = ask().await;
        let stream = executor.begin(&mut client).await;
        streams.push((client, stream));
    };
    begins().await;
    assert!(refused().await);
    served.edit("connections_per_address = 1", "connections_per_address = 2");
    assert_eq!(served.reloads().await, ["changed: limits.connections_per_address"]);
    begins().await;
    assert!(refused().await);
    served.edit("exempt_networks = []", "exempt_networks = [\"127.0.0.0/8\"]");
    assert_eq!(served.reloads().await, ["changed: limits.exempt_networks"]);
    begins().await;
    begins().await;
    // Connections that were not counted when they were accepted are not counted when they close.
    served.edit("exempt_networks = [\"127.0.0.0/8\"]", "exempt_networks = []");
    served.edit("ipv6_prefix = 64", "ipv6_prefix = 56");
    let changed = ["changed: limits.ipv6_prefix; limits.exempt_networks"];
    assert_eq!(served.reloads().await, changed);
    assert!(refused().await);
    for (mut client, stream) in streams.drain(2..) {
        stream.finish().await;
        assert_eq!(client.text().await, "");
    }
    assert!(refused().await);
    for (client, stream) in &mut streams {
        stream.write(b"line\n").await;
        client.expect(b"line\n").await;
    }
}

#[tokio::test]
async fn reload_changes_limits_of_new_streams() {
    let system = System::new().await;
    let limits = "stream_idle = \"never\"\nstream_total = \"never\"";
    let served = Reloadable::start(Builder::new(&system).limits(limits)).await;
    let mut old = RunningStream::start(&system, served.address()).await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let is_cut = async || {
        let mut client = Client::ask(served.address(), &build).await;
        let _stream = executor.begin(&mut client).await;
        assert_eq!(client.rest().await, (Vec::new(), Ending::Reset));
    };
    served.edit("stream_idle = \"never\"", "stream_idle = \"100ms\"");
    assert_eq!(served.reloads().await, ["changed: limits.stream_idle"]);
    is_cut().await;
    served.edit("stream_idle = \"100ms\"", "");
    served.edit("stream_total = \"never\"", "stream_total = \"3s\"");
    assert_eq!(served.reloads().await, ["changed: limits.stream_idle; limits.stream_total"]);
    is_cut().await;
    old.pass("as it began\n").await;
    old.finish().await;
}

#[tokio::test]
async fn reload_changes_limits_of_handshakes_and_lookups() {
    let zookeeper = ZooKeeper::start().await;
    let system = System::on(zookeeper.clone()).await;
    let identity = system.zookeeper.authority.identity("localhost");
    let limits = "handshakes = 2\nlookups = 1\nhandshake_timeout = \"1h\"\nlookup_timeout = \"1h\"";
    let builder = Builder::new(&system).zookeeper("session_timeout = \"60s\"").limits(limits);
    let builder = builder.tls(&identity).listeners(&["", "tls = true"]);
    let served = Reloadable::start(builder).await;
    let secure = served.gateway.addresses[1];
    zookeeper.pause().await;
    let hello = client_hello(&identity);
    let first = begin_handshakes("127.0.0.2", secure, &hello, 3, 1).await;
    let waiting = ask_while_it_hangs(served.address(), 0..3, 1).await;
    served.edit("handshakes = 2", "handshakes = 4");
    served.edit("lookups = 1", "lookups = 3");
    assert_eq!(served.reloads().await, ["changed: limits.handshakes; limits.lookups"]);
    let second = begin_handshakes("127.0.0.2", secure, &hello, 3, 2).await;
    assert_eq!((first.len(), second.len()), (1, 2));
    let more = ask_while_it_hangs(served.address(), 3..8, 2).await;
    zookeeper.resume().await;
    let mut answers = waiting.join_all().await;
    answers.extend(more.join_all().await);
    assert_eq!(answers, ["Build not found\r\n"; 3]);
}
