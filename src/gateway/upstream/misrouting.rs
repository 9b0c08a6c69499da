//! Mistakes in the wiring of zones: a gateway's registered address leads to one of another zone, or
//! back to this one. Such a gateway is named once, and counted.

use tracing::warn;

use crate::gateway::Context;
use crate::gateway::protocol::request::{Fault, Reply};
use crate::model::build_id::BuildId;
use crate::model::component::Gateway;

/// How every gateway begins to say that it cannot serve a log, upstream's among them.
const REFUSAL: &[u8] = b"Internal streaming error";

/// Whether `first` begins the line of a gateway that cannot serve the log where another one may. What
/// it says of the executor no other can mend.
pub(crate) fn is_refusal(first: &[u8]) -> bool {
    let executor = [Fault::ExecutorUnreachable, Fault::ExecutorSilent];
    first.starts_with(REFUSAL)
        && !executor.iter().any(|fault| first == Reply::Error(*fault).to_string().as_bytes())
}

/// Whether `first` is what a gateway of our own kind answers that serves another zone than the one
/// wanted.
pub(crate) fn is_of_other_zone(first: &[u8]) -> bool {
    first == Reply::Error(Fault::OtherZone).to_string().as_bytes()
}

/// Counts that a request for `build` comes back from `gateway`, and says so once.
pub(crate) fn found_circle(gateway: &Gateway, build: &BuildId, cx: &Context) {
    cx.metrics.misrouted("circle");
    if cx.resolver.memory().is_news(gateway, "circle") {
        let (zone, gateway) = ends(gateway);
        warn!(
            zone, gateway, found = %cx.resolver.own(), %build,
            "requests to this gateway seem to lead back to us: compare its hostname and public_port \
             with the port forwards"
        );
    }
}

/// Counts that `gateway` is one of another zone, known by the names in its certificate, and says so
/// once.
pub(crate) fn found_elsewhere(gateway: &Gateway, names: &str, cx: &Context) {
    cx.metrics.misrouted("zone");
    if cx.resolver.memory().is_news(gateway, "zone") {
        let (zone, gateway) = ends(gateway);
        warn!(
            zone,
            gateway,
            found = names,
            "what answers at this gateway's address is a gateway of another zone: compare its \
             hostname and public_port with the port forwards"
        );
    }
}

/// Zone, and host and port, as the registry has them.
fn ends(gateway: &Gateway) -> (String, String) {
    let Gateway { hostname, port, zone, .. } = gateway;
    let zone = zone.as_deref().unwrap_or_default().escape_default().to_string();
    (zone, format!("{}:{port}", hostname.escape_default()))
}
