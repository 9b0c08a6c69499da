//! A TCP proxy in front of ZooKeeper, an executor or a gateway that other tests use as well: it
//! breaks connections, holds them, delays them, or loses a response. TLS passes through unchanged.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use super::system::{Entry, System};
use super::within;

/// A running proxy. Dropping it closes all its connections; from then on the port refuses.
pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    orders: watch::Sender<Orders>,
    _tasks: JoinSet<()>,
}

#[derive(Clone, Copy)]
struct Orders {
    /// Port on loopback that new connections are forwarded to.
    port: u16,
    /// Nothing is forwarded in either direction; new connections are accepted and wait.
    hold: bool,
    /// New connections are closed immediately.
    refuse: bool,
    /// Delay of each piece, in either direction.
    delay: Duration,
    /// Number of times all connections have been cut.
    cuts: u64,
    /// Number of times all connections have been reset.
    resets: u64,
}

/// A piece of the server's response, held until the test decides. Dropping it forwards the piece.
pub(crate) struct Answer(oneshot::Sender<Verdict>);

enum Verdict {
    Pass,
    Lose,
}

impl Answer {
    pub(crate) fn pass(self) {
        let _ = self.0.send(Verdict::Pass);
    }

    /// Discards it and cuts the connection.
    pub(crate) fn lose(self) {
        let _ = self.0.send(Verdict::Lose);
    }
}

/// The server's responses, one after the other. Dropping it forwards all.
pub(crate) struct Answers(mpsc::Receiver<Answer>);

impl Answers {
    /// Forwards responses until the gateways' entries satisfy `wanted`. Returns the entries and the
    /// response that followed, which is held back, and with it whatever the gateway would do next.
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
    /// Starts a proxy for `port` on loopback.
    pub(crate) async fn start(port: u16) -> Self {
        Self::listen(Ipv4Addr::LOCALHOST.into(), port, None).await
    }

    /// Starts a proxy for `port` that listens on another address of this machine.
    pub(crate) async fn start_on(host: IpAddr, port: u16) -> Self {
        Self::listen(host, port, None).await
    }

    /// Starts a proxy for `port` that holds every response until the test decides, while
    /// [`Answers`] exists.
    pub(crate) async fn stepping(port: u16) -> (Self, Answers) {
        let (answers, answers_seen) = mpsc::channel(1);
        let proxy = Self::listen(Ipv4Addr::LOCALHOST.into(), port, Some(answers)).await;
        (proxy, Answers(answers_seen))
    }

    async fn listen(host: IpAddr, port: u16, answers: Option<mpsc::Sender<Answer>>) -> Self {
        let listener = TcpListener::bind((host, 0)).await.expect("a port");
        let address = listener.local_addr().expect("its address");
        let (orders, orders_seen) = watch::channel(Orders {
            port,
            hold: false,
            refuse: false,
            delay: Duration::ZERO,
            cuts: 0,
            resets: 0,
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                connections.spawn(carry(client, orders_seen.clone(), answers.clone()));
            }
        });
        Self { address, orders, _tasks: tasks }
    }

    /// Cuts all connections; new connections are forwarded.
    pub(crate) fn cut(&self) {
        self.orders.send_modify(|orders| orders.cuts += 1);
    }

    /// Resets all connections; new connections are forwarded.
    pub(crate) fn reset(&self) {
        self.orders.send_modify(|orders| orders.resets += 1);
    }

    /// Forwards new connections to another port, as after a restart of the server.
    pub(crate) fn lead_to(&self, port: u16) {
        self.orders.send_modify(|orders| orders.port = port);
    }

    /// Cuts all connections and refuses new ones, as if the server were down.
    pub(crate) fn refuse(&self) {
        self.orders.send_modify(|orders| {
            orders.refuse = true;
            orders.cuts += 1;
        });
    }

    /// Delays each piece by `delay` from now on.
    pub(crate) fn delay(&self, delay: Duration) {
        self.orders.send_modify(|orders| orders.delay = delay);
    }

    /// Forwards nothing, as if the server hung.
    pub(crate) fn hold(&self) {
        self.orders.send_modify(|orders| orders.hold = true);
    }

    /// Forwards again, including what was held.
    pub(crate) fn release(&self) {
        self.orders.send_modify(|orders| {
            orders.hold = false;
            orders.refuse = false;
        });
    }
}

/// Forwards one connection until a side closes it or it is cut. A reset is forwarded as a reset.
async fn carry(
    client: TcpStream,
    orders: watch::Receiver<Orders>,
    answers: Option<mpsc::Sender<Answer>>,
) {
    let Orders { port, refuse, cuts, resets, .. } = *orders.borrow();
    if refuse {
        return;
    }
    let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await else { return };
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let mut cut = orders.clone();
    let reset = tokio::select! {
        reset = copy(&mut from_client, &mut to_server, orders.clone(), None) => reset,
        reset = copy(&mut from_server, &mut to_client, orders, answers) => reset,
        ordered = cut.wait_for(|now| now.cuts != cuts || now.resets != resets) => {
            ordered.is_ok_and(|now| now.resets != resets)
        }
    };
    if reset {
        super::executor::reset(from_client.as_ref());
        super::executor::reset(from_server.as_ref());
        // Dropping each half would send a FIN ahead of the reset.
        to_client.forget();
        to_server.forget();
    }
}

/// Copies one direction; returns whether it ended with a reset.
async fn copy(
    from: &mut OwnedReadHalf,
    to: &mut OwnedWriteHalf,
    mut orders: watch::Receiver<Orders>,
    answers: Option<mpsc::Sender<Answer>>,
) -> bool {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let mut count = match from.read(&mut buffer).await {
            Ok(0) => return false,
            Ok(count) => count,
            Err(_) => return true,
        };
        if orders.wait_for(|orders| !orders.hold).await.is_err() {
            return false;
        }
        // What arrived while it was held is forwarded as one piece. A reset is reported only once.
        let reset = loop {
            match from.try_read(&mut buffer[count..]) {
                Ok(0) => break false,
                Ok(more) => count += more,
                Err(error) => break error.kind() != ErrorKind::WouldBlock,
            }
        };
        let delay = orders.borrow().delay;
        tokio::time::sleep(delay).await;
        if let Some(answers) = &answers {
            let (verdict, verdict_seen) = oneshot::channel();
            if answers.send(Answer(verdict)).await.is_ok()
                && matches!(verdict_seen.await, Ok(Verdict::Lose))
            {
                return false;
            }
        }
        if to.write_all(&buffer[..count]).await.is_err() || reset {
            return true;
        }
    }
}
