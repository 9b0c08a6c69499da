//! Listening sockets.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};

use anyhow::{Result, anyhow};
use rustix::io::Errno;
use socket2::{Domain, Protocol, Socket, Type};

/// Connections that the kernel keeps between two calls of accept; it reduces this to
/// `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// Binds `address`.
///
/// An unspecified IPv6 address takes IPv4 connections too, whatever the system's default is; on a
/// host without IPv6 it stands for the unspecified IPv4 address.
///
/// # Errors
/// The address cannot be listened on; the message says what to do.
pub(crate) fn bind(address: SocketAddr) -> Result<TcpListener> {
    let bound = match open(address) {
        Err(error) if address.ip() == Ipv6Addr::UNSPECIFIED && is_without_ipv6(&error) => {
            open(SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port())))
        }
        bound => bound,
    };
    bound.map_err(|error| {
        anyhow!("cannot listen on {address}: {error}{}", hint(&error, address.port()))
    })
}

/// What an operator can do about a socket that cannot be bound to `port`.
fn hint(error: &io::Error, port: u16) -> String {
    match Errno::from_io_error(error) {
        Some(Errno::ADDRINUSE) => {
            format!(
                " (by which process? ss -ltnp 'sport = :{port}'; stop it, or change the address)"
            )
        }
        Some(Errno::ADDRNOTAVAIL) => " (not an address of this host: see ip address)".to_owned(),
        Some(Errno::ACCESS | Errno::PERM) if (1..1024).contains(&port) => {
            " (ports below 1024 need root, CAP_NET_BIND_SERVICE or sysctl \
             net.ipv4.ip_unprivileged_port_start)"
                .to_owned()
        }
        _ => String::new(),
    }
}

fn is_without_ipv6(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL))
}

fn open(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    // Accepted sockets inherit it. Logs that come slowly are written line by line.
    socket.set_tcp_nodelay(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}
