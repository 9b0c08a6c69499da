//! The certificates and keys of a configuration.

use anyhow::{Result, anyhow};
use rustls::pki_types::UnixTime;
use tracing::{error, warn};

use crate::config::Config;
use crate::control::status::CertificateStatus;
use crate::telemetry::metrics::{CertificateRole, Metrics};
use crate::telemetry::otlp;
use crate::tls::{CertificatePurpose, Finding, Identity};

/// All of them, read and found usable.
pub(crate) struct Certificates {
    pub(crate) gateway: Option<Identity>,
    pub(crate) zookeeper: Identity,
}

impl Certificates {
    /// Reads the files that `config` names and tries each for what it is to do. The name that is
    /// registered is `own_hostname` if `config` names none.
    ///
    /// # Errors
    /// Every file that cannot be used, with its fault.
    pub(crate) fn load(config: &Config, own_hostname: impl FnOnce() -> String) -> Result<Self> {
        let now = UnixTime::now();
        let listening = config.listeners.iter().any(|listener| listener.tls.is_some());
        // The name that will be registered.
        let hostname = listening.then(|| config.hostname.clone().unwrap_or_else(own_hostname));
        let purpose = hostname
            .as_deref()
            .map_or(CertificatePurpose::Dialing, |name| CertificatePurpose::Listening(Some(name)));
        let gateway = config.tls.as_ref().map(|files| Identity::load(files, purpose, now));
        let gateway = gateway.transpose();
        let zookeeper = Identity::load(&config.zookeeper.tls, CertificatePurpose::ZooKeeper, now);
        // Read again whenever the collector is dialed.
        let collector = otlp::check(config.tracing.as_ref());
        match (gateway, zookeeper, collector) {
            (Ok(gateway), Ok(zookeeper), Ok(())) => Ok(Self { gateway, zookeeper }),
            (gateway, zookeeper, collector) => {
                let found = [gateway.err(), zookeeper.err()].into_iter().flatten().flatten();
                let found = Finding::merged(found);
                let mut faults: Vec<_> = found.iter().map(ToString::to_string).collect();
                faults.extend(collector.err().map(|error| format!("{error:#}")));
                Err(anyhow!(faults.join("\n")))
            }
        }
    }

    /// What is amiss with certificates that can be used. No reason not to start, as plain listeners
    /// and executors know nothing of them; but one to act.
    pub(crate) fn findings(&self) -> impl Iterator<Item = Finding> {
        let of_gateway = self.gateway.as_ref().map_or(&[][..], Identity::findings);
        let all = of_gateway.iter().chain(self.zookeeper.findings()).cloned();
        // Both may be from the same files.
        Finding::merged(all).into_iter()
    }

    /// Why peers will refuse certificates here that `running` does not show already. Those it does
    /// get no better by being kept.
    pub(crate) fn newly_broken(&self, running: &Self) -> Vec<String> {
        let pairs = [
            (self.gateway.as_ref(), running.gateway.as_ref()),
            (Some(&self.zookeeper), Some(&running.zookeeper)),
        ];
        let mut errors = Vec::new();
        for (new, running) in pairs {
            let Some(new) = new else { continue };
            if !running.is_some_and(|running| running.same_chain(new)) {
                let found = new.findings().iter().filter(|finding| finding.is_error());
                errors.extend(found.cloned());
            }
        }
        Finding::merged(errors).iter().map(Finding::message).collect()
    }

    /// Logs what is amiss.
    pub(crate) fn log_findings(&self) {
        for finding in self.findings() {
            if finding.is_error() {
                error!("{}", finding.message());
            } else {
                warn!("{}", finding.message());
            }
        }
    }

    /// Our certificates, as `status` shows them; `config` names their files.
    pub(crate) fn certificates(&self, config: &Config) -> Vec<CertificateStatus> {
        let gateway = config.tls.as_ref().zip(self.gateway.as_ref());
        let gateway = gateway.map(|(files, identity)| ("gateway", files, identity));
        let zookeeper = ("zookeeper", &config.zookeeper.tls, &self.zookeeper);
        let all = gateway.into_iter().chain([zookeeper]);
        all.map(|(role, files, identity)| CertificateStatus {
            role,
            file: files.cert.display().to_string(),
            subject: identity.subject(),
            not_after: identity.valid_until(),
        })
        .collect()
    }

    /// Tells until when the certificates are good.
    pub(crate) fn export_expiry(&self, metrics: &Metrics) {
        let of_gateway = self.gateway.as_ref().and_then(Identity::not_after);
        metrics.certificate(CertificateRole::Gateway, of_gateway);
        metrics.certificate(CertificateRole::ZooKeeper, self.zookeeper.not_after());
        let of_gateway = self.gateway.as_ref().and_then(Identity::authority_not_after);
        metrics.certificate(CertificateRole::GatewayCa, of_gateway);
        metrics.certificate(CertificateRole::ZooKeeperCa, self.zookeeper.authority_not_after());
    }
}
