//! Warnings about what is valid and most likely a mistake.

use super::{ClientCertificate, Config, display_address, parse};

impl Config {
    /// All warnings about this configuration.
    pub(crate) fn warnings(&self) -> Vec<String> {
        let mut warnings = self.file_warnings.clone();
        warnings.extend(self.advertised_without_tls());
        warnings.extend(self.overlapping_addresses());
        warnings.extend(self.open_listeners());
        warnings.extend(self.tracing_without_effect());
        warnings
    }

    fn advertised_without_tls(&self) -> Option<String> {
        let (zone, _) = self.zone.as_ref().zip(self.tls.as_ref())?;
        let plain = self.listeners.iter().find(|l| l.advertised && l.tls.is_none())?;
        Some(format!(
            "the listener on {}, from which other gateways request the logs of zone {}, is without TLS \
             although there are certificates for it: logs cross the network in clear text (set tls = true, \
             or tls_client_only = false in a zuul.conf)",
            plain.address(),
            zone.escape_default(),
        ))
    }

    /// Returns a warning for each pair of addresses of which one includes the other.
    fn overlapping_addresses(&self) -> Vec<String> {
        let listeners = self.listeners.iter().map(|l| (l.host.as_str(), l.port));
        let admin = self.admin.iter().map(|(host, port)| (host.as_str(), *port));
        let addresses: Vec<_> = listeners.chain(admin).collect();
        let mut warnings = Vec::new();
        for (index, one) in addresses.iter().enumerate() {
            for other in addresses[index + 1..].iter().filter(|other| parse::overlap(*one, **other))
            {
                let [one, other] = [one, other].map(|(host, port)| display_address(host, *port));
                warnings.push(format!(
                    "the addresses {one} and {other} overlap: unless the service manager passes sockets \
                     for both, only one of them can be bound ([::] includes IPv4; use another port)"
                ));
            }
        }
        warnings
    }

    fn open_listeners(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        let ruled = self.listeners.iter().find(|listener| !listener.allow.is_empty());
        for listener in &self.listeners {
            let address = listener.address();
            // A required certificate is from our own CA, as those of other zones' gateways are.
            let anyone = listener.tls != Some(ClientCertificate::Required);
            if let Some(ruled) = ruled.filter(|_| anyone && listener.allow.is_empty()) {
                warnings.push(format!(
                    "the listener on {} has rules and the one on {address} has none: every client of \
                     that one can read every log (give it listener.allow tables as well)",
                    ruled.address(),
                ));
            }
            if listener.proxy_protocol.iter().any(|network| network.prefix_len() == 0) {
                warnings.push(format!(
                    "the listener on {address} trusts PROXY headers from every address: any client can \
                     claim another address (list only your proxies in listener.proxy_protocol)"
                ));
            }
        }
        warnings
    }

    fn tracing_without_effect(&self) -> Option<String> {
        let tracing = self.tracing.as_ref()?;
        // In a zuul.conf the section is shared with Zuul's other services, so this is not an error.
        if !cfg!(feature = "otlp") {
            return Some(
                "[tracing] is enabled, but this program was built without it and exports nothing (build \
                 it with cargo build --features otlp)"
                    .to_owned(),
            );
        }
        tracing.tls_files_unused().then(|| {
            format!(
                "[tracing] names TLS files, but {} is used without TLS, as by Zuul's services (use \
                 https:// in endpoint)",
                tracing.endpoint
            )
        })
    }
}
