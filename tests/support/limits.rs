//! Clients that exhaust limits.

use std::net::SocketAddr;
use std::ops::Range;

use tokio::task::JoinSet;

use super::client::Client;
use super::within;

pub(crate) const TOO_MANY: &str =
    "Internal streaming error: too many connections from this address\r\n";

pub(crate) const TOO_MANY_LOOKUPS: &str =
    "Internal streaming error: too many requests at this moment\r\n";

/// Starts `count` handshakes from `local` with `hello` and leaves them unfinished; returns those
/// that are still open when only `kept` are left.
pub(crate) async fn begin_handshakes(
    local: &'static str,
    gateway: SocketAddr,
    hello: &[u8],
    count: usize,
    kept: usize,
) -> JoinSet<()> {
    let mut begun = JoinSet::new();
    for _ in 0..count {
        let mut client = Client::connect_from(local, gateway).await;
        client.send(hello).await;
        begun.spawn(async move {
            // Not closed: the read would never end.
            let _ = tokio::io::copy(&mut client.stream, &mut tokio::io::sink()).await;
        });
    }
    for _ in kept..count {
        within("the other handshakes to be closed", begun.join_next())
            .await
            .expect("a handshake")
            .expect("a close");
    }
    begun
}

/// Requests builds with these numbers; returns the requests that still wait when only `kept` are
/// left and the others have been refused.
pub(crate) async fn ask_while_it_hangs(
    gateway: SocketAddr,
    builds: Range<usize>,
    kept: usize,
) -> JoinSet<String> {
    let mut asked = JoinSet::new();
    for number in builds {
        let mut client = Client::ask(gateway, &format!("{number:032x}")).await;
        asked.spawn(async move { client.text().await });
    }
    while asked.len() > kept {
        let answer = asked.join_next().await.expect("another request").expect("a reply");
        assert_eq!(answer, TOO_MANY_LOOKUPS);
    }
    asked
}
