//! Listening sockets that the service manager has opened, and keeps open while the process restarts
//! (sd_listen_fds(3), systemd.socket(5)): clients that connect meanwhile wait and are not refused.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};

use anyhow::{Context, Result, bail};
use listenfd::ListenFd;
use socket2::SockRef;
use tracing::info;

const INVALID_ENVIRONMENT: &str =
    "LISTEN_FDS or LISTEN_FDNAMES is not as sd_listen_fds(3) describes it";

/// The inherited sockets that no listener has taken yet.
#[derive(Default)]
pub(crate) struct InheritedSockets {
    sockets: Vec<Socket>,
    /// The addresses of all listeners, for error messages.
    wanted: Vec<SocketAddr>,
}

struct Socket {
    listener: TcpListener,
    address: SocketAddr,
    /// `FileDescriptorName=` of its unit, or the default that systemd sets.
    name: String,
}

impl InheritedSockets {
    /// Takes the sockets that `LISTEN_FDS` announces to this process (`LISTEN_PID`), and removes
    /// both variables from the environment. Must be called while there is one thread.
    ///
    /// # Errors
    /// All descriptors that are not listening TCP sockets; or the variables are malformed.
    pub(crate) fn from_environment() -> Result<Self> {
        let mut inherited = Self::default();
        // Checked first: listenfd removes the variables, which may be meant for another process.
        if sd_notify::listen_fds().context(INVALID_ENVIRONMENT)?.len() == 0 {
            return Ok(inherited);
        }
        let names = sd_notify::listen_fds_with_names().context(INVALID_ENVIRONMENT)?;
        let mut descriptors = ListenFd::from_env();
        let mut errors = Vec::new();
        for (index, (descriptor, name)) in names.enumerate() {
            match take_listener(&mut descriptors, index) {
                Some((listener, address)) => {
                    inherited.sockets.push(Socket { listener, address, name });
                }
                None => errors.push(format!(
                    "descriptor {descriptor} ({name}) from the service manager is not a listening \
                     TCP socket: its unit needs ListenStream= with an address and a port"
                )),
            }
        }
        if !errors.is_empty() {
            bail!(errors.join("\n"));
        }
        Ok(inherited)
    }

    /// Returns the socket that listens on `address`, if there is one. For `[::]`, a socket on
    /// `0.0.0.0` is used if there is none on `[::]`. The length of its queue is set by its unit.
    ///
    /// # Errors
    /// A socket option cannot be set.
    pub(crate) fn take(&mut self, address: SocketAddr) -> Result<Option<TcpListener>> {
        self.wanted.push(address);
        let find = |ip: IpAddr| {
            let wanted = (ip, address.port());
            self.sockets
                .iter()
                .position(|socket| (socket.address.ip(), socket.address.port()) == wanted)
        };
        let mut found = find(address.ip());
        if found.is_none() && address.ip() == Ipv6Addr::UNSPECIFIED {
            // Without IPv6, a unit with nothing but a port gets an IPv4 socket.
            found = find(Ipv4Addr::UNSPECIFIED.into());
        }
        let Some(index) = found else { return Ok(None) };
        let Socket { listener, name, .. } = self.sockets.remove(index);
        listener.set_nonblocking(true)?;
        // As for sockets that we bind; accepted sockets inherit it.
        SockRef::from(&listener).set_tcp_nodelay(true)?;
        info!(%address, name, "using socket from the service manager");
        Ok(Some(listener))
    }

    /// Checks that each socket was taken by a listener.
    ///
    /// # Errors
    /// All sockets that were not: connections would wait in them forever.
    pub(crate) fn ensure_all_used(self) -> Result<()> {
        if self.sockets.is_empty() {
            return Ok(());
        }
        let wanted: Vec<_> = self.wanted.iter().map(ToString::to_string).collect();
        let wanted = wanted.join(", ");
        let errors = self.sockets.iter().map(|Socket { address, name, .. }| {
            format!(
                "the service manager passes a socket on {address} ({name}), and no listener is \
                 configured there: set ListenStream= of its unit and the listener's address to the \
                 same address (configured: {wanted})"
            )
        });
        bail!(errors.collect::<Vec<_>>().join("\n"));
    }
}

/// Returns descriptor `index` and its address if it is a listening TCP socket.
fn take_listener(descriptors: &mut ListenFd, index: usize) -> Option<(TcpListener, SocketAddr)> {
    let listener = descriptors.take_tcp_listener(index).ok().flatten()?;
    let is_listener = SockRef::from(&listener).is_listener().ok()?;
    let address = listener.local_addr().ok()?;
    is_listener.then_some((listener, address))
}
