//! The service manager's notification protocol (sd_notify(3)). Without a manager all of it does
//! nothing.

use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sd_notify::NotifyState;
use tracing::{debug, warn};

/// How long one that reads nothing is waited for: it is told by those who serve. sd_notify(3) would
/// wait for ever.
const TELLING_MAX: Duration = Duration::from_secs(2);

/// The service manager that started us, if one did.
///
/// Its socket is opened once, at the start: what is to be told when no descriptor is left is what
/// an operator needs most.
pub(crate) struct Manager {
    socket: Option<(UnixDatagram, SocketAddr)>,
    /// It has been told that we are.
    ready: AtomicBool,
    /// Behind which silence it takes us for hung.
    watchdog: Option<Duration>,
}

impl Manager {
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

    /// How long it waits for [`Self::alive`] before it takes us for hung (`WATCHDOG_USEC`), if it
    /// watches this process at all.
    pub(crate) fn watchdog(&self) -> Option<Duration> {
        self.watchdog
    }

    /// A sign of life.
    pub(crate) fn alive(&self) {
        self.notify(&[NotifyState::Watchdog]);
    }

    /// One line on how things stand, as `systemctl status` shows it.
    pub(crate) fn status(&self, line: &str) {
        self.notify(&[NotifyState::Status(line)]);
    }

    /// Ready: listening and registered.
    pub(crate) fn ready(&self) {
        self.ready.store(true, Ordering::Relaxed);
        self.notify(&[NotifyState::Ready]);
    }

    /// The configuration is being read again, until [`Self::reloaded`]. Before we are ready that
    /// is nobody's business, as its end would mean that we are.
    pub(crate) fn reloading(&self) {
        if self.ready.load(Ordering::Relaxed)
            && let Ok(now) = NotifyState::monotonic_usec_now()
        {
            self.notify(&[NotifyState::Reloading, now]);
        }
    }

    /// It has been, however that went.
    pub(crate) fn reloaded(&self) {
        if self.ready.load(Ordering::Relaxed) {
            self.notify(&[NotifyState::Ready]);
        }
    }

    /// On the way out.
    pub(crate) fn stopping(&self) {
        self.notify(&[NotifyState::Stopping]);
    }

    fn notify(&self, states: &[NotifyState<'_>]) {
        let Some((socket, address)) = &self.socket else { return };
        let lines: String = states.iter().map(|state| format!("{state}\n")).collect();
        if let Err(error) = socket.send_to_addr(lines.as_bytes(), address) {
            debug!(%error, "service manager not notified");
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
    socket.set_write_timeout(Some(TELLING_MAX))?;
    Ok((socket, address))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Its queue is full, and stays so.
    #[test]
    fn a_manager_that_reads_nothing_is_not_waited_for() {
        let name = format!("@zuul-fingergw-full-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name[1..]).expect("an abstract name");
        let _deaf = UnixDatagram::bind_addr(&address).expect("a socket");
        let sender = UnixDatagram::unbound().expect("a socket");
        sender.set_nonblocking(true).expect("a socket");
        while sender.send_to_addr(b"x", &address).is_ok() {}
        let (end, ended) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            Manager::at(&name, None).status("well");
            end.send(())
        });
        ended.recv_timeout(Duration::from_secs(60)).expect("it goes on");
    }

    /// systemd gives a path, containers often an abstract name.
    #[test]
    fn an_abstract_socket_is_told() {
        let name = format!("@zuul-fingergw-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name[1..]).expect("an abstract name");
        let socket = UnixDatagram::bind_addr(&address).expect("a socket");
        let manager = Manager::at(&name, None);
        let told = || {
            let mut buffer = [0; 64];
            let length = socket.recv(&mut buffer).expect("a datagram");
            String::from_utf8_lossy(&buffer[..length]).into_owned()
        };
        manager.status("well");
        assert_eq!(told(), "STATUS=well\n");

        // Nothing is told of a reload while we are not ready.
        manager.reloading();
        manager.reloaded();
        manager.ready();
        assert_eq!(told(), "READY=1\n");
        manager.reloading();
        let reloading = told();
        let moment = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=");
        let moment = moment.and_then(|moment| moment.strip_suffix('\n'));
        assert!(moment.is_some_and(|moment| moment.parse::<u64>().is_ok()), "{reloading:?}");
        manager.reloaded();
        assert_eq!(told(), "READY=1\n");
    }
}
