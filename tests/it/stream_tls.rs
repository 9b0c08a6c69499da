//! Streams to clients of a TLS listener: byte for byte, and how they end.

use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use crate::stream::{exact, in_pieces, reset_while_it_flows};
use crate::support::client::{Client, Ending};
use crate::tls::{Served, served};

/// Sizes around every buffer and record there is.
#[tokio::test]
async fn every_size_is_exact_over_tls() {
    let Served { gateway, executor, build, identity, .. } = served("", "").await;
    let sizes = [1, 2, 1023, 1024, 1025, 2048, 4096, 16_383, 16_384, 16_385, 65_536, 1_000_001];
    for size in sizes {
        let client = Client::ask_tls(gateway.address(), &identity, &build).await;
        exact(size, &executor, client).await;
    }
}

#[tokio::test]
async fn pieces_of_every_size_split_no_character() {
    let Served { gateway, executor, build, identity, .. } = served("", "").await;
    in_pieces(&executor, Client::ask_tls(gateway.address(), &identity, &build).await).await;
}

#[tokio::test]
async fn a_tls_client_can_tell_a_cut_from_an_end() {
    let Served { gateway, executor, build, identity, .. } = served("", "").await;
    for cut in [true, false] {
        let mut client = Client::ask_tls(gateway.address(), &identity, &build).await;
        let stream = executor.begin(&mut client).await;
        if cut {
            stream.reset();
        } else {
            stream.finish().await;
        }
        let ending = if cut { Ending::Reset } else { Ending::Clean };
        assert_eq!(client.rest().await, (Vec::new(), ending));
    }
}

/// Nobody half-closes TLS, so either way to close says that the client has left, though nothing is
/// being written to it.
#[tokio::test]
async fn a_client_that_closes_has_left() {
    let Served { mut gateway, executor, build, identity, .. } = served("", "").await;
    let before = gateway.sockets();
    for close_notify in [true, false] {
        let mut client = Client::ask_tls(gateway.address(), &identity, &build).await;
        let peer = client.stream.get_ref().0.local_addr().expect("its address");
        let mut stream = executor.begin(&mut client).await;
        if close_notify {
            client.half_close().await;
        }
        drop(client);
        stream.closed().await;
        let peer = format!("peer={peer} ");
        let line = gateway.logged("its end", |l| l.contains(&peer) && l.contains("ended")).await;
        assert!(line.ends_with("end=\"client left\""), "{line}");
        gateway.until_sockets(before).await;
    }
}

/// A close_notify alone is a client's leaving as well: it is not told more.
#[tokio::test]
async fn a_client_that_says_it_closes_has_left() {
    let Served { mut gateway, executor, build, identity, .. } = served("", "").await;
    let mut client = Client::ask_tls(gateway.address(), &identity, &build).await;
    let mut stream = executor.begin(&mut client).await;
    client.half_close().await;
    stream.closed().await;
    gateway.logged("its end", |line| line.ends_with("end=\"client left\"")).await;
    assert_eq!(client.rest().await, (Vec::new(), Ending::Reset));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn resets_of_clients_while_logs_flow_leave_nothing() {
    let Served { mut gateway, executor, build, identity, .. } = served("", "").await;
    let address = gateway.address();
    let ask = async || Client::ask_tls(address, &identity, &build).await;
    let reset = Client::<TlsStream<TcpStream>>::reset;
    reset_while_it_flows(&mut gateway, &executor, ask, reset).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_stopped_reading_is_cut_off() {
    let Served { mut gateway, executor, build, identity, .. } =
        served("", "write_timeout = \"300ms\"").await;
    let before = gateway.sockets();
    let plain = Client::connect_narrow(gateway.address()).await;
    let mut client = Client::shake(plain, &identity).await;
    client.send(format!("{build}\n").as_bytes()).await;
    let mut stream = executor.accept().await;
    while stream.try_write(&[b'x'; 65536]).await {}
    gateway.logged("why", |line| line.ends_with("end=\"client stopped reading\"")).await;
    assert_eq!(client.rest().await.1, Ending::Reset);
    gateway.until_sockets(before).await;
}
