//! Requests that get a one-line reply instead of a log.

use rustix::process::Signal;

use crate::support::certificates::Identity;
use crate::support::client::{Client, Ending};
use crate::support::executor::Executor;
use crate::support::gateway::{Builder, Gateway};
use crate::support::system::{System, request_path};
use crate::support::zookeeper::ZooKeeper;

const NOT_FOUND: &str = "Build not found\r\n";
const TOO_LONG: &str = "Internal streaming error: the request is too long\r\n";

/// Returns the reply to these bytes.
async fn answer(gateway: std::net::SocketAddr, request: &[u8]) -> String {
    let mut client = Client::connect(gateway).await;
    client.send(request).await;
    client.text().await
}

#[tokio::test]
async fn unknown_and_queued_builds_get_their_replies() {
    let system = System::new().await;
    let gateway = Builder::new(&system).ready().await;
    let waiting = system.put_build(Some("west"), None).await;
    let empty = "e0".repeat(16);
    system.put(&request_path(None, &empty), b"").await;
    for (build, expected) in [
        ("abcdef", NOT_FOUND),
        (waiting.as_str(), "Build did not start yet\r\n"),
        (empty.as_str(), NOT_FOUND),
    ] {
        assert_eq!(answer(gateway.address(), format!("{build}\n").as_bytes()).await, expected);
    }
}

#[tokio::test]
async fn invalid_build_request_does_not_affect_others() {
    let system = System::new().await;
    let gateway = Builder::new(&system).ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(Some("west"), Some(&executor.worker(None))).await;
    let worker = |worker: &str| format!("{{\"worker_info\": {worker}}}");
    let garbage = [
        "{".to_owned(),
        "[]".to_owned(),
        "\u{0}".to_owned(),
        " ".repeat(500_000),
        format!("[{}", "[".repeat(100_000)),
        worker("7"),
        worker("{\"hostname\": null, \"log_port\": 79}"),
        worker("{\"hostname\": \"localhost\"}"),
        worker("{\"hostname\": \"localhost\", \"log_port\": 0}"),
        worker("{\"hostname\": \"localhost\", \"log_port\": 70000}"),
        worker("{\"hostname\": \"localhost\", \"log_port\": \"79\"}"),
        worker("{\"hostname\": \"localhost\", \"log_port\": 79, \"zone\": []}"),
    ];
    for (number, garbage) in garbage.iter().enumerate() {
        let broken = format!("bad{number}");
        system.put(&request_path(Some("west"), &broken), garbage.as_bytes()).await;
        let text = answer(gateway.address(), format!("{broken}\n").as_bytes()).await;
        assert_eq!(text, "Internal streaming error: the build's entry cannot be read\r\n");
    }
    // The same build in another zone, with an invalid request there.
    system.put(&request_path(Some("a"), &build), b"garbage").await;
    system.put(&request_path(Some("z"), &build), b"garbage").await;
    let mut client = Client::ask(gateway.address(), &build).await;
    executor.serve(b"log\n").await;
    assert_eq!(client.text().await, "log\n");
}

/// ZooKeeper hangs, so an immediate reply shows that it was not queried.
#[tokio::test]
async fn invalid_build_id_is_not_looked_up() {
    let zookeeper = ZooKeeper::start().await;
    let system = System::on(zookeeper.clone()).await;
    let limits = "lookup_timeout = \"24h\"\nrequest_timeout = \"24h\"";
    let gateway = Builder::new(&system).zookeeper("session_timeout = \"60s\"").limits(limits);
    let gateway = gateway.ready().await;
    zookeeper.pause().await;
    let longest = [vec![b'g'; 1022], b"\n".to_vec()].concat();
    let requests: [&[u8]; 14] = [
        b"\n",
        b"\r\n",
        b" \n",
        b"x\n",
        b"ab cd\n",
        b"../ab\n",
        b"ab/cancel\n",
        b"ab@host\n",
        b"/W\r\n",
        b"ab\0\n",
        b"\x1b[2J\n",
        b"\xff\xfe\n",
        b"\xc3\xa9\n",
        &longest,
    ];
    for request in requests {
        let text = answer(gateway.address(), request).await;
        assert_eq!(text, NOT_FOUND, "{}", request.escape_ascii());
    }
    for length in [1023, 1024, 2000, 1_000_000] {
        assert_eq!(answer(gateway.address(), &vec![b'a'; length]).await, TOO_LONG, "{length}");
    }
    zookeeper.resume().await;
}

#[tokio::test]
async fn longest_request_has_1023_bytes() {
    let system = System::new().await;
    let gateway = Builder::new(&system).ready().await;
    // As long as is allowed, with blanks after the ID.
    let request = |length: usize| [b"a".to_vec(), vec![b' '; length - 2], b"\n".to_vec()].concat();
    assert_eq!(answer(gateway.address(), &request(1023)).await, NOT_FOUND);
    assert_eq!(answer(gateway.address(), &request(1024)).await, TOO_LONG);
}

/// Every form of a request for the build, also with each byte in a write of its own.
#[tokio::test]
async fn all_forms_of_a_valid_request_are_accepted() {
    let system = System::new().await;
    let gateway = Builder::new(&system).ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    for form in ["ID\n", "ID\r\n", "ID  \r\n", "/W ID\r\n", "/W  ID\n", "ID\nmore"] {
        let request = form.replace("ID", &build);
        for split in [false, true] {
            let mut client = Client::connect(gateway.address()).await;
            let step = if split { 1 } else { request.len() };
            for piece in request.as_bytes().chunks(step) {
                client.send(piece).await;
            }
            let mut stream = executor.accept().await;
            assert_eq!(stream.request, format!("{build}\n"));
            stream.write(b"log\n").await;
            stream.finish().await;
            assert_eq!(client.text().await, "log\n", "{form:?}");
        }
    }
}

/// All requests start concurrently, each cut at another place. A complete request between the
/// halves gives the gateway time to read the first halves alone.
#[tokio::test]
async fn request_split_at_any_byte_is_read() {
    let system = System::new().await;
    let gateway = Builder::new(&system).ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let request = format!("/W {build}\r\n");
    let mut clients = Vec::new();
    for cut in 0..request.len() {
        let mut client = Client::connect(gateway.address()).await;
        client.send(&request.as_bytes()[..cut]).await;
        clients.push((client, &request[cut..]));
    }
    assert_eq!(answer(gateway.address(), b"0\n").await, NOT_FOUND);
    for (client, rest) in &mut clients {
        client.send(rest.as_bytes()).await;
        let mut stream = executor.accept().await;
        assert_eq!(stream.request, format!("{build}\n"));
        stream.write(b"log\n").await;
        stream.finish().await;
        assert_eq!(client.text().await, "log\n", "{rest:?}");
    }
    assert_eq!(clients.len(), 37);
}

/// ZooKeeper's paths are case-sensitive, so a build ID is not normalized.
#[tokio::test]
async fn case_of_a_build_id_is_kept() {
    let system = System::new().await;
    let gateway = Builder::new(&system).ready().await;
    system.put(&request_path(None, "ABCdef"), b"{\"worker_info\": null}").await;
    assert_eq!(answer(gateway.address(), b"ABCdef\n").await, "Build did not start yet\r\n");
    assert_eq!(answer(gateway.address(), b"abcdef\n").await, NOT_FOUND);
}

/// A gateway with a plain listener and a TLS listener.
async fn two_doors(system: &System, limits: &str) -> (Gateway, Identity) {
    let identity = system.zookeeper.authority.identity("gateway");
    let builder = Builder::new(system).tls(&identity).limits(limits);
    (builder.listeners(&["", "tls = true"]).ready().await, identity)
}

#[tokio::test]
async fn request_must_arrive_within_a_deadline() {
    let system = System::new().await;
    let (gateway, identity) = two_doors(&system, "request_timeout = \"100ms\"").await;
    let expected = "Internal streaming error: no request within the time allowed\r\n";
    for start in ["", "abc"] {
        assert_eq!(answer(gateway.addresses[0], start.as_bytes()).await, expected);
        let mut client = Client::connect_tls(gateway.addresses[1], &identity).await;
        client.send(start.as_bytes()).await;
        assert_eq!(client.text().await, expected);
    }
}

#[tokio::test]
async fn peer_that_closes_without_a_request_gets_no_reply() {
    let system = System::new().await;
    let (gateway, identity) = two_doors(&system, "").await;
    for start in ["", "abc"] {
        let mut client = Client::connect(gateway.addresses[0]).await;
        client.send(start.as_bytes()).await;
        client.half_close().await;
        assert_eq!(client.rest().await, (Vec::new(), Ending::Clean));
        let mut client = Client::connect_tls(gateway.addresses[1], &identity).await;
        client.send(start.as_bytes()).await;
        client.half_close().await;
        let (reply, ending) = client.rest().await;
        assert!(reply.is_empty() && ending != Ending::Reset, "{reply:?}, {ending:?}");
    }
}

/// A reset at any moment of a request must not affect other requests.
#[tokio::test]
async fn resets_of_peers_do_not_disturb_others() {
    let system = System::new().await;
    let gateway = Builder::new(&system).ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    for request in ["", "abc", "abc\n", "..\n"] {
        let mut client = Client::connect(gateway.address()).await;
        client.send(request.as_bytes()).await;
        client.reset();
    }
    let mut client = Client::ask(gateway.address(), &build).await;
    executor.serve(b"log\n").await;
    assert_eq!(client.text().await, "log\n");
}

#[tokio::test]
async fn gateway_stops_after_many_requests() {
    let system = System::new().await;
    let mut gateway = Builder::new(&system).ready().await;
    for _ in 0..100 {
        assert_eq!(answer(gateway.address(), b"x\n").await, NOT_FOUND);
    }
    gateway.signal(Signal::TERM);
    assert!(gateway.exit().await.success());
}
