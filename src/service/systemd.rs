//! The service manager's notification protocol (sd_notify(3)). Without a manager all of it does
//! nothing.

use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use sd_notify::NotifyState;
use tracing::{debug, warn};

/// The service manager that started us, if one did.
///
/// Its socket is opened once, at the start: what is to be told when no descriptor is left is what
/// an operator needs most.
pub(crate) struct Manager(Option<(UnixDatagram, SocketAddr)>);

impl Manager {
    /// The one that `NOTIFY_SOCKET` names.
    pub(crate) fn from_environment() -> Self {
        let Some(name) = env::var_os("NOTIFY_SOCKET") else { return Self(None) };
        let manager = open(name.as_bytes())
            .inspect_err(|error| warn!(%error, "service manager (NOTIFY_SOCKET) cannot be told"));
        Self(manager.ok())
    }

    /// One line on how things stand, as `systemctl status` shows it.
    pub(crate) fn status(&self, line: &str) {
        self.notify(NotifyState::Status(line));
    }

    /// Ready: listening and registered.
    pub(crate) fn ready(&self) {
        self.notify(NotifyState::Ready);
    }

    /// On the way out.
    pub(crate) fn stopping(&self) {
        self.notify(NotifyState::Stopping);
    }

    fn notify(&self, state: NotifyState<'_>) {
        let Some((socket, address)) = &self.0 else { return };
        if let Err(error) = socket.send_to_addr(format!("{state}\n").as_bytes(), address) {
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
    Ok((UnixDatagram::unbound()?, address))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// systemd gives a path, containers often an abstract name.
    #[test]
    fn an_abstract_socket_is_told() {
        let name = format!("@zuul-fingergw-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name[1..]).expect("an abstract name");
        let socket = UnixDatagram::bind_addr(&address).expect("a socket");
        Manager(open(name.as_bytes()).ok()).status("well");
        let mut buffer = [0; 64];
        let length = socket.recv(&mut buffer).expect("a datagram");
        assert_eq!(&buffer[..length], b"STATUS=well\n");
    }
}
