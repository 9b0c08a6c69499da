//! The command line. Options have the letters and meanings that they have in Zuul's program.

mod check;
mod load;
mod remote;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, anyhow};
use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::error::{ContextKind, ContextValue};
use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

use self::load::{EXIT_CONFIG, ValidatedConfig, load, print_error, report_config_error};
use crate::config::{Config, Log};
use crate::control::protocol::Request;
use crate::control::socket_file::DirectoryError;
use crate::daemon::{self, ConfigSource, LoadedConfig};
use crate::demo;
use crate::model::build_id::BuildId;
use crate::os::pid_file::PidFile;
use crate::os::privileges::{PrivilegeError, RunAsUser};
use crate::telemetry::log::{self, LogGuard};
use crate::tls;

const EXAMPLES: &str = "\
Examples:
  zuul-fingergw check --connect   check the configuration, and look for Zuul in ZooKeeper
  zuul-fingergw -f                run in the foreground
  zuul-fingergw status            show the state of the gateway and its streams
  zuul-fingergw resolve UUID      show how a request for a build would be routed

See zuul-fingergw(8) and zuul-fingergw.toml(5).";

/// Finger gateway for Zuul CI: streams the logs of running builds across zones.
// As in Zuul's program, the last of repeated options counts, and long options can be abbreviated.
#[derive(Parser)]
#[command(version, args_override_self = true, infer_long_args = true, after_help = EXAMPLES)]
struct Cli {
    /// Configuration file: TOML if the name ends in .toml, otherwise a zuul.conf [default:
    /// /etc/zuul/zuul-fingergw.toml, /etc/zuul/zuul.conf or ~/zuul.conf]
    #[arg(short = 'c', value_name = "FILE", global = true)]
    // clap refuses empty paths; Zuul's program takes one for none.
    #[arg(value_parser = OsStringValueParser::new().map(PathBuf::from))]
    config: Option<PathBuf>,
    /// Stay in the foreground; always the case with a TOML configuration
    #[arg(short = 'f')]
    foreground: bool,
    /// Log at debug level
    #[arg(short = 'd')]
    debug: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Check the configuration and its certificates
    ///
    /// Prints all errors, each with its file, line, key, value and the allowed values, and exits
    /// with status 78. Certificates that peers refuse or will soon refuse are printed as well.
    /// Without an error it prints "OK" and a summary: the registry entry, listeners, certificates
    /// and ZooKeeper. Nothing is bound, and without --connect nothing is connected to. As root, it
    /// reads certificates and keys with the permissions of the configured user.
    Check {
        /// Also connect to ZooKeeper, and show the components, zones and gateways there; exit with
        /// status 1 if ZooKeeper cannot be reached or has no Zuul
        #[arg(long)]
        connect: bool,
    },
    /// Stop the running gateway
    ///
    /// Has the effect of SIGTERM on the gateway that runs with this configuration. Does not wait
    /// until it has ended.
    Stop,
    /// Reload the configuration and certificates of the running gateway
    ///
    /// Has the effect of SIGHUP on the gateway that runs with this configuration, and prints what
    /// has changed and what needs a restart. With an error nothing changes, and the exit status is
    /// 1.
    Reload,
    /// Show the state of the running gateway
    ///
    /// Shows version, process ID, state, zone, listeners, the connection to ZooKeeper, the
    /// configuration file, connections in use, certificates, the gateways of other zones and their
    /// health, and each stream: its age, bytes, build, source and client.
    Status {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show how a request for this build would be routed
    ///
    /// Asks the running gateway where the build runs and which hops it would try, in order, with
    /// the health of each and the recent attempts. The exit status is 0 if an executor has the
    /// build, otherwise 1.
    Resolve {
        /// The UUID of the build
        #[arg(value_name = "UUID", value_parser = build_id)]
        build: BuildId,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Stream a log through two zones, all in this process, without ZooKeeper or a configuration
    ///
    /// Starts an executor and two gateways on loopback and streams the log of a build through them
    /// to standard output. Standard error shows the route and, without --once, commands that
    /// request the log from another terminal. Port 79 of 127.0.0.1 is bound as well if the process
    /// may, because finger clients know no other port.
    Demo(demo::Options),
    /// Print a completion script for a shell
    ///
    /// Packages install these scripts. To install one for bash manually: zuul-fingergw completions
    /// bash >/etc/bash_completion.d/zuul-fingergw
    Completions {
        /// The shell: bash, elvish, fish, powershell or zsh
        #[arg(value_name = "SHELL", hide_possible_values = true)]
        shell: Shell,
    },
}

/// Returns the definition of the command line, for the manual page.
#[must_use]
pub fn command() -> clap::Command {
    Cli::command()
}

/// Runs the program and returns its exit status: 0 on success, 1 on failure, 2 if the command line
/// is invalid, 78 if the configuration cannot be used.
#[must_use]
pub fn run() -> ExitCode {
    let Cli { config, foreground, debug, command } =
        Cli::try_parse().unwrap_or_else(|error| with_hint(error).exit());
    let config = config.filter(|path| !path.as_os_str().is_empty());
    let config = config.as_deref();
    tls::install_provider();
    match command {
        Some(Command::Demo(options)) => demo::run(&options, debug),
        Some(Command::Completions { shell }) => print_completions(shell),
        Some(Command::Check { connect }) => check::run(config, connect),
        Some(Command::Stop) => remote::run(config, &Request::Stop, false),
        Some(Command::Reload) => remote::run(config, &Request::Reload, false),
        Some(Command::Status { json }) => remote::run(config, &Request::Status, json),
        Some(Command::Resolve { build, json }) => {
            remote::run(config, &Request::Resolve(build), json)
        }
        None => run_gateway(config, foreground, debug),
    }
}

/// Parses a UUID as other programs write it; Zuul's have no dashes and are in lower case.
fn build_id(text: &str) -> Result<BuildId, String> {
    let uuid = text.replace('-', "").to_ascii_lowercase();
    BuildId::new(&uuid)
        .ok_or_else(|| format!("a build's UUID has 1 to {} hexadecimal digits", BuildId::MAX))
}

/// Adds a hint to two errors for which clap has no suggestion or a wrong one: a file without `-c`,
/// and the command `start` of other daemons.
fn with_hint(mut error: clap::Error) -> clap::Error {
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => text.clone(),
        _ => String::new(),
    };
    let command = context(ContextKind::InvalidSubcommand);
    let argument = context(ContextKind::InvalidArg);
    let unknown = if command.is_empty() { argument } else { command.clone() };
    let hint = if command == "start" {
        "the gateway runs without a command: 'zuul-fingergw -f', or 'systemctl start zuul-fingergw'"
            .to_owned()
    } else if unknown.contains(['/', '.']) && !unknown.starts_with('-') {
        format!("to use a configuration file: '-c {unknown}'")
    } else {
        return error;
    };
    error.remove(ContextKind::SuggestedSubcommand);
    error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![hint.into()]));
    error
}

fn print_completions(shell: Shell) -> ExitCode {
    // Into a buffer first, because the generator panics if a write fails.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "zuul-fingergw", &mut script);
    match io::stdout().write_all(&script) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the gateway until it is stopped.
fn run_gateway(path: Option<&Path>, foreground: bool, debug: bool) -> ExitCode {
    let ValidatedConfig { path, config, certificates, user } = match load(path) {
        Ok(config) => config,
        Err(error) => return report_config_error(&error),
    };
    let source = match std::path::absolute(&path) {
        Ok(path) => ConfigSource { path, debug },
        Err(error) => return report_config_error(&anyhow!("{}: {error}", path.display())),
    };
    let pid_file = if foreground { None } else { config.pid_file.clone() };
    let config = Config { log: config.log.with_debug(debug), ..config };
    let log = if pid_file.is_some() { config.log.clone().for_daemon() } else { config.log.clone() };
    let pid_file = match pid_file.map(|path| PidFile::lock(&path, user.as_ref())).transpose() {
        Ok(pid_file) => pid_file,
        Err(error) => {
            print_error(&error);
            return ExitCode::FAILURE;
        }
    };
    let mut logging = match start_log(log, debug, user.as_ref()) {
        Ok(logging) => logging,
        Err(error) => return report_config_error(&error),
    };
    let loaded = LoadedConfig { config, certificates };
    match daemon::start(source, loaded, user.as_ref(), pid_file, &mut logging) {
        Ok(status) => status,
        Err(error) => {
            tracing::error!("{error:#}");
            if !logging.is_stderr {
                print_error(&error);
            }
            if error.is::<PrivilegeError>() || error.is::<DirectoryError>() {
                ExitCode::from(EXIT_CONFIG)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}

/// Starts logging, and warns of what is ignored in a `log_config`.
fn start_log(mut log: Log, debug: bool, user: Option<&RunAsUser>) -> Result<LogGuard> {
    if let Some(log_config) = log.log_config.as_mut().filter(|_| debug) {
        log_config.ignored.push("-d (the file's level counts)".to_owned());
    }
    let logging = log::start(&log, user)?;
    if let Some(warning) = log.ignored() {
        tracing::warn!("{warning}");
    }
    Ok(logging)
}
