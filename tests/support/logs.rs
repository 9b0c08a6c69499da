//! Logs that must arrive byte for byte, and clients that leave in the middle of one.

use tokio::task::JoinSet;

use super::client::{Client, Ending};
use super::executor::Executor;
use super::gateway::Gateway;
use super::{Duplex, within};

/// Byte `index` of a log that never repeats within any buffer's length.
pub(crate) fn pattern(index: usize) -> u8 {
    (index.wrapping_mul(2_654_435_761) >> 13) as u8
}

/// Sends `length` bytes from an executor and checks each byte at the client.
pub(crate) async fn exact(length: usize, executor: &Executor, mut client: Client<impl Duplex>) {
    let mut stream = executor.accept().await;
    let writer = async {
        let mut sent = 0;
        while sent < length {
            let count = (length - sent).min(256 * 1024);
            let piece: Vec<u8> = (sent..sent + count).map(pattern).collect();
            stream.write(&piece).await;
            sent += count;
        }
        stream.finish().await;
    };
    let reader = async {
        let (mut received, mut buffer) = (0, vec![0; 256 * 1024]);
        loop {
            match client.read(&mut buffer).await {
                Ok(count) => {
                    for (offset, byte) in buffer[..count].iter().enumerate() {
                        assert_eq!(*byte, pattern(received + offset), "byte {}", received + offset);
                    }
                    received += count;
                }
                Err(ending) => break (received, ending),
            }
        }
    };
    let ((), end) = tokio::join!(writer, reader);
    assert_eq!(end, (length, Ending::Clean));
}

/// Writes a log in pieces of every size, which split characters.
pub(crate) async fn in_pieces(executor: &Executor, mut client: Client<impl Duplex>) {
    let log = "h\u{e9}llo \u{20ac} \u{1f980}\n".repeat(40);
    let mut stream = executor.accept().await;
    for size in 1..=70 {
        for piece in log.as_bytes().chunks(size) {
            stream.write(piece).await;
        }
        client.expect(log.as_bytes()).await;
    }
    stream.finish().await;
    assert_eq!(client.text().await, "");
}

/// Number of concurrent streams that are reset.
const STREAMS: usize = 10;

/// Streams logs to clients from `ask` that reset in the middle of the log, and waits until nothing
/// of their streams is left: neither connections to the executor nor descriptors.
pub(crate) async fn reset_while_it_flows<S: Duplex>(
    gateway: &mut Gateway,
    executor: &Executor,
    ask: impl AsyncFn() -> Client<S>,
    reset: impl Fn(Client<S>),
) {
    let sockets = gateway.sockets();
    let mut flowing = Vec::new();
    let mut logs = JoinSet::new();
    for _ in 0..STREAMS {
        let mut client = ask().await;
        let mut stream = executor.begin(&mut client).await;
        logs.spawn(async move { while stream.try_write(&[b'x'; 65536]).await {} });
        flowing.push(client);
    }
    for mut client in flowing {
        client.expect(&[b'x'; 1 << 20]).await;
        reset(client);
    }
    within("the executor to see the reset", async { while logs.join_next().await.is_some() {} })
        .await;
    gateway.logged_times("the reasons", STREAMS, |line| line.contains("end=\"client left: ")).await;
    gateway.until_sockets(sockets).await;
}
