//! Inherited settings: resource limits and environment variables.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use rustix::process::Signal;
use tokio::process::Command;

use crate::support::gateway::{BINARY, Builder, open_to_all, wrap};
use crate::support::program::unprivileged;
use crate::support::system::System;
use crate::support::within;

/// Without threads or descriptors libraries panic, with messages that name neither the limit nor
/// the key.
#[tokio::test]
async fn limits_that_are_too_low_to_start_are_errors() {
    let system = System::new().await;
    let builder = unprivileged(&system);
    let config = builder.write();
    fs::set_permissions(&config, Permissions::from_mode(0o644)).expect("permissions");
    let binary = builder.directory().join("zuul-fingergw");
    fs::copy(BINARY, &binary).expect("a copy that every user can run");
    let as_user = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"];
    for (words, error) in [
        (&["env", "TOKIO_WORKER_THREADS=0"][..], "TOKIO_WORKER_THREADS=0: must be a number"),
        (&["prlimit", "--nofile=12"], "the limit of open files is 12, and at least 64 are needed"),
        (&["prlimit", "--nproc=3"], " threads: raise the limit of processes"),
        (&["prlimit", "--nproc=1"], "cannot start the thread of the log: Resource temporarily"),
    ] {
        let mut command = Command::new(as_user[0]);
        command.args(&as_user[1..]).args(words).arg(&binary).args(["-f", "-c"]).arg(&config);
        let output = within("the gateway to exit", command.kill_on_drop(true).output())
            .await
            .expect("its output");
        let [stdout, stderr] = [output.stdout, output.stderr].map(String::from_utf8);
        let (stdout, stderr) = (stdout.expect("UTF-8"), stderr.expect("UTF-8"));
        assert_eq!(output.status.code(), Some(1), "{words:?}: {stdout}{stderr}");
        assert!(stderr.contains(error), "{words:?}: {stderr}");
        assert!(stdout.contains(" ERROR ") && stdout.contains(error), "{words:?}: {stdout}");
        assert!(!stdout.contains("panicked") && !stderr.contains("panicked"), "{stdout}{stderr}");
    }
}

/// Reading a device as time zone file would never end.
#[tokio::test]
async fn unknown_time_zone_is_a_warning() {
    let system = System::new().await;
    for tz in [":/dev/zero", "Europe/Nowhere"] {
        let mut gateway = Builder::new(&system)
            .ready_from_zuul_conf("", |command| {
                command.env("TZ", tz);
            })
            .await;
        let start = format!("log lines have times in UTC: TZ={tz}: ");
        gateway.logged("a warning", |line| line.contains(&start)).await;
        gateway.signal(Signal::TERM);
        assert!(gateway.exit().await.success());
    }
}

/// Private keys are in memory: they must not be in core dumps, and other processes of the same user
/// must not read them.
#[tokio::test]
async fn memory_is_not_readable_by_other_processes_of_the_user() {
    const AS_NOBODY: [&str; 4] = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
    let system = System::new().await;
    for started_as_root in [true, false] {
        let builder = unprivileged(&system);
        let binary = builder.directory().join("zuul-fingergw");
        fs::copy(BINARY, &binary).expect("a copy that every user can run");
        open_to_all(&builder.write());
        let script = format!("shift; exec {} \"$@\"", binary.display());
        let as_nobody = [&AS_NOBODY[..], &["sh", "-c", &script, "sh"]].concat();
        let change = |command: &mut Command| {
            if !started_as_root {
                wrap(command, &as_nobody);
            }
        };
        let mut gateway = builder.start_changed(change).await;
        gateway.ready().await;
        let process = format!("/proc/{}", gateway.pid().as_raw_nonzero());
        let status = fs::read_to_string(format!("{process}/status")).expect("its status");
        assert!(status.contains("Uid:\t65534\t65534\t") && status.contains("NoNewPrivs:\t1\n"));
        // Needs the same permission as reading the memory, PTRACE_MODE_READ of ptrace(2).
        let mut reading = Command::new(AS_NOBODY[0]);
        reading.args(&AS_NOBODY[1..]).arg("cat").arg(format!("{process}/environ"));
        let read = within("cat", reading.output()).await.expect("cat");
        assert!(!read.status.success() && read.stdout.is_empty(), "{started_as_root}");
    }
}
