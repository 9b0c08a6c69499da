//! Destinations of log lines: outputs whose reader stalls, and log files where an unprivileged user
//! has placed something else.

use std::fs::{self, File, OpenOptions, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::pipe::fcntl_setpipe_size;
use rustix::process::Signal;

use crate::support::admin::{admin, get, metric, with_admin};
use crate::support::client::Client;
use crate::support::executor::Executor;
use crate::support::gateway::{open_to_all, wrap};
use crate::support::program::{Outcome, program, unprivileged};
use crate::support::system::System;

/// A named pipe with a capacity of `capacity` bytes whose reader does not read.
fn unread_pipe(path: &Path, capacity: usize) -> File {
    mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("a FIFO");
    let pipe = OpenOptions::new().read(true).write(true).open(path).expect("the FIFO");
    fcntl_setpipe_size(&pipe, capacity).expect("a small pipe");
    pipe
}

/// A stalled reader of the log must not block streams, health checks, commands or signals.
#[tokio::test]
async fn stalled_reader_of_the_log_does_not_block_streams() {
    const CAPACITY: usize = 4096;
    const STREAMS: usize = 200;
    let system = System::new().await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;
    for (log, redirection) in [
        ("output = \"stdout\"\nformat = \"text\"", ">"),
        ("output = \"stdout\"\nformat = \"json\"", ">"),
        ("output = \"stderr\"", "2>"),
    ] {
        let builder = with_admin(&system).log(log).control();
        let fifo = builder.directory().join("unread");
        let pipe = unread_pipe(&fifo, CAPACITY);
        let redirected = format!("exec \"$0\" \"$@\" {redirection}{}", fifo.display());
        let config = builder.write();
        let mut gateway =
            builder.start_changed(|command| wrap(command, &["sh", "-c", &redirected])).await;
        gateway.ready().await;
        // Each request logs a line of more than 100 bytes.
        for _ in 0..STREAMS {
            let mut client = Client::ask(gateway.address(), &build).await;
            executor.serve(b"log\n").await;
            assert_eq!(client.text().await, "log\n");
        }
        assert!(get(admin(&gateway), "/health/live").await.status.ends_with("200 OK"));
        assert_eq!(program(&["status"], &config).await.code, Some(0));
        assert_eq!(
            metric(&gateway, "zuul_fingergw_log_lines_lost_total").await,
            0.0,
            "all requests wait"
        );
        gateway.signal(Signal::TERM);
        assert!(gateway.exit().await.success());
        drop(pipe);
    }
}

/// A stalled reader must not keep the program from exiting when a start fails.
#[tokio::test]
async fn failed_start_ends_although_its_output_is_not_read() {
    let system = System::new().await;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let taken = taken.local_addr().expect("its address");
    let builder = with_admin(&system).listeners(&[&format!("address = \"{taken}\"")]);
    let fifo = builder.directory().join("unread");
    let pipe = unread_pipe(&fifo, 4096);
    rustix::io::ioctl_fionbio(&pipe, true).expect("a pipe");
    while rustix::io::write(&pipe, &[b'x'; 512]).is_ok() {}
    let config = builder.write();
    let mut command = tokio::process::Command::new("sh");
    let script = format!("exec \"$0\" -f -c \"$1\" >{0} 2>{0}", fifo.display());
    command.args(["-c", &script, crate::support::gateway::BINARY]).arg(&config);
    let ended =
        crate::support::within("the program to exit", command.kill_on_drop(true).status()).await;
    assert_eq!(ended.expect("a status").code(), Some(1));
}

/// The error that ends a start is printed on standard error exactly once, whatever the log's
/// destination.
#[tokio::test]
async fn startup_error_is_printed_to_standard_error() {
    let system = System::new().await;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let error = format!("cannot listen on {}", taken.local_addr().expect("its address"));
    let address = taken.local_addr().expect("its address");
    for output in ["stdout", "stderr", "file"] {
        let builder = with_admin(&system).listeners(&[&format!("address = \"{address}\"")]);
        let file = builder.directory().join("gateway.log");
        let output = if output == "file" { file.to_str().expect("UTF-8") } else { output };
        let builder = builder.log(&format!("output = {output:?}"));
        let config = builder.write();
        let Outcome { code, stdout, stderr } = program(&["-f"], &config).await;
        assert_eq!((code, stderr.matches(&error).count()), (Some(1), 1), "{output}: {stderr}");
        let log = fs::read_to_string(&file).unwrap_or_default();
        let log = if output == "stdout" { stdout } else { log };
        assert_eq!(log.matches(&error).count(), usize::from(output != "stderr"), "{log}");
    }
}

/// Run by script(1), which provides a terminal.
#[tokio::test]
async fn levels_are_coloured_only_on_a_terminal() {
    let system = System::new().await;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("its address");
    let builder = with_admin(&system).listeners(&[&format!("address = \"{address}\"")]);
    let config = builder.write();
    let start = format!("{} -f -c {}", crate::support::gateway::BINARY, config.display());
    for (no_color, coloured) in [("", true), ("1", false)] {
        let mut command = tokio::process::Command::new("script");
        command.args(["-q", "-c", &start, "/dev/null"]).env("NO_COLOR", no_color);
        command.stdin(std::process::Stdio::null()).kill_on_drop(true);
        let output =
            crate::support::within("the program to exit", command.output()).await.expect("script");
        let log = String::from_utf8(output.stdout).expect("UTF-8");
        assert!(log.contains("cannot listen on"), "{log}");
        assert_eq!(log.contains('\x1b'), coloured, "{log:?}");
        assert_eq!(log.matches("cannot listen on").count(), 1, "standard error is the same: {log}");
    }
    let Outcome { stdout, .. } = program(&["-f"], &config).await;
    assert!(stdout.contains("cannot listen on") && !stdout.contains('\x1b'), "{stdout:?}");
}

/// The unprivileged user may write to the directory of its log, and could place a link there to
/// make root create, own or write to any file.
#[tokio::test]
async fn root_does_not_follow_a_symbolic_link_to_the_log_file() {
    let system = System::new().await;
    let builder = unprivileged(&system);
    let (logs, secrets) = (builder.directory().join("log"), builder.directory().join("root"));
    fs::create_dir(&logs).expect("a directory");
    chown(&logs, Some(65534), Some(65534)).expect("its owner");
    fs::create_dir(&secrets).expect("a directory");
    fs::set_permissions(&secrets, Permissions::from_mode(0o755)).expect("its mode");
    let (dear, new) = (secrets.join("dear"), secrets.join("new"));
    fs::write(&dear, "dear").expect("a file");
    fs::set_permissions(&dear, Permissions::from_mode(0o600)).expect("its mode");
    let path = logs.join("gateway.log");
    let builder = builder.log(&format!("output = {path:?}"));
    let config = builder.write();
    let error = format!("{}: cannot be opened as the log file", path.display());
    let refused = async || {
        for arguments in [["check"], ["-f"]] {
            let Outcome { code, stderr, .. } = program(&arguments, &config).await;
            assert_eq!(code, Some(78), "{stderr}");
            assert!(stderr.contains(&error), "{stderr}");
        }
        fs::remove_file(&path).expect("it is still there");
    };
    symlink(&new, &path).expect("a link to nowhere");
    refused().await;
    assert!(!new.exists());
    symlink(&dear, &path).expect("a link");
    refused().await;
    fs::hard_link(&dear, &path).expect("a hard link");
    refused().await;
    mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o666), 0).expect("a FIFO");
    refused().await;
    let owner = fs::metadata(&dear).expect("the file").uid();
    assert_eq!((fs::read_to_string(&dear).expect("the file").as_str(), owner), ("dear", 0));
}

/// A new log file belongs to the unprivileged user, who must be able to create it again later.
#[tokio::test]
async fn log_file_is_owned_by_the_configured_user() {
    let system = System::new().await;
    let builder = unprivileged(&system);
    let logs = builder.directory().join("log");
    fs::create_dir(&logs).expect("a directory");
    open_to_all(&logs);
    let path = logs.join("gateway.log");
    let mut gateway = builder.log(&format!("output = {path:?}")).ready().await;
    let metadata = fs::metadata(&path).expect("the log");
    assert_eq!((metadata.uid(), metadata.gid()), (65534, 65534));
    gateway.signal(Signal::TERM);
    assert!(gateway.exit().await.success());
    assert!(fs::read_to_string(&path).expect("the log").contains("root privileges dropped"));
}
