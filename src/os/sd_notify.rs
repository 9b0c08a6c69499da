//! The notification protocol of the service manager (sd_notify(3)). Without a service manager all
//! notifications do nothing.

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

/// How long a notification waits for a service manager that does not read its socket. The function
/// of sd_notify(3) waits forever.
const NOTIFY_TIMEOUT: Duration = Duration::from_secs(2);

/// The interval of attempts to send. poll(2) does not report when the queue of another process's
/// datagram socket has room again, unless the two are connected.
const NOTIFY_RETRY: Duration = Duration::from_millis(50);

/// The service manager that started this process, if there is one.
///
/// The socket is opened at startup, so that the status can still be sent when descriptors run out.
pub(crate) struct ServiceManager {
    socket: Option<(UnixDatagram, SocketAddr)>,
    /// Whether `READY=1` was sent.
    ready: AtomicBool,
    /// The time without a ping after which the service manager kills this process
    /// (`WATCHDOG_USEC`). `None` without a watchdog.
    pub(crate) watchdog_timeout: Option<Duration>,
}

impl ServiceManager {
    /// Returns the service manager that `NOTIFY_SOCKET` names.
    pub(crate) fn from_environment() -> Self {
        let socket = env::var_os("NOTIFY_SOCKET").and_then(|name| {
            open(name.as_bytes())
                .inspect_err(
                    |error| warn!(%error, "cannot notify the service manager (NOTIFY_SOCKET)"),
                )
                .ok()
        });
        // WATCHDOG_USEC=0 disables the watchdog.
        let watchdog_timeout = sd_notify::watchdog_enabled().filter(|time| !time.is_zero());
        Self { socket, ready: AtomicBool::new(false), watchdog_timeout }
    }

    /// Returns a service manager that listens on the socket `name`.
    #[cfg(test)]
    pub(crate) fn at(name: &str, watchdog_timeout: Option<Duration>) -> Self {
        Self { socket: open(name.as_bytes()).ok(), ready: AtomicBool::new(false), watchdog_timeout }
    }

    pub(crate) async fn ping_watchdog(&self) {
        self.notify(&[NotifyState::Watchdog]).await;
    }

    /// Sends the line that `systemctl status` shows.
    pub(crate) async fn status(&self, line: &str) {
        self.notify(&[NotifyState::Status(line)]).await;
    }

    /// Reports that the start is complete.
    pub(crate) async fn ready(&self) {
        self.ready.store(true, Ordering::Relaxed);
        self.notify(&[NotifyState::Ready]).await;
    }

    /// Reports that a reload has begun. Does nothing before [`Self::ready`], because the end of a
    /// reload is reported by `READY=1`.
    pub(crate) async fn reloading(&self) {
        if self.ready.load(Ordering::Relaxed)
            && let Ok(now) = NotifyState::monotonic_usec_now()
        {
            self.notify(&[NotifyState::Reloading, now]).await;
        }
    }

    /// Reports that a reload has ended, whether or not it succeeded.
    pub(crate) async fn reloaded(&self) {
        if self.ready.load(Ordering::Relaxed) {
            self.notify(&[NotifyState::Ready]).await;
        }
    }

    pub(crate) async fn stopping(&self) {
        self.notify(&[NotifyState::Stopping]).await;
    }

    /// Sends `states`. While the service manager does not read, this waits without blocking the
    /// thread, which also runs the tasks of streams.
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

/// Opens a socket for sending to `name`: a path, or `@` and the name of an abstract socket.
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

    #[tokio::test(start_paused = true)]
    async fn manager_that_does_not_read_blocks_no_other_task() {
        let name = format!("@zuul-fingergw-full-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name[1..]).expect("an abstract name");
        let _not_read = UnixDatagram::bind_addr(&address).expect("a socket");
        let sender = UnixDatagram::unbound().expect("a socket");
        sender.set_nonblocking(true).expect("a socket");
        while sender.send_to_addr(b"x", &address).is_ok() {}
        let other = tokio::spawn(async {});
        // Returns after its timeout.
        ServiceManager::at(&name, None).status("running").await;
        assert!(other.is_finished());
    }

    /// systemd sets a path, container runtimes often an abstract name.
    #[tokio::test]
    async fn abstract_socket_gets_notifications_and_reloads_only_after_ready() {
        let name = format!("@zuul-fingergw-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name[1..]).expect("an abstract name");
        let socket = UnixDatagram::bind_addr(&address).expect("a socket");
        let manager = ServiceManager::at(&name, None);
        let received = || {
            let mut buffer = [0; 64];
            let length = socket.recv(&mut buffer).expect("a datagram");
            String::from_utf8_lossy(&buffer[..length]).into_owned()
        };
        manager.status("running").await;
        assert_eq!(received(), "STATUS=running\n");

        manager.reloading().await;
        manager.reloaded().await;
        manager.ready().await;
        assert_eq!(received(), "READY=1\n");
        manager.reloading().await;
        let reloading = received();
        let time = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=");
        let time = time.and_then(|time| time.strip_suffix('\n'));
        assert!(time.is_some_and(|time| time.parse::<u64>().is_ok()), "{reloading:?}");
        manager.reloaded().await;
        assert_eq!(received(), "READY=1\n");
    }
}
