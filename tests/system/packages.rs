//! The packages of `etc/packages`, built of the program under test: reproducible builds, contents,
//! and installing, upgrading and removing them on a machine.

use std::collections::BTreeSet;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::support::certificates::Identity;
use crate::support::checkout::top;
use crate::support::client::Client;
use crate::support::debian_root::{Machine, Root, with_debian};
use crate::support::executor::Executor;
use crate::support::gateway::{BINARY, Builder};
use crate::support::page_commands::PageCommands;
use crate::support::running_stream::RunningStream;
use crate::support::system::System;
use crate::support::zookeeper::ZooKeeper;
use crate::support::{tool, within};

/// The .deb and .rpm of one build.
struct Packages {
    deb: PathBuf,
    rpm: PathBuf,
    _directory: TempDir,
}

/// Builds packages of the program under test, with this revision.
fn make(revision: &str) -> Packages {
    make_with(revision, |_| {})
}

fn make_with(revision: &str, change: impl FnOnce(&mut Command)) -> Packages {
    let directory = TempDir::new().expect("a directory");
    let script = top().join("etc/packages/build");
    let mut command = Command::new(script);
    command.arg(BINARY).arg(directory.path()).arg(revision);
    // The compression is not tested.
    command.env("LEVEL", "0").env("CARGO", env!("CARGO")).env("SOURCE_DATE_EPOCH", "1700000000");
    change(&mut command);
    tool(&mut command);
    let made = |kind: &str| {
        let files = fs::read_dir(directory.path()).expect("the directory").flatten();
        let found =
            files.map(|file| file.path()).find(|path| path.extension().is_some_and(|e| e == kind));
        found.unwrap_or_else(|| panic!("no .{kind}"))
    };
    Packages { deb: made("deb"), rpm: made("rpm"), _directory: directory }
}

/// Packages of revision 1.
fn first() -> &'static Packages {
    static FIRST: OnceLock<Packages> = OnceLock::new();
    FIRST.get_or_init(|| make("1"))
}

/// Maintainer of the packages of revision 2.
const MAINTAINER: &str = "Operators & maintainers <zuul@example.org>";

/// Packages of revision 2.
fn second() -> &'static Packages {
    static SECOND: OnceLock<Packages> = OnceLock::new();
    let from = |command: &mut Command| {
        command.env("MAINTAINER", MAINTAINER);
    };
    SECOND.get_or_init(|| make_with("2", from))
}

/// The package metadata contain the configured maintainer.
#[test]
fn packages_name_their_maintainer() {
    let Packages { deb, rpm, .. } = second();
    let debian = tool(Command::new("dpkg-deb").arg("--field").arg(deb).arg("Maintainer"));
    let mut query = Command::new("rpm");
    query.args(["--query", "--package", "--queryformat", "%{PACKAGER}\n"]).arg(rpm);
    assert_eq!(
        [debian, tool(&mut query)],
        [MAINTAINER, MAINTAINER].map(|line| format!("{line}\n"))
    );
}

/// Built by another user, in another directory and time zone.
#[test]
fn packages_are_reproducible() {
    let elsewhere = TempDir::with_prefix("elsewhere-and-a-longer-path-").expect("a directory");
    let again = make_with("1", |command| {
        command.env("TMPDIR", elsewhere.path()).env("TZ", "Asia/Tokyo").env("LC_ALL", "C");
        command.env("DEBEMAIL", "else@example.org").env("HOME", elsewhere.path());
        // cargo itself finds its own by HOME.
        let home = std::env::var("CARGO_HOME").map(PathBuf::from);
        let home = home.unwrap_or_else(|_| std::env::home_dir().expect("a home").join(".cargo"));
        command.env("CARGO_HOME", home);
    });
    for (one, other) in [(&first().deb, &again.deb), (&first().rpm, &again.rpm)] {
        let [one_bytes, other_bytes] = [one, other].map(|path| fs::read(path).expect("a package"));
        assert!(one_bytes == other_bytes, "{} and {} differ", one.display(), other.display());
        assert_eq!(one.file_name(), other.file_name());
    }
}

#[test]
fn lintian_accepts_the_package() {
    let mut lintian = Command::new("lintian");
    lintian.args(["--fail-on", "error,warning", "--tag-display-limit", "0"]);
    let output = tool(lintian.arg(&first().deb));
    assert_eq!(output, "");
}

/// Files that an operator expects. Both packages contain them, in the paths of their distributions.
#[test]
fn packages_have_all_files() {
    let Packages { deb, rpm, .. } = first();
    let listed = tool(Command::new("dpkg-deb").arg("--contents").arg(deb));
    let debian: BTreeSet<_> = listed
        .lines()
        .filter_map(|line| line.split_whitespace().nth(5)?.strip_prefix('.'))
        .filter(|path| !path.ends_with('/'))
        .collect();
    let listed = tool(Command::new("rpm").args(["--query", "--list", "--package"]).arg(rpm));
    let others: BTreeSet<_> = listed.lines().collect();
    let doc = "/usr/share/doc/zuul-fingergw-rs";
    let licenses = "/usr/share/licenses/zuul-fingergw-rs";
    for (debian_path, other_path) in [
        ("/usr/bin/zuul-fingergw".to_owned(), "/usr/bin/zuul-fingergw".to_owned()),
        same("/usr/lib/sysusers.d/zuul-fingergw.conf"),
        same("/usr/share/man/man8/zuul-fingergw.8.gz"),
        same("/usr/share/man/man5/zuul-fingergw.toml.5.gz"),
        same("/usr/share/bash-completion/completions/zuul-fingergw"),
        same("/usr/share/fish/vendor_completions.d/zuul-fingergw.fish"),
        same(&format!("{doc}/examples/zuul-fingergw.toml")),
        same(&format!("{doc}/examples/credentials.conf")),
        (
            "/usr/share/zsh/vendor-completions/_zuul-fingergw".to_owned(),
            "/usr/share/zsh/site-functions/_zuul-fingergw".to_owned(),
        ),
        (format!("{doc}/changelog.gz"), format!("{doc}/CHANGELOG.md")),
        (format!("{doc}/copyright"), format!("{licenses}/LICENSE")),
        (format!("{doc}/THIRD-PARTY.gz"), format!("{licenses}/THIRD-PARTY")),
    ] {
        assert!(debian.contains(&*debian_path), "{debian_path}: {debian:#?}");
        assert!(others.contains(&*other_path), "{other_path}: {others:#?}");
    }
    for unit in ["/systemd/system/zuul-fingergw.service", "/systemd/system/zuul-fingergw.socket"] {
        assert!(debian.iter().any(|path| path.ends_with(unit)), "{unit}: {debian:#?}");
        assert!(others.contains(&*format!("/usr/lib{unit}")), "{unit}: {others:#?}");
    }
    // Such a file would take precedence over an existing zuul.conf.
    assert!(!debian.iter().chain(&others).any(|path| path.starts_with("/etc/zuul/")));

    // Cannot be installed together with a package of Zuul's own program.
    let relations = ["Conflicts", "Replaces", "Provides"];
    let fields = tool(Command::new("dpkg-deb").arg("--field").arg(deb).args(relations));
    assert_eq!(fields.matches(": zuul-fingergw\n").count(), 3, "{fields}");
    let relations = ["--conflicts", "--provides"];
    let output = tool(Command::new("rpm").args(["--query", "--package"]).args(relations).arg(rpm));
    assert_eq!(output.lines().filter(|line| *line == "zuul-fingergw").count(), 2, "{output}");
}

fn same(path: &str) -> (String, String) {
    (path.to_owned(), path.to_owned())
}

/// Every linked crate has its licence included. The crates determine which texts exist.
#[test]
fn licences_of_all_crates_are_listed() {
    let script = top().join("etc/packages/third-party");
    // As in a release.
    let output = tool(Command::new(script).arg("otlp").env("CARGO", env!("CARGO")));
    let (list, texts) = output.split_once("\n====").expect("texts after the list");
    for line in ["rustls ", "tokio ", "zookeeper-client ", "aws-lc-sys ", "tonic-prost "] {
        let line =
            list.lines().find(|found| found.starts_with(line)).unwrap_or_else(|| panic!("{line}"));
        let (name, license) = line.split_once(": ").expect("its licence");
        assert!(!license.is_empty() && texts.contains(name), "{line}");
    }
    // Only a code generator, and only for tests.
    assert!(!list.contains("serde_derive ") && !list.contains("proptest "), "{list}");
    for text in [
        "Apache License",
        "GNU LESSER GENERAL PUBLIC LICENSE",
        "Permission to use, copy, modify, and/or distribute",
    ] {
        assert!(texts.contains(text), "{text}");
    }
}

/// A release must be committed, and its version must have a section in the changelog.
#[test]
fn release_of_an_unclean_or_unlisted_version_is_rejected() {
    let directory = TempDir::new().expect("a directory");
    let git = |arguments: &[&str]| {
        let mut command = Command::new("git");
        let who = ["-c", "user.name=test", "-c", "user.email=test@example.org"];
        tool(command.current_dir(directory.path()).args(who).args(arguments));
    };
    let write = |name: &str, text: &str| {
        let path = directory.path().join(name);
        fs::create_dir_all(path.parent().expect("a directory")).expect("a directory");
        fs::write(path, text).expect("a file");
    };
    let release = || {
        let mut command = Command::new(directory.path().join("etc/release"));
        let Output { status, stderr, .. } = command.output().expect("the script");
        assert_eq!(status.code(), Some(1));
        String::from_utf8_lossy(&stderr).into_owned()
    };
    let script = top().join("etc/release");
    fs::create_dir(directory.path().join("etc")).expect("a directory");
    fs::copy(script, directory.path().join("etc/release")).expect("a copy");
    write("Cargo.toml", "[package]\nversion = \"1.2.3\"\n[dependencies]\nversion = \"9\"\n");
    write(".gitignore", "/target\n");
    write("docs/CHANGELOG.md", "# Changelog\n\n## Unreleased\n\n## 1.2.3 - 2026-01-02\n");
    git(&["init", "--quiet"]);
    assert!(release().contains("not clean"));
    git(&["add", "."]);
    git(&["commit", "--quiet", "--message", "one"]);
    assert!(release().contains("begins with \"Unreleased\", Cargo.toml says 1.2.3"));
    for entry in ["1.2.4 - 2026-01-02", "1.2.3", "1.2.3-rc.1 - 2026-01-02", "11.2.3 - 2026-01-02"] {
        write("docs/CHANGELOG.md", &format!("# Changelog\n\n## {entry}\n"));
        git(&["commit", "--quiet", "--all", "--message", entry]);
        let printed = release();
        assert!(printed.contains(&format!("begins with \"{entry}\"")), "{printed}");
    }
    // The archive of this version exists already.
    write("docs/CHANGELOG.md", "# Changelog\n\n## 1.2.3 - 2026-01-02\n\n## 1.2.2 - 2026-01-01\n");
    git(&["commit", "--quiet", "--all", "--message", "good"]);
    write("target/release-1.2.3/SHA256SUMS", "");
    let printed = release();
    assert!(printed.contains("target/release-1.2.3 exists already"), "{printed}");
}

#[test]
fn shellcheck_accepts_all_scripts() {
    let scripts = [
        ".ci/bare",
        ".ci/check",
        ".ci/run",
        "tests/bench/run",
        "tests/fuzz/run",
        "tests/fuzz/rustc",
        "tests/run",
        "tests/soak/run",
        "etc/release",
        "etc/packages/build",
        "etc/packages/debian/zuul-fingergw-rs.postinst",
        "etc/packages/debian/zuul-fingergw-rs.postrm",
        "etc/packages/debian/zuul-fingergw-rs.prerm",
    ];
    let mut command = Command::new("shellcheck");
    tool(command.current_dir(top()).args(scripts));
}

/// Each shell completes a command with what the program prints for it.
#[test]
fn shells_complete_the_command_line() {
    let directory = TempDir::new().expect("a directory");
    let file = |shell: &str, name: &str| {
        let script = tool(Command::new(BINARY).args(["completions", shell]));
        let path = directory.path().join(name);
        fs::write(&path, script).expect("a file");
        path
    };
    let bash = r#"
        . "$0"
        COMP_WORDS=(zuul-fingergw st) COMP_CWORD=1
        f=$(complete -p zuul-fingergw) && f=${f##*-F } && ${f%% *} zuul-fingergw st zuul-fingergw
        printf '%s\n' "${COMPREPLY[@]}""#;
    let completed = tool(Command::new("bash").args(["-c", bash]).arg(file("bash", "bash")));
    assert_eq!(completed, "stop\nstatus\n");
    let fish = r#"source $argv[1]; complete --do-complete "zuul-fingergw st""#;
    let mut command = Command::new("fish");
    command.args(["--no-config", "--command", fish]).arg(file("fish", "fish"));
    let completed = tool(command.env("HOME", directory.path()));
    let words: Vec<_> = completed.lines().filter_map(|line| line.split('\t').next()).collect();
    assert_eq!(words, ["status", "stop"], "{completed}");
    // In the directory where zsh finds completions, and parsed by zsh.
    file("zsh", "_zuul-fingergw");
    let zsh = r#"
        fpath=("$1" $fpath)
        autoload -U compinit && compinit -u -D && print $_comps[zuul-fingergw] &&
            autoload +X _zuul-fingergw && print $functions[_zuul-fingergw]"#;
    let mut command = Command::new("zsh");
    command.args(["-f", "-c", zsh, "zsh"]).arg(directory.path());
    let taken = tool(command.env("HOME", directory.path()));
    assert!(taken.starts_with("_zuul-fingergw\n") && taken.contains("status"), "{taken}");
}

/// The commands for one kind of package. Installing and upgrading use the commands of the pages.
struct Kind {
    file: fn(&Packages) -> &Path,
    commands: fn() -> PageCommands,
    /// Number of blocks in docs/upgrading.md for this kind.
    upgrade: usize,
    /// Installs the same version again.
    again: &'static str,
    version: &'static str,
    remove: &'static str,
    /// Files that stay after the last way of removing.
    left: &'static [&'static str],
}

const DEBIAN: Kind = Kind {
    file: |packages| &packages.deb,
    commands: || PageCommands::on("deb"),
    upgrade: 2,
    again: "dpkg --install",
    version: "dpkg-query --show --showformat='${Version}' zuul-fingergw-rs",
    remove: "dpkg --remove zuul-fingergw-rs && dpkg --purge zuul-fingergw-rs",
    left: &[],
};

const RPM: Kind = Kind {
    file: |packages| &packages.rpm,
    commands: || PageCommands::on("rpm"),
    upgrade: 1,
    again: "rpm --force-debian --nodeps --upgrade --replacepkgs",
    version: "rpm --query --queryformat '%{VERSION}-%{RELEASE}' zuul-fingergw-rs",
    remove: "rpm --erase zuul-fingergw-rs",
    // There is no purge.
    left: &["/var/log/zuul-fingergw"],
};

/// Replaces dnf, for files that are new or newer, by rpm. Debian's rpm has no packages that satisfy
/// the dependencies, and asks for an explicit option.
const DNF: &str =
    "#!/bin/sh\n[ \"$1\" = install ] && exec rpm --force-debian --nodeps --upgrade \"$2\"\n";

#[test]
fn deb_is_installed_upgraded_and_removed() {
    a_life(&DEBIAN);
}

#[test]
fn rpm_is_installed_upgraded_and_removed() {
    a_life(&RPM);
}

/// A unit as on hosts that run Zuul's own gateway.
const UPSTREAMS: &str = "/etc/systemd/system/zuul-fingergw.service";
const UPSTREAM: &str = "[Service]\nExecStart=/bin/sleep infinity\n\
                        [Install]\nWantedBy=multi-user.target\n";

const FINGER: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 79);

/// From installing to the last way of removing.
fn a_life(kind: &'static Kind) {
    // Created first: a ZooKeeper session does not wait that long.
    let packages = [(first(), "/root/first"), (second(), "/root/second")];
    with_debian(async move || live(kind, packages).await);
}

async fn live(kind: &Kind, packages: [(&Packages, &str); 2]) {
    let system = System::on(ZooKeeper::start().await).await;
    let root = Root::new();
    for (packages, directory) in packages {
        let file = (kind.file)(packages);
        let name = file.file_name().expect("a name").to_str().expect("UTF-8");
        root.copy(file, &format!("{directory}/{name}"));
    }
    root.write("/usr/bin/dnf", DNF);
    // The machine excludes documentation, and the pages refer to it.
    let all = "path-include=/usr/share/doc/zuul-fingergw-rs/*\n";
    root.write("/etc/dpkg/dpkg.cfg.d/zuul-fingergw", all);
    let machine = root.boot(&[]).await;
    // Every rpm system has these.
    let others = "mkdir -p /usr/share/licenses /usr/share/man/man5 /usr/share/man/man8";
    machine.succeeds(&format!("chmod +x /usr/bin/dnf && {others}")).await;
    let before = files(&machine).await;

    let mut commands = (kind.commands)();
    machine.root.write(UPSTREAMS, UPSTREAM);
    machine.succeeds("systemctl daemon-reload && systemctl enable --now zuul-fingergw").await;
    let output = commands.next(("README.md", "Install"), &machine, packages[0].1).await;
    assert!(output.contains(&format!("{UPSTREAMS} takes precedence")), "{output}");
    // The running unit is not ours.
    machine.succeeds("systemctl is-active zuul-fingergw").await;
    commands.next(("docs/upgrading.md", "From Zuul's own gateway"), &machine, "/").await;
    // Not configured yet.
    for unit in ["zuul-fingergw.service", "zuul-fingergw.socket"] {
        let asked = format!("systemctl is-enabled {unit}; systemctl is-active {unit}; true");
        assert_eq!(machine.succeeds(&asked).await, "disabled\ninactive\n", "{unit}");
    }
    machine.succeeds("id zuul-fingergw && zuul-fingergw --version").await;

    commands.next(("docs/packages.md", "The packages"), &machine, "/").await;
    configure(&system, &machine);
    commands.next(("docs/operating.md", "File permissions"), &machine, "/").await;
    commands.next(("docs/packages.md", "The packages"), &machine, "/").await;
    commands.next(("docs/operating.md", "Upgrade"), &machine, "/").await;
    assert!(system.entries().await.is_empty() && TcpStream::connect(FINGER).await.is_err());
    commands
        .next(("docs/quick-start.md", "Two minutes: beside the Zuul you have"), &machine, "/")
        .await;
    let begin = machine.succeeds("systemctl show --value --property=MainPID zuul-fingergw").await;
    assert_ne!(begin, "0\n");
    upgrade(kind, &system, &machine, &mut commands).await;
    let now = machine.succeeds("systemctl show --value --property=MainPID zuul-fingergw").await;
    assert!(now != "0\n" && now != begin, "{begin}{now}");

    without_zookeeper(kind, &machine).await;
    machine.succeeds(kind.remove).await;
    system.until("the entry to be removed", <[_]>::is_empty).await;
    assert!(TcpStream::connect(FINGER).await.is_err(), "the port is still held");
    machine.succeeds("! systemctl cat zuul-fingergw.service zuul-fingergw.socket").await;
    // Configuration and certificates belong to the operator, and users stay because files may
    // belong to them.
    let owned = ["/etc/zuul", "/etc/passwd-", "/etc/group-", "/etc/shadow-", "/etc/gshadow-"];
    let after = files(&machine).await;
    let left =
        after.difference(&before).filter(|path| !owned.iter().any(|own| path.starts_with(own)));
    assert_eq!(left.collect::<Vec<_>>(), kind.left);
}

/// ZooKeeper cannot be reached: a package manager must not wait forever.
async fn without_zookeeper(kind: &Kind, machine: &Machine) {
    let config = machine.root.read("/etc/zuul/zuul-fingergw.toml");
    let hosts = config.lines().find(|line| line.starts_with("hosts = ")).expect("ZooKeeper");
    let config = config.replace(hosts, "hosts = \"127.0.0.1:1\"");
    machine.root.write("/etc/zuul/zuul-fingergw.toml", &config);
    // Limits the wait of the package to 5 s, enough to see that it waits.
    machine.root.write("/root/timeout", "#!/bin/sh\nshift\nexec /root/real 5 \"$@\"\n");
    let replace = "cp -a /usr/bin/timeout /root/real && install /root/timeout /usr/bin/timeout";
    machine.succeeds(replace).await;
    let output = machine.succeeds(&format!("{} /root/second/zuul* 2>&1", kind.again)).await;
    assert!(output.contains("zuul-fingergw is not back yet"), "{output}");
    let state = "systemctl show --value --property=ActiveState zuul-fingergw";
    assert_eq!(machine.succeeds(state).await, "activating\n");
    assert!(TcpStream::connect(FINGER).await.is_ok(), "a client waits meanwhile");
}

/// Returns all files except those of the package tools, of the kernel, and temporary ones.
async fn files(machine: &Machine) -> BTreeSet<String> {
    let outside = ["/proc", "/sys", "/dev", "/run", "/tmp", "/var/tmp", "/var/cache"];
    let books = ["/var/lib/dpkg", "/var/lib/rpm", "/var/log/journal", "/var/log/dpkg.log"];
    let more_books = ["/var/lib/apt", "/var/log/apt"];
    let timers = ["/root", "/var/lib/systemd/timers", "/var/lib/systemd/random-seed"];
    let excluded = [&outside[..], &books, &more_books, &timers].concat().join(" -o -path ");
    let found =
        machine.succeeds(&format!("find / \\( -path {excluded} \\) -prune -o -print")).await;
    found.lines().map(str::to_owned).collect()
}

/// Writes a configuration in place of the example, and keys that only root can read so far.
fn configure(system: &System, machine: &Machine) {
    let mut builder = Builder::new(system).listeners(&["address = \"[::]:79\""]);
    let identity = &system.zookeeper.identity;
    let inside = |name: &str| PathBuf::from(format!("/etc/zuul/ssl/zookeeper{name}"));
    let [cert, key, ca] = [".crt", ".key", "-ca.crt"].map(inside);
    let installed = Identity { cert, key, ca, ..identity.clone() };
    for (from, to) in [
        (&identity.cert, &installed.cert),
        (&identity.key, &installed.key),
        (&identity.ca, &installed.ca),
    ] {
        machine.root.copy(from, to.to_str().expect("UTF-8"));
    }
    builder.zookeeper_identity = installed;
    machine.root.copy(&builder.write(), "/etc/zuul/zuul-fingergw.toml");
    let private = fs::Permissions::from_mode(0o600);
    fs::set_permissions(machine.root.path("/etc/zuul/ssl/zookeeper.key"), private).expect("a key");
}

/// A running stream has the grace period, and no client is refused.
async fn upgrade(kind: &Kind, system: &System, machine: &Machine, commands: &mut PageCommands) {
    const LOG: &str = "one line\nand another\n";
    assert!(machine.succeeds(kind.version).await.ends_with("-1"));
    let mut stream = RunningStream::start(system, FINGER).await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    let serving = tokio::spawn(async move {
        loop {
            executor.serve(LOG.as_bytes()).await;
        }
    });
    let (enough, enough_seen) = watch::channel(false);
    let mut clients = JoinSet::new();
    for _ in 0..2 {
        let (build, enough) = (build.clone(), enough_seen.clone());
        clients.spawn(async move {
            let mut served = 0_usize;
            while !*enough.borrow() {
                assert_eq!(Client::ask(FINGER, &build).await.text().await, LOG);
                served += 1;
            }
            served
        });
    }
    let page = ("docs/upgrading.md", "To a newer version of this program");
    let upgrading = async {
        for _ in 0..kind.upgrade {
            commands.next(page, machine, "/root/second").await;
        }
        enough.send_replace(true);
    };
    let streaming = async {
        system.until("the old gateway to stop", <[_]>::is_empty).await;
        stream.pass("while it is replaced\n").await;
        stream.finish().await;
    };
    tokio::join!(upgrading, streaming);
    while let Some(served) = within("the clients to end", clients.join_next()).await {
        assert!(served.expect("every client is served") > 0);
    }
    serving.abort();
    assert!(machine.succeeds(kind.version).await.ends_with("-2"));
}
