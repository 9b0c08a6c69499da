//! The signals that the program handles.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// SIGTERM and SIGINT, which both stop the gateway.
pub(crate) struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    /// Replaces the default actions of the signals. Must be called within a runtime.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// Waits for the next of them and returns its name.
    pub(crate) async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// SIGHUP, which reloads the configuration.
pub(crate) struct ReloadSignal(Signal);

impl ReloadSignal {
    /// Replaces the default action of the signal for good. Must be called within a runtime.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(signal(SignalKind::hangup())?))
    }

    /// Waits for the next signal. Several that arrived since the last call count as one.
    pub(crate) async fn next(&mut self) {
        self.0.recv().await;
    }
}

/// SIGUSR2, which logs the status. Zuul's programs log the stacks of their threads.
pub(crate) struct StatusSignal(Signal);

impl StatusSignal {
    /// Replaces the default action of the signal for good. Must be called within a runtime.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(signal(SignalKind::user_defined2())?))
    }

    /// Waits for the next signal. Several that arrived since the last call count as one.
    pub(crate) async fn next(&mut self) {
        self.0.recv().await;
    }
}
