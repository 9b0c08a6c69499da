//! Loads and validates the configuration, and reports its errors.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, anyhow};

use crate::config::{self, Config};
use crate::daemon::Certificates;
use crate::os::privileges::RunAsUser;
use crate::telemetry::log;

/// The configuration cannot be used: `EX_CONFIG` of sysexits(3), which shows service managers that
/// trying again does not help.
pub(super) const EXIT_CONFIG: u8 = 78;

/// How long an error message waits for a reader of standard error that stalls.
const STDERR_TIMEOUT: Duration = Duration::from_secs(2);

/// A configuration whose files and user are usable as well.
pub(super) struct ValidatedConfig {
    pub(super) path: PathBuf,
    pub(super) config: Config,
    pub(super) certificates: Certificates,
    pub(super) user: Option<RunAsUser>,
}

/// Loads the configuration in `path`, or where it is by default, and its certificates, and looks
/// the user up. Reports the errors of the last two together.
pub(super) fn load(path: Option<&Path>) -> Result<ValidatedConfig> {
    let path = config::locate(path)?;
    let config = config::load(&path)?;
    let certificates = Certificates::load(&config, config::own_hostname);
    let user = RunAsUser::find(config.user.as_deref());
    match (certificates, user) {
        (Ok(certificates), Ok(user)) => Ok(ValidatedConfig { path, config, certificates, user }),
        (Err(error), Ok(_)) => Err(error),
        (Ok(_), Err(error)) => Err(anyhow!("{}: {error}", path.display())),
        (Err(error), Err(user)) => Err(anyhow!("{error:#}\n{}: {user}", path.display())),
    }
}

/// Prints `error` and returns the exit status for a configuration that cannot be used.
pub(super) fn report_config_error(error: &anyhow::Error) -> ExitCode {
    print_error(error);
    ExitCode::from(EXIT_CONFIG)
}

/// Writes `error` to standard error, which the operator or the service manager sees wherever the
/// log goes. Gives up if its reader stalls.
pub(super) fn print_error(error: &anyhow::Error) {
    log::stderr::write(&format!("{error:#}"), STDERR_TIMEOUT);
}
