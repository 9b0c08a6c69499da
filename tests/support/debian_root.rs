//! A Debian machine of one's own to install into and to boot: systemd-nspawn on a minimal Debian of
//! this machine's release, which mmdebstrap makes once and which stays below `target/`.
//!
//! A test that wants one lives in namespaces of its own, whose network the machine shares: what
//! listens on loopback in the test is reached from inside, and port 79 is nobody else's. It needs
//! root, and cgroups to put the machine's in (any layout: version 2, 1 with `name=systemd`, or both).
//!
//! ```text
//! beside_debian(async || {
//!     let root = Root::new();                              // a layer of its own above the shared root
//!     root.write("/etc/zuul/zuul.conf", "...");            // any time, also while it runs
//!     std::fs::copy(package, root.path("/p.deb"));
//!     let machine = root.boot(&[]).await;                  // arguments are systemd-nspawn's
//!     machine.succeeds("dpkg -i /p.deb").await;            // a shell's words; returns what it printed
//!     let outcome = machine.run("systemctl is-active zuul-fingergw").await;   // or see how it ended
//!     machine.root.read("/etc/passwd");
//! });                                                      // dropped: all that ran in it is gone
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

use super::namespace::apart;
use super::{report_skipped, tool, within};

/// Beside what Debian calls essential.
const PACKAGES: &str = "systemd-sysv,apt,rpm";

/// What nobody reads there makes a third of it.
const LEFT_OUT: [&str; 3] = ["/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/man/*"];

/// Runs a test that makes [`Root`]s. The shared one is made before, where there is a network.
///
/// Where this process may make no cgroups, as in most containers, or lives below a changed root, nothing
/// can be booted: the test is left out, and says so.
pub(crate) fn with_debian(test: impl AsyncFnOnce() + Send + 'static) {
    if let Err(why) = may_boot() {
        return report_skipped(&format!("no machine can be booted here: {why}"));
    }
    make_shared();
    apart(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS, test);
}

/// Whether cgroups can be made where this process is in the hierarchies, and its root is that of its
/// mount namespace: below another one (chroot(2)) systemd cannot give services namespaces of their own.
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

/// Where the shared root lies, and the layers above it.
fn home() -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("debian")
}

/// The shared root, which is whole where the stamp beside it says so.
fn shared() -> PathBuf {
    home().join("root")
}

/// Makes the shared root if there is none or only the beginning of one. Others wait meanwhile.
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
    // From where this machine's packages come. What it mounts is nobody else's to see.
    let mut make = Command::new("unshare");
    make.args(["--mount", "mmdebstrap", "--mode=root", "--variant=essential"]);
    make.arg(format!("--include={PACKAGES}"));
    make.args(LEFT_OUT.map(|path| format!("--dpkgopt=path-exclude={path}")));
    // Half the time: one that was made while the machine lost its power has no stamp.
    make.arg("--dpkgopt=force-unsafe-io");
    tool(make.arg(suite).arg(&root));
    rustix::fs::sync();
    fs::write(&stamp, wanted).expect("a stamp");
}

/// A root directory of one's own, not booted.
pub(crate) struct Root {
    /// Of the layer: what was changed, and where both are seen as one.
    directory: TempDir,
}

impl Root {
    /// A new one. Its mount belongs to the calling thread's namespace, and ends with that.
    pub(crate) fn new() -> Self {
        let shared = shared();
        let directory = TempDir::new_in(home()).expect("a directory below target/");
        let path = |name: &str| directory.path().join(name);
        // Not on the disk: it may be an overlay itself, which cannot lie below another one's changes.
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

    /// Where the file that is `inside` there lies here.
    pub(crate) fn path(&self, inside: &str) -> PathBuf {
        self.directory.path().join("root").join(inside.trim_start_matches('/'))
    }

    /// Writes a file, its directories made.
    pub(crate) fn write(&self, inside: &str, text: &str) {
        let path = self.path(inside);
        fs::create_dir_all(path.parent().expect("a file")).expect("its directory");
        fs::write(&path, text).expect(inside);
    }

    /// Copies a file of this machine, its directories made. Mode and all are its own.
    pub(crate) fn copy(&self, from: &Path, inside: &str) {
        let path = self.path(inside);
        fs::create_dir_all(path.parent().expect("a file")).expect("its directory");
        fs::copy(from, &path).unwrap_or_else(|error| panic!("{}: {error}", from.display()));
    }

    pub(crate) fn read(&self, inside: &str) -> String {
        fs::read_to_string(self.path(inside)).expect(inside)
    }

    /// Boots it, with more arguments for systemd-nspawn, such as `--bind-ro=FROM:TO`, and waits
    /// until its systemd says that it is up.
    pub(crate) async fn boot(self, arguments: &[&str]) -> Machine {
        // Several machines would else be one to the kernel, whose name nspawn gives without a manager.
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
        // Nobody here keeps a register of machines or gives them units.
        command.args(["--register=no", "--keep-unit", "--link-journal=no", "--console=pipe"]);
        command.arg(format!("--machine={}", self.name("m")));
        command.arg("--directory").arg(self.path("")).args(arguments);
        command.env("NOTIFY_SOCKET", &socket).stdin(Stdio::null());
        let console = self.directory.path().join("console");
        let console = File::create(console).expect("a file for what it says");
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
    /// What is mounted could not be removed.
    fn drop(&mut self) {
        for place in [self.path(""), self.directory.path().to_owned()] {
            let unmounted = Command::new("umount").arg(&place).status();
            if !unmounted.is_ok_and(|status| status.success()) {
                eprintln!("{} stays mounted", place.display());
            }
        }
    }
}

/// Joins the groups before `--` and becomes what stands behind it.
const INTO_GROUPS: &str = r#"
    while [ "$1" != -- ]; do echo $$ >"$1/cgroup.procs" || exit 1; shift; done
    shift
    exec "$@""#;

/// The groups this process is in, of the hierarchies that a systemd keeps its units in.
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

/// A root that has been booted. Dropping it ends all that runs in it.
pub(crate) struct Machine {
    pub(crate) root: Root,
    nspawn: Child,
    /// Its first process, as seen from here.
    leader: Option<Pid>,
    groups: Vec<PathBuf>,
}

impl Machine {
    fn command(&self, words: &str) -> Command {
        let leader = self.leader.expect("its first process");
        let mut command = Command::new("nsenter");
        // Its root as well: where this process lives below a changed root (chroot(2)), that of the mount
        // namespace is another one, the machine's own.
        command.args(["--target", &leader.to_string(), "--all", "--root", "--wd"]);
        command.args(["--", "sh", "-c", words]);
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("LC_ALL", "C.UTF-8");
        command.stdin(Stdio::null());
        command
    }

    /// Runs a shell with these words in it, as root, to its end.
    pub(crate) async fn run(&self, words: &str) -> Output {
        let mut command = tokio::process::Command::from(self.command(words));
        within(words, command.kill_on_drop(true).output()).await.expect("nsenter (util-linux)")
    }

    /// The same for what has to succeed. Returns what it printed on standard output.
    pub(crate) async fn succeeds(&self, words: &str) -> String {
        let Output { status, stdout, stderr } = self.run(words).await;
        let stdout = String::from_utf8(stdout).expect("UTF-8");
        let stderr = String::from_utf8_lossy(&stderr);
        assert!(status.success(), "{words}: {status}\n{stdout}{stderr}");
        stdout
    }
}

impl Drop for Machine {
    /// Shows what happened when a test fails, and leaves nothing behind.
    fn drop(&mut self) {
        if std::thread::panicking() {
            let console = self.root.directory.path().join("console");
            eprintln!("--- console\n{}", fs::read_to_string(console).unwrap_or_default());
            if self.leader.is_some() {
                let _ = self.command("journalctl --no-pager --lines=200 >&2").status();
            }
        }
        // With the first process of a PID namespace all others are gone when it is.
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

/// Removes a cgroup and all that are in it. Their files are the kernel's and cannot be removed.
fn remove(group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path());
        }
    }
    let _ = fs::remove_dir(group);
}
