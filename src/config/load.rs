//! Finds and reads the configuration file.

use std::io;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};

use super::{Config, toml, zuul_conf};
use crate::os::file;

/// The files that are tried when none is named, in this order.
const DEFAULT_FILES: [&str; 2] = ["/etc/zuul/zuul-fingergw.toml", "/etc/zuul/zuul.conf"];

/// Returns the path of the configuration file: `named`, with `~` expanded where no shell did it, or
/// the first of the default files that exists.
///
/// # Errors
/// No file is named and no default file exists.
pub(crate) fn locate(named: Option<&Path>) -> Result<PathBuf> {
    if let Some(named) = named {
        return Ok(zuul_conf::expand_user(named));
    }
    let home = std::env::home_dir().map(|home| home.join("zuul.conf"));
    let files: Vec<_> = DEFAULT_FILES.iter().map(PathBuf::from).chain(home).collect();
    files.iter().find(|file| file.exists()).cloned().with_context(|| {
        let files: Vec<_> = files.iter().map(|file| file.display().to_string()).collect();
        format!("no configuration: none of {} exists; name one with -c FILE", files.join(", "))
    })
}

/// Whether `path` is a file of our TOML. Any other file is a `zuul.conf`.
pub(crate) fn is_toml(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("toml"))
}

/// Reads and validates the configuration in `path`.
///
/// # Errors
/// The file cannot be read, or [`super::error::ConfigErrors`]: all errors in it.
pub(crate) fn load(path: &Path) -> Result<Config> {
    let name = path.display().to_string();
    let bytes = file::read(path).map_err(|error| cannot_read(&name, &error))?;
    let Ok(text) = String::from_utf8(bytes) else {
        bail!("{name}: cannot be read: it is not UTF-8 text");
    };
    let text = without_byte_order_mark(&text);
    if is_toml(path) {
        return Ok(toml::read(&name, text)?);
    }
    zuul_conf::read(&name, text, environment()).map_err(|errors| match toml::is_likely(text) {
        true => anyhow!(
            "{name}: cannot be read as a zuul.conf, and looks like TOML: rename it so that its name \
             ends in .toml"
        ),
        false => errors.into(),
    })
}

/// Returns the path of the command socket that the configuration in `path` sets, even if it has
/// errors: the running gateway may have been started with an earlier version of the file.
pub(crate) fn command_socket(path: &Path) -> Option<PathBuf> {
    let bytes = file::read(path).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let text = without_byte_order_mark(&text);
    match is_toml(path) {
        true => toml::command_socket(text),
        false => zuul_conf::command_socket(text, environment()),
    }
}

/// Some editors begin a file with a byte order mark.
fn without_byte_order_mark(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text)
}

/// The environment variables that Zuul's services take as options of every section of a
/// `zuul.conf`.
fn environment() -> impl Iterator<Item = (String, String)> {
    // Skips others without an error: they need not be UTF-8.
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .filter(|(name, _)| name.starts_with("ZUUL_"))
}

fn cannot_read(name: &str, error: &io::Error) -> anyhow::Error {
    if error.kind() != ErrorKind::PermissionDenied {
        return anyhow!("{name}: cannot be read: {error}");
    }
    let user = rustix::process::geteuid().as_raw();
    anyhow!(
        "{name}: cannot be read by user id {user}: {error}; run this as root or as the gateway's \
         user, or change its owner or mode"
    )
}
