//! How things stand, for people and for programs.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::watch;
use tracing::info;

use super::signals::StatusSignal;
use crate::gateway::streams::Streams;
use crate::registry::Standing;
use crate::registry::component::State;

/// Where to look for what changes, and what does not.
pub(crate) struct Sources {
    pub(crate) hostname: String,
    pub(crate) zone: Option<String>,
    pub(crate) listeners: Vec<Door>,
    pub(crate) state: watch::Receiver<State>,
    pub(crate) standing: watch::Receiver<Standing>,
    pub(crate) streams: Streams,
}

/// A listener as it is bound.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Door {
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
    listeners: Vec<Door>,
    zookeeper: String,
    streams: Vec<StreamStatus>,
}

#[derive(Serialize)]
struct StreamStatus {
    seconds: f64,
    peer: SocketAddr,
    build: String,
    route: String,
    bytes: u64,
}

impl Sources {
    /// How things stand now.
    pub(crate) fn now(&self) -> Status {
        let streams = self.streams.list();
        let streams = streams.iter().map(|stream| StreamStatus {
            seconds: in_milliseconds(stream.began.elapsed()),
            peer: stream.peer,
            build: stream.build.to_string(),
            route: stream.route.clone(),
            bytes: stream.bytes(),
        });
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
            listeners: self.listeners.clone(),
            zookeeper: self.standing.borrow().to_string(),
            streams: streams.collect(),
        }
    }
}

/// Logs how things stand whenever `signal` comes.
pub(crate) async fn tell(mut signal: StatusSignal, sources: Arc<Sources>) {
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
        let Self { version, pid, state, hostname, zookeeper, streams, .. } = self;
        let listening = listening(self.zone.as_deref(), &self.listeners);
        let count = match streams.len() {
            0 => "no streams".to_owned(),
            1 => "1 stream:".to_owned(),
            more => format!("{more} streams:"),
        };
        let mut text = format!(
            "zuul-fingergw {version} on {hostname}, pid {pid}: {state}\n\
             {listening}\nZooKeeper: {zookeeper}\n{count}\n"
        );
        for StreamStatus { seconds, peer, build, route, bytes } in streams {
            let _ =
                writeln!(text, "  {seconds:.0} s, {bytes} bytes of {build} from {route} to {peer}");
        }
        text
    }
}

/// `zone west; plain [::]:79, TLS [::]:7979`
pub(crate) fn listening(zone: Option<&str>, doors: &[Door]) -> String {
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

    fn status(streams: u64) -> Status {
        let address = SocketAddr::from(([127, 0, 0, 1], 79));
        let stream = |bytes| StreamStatus {
            seconds: in_milliseconds(Duration::from_micros(1_234_567)),
            peer: address,
            build: "ab".to_owned(),
            route: "executor ze01:7900".to_owned(),
            bytes,
        };
        Status {
            version: "1.0.0",
            pid: 7,
            state: "running",
            hostname: "gw".to_owned(),
            zone: Some("we\"st".to_owned()),
            listeners: vec![Door { address, tls: true, advertised: true }],
            zookeeper: "connecting".to_owned(),
            streams: (0..streams).map(stream).collect(),
        }
    }

    #[test]
    fn for_people() {
        let head = "zuul-fingergw 1.0.0 on gw, pid 7: running\n\
                    zone we\"st; TLS 127.0.0.1:79\nZooKeeper: connecting\n";
        let stream = |bytes: u64| {
            format!("  1 s, {bytes} bytes of ab from executor ze01:7900 to 127.0.0.1:79\n")
        };
        assert_eq!(status(0).text(), format!("{head}no streams\n"));
        assert_eq!(status(1).text(), format!("{head}1 stream:\n{}", stream(0)));
        assert_eq!(status(2).text(), format!("{head}2 streams:\n{}{}", stream(0), stream(1)));
    }

    #[test]
    fn for_programs() {
        assert_eq!(
            status(1).json(),
            "{\"version\":\"1.0.0\",\"pid\":7,\"state\":\"running\",\"hostname\":\"gw\",\
             \"zone\":\"we\\\"st\",\"listeners\":[{\"address\":\"127.0.0.1:79\",\"tls\":true,\
             \"advertised\":true}],\"zookeeper\":\"connecting\",\"streams\":[{\"seconds\":1.235,\
             \"peer\":\"127.0.0.1:79\",\"build\":\"ab\",\"route\":\"executor ze01:7900\",\
             \"bytes\":0}]}\n"
        );
    }
}
