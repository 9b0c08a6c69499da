//! Listening sockets that the service manager has opened and keeps while we come and go
//! (sd_listen_fds(3), systemd.socket(5)): who connects meanwhile waits, and is not refused.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};

use anyhow::{Context, Result, bail};
use listenfd::ListenFd;
use socket2::SockRef;
use tracing::info;

/// The sockets passed to this process that nobody has taken yet.
pub(crate) struct InheritedSockets {
    sockets: Vec<Socket>,
    /// The addresses that were asked for.
    wanted: Vec<SocketAddr>,
}

struct Socket {
    listener: TcpListener,
    address: SocketAddr,
    /// `FileDescriptorName=` of its unit, or what systemd makes up for it.
    name: String,
}

impl InheritedSockets {
    /// Those that `LISTEN_FDS` speaks of, if `LISTEN_PID` is this process. Both are taken out of the
    /// environment, so this is for a process that has one thread yet.
    ///
    /// # Errors
    /// All that are no listening TCP sockets; or the variables cannot be understood.
    pub(crate) fn from_environment() -> Result<Self> {
        const FAULT: &str = "LISTEN_FDS or LISTEN_FDNAMES is not what sd_listen_fds(3) says";
        let (mut sockets, mut faults) = (Vec::new(), Vec::new());
        // What is for another process is nothing to look at, and nothing to take out either.
        if sd_notify::listen_fds().context(FAULT)?.len() == 0 {
            return Ok(Self { sockets, wanted: Vec::new() });
        }
        let names = sd_notify::listen_fds_with_names().context(FAULT)?;
        let mut passed = ListenFd::from_env();
        for (index, (descriptor, name)) in names.enumerate() {
            match listening(&mut passed, index) {
                Some((listener, address)) => sockets.push(Socket { listener, address, name }),
                None => faults.push(format!(
                    "descriptor {descriptor} ({name}), passed by the service manager, is no listening \
                     TCP socket: its unit needs ListenStream= with an address and a port"
                )),
            }
        }
        if !faults.is_empty() {
            bail!(faults.join("\n"));
        }
        Ok(Self { sockets, wanted: Vec::new() })
    }

    /// The socket that listens on `address`, if one was passed; for `[::]` else one on `0.0.0.0`. How
    /// many connections wait in it is up to its unit.
    ///
    /// # Errors
    /// It cannot be made ready.
    pub(crate) fn take(&mut self, address: SocketAddr) -> Result<Option<TcpListener>> {
        self.wanted.push(address);
        let at = |ip: IpAddr| {
            let same = |socket: &Socket| {
                (socket.address.ip(), socket.address.port()) == (ip, address.port())
            };
            self.sockets.iter().position(same)
        };
        // A unit that says no more than a port means IPv4 where IPv6 is switched off, as we do.
        let stands_for = (address.ip() == Ipv6Addr::UNSPECIFIED).then_some(Ipv4Addr::UNSPECIFIED);
        let found = at(address.ip()).or_else(|| at(stands_for?.into()));
        let Some(index) = found else { return Ok(None) };
        let Socket { listener, name, .. } = self.sockets.remove(index);
        listener.set_nonblocking(true)?;
        // As with those we open ourselves; each accepted socket takes it over.
        SockRef::from(&listener).set_tcp_nodelay(true)?;
        info!(%address, name, "the service manager passes the socket");
        Ok(Some(listener))
    }

    /// # Errors
    /// A socket that nobody took: connections would wait in it for ever.
    pub(crate) fn ensure_all_used(self) -> Result<()> {
        let Self { sockets, wanted } = self;
        if sockets.is_empty() {
            return Ok(());
        }
        let wanted: Vec<_> = wanted.iter().map(ToString::to_string).collect();
        let faults = sockets.iter().map(|Socket { address, name, .. }| {
            format!(
                "the service manager passes a socket on {address} ({name}), where the configuration \
                 has no listener: make ListenStream= of its unit and the listener's address the same \
                 (configured: {})",
                wanted.join(", ")
            )
        });
        bail!(faults.collect::<Vec<_>>().join("\n"));
    }
}

/// The passed socket `index`, if it is a listening TCP one, and where it listens.
fn listening(passed: &mut ListenFd, index: usize) -> Option<(TcpListener, SocketAddr)> {
    let listener = passed.take_tcp_listener(index).ok().flatten()?;
    let listens = SockRef::from(&listener).is_listener().ok()?;
    let address = listener.local_addr().ok()?;
    listens.then_some((listener, address))
}
