//! Where spans are exported to: Zuul's options of the section `[tracing]` (`zuul/lib/tracing.py`
//! and the exporters of the Python SDK that get them), the same in both kinds of file.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper::Uri;

use super::display_address;
use super::parse::{self, Parsed};

/// An OpenTelemetry collector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tracing {
    pub(crate) protocol: Protocol,
    /// A URL with scheme, port and path; gRPC has paths of its own.
    pub(crate) endpoint: String,
    /// The name of the service that the spans are from.
    pub(crate) service_name: String,
    /// The client certificate and its key, for gRPC only.
    pub(crate) identity: Option<(PathBuf, PathBuf)>,
    /// The CA certificates that verify the collector; `None` for those that the system trusts.
    pub(crate) authorities: Option<PathBuf>,
    /// Timeout of one batch, connecting and retries included.
    pub(crate) timeout: Duration,
    pub(crate) gzip: bool,
}

impl Tracing {
    pub(crate) fn uses_tls(&self) -> bool {
        self.endpoint.starts_with("https:")
    }

    /// The TLS files.
    pub(crate) fn files(&self) -> impl Iterator<Item = &Path> {
        let identity = self.identity.iter().flat_map(|(cert, key)| [cert, key]);
        identity.chain(&self.authorities).map(PathBuf::as_path)
    }

    /// Whether there are TLS files although the connection is without TLS.
    pub(super) fn tls_files_unused(&self) -> bool {
        !self.uses_tls() && self.files().next().is_some()
    }
}

/// A protocol of OTLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Grpc,
    HttpProtobuf,
}

/// The protocols by their names.
pub(super) const PROTOCOLS: [(&str, Protocol); 2] =
    [("grpc", Protocol::Grpc), ("http/protobuf", Protocol::HttpProtobuf)];

/// The options of the section as given. An empty text is no option, as in Zuul.
#[derive(Default)]
pub(super) struct OtlpOptions {
    pub(super) protocol: Option<Protocol>,
    pub(super) endpoint: Option<String>,
    pub(super) service_name: Option<String>,
    pub(super) tls_key: Option<PathBuf>,
    pub(super) tls_cert: Option<PathBuf>,
    pub(super) tls_ca: Option<PathBuf>,
    pub(super) insecure: Option<bool>,
    pub(super) certificate_file: Option<PathBuf>,
    pub(super) timeout: Option<Duration>,
    pub(super) gzip: Option<bool>,
}

pub(super) const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

impl OtlpOptions {
    /// Combines the options.
    ///
    /// # Errors
    /// Each option that does not fit the others, and the reason.
    pub(super) fn build(self) -> Result<Tracing, Vec<(&'static str, String)>> {
        let protocol = self.protocol.unwrap_or(Protocol::Grpc);
        let mut errors = self.options_of_other_protocol(protocol);
        let endpoint = match protocol {
            Protocol::Grpc => grpc_endpoint(self.endpoint.as_deref(), self.insecure),
            Protocol::HttpProtobuf => http_endpoint(self.endpoint.as_deref()),
        };
        if protocol == Protocol::Grpc && self.tls_cert.is_some() != self.tls_key.is_some() {
            let missing = if self.tls_cert.is_some() { "tls_key" } else { "tls_cert" };
            errors.push((missing, "missing; tls_cert and tls_key are needed together".to_owned()));
        }
        match endpoint {
            Ok(endpoint) if errors.is_empty() => Ok(Tracing {
                protocol,
                endpoint,
                service_name: self.service_name.unwrap_or_else(|| "zuul".to_owned()),
                identity: self.tls_cert.zip(self.tls_key),
                authorities: self.tls_ca.or(self.certificate_file),
                timeout: self.timeout.unwrap_or(DEFAULT_TIMEOUT),
                gzip: self.gzip.unwrap_or_default(),
            }),
            endpoint => {
                errors.extend(endpoint.err().map(|reason| ("endpoint", reason)));
                Err(errors)
            }
        }
    }

    /// Returns errors for options of the protocol that is not used, which Zuul's services refuse as
    /// well.
    fn options_of_other_protocol(&self, protocol: Protocol) -> Vec<(&'static str, String)> {
        let (options, reason) = match protocol {
            Protocol::Grpc => (
                vec![("certificate_file", self.certificate_file.is_some())],
                "is for protocol http/protobuf only; name the CA in tls_ca",
            ),
            Protocol::HttpProtobuf => (
                vec![
                    ("tls_key", self.tls_key.is_some()),
                    ("tls_cert", self.tls_cert.is_some()),
                    ("tls_ca", self.tls_ca.is_some()),
                    ("insecure", self.insecure == Some(true)),
                ],
                "is for protocol grpc only; name the CA in certificate_file, and choose TLS by http:// \
                 or https:// in endpoint",
            ),
        };
        let given = options.into_iter().filter(|(_, is_given)| *is_given);
        given.map(|(option, _)| (option, reason.to_owned())).collect()
    }
}

/// Parses an endpoint as gRPC libraries do: the default port is 443, and it is with TLS if it has
/// the scheme https, or no scheme, or the scheme http and `insecure` is false.
fn grpc_endpoint(text: Option<&str>, insecure: Option<bool>) -> Parsed<String> {
    let text = text.unwrap_or("http://localhost:4317");
    let uri = uri(text, "HOST:PORT, http://HOST:PORT or https://HOST:PORT")?;
    let tls = match uri.scheme_str() {
        Some("https") => true,
        Some(_) => !insecure.unwrap_or(true),
        None => !insecure.unwrap_or(false),
    };
    endpoint(&uri, tls, 443, "/")
}

/// Parses a whole URL, with its path.
fn http_endpoint(text: Option<&str>) -> Parsed<String> {
    let text = text.unwrap_or("http://localhost:4318/v1/traces");
    let allowed =
        "http://HOST:PORT/PATH or https://HOST:PORT/PATH, where PATH is usually v1/traces";
    let uri = uri(text, allowed)?;
    let tls = match uri.scheme_str() {
        Some(scheme) => scheme == "https",
        None => return Err(format!("must be {allowed}")),
    };
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    endpoint(&uri, tls, if tls { 443 } else { 80 }, path)
}

fn uri(text: &str, allowed: &str) -> Parsed<Uri> {
    let uri = text.parse::<Uri>().ok();
    let known = |uri: &Uri| matches!(uri.scheme_str(), None | Some("http" | "https"));
    let uri = uri.filter(|uri| known(uri) && uri.host().is_some() && !text.contains('@'));
    uri.ok_or_else(|| format!("must be {allowed}"))
}

fn endpoint(uri: &Uri, tls: bool, default_port: u16, path: &str) -> Parsed<String> {
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    match uri.port_u16().unwrap_or(default_port) {
        0 => Err("must have a port from 1 to 65535".to_owned()),
        port => {
            let scheme = if tls { "https" } else { "http" };
            let authority = display_address(&parse::hostname(host)?, port);
            Ok(format!("{scheme}://{authority}{path}"))
        }
    }
}

/// Whether to compress. Zuul's manual says `gzip`, but for gRPC its services take the number of an
/// algorithm.
pub(super) fn compression(text: &str) -> Parsed<bool> {
    match text {
        "gzip" | "2" => Ok(true),
        "" | "none" | "0" => Ok(false),
        _ => Err("must be gzip or none".to_owned()),
    }
}

/// A timeout in a `zuul.conf`. Below 1000 it is in seconds, as in Zuul's code; from 1000 on in
/// milliseconds, as in Zuul's manual. No useful timeout is valid in the other unit as well.
pub(super) fn timeout(text: &str) -> Parsed<Option<Duration>> {
    let allowed = "must be a whole number: seconds up to 999, milliseconds from 1000 to 600000";
    match text.trim().parse::<u32>() {
        Ok(0) => Ok(None),
        Ok(seconds @ 1..1000) => Ok(Some(Duration::from_secs(seconds.into()))),
        Ok(milliseconds @ 1000..=600_000) => Ok(Some(Duration::from_millis(milliseconds.into()))),
        _ => Err(allowed.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint_of(options: OtlpOptions) -> Result<String, String> {
        let first = |errors: Vec<(&str, String)>| format!("{}: {}", errors[0].0, errors[0].1);
        options.build().map(|tracing| tracing.endpoint.to_string()).map_err(first)
    }

    #[test]
    fn grpc_endpoints_are_parsed_as_by_grpc_libraries() {
        let endpoint = |endpoint: &str, insecure| {
            endpoint_of(OtlpOptions {
                endpoint: Some(endpoint.to_owned()),
                insecure,
                ..OtlpOptions::default()
            })
        };
        assert_eq!(endpoint_of(OtlpOptions::default()).unwrap(), "http://localhost:4317/");
        for (text, insecure, expected) in [
            ("http://c:4317", None, "http://c:4317/"),
            ("http://c:4317", Some(false), "https://c:4317/"),
            ("https://c:4317", Some(true), "https://c:4317/"),
            ("c:4317", None, "https://c:4317/"),
            ("c:4317", Some(true), "http://c:4317/"),
            ("http://c", None, "http://c:443/"),
            ("http://[::1]:1/x", None, "http://[::1]:1/"),
        ] {
            assert_eq!(endpoint(text, insecure).as_deref(), Ok(expected), "{text} {insecure:?}");
        }
        for bad in ["a b", "unix:/x", "ftp://c:1", "http://", "http://u:p@c:1", "http://c:0", "/x"]
        {
            assert!(endpoint(bad, None).is_err(), "{bad}");
        }
    }

    #[test]
    fn http_endpoints_are_whole_urls() {
        let endpoint = |endpoint: Option<&str>| {
            endpoint_of(OtlpOptions {
                protocol: Some(Protocol::HttpProtobuf),
                endpoint: endpoint.map(str::to_owned),
                ..OtlpOptions::default()
            })
        };
        for (text, expected) in [
            (None, "http://localhost:4318/v1/traces"),
            (Some("https://c/v1/traces?a=b"), "https://c:443/v1/traces?a=b"),
            (Some("http://c"), "http://c:80/"),
        ] {
            assert_eq!(endpoint(text).as_deref(), Ok(expected), "{text:?}");
        }
        for bad in ["c:4318", "x", "unix:/x"] {
            assert!(endpoint(Some(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn timeouts_and_compression_are_read_as_in_zuul() {
        let seconds = |text| timeout(text).map(|time| time.map(|time| time.as_secs_f64()));
        assert_eq!(seconds("10"), Ok(Some(10.0)));
        assert_eq!(seconds("10000"), Ok(Some(10.0)));
        assert_eq!(seconds("1500"), Ok(Some(1.5)));
        assert_eq!(seconds(" 0 "), Ok(None), "the default of Zuul");
        for bad in ["", "x", "10.5", "-5", "600001"] {
            assert!(timeout(bad).is_err(), "{bad}");
        }
        assert_eq!((compression("gzip"), compression("none")), (Ok(true), Ok(false)));
        assert!(compression("deflate").is_err());
    }

    #[test]
    fn options_of_the_other_protocol_are_errors() {
        let file = || Some(PathBuf::from("/f"));
        let keys = |options: OtlpOptions| -> Vec<_> {
            options.build().unwrap_err().into_iter().map(|(key, _)| key).collect()
        };
        let protocol = Some(Protocol::HttpProtobuf);
        let all = OtlpOptions {
            protocol,
            tls_key: file(),
            tls_cert: file(),
            tls_ca: file(),
            insecure: Some(true),
            endpoint: Some("c".to_owned()),
            ..OtlpOptions::default()
        };
        assert_eq!(keys(all), ["tls_key", "tls_cert", "tls_ca", "insecure", "endpoint"]);
        let secure = OtlpOptions { protocol, insecure: Some(false), ..OtlpOptions::default() };
        assert!(secure.build().is_ok());
        assert_eq!(
            keys(OtlpOptions { certificate_file: file(), ..OtlpOptions::default() }),
            ["certificate_file"]
        );
        assert_eq!(keys(OtlpOptions { tls_key: file(), ..OtlpOptions::default() }), ["tls_cert"]);
        assert_eq!(keys(OtlpOptions { tls_cert: file(), ..OtlpOptions::default() }), ["tls_key"]);
    }
}
