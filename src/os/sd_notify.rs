//! The service manager's notification protocol (sd_notify(3)). Without a manager all of it does
//! nothing.

use std::env;
use std::ffi::OsStr;
use std::io::{self, ErrorKind};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

/// How long a notification waits for a service manager that does not read its socket. sd_notify(3)
/// would wait for ever.
const NOTIFY_TIMEOUT: Duration = Duration::from_secs(2);

/// Interval of the attempts meanwhile. poll(2) does not say when the queue of another process's
/// datagram socket has room again, unless the two are connected.
const NOTIFY_RETRY: Duration = Duration::from_millis(50);

/// The service manager that started us, if one did.
///
/// Its socket is opened once, at the start: what is to be told when no descriptor is left is what
/// an operator needs most.
pub(crate) struct ServiceManager {
    socket: Option<(UnixDatagram, SocketAddr)>,
    /// It has been told that we are.
    ready: AtomicBool,
    /// Behind which silence it takes us for hung.
    watchdog: Option<Duration>,
}

impl ServiceManager {
    /// The one that `NOTIFY_SOCKET` names.
    pub(crate) fn from_environment() -> Self {
        let socket = env::var_os("NOTIFY_SOCKET").and_then(|name| {
            open(name.as_bytes())
                .inspect_err(
                    |error| warn!(%error, "service manager (NOTIFY_SOCKET) cannot be told"),
                )
                .ok()
        });
        // 0 is no time to be in.
        let watchdog = sd_notify::watchdog_enabled().filter(|time| !time.is_zero());
        Self { socket, ready: AtomicBool::new(false), watchdog }
    }

    /// One that listens at `name`, and has a watchdog or none.
    #[cfg(test)]
    pub(crate) fn at(name: &str, watchdog: Option<Duration>) -> Self {
        Self { socket: open(name.as_bytes()).ok(), ready: AtomicBool::new(false), watchdog }
    }

    /// How long it waits for [`Self::ping_watchdog`] before it takes us for hung (`WATCHDOG_USEC`), if it
    /// watches this process at all.
    pub(crate) fn watchdog(&self) -> Option<Duration> {
        self.watchdog
    }

    /// A sign of life.
    pub(crate) async fn ping_watchdog(&self) {
        self.notify(&[NotifyState::Watchdog]).await;
    }

    /// One line on how things stand, as `systemctl status` shows it.
    pub(crate) async fn status(&self, line: &str) {
        self.notify(&[NotifyState::Status(line)]).await;
    }

    /// Ready: listening and registered.
    pub(crate) async fn ready(&self) {
        self.ready.store(true, Ordering::Relaxed);
        self.notify(&[NotifyState::Ready]).await;
    }

    /// The configuration is being read again, until [`Self::reloaded`]. Before we are ready that
    /// is nobody's business, as its end would mean that we are.
    pub(crate) async fn reloading(&self) {
        if self.ready.load(Ordering::Relaxed)
            && let Ok(now) = NotifyState::monotonic_usec_now()
        {
            self.notify(&[NotifyState::Reloading, now]).await;
        }
    }

    /// It has been, however that went.
    pub(crate) async fn reloaded(&self) {
        if self.ready.load(Ordering::Relaxed) {
            self.notify(&[NotifyState::Ready]).await;
        }
    }

    /// On the way out.
    pub(crate) async fn stopping(&self) {
        self.notify(&[NotifyState::Stopping]).await;
    }

    /// Sends `states`. Waits asynchronously where the service manager does not read: this is called by
    /// tasks on the workers that serve.
    async fn notify(&self, states: &[NotifyState<'_>]) {
        let Some((socket, address)) = &self.socket else { return };
        let lines: String = states.iter().map(|state| format!("{state}\n")).collect();
        let sent = timeout(NOTIFY_TIMEOUT, async {
            loop {
                match socket.send_to_addr(lines.as_bytes(), address) {
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        sleep(NOTIFY_RETRY).await;
                    }
                    sent => return sent,
                }
            }
        });
        match sent.await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => debug!(%error, "service manager not notified"),
            Err(_) => debug!("service manager not notified: it does not read its socket"),
        }
    }
}

/// `name` is a path, or behind an `@` the name of an abstract socket.
fn open(name: &[u8]) -> io::Result<(UnixDatagram, SocketAddr)> {
    let address = match name.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(OsStr::from_bytes(name)),
    }?;
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    Ok((socket, address))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Other tasks of the only worker go on while a notification waits, and it gives up in the end.
    #[tokio::test(start_paused = true)]
    async fn manager_that_does_not_read_blocks_no_worker() {
        let name = format!("@zuul-fingergw-full-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name[1..]).expect("an abstract name");
        let _deaf = UnixDatagram::bind_addr(&address).expect("a socket");
        let sender = UnixDatagram::unbound().expect("a socket");
        sender.set_nonblocking(true).expect("a socket");
        while sender.send_to_addr(b"x", &address).is_ok() {}
        let other = tokio::spawn(async {});
        ServiceManager::at(&name, None).status("well").await;
        assert!(other.is_finished());
    }

    /// systemd gives a path, containers often an abstract name.
    #[tokio::test]
    async fn an_abstract_socket_is_told() {
        let name = format!("@zuul-fingergw-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name[1..]).expect("an abstract name");
        let socket = UnixDatagram::bind_addr(&address).expect("a socket");
        let manager = ServiceManager::at(&name, None);
        let told = || {
            let mut buffer = [0; 64];
            let length = socket.recv(&mut buffer).expect("a datagram");
            String::from_utf8_lossy(&buffer[..length]).into_owned()
        };
        manager.status("well").await;
        assert_eq!(told(), "STATUS=well\n");

        // Nothing is told of a reload while we are not ready.
        manager.reloading().await;
        manager.reloaded().await;
        manager.ready().await;
        assert_eq!(told(), "READY=1\n");
        manager.reloading().await;
        let reloading = told();
        let moment = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=");
        let moment = moment.and_then(|moment| moment.strip_suffix('\n'));
        assert!(moment.is_some_and(|moment| moment.parse::<u64>().is_ok()), "{reloading:?}");
        manager.reloaded().await;
        assert_eq!(told(), "READY=1\n");
    }
}
