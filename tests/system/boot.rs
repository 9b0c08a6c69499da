//! The shipped units and configuration in a machine booted with systemd.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Output};

use tokio::net::TcpStream;

use crate::support::admin::get;
use crate::support::certificates::Identity;
use crate::support::checkout::top;
use crate::support::continuous_clients::ContinuousClients;
use crate::support::debian_root::{Machine, Root, with_debian};
use crate::support::executor::serves;
use crate::support::gateway::BINARY;
use crate::support::page_commands::PageCommands;
use crate::support::running_stream::RunningStream;
use crate::support::system::{Entry, System};
use crate::support::within;
use crate::support::zookeeper::ZooKeeper;

const ETC: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/etc");
const CONFIG: &str = "/etc/zuul/zuul-fingergw.toml";
const UNITS: &str = "/usr/local/lib/systemd/system";
/// Path of the checkout in the machine.
const CHECKOUT: &str = "/checkout";
const DROP_INS: &str = "/etc/systemd/system/zuul-fingergw.service.d";

/// Creates a root with the units in an administrator's directory.
fn with_units() -> Root {
    let root = Root::new();
    let etc = Path::new(ETC).join("systemd");
    for unit in ["zuul-fingergw.service", "zuul-fingergw.socket"] {
        root.copy(&etc.join(unit), &format!("{UNITS}/{unit}"));
    }
    let users = "sysusers.d/zuul-fingergw.conf";
    root.copy(&etc.join(users), &format!("/usr/local/lib/{users}"));
    root
}

fn drop_in(root: &Root, name: &str) {
    let from = Path::new(ETC).join("systemd/drop-ins").join(name);
    root.copy(&from, &format!("{DROP_INS}/{name}"));
}

/// Boots the root, with the built binary in the packages' path.
async fn boot(root: Root) -> Machine {
    let program = format!("--bind-ro={BINARY}:/usr/bin/zuul-fingergw");
    let machine = root.boot(&[&program, &shipped()]).await;
    machine.succeeds("systemd-sysusers").await;
    machine
}

/// Option for systemd-nspawn that mounts the checkout's `etc`.
fn shipped() -> String {
    format!("--bind-ro={ETC}:{CHECKOUT}/etc")
}

/// Returns a section of docs/operating.md.
const fn operating(heading: &str) -> (&str, &str) {
    ("docs/operating.md", heading)
}

/// Returns a Zuul system in a ZooKeeper of its own, as the shared one is in another network
/// namespace.
async fn system() -> System {
    System::on(ZooKeeper::start().await).await
}

/// Copies ZooKeeper's client certificate to the path in the example configuration.
fn with_certificates(root: &Root, system: &System) {
    let Identity { cert, key, ca, .. } = &system.zookeeper.identity;
    for (from, name) in [(cert, "zookeeper.crt"), (key, "zookeeper.key"), (ca, "zookeeper-ca.crt")]
    {
        root.copy(from, &format!("/etc/zuul/ssl/{name}"));
    }
}

/// Returns the example configuration with ZooKeeper's address and `changes`: lines to uncomment, or
/// new values of keys.
fn example(system: &System, changes: &[&str]) -> String {
    let mut text =
        std::fs::read_to_string(Path::new(ETC).join("zuul-fingergw.toml")).expect("a file");
    let hosts = format!("hosts = \"{}\"", system.hosts());
    for change in [&[hosts.as_str()], changes].concat() {
        let (key, _) = change.split_once(" = ").expect("a key");
        let example = format!("#{change}  # example");
        let there = text.lines().filter(|line| {
            let setting = line.strip_prefix('#').unwrap_or(line);
            setting.split_once(" = ").is_some_and(|(found, _)| found == key)
        });
        let lines: Vec<_> = there.collect();
        let old = lines.iter().find(|line| **line == example).or(lines.first()).expect(key);
        text = text.replacen(&format!("\n{old}\n"), &format!("\n{change}\n"), 1);
    }
    text
}

async fn main_pid(machine: &Machine) -> String {
    machine
        .succeeds("systemctl show --property MainPID --value zuul-fingergw")
        .await
        .trim()
        .to_owned()
}

fn port_79(host: &str) -> SocketAddr {
    format!("{host}:79").parse().expect("an address")
}

/// Checks user and capabilities of the process: none but `capabilities`.
async fn assert_confined(machine: &Machine, capabilities: u64) {
    let pid = main_pid(machine).await;
    let of = async |file| machine.succeeds(&format!("cat /proc/{pid}/{file}")).await;
    let status = of("status").await;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).expect(name);
        line.split_whitespace().next().expect("a value").to_owned()
    };
    let uid = machine.succeeds("id -u zuul-fingergw").await;
    assert_eq!(field("Uid:"), uid.trim());
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        assert_eq!(field(set), format!("{capabilities:016x}"), "{set}");
    }
    assert_eq!((field("NoNewPrivs:"), field("Seccomp:")), ("1".to_owned(), "2".to_owned()));
}

/// Needs no machine: checks the units' exposure as rated by systemd-analyze.
#[test]
fn exposure_of_the_service_is_low() {
    let unit = top().join("etc/systemd/zuul-fingergw.service");
    let looked = |tenths: u32| {
        let mut analyze = Command::new("systemd-analyze");
        analyze.args(["security", "--offline=true", "--no-pager"]).arg(&unit);
        analyze.arg(format!("--threshold={tenths}")).output().expect("systemd-analyze (systemd)")
    };
    let Output { status, stdout, stderr } = looked(11);
    let text = [stdout, stderr].concat();
    assert!(status.success(), "{}", String::from_utf8_lossy(&text));
    assert!(!looked(5).status.success(), "a threshold that counts");
}

/// systemd-analyze reports no errors, and an exposure of at most `tenths` tenths.
#[test]
fn units_are_valid_and_their_exposure_is_low() {
    with_debian(async || {
        let machine = boot(with_units()).await;
        let verify = format!(
            "systemd-analyze verify --man=no {UNITS}/zuul-fingergw.service {UNITS}/zuul-fingergw.socket 2>&1"
        );
        let threshold = |tenths: u32| {
            format!(
                "systemd-analyze security --offline=true --threshold={tenths} {UNITS}/zuul-fingergw.service"
            )
        };
        assert_eq!(machine.succeeds(&verify).await, "");
        machine.succeeds(&threshold(11)).await;
        // One more capability than none, and no user namespace.
        for (name, tenths) in
            [("without-socket.conf", 14), ("group-zuul.conf", 15), ("credentials.conf", 15)]
        {
            drop_in(&machine.root, name);
            machine.succeeds("systemctl daemon-reload").await;
            assert_eq!(machine.succeeds(&verify).await, "", "{name}");
            machine.succeeds(&threshold(tenths)).await;
            let tighter = machine.run(&threshold(11)).await;
            assert!(!tighter.status.success(), "{name}: is it read at all? {tighter:?}");
        }
    });
}

/// On a host with other services of Zuul: a zuul.conf that only they can read, and a private key
/// that only root can read.
/// only root may.
#[test]
fn service_without_the_socket_unit_serves() {
    with_debian(async || {
        let system = system().await;
        let root = with_units();
        with_certificates(&root, &system);
        for name in ["group-zuul.conf", "credentials.conf"] {
            drop_in(&root, name);
        }
        root.copy(&system.zookeeper.identity.key, "/etc/zuul/ssl/fingergw.key");
        root.write(
            "/etc/zuul/zuul.conf",
            &format!(
                "[zookeeper]\nhosts={}\ntls_cert=/etc/zuul/ssl/zookeeper.crt\n\
                 tls_key=/run/credentials/zuul-fingergw.service/zookeeper.key\n\
                 tls_ca=/etc/zuul/ssl/zookeeper-ca.crt\n[fingergw]\nhostname=localhost\n\
                 command_socket=/run/zuul-fingergw/control.socket\n",
                system.hosts()
            ),
        );
        root.write("/etc/sysusers.d/zuul.conf", "u zuul - Zuul\n");
        let machine = boot(root).await;
        machine
            .succeeds(
                "chown -R zuul:zuul /etc/zuul && chmod 640 /etc/zuul/zuul.conf /etc/zuul/ssl/* \
                 && chown root:root /etc/zuul/ssl/*.key && chmod 600 /etc/zuul/ssl/*.key",
            )
            .await;
        let mut typed = PageCommands::on("without-socket");
        typed.next(operating("The port"), &machine, CHECKOUT).await;
        // CAP_NET_BIND_SERVICE.
        assert_confined(&machine, 1 << 10).await;
        serves(&system, port_79("[::1]")).await;
        machine.succeeds("systemctl reload zuul-fingergw").await;
        let answer = machine.succeeds("zuul-fingergw reload").await;
        assert!(answer.starts_with("reloaded"), "{answer}");
        machine.succeeds("systemctl stop zuul-fingergw").await;
        assert!(system.entries().await.is_empty(), "nothing is left in the registry");

        // Errors that a restart does not fix cause no restart.
        machine.root.write("/etc/zuul/zuul.conf", "[fingergw]\n");
        let outcome = machine.run("systemctl start zuul-fingergw").await;
        assert!(!outcome.status.success(), "{outcome:?}");
        let shown = "systemctl show --property ActiveState,ExecMainStatus,NRestarts zuul-fingergw";
        let shown = machine.succeeds(shown).await;
        assert_eq!(shown, "NRestarts=0\nExecMainStatus=78\nActiveState=failed\n");
    });
}

/// Port 79 from start to stop: with the socket unit, as an unprivileged user, in the whole sandbox.
#[test]
fn service_with_the_socket_unit_serves_port_79() {
    with_debian(async || {
        let system = system().await;
        let root = Root::new();
        with_certificates(&root, &system);
        let changes = [
            "hostname = \"localhost\"",
            "address = \"127.0.0.1:9090\"",
            "socket = \"/run/zuul-fingergw/control.socket\"",
            "output = \"/var/log/zuul-fingergw/log\"",
            "session_timeout = \"4s\"",
            "grace = \"5s\"",
        ];
        let config = example(&system, &changes);
        root.write(CONFIG, &config);
        let built = format!("--bind-ro={BINARY}:{CHECKOUT}/target/release/zuul-fingergw");
        let machine = root.boot(&[&built, &shipped()]).await;
        let mut commands = PageCommands::on("checkout");
        commands.next(operating("systemd"), &machine, CHECKOUT).await;
        commands.next(operating("File permissions"), &machine, CHECKOUT).await;
        commands.next(operating("Logs"), &machine, CHECKOUT).await;
        // The status follows READY=1 and reports the registration.
        commands.next(operating("systemd"), &machine, CHECKOUT).await;
        assert_eq!(system.entries().await.len(), 1);
        let running = |entries: &[Entry]| entries[0].content["state"] == "running";
        let entries = system.until("the gateway to be registered as running", running).await;
        let status = machine.succeeds("systemctl status zuul-fingergw zuul-fingergw.socket").await;
        let expected = format!(
            "Status: \"no zone; plain [::]:79; health and metrics on 127.0.0.1:9090; ZooKeeper: registered as {}\"",
            entries[0].name
        );
        assert!(status.contains(&expected), "{expected}\n{status}");
        assert_confined(&machine, 0).await;

        for host in ["127.0.0.1", "[::1]"] {
            serves(&system, port_79(host)).await;
        }
        // A bulk log passes through pipes, which are kept for the next one.
        RunningStream::start(&system, port_79("127.0.0.1")).await.finish().await;
        let pid = main_pid(&machine).await;
        let pipes = format!("readlink /proc/{pid}/fd/* | grep -q ^pipe:");
        machine.succeeds(&pipes).await;
        let answer = machine.succeeds("zuul-fingergw status").await;
        assert!(answer.contains("plain [::]:79"), "{answer}");
        let log = machine.root.read("/var/log/zuul-fingergw/log");
        assert!(log.contains("using socket from the service manager"), "{log}");
        // Including memory that proc(5) does not show.
        let metrics = get("127.0.0.1:9090".parse().expect("an address"), "/metrics").await.body;
        for series in ["process_start_time_seconds 1", "process_open_fds ", "process_cpu_seconds"] {
            assert!(metrics.contains(series), "{series}\n{metrics}");
        }
        reloads(&machine, &config).await;
        restarts(&machine, &system, &mut commands).await;
        hangs(&machine, &system).await;
        moves(&machine, &system, &mut commands).await;

        commands.next(operating("Upgrade"), &machine, CHECKOUT).await;
        assert!(system.entries().await.is_empty(), "nothing is left in the registry");
        let refused =
            TcpStream::connect(port_79("127.0.0.1")).await.expect_err("a refused connection");
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
        let result = "systemctl show --property Result --value zuul-fingergw";
        assert_eq!(machine.succeeds(result).await, "success\n");
        assert!(!machine.root.path("/run/zuul-fingergw").exists());
    });
}

/// A valid configuration is loaded; an invalid one fails with an error that the operator sees, and
/// changes nothing.
async fn reloads(machine: &Machine, config: &str) {
    let pid = main_pid(machine).await;
    machine.root.write(CONFIG, &config.replace("grace = \"5s\"", "grace = \"6s\""));
    machine.succeeds("systemctl reload zuul-fingergw").await;
    within("the reload", async {
        while !machine.root.read("/var/log/zuul-fingergw/log").contains("limits.grace") {
            tokio::task::yield_now().await;
        }
    })
    .await;
    machine.root.write(CONFIG, &config.replace("grace = \"5s\"", "grace = \"5 parsecs\""));
    let outcome = machine.run("systemctl reload zuul-fingergw").await;
    assert!(!outcome.status.success(), "{outcome:?}");
    let journal = machine.succeeds("journalctl --sync; journalctl --unit zuul-fingergw").await;
    assert!(journal.contains("5 parsecs"), "{journal}");
    machine.root.write(CONFIG, config);
    machine.succeeds("systemctl is-active zuul-fingergw").await;
    assert_eq!(main_pid(machine).await, pid);
}

/// During continuous connections of clients.
async fn restarts(machine: &Machine, system: &System, commands: &mut PageCommands) {
    let pid = main_pid(machine).await;
    let mut clients = ContinuousClients::start(system, port_79("127.0.0.1")).await;
    commands.next(operating("Upgrade"), machine, CHECKOUT).await;
    assert_ne!(main_pid(machine).await, pid);
    clients.until_more_served().await;
    clients.stop().await;
}

/// Stopped like a hanging program, it is killed by the watchdog and started again.
async fn hangs(machine: &Machine, system: &System) {
    machine.root.write(&format!("{DROP_INS}/impatient.conf"), "[Service]\nWatchdogSec=3s\n");
    machine.succeeds("systemctl daemon-reload && systemctl restart zuul-fingergw").await;
    let before = system.entries().await;
    let name = &before[0].name;
    machine.succeeds("systemctl kill --kill-whom=main --signal=STOP zuul-fingergw").await;
    let another = |entries: &[Entry]| {
        entries.iter().any(|entry| entry.name != *name && entry.content["state"] == "running")
    };
    system.until("the next gateway", another).await;
    serves(system, port_79("127.0.0.1")).await;
    let journal = machine.succeeds("journalctl --sync; journalctl --unit zuul-fingergw").await;
    assert!(journal.contains("Watchdog timeout"), "{journal}");
    // The hanging process's session exists until ZooKeeper expires it.
    system.until("the old entry to be removed", |entries| entries.len() == 1).await;
}

/// A further port, for a listener in the configuration.
async fn moves(machine: &Machine, system: &System, commands: &mut PageCommands) {
    let config = machine.root.read(CONFIG);
    let listeners = [79, 9079].map(|port| format!("\n[[listener]]\naddress = \"[::]:{port}\"\n"));
    machine.root.write(CONFIG, &[config, listeners.concat()].concat());
    for _ in ["the drop-in", "the commands"] {
        commands.next(operating("The port"), machine, CHECKOUT).await;
    }
    serves(system, "127.0.0.1:9079".parse().expect("an address")).await;
    serves(system, port_79("127.0.0.1")).await;
}
