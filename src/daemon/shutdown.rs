//! Stops the gateway.

use std::time::Duration;

use tokio::time::sleep;
use tracing::{info, warn};

use super::reload::ReloadRequests;
use crate::gateway::{DrainResult, Server};
use crate::os::sd_notify::ServiceManager;
use crate::os::signals::StopSignals;
use crate::registry::Registration;
use crate::telemetry::otlp::Tracer;

/// The time limit of removing our registry entry, and that of closing the session with ZooKeeper.
const DEREGISTER_TIMEOUT: Duration = Duration::from_secs(3);
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// How the gateway has stopped.
pub(super) enum ExitMode {
    /// In order.
    Graceful,
    /// By a second signal, before the streams had ended.
    Interrupted,
}

/// Stops the gateway in order, or immediately on a second signal. Reloads are refused meanwhile.
pub(super) async fn shut_down(
    server: Server,
    registration: Registration,
    tracer: Tracer,
    manager: &ServiceManager,
    signals: &mut StopSignals,
    reload_requests: &mut ReloadRequests,
) -> ExitMode {
    let abort = server.abort_handle();
    tokio::select! {
        () = shut_down_in_order(server, registration, tracer, manager) => ExitMode::Graceful,
        never = reload_requests.refuse() => match never {},
        signal = signals.next() => {
            warn!(signal, "second signal: stopping immediately");
            abort.abort().await;
            ExitMode::Interrupted
        }
    }
}

async fn shut_down_in_order(
    server: Server,
    mut registration: Registration,
    tracer: Tracer,
    manager: &ServiceManager,
) {
    manager.stopping().await;
    let lame_duck = server.lame_duck();
    let grace = server.grace();

    // 1. Remove our registry entry, so that no new clients are sent here.
    if !registration.withdraw(DEREGISTER_TIMEOUT).await {
        warn!(
            "cannot delete our registry entry: ZooKeeper does not answer; it disappears with the session"
        );
    }

    // 2. Keep accepting for clients that were sent here before.
    if !lame_duck.is_zero() {
        info!(?lame_duck, "still accepting connections");
        sleep(lame_duck).await;
    }

    // 3. Close the listeners, wait for open connections, and abort those that remain.
    info!(?grace, connections = server.connections(), "no longer accepting connections");
    match server.drain(grace).await {
        DrainResult::Completed => info!("all streams have ended"),
        DrainResult::Aborted(streams) => {
            warn!(streams, ?grace, "streams aborted after the grace period")
        }
    }

    // 4. Close the session with ZooKeeper, and export the last spans.
    tokio::join!(registration.close(CLOSE_TIMEOUT), tracer.stop());
    info!("stopped");
}
