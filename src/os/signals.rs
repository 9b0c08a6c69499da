//! The signals that stop the gateway, the one that makes it read its files again, and the one that
//! makes it tell how it stands.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// SIGTERM and SIGINT, the same to us.
pub(crate) struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    /// Takes the signals over from their default action. Needs a runtime.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// Waits for the next of them and says which.
    pub(crate) async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// SIGHUP.
pub(crate) struct ReloadSignal(Signal);

impl ReloadSignal {
    /// Takes the signal over from its default action, for good. Needs a runtime.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(signal(SignalKind::hangup())?))
    }

    /// Waits for the next one; those that come meanwhile are one.
    pub(crate) async fn next(&mut self) {
        self.0.recv().await;
    }
}

/// SIGUSR2, by which upstream's programs write down what their threads do.
pub(crate) struct StatusSignal(Signal);

impl StatusSignal {
    /// Takes the signal over from its default action, for good. Needs a runtime.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(signal(SignalKind::user_defined2())?))
    }

    /// Waits for the next one; those that come meanwhile are one. `None` if none will come.
    pub(crate) async fn next(&mut self) -> Option<()> {
        self.0.recv().await
    }
}
