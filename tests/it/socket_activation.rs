//! Sockets that somebody else holds, as systemd does: a restart refuses nobody.

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

/// Hands its standard input on as the one socket of sd_listen_fds(3), and runs its arguments in its
/// place. A process cannot know its child's id before that runs, hence the shell.
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

/// A listening socket of this process, and its address.
fn socket() -> (StdListener, SocketAddr) {
    let socket = StdListener::bind(("127.0.0.1", 0)).expect("a socket");
    let address = socket.local_addr().expect("its address");
    (socket, address)
}

/// A gateway that is to listen on `address`.
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

/// Broken: nothing but a gateway restarted. Clients that come all the time, and one that comes when
/// there is none at all, are all served; a stream that runs has the time of the grace.
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
    // Nobody is there to take this one.
    let mut between = Client::ask(address, &clients.build).await;
    let mut second = with_socket(&system, &socket).await;
    assert_eq!(between.text().await, ContinuousClients::LOG);
    clients.until_more_served().await;
    clients.stop().await;
    second.signal(Signal::TERM);
    assert!(second.exit().await.success());
    // What is left of it is ours alone.
    TcpStream::connect(address).await.expect("the socket listens on");
}

/// Clients that wait for a restart, and whose build is in another zone, where its executor cannot be
/// dialed: the gateways of that zone have not been read when the requests are.
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

/// The real tool: two sockets and that of health and metrics; the connection that has it start the
/// gateway is served. A listener beside them that gets no socket is bound as usual.
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
        // Nothing tells when it listens.
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

/// `ListenStream=` with no more than a port is 0.0.0.0 where IPv6 is switched off, and the listener
/// `[::]` all the same.
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

/// Passed to somebody else, whose environment we have.
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

/// How it ends when it is passed `socket`, and what it says of it.
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
    let fault =
        format!("passes a socket on {address} (finger), and no listener is configured there");
    assert!(output.contains(&fault) && output.contains("(configured: 127.0.0.1:0)"), "{output}");

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
