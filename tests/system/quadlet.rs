//! The Quadlet file: the unit that podman's generator creates of it, and a container run with it.

use std::fs;
use std::process::{Command, Output};

use rustix::process::{Signal, kill_process};
use tempfile::TempDir;

use crate::support::checkout::{installed, read};
use crate::support::container::{Image, may_run};
use crate::support::executor::serves;
use crate::support::gateway::Builder;
use crate::support::process::{field, process_of};
use crate::support::static_program::static_program;
use crate::support::system::System;

const NAME: &str = "zuul-fingergw.container";

/// Returns the unit that the generator creates of `text`, or its error.
fn generated(text: &str) -> Result<String, String> {
    let directory = TempDir::new().expect("a directory");
    fs::write(directory.path().join(NAME), text).expect("a file");
    let Output { stdout, stderr, .. } =
        Command::new(installed("debian/usr/libexec/podman/quadlet"))
            .args(["-dryrun", "-no-kmsg-log"])
            .env("QUADLET_UNIT_DIRS", directory.path())
            .output()
            .expect("quadlet (tests/run)");
    let unit = String::from_utf8(stdout).expect("UTF-8");
    match unit.split_once("---zuul-fingergw.service---\n") {
        Some((_, unit)) => Ok(unit.to_owned()),
        None => Err(String::from_utf8_lossy(&stderr).into_owned()),
    }
}

fn quadlet() -> String {
    read(format!("etc/quadlet/{NAME}"))
}

/// Returns the value of a key that occurs once.
fn value<'a>(unit: &'a str, key: &str) -> &'a str {
    let mut values = unit.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    let first = values.next().unwrap_or_else(|| panic!("no {key}"));
    assert_eq!(values.next(), None, "{key} twice");
    first
}

/// Returns the seconds of a time such as `60s`.
fn seconds(time: &str) -> u64 {
    time.trim_end_matches('s').parse().expect("seconds")
}

#[test]
fn generated_unit_waits_for_streams() {
    let unit = generated(&quadlet()).unwrap_or_else(|text| panic!("{text}"));
    let directory = TempDir::new().expect("a directory");
    let path = directory.path().join("zuul-fingergw.service");
    fs::write(&path, &unit).expect("a file");
    let Output { status, stderr, .. } = Command::new("systemd-analyze")
        .args(["verify", "--man=no", "--recursive-errors=no"])
        .arg(&path)
        .output()
        .expect("systemd-analyze");
    let text = String::from_utf8_lossy(&stderr);
    assert!(status.success() && !text.contains("zuul-fingergw"), "{text}");

    assert_eq!((value(&unit, "Type"), value(&unit, "NotifyAccess")), ("notify", "all"));
    let run = value(&unit, "ExecStart");
    assert!(run.contains(" --sdnotify=container "), "{run}");
    // The defaults: lame_duck 2 s, grace 30 s.
    let (_, wait) = run.split_once("--stop-timeout=").expect("a time to stop in");
    let wait = seconds(wait.split(' ').next().expect("a number"));
    assert!(wait >= 2 + 30 + 5 && seconds(value(&unit, "TimeoutStopSec")) > wait);

    let text = generated(&quadlet().replace("ReadOnly=", "ReadOnley=")).expect_err("an error");
    assert!(text.contains("unsupported key 'ReadOnley'"), "{text}");
}

/// Uses all options for podman from the unit, except those for systemd, the network bridge and the
/// name.
#[tokio::test]
async fn container_serves_with_the_options_of_the_unit() {
    const ELSEWHERE: [&str; 6] = [
        "--cidfile=%t/%N.cid",
        "--replace",
        "--rm",
        "--cgroups=split",
        "--sdnotify=container",
        "-d",
    ];
    if !may_run().await {
        return;
    }
    let system = System::new().await;
    let image = Image::build(static_program()).await;
    let mut builder = Builder::new(&system).readable_by_all();
    builder.control = Some("/run/zuul-fingergw/control.socket".into());
    builder.write();
    let directory = builder.directory().display().to_string();
    let unit = generated(&quadlet()).unwrap_or_else(|output| panic!("{output}"));
    let mut words = value(&unit, "ExecStart").split(' ').skip(2);
    let (mut options, mut report_skipped) = (Vec::new(), Vec::new());
    while let Some(word) = words.next() {
        match word {
            "--name" | "--publish" => drop(words.next()),
            "-v" => {
                assert_eq!(words.next(), Some("/etc/zuul:/etc/zuul:ro"));
                let to = "/etc/zuul/zuul-fingergw.toml";
                options.push(format!("--volume={directory}/gateway.toml:{to}:ro"));
            }
            word if ELSEWHERE.contains(&word) => report_skipped.push(word),
            word => options.push(word.to_owned()),
        }
    }
    assert_eq!(report_skipped.len(), ELSEWHERE.len());
    let image_of_unit = options.pop().expect("an image");
    assert!(image_of_unit.contains("/zuul-fingergw:"), "{image_of_unit}");

    let mut gateway = builder.start_changed(|command| image.instead_of(command, &options)).await;
    gateway.ready().await;
    let pid = process_of(&gateway);
    assert_eq!(field(pid, "Uid:"), "10001 10001 10001 10001");
    assert_eq!(field(pid, "CapBnd:"), "0000000000000000");
    assert_eq!(field(pid, "NoNewPrivs:"), "1");
    let root = format!("/proc/{}/root", pid.as_raw_nonzero());
    assert!(fs::exists(format!("{root}/run/zuul-fingergw/control.socket")).expect("its root"));
    let written = fs::write(format!("{root}/var/lib/zuul/file"), "");
    assert_eq!(written.expect_err("read-only").kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    serves(&system, gateway.address()).await;
    kill_process(pid, Signal::TERM).expect("a signal");
    assert!(gateway.exit().await.success());
}
