//! A real haproxy, as a TCP proxy or as a router that passes TLS through by server name.

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

/// A running haproxy with one listener; ends with the test.
pub(crate) struct Haproxy {
    pub(crate) address: SocketAddr,
    _child: Child,
    _reservation: Socket,
    _directory: TempDir,
}

impl Haproxy {
    /// Starts haproxy at a reserved address. `config` gets that address and a directory.
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
        // haproxy does not report when it listens. This connection closes without a request.
        within("haproxy to listen", async {
            while TcpStream::connect(address).await.is_err() {
                tokio::task::yield_now().await;
            }
        })
        .await;
        haproxy
    }

    /// Starts haproxy as OpenShift's router does for passthrough Routes: it forwards connections
    /// for one of the names in `routes`, and terminates TLS for other or missing names with the
    /// certificate `own`. Timeouts are OpenShift's, except `tunnel`. Its health checks run more
    /// often than OpenShift's every 5 s. They reset the connection during its setup; those of the
    /// last route connect and close, as a kubelet's do.
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

/// Reserves an address: two sockets that both set SO_REUSEADDR may share one as long as only one of
/// them listens (socket(7)), so no other process gets it.
pub(crate) fn reserve() -> (SocketAddr, Socket) {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    socket.set_reuse_address(true).expect("SO_REUSEADDR");
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).expect("a port");
    let address = socket.local_addr().expect("its address").as_socket();
    (address.expect("an IP address"), socket)
}
