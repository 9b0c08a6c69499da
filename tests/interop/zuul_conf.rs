//! A `zuul.conf` for Zuul's programs and for ours.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::support::gateway::Gateway;
use crate::support::system::System;

/// A `zuul.conf` with the `[zookeeper]` section of a system.
pub(crate) struct ZuulConf {
    _directory: TempDir,
    path: PathBuf,
}

impl ZuulConf {
    /// Adds these sections after `[zookeeper]`.
    pub(crate) fn new(system: &System, sections: &str) -> Self {
        Self::write(system, |_| sections.to_owned())
    }

    /// For a gateway of `zone`, Zuul's or ours, on a free port of 127.0.0.1, with these additional
    /// lines in `[fingergw]`.
    pub(crate) fn gateway(system: &System, zone: &str, lines: &str) -> Self {
        Self::write(system, |directory| {
            format!(
                "[fingergw]\nlisten_address = 127.0.0.1\nport = 0\nhostname = localhost\n\
                 zone = {zone}\ncommand_socket = {}/fingergw.socket\n{lines}",
                directory.display(),
            )
        })
    }

    fn write(system: &System, sections: impl FnOnce(&Path) -> String) -> Self {
        let directory = TempDir::new().expect("a directory for zuul.conf");
        let path = directory.path().join("zuul.conf");
        let text = format!(
            "[zookeeper]\nhosts = {}\n{}session_timeout = 30\n{}",
            system.hosts(),
            system.zookeeper.identity.zuul_conf(),
            sections(directory.path()),
        );
        fs::write(&path, text).expect("zuul.conf");
        Self { _directory: directory, path }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Starts our gateway with this configuration.
    pub(crate) async fn ours(&self) -> Gateway {
        let directory = TempDir::new().expect("a directory for the gateway");
        let mut gateway = Gateway::with_config(directory, self.path()).await;
        gateway.ready().await;
        gateway
    }
}
