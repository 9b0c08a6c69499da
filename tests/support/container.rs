//! The container image, built by buildah from `etc/container/Containerfile`, and containers of it,
//! run by podman. Both tools are from Debian.
//!
//! Two parts of the build are replaced, because a test cannot or need not repeat them: the stage
//! that compiles, by an existing binary, and Debian's base image, by an image with busybox.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Output;

use serde_json::Value;
use tempfile::TempDir;
use tokio::process::Command;

use super::checkout::top;
use super::gateway::open_to_all;
use super::{report_skipped, within};

/// From Debian's package busybox-static.
const BUSYBOX: &str = "/bin/busybox";

/// Commands that the build stages on Debian's image run.
const COMMANDS: [&str; 6] = ["sh", "mkdir", "chown", "chmod", "echo", "rm"];

/// Commands that the build stages run and busybox lacks; replaced by empty scripts.
const IDLE: [&str; 2] = ["apt-get", "useradd"];

const IMAGE: &str = "localhost/zuul-fingergw";

/// A user ID as OpenShift assigns it, with OpenShift's group.
pub(crate) const ARBITRARY_USER: &str = "1000660000:0";

/// Gives the container engine its own view of control groups, because it refuses machines that
/// mount version 1 and 2, and its own PID namespace, so that all processes end with the first.
const ISOLATE: &str = "mountpoint -q /sys || mount -t sysfs none /sys
                     umount -R /sys/fs/cgroup 2>/dev/null
                     mount -t cgroup2 none /sys/fs/cgroup && exec \"$@\"";

/// Podman options that replace what a service manager or a cluster would set up.
const HERE: [&str; 6] = [
    "--network=host",
    "--cgroups=disabled",
    "--ulimit=host",
    "--pull=never",
    "--rm",
    "--log-driver=none",
];

/// Returns whether this process may run containers. It may not in most containers; then the calling
/// test must be skipped, which this function reports.
pub(crate) async fn may_run() -> bool {
    let Output { status, stderr, .. } =
        isolated().arg("true").output().await.expect("unshare (util-linux)");
    if !status.success() {
        let text = String::from_utf8_lossy(&stderr);
        report_skipped(&format!("no container can be run here: {}", text.trim()));
    }
    status.success()
}

/// Returns a command that runs its further arguments in the namespaces of [`ISOLATE`].
fn isolated() -> Command {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]);
    command.args(["sh", "-c", ISOLATE, "sh"]);
    command
}

/// Options of a container in a cluster with restricted security settings.
pub(crate) fn confined() -> Vec<String> {
    ["--read-only", "--read-only-tmpfs=false", "--cap-drop=all", "--security-opt=no-new-privileges"]
        .into_iter()
        .map(str::to_owned)
        .chain([format!("--user={ARBITRARY_USER}")])
        .collect()
}

/// Storage of images and containers, with the one image.
pub(crate) struct Image {
    storage: TempDir,
}

impl Image {
    /// Builds the image that contains `program` only.
    pub(crate) async fn build(program: &Path) -> Self {
        Self::build_with(program, &[]).await
    }

    /// Builds the image with a shell.
    pub(crate) async fn build_shell(program: &Path) -> Self {
        Self::build_with(program, &["--target=shell"]).await
    }

    async fn build_with(program: &Path, options: &[&str]) -> Self {
        let image = Self { storage: TempDir::new().expect("a directory for images") };
        let debian = image.debian().await;
        let context = image.storage.path().join("program");
        fs::create_dir(&context).expect("a directory");
        let program = program.to_str().expect("UTF-8");
        let to = context.join("zuul-fingergw");
        run(Command::new("strip").args(["-o", to.to_str().expect("UTF-8"), program])).await;
        let mut build = image.buildah("bud");
        build.args(["--isolation=chroot", "--layers=false", "--pull-never", "--tag", IMAGE]);
        build.arg(format!("--build-context=program={}", context.display()));
        build.arg(format!("--build-arg=DEBIAN_IMAGE={debian}"));
        build.args(["--build-arg=VERSION=1.2.3", "--build-arg=REVISION=abcdef"]);
        build.arg("--build-arg=SOURCE=https://source.example.org/");
        build.args(options).args(["-f", "etc/container/Containerfile", "."]);
        run(&mut build).await;
        image
    }

    /// Creates the replacement for Debian's image.
    async fn debian(&self) -> &'static str {
        const NAME: &str = "localhost/debian";
        let container = run(self.buildah("from").arg("scratch")).await;
        let root = PathBuf::from(run(self.buildah("mount").arg(&container)).await);
        fs::create_dir(root.join("bin")).expect("a directory");
        fs::copy(BUSYBOX, root.join("bin/busybox")).expect("busybox (tests/run installs it)");
        for command in COMMANDS {
            symlink("busybox", root.join("bin").join(command)).expect("a link");
        }
        for command in IDLE {
            let path = root.join("bin").join(command);
            fs::write(&path, "#!/bin/sh\n").expect("a script");
            open_to_all(&path);
        }
        // Present in Debian's image; must not be copied into ours.
        fs::create_dir(root.join("root")).expect("a directory");
        fs::write(root.join("root/.profile"), "").expect("a file");
        run(self.buildah("config").args(["--env", "PATH=/bin", &container])).await;
        run(self.buildah("commit").args(["--rm", &container, NAME])).await;
        NAME
    }

    fn buildah(&self, command: &str) -> Command {
        let mut buildah = Command::new("buildah");
        buildah.args(self.storage_arguments()).arg(command);
        buildah.current_dir(top());
        buildah
    }

    fn storage_arguments(&self) -> [String; 3] {
        let storage = self.storage.path();
        [
            format!("--root={}", storage.join("storage").display()),
            format!("--runroot={}", storage.join("run").display()),
            "--storage-driver=vfs".to_owned(),
        ]
    }

    /// Returns the image's configuration in the image format's own terms.
    pub(crate) async fn config(&self) -> Value {
        let output = run(self.buildah("inspect").args(["--type=image", IMAGE])).await;
        let mut output: Value = serde_json::from_str(&output).expect("JSON");
        output["OCIv1"]["config"].take()
    }

    /// Returns the image's root directory.
    pub(crate) async fn root(&self) -> PathBuf {
        let container = run(self.buildah("from").args(["--pull-never", IMAGE])).await;
        PathBuf::from(run(self.buildah("mount").arg(container)).await)
    }

    /// Returns a command that runs a container with these options, and `command` or else the
    /// image's.
    pub(crate) fn container(&self, options: &[String], command: &[&str]) -> Command {
        let mut podman = isolated();
        podman.arg("podman").args(self.storage_arguments());
        podman.args(["--cgroup-manager=cgroupfs", "--events-backend=none", "run"]);
        podman.args(HERE).args(options).arg(IMAGE).args(command);
        podman
    }

    /// Changes `command`, which would start a gateway, to start the gateway in a container with
    /// these options and the image's own command. The container gets the directory of the notify
    /// socket.
    pub(crate) fn instead_of(&self, command: &mut Command, options: &[String]) {
        let inner = command.as_std();
        let socket = inner.get_envs().find(|(name, _)| *name == "NOTIFY_SOCKET");
        let socket = socket.and_then(|(_, socket)| socket).expect("a socket to notify");
        let directory = Path::new(socket).parent().expect("a directory").display();
        let mut all = options.to_vec();
        all.push("--sdnotify=ignore".to_owned());
        all.push(format!("--env=NOTIFY_SOCKET={}", socket.to_string_lossy()));
        all.push(format!("--volume={directory}:{directory}"));
        *command = self.container(&all, &[]);
        command.stdin(std::process::Stdio::null());
    }
}

/// Runs a command that must succeed and returns its standard output.
pub(crate) async fn run(command: &mut Command) -> String {
    let what = format!("{:?}", command.as_std());
    let Output { status, stdout, stderr } = within(&what, command.output())
        .await
        .unwrap_or_else(|error| panic!("{what}: {error} (see tests/run)"));
    assert!(status.success(), "{what}: {}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).expect("UTF-8").trim_end().to_owned()
}
