//! Our metrics as Prometheus' own Python client reads them, which Zuul's services use.

use std::process::Stdio;

use tokio::io::AsyncWriteExt;

use crate::script::python;
use crate::support::admin::{exposition, with_admin};
use crate::support::system::System;
use crate::support::within;

/// Reads an exposition; prints each family's name and type, and the labels of each exemplar.
const READ: &str = "
import sys
from prometheus_client.openmetrics.parser import text_string_to_metric_families
for family in text_string_to_metric_families(sys.stdin.read()):
    print(family.name, family.type, len(family.samples))
    for sample in family.samples:
        if sample.exemplar:
            print('exemplar', sample.name, sample.exemplar.labels)
";

/// Returns what Prometheus' Python client reads from an exposition.
pub(crate) async fn parse(exposition: &str) -> String {
    let mut reader = python();
    reader.args(["-c", READ]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut reader = reader.spawn().expect("real Zuul in target/venv (tests/run puts it there)");
    let mut stdin = reader.stdin.take().expect("stdin is piped");
    stdin.write_all(exposition.as_bytes()).await.expect("it reads everything");
    drop(stdin);
    let output = within("the Python client", reader.wait_with_output()).await.expect("its answer");
    assert!(output.status.success(), "refused:\n{exposition}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

#[tokio::test]
async fn python_client_reads_the_exposition() {
    let system = System::new().await;
    let gateway = with_admin(&system).ready().await;
    let families = parse(&exposition(&gateway).await).await;
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
