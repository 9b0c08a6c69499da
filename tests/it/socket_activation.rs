//! Sockets that another process holds, as systemd does: a restart refuses no connection.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener as StdListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::process::Stdio;

use rustix::process::Signal;
use socket2::{Domain, Socket, Type};
use tokio::net::TcpStream;
use tokio::process::Command;

use crate::support::client::Client;
use crate::support::continuous_clients::ContinuousClients;
use crate::support::executor::{Executor, answer, serves, unreachable};
use crate::support::gateway::{BINARY, Builder, Gateway, wrap};
use crate::support::running_stream::RunningStream;
use crate::support::system::System;
use crate::support::within;
use crate::support::zookeeper::reserve_port;

/// Passes its standard input on as the only socket of sd_listen_fds(3) and execs its arguments.
/// LISTEN_PID must be the process's own ID, which is unknown before it runs, hence the shell.
const PASSING: [&str; 4] = [
    "sh",
    "-c",
    "exec 3<&0 </dev/null; export LISTEN_PID=${OTHER-$$} LISTEN_FDS=1 LISTEN_FDNAMES=finger; exec \"$@\"",
    "sh",
];

fn passing(command: &mut Command, socket: impl Into<OwnedFd>) {
    wrap(command, &PASSING);
    command.stdin(Stdio::from(socket.into()));
}

/// Returns a listening socket of this process, and its address.
fn socket() -> (StdListener, SocketAddr) {
    let socket = StdListener::bind(("127.0.0.1", 0)).expect("a socket");
    let address = socket.local_addr().expect("its address");
    (socket, address)
}

/// Returns a gateway's builder that listens on `address`.
fn at(system: &System, address: SocketAddr) -> Builder {
    let line = format!("address = \"{address}\"");
    Builder::new(system).listeners(&[&line])
}

async fn with_socket(system: &System, socket: &StdListener) -> Gateway {
    let builder = at(system, socket.local_addr().expect("its address"));
    let socket = socket.try_clone().expect("a copy");
    let mut gateway = builder.start_changed(|command| passing(command, socket)).await;
    gateway.ready().await;
    gateway
}

/// A restart of the gateway. Clients that connect continuously and one that connects while no
/// gateway runs are all served; a running stream has the grace period.
#[tokio::test]
async fn restart_with_socket_activation_rejects_no_client() {
    let system = System::new().await;
    let (socket, address) = socket();
    let mut first = with_socket(&system, &socket).await;
    let stream = RunningStream::start(&system, address).await;

    let mut clients = ContinuousClients::start(&system, address).await;

    first.signal(Signal::TERM);
    stream.finish().await;
    assert!(first.exit().await.success());
    // No gateway runs that could accept this connection.
    let mut between = Client::ask(address, &clients.build).await;
    let mut second = with_socket(&system, &socket).await;
    assert_eq!(between.text().await, ContinuousClients::LOG);
    clients.until_more_served().await;
    clients.stop().await;
    second.signal(Signal::TERM);
    assert!(second.exit().await.success());
    // Only this process holds the socket now.
    TcpStream::connect(address).await.expect("the socket still listens");
}

/// Clients that wait for a restart and whose build is in another zone, where its executor cannot be
/// reached: when the requests arrive, the gateways of that zone have not been read yet.
#[tokio::test]
async fn requests_wait_until_gateways_of_other_zones_are_known() {
    const CLIENTS: usize = 20;
    let system = System::new().await;
    // Reading these takes a moment.
    for _ in 0..50 {
        system.put_component("executor", 38).await;
    }
    let west = Executor::start().await;
    system.put_gateway(Some("west"), Some(west.address.port()), false, "running").await;
    let worker = unreachable(Some("west")).await;
    let build = system.put_build(Some("west"), Some(&worker)).await;
    let (socket, address) = socket();
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        clients.push(Client::ask(address, &build).await);
    }
    let serving = tokio::spawn(async move {
        loop {
            let (stream, _) = west.listener.accept().await.expect("a connection");
            tokio::spawn(answer(stream, b"log\n"));
        }
    });
    let lines = format!("address = \"{address}\"");
    let builder = Builder::new(&system).zone("east").listeners(&[&lines]);
    let _gateway = builder.start_changed(|command| passing(command, socket)).await;
    for mut client in clients {
        assert_eq!(client.text().await, "log\n");
    }
    serving.abort();
}

/// The real tool, with two listeners and the admin listener; the connection that starts the gateway
/// is served. A further listener without a socket is bound as usual.
#[tokio::test]
async fn sockets_from_systemd_are_used() {
    let system = System::new().await;
    let ports = [reserve_port(), reserve_port()];
    let [plain, tls] = ports.each_ref().map(|(port, _)| format!("127.0.0.1:{port}"));
    let identity = system.zookeeper.authority.identity("localhost");
    let lines = [format!("address = \"{plain}\""), format!("address = \"{tls}\"\ntls = true")];
    let builder = Builder::new(&system).tls(&identity);
    let builder = builder.listeners(&[&lines[0], &lines[1], ""]);
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;

    let wrapper = ["systemd-socket-activate", "-l", &plain, "-l", &tls, "-E", "NOTIFY_SOCKET"];
    let wrapper = [&wrapper[..], &["--fdname=finger:finger-tls"]].concat();
    let starting = builder.start_changed(|command| wrap(command, &wrapper));
    let asking = within("a socket", async {
        // The tool does not report when it listens.
        while TcpStream::connect(&plain).await.is_err() {
            tokio::task::yield_now().await;
        }
        Client::ask(plain.parse().expect("an address"), &build).await
    });
    let (mut gateway, mut first) = tokio::join!(starting, asking);
    gateway.ready().await;
    executor.serve(b"worth starting for\n").await;
    assert_eq!(first.text().await, "worth starting for\n");
    assert_eq!(gateway.addresses.len(), 3);
    assert_eq!(gateway.addresses[0].to_string(), plain);
    assert_eq!(gateway.addresses[1].to_string(), tls);
    serves(&system, gateway.addresses[0]).await;
    serves(&system, gateway.addresses[2]).await;
    let client = &system.zookeeper.identity;
    RunningStream::start_tls(&system, gateway.addresses[1], client).await.finish().await;
    let passed = |line: &&String| line.contains("using socket from the service manager");
    let log = gateway.log();
    let names: Vec<_> = log.iter().filter(passed).collect();
    assert!(names.len() == 2 && names[1].contains("finger-tls"), "{names:?}");
}

/// `ListenStream=` with only a port is 0.0.0.0 if IPv6 is disabled, and must match the listener
/// `[::]`.
#[tokio::test]
async fn listener_without_ipv6_falls_back_to_ipv4() {
    let system = System::new().await;
    let socket = StdListener::bind(("0.0.0.0", 0)).expect("a socket");
    let port = socket.local_addr().expect("its address").port();
    let builder = at(&system, SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)));
    let mut gateway = builder.start_changed(|command| passing(command, socket)).await;
    gateway.ready().await;
    assert_eq!(gateway.addresses[0].to_string(), format!("0.0.0.0:{port}"));
    serves(&system, SocketAddr::from((Ipv4Addr::LOCALHOST, port))).await;
}

/// Sockets passed to another process, whose environment this one has inherited.
#[tokio::test]
async fn sockets_for_another_process_are_ignored() {
    let system = System::new().await;
    let (socket, address) = socket();
    let copy = socket.try_clone().expect("a copy");
    let builder = Builder::new(&system);
    let change = |command: &mut Command| {
        passing(command, copy);
        command.env("OTHER", "1");
    };
    let mut gateway = builder.start_changed(change).await;
    gateway.ready().await;
    assert_ne!(gateway.address(), address);
    serves(&system, gateway.address()).await;
}

/// Starts the gateway with `socket`, which must fail, and returns its output.
async fn refuses(builder: Builder, socket: impl Into<OwnedFd>) -> String {
    let config = builder.write();
    let mut command = Command::new(BINARY);
    command.args(["-f", "-c"]).arg(&config);
    passing(&mut command, socket);
    let output = within("it to end", command.output()).await.expect("its output");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

#[tokio::test]
async fn unusable_sockets_are_errors() {
    let system = System::new().await;
    let (elsewhere, address) = socket();
    let output = refuses(Builder::new(&system), elsewhere).await;
    let error =
        format!("passes a socket on {address} (finger), and no listener is configured there");
    assert!(output.contains(&error) && output.contains("(configured: 127.0.0.1:0)"), "{output}");

    let builder = Builder::new(&system);
    let path = builder.directory().join("unix");
    let unix = UnixListener::bind(path).expect("a unix socket");
    let udp = UdpSocket::bind(("127.0.0.1", 0)).expect("a UDP socket");
    let silent = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    let file = std::fs::File::open("/dev/null").expect("a file");
    let kinds: [OwnedFd; 4] = [unix.into(), udp.into(), silent.into(), file.into()];
    for kind in kinds {
        let output = refuses(Builder::new(&system), kind).await;
        assert!(
            output.contains(
                "descriptor 3 (finger) from the service manager is not a listening TCP socket"
            ),
            "{output}"
        );
    }
}
