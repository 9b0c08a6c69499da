//! What is broken, drawn at random: processes, the ways between them, ZooKeeper, certificates.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::process::Signal;
use tokio::time::sleep;

use crate::journal::{Harm, Parts};
use crate::lab::{GATEWAYS, Lab, SURVIVORS, ZONES};

/// One way to break something.
#[derive(Clone, Copy, Debug)]
enum Fault {
    GatewayKilled,
    GatewayRestarted,
    GatewayStopped,
    ExecutorStopped,
    LinkHeld,
    LinkReset,
    LinkClosed,
    LinkAway,
    ExecutorLinkHeld,
    ExecutorLinkReset,
    ZooKeeperStopped,
    ZooKeeperRestarted,
    SessionExpired,
    RegistryLinkCut,
    CertificatesRenewed,
}

/// Those of one lane come one after the other, beside those of the other lanes.
pub(crate) struct Lane {
    faults: &'static [(Fault, &'static str, Harm)],
    /// The least and the most between two of them, in seconds.
    peace: (f64, f64),
}

pub(crate) const LANES: [Lane; 3] = [
    Lane {
        peace: (0.2, 4.0),
        faults: &[
            (Fault::GatewayKilled, "zone's gateway killed, and started again", Harm::Kill),
            (Fault::GatewayRestarted, "zone's gateway told to stop, and started again", Harm::Cut),
            (Fault::GatewayStopped, "gateway stopped (SIGSTOP)", Harm::Begin),
            (Fault::ExecutorStopped, "executor stopped (SIGSTOP)", Harm::Begin),
            (Fault::LinkHeld, "way to a zone's gateway held", Harm::Begin),
            (Fault::LinkReset, "way to a zone's gateway reset", Harm::Cut),
            (Fault::LinkClosed, "way to a zone's gateway closed by a stranger", Harm::Cut),
            (Fault::LinkAway, "way to a zone's gateway closed, refusing for seconds", Harm::Cut),
            (Fault::ExecutorLinkHeld, "way to an executor held", Harm::Begin),
            (Fault::ExecutorLinkReset, "way to an executor reset", Harm::Cut),
        ],
    },
    // Without ZooKeeper nobody new is served, and the others would have nothing to break.
    Lane {
        peace: (8.0, 30.0),
        faults: &[
            (Fault::ZooKeeperStopped, "ZooKeeper stopped (SIGSTOP)", Harm::Begin),
            (Fault::ZooKeeperRestarted, "ZooKeeper killed, and started again", Harm::Begin),
            (Fault::SessionExpired, "way to ZooKeeper held until the session expired", Harm::Begin),
            (Fault::RegistryLinkCut, "way to ZooKeeper cut", Harm::Begin),
        ],
    },
    Lane {
        peace: (0.5, 8.0),
        faults: &[(
            Fault::CertificatesRenewed,
            "certificates swapped: half (refused), then whole (reloaded)",
            Harm::None,
        )],
    },
];

impl Lane {
    /// Draws one fault after the other until told to stop; the last one is healed then.
    pub(crate) async fn run(
        &self,
        lab: &Lab,
        probes: &[String; 2],
        stop: &AtomicBool,
        mut rng: fastrand::Rng,
    ) {
        while !stop.load(Ordering::Relaxed) {
            let (fault, name, harm) = self.faults[rng.usize(..self.faults.len())];
            let target = fault.target(&mut rng);
            let ongoing = lab.journal.begin(name, fault.parts(target), harm);
            fault.provoke(target, lab, &mut rng).await;
            if harm != Harm::None {
                lab.heals(name, probes).await;
            }
            lab.journal.healed(ongoing);
            let (least, most) = self.peace;
            seconds(&mut rng, least, most).await;
        }
    }
}

/// Waits for a time within these bounds.
async fn seconds(rng: &mut fastrand::Rng, from: f64, to: f64) {
    sleep(Duration::from_secs_f64(from + rng.f64() * (to - from))).await;
}

impl Fault {
    /// The number of the gateway or zone it is about.
    fn target(self, rng: &mut fastrand::Rng) -> usize {
        let zoned = 1..GATEWAYS.len();
        match self {
            Self::GatewayKilled | Self::GatewayRestarted => {
                let mortal: Vec<usize> =
                    zoned.filter(|number| !SURVIVORS.contains(number)).collect();
                mortal[rng.usize(..mortal.len())]
            }
            Self::LinkHeld | Self::LinkReset | Self::LinkClosed | Self::LinkAway => {
                rng.usize(zoned)
            }
            Self::GatewayStopped | Self::SessionExpired | Self::RegistryLinkCut => {
                rng.usize(..GATEWAYS.len())
            }
            Self::CertificatesRenewed => SURVIVORS[rng.usize(..SURVIVORS.len())],
            Self::ExecutorStopped | Self::ExecutorLinkHeld | Self::ExecutorLinkReset => {
                rng.usize(..ZONES.len())
            }
            Self::ZooKeeperStopped | Self::ZooKeeperRestarted => 0,
        }
    }

    fn parts(self, target: usize) -> Parts {
        match self {
            Self::GatewayKilled | Self::GatewayRestarted | Self::GatewayStopped => {
                Parts::gateway(target)
            }
            Self::LinkHeld | Self::LinkReset | Self::LinkClosed | Self::LinkAway => {
                Parts::link(target)
            }
            Self::ExecutorStopped | Self::ExecutorLinkHeld | Self::ExecutorLinkReset => {
                Parts::executor(target)
            }
            Self::SessionExpired | Self::RegistryLinkCut => Parts::registry(target),
            Self::ZooKeeperStopped | Self::ZooKeeperRestarted => Parts::ZOOKEEPER,
            Self::CertificatesRenewed => Parts::default(),
        }
    }

    /// Breaks it, lets a while go by, mends what does not mend itself.
    async fn provoke(self, target: usize, lab: &Lab, rng: &mut fastrand::Rng) {
        match self {
            Self::GatewayKilled | Self::GatewayRestarted => {
                self.end_gateway(target, lab).await;
                seconds(rng, 0.0, 4.0).await;
                lab.start_gateway(target).await;
            }
            Self::GatewayStopped => {
                let gateway = lab.gateway(target).await;
                let gateway = gateway.as_ref().expect("one fault at a time");
                gateway.signal(Signal::STOP);
                // Some outlast the session with ZooKeeper.
                seconds(rng, 0.5, 7.0).await;
                gateway.signal(Signal::CONT);
            }
            Self::ExecutorStopped => {
                lab.executors[target].signal(Signal::STOP);
                seconds(rng, 0.5, 8.0).await;
                lab.executors[target].signal(Signal::CONT);
            }
            Self::LinkHeld => {
                lab.links[target].hold();
                seconds(rng, 0.5, 8.0).await;
                lab.links[target].release();
            }
            Self::LinkReset => lab.links[target].reset(),
            Self::LinkClosed => lab.links[target].cut(),
            Self::LinkAway => {
                lab.links[target].refuse();
                seconds(rng, 0.5, 8.0).await;
                lab.links[target].release();
            }
            Self::ExecutorLinkHeld => {
                lab.executor_links[target].hold();
                seconds(rng, 0.5, 8.0).await;
                lab.executor_links[target].release();
            }
            Self::ExecutorLinkReset => lab.executor_links[target].reset(),
            Self::ZooKeeperStopped => {
                lab.zookeeper.pause().await;
                seconds(rng, 0.5, 8.0).await;
                lab.zookeeper.resume().await;
            }
            Self::ZooKeeperRestarted => {
                lab.zookeeper.kill().await;
                seconds(rng, 0.0, 5.0).await;
                lab.zookeeper.run().await;
            }
            Self::SessionExpired => {
                lab.registry_links[target].hold();
                seconds(rng, 5.0, 8.0).await;
                lab.registry_links[target].release();
            }
            Self::RegistryLinkCut => lab.registry_links[target].cut(),
            Self::CertificatesRenewed => {
                if let Err(error) = lab.renew_certificates(target).await {
                    let name = GATEWAYS[target].0;
                    lab.journal.violation(format!("new certificates for {name}: {error:#}"));
                }
            }
        }
    }

    /// Kills a gateway, or tells it to stop, which has to succeed.
    async fn end_gateway(self, target: usize, lab: &Lab) {
        let mut slot = lab.gateway(target).await;
        let mut gateway = slot.take().expect("one fault at a time");
        if matches!(self, Self::GatewayKilled) {
            gateway.signal(Signal::KILL);
            gateway.exit().await;
        } else {
            gateway.signal(Signal::TERM);
            let status = gateway.exit().await;
            if !status.success() {
                let name = GATEWAYS[target].0;
                lab.journal.violation(format!("{name} was told to stop and ended with {status}"));
            }
        }
    }
}
