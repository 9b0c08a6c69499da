//! Logs that arrive byte for byte.

use crate::support::client::Client;
use crate::support::executor::Executor;
use crate::support::gateway::Builder;
use crate::support::system::System;

#[tokio::test]
async fn a_log_arrives_while_it_grows() {
    let system = System::new().await;
    let gateway = Builder::new(&system).ready().await;
    let executor = Executor::start().await;
    let build = system.put_build(None, Some(&executor.worker(None))).await;

    let mut client = Client::ask(gateway.address(), &build).await;
    let mut stream = executor.accept().await;
    assert_eq!(stream.request, format!("{build}\n"));
    for line in ["first\n", "second\n"] {
        stream.write(line.as_bytes()).await;
        client.expect(line.as_bytes()).await;
    }
    stream.finish().await;
    assert_eq!(client.text().await, "");
}
