//! Debian machines to install into and to boot: systemd-nspawn on a minimal Debian of this
//! machine's release, which mmdebstrap creates once and which stays below `target/`.
//!
//! Such a test has its own namespaces; machine and test share the network namespace, so the machine
//! reaches what listens on the test's loopback, and port 79 is free. It needs root, and cgroups for
//! the machine (any layout: version 2, version 1 with `name=systemd`, or both).
//!
//! ```text
//! with_debian(async || {
//!     let root = Root::new();                              // its own layer above the shared root
//!     root.write("/etc/zuul/zuul.conf", "...");            // any time, also while it runs
//!     std::fs::copy(package, root.path("/p.deb"));
//!     let machine = root.boot(&[]).await;                  // arguments are systemd-nspawn's
//!     machine.succeeds("dpkg -i /p.deb").await;            // a shell command; returns its output
//!     let outcome = machine.run("systemctl is-active zuul-fingergw").await;   // or check its status
//!     machine.root.read("/etc/passwd");
//! });                                                      // dropping it ends all of its processes
//! ```

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use nix::sched::CloneFlags;
use nix::unistd::gettid;
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};

use tempfile::TempDir;
use tokio::net::UnixDatagram;

use super::namespace::in_namespaces;
use super::{report_skipped, tool, within};

/// Packages in addition to the essential ones.
const PACKAGES: &str = "systemd-sysv,apt,rpm";

/// Directories that the tests do not use; leaving them out makes the root two thirds smaller.
const LEFT_OUT: [&str; 3] = ["/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/man/*"];

/// Runs a test that creates [`Root`]s. The shared root is created first, outside the test's
/// namespaces, because mmdebstrap needs the network.
///
/// If this process may not create cgroups, as in most containers, or lives in a changed root, no
/// machine can be booted: the test is skipped, with a message.
pub(crate) fn with_debian(test: impl AsyncFnOnce() + Send + 'static) {
    if let Err(why) = may_boot() {
        return report_skipped(&format!("no machine can be booted here: {why}"));
    }
    make_shared();
    in_namespaces(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS, test);
}

/// Checks that this process may create cgroups in its hierarchies and that its root is the root of
/// its mount namespace: in another root (chroot(2)) systemd cannot give services mount namespaces.
fn may_boot() -> Result<(), String> {
    let root = |command: &mut Command| {
        let text = command.args(["stat", "--format=%d:%i", "/"]).output();
        text.ok().filter(|text| text.status.success()).map(|text| text.stdout)
    };
    let namespaces = root(Command::new("nsenter").args(["--mount=/proc/self/ns/mnt", "--"]));
    if namespaces.is_none() || namespaces != root(&mut Command::new("env")) {
        return Err("this process lives below a changed root".to_owned());
    }
    let groups = hierarchies();
    if groups.is_empty() {
        return Err("no cgroups are mounted that a systemd could use".to_owned());
    }
    for group in groups {
        let probe = group.join(format!("zuul-fingergw-probe-{}", gettid()));
        fs::create_dir(&probe).map_err(|error| format!("{}: {error}", probe.display()))?;
        fs::remove_dir(&probe).map_err(|error| format!("{}: {error}", probe.display()))?;
    }
    Ok(())
}

/// Directory of the shared root and of the layers above it.
fn home() -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("debian")
}

/// The shared root, complete if the stamp beside it has the expected content.
fn shared() -> PathBuf {
    home().join("root")
}

/// Creates the shared root unless a complete one exists. Concurrent test processes wait for the
/// lock.
fn make_shared() {
    let home = home();
    fs::create_dir_all(&home).expect("a directory below target/");
    let lock = File::create(home.join("lock")).expect("a lock file");
    flock(&lock, FlockOperation::LockExclusive).expect("the lock");
    let (root, stamp) = (shared(), home.join("complete"));
    let release = fs::read_to_string("/etc/os-release").expect("/etc/os-release");
    let suite = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    // The program under test is linked with this machine's libraries.
    let suite = suite.expect("a machine with Debian on it");
    let wanted = format!("{suite} {PACKAGES} {LEFT_OUT:?}");
    if fs::read_to_string(&stamp).is_ok_and(|found| found == wanted) {
        return;
    }
    let _ = fs::remove_file(&stamp);
    if root.exists() {
        tool(Command::new("rm").args(["-rf", "--one-file-system"]).arg(&root));
    }
    // From this machine's package sources. The mount namespace hides what mmdebstrap mounts.
    let mut make = Command::new("unshare");
    make.args(["--mount", "mmdebstrap", "--mode=root", "--variant=essential"]);
    make.arg(format!("--include={PACKAGES}"));
    make.args(LEFT_OUT.map(|path| format!("--dpkgopt=path-exclude={path}")));
    // The stamp is written last, so that an interrupted creation is repeated.
    make.arg("--dpkgopt=force-unsafe-io");
    tool(make.arg(suite).arg(&root));
    rustix::fs::sync();
    fs::write(&stamp, wanted).expect("a stamp");
}

/// A root directory for one test, not booted.
pub(crate) struct Root {
    /// Directory of the overlay: the changed files, and the mount of both layers.
    directory: TempDir,
}

impl Root {
    /// Creates a root. Its mount belongs to the calling thread's mount namespace and ends with it.
    pub(crate) fn new() -> Self {
        let shared = shared();
        let directory = TempDir::new_in(home()).expect("a directory below target/");
        let path = |name: &str| directory.path().join(name);
        // On a tmpfs: the disk may be an overlay itself, which cannot be the upper layer of another
        // one.
        tool(Command::new("mount").args(["-t", "tmpfs", "tmpfs"]).arg(directory.path()));
        for name in ["changed", "work", "root"] {
            fs::create_dir(path(name)).expect("a directory");
        }
        let layers = format!(
            "lowerdir={},upperdir={},workdir={}",
            shared.display(),
            path("changed").display(),
            path("work").display()
        );
        tool(
            Command::new("mount")
                .args(["-t", "overlay", "overlay", "-o", &layers])
                .arg(path("root")),
        );
        Self { directory }
    }

    /// Returns the path on this machine of the file `inside` the root.
    pub(crate) fn path(&self, inside: &str) -> PathBuf {
        self.directory.path().join("root").join(inside.trim_start_matches('/'))
    }

    /// Writes a file and creates its directories.
    pub(crate) fn write(&self, inside: &str, text: &str) {
        let path = self.path(inside);
        fs::create_dir_all(path.parent().expect("a file")).expect("its directory");
        fs::write(&path, text).expect(inside);
    }

    /// Copies a file of this machine with its mode and creates its directories.
    pub(crate) fn copy(&self, from: &Path, inside: &str) {
        let path = self.path(inside);
        fs::create_dir_all(path.parent().expect("a file")).expect("its directory");
        fs::copy(from, &path).unwrap_or_else(|error| panic!("{}: {error}", from.display()));
    }

    pub(crate) fn read(&self, inside: &str) -> String {
        fs::read_to_string(self.path(inside)).expect(inside)
    }

    /// Boots the root, with further arguments for systemd-nspawn such as `--bind-ro=FROM:TO`, and
    /// waits until its systemd reports that it is up.
    pub(crate) async fn boot(self, arguments: &[&str]) -> Machine {
        // nspawn names the cgroup after the machine; several machines must not share one.
        let groups: Vec<_> =
            hierarchies().iter().map(|group| group.join(self.name("zuul-fingergw"))).collect();
        for group in &groups {
            fs::create_dir(group).expect("a cgroup");
        }
        let socket = self.directory.path().join("notify");
        let datagrams = UnixDatagram::bind(&socket).expect("a notify socket");
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "sh", "-c", INTO_GROUPS, "sh"]).args(&groups);
        command.args(["--", "systemd-nspawn", "--quiet", "--boot", "--notify-ready=yes"]);
        // There is no systemd-machined here that could register machines or create their units.
        command.args(["--register=no", "--keep-unit", "--link-journal=no", "--console=pipe"]);
        command.arg(format!("--machine={}", self.name("m")));
        command.arg("--directory").arg(self.path("")).args(arguments);
        command.env("NOTIFY_SOCKET", &socket).stdin(Stdio::null());
        let console = self.directory.path().join("console");
        let console = File::create(console).expect("a file for the console");
        command.stderr(console.try_clone().expect("a copy")).stdout(console);
        let nspawn = command.spawn().expect("setpriv");
        let mut machine = Machine { root: self, nspawn, leader: None, groups };
        within("the machine to be up", async {
            let mut buffer = vec![0; 4096];
            loop {
                let count = datagrams.recv(&mut buffer).await.expect("a notification");
                let output = String::from_utf8_lossy(&buffer[..count]);
                let value = |key| output.lines().find_map(|line| line.strip_prefix(key));
                if let Some(pid) = value("X_NSPAWN_LEADER_PID=") {
                    machine.leader = pid.parse().ok().and_then(Pid::from_raw);
                }
                if value("READY=") == Some("1") {
                    return;
                }
            }
        })
        .await;
        machine
    }

    fn name(&self, prefix: &str) -> String {
        let name = self.directory.path().file_name().expect("a name").to_string_lossy();
        format!("{prefix}-{}", name.trim_start_matches('.'))
    }
}

impl Drop for Root {
    /// A directory with mounts below it could not be removed.
    fn drop(&mut self) {
        for place in [self.path(""), self.directory.path().to_owned()] {
            let unmounted = Command::new("umount").arg(&place).status();
            if !unmounted.is_ok_and(|status| status.success()) {
                eprintln!("{} stays mounted", place.display());
            }
        }
    }
}

/// Joins the groups before `--` and executes the command after it.
const INTO_GROUPS: &str = r#"
    while [ "$1" != -- ]; do echo $$ >"$1/cgroup.procs" || exit 1; shift; done
    shift
    exec "$@""#;

/// The cgroups of this process in the hierarchies that systemd uses for units.
fn hierarchies() -> Vec<PathBuf> {
    let read = |file| fs::read_to_string(file).expect(file);
    let (mounts, own) = (read("/proc/self/mounts"), read("/proc/self/cgroup"));
    let group_in = |hierarchy: &str| {
        own.lines().find_map(|line| line.split_once(':')?.1.strip_prefix(hierarchy))
    };
    mounts
        .lines()
        .filter_map(|line| {
            let fields: Vec<_> = line.split(' ').collect();
            let group = match fields[2] {
                "cgroup2" => group_in(":/"),
                "cgroup" if fields[3].contains("name=systemd") => group_in("name=systemd:/"),
                _ => None,
            };
            Some(Path::new(fields[1]).join(group?))
        })
        .collect()
}

/// A booted root. Dropping it ends all processes in it.
pub(crate) struct Machine {
    pub(crate) root: Root,
    nspawn: Child,
    /// The machine's first process, by its PID outside.
    leader: Option<Pid>,
    groups: Vec<PathBuf>,
}

impl Machine {
    fn command(&self, words: &str) -> Command {
        let leader = self.leader.expect("its first process");
        let mut command = Command::new("nsenter");
        // The root as well: if this process lives in a changed root (chroot(2)), the root of the
        // mount namespace is a different one, that of the machine.
        command.args(["--target", &leader.to_string(), "--all", "--root", "--wd"]);
        command.args(["--", "sh", "-c", words]);
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("LC_ALL", "C.UTF-8");
        command.stdin(Stdio::null());
        command
    }

    /// Runs a shell command in the machine as root, until it ends.
    pub(crate) async fn run(&self, words: &str) -> Output {
        let mut command = tokio::process::Command::from(self.command(words));
        within(words, command.kill_on_drop(true).output()).await.expect("nsenter (util-linux)")
    }

    /// Like [`Self::run`] for a command that must succeed. Returns its standard output.
    pub(crate) async fn succeeds(&self, words: &str) -> String {
        let Output { status, stdout, stderr } = self.run(words).await;
        let stdout = String::from_utf8(stdout).expect("UTF-8");
        let stderr = String::from_utf8_lossy(&stderr);
        assert!(status.success(), "{words}: {status}\n{stdout}{stderr}");
        stdout
    }
}

impl Drop for Machine {
    /// Prints console and journal when a test fails, and cleans up.
    fn drop(&mut self) {
        if std::thread::panicking() {
            let console = self.root.directory.path().join("console");
            eprintln!("--- console\n{}", fs::read_to_string(console).unwrap_or_default());
            if self.leader.is_some() {
                let _ = self.command("journalctl --no-pager --lines=200 >&2").status();
            }
        }
        // When the first process of a PID namespace has ended, so have all others.
        let ended = self.leader.map(|leader| kill_process(leader, Signal::KILL));
        if !matches!(ended, Some(Ok(()))) {
            let _ = self.nspawn.kill();
        }
        let _ = self.nspawn.wait();
        for group in &self.groups {
            remove(group);
        }
    }
}

/// Removes a cgroup and all cgroups below it. Their files belong to the kernel and cannot be
/// removed.
fn remove(group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path());
        }
    }
    let _ = fs::remove_dir(group);
}
