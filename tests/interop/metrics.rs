//! Our metrics as Prometheus' own Python client reads them, which Zuul's services use.

use crate::script::parse_exposition;
use crate::support::admin::{exposition, with_admin};
use crate::support::system::System;

#[tokio::test]
async fn python_client_reads_the_exposition() {
    let system = System::new().await;
    let gateway = with_admin(&system).ready().await;
    let families = parse_exposition(&exposition(&gateway).await).await;
    for family in [
        "zuul_fingergw_requests counter",
        "zuul_fingergw_first_byte_seconds histogram",
        "zuul_fingergw_streams_active gauge",
        "process_cpu_seconds counter",
        "process_resident_memory_bytes gauge",
    ] {
        assert!(families.contains(family), "{family} is missing:\n{families}");
    }
}
