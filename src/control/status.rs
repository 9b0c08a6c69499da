//! How things stand, for people and for programs.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::sync::watch;
use tracing::info;

use crate::gateway::Usage;
use crate::gateway::health::Memory;
use crate::gateway::routing::explain::Hop;
use crate::gateway::session::stream_table::Streams;
use crate::gateway::upstream::{HopAddress, Upstream};
use crate::model::component::State;
use crate::os::signals::StatusSignal;
use crate::registry::{Registry, Standing};

/// Where to look for what changes, and what does not.
pub(crate) struct StatusSource {
    pub(crate) hostname: String,
    pub(crate) zone: Option<String>,
    /// The file that the gateway was started with.
    pub(crate) configuration: PathBuf,
    pub(crate) started: Instant,
    pub(crate) listeners: Vec<BoundListener>,
    /// Where health and metrics are.
    pub(crate) admin: Option<SocketAddr>,
    /// ZooKeeper's servers, as they are configured.
    pub(crate) zookeeper: String,
    pub(crate) state: watch::Receiver<State>,
    pub(crate) standing: watch::Receiver<Standing>,
    pub(crate) registry: Registry,
    pub(crate) memory: Arc<Memory>,
    pub(crate) certificates: watch::Receiver<Vec<CertificateStatus>>,
    pub(crate) usage: Usage,
    pub(crate) streams: Streams,
}

/// A listener as it is bound.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct BoundListener {
    pub(crate) address: SocketAddr,
    pub(crate) tls: bool,
    /// The one that the registry entry describes.
    pub(crate) advertised: bool,
}

/// How things stand at one moment. Its JSON is what programs read: keys are added, never changed.
#[derive(Serialize)]
pub(crate) struct Status {
    version: &'static str,
    pid: u32,
    state: &'static str,
    hostname: String,
    zone: Option<String>,
    configuration: String,
    uptime_seconds: f64,
    listeners: Vec<BoundListener>,
    admin: Option<SocketAddr>,
    zookeeper: ZooKeeperStatus,
    certificates: Vec<CertificateStatus>,
    connections: ConnectionsStatus,
    /// The gateways of other zones, and how each stands.
    gateways: Vec<Hop>,
    streams: Vec<StreamStatus>,
}

/// The session with ZooKeeper and our entry there.
#[derive(Serialize)]
struct ZooKeeperStatus {
    hosts: String,
    connected: bool,
    /// The name of our entry, while it is known to be there.
    entry: Option<String>,
    /// How long there has been no session, and why, once an attempt has failed.
    disconnected_seconds: Option<f64>,
    trouble: Option<String>,
    /// For people.
    #[serde(skip)]
    standing: String,
}

/// A certificate of ours.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct CertificateStatus {
    /// `gateway`, or `zookeeper` for the one that ZooKeeper is shown.
    pub(crate) role: &'static str,
    pub(crate) file: String,
    pub(crate) subject: Option<String>,
    /// When it ends, in RFC 3339.
    pub(crate) not_after: Option<String>,
}

#[derive(Serialize)]
struct ConnectionsStatus {
    open: usize,
    limit: usize,
}

#[derive(Serialize)]
struct StreamStatus {
    seconds: f64,
    peer: SocketAddr,
    build: String,
    hop: HopAddress,
    bytes: u64,
    /// The hop for people.
    #[serde(skip)]
    route: String,
}

impl StatusSource {
    /// How things stand now.
    pub(crate) fn now(&self) -> Status {
        let streams = self.streams.list();
        let streams = streams.iter().map(|stream| StreamStatus {
            seconds: in_milliseconds(stream.began.elapsed()),
            peer: stream.peer,
            build: stream.build.to_string(),
            hop: HopAddress::from(&stream.hop),
            bytes: stream.bytes(),
            route: stream.hop.to_string(),
        });
        let gateways = self.registry.gateways();
        let elsewhere = gateways.iter().filter(|gateway| gateway.zone != self.zone).cloned();
        let gateways = elsewhere.map(|gateway| Hop::of(&Upstream::Gateway(gateway), &self.memory));
        let (open, limit) = self.usage.connections();
        Status {
            version: env!("CARGO_PKG_VERSION"),
            pid: std::process::id(),
            state: match *self.state.borrow() {
                // The entry is out and `stopped`; the process is not yet.
                State::Stopped => "stopping",
                state => state.as_str(),
            },
            hostname: self.hostname.clone(),
            zone: self.zone.clone(),
            configuration: self.configuration.display().to_string(),
            uptime_seconds: in_milliseconds(self.started.elapsed()),
            listeners: self.listeners.clone(),
            admin: self.admin,
            zookeeper: self.zookeeper(),
            certificates: self.certificates.borrow().clone(),
            connections: ConnectionsStatus { open, limit },
            gateways: gateways.collect(),
            streams: streams.collect(),
        }
    }

    fn zookeeper(&self) -> ZooKeeperStatus {
        let (standing, trouble) = (self.standing.borrow().clone(), self.registry.trouble());
        let is_away = matches!(
            standing,
            Standing::Connecting | Standing::ConnectionLost | Standing::SessionLost
        );
        let disconnected = trouble.as_ref().map(|trouble| trouble.since.elapsed());
        ZooKeeperStatus {
            hosts: self.zookeeper.clone(),
            connected: trouble.is_none() && !is_away,
            standing: standing.to_string(),
            entry: match standing {
                Standing::Registered(name) => Some(name),
                _ => None,
            },
            disconnected_seconds: disconnected.map(in_milliseconds),
            trouble: trouble.map(|trouble| trouble.cause),
        }
    }
}

/// Logs how things stand whenever `signal` comes.
pub(crate) async fn tell(mut signal: StatusSignal, sources: Arc<StatusSource>) {
    while signal.next().await.is_some() {
        for line in sources.now().text().lines() {
            info!("{line}");
        }
    }
}

/// Seconds, without the digits that mean nothing.
fn in_milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1000.0).round() / 1000.0
}

impl Status {
    /// For programs: one line of JSON.
    pub(crate) fn json(&self) -> String {
        // Numbers, strings and lists: nothing in it can fail.
        serde_json::to_string(self).unwrap_or_default() + "\n"
    }

    /// For people.
    pub(crate) fn text(&self) -> String {
        let Self { version, pid, state, hostname, zookeeper, gateways, streams, .. } = self;
        let listening = listening(self.zone.as_deref(), &self.listeners);
        let mut text = format!(
            "zuul-fingergw {version} on {hostname}, pid {pid}: {state}\n{listening}\nZooKeeper: {}\n",
            zookeeper.text()
        );
        let uptime = Duration::from_secs(self.uptime_seconds as u64);
        let ConnectionsStatus { open, limit } = self.connections;
        let _ = writeln!(text, "up for {uptime:?} with {}", self.configuration);
        let _ = writeln!(text, "connections: {open} of at most {limit}");
        for CertificateStatus { role, file, not_after, .. } in &self.certificates {
            let until = not_after.as_deref().unwrap_or("?");
            let _ = writeln!(text, "certificate ({role}): {file}, valid until {until}");
        }
        if gateways.is_empty() {
            text.push_str("no gateway of another zone is registered\n");
        } else {
            text.push_str("gateways of other zones:\n");
        }
        for hop in gateways {
            let _ = writeln!(text, "  {}", hop.text());
        }
        let count = match streams.len() {
            0 => "no streams".to_owned(),
            1 => "1 stream:".to_owned(),
            more => format!("{more} streams:"),
        };
        let _ = writeln!(text, "{count}");
        for StreamStatus { seconds, peer, build, route, bytes, .. } in streams {
            let _ =
                writeln!(text, "  {seconds:.0} s, {bytes} bytes of {build} from {route} to {peer}");
        }
        text
    }
}

impl ZooKeeperStatus {
    fn text(&self) -> String {
        match (&self.trouble, self.disconnected_seconds) {
            (Some(trouble), Some(seconds)) => {
                format!("not connected for {seconds:.0} s: {trouble}")
            }
            _ => self.standing.clone(),
        }
    }
}

/// `zone west; plain [::]:79, TLS [::]:7979`
pub(crate) fn listening(zone: Option<&str>, doors: &[BoundListener]) -> String {
    let zone = zone.map_or("no zone".to_owned(), |zone| format!("zone {zone}"));
    let doors: Vec<_> = doors
        .iter()
        .map(|door| format!("{} {}", if door.tls { "TLS" } else { "plain" }, door.address))
        .collect();
    format!("{zone}; {}", doors.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::build_request::Executor;

    fn status(streams: u64) -> Status {
        let address = SocketAddr::from(([127, 0, 0, 1], 79));
        let executor = Executor { hostname: "ze01".to_owned(), port: 7900, zone: None };
        let hop = Upstream::Executor(executor);
        let stream = |bytes| StreamStatus {
            seconds: in_milliseconds(Duration::from_micros(1_234_567)),
            peer: address,
            build: "ab".to_owned(),
            hop: HopAddress::from(&hop),
            bytes,
            route: hop.to_string(),
        };
        Status {
            version: "1.0.0",
            pid: 7,
            state: "running",
            hostname: "gw".to_owned(),
            zone: Some("we\"st".to_owned()),
            configuration: "/gw.toml".to_owned(),
            uptime_seconds: 3.5,
            listeners: vec![BoundListener { address, tls: true, advertised: true }],
            admin: None,
            zookeeper: ZooKeeperStatus {
                hosts: "zk:2281".to_owned(),
                connected: false,
                entry: None,
                disconnected_seconds: None,
                trouble: None,
                standing: "connecting".to_owned(),
            },
            certificates: vec![CertificateStatus {
                role: "gateway",
                file: "/c".to_owned(),
                subject: Some("CN=gw".to_owned()),
                not_after: Some("2027-01-01T00:00:00Z".to_owned()),
            }],
            connections: ConnectionsStatus { open: 2, limit: 10 },
            gateways: Vec::new(),
            streams: (0..streams).map(stream).collect(),
        }
    }

    #[test]
    fn for_people() {
        let head = "zuul-fingergw 1.0.0 on gw, pid 7: running\n\
                    zone we\"st; TLS 127.0.0.1:79\nZooKeeper: connecting\n\
                    up for 3s with /gw.toml\nconnections: 2 of at most 10\n\
                    certificate (gateway): /c, valid until 2027-01-01T00:00:00Z\n\
                    no gateway of another zone is registered\n";
        let stream = |bytes: u64| {
            format!("  1 s, {bytes} bytes of ab from executor ze01:7900 to 127.0.0.1:79\n")
        };
        assert_eq!(status(0).text(), format!("{head}no streams\n"));
        assert_eq!(status(1).text(), format!("{head}1 stream:\n{}", stream(0)));
        assert_eq!(status(2).text(), format!("{head}2 streams:\n{}{}", stream(0), stream(1)));
    }

    #[test]
    fn the_cause_is_shown_where_zookeeper_is_not_connected() {
        let mut status = status(0);
        status.zookeeper.disconnected_seconds = Some(40.2);
        status.zookeeper.trouble = Some("zk:2281: refused".to_owned());
        let text = status.text();
        assert!(text.contains("\nZooKeeper: not connected for 40 s: zk:2281: refused\n"), "{text}");
    }

    #[test]
    fn for_programs() {
        assert_eq!(
            status(1).json(),
            "{\"version\":\"1.0.0\",\"pid\":7,\"state\":\"running\",\"hostname\":\"gw\",\
             \"zone\":\"we\\\"st\",\"configuration\":\"/gw.toml\",\"uptime_seconds\":3.5,\
             \"listeners\":[{\"address\":\"127.0.0.1:79\",\"tls\":true,\"advertised\":true}],\
             \"admin\":null,\"zookeeper\":{\"hosts\":\"zk:2281\",\"connected\":false,\"entry\":null,\
             \"disconnected_seconds\":null,\"trouble\":null},\"certificates\":[{\"role\":\"gateway\",\
             \"file\":\"/c\",\"subject\":\"CN=gw\",\"not_after\":\"2027-01-01T00:00:00Z\"}],\
             \"connections\":{\"open\":2,\"limit\":10},\"gateways\":[],\"streams\":[{\
             \"seconds\":1.235,\"peer\":\"127.0.0.1:79\",\"build\":\"ab\",\"hop\":{\
             \"kind\":\"executor\",\"host\":\"ze01\",\"port\":7900,\"zone\":null,\"tls\":false},\
             \"bytes\":0}]}\n"
        );
    }
}
