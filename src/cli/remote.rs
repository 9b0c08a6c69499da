//! The commands for a gateway that runs: each sends a request to its command socket and prints the
//! answer.

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Error, Result, anyhow, bail};

use super::refuse;
use crate::config;
use crate::control;
use crate::control::{RELOADED, Request};
use crate::gateway::routing::explain::RUNNING;
use crate::model::build_id::BuildId;

/// The length of the UUIDs that Zuul makes.
const UUID_DIGITS: usize = 32;

/// What a gateway has answered, in lines.
enum Answer {
    Done(String),
    /// No executor has the build.
    NotFound(String),
    /// Nothing was reloaded, and why.
    Refused(String),
}

/// Sends `request` to the gateway that runs with the configuration in `path`.
///
/// A configuration with errors will do, if it says where the socket is: it may have changed since the
/// gateway was started, and a reload is to be refused by the gateway, which logs and counts it.
pub(crate) fn run(path: Option<&Path>, request: &Request) -> ExitCode {
    let path = match config::locate(path) {
        Ok(path) => path,
        Err(error) => return refuse(&error),
    };
    let loaded = config::load(&path);
    let socket = match &loaded {
        Ok(config) => config.control.clone(),
        Err(_) => config::command_socket(&path),
    };
    let answered = match (socket, &loaded) {
        (Some(socket), _) => ask(&socket, request),
        (None, Ok(_)) => Err(no_socket(&path, request)),
        (None, Err(fault)) => return refuse(fault),
    };
    match (answered, loaded) {
        (Ok(Answer::Done(text)), _) => print(&text, ExitCode::SUCCESS),
        (Ok(Answer::NotFound(text)), _) => {
            if let Request::Resolve { build, .. } = request {
                hint_at_length(build);
            }
            print(&text, ExitCode::FAILURE)
        }
        (Ok(Answer::Refused(text)), _) => {
            eprint!("{text}");
            ExitCode::FAILURE
        }
        (Err(error), Ok(_)) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
        (Err(error), Err(fault)) => {
            eprintln!("{error:#}");
            refuse(&fault)
        }
    }
}

fn ask(socket: &Path, request: &Request) -> Result<Answer> {
    let reply = control::ask(socket, request)?;
    let place = socket.display();
    Ok(match request {
        Request::Stop if reply.is_empty() => Answer::Done(format!(
            "{place}: told to stop; it ends once its streams have, after limits.grace at the latest\n"
        )),
        Request::Stop => bail!("{place}: not the answer to {request}: {reply:?}"),
        _ if reply.is_empty() => bail!(
            "{place}: closed without an answer to {request}; Zuul's own gateway does that, which \
             knows only stop"
        ),
        Request::Reload if !reply.starts_with(RELOADED) => Answer::Refused(reply),
        Request::Resolve { .. } if !RUNNING.iter().any(|begin| reply.starts_with(begin)) => {
            Answer::NotFound(reply)
        }
        _ => Answer::Done(reply),
    })
}

/// Says that `build`, which was not found, is only a part of a UUID, if it is.
fn hint_at_length(build: &BuildId) {
    let digits = build.to_string().len();
    if digits < UUID_DIGITS {
        eprintln!(
            "{build} is {digits} of the {UUID_DIGITS} digits of a UUID; a build is found by all of them"
        );
    }
}

fn no_socket(path: &Path, request: &Request) -> Error {
    let key = if config::is_toml(path) { "control.socket" } else { "[fingergw] command_socket" };
    let path = path.display();
    match request {
        Request::Resolve { .. } => anyhow!(
            "{path}: sets no command socket, by which the running gateway could be asked; set {key} \
             and restart it"
        ),
        _ => anyhow!("{path}: sets no command socket ({key}); use signals instead"),
    }
}

/// Prints `text`. A reader that has seen enough is no fault of ours, but no success either.
fn print(text: &str, status: ExitCode) -> ExitCode {
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => status,
        Err(_) => ExitCode::FAILURE,
    }
}
