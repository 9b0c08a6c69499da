//! A TCP proxy between one gateway and a ZooKeeper that others use as well: breaks their
//! connection, holds it, delays it, loses an answer. TLS passes through it untouched.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use super::system::{Entry, System};
use super::within;

/// Ends, and all connections with it, when it is dropped: from then on the port refuses.
pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    orders: watch::Sender<Orders>,
    _tasks: JoinSet<()>,
}

#[derive(Clone, Copy, Default)]
struct Orders {
    /// Nothing passes, in neither direction; new connections are taken and wait.
    hold: bool,
    /// New connections are closed at once.
    refuse: bool,
    /// How long each piece is on its way, in either direction.
    delay: Duration,
    /// How often all connections have been cut.
    cuts: u64,
}

/// Some bytes of the server on their way to the gateway, held until somebody decides. Dropping it
/// lets them pass.
pub(crate) struct Answer(oneshot::Sender<Verdict>);

enum Verdict {
    Pass,
    Lose,
}

impl Answer {
    pub(crate) fn pass(self) {
        let _ = self.0.send(Verdict::Pass);
    }

    /// Loses it and cuts the connection.
    pub(crate) fn lose(self) {
        let _ = self.0.send(Verdict::Lose);
    }
}

/// Every answer of the server, one after the other; dropped, all pass.
pub(crate) struct Answers(mpsc::Receiver<Answer>);

impl Answers {
    /// Passes answers on until the gateways' entries are as `wanted` says. Returns them, and the
    /// answer that came then, kept back and with it whatever the gateway would do next.
    pub(crate) async fn until(
        &mut self,
        what: &str,
        system: &System,
        wanted: impl Fn(&[Entry]) -> bool,
    ) -> (Answer, Vec<Entry>) {
        within(what, async {
            loop {
                let answer = self.0.recv().await.expect("the proxy lives");
                let entries = system.entries().await;
                if wanted(&entries) {
                    return (answer, entries);
                }
                answer.pass();
            }
        })
        .await
    }
}

impl Proxy {
    /// Before `port` on loopback.
    pub(crate) async fn start(port: u16) -> Self {
        Self::listen(Ipv4Addr::LOCALHOST.into(), port, None).await
    }

    /// Before `port`, under another address of this machine.
    pub(crate) async fn start_on(host: IpAddr, port: u16) -> Self {
        Self::listen(host, port, None).await
    }

    /// Before `port`; asks about every answer, as long as somebody decides.
    pub(crate) async fn stepping(port: u16) -> (Self, Answers) {
        let (answers, answers_seen) = mpsc::channel(1);
        let proxy = Self::listen(Ipv4Addr::LOCALHOST.into(), port, Some(answers)).await;
        (proxy, Answers(answers_seen))
    }

    async fn listen(host: IpAddr, port: u16, answers: Option<mpsc::Sender<Answer>>) -> Self {
        let listener = TcpListener::bind((host, 0)).await.expect("a port");
        let address = listener.local_addr().expect("its address");
        let (orders, orders_seen) = watch::channel(Orders::default());
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                connections.spawn(carry(client, port, orders_seen.clone(), answers.clone()));
            }
        });
        Self { address, orders, _tasks: tasks }
    }

    /// Cuts all connections; new ones pass.
    pub(crate) fn cut(&self) {
        self.orders.send_modify(|orders| orders.cuts += 1);
    }

    /// Cuts all connections and refuses new ones, as if the server were away.
    pub(crate) fn refuse(&self) {
        self.orders.send_modify(|orders| {
            orders.refuse = true;
            orders.cuts += 1;
        });
    }

    /// Has each piece take so long from now on.
    pub(crate) fn delay(&self, delay: Duration) {
        self.orders.send_modify(|orders| orders.delay = delay);
    }

    /// Lets nothing pass, as if the server hung.
    pub(crate) fn hold(&self) {
        self.orders.send_modify(|orders| orders.hold = true);
    }

    /// Lets all pass again, what was held included.
    pub(crate) fn release(&self) {
        self.orders.send_modify(|orders| {
            orders.hold = false;
            orders.refuse = false;
        });
    }
}

/// Carries one connection until a side closes it or it is cut.
async fn carry(
    client: TcpStream,
    port: u16,
    orders: watch::Receiver<Orders>,
    answers: Option<mpsc::Sender<Answer>>,
) {
    if orders.borrow().refuse {
        return;
    }
    let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await else { return };
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let cuts = orders.borrow().cuts;
    let mut cut = orders.clone();
    tokio::select! {
        () = copy(from_client, to_server, orders.clone(), None) => {}
        () = copy(from_server, to_client, orders, answers) => {}
        _ = cut.wait_for(|orders| orders.cuts != cuts) => {}
    }
}

async fn copy(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut orders: watch::Receiver<Orders>,
    answers: Option<mpsc::Sender<Answer>>,
) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(mut count @ 1..) = from.read(&mut buffer).await {
        if orders.wait_for(|orders| !orders.hold).await.is_err() {
            return;
        }
        // What came while it was held goes on in one piece with it.
        while let Ok(more @ 1..) = from.try_read(&mut buffer[count..]) {
            count += more;
        }
        let delay = orders.borrow().delay;
        tokio::time::sleep(delay).await;
        if let Some(answers) = &answers {
            let (verdict, verdict_seen) = oneshot::channel();
            if answers.send(Answer(verdict)).await.is_ok()
                && matches!(verdict_seen.await, Ok(Verdict::Lose))
            {
                return;
            }
        }
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}
