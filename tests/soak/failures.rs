//! Random failures: of processes, links, ZooKeeper and certificates.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::process::Signal;
use tokio::time::sleep;

use crate::journal::{Harm, Parts};
use crate::lab::{GATEWAYS, Lab, SURVIVORS, ZONES};

/// A kind of failure.
#[derive(Clone, Copy, Debug)]
enum Failure {
    GatewayKilled,
    GatewayRestarted,
    GatewayStopped,
    ExecutorStopped,
    LinkHeld,
    LinkReset,
    LinkClosed,
    LinkRefused,
    ExecutorLinkHeld,
    ExecutorLinkReset,
    ZooKeeperStopped,
    ZooKeeperRestarted,
    SessionExpired,
    RegistryLinkCut,
    CertificatesRenewed,
}

/// Failures that happen one at a time. Lanes run concurrently.
pub(crate) struct Lane {
    failures: &'static [(Failure, &'static str, Harm)],
    /// The shortest and the longest pause between two failures, in seconds.
    pause: (f64, f64),
}

pub(crate) const LANES: [Lane; 3] = [
    Lane {
        pause: (0.2, 4.0),
        failures: &[
            (Failure::GatewayKilled, "zone's gateway killed, and started again", Harm::Kill),
            (
                Failure::GatewayRestarted,
                "zone's gateway stopped in order, and started again",
                Harm::Cut,
            ),
            (Failure::GatewayStopped, "gateway stopped (SIGSTOP)", Harm::Begin),
            (Failure::ExecutorStopped, "executor stopped (SIGSTOP)", Harm::Begin),
            (Failure::LinkHeld, "link to a zone's gateway held", Harm::Begin),
            (Failure::LinkReset, "link to a zone's gateway reset", Harm::Cut),
            (Failure::LinkClosed, "link to a zone's gateway closed by another process", Harm::Cut),
            (
                Failure::LinkRefused,
                "link to a zone's gateway closed, refusing for seconds",
                Harm::Cut,
            ),
            (Failure::ExecutorLinkHeld, "link to an executor held", Harm::Begin),
            (Failure::ExecutorLinkReset, "link to an executor reset", Harm::Cut),
        ],
    },
    // Without ZooKeeper no new client is served, so these failures are rarer.
    Lane {
        pause: (8.0, 30.0),
        failures: &[
            (Failure::ZooKeeperStopped, "ZooKeeper stopped (SIGSTOP)", Harm::Begin),
            (Failure::ZooKeeperRestarted, "ZooKeeper killed, and started again", Harm::Begin),
            (
                Failure::SessionExpired,
                "link to ZooKeeper held until the session expired",
                Harm::Begin,
            ),
            (Failure::RegistryLinkCut, "link to ZooKeeper cut", Harm::Begin),
        ],
    },
    Lane {
        pause: (0.5, 8.0),
        failures: &[(
            Failure::CertificatesRenewed,
            "certificates replaced: half (refused), then completely (reloaded)",
            Harm::None,
        )],
    },
];

impl Lane {
    /// Causes random failures until `stop` is set, and waits for the recovery from each.
    pub(crate) async fn run(
        &self,
        lab: &Lab,
        probes: &[String; 2],
        stop: &AtomicBool,
        mut rng: fastrand::Rng,
    ) {
        while !stop.load(Ordering::Relaxed) {
            let (failure, name, harm) = self.failures[rng.usize(..self.failures.len())];
            let target = failure.target(&mut rng);
            let ongoing = lab.journal.begin(name, failure.parts(target), harm);
            failure.cause(target, lab, &mut rng).await;
            if harm != Harm::None {
                lab.wait_recovered(name, probes).await;
            }
            lab.journal.recovered(ongoing);
            let (least, most) = self.pause;
            seconds(&mut rng, least, most).await;
        }
    }
}

/// Waits for a time within these bounds.
async fn seconds(rng: &mut fastrand::Rng, from: f64, to: f64) {
    sleep(Duration::from_secs_f64(from + rng.f64() * (to - from))).await;
}

impl Failure {
    /// A random gateway or zone for this failure.
    fn target(self, rng: &mut fastrand::Rng) -> usize {
        let zoned = 1..GATEWAYS.len();
        match self {
            Self::GatewayKilled | Self::GatewayRestarted => {
                let others: Vec<usize> =
                    zoned.filter(|number| !SURVIVORS.contains(number)).collect();
                others[rng.usize(..others.len())]
            }
            Self::LinkHeld | Self::LinkReset | Self::LinkClosed | Self::LinkRefused => {
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
            Self::LinkHeld | Self::LinkReset | Self::LinkClosed | Self::LinkRefused => {
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

    /// Causes the failure, waits, and ends it.
    async fn cause(self, target: usize, lab: &Lab, rng: &mut fastrand::Rng) {
        match self {
            Self::GatewayKilled | Self::GatewayRestarted => {
                self.end_gateway(target, lab).await;
                seconds(rng, 0.0, 4.0).await;
                lab.start_gateway(target).await;
            }
            Self::GatewayStopped => {
                let gateway = lab.gateway(target).await;
                let gateway = gateway.as_ref().expect("one failure at a time");
                gateway.signal(Signal::STOP);
                // Some last longer than the session with ZooKeeper.
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
            Self::LinkRefused => {
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

    /// Kills a gateway, or stops it with SIGTERM, which must succeed.
    async fn end_gateway(self, target: usize, lab: &Lab) {
        let mut slot = lab.gateway(target).await;
        let mut gateway = slot.take().expect("one failure at a time");
        if matches!(self, Self::GatewayKilled) {
            gateway.signal(Signal::KILL);
            gateway.exit().await;
        } else {
            gateway.signal(Signal::TERM);
            let status = gateway.exit().await;
            if !status.success() {
                let name = GATEWAYS[target].0;
                lab.journal.violation(format!("{name} ended with {status} after SIGTERM"));
            }
        }
    }
}
