//! The commands for a running gateway: each sends a request to its command socket and prints the
//! reply.

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Error, Result, anyhow, bail};
use serde::Deserialize;

use super::load::report_config_error;
use crate::config;
use crate::control;
use crate::control::protocol::{ErrorReport, ReloadReport, Reply, ReplyStatus, Request};
use crate::control::status::StatusReport;
use crate::control::text;
use crate::gateway::routing::explain::RouteReport;
use crate::model::build_id::BuildId;

/// The number of digits of the UUIDs that Zuul creates.
const UUID_DIGITS: usize = 32;

/// Sends `request` to the gateway that runs with the configuration in `path`, and prints its reply:
/// as it came with `json`, else as text.
///
/// A configuration with errors is good enough if it names the command socket: the file may have
/// been changed after the gateway was started, and a reload must be refused by the gateway, which
/// logs and counts it.
pub(super) fn run(path: Option<&Path>, request: &Request, json: bool) -> ExitCode {
    let path = match config::locate(path) {
        Ok(path) => path,
        Err(error) => return report_config_error(&error),
    };
    let config = config::load(&path);
    let socket = match &config {
        Ok(config) => config.control.clone(),
        Err(_) => config::command_socket(&path),
    };
    let result = match (socket, &config) {
        (Some(socket), _) => send(&socket, request, json),
        (None, Ok(_)) => Err(no_socket(&path)),
        (None, Err(config_error)) => return report_config_error(config_error),
    };
    match (result, config) {
        (Ok(status), _) => status,
        (Err(error), Ok(_)) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
        (Err(error), Err(config_error)) => {
            eprintln!("{error:#}");
            report_config_error(&config_error)
        }
    }
}

fn no_socket(path: &Path) -> Error {
    let key = if config::is_toml(path) { "control.socket" } else { "[fingergw] command_socket" };
    let path = path.display();
    anyhow!(
        "{path}: sets no command socket; set {key} and restart the gateway, or use signals: SIGTERM \
         stops, SIGHUP reloads, SIGUSR2 logs the status"
    )
}

/// Sends `request`, prints the reply and returns the exit status.
fn send(socket: &Path, request: &Request, json: bool) -> Result<ExitCode> {
    let line = control::send(socket, request)?;
    let socket = socket.display();
    if *request == Request::Stop {
        if !line.is_empty() {
            bail!("{socket}: unexpected reply to stop: {line:?}");
        }
        println!(
            "{socket}: stop requested; the gateway ends after its streams, or after limits.grace"
        );
        return Ok(ExitCode::SUCCESS);
    }
    if line.is_empty() {
        bail!(
            "{socket}: closed without a reply to {request}: this may be Zuul's own gateway, which \
             knows only stop"
        );
    }
    let status = parse::<ReplyHead>(&line)?.status;
    if json {
        print(&line)?;
    } else {
        match (status, request) {
            (ReplyStatus::InvalidRequest, _) | (ReplyStatus::Failed, Request::Reload) => {
                eprintln!("{}", parse::<Reply<ErrorReport>>(&line)?.content.error);
            }
            (_, Request::Stop) => {}
            (_, Request::Reload) => {
                print(&text::reload(&parse::<Reply<ReloadReport>>(&line)?.content))?;
            }
            (_, Request::Status) => {
                print(&text::status(&parse::<Reply<StatusReport>>(&line)?.content))?;
            }
            (_, Request::Resolve(build)) => {
                if status == ReplyStatus::NotFound {
                    warn_of_short_uuid(build);
                }
                print(&text::route(&parse::<Reply<RouteReport>>(&line)?.content))?;
            }
        }
    }
    Ok(if status == ReplyStatus::Ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The member that all replies have.
#[derive(Deserialize)]
struct ReplyHead {
    status: ReplyStatus,
}

fn parse<'line, T: Deserialize<'line>>(line: &'line str) -> Result<T> {
    serde_json::from_str(line).context(
        "cannot read the gateway's reply, which may be of another version of this program; --json \
         prints the replies to status and resolve as they are",
    )
}

/// Warns that `build`, which was not found, is shorter than a UUID, if it is.
fn warn_of_short_uuid(build: &BuildId) {
    let digits = build.as_str().len();
    if digits < UUID_DIGITS {
        eprintln!(
            "{build} has {digits} of the {UUID_DIGITS} digits of a UUID; a build is found only by \
             all of them"
        );
    }
}

/// Prints `text` to standard output. It is an error if the reader closes it early.
fn print(text: &str) -> Result<()> {
    io::stdout().write_all(text.as_bytes()).context("cannot write to standard output")
}
