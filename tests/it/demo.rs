//! `zuul-fingergw demo`: only the log on stdout, everything else on stderr, printed commands that
//! work, and no files left.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStderr, ChildStdout, Command};

use crate::support::gateway::BINARY;
use crate::support::within;

/// A running demo with its own directory for temporary files.
struct Demo {
    child: Child,
    stdout: BufReader<ChildStdout>,
    stderr: Lines<BufReader<ChildStderr>>,
    temporary: TempDir,
}

/// Output and status of a demo that has ended.
struct Outcome {
    status: ExitStatus,
    stdout: Vec<u8>,
    stderr: String,
}

impl Demo {
    fn start(options: &[&str], log: Option<&Path>) -> Self {
        let temporary = TempDir::new().expect("a directory");
        let mut command = Command::new(BINARY);
        command.arg("demo").args(options);
        if let Some(log) = log {
            command.arg("--log").arg(log);
        }
        let mut child = command
            .env("TMPDIR", temporary.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("the built binary");
        let stdout = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let stderr = BufReader::new(child.stderr.take().expect("stderr is piped")).lines();
        Self { child, stdout, stderr, temporary }
    }

    fn signal(&self, signal: Signal) {
        let pid = self.child.id().and_then(|pid| Pid::from_raw(pid.cast_signed()));
        kill_process(pid.expect("a pid"), signal).expect("a signal to the demo");
    }

    /// Reads as many bytes of the log as `bytes` has, and compares them.
    async fn expect(&mut self, bytes: &[u8]) {
        let mut read = vec![0; bytes.len()];
        within("the log", self.stdout.read_exact(&mut read)).await.expect("more of the log");
        assert!(read == bytes, "{} instead of {}", read.escape_ascii(), bytes.escape_ascii());
    }

    /// Returns the next line of the log.
    async fn line(&mut self) -> String {
        let mut line = String::new();
        within("a line of the log", self.stdout.read_line(&mut line)).await.expect("a line");
        line
    }

    /// Returns the next line on stderr that satisfies `wanted`, trimmed.
    async fn stderr_line(&mut self, what: &str, wanted: impl Fn(&str) -> bool) -> String {
        let find = async {
            loop {
                let line =
                    self.stderr.next_line().await.expect("UTF-8").expect("another line on stderr");
                if wanted(&line) {
                    return line.trim().to_owned();
                }
            }
        };
        within(what, find).await
    }

    /// Waits for the demo to exit; its directory for temporary files must be empty.
    async fn ended(mut self) -> Outcome {
        let (mut stdout, mut stderr) = (Vec::new(), String::new());
        let read = async {
            while let Some(line) = self.stderr.next_line().await.expect("UTF-8") {
                stderr.push_str(&line);
                stderr.push('\n');
            }
        };
        let (read_stdout, ()) = within("the end of the output", async {
            tokio::join!(self.stdout.read_to_end(&mut stdout), read)
        })
        .await;
        read_stdout.expect("stdout");
        let status = within("the demo to end", self.child.wait()).await.expect("its status");
        let left: Vec<_> = fs::read_dir(self.temporary.path()).expect("its directory").collect();
        assert!(left.is_empty(), "{left:?}");
        Outcome { status, stdout, stderr }
    }
}

fn file(directory: &TempDir, content: &[u8]) -> PathBuf {
    let path = directory.path().join("job-output.txt");
    fs::write(&path, content).expect("a log");
    path
}

fn append(path: &Path, content: &[u8]) {
    let mut file = fs::File::options().append(true).open(path).expect("the log");
    file.write_all(content).expect("more of the log");
}

/// `12:34:56.123456 | text`
fn text_of(line: &str) -> &str {
    let (time, text) = line.split_once(" | ").expect("a time in front");
    let shape: String = time.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
    assert_eq!(shape, "00:00:00.000000", "{line}");
    text
}

#[tokio::test]
async fn once_ends_after_one_log() {
    let Outcome { status, stdout, stderr } = Demo::start(&["--once"], None).ended().await;
    assert!(status.success(), "{status} {stderr}");
    let log = String::from_utf8(stdout).expect("UTF-8");
    assert!(log.ends_with('\n'));
    let lines: Vec<_> = log.lines().map(text_of).collect();
    assert_eq!(lines[0], "Job console starting");
    assert!(lines.len() > 5, "{lines:?}");
    for (number, line) in lines.iter().enumerate().skip(1) {
        assert_eq!(*line, format!("west: task {number} says h\u{e9}llo to east"));
    }
    let length = log.len();
    for shown in [
        "zone west   executor   127.0.0.1:",
        "            gateway    localhost:",
        "zone east   gateway    127.0.0.1:",
    ] {
        assert!(stderr.lines().any(|line| line.starts_with(shown)), "{shown} in {stderr}");
    }
    let end = format!("the log has ended: {length} bytes through 2 gateways, every byte equal\n");
    assert!(stderr.ends_with(&end), "{stderr}");
    // The demo ends within seconds, so it prints no commands.
    assert!(!stderr.contains("another terminal") && !stderr.contains("| nc "), "{stderr}");
    // Both gateways log the stream: the next hop of west is the executor, that of east is west.
    for route in ["hop=\"executor 127.0.0.1:", "hop=\"gateway localhost:"] {
        let line = stderr.lines().find(|l| l.contains("stream ended") && l.contains(route));
        let line = line.unwrap_or_else(|| panic!("{route} in {stderr}"));
        assert!(line.contains(&format!("bytes={length} ")) && line.ends_with("end=finished"));
    }
}

#[tokio::test]
async fn once_streams_the_given_file() {
    let directory = TempDir::new().expect("a directory");
    let mut random = fastrand::Rng::with_seed(2);
    let mut binary: Vec<u8> = (0..=255).cycle().take(70_000).collect();
    binary.extend(b"\xff\xfe\x00 no newline");
    let large: Vec<u8> = (0..5_000_003).map(|_| random.u8(..)).collect();
    let contents: [&[u8]; 6] =
        [b"x", b"one line\n", b"\n", b"no newline at the end", &binary, &large];
    for content in contents {
        let path = file(&directory, content);
        let Outcome { status, stdout, stderr } =
            Demo::start(&["--once"], Some(&path)).ended().await;
        assert!(status.success(), "{status} {stderr}");
        assert!(stdout == content, "{} of {} bytes", stdout.len(), content.len());
        let end = format!("{} bytes through 2 gateways, every byte equal\n", content.len());
        assert!(stderr.ends_with(&end), "{stderr}");
        assert!(fs::read(&path).expect("the file") == content, "the file is unchanged");
    }
}

#[tokio::test]
async fn growing_file_is_followed() {
    for signal in [Signal::INT, Signal::TERM] {
        let directory = TempDir::new().expect("a directory");
        let path = file(&directory, b"what is there\n");
        let mut demo = Demo::start(&[], Some(&path));
        demo.expect(b"what is there\n").await;
        for more in [b"more\n".as_slice(), b"half a ", b"line\n", b"\x00\xff", &[b'x'; 100_000]] {
            append(&path, more);
            demo.expect(more).await;
        }
        demo.signal(signal);
        let Outcome { status, stdout, stderr } = demo.ended().await;
        assert!(status.success() && stdout.is_empty(), "{status} {stderr}");
        assert!(path.exists());
    }
}

/// An executor deletes its job directory when the build is over; a user's file may be deleted as
/// well.
#[tokio::test]
async fn removed_file_ends_the_demo() {
    let directory = TempDir::new().expect("a directory");
    let path = file(&directory, b"all there is\n");
    let mut demo = Demo::start(&[], Some(&path));
    demo.expect(b"all there is\n").await;
    fs::remove_file(&path).expect("to remove the log");
    let Outcome { status, stdout, stderr } = demo.ended().await;
    assert!(status.success() && stdout.is_empty(), "{status} {stderr}");
    // A file may be changed in any way, so the demo does not check its bytes.
    assert!(stderr.ends_with("the log has ended: 13 bytes through 2 gateways\n"), "{stderr}");
}

#[tokio::test]
async fn empty_file_is_streamed() {
    let directory = TempDir::new().expect("a directory");
    let path = file(&directory, b"");
    let Outcome { status, stdout, stderr } = Demo::start(&["--once"], Some(&path)).ended().await;
    assert!(status.success() && stdout.is_empty(), "{status} {stderr}");
    assert!(stderr.contains("the log is empty"), "{stderr}");

    // When followed, the file may get its first line at any time.
    let mut demo = Demo::start(&[], Some(&path));
    demo.stderr_line("the way of the log", |line| line.starts_with("zone east")).await;
    append(&path, b"the first line\n");
    demo.expect(b"the first line\n").await;
    demo.signal(Signal::INT);
    assert!(demo.ended().await.status.success());
}

#[tokio::test]
async fn file_that_cannot_be_streamed_is_an_error() {
    let directory = TempDir::new().expect("a directory");
    let missing = directory.path().join("missing");
    for path in [missing.as_path(), directory.path()] {
        for options in [["--once"].as_slice(), &[]] {
            let demo = Demo::start(options, Some(path));
            let Outcome { status, stdout, stderr } = demo.ended().await;
            assert_eq!(status.code(), Some(1), "{path:?} {options:?} {stderr}");
            assert!(stdout.is_empty());
            assert!(stderr.contains(path.to_str().expect("UTF-8")), "{path:?} {stderr}");
        }
    }
}

/// `demo | head -1`
#[tokio::test]
async fn closed_standard_output_ends_the_demo() {
    let mut demo = Demo::start(&[], None);
    assert_eq!(text_of(&demo.line().await), "Job console starting\n");
    let Demo { mut child, stdout, mut stderr, temporary } = demo;
    drop(stdout);
    let rest = async { while let Ok(Some(_)) = stderr.next_line().await {} };
    within("the end of stderr", rest).await;
    let status = within("the demo to end", child.wait()).await.expect("its status");
    assert!(status.success(), "{status}");
    assert_eq!(fs::read_dir(temporary.path()).expect("its directory").count(), 0);
}

/// Runs a command line as an operator would, and returns its first line and the process.
async fn first_line(command: &str) -> (String, Child, Lines<BufReader<ChildStdout>>) {
    let mut child = Command::new("sh")
        .args(["-c", command])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .expect("sh");
    let mut lines = BufReader::new(child.stdout.take().expect("stdout is piped")).lines();
    let line = within(command, lines.next_line()).await.expect("UTF-8").expect("a line");
    (line, child, lines)
}

#[tokio::test]
async fn printed_commands_work() {
    let mut demo = Demo::start(&[], None);
    let nc = demo.stderr_line("the nc command", |line| line.contains("| nc ")).await;
    let openssl = demo.stderr_line("the openssl command", |line| line.contains("| openssl ")).await;
    assert!(openssl.ends_with('\\'), "{openssl}");
    let files = demo.stderr_line("its second line", |line| line.contains("-CAfile")).await;
    demo.stderr_line("a word on finger", |line| line.contains("finger")).await;

    let ca = files.split(' ').skip_while(|word| *word != "-CAfile").nth(1).expect("a file");
    let private = Path::new(ca).parent().expect("a directory");
    assert_eq!(private.parent(), Some(demo.temporary.path()));
    let mode = fs::metadata(private).expect("the directory is there").permissions().mode();
    assert_eq!(mode & 0o7777, 0o700, "it contains private keys");

    let mut running = Vec::new();
    for command in [nc, format!("{openssl}\n{files}")] {
        let (line, child, lines) = first_line(&command).await;
        assert_eq!(text_of(&line), "Job console starting", "{command}");
        running.push((child, lines));
    }
    demo.signal(Signal::INT);
    assert!(demo.ended().await.status.success());
    // Both streams are reset with the demo and end.
    for (mut child, mut lines) in running {
        within("the output's end", async { while let Ok(Some(_)) = lines.next_line().await {} })
            .await;
        within("the command to end", child.wait()).await.expect("its status");
    }
}
