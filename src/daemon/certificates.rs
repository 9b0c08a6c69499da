//! The certificates and keys that a configuration names.

use anyhow::{Result, anyhow};
use rustls::pki_types::UnixTime;
use tracing::{error, warn};

use crate::config::Config;
use crate::control::status::{CertificateStatus, IdentityRole};
use crate::telemetry::metrics::{CertificateRole, Metrics};
use crate::telemetry::otlp;
use crate::tls::{CertificatePurpose, Finding, Identity};

/// The certificates of a configuration, loaded and usable.
pub(crate) struct Certificates {
    pub(crate) gateway: Option<Identity>,
    pub(crate) zookeeper: Identity,
}

impl Certificates {
    /// Loads the files that `config` names, and checks each for its use. `own_hostname` is
    /// registered if `config` has no host name.
    ///
    /// # Errors
    /// Every file that cannot be used, and why.
    pub(crate) fn load(config: &Config, own_hostname: impl FnOnce() -> String) -> Result<Self> {
        let now = UnixTime::now();
        let listening = config.listeners.iter().any(|listener| listener.tls.is_some());
        // A server certificate is checked for the name that other gateways connect to.
        let hostname = listening.then(|| config.hostname.clone().unwrap_or_else(own_hostname));
        let purpose = hostname
            .as_deref()
            .map_or(CertificatePurpose::Dialing, |name| CertificatePurpose::Listening(Some(name)));
        let gateway = config.tls.as_ref().map(|files| Identity::load(files, purpose, now));
        let gateway = gateway.transpose();
        let zookeeper = Identity::load(&config.zookeeper.tls, CertificatePurpose::ZooKeeper, now);
        // Only a check: these files are loaded again for each connection to the collector.
        let collector = otlp::check(config.tracing.as_ref());
        match (gateway, zookeeper, collector) {
            (Ok(gateway), Ok(zookeeper), Ok(())) => Ok(Self { gateway, zookeeper }),
            (gateway, zookeeper, collector) => {
                let found = [gateway.err(), zookeeper.err()].into_iter().flatten().flatten();
                let found = Finding::merged(found);
                let mut errors: Vec<_> = found.iter().map(ToString::to_string).collect();
                errors.extend(collector.err().map(|error| format!("{error:#}")));
                Err(anyhow!(errors.join("\n")))
            }
        }
    }

    /// Returns the findings about certificates that can be used. They do not prevent a start,
    /// because plain listeners and executors need no certificates.
    pub(crate) fn findings(&self) -> impl Iterator<Item = Finding> {
        let of_gateway = self.gateway.as_ref().map_or(&[][..], Identity::findings);
        let all = of_gateway.iter().chain(self.zookeeper.findings()).cloned();
        // Both certificates may be in the same files.
        Finding::merged(all).into_iter()
    }

    /// Returns why peers will refuse certificates that differ from those of `running`. A
    /// certificate that is already in use gets no better by refusing a reload.
    pub(super) fn newly_broken(&self, running: &Self) -> Vec<String> {
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

    /// Logs the findings, errors at level error.
    pub(super) fn log_findings(&self) {
        for finding in self.findings() {
            if finding.is_error() {
                error!("{}", finding.message());
            } else {
                warn!("{}", finding.message());
            }
        }
    }

    /// Returns what `status` shows of the certificates, whose files `config` names.
    pub(super) fn status(&self, config: &Config) -> Vec<CertificateStatus> {
        let gateway = config.tls.as_ref().zip(self.gateway.as_ref());
        let gateway = gateway.map(|(files, identity)| (IdentityRole::Gateway, files, identity));
        let zookeeper = (IdentityRole::ZooKeeper, &config.zookeeper.tls, &self.zookeeper);
        let all = gateway.into_iter().chain([zookeeper]);
        all.map(|(role, files, identity)| CertificateStatus {
            role,
            file: files.cert.display().to_string(),
            subject: identity.subject(),
            not_after: identity.valid_until(),
        })
        .collect()
    }

    /// Exports when the certificates and their CAs expire.
    pub(super) fn export_expiry(&self, metrics: &Metrics) {
        let of_gateway = self.gateway.as_ref().and_then(Identity::not_after);
        metrics.certificate(CertificateRole::Gateway, of_gateway);
        metrics.certificate(CertificateRole::ZooKeeper, self.zookeeper.not_after());
        let of_gateway = self.gateway.as_ref().and_then(Identity::authority_not_after);
        metrics.certificate(CertificateRole::GatewayCa, of_gateway);
        metrics.certificate(CertificateRole::ZooKeeperCa, self.zookeeper.authority_not_after());
    }
}
