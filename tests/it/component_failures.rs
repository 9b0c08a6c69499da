//! Failures of real components: processes that are killed or stopped, a link that loses all
//! packets, a full disk. Each test documents what fails, what a normal client sees meanwhile, and
//! how the system recovers. Failures that need no process or link of their own are tested with
//! their subject: `limits` (descriptors), `shutdown`, `zookeeper_outages`, `routing` (hops that
//! refuse, reset or are silent).

use std::fs;
use std::process::Stdio;

use nix::sched::CloneFlags;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStderr, ChildStdin, Command};

use crate::support::client::{Client, Ending};
use crate::support::executor::{Executor, serves};
use crate::support::gateway::{Builder, Gateway};
use crate::support::namespace::{Host, command, in_namespaces};
use crate::support::system::{System, Worker};
use crate::support::within;
use crate::support::zookeeper::ZooKeeper;

/// Starts a gateway of zone west and one of zone east, which clients use.
async fn two_zones(system: &System, limits: &str) -> (Gateway, Gateway) {
    let west = gateway_of_west(system).await;
    let identity = system.zookeeper.authority.identity("gateway");
    let east = Builder::new(system).zone("east").tls(&identity).limits(limits).ready().await;
    (west, east)
}

async fn gateway_of_west(system: &System) -> Gateway {
    let identity = system.zookeeper.authority.identity("gateway");
    Builder::new(system).zone("west").tls(&identity).listeners(&["tls = true"]).ready().await
}

/// Has logs of zone west served until the log line about a stream's end contains `wanted`. Each log
/// must arrive.
async fn until_end_is_logged_with(
    system: &System,
    asked: &mut Gateway,
    executor: &Executor,
    wanted: &str,
) {
    within(wanted, async {
        loop {
            let worker = executor.worker(Some("west"));
            let build = system.put_build(Some("west"), Some(&worker)).await;
            let mut client = Client::ask(asked.address(), &build).await;
            executor.serve(b"log\n").await;
            assert_eq!(client.text().await, "log\n");
            let ended = |line: &str| line.contains("stream ended") && line.contains(&build);
            asked.logged("the stream to end", ended).await;
            let log = asked.log();
            if log.iter().any(|line| line.contains(&build) && line.contains(wanted)) {
                return;
            }
        }
    })
    .await;
}

/// Returns the log's description of a stream through `gateway` of zone west.
fn route_through(gateway: &Gateway) -> String {
    format!("hop=\"gateway localhost:{} ", gateway.port())
}

/// Failure: the process of a zone's gateway is killed while a log passes through it. Its kernel
/// closes the connection normally, but without the close_notify that peer gateways send. Meanwhile:
/// the log ends with a reset and not as if it were complete; the executor serves the next request
/// directly. Recovery: a gateway that is started in its place serves the zone.
#[tokio::test]
async fn killed_gateway_of_a_zone_is_replaced_by_another() {
    let system = System::new().await;
    let (mut west, mut east) = two_zones(&system, "").await;
    let executor = Executor::start().await;
    let build = system.put_build(Some("west"), Some(&executor.worker(Some("west")))).await;
    let mut client = Client::ask(east.address(), &build).await;
    let _stream = executor.begin(&mut client).await;
    west.signal(Signal::KILL);
    assert!(!west.exit().await.success());
    assert_eq!(client.rest().await, (Vec::new(), Ending::Reset));

    let mut next = Client::ask(east.address(), &build).await;
    executor.serve(b"log\n").await;
    assert_eq!(next.text().await, "log\n");

    let again = gateway_of_west(&system).await;
    until_end_is_logged_with(&system, &mut east, &executor, &route_through(&again)).await;
}

/// Failure: one of a zone's two gateways is stopped (SIGSTOP); its kernel still accepts
/// connections. Meanwhile: a log through it pauses; requests are served through the other gateway.
/// Recovery: the gateway continues, and the log arrives completely.
#[tokio::test]
async fn stopped_process_of_a_gateway_is_replaced_by_another() {
    let system = System::new().await;
    let (west, mut east) = two_zones(&system, "connect_timeout = \"500ms\"").await;
    let executor = Executor::start().await;
    let build = system.put_build(Some("west"), Some(&executor.worker(Some("west")))).await;
    let mut client = Client::ask(east.address(), &build).await;
    let mut stream = executor.begin(&mut client).await;
    let other = gateway_of_west(&system).await;
    until_end_is_logged_with(&system, &mut east, &executor, &route_through(&other)).await;

    west.signal(Signal::STOP);
    stream.write(b"meanwhile\n").await;
    until_end_is_logged_with(&system, &mut east, &executor, "end=\"superseded").await;

    west.signal(Signal::CONT);
    client.expect(b"meanwhile\n").await;
    stream.write(b"after\n").await;
    stream.finish().await;
    assert_eq!(client.text().await, "after\n");
}

/// An executor's log streamer as a process: netcat, which sends its standard input.
struct Netcat {
    child: Child,
    stdin: ChildStdin,
    output: Lines<BufReader<ChildStderr>>,
    port: u16,
}

impl Netcat {
    async fn start() -> Self {
        let mut child = Command::new("nc")
            .args(["-n", "-l", "-k", "-v", "127.0.0.1", "0"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("nc (tests/run installs it)");
        let stdin = child.stdin.take().expect("stdin is piped");
        let stderr = child.stderr.take().expect("stderr is piped");
        let mut netcat = Self { child, stdin, output: BufReader::new(stderr).lines(), port: 0 };
        let listening = netcat.stderr_line("Listening on ").await;
        let port = listening.rsplit(' ').next().and_then(|port| port.parse().ok());
        netcat.port = port.expect("its port");
        netcat
    }

    async fn stderr_line(&mut self, what: &str) -> String {
        within(what, async {
            loop {
                let line = self.output.next_line().await.expect("UTF-8").expect("stderr continues");
                if line.starts_with(what) {
                    return line;
                }
            }
        })
        .await
    }

    fn signal(&self, signal: Signal) {
        let pid = self.child.id().and_then(|pid| Pid::from_raw(pid.cast_signed()));
        kill_process(pid.expect("it runs"), signal).expect("a signal");
    }

    fn worker(&self) -> Worker {
        Worker { hostname: "127.0.0.1".to_owned(), port: self.port, zone: None }
    }
}

/// Failure: an executor is stopped (SIGSTOP) during a log; its kernel still accepts connections.
/// Meanwhile: the log pauses; a new request gets an error reply in time. Recovery: the executor
/// continues, and so does the log.
#[tokio::test]
async fn stopped_executor_pauses_its_streams() {
    let system = System::new().await;
    let gateway = Builder::new(&system).limits("first_byte_timeout = \"500ms\"").ready().await;
    let mut executor = Netcat::start().await;
    let build = system.put_build(None, Some(&executor.worker())).await;
    let mut client = Client::ask(gateway.address(), &build).await;
    executor.stderr_line("Connection received").await;
    executor.stdin.write_all(b"before\n").await.expect("a log");
    client.expect(b"before\n").await;

    executor.signal(Signal::STOP);
    executor.stdin.write_all(b"meanwhile\n").await.expect("a log");
    let reply = Client::ask(gateway.address(), &build).await.text().await;
    assert_eq!(reply, "Internal streaming error: the executor does not answer\r\n");

    executor.signal(Signal::CONT);
    client.expect(b"meanwhile\n").await;
    executor.stdin.write_all(b"after\n").await.expect("a log");
    client.expect(b"after\n").await;
}

/// Failure: the link to an executor loses all packets for a while; neither side is notified.
/// Meanwhile: a log pauses; a new request gets in time the reply that the executor cannot be
/// reached; builds elsewhere are served. Recovery: the link is back, the kernels retransmit, and
/// the log is complete.
#[test]
fn link_that_fails_for_a_while_ends_no_stream() {
    in_namespaces(CloneFlags::CLONE_NEWNET, async || {
        let system = System::on(ZooKeeper::start().await).await;
        let gateway = Builder::new(&system).limits("connect_timeout = \"500ms\"").ready().await;
        let host = Host::new();
        let (listener, address) = host.listen();
        let executor = Executor { listener, address };
        let worker = Worker { hostname: Host::THERE.to_string(), port: address.port(), zone: None };
        let build = system.put_build(None, Some(&worker)).await;
        let mut client = Client::ask(gateway.address(), &build).await;
        let mut stream = executor.begin(&mut client).await;

        host.cut();
        let log: Vec<u8> = (0..500_000u32).map(|index| (index % 251) as u8).collect();
        let reply = Client::ask(gateway.address(), &build).await.text().await;
        assert_eq!(reply, "Internal streaming error: the executor cannot be reached\r\n");
        serves(&system, gateway.address()).await;
        let sent = async {
            stream.write(&log).await;
            stream.finish().await;
        };
        let restored = async {
            host.restore_link();
            client.rest().await
        };
        let ((), (received, ending)) = tokio::join!(sent, restored);
        assert!(received == log && ending == Ending::Clean);

        let mut next = Client::ask(gateway.address(), &build).await;
        executor.serve(b"log\n").await;
        assert_eq!(next.text().await, "log\n");
    });
}

/// Failure: the link to an executor delays everything, by a second and more under load. Meanwhile:
/// logs arrive late and complete, also a log that is requested during a large one; builds elsewhere
/// are not delayed. Recovery: none needed.
#[test]
fn delayed_link_delays_logs_only() {
    in_namespaces(CloneFlags::CLONE_NEWNET, async || {
        let system = System::on(ZooKeeper::start().await).await;
        let gateway = Builder::new(&system).ready().await;
        let host = Host::new();
        host.slow("2mbit");
        let (listener, address) = host.listen();
        let executor = Executor { listener, address };
        let worker = Worker { hostname: Host::THERE.to_string(), port: address.port(), zone: None };
        let build = system.put_build(None, Some(&worker)).await;
        let mut large = Client::ask(gateway.address(), &build).await;
        let mut stream = executor.begin(&mut large).await;
        let log: Vec<u8> = (0..500_000u32).map(|index| (index % 251) as u8).collect();
        let sent = async {
            stream.write(&log).await;
            stream.finish().await;
        };
        let after_large = async {
            let mut small = Client::ask(gateway.address(), &build).await;
            executor.serve(b"log\n").await;
            small.text().await
        };
        let elsewhere = serves(&system, gateway.address());
        let (whole, (), small, ()) = tokio::join!(large.rest(), sent, after_large, elsewhere);
        assert!(whole == (log, Ending::Clean));
        assert_eq!(small, "log\n");
    });
}

/// Failure: the disk of the log file is full. Meanwhile: clients notice nothing, and stderr gets
/// one message. Recovery: when there is room again, lines are written again, and the first one
/// reports how many were lost.
#[test]
fn full_disk_of_the_log_does_not_disturb_streams() {
    in_namespaces(CloneFlags::CLONE_NEWNS, async || {
        let system = System::on(ZooKeeper::start().await).await;
        let builder = Builder::new(&system);
        let disk = builder.directory().join("disk");
        fs::create_dir(&disk).expect("a directory");
        let mount = format!("-t tmpfs -o size=64k tmpfs {}", disk.display());
        command("mount", &mount);
        let log = disk.join("gateway.log");
        let mut gateway = builder.log(&format!("output = {log:?}")).ready().await;
        let ballast = disk.join("ballast");
        // Fill the disk until the next write fails.
        let filled = fs::write(&ballast, vec![0; 128 * 1024]);
        assert_eq!(filled.expect_err("a full disk").kind(), std::io::ErrorKind::StorageFull);
        within("the error on stderr", async {
            // The last page of the log file may have room for some lines.
            while !gateway.log().iter().any(|line| line.contains("cannot be written: No space")) {
                serves(&system, gateway.address()).await;
            }
        })
        .await;
        let lines = gateway.log().len();
        serves(&system, gateway.address()).await;

        fs::remove_file(&ballast).expect("room");
        serves(&system, gateway.address()).await;
        gateway.signal(Signal::TERM);
        assert!(gateway.exit().await.success());
        assert_eq!(gateway.log().len(), lines, "logged once");
        let log = fs::read_to_string(&log).expect("the log");
        let lost =
            log.lines().filter(|line| line.contains("cannot write log lines in time")).count();
        assert!(lost >= 1 && log.ends_with('\n'), "{log}");
        assert!(log.lines().last().is_some_and(|line| line.contains("stopped")), "{log}");
    });
}
