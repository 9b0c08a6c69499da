//! A gateway whose configuration changes while it runs.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use super::admin::metric;
use super::gateway::{Builder, Gateway};
use super::program::{Outcome, program};

/// A gateway with a command socket, and its configuration file.
pub(crate) struct Reloadable {
    pub(crate) gateway: Gateway,
    pub(crate) config: PathBuf,
}

impl Reloadable {
    pub(crate) async fn start(builder: Builder) -> Self {
        let mut builder = builder.control();
        builder.admin = true;
        let config = builder.write();
        Self { gateway: builder.ready().await, config }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.gateway.address()
    }

    /// Replaces text in the configuration file, without a reload.
    pub(crate) fn edit(&self, from: &str, to: &str) {
        let text = fs::read_to_string(&self.config).expect("the configuration");
        assert_eq!(text.matches(from).count(), 1, "{from} in {text}");
        replace(&self.config, &text.replace(from, to));
    }

    /// Reloads, which must succeed. Returns the lines of output after the first.
    pub(crate) async fn reloads(&self) -> Vec<String> {
        let Outcome { code, stdout, stderr } = program(&["reload"], &self.config).await;
        assert_eq!((code, stderr.as_str()), (Some(0), ""), "{stdout}");
        let mut lines: Vec<_> = stdout.lines().map(str::to_owned).collect();
        assert_eq!(lines.remove(0), format!("reloaded {}", self.config.display()));
        lines
    }

    /// Reloads, which must fail. Returns the errors.
    pub(crate) async fn refuses(&self) -> Vec<String> {
        let Outcome { code, stdout, stderr } = program(&["reload"], &self.config).await;
        assert_eq!((code, stdout.as_str()), (Some(1), ""), "{stderr}");
        let mut lines: Vec<_> = stderr.lines().map(str::to_owned).collect();
        assert_eq!(lines.remove(0), format!("not reloaded {}:", self.config.display()));
        let advice = "nothing has changed; if files were being replaced just now, reload again";
        assert_eq!(lines.pop().as_deref(), Some(advice));
        lines
    }

    pub(crate) async fn metric(&self, series: &str) -> f64 {
        metric(&self.gateway, series).await
    }
}

/// Replaces the file at `path` atomically with `text`, as operators should.
pub(crate) fn replace(path: &Path, text: &str) {
    let new = path.with_extension("new");
    fs::write(&new, text).expect("a file");
    fs::rename(&new, path).expect("a new file in the old one's place");
}
