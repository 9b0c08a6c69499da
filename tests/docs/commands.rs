//! Runs every command of the documentation, in an environment where it must work.
//!
//! The environment: a network and a mount namespace, ZooKeeper at the address in the pages'
//! configurations, an executor in zone west with a build, and for each host in a page its own
//! `/etc/zuul` and `/run`. docs/quick-start.md runs first: its files and gateways stay for all
//! other pages. Commands for a machine with systemd are run by the tests that boot one
//! (`support::page_commands`). docs/CONTRIBUTING.md has the rules for authors of pages.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;

use nix::sched::CloneFlags;
use rustix::process::{Pid, Signal, kill_process_group};
use tempfile::TempDir;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream, UnixDatagram};
use tokio::process::{Child, Command};

use crate::support::certificates::Authority;
use crate::support::executor::Executor;
use crate::support::gateway::BINARY;
use crate::support::namespace::{command, in_namespaces};
use crate::support::page_commands::is_machine;
use crate::support::pages::{self, Block, compare};
use crate::support::system::{System, Worker};
use crate::support::within;
use crate::support::zookeeper::ZooKeeper;

/// The build that the pages request, and its log.
const BUILD: &str = "25f6e270b80e4331891413c0ca6dc9fc";
const LOG: &[u8] = b"2026-11-21 18:00:01.000001 | Job console starting\n\
                     2026-11-21 18:00:02.000002 | TASK [hello : say hello]\n";

/// Requirements of a block that a test cannot meet: the first line of a `console` block, as a
/// comment.
const NEEDS: [&str; 10] = [
    "# needs a cluster",
    "# needs a container engine",
    "# needs another machine",
    "# needs the network",
    "# needs Zuul's own gateway",
    "# takes ten minutes",
    "# takes half an hour",
    "# takes hours",
    "# builds",
    "# runs until it is stopped",
];

/// The host of blocks that name none.
const HERE: &str = "finger.example.org";
const WEST: &str = "fingergw.west.example.org";
const NAMES: &str = "127.0.0.1 localhost finger.example.org fingergw.west.example.org \
                     executor1.west.example.org zk1.example.org zk2.example.org zk3.example.org\n\
                     ::1 localhost\n";

/// Users of the pages' gateways.
const USER: &str = "zuul:x:10001:0::/var/lib/zuul:/usr/sbin/nologin\n";

const USER_ID: u32 = 10001;

/// Mounts a host's directories and sets its name.
const ENTER: &str = r#"mount --bind "$1/zuul" /etc/zuul; mount --bind "$1/run" /run; cd "$1/work"
shift; exec "$@""#;

/// Settings of each host that a page need not repeat.
const TLS: &str = "\n[tls]\ncert = \"/etc/zuul/ssl/fingergw.crt\"\n\
                   key = \"/etc/zuul/ssl/fingergw.key\"\nca = \"/etc/zuul/ssl/ca.crt\"\n";
const ZOOKEEPER: &str = "\n[zookeeper]\nhosts = \"zk1.example.org:2281\"\n\
                         tls_cert = \"/etc/zuul/ssl/zookeeper.crt\"\n\
                         tls_key = \"/etc/zuul/ssl/zookeeper.key\"\n\
                         tls_ca = \"/etc/zuul/ssl/zookeeper-ca.crt\"\n";
const ZOOKEEPER_INI: &str = "\n[zookeeper]\n\
                             hosts = zk1.example.org:2281,zk2.example.org:2281,zk3.example.org:2281\n\
                             tls_cert = /etc/zuul/ssl/zookeeper.crt\n\
                             tls_key = /etc/zuul/ssl/zookeeper.key\n\
                             tls_ca = /etc/zuul/ssl/zookeeper-ca.crt\n";

/// Languages of blocks that are checked here, or not run.
const LANGUAGES: [&str; 14] = [
    "sh", "console", "text", "toml", "ini", "yaml", "json", "haproxy", "promql", "nginx", "rust",
    "roff", "xml", "diff",
];

/// Beginnings of lines that a reader should type.
const PROGRAMS: [&str; 16] = [
    "$ ",
    "zuul-fingergw ",
    "systemctl ",
    "kubectl ",
    "oc ",
    "curl ",
    "openssl ",
    "finger ",
    "cargo ",
    "tests/",
    "apt",
    "dpkg ",
    "podman ",
    "sudo ",
    "journalctl ",
    "promtool ",
];

#[test]
fn every_command_is_run_or_lists_its_requirements() {
    let (mut run, mut need) = (0, 0);
    for page in pages::all() {
        let (blocks, prose) = page.parts();
        for block in &blocks {
            let (Block { place, info, text, .. }, language) = (block, block.language());
            assert!(
                LANGUAGES.contains(&language),
                "{place}: the block's language is {language:?}, none of {LANGUAGES:?}"
            );
            let first = text.lines().next().unwrap_or_default();
            match language {
                "sh" => {
                    let known = |word| word == "background" || is_machine(word);
                    assert!(info.split(' ').skip(1).all(known), "{place}: {info}");
                    assert!(
                        !NEEDS.iter().any(|need| first.starts_with(need)),
                        "{place}: make it `console`, as it is not to be run"
                    );
                    run += 1;
                }
                "console" => {
                    assert!(
                        NEEDS.iter().any(|need| first.starts_with(need)),
                        "{place}: make it `sh`, so that it is run, or begin it with one of {NEEDS:?}"
                    );
                    need += 1;
                }
                // After commands it is their output.
                "text" if !block.follows => {
                    let commands =
                        |line: &&str| PROGRAMS.iter().any(|program| line.starts_with(program));
                    let found = text.lines().find(commands);
                    assert!(found.is_none(), "{place}: to be typed, so `sh`: {found:?}");
                }
                _ => {}
            }
        }
        for pair in prose.windows(2) {
            let [(_, before), (number, line)] = pair else { unreachable!() };
            let indented = before.trim().is_empty() && line.starts_with("    ");
            let name = &page.name;
            assert!(!indented, "{name}:{number}: put it between fences: {line:?}");
        }
    }
    assert!(run >= 10 && need >= 3, "{run} blocks to run, {need} that need something");
}

/// The target of a TOML block in its first line: `# PATH` or `# PATH, on HOST`.
fn file_of(block: &Block) -> Option<(&str, &str)> {
    let first = block.text.lines().next()?.strip_prefix("# /")?;
    let (path, host) = first.split_once(", on ").unwrap_or((first, HERE));
    Some((path, host))
}

/// The host on which a block runs: its first line may be `# on HOST`.
fn host_of(block: &Block) -> &str {
    let first = block.text.lines().next().unwrap_or_default();
    first.strip_prefix("# on ").unwrap_or(HERE)
}

/// The running environment of the pages.
struct World {
    directory: TempDir,
    authority: Authority,
    zookeeper: Arc<ZooKeeper>,
    /// Blocks that are left running, with their processes.
    running: Vec<(Block, Child)>,
    hosts: BTreeSet<String>,
}

impl World {
    /// Starts ZooKeeper and the executor with its build, and no gateway.
    async fn new() -> Self {
        let directory = TempDir::new().expect("a directory");
        let at = directory.path().display();
        // A copy, so that an /etc/zuul and host names exist and the machine's own /etc is
        // unchanged.
        command("cp", &format!("-a /etc {at}/etc"));
        fs::create_dir_all(directory.path().join("etc/zuul")).expect("/etc/zuul");
        fs::write(directory.path().join("etc/hosts"), NAMES).expect("/etc/hosts");
        let users = fs::File::options().append(true).open(directory.path().join("etc/passwd"));
        users.and_then(|mut users| users.write_all(USER.as_bytes())).expect("/etc/passwd");
        command("mount", &format!("--bind {at}/etc /etc"));
        fs::create_dir(directory.path().join("bin")).expect("a directory");
        std::os::unix::fs::symlink(BINARY, directory.path().join("bin/zuul-fingergw"))
            .expect("the binary");

        let zookeeper = ZooKeeper::start().await;
        relay(2281, zookeeper.port).await;
        // Replaces a NAT rule in front of zone west.
        relay(443, 7979).await;
        let system = System::at_root(&zookeeper).await;
        let listener = TcpListener::bind("127.0.0.1:7900").await.expect("port 7900");
        let address = listener.local_addr().expect("its address");
        let executor = Executor { listener, address };
        let worker = Worker {
            hostname: "executor1.west.example.org".to_owned(),
            port: 7900,
            zone: Some("west".to_owned()),
        };
        system.place_build(Some("west"), BUILD, Some(&worker)).await;
        system.put_component("scheduler", 38).await;
        let path = "/zuul/components/executor/executor1.west.example.org0000000000";
        system.put(path, br#"{"model_api": 38, "state": "running", "zone": "west"}"#).await;
        tokio::spawn(async move {
            loop {
                let accepted = executor.listener.accept().await;
                let (stream, _) = accepted.expect("a connection to the executor");
                tokio::spawn(crate::support::executor::answer(stream, LOG));
            }
        });
        let authority = Authority::new();
        let hosts = BTreeSet::new();
        let mut world = Self { directory, authority, zookeeper, running: Vec::new(), hosts };
        world.host(HERE);
        world.host(WEST);
        world
    }

    /// Creates the directories of a new host.
    fn host(&mut self, name: &str) {
        if !self.hosts.insert(name.to_owned()) {
            return;
        }
        let at = self.directory.path().join(name);
        for directory in ["zuul/ssl", "run", "work"] {
            fs::create_dir_all(at.join(directory)).expect("a directory");
        }
        let copy = |from: &Path, to: &str| {
            let to = at.join("zuul/ssl").join(to);
            fs::copy(from, &to).expect("a copy");
            std::os::unix::fs::chown(&to, Some(USER_ID), Some(USER_ID)).expect("an owner");
        };
        let identity = self.authority.identity_only_for(name);
        copy(&identity.cert, "fingergw.crt");
        copy(&identity.key, "fingergw.key");
        copy(&identity.ca, "ca.crt");
        let zookeeper = &self.zookeeper.identity;
        copy(&zookeeper.cert, "zookeeper.crt");
        copy(&zookeeper.key, "zookeeper.key");
        copy(&zookeeper.ca, "zookeeper-ca.crt");
        let zuul_conf =
            format!("[scheduler]\ntenant_config = /etc/zuul/main.yaml\n{ZOOKEEPER_INI}");
        fs::write(at.join("zuul/zuul.conf"), zuul_conf).expect("zuul.conf");
    }

    /// Returns a command that runs a block on its host.
    fn command(&self, block: &Block) -> Command {
        let host = host_of(block);
        assert!(self.hosts.contains(host), "{}: what host is {host}?", block.place);
        self.command_on(host, &["bash", "-eu", "-o", "pipefail", "-c", &block.text])
    }

    fn command_on(&self, host: &str, arguments: &[&str]) -> Command {
        let path = std::env::var("PATH").expect("PATH");
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--propagation", "private", "sh", "-ec", ENTER, "sh"])
            .arg(self.directory.path().join(host))
            .args(arguments)
            .env("PATH", format!("{}/bin:{path}", self.directory.path().display()))
            .env_remove("NOTIFY_SOCKET")
            .stdin(Stdio::null())
            .process_group(0)
            .kill_on_drop(true);
        command
    }

    /// Checks a configuration of a page on the host that it names, with the host's default files
    /// for keys that it omits.
    async fn check(&mut self, block: &Block, extension: &str) {
        let mut text = block.text.clone();
        let named = |line: &str| {
            let (key, value) = line.split_once('=')?;
            (key.trim() == "hostname").then(|| value.trim().trim_matches('"').to_owned())
        };
        let host = text.lines().find_map(named).unwrap_or_else(|| HERE.to_owned());
        self.host(&host);
        let speaks_tls = text.lines().any(|line| line.starts_with("tls = true"));
        if extension == "toml" && speaks_tls && !text.contains("\n[tls]") {
            text.push_str(TLS);
        }
        if !text.contains("[zookeeper]") {
            text.push_str(if extension == "toml" { ZOOKEEPER } else { ZOOKEEPER_INI });
        }
        let path = self.directory.path().join(format!("{host}/work/page.{extension}"));
        fs::write(&path, &text).expect("a configuration");
        let path = path.to_str().expect("UTF-8");
        let mut command = self.command_on(&host, &["zuul-fingergw", "check", "-c", path]);
        let check = within("a check", command.output()).await.expect("zuul-fingergw check");
        let (output, errors) = (&check.stdout, String::from_utf8_lossy(&check.stderr));
        let output = String::from_utf8_lossy(output);
        // A build without the feature rejects this configuration, for no other reason.
        let refused = !cfg!(feature = "otlp") && extension == "toml" && text.contains("[tracing]");
        let as_promised = match refused {
            true => errors.lines().count() == 1 && errors.contains("cargo's feature otlp"),
            false => check.status.success(),
        };
        assert!(as_promised, "{}: {output}{errors}", block.place);
    }

    /// Checks a configuration with haproxy.
    async fn check_balancer(&self, block: &Block) {
        let path = self.directory.path().join("haproxy.cfg");
        fs::write(&path, &block.text).expect("a configuration");
        let mut command = Command::new("haproxy");
        let printed = within("haproxy -c", command.args(["-c", "-f"]).arg(&path).output()).await;
        let printed = printed.expect("haproxy (tests/run installs it)");
        let reported = String::from_utf8_lossy(&printed.stderr);
        assert!(printed.status.success(), "{}: {reported}", block.place);
    }

    /// Runs a page from top to end. Returns the number of blocks that were run.
    async fn play(&mut self, blocks: &[Block]) -> usize {
        let mut count = 0;
        for (index, block) in blocks.iter().enumerate() {
            match &*block.info {
                "toml" => {
                    self.put(block);
                    self.check(block, "toml").await;
                }
                "ini" if block.text.contains("[fingergw]") => self.check(block, "conf").await,
                "haproxy" => self.check_balancer(block).await,
                "yaml" => {
                    let read: Result<Vec<serde_json::Value>, _> =
                        serde_saphyr::from_str_multiple(&block.text);
                    let documents = read.unwrap_or_else(|error| panic!("{}: {error}", block.place));
                    assert!(!documents.is_empty(), "{}: no document", block.place);
                }
                "sh background" => {
                    let child = self.start(block).await;
                    self.running.push((block.clone(), child));
                    self.acquainted().await;
                    count += 1;
                }
                "sh" => {
                    let shown = blocks.get(index + 1);
                    let shown = shown.filter(|next| next.follows && next.info == "text");
                    self.run(block, shown).await;
                    count += 1;
                }
                _ => {}
            }
        }
        count
    }

    /// Writes a configuration to the path in its first line.
    fn put(&self, block: &Block) {
        let Some((path, host)) = file_of(block) else { return };
        let path = path.strip_prefix("etc/zuul/").unwrap_or_else(|| {
            panic!("{}: configurations are in /etc/zuul", block.place);
        });
        let path = self.directory.path().join(host).join("zuul").join(path);
        fs::write(path, &block.text).unwrap_or_else(|error| panic!("{}: {error}", block.place));
    }

    /// Starts a block that is left running, and waits until it is ready.
    async fn start(&self, block: &Block) -> Child {
        let socket = self.directory.path().join(format!("notify-{}", fastrand::u64(..)));
        let notices = UnixDatagram::bind(&socket).expect("a notification socket");
        let output = fs::File::create(self.directory.path().join("output")).expect("a file");
        let mut command = self.command(block);
        command.env("NOTIFY_SOCKET", &socket).stdout(output.try_clone().expect("the file"));
        let mut child = command.stderr(output).spawn().expect("unshare (util-linux)");
        let mut buffer = vec![0; 4096];
        let ready = async {
            loop {
                let count = notices.recv(&mut buffer).await.expect("a datagram");
                if String::from_utf8_lossy(&buffer[..count]).lines().any(|line| line == "READY=1") {
                    return;
                }
            }
        };
        tokio::select! {
            () = within("a gateway to be ready", ready) => child,
            status = child.wait() => {
                let output = self.directory.path().join("output");
                let output = fs::read_to_string(output).expect("its output");
                panic!("{}: ended, {status:?}:\n{output}", block.place)
            }
        }
    }

    /// Runs a block to its end, and compares its output with that on the page.
    async fn run(&mut self, block: &Block, shown: Option<&Block>) {
        let place = &block.place;
        let (output, input) = std::io::pipe().expect("a pipe");
        let mut command = self.command(block);
        command.stdout(input.try_clone().expect("the pipe")).stderr(input);
        let mut child = command.spawn().expect("unshare (util-linux)");
        // The command's ends of the pipe.
        drop(command);
        let mut output =
            tokio::net::unix::pipe::Receiver::from_owned_fd(output.into()).expect("a pipe");
        let mut printed = Vec::new();
        let status = within(place, async {
            output.read_to_end(&mut printed).await.expect("its output");
            child.wait().await.expect("its status")
        })
        .await;
        let printed = String::from_utf8_lossy(&printed);
        // With --nocapture, authors of pages see this.
        println!("--- {place}\n{}--->\n{printed}", block.text);
        assert!(status.success(), "{place}: {status}\n{}\nprinted:\n{printed}", block.text);
        if let Some(shown) = shown {
            compare(shown, &printed);
        }
        if block.text.contains("zuul-fingergw stop") {
            self.start_again(host_of(block)).await;
        }
    }

    /// Acts as a service manager: a gateway that was stopped ends and is started again.
    async fn start_again(&mut self, host: &str) {
        let index = self.running.iter().position(|(block, _)| host_of(block) == host);
        let (block, mut child) = self.running.remove(index.expect("a gateway on that host"));
        let status = within("a stopped gateway to end", child.wait()).await.expect("its status");
        assert!(status.success(), "{}: {status}", block.place);
        let child = self.start(&block).await;
        self.running.push((block, child));
        self.acquainted().await;
    }

    /// Waits until the clients' gateway knows the zone's gateway, if both run. It does not report
    /// that, so this polls.
    async fn acquainted(&self) {
        let runs = |host| self.running.iter().any(|(block, _)| host_of(block) == host);
        if !runs(HERE) || !runs(WEST) {
            return;
        }
        within("the gateways to know each other", async {
            loop {
                let mut command = self.command_on(HERE, &["zuul-fingergw", "resolve", BUILD]);
                let text = command.output().await.expect("zuul-fingergw resolve");
                if String::from_utf8_lossy(&text.stdout).contains(&format!("gateway {WEST}:")) {
                    return;
                }
            }
        })
        .await;
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for (_, child) in &self.running {
            let pid = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed()));
            if let Some(pid) = pid {
                let _ = kill_process_group(pid, Signal::KILL);
            }
        }
    }
}

/// Forwards one port of this host to another.
async fn relay(from: u16, to: u16) {
    let listener = TcpListener::bind(("127.0.0.1", from)).await.expect("a port");
    tokio::spawn(async move {
        loop {
            let (mut client, _) = listener.accept().await.expect("a connection");
            tokio::spawn(async move {
                let Ok(mut server) = TcpStream::connect(("127.0.0.1", to)).await else { return };
                let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
}

#[test]
fn every_command_of_the_pages_works() {
    in_namespaces(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS, async || {
        let mut world = World::new().await;
        let first = "docs/quick-start.md";
        let mut report = String::new();
        let mut pages = pages::all();
        // This page creates the gateways.
        pages.sort_by_key(|page| page.name != first);
        let mut count = 0;
        for page in &pages {
            let blocks = world.play(&page.blocks()).await;
            let _ = writeln!(report, "{}: {blocks}", page.name);
            count += blocks;
        }
        for name in ["zuul-fingergw.8", "zuul-fingergw.toml.5"] {
            let mut blocks = pages::manual(name);
            assert!(blocks.len() >= 3, "{name}: {blocks:?}");
            for block in &mut blocks {
                block.text = block.text.replace("UUID", BUILD);
            }
            count += world.play(&blocks).await;
        }
        assert!(count >= 10, "blocks run:\n{report}");
    });
}
