//! The command line. Letters and meanings are upstream's where it has them.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing::Level;

use crate::config::{self, Config, Log};
use crate::{daemon, demo, log, tls};

/// A configuration that cannot be used: `EX_CONFIG` of sysexits(3), by which service managers know
/// that trying again does not help.
const EXIT_CONFIG: u8 = 78;

/// Finger gateway for Zuul CI: streams the logs of running builds across zones.
#[derive(Parser)]
#[command(version)]
struct Cli {
    /// The configuration: our TOML if it ends in .toml, else a zuul.conf [default:
    /// /etc/zuul/zuul-fingergw.toml, /etc/zuul/zuul.conf or ~/zuul.conf]
    #[arg(short = 'c', value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    /// Stay in the foreground
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
    Check,
    /// Show a log crossing two zones, all in this process: no ZooKeeper, no configuration
    Demo(demo::Options),
}

/// Runs what the command line asks for and returns the program's exit status: 0 for a clean end, 1
/// for a failure, 2 for a command line that cannot be understood, 78 for a configuration that
/// cannot be used.
#[must_use]
pub fn run() -> ExitCode {
    let Cli { config, foreground, debug, command } = Cli::parse();
    tls::install_provider();
    match command {
        Some(Command::Demo(options)) => demo::run(&options, debug),
        Some(Command::Check) => check(config.as_deref()),
        None => serve(config.as_deref(), foreground, debug),
    }
}

fn check(path: Option<&Path>) -> ExitCode {
    let checked = load(path).and_then(|(path, config)| {
        daemon::Identities::load(&config)?;
        log::check(&config.log)?;
        Ok((path, config.log.log_config))
    });
    match checked {
        Ok((path, log_config)) => {
            if let Some(log_config) = log_config.filter(|given| !given.not_taken.is_empty()) {
                eprintln!("{log_config}");
            }
            println!("{}: OK", path.display());
            ExitCode::SUCCESS
        }
        Err(error) => refuse(&error),
    }
}

fn serve(path: Option<&Path>, foreground: bool, debug: bool) -> ExitCode {
    let loaded = load(path)
        .and_then(|(path, config)| Ok((path, daemon::Identities::load(&config)?, config)));
    let (path, identities, config) = match loaded {
        Ok(loaded) => loaded,
        Err(error) => return refuse(&error),
    };
    let _flush = match start_log(config.log.clone(), debug) {
        Ok(flush) => flush,
        Err(error) => return refuse(&error),
    };
    if !foreground && !config::is_toml(&path) {
        tracing::warn!("running in the foreground: detaching is not supported; use -f");
    }
    match daemon::run(config, identities) {
        Ok(status) => status,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Starts logging, and tells what of a `log_config` has no effect.
fn start_log(mut log: Log, debug: bool) -> anyhow::Result<Option<log::Flush>> {
    match &mut log.log_config {
        // Upstream looks at -d only without a log_config.
        Some(given) if debug => given.not_taken.push("-d (the file's level counts)".to_owned()),
        None if debug => log.level = log.level.max(Level::DEBUG),
        _ => {}
    }
    let flush = log::start(&log)?;
    if let Some(log_config) = log.log_config.filter(|given| !given.not_taken.is_empty()) {
        tracing::warn!("{log_config}");
    }
    Ok(flush)
}

fn load(path: Option<&Path>) -> anyhow::Result<(PathBuf, Config)> {
    let path = config::locate(path)?;
    let config = config::load(&path)?;
    Ok((path, config))
}

fn refuse(error: &anyhow::Error) -> ExitCode {
    eprintln!("{error:#}");
    ExitCode::from(EXIT_CONFIG)
}
