//! Misrouted requests of zones: a gateway's registered address leads to one of another zone, or
//! back to this one. Such a gateway is named once, and counted.

use tracing::warn;

use crate::gateway::Context;
use crate::model::component::Gateway;

/// Counts that requests to `gateway` come back, and says so once. `found` are the names in the
/// certificate of what answered, or our own if the address is ours.
pub(crate) fn found_circle(gateway: &Gateway, found: &str, cx: &Context) {
    cx.metrics.misrouted("loop");
    if cx.resolver.memory().is_news(gateway, "loop") {
        let (zone, gateway) = ends(gateway);
        warn!(
            zone,
            gateway,
            found,
            "requests to this gateway go in a loop: compare its hostname and public_port with the port \
             forwards"
        );
    }
}

/// Counts that `gateway` is one of another zone, known by the names in its certificate, and says so
/// once.
pub(crate) fn found_elsewhere(gateway: &Gateway, names: &str, cx: &Context) {
    cx.metrics.misrouted("wrong_zone");
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
