//! A real haproxy, alone or as a router that passes TLS through by the name in it.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Stdio;

use socket2::{Domain, Socket, Type};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

use super::certificates::Identity;
use super::within;

/// One haproxy with a listener; dies with the test.
pub(crate) struct Haproxy {
    pub(crate) address: SocketAddr,
    _child: Child,
    _reservation: Socket,
    _directory: TempDir,
}

impl Haproxy {
    /// At a reserved address, with the configuration that is told that and a directory.
    pub(crate) async fn start(
        (address, reservation): (SocketAddr, Socket),
        config: impl FnOnce(SocketAddr, &Path) -> String,
    ) -> Self {
        let directory = TempDir::new().expect("a directory for haproxy");
        let path = directory.path().join("haproxy.cfg");
        std::fs::write(&path, config(address, directory.path())).expect("haproxy.cfg");
        let child = Command::new("haproxy")
            .args(["-db", "-f"])
            .arg(&path)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("haproxy (tests/run installs it)");
        let haproxy =
            Self { address, _child: child, _reservation: reservation, _directory: directory };
        // It tells nobody when it listens. What connects here leaves without a request.
        within("haproxy to listen", async {
            while TcpStream::connect(address).await.is_err() {
                tokio::task::yield_now().await;
            }
        })
        .await;
        haproxy
    }

    /// As OpenShift's router has it for passthrough Routes: who asks for one of the names in `routes`
    /// is led there, whoever asks for another or for none meets the router's own TLS, with the
    /// certificate `own`. The router's times are OpenShift's, but for `tunnel`; its health checks, once
    /// every 5 s there, are quick. They reset a connection before it is one; the last route's are such
    /// that connect and close, as a kubelet's.
    pub(crate) async fn router(
        place: (SocketAddr, Socket),
        routes: &[(&str, SocketAddr)],
        own: &Identity,
        tunnel: &str,
    ) -> Self {
        Self::start(place, |address, directory| {
            let inner = directory.join("inner");
            let (inner, own) = (inner.display(), own.both.display());
            let mut config = format!(
                "defaults\n mode tcp\n timeout connect 5s\n timeout client 30s\n \
                 timeout client-fin 1s\n timeout server 30s\n timeout server-fin 1s\n \
                 timeout tunnel {tunnel}\n\
                 frontend public\n bind {address}\n tcp-request inspect-delay 5s\n \
                 tcp-request content accept if {{ req.ssl_hello_type 1 }}\n \
                 default_backend inner\n"
            );
            for (name, _) in routes {
                let _ = writeln!(config, " use_backend {name} if {{ req.ssl_sni,lower {name} }}");
            }
            for (index, (name, pod)) in routes.iter().enumerate() {
                let connect = index + 1 == routes.len();
                let check =
                    if connect { " option tcp-check\n tcp-check connect linger\n" } else { "" };
                let _ = writeln!(
                    config,
                    "backend {name}\n balance leastconn\n{check} server pod {pod} check inter 20ms"
                );
            }
            let _ = write!(
                config,
                "backend inner\n server inner unix@{inner}\n\
                 frontend terminating\n mode http\n timeout http-request 10s\n \
                 bind unix@{inner} ssl crt {own}\n http-request return status 503\n"
            );
            config
        })
        .await
    }
}

/// An address that nobody else is given: sockets that both allow it may share one as long as only
/// one of them listens (socket(7), SO_REUSEADDR).
pub(crate) fn reserve() -> (SocketAddr, Socket) {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    socket.set_reuse_address(true).expect("SO_REUSEADDR");
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).expect("a port");
    let address = socket.local_addr().expect("its address").as_socket();
    (address.expect("an IP address"), socket)
}
