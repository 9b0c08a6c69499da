//! Our metrics as Prometheus' own Python client reads them, which Zuul's services use.

use std::process::Stdio;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::script::python;
use crate::support::gateway::Builder;
use crate::support::system::System;

/// Reads an exposition and prints each family's name and type.
const READ: &str = "
import sys
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.openmetrics import parser
read = parser.text_string_to_metric_families if sys.argv[1] == 'openmetrics' \
    else text_string_to_metric_families
for family in read(sys.stdin.read()):
    print(family.name, family.type, len(family.samples))
";

#[tokio::test]
async fn both_formats_are_understood() {
    let system = System::new().await;
    let mut builder = Builder::new(&system).zone("west");
    builder.admin = true;
    let gateway = builder.ready().await;
    let address = gateway.addresses[1];
    for (format, accept) in
        [("text", "text/plain"), ("openmetrics", "application/openmetrics-text")]
    {
        let mut stream = TcpStream::connect(address).await.expect("the admin listener");
        let request = format!("GET /metrics HTTP/1.1\r\nHost: g\r\nAccept: {accept}\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("a request");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("an answer");
        let (_, body) = answer.split_once("\r\n\r\n").expect("a body");

        let mut reader = python();
        reader.args(["-c", READ, format]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut reader =
            reader.spawn().expect("real Zuul in target/venv (tests/run puts it there)");
        let mut stdin = reader.stdin.take().expect("stdin is piped");
        stdin.write_all(body.as_bytes()).await.expect("it reads everything");
        drop(stdin);
        let output = reader.wait_with_output().await.expect("its answer");
        assert!(output.status.success(), "{format} is refused:\n{body}");
        let families = String::from_utf8(output.stdout).expect("UTF-8");
        for family in [
            "zuul_fingergw_requests counter",
            "zuul_fingergw_first_byte_seconds histogram",
            "zuul_fingergw_streams_active gauge",
            "process_cpu_seconds counter",
            "process_resident_memory_bytes gauge",
        ] {
            assert!(families.contains(family), "{family} is not in {format}:\n{families}");
        }
    }
}
