//! The command line. Letters and meanings are upstream's where it has them.

pub(crate) mod check;
pub(crate) mod remote;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::anyhow;
use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::error::{ContextKind, ContextValue};
use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

use crate::config;
use crate::config::{Config, Log};
use crate::control::Request;
use crate::daemon;
use crate::daemon::{Certificates, ConfigSource, StartupConfig};
use crate::model::build_request::BuildId;
use crate::os::pid_file::PidFile;
use crate::os::privileges::{PrivilegeError, RunAsUser};
use crate::telemetry::log;
use crate::telemetry::log::Logging;
use crate::{demo, tls};

/// A configuration that cannot be used: `EX_CONFIG` of sysexits(3), by which service managers know
/// that trying again does not help.
const EXIT_CONFIG: u8 = 78;

/// How long an error message waits for a reader of standard error that stalls.
const STDERR_TIMEOUT: Duration = Duration::from_secs(2);

const EXAMPLES: &str = "\
Examples:
  zuul-fingergw check --connect   is the configuration good, is a Zuul there?
  zuul-fingergw -f                run in the foreground
  zuul-fingergw status            how it stands, and who is watching what
  zuul-fingergw resolve UUID      which way a log takes, and what was tried

See zuul-fingergw(8) and zuul-fingergw.toml(5).";

/// Finger gateway for Zuul CI: streams the logs of running builds across zones.
// Options may be repeated, the last one counts, and long ones be cut short, as with upstream's.
#[derive(Parser)]
#[command(version, args_override_self = true, infer_long_args = true, after_help = EXAMPLES)]
struct Cli {
    /// The configuration: our TOML if it ends in .toml, else a zuul.conf [default:
    /// /etc/zuul/zuul-fingergw.toml, /etc/zuul/zuul.conf or ~/zuul.conf]
    #[arg(short = 'c', value_name = "FILE", global = true)]
    // An empty one is none, as upstream takes it.
    #[arg(value_parser = OsStringValueParser::new().map(PathBuf::from))]
    config: Option<PathBuf>,
    /// Stay in the foreground; with TOML it always does
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
    /// Check the configuration and its certificates, and do nothing else
    ///
    /// Reports all faults together, each with its file, line, key, value and what is allowed, and
    /// certificates that peers refuse or soon will, with the openssl command that fixes them. A
    /// configuration without a fault is "OK" on standard output and exit status 0, followed by what
    /// was found: the entry that the gateway will register, listeners, certificates, ZooKeeper. Any
    /// other is exit status 78. Nothing is listened on, and without --connect nothing is connected
    /// to. Run as root, certificates and keys are also read as the user of the configuration.
    Check {
        /// Also connect to ZooKeeper, and show which components of Zuul, zones and gateways it has;
        /// exit status 1 if it cannot be reached or has no Zuul
        #[arg(long)]
        connect: bool,
    },
    /// Stop the gateway that runs with this configuration
    ///
    /// Does what SIGTERM does, by the command socket, and does not wait until the gateway has ended.
    Stop,
    /// Have the gateway that runs with this configuration read it and its certificates again: all of
    /// it, or nothing if there is any fault
    Reload,
    /// Show how the gateway that runs with this configuration stands
    ///
    /// Shows version, process id, state, zone, listeners, ZooKeeper and why it is not connected, the
    /// configuration file, connections in use, certificates and their ends, the gateways of other
    /// zones and how each stands, and each running stream: for how long, how many bytes, which build,
    /// from where and to which client.
    Status {
        /// As JSON, for programs
        #[arg(long)]
        json: bool,
    },
    /// Show which way the log of a build would take now, and why
    ///
    /// Asks the gateway that runs with this configuration, by its command socket: where the build
    /// runs, which hops would be tried for it in which order, how each of them stands (never tried,
    /// ok, avoided and for how long, what failed last), and what became of them lately. The exit
    /// status is 0 if an executor has the build, else 1.
    Resolve {
        /// The UUID of the build
        #[arg(value_name = "UUID", value_parser = build_id)]
        build: BuildId,
        /// As JSON, for programs
        #[arg(long)]
        json: bool,
    },
    /// Show a log crossing two zones, all in this process: no ZooKeeper, no configuration
    ///
    /// Two gateways and an executor on loopback. The log of a made-up build goes to standard output
    /// by way of all three; standard error shows that way and, without --once, the commands that ask
    /// for it from another terminal. Where the process may, port 79 of 127.0.0.1 is bound as well,
    /// which is what finger asks.
    Demo(demo::Options),
    /// Print what completes this command line in a shell
    ///
    /// Packages install it. By hand, for bash: zuul-fingergw completions bash
    /// >/etc/bash_completion.d/zuul-fingergw
    Completions {
        /// The shell: bash, elvish, fish, powershell or zsh
        #[arg(value_name = "SHELL", hide_possible_values = true)]
        shell: Shell,
    },
}

/// What the manual page tells of.
#[cfg(test)]
pub(crate) fn command_line() -> clap::Command {
    Cli::command()
}

/// Runs what the command line asks for and returns the program's exit status: 0 for a clean end, 1
/// for a failure, 2 for a command line that cannot be understood, 78 for a configuration that
/// cannot be used.
#[must_use]
pub fn run() -> ExitCode {
    let Cli { config, foreground, debug, command } =
        Cli::try_parse().unwrap_or_else(|error| with_tip(error).exit());
    let config = config.filter(|path| !path.as_os_str().is_empty());
    tls::install_provider();
    match command {
        Some(Command::Demo(options)) => demo::run(&options, debug),
        Some(Command::Completions { shell }) => complete(shell),
        Some(Command::Check { connect }) => check::run(config.as_deref(), connect),
        Some(Command::Stop) => remote::run(config.as_deref(), &Request::Stop),
        Some(Command::Reload) => remote::run(config.as_deref(), &Request::Reload),
        Some(Command::Status { json }) => remote::run(config.as_deref(), &Request::Status { json }),
        Some(Command::Resolve { build, json }) => {
            remote::run(config.as_deref(), &Request::Resolve { build, json })
        }
        None => serve(config.as_deref(), foreground, debug),
    }
}

/// Reads a UUID as people have it: Zuul's are in lower case and without dashes.
fn build_id(text: &str) -> Result<BuildId, String> {
    let wanted = || format!("a build's UUID is 1 to {} hexadecimal digits", BuildId::MAX);
    BuildId::new(&text.replace('-', "").to_ascii_lowercase()).ok_or_else(wanted)
}

/// Adds what to do to two mistakes that clap has no or a wrong suggestion for: a file without `-c`, and
/// the command `start`, which other daemons have.
fn with_tip(mut error: clap::Error) -> clap::Error {
    let [argument, command] =
        [ContextKind::InvalidArg, ContextKind::InvalidSubcommand].map(|kind| {
            match error.get(kind) {
                Some(ContextValue::String(text)) => text.clone(),
                _ => String::new(),
            }
        });
    let unknown = if command.is_empty() { &argument } else { &command };
    let tip = if command == "start" {
        "without a command it runs: 'zuul-fingergw -f', or 'systemctl start zuul-fingergw'"
            .to_owned()
    } else if unknown.contains(['/', '.']) && !unknown.starts_with('-') {
        format!("to use a configuration: '-c {unknown}'")
    } else {
        return error;
    };
    error.remove(ContextKind::SuggestedSubcommand);
    error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip.into()]));
    error
}

fn complete(shell: Shell) -> ExitCode {
    // Aside, because the generator panics where it cannot write.
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

fn serve(path: Option<&Path>, foreground: bool, debug: bool) -> ExitCode {
    let ValidatedConfig { path, config, identities, account } =
        match load(path).and_then(ParsedConfig::usable) {
            Ok(usable) => usable,
            Err(error) => return refuse(&error),
        };
    let source = match std::path::absolute(&path) {
        Ok(path) => ConfigSource { path, debug },
        Err(error) => return refuse(&anyhow!("{}: {error}", path.display())),
    };
    let detaching = if foreground { None } else { config.pid_file.clone() };
    let config = Config { log: config.log.with_debug(debug), ..config };
    let log =
        if detaching.is_some() { config.log.clone().for_daemon() } else { config.log.clone() };
    let pid_file = detaching.map(|path| PidFile::take(&path, account.as_ref())).transpose();
    let pid_file = match pid_file {
        Ok(pid_file) => pid_file,
        Err(error) => {
            print_error(&error);
            return ExitCode::FAILURE;
        }
    };
    let mut logging = match start_log(log, debug, account.as_ref()) {
        Ok(logging) => logging,
        Err(error) => return refuse(&error),
    };
    let setup = StartupConfig { source, config, identities };
    match daemon::run(setup, account.as_ref(), pid_file, &mut logging) {
        Ok(status) => status,
        Err(error) => {
            tracing::error!("{error:#}");
            if !logging.is_stderr() {
                print_error(&error);
            }
            if error.is::<PrivilegeError>() {
                ExitCode::from(EXIT_CONFIG)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}

/// Starts logging, and tells what of a `log_config` has no effect.
fn start_log(mut log: Log, debug: bool, account: Option<&RunAsUser>) -> anyhow::Result<Logging> {
    if let Some(given) = log.log_config.as_mut().filter(|_| debug) {
        given.ignored.push("-d (the file's level counts)".to_owned());
    }
    let logging = log::start(&log, account)?;
    if let Some(warning) = log.ignored() {
        tracing::warn!("{warning}");
    }
    Ok(logging)
}

/// A configuration that is good as a document.
struct ParsedConfig {
    path: PathBuf,
    config: Config,
}

/// One whose files and user are good as well.
struct ValidatedConfig {
    path: PathBuf,
    config: Config,
    identities: Certificates,
    account: Option<RunAsUser>,
}

fn load(path: Option<&Path>) -> anyhow::Result<ParsedConfig> {
    let path = config::locate(path)?;
    let config = config::load(&path)?;
    Ok(ParsedConfig { path, config })
}

impl ParsedConfig {
    fn usable(self) -> anyhow::Result<ValidatedConfig> {
        let Self { path, config } = self;
        match (
            Certificates::load(&config, config::own_hostname),
            RunAsUser::of(config.user.as_deref()),
        ) {
            (Ok(identities), Ok(account)) => {
                Ok(ValidatedConfig { path, config, identities, account })
            }
            (Err(error), Ok(_)) => Err(error),
            (Ok(_), Err(unfit)) => Err(anyhow!("{}: {unfit}", path.display())),
            (Err(error), Err(unfit)) => Err(anyhow!("{error:#}\n{}: {unfit}", path.display())),
        }
    }
}

fn refuse(error: &anyhow::Error) -> ExitCode {
    print_error(error);
    ExitCode::from(EXIT_CONFIG)
}

/// Writes `error` to standard error, which the operator or the service manager sees wherever the log
/// goes. Does not wait long for a reader that stalls.
fn print_error(error: &anyhow::Error) {
    log::stderr::write(&format!("{error:#}"), STDERR_TIMEOUT);
}
