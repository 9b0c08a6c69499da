//! Where spans go: Zuul's options of `[tracing]` and what they make together
//! (`zuul/lib/tracing.py` and the exporters that it hands them to), in either kind of file.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use hyper::Uri;

use super::parse;
use super::parse::Parsed;

/// A collector, and how it gets spans.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tracing {
    pub(crate) protocol: Protocol,
    pub(crate) endpoint: Endpoint,
    /// The name that the spans are under.
    pub(crate) service_name: String,
    /// Our certificate and its key, shown to a collector that wants to see one; gRPC alone.
    pub(crate) identity: Option<(PathBuf, PathBuf)>,
    /// Whom the collector's certificate is to come from; those that the system trusts if `None`.
    pub(crate) authorities: Option<PathBuf>,
    /// For one batch, dialing and trying again included.
    pub(crate) timeout: Duration,
    pub(crate) gzip: bool,
}

impl Tracing {
    /// The files it names.
    pub(crate) fn files(&self) -> impl Iterator<Item = &std::path::Path> {
        let identity = self.identity.iter().flat_map(|(cert, key)| [cert, key]);
        identity.chain(&self.authorities).map(PathBuf::as_path)
    }

    /// Whether files of TLS are named that a connection without it leaves unread.
    pub(crate) fn tls_files_unused(&self) -> bool {
        !self.endpoint.tls && self.files().next().is_some()
    }
}

/// The two ways of OTLP that Zuul knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Grpc,
    HttpProtobuf,
}

/// As they are called.
pub(crate) const PROTOCOLS: [(&str, Protocol); 2] =
    [("grpc", Protocol::Grpc), ("http/protobuf", Protocol::HttpProtobuf)];

/// Where a collector listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Endpoint {
    pub(crate) tls: bool,
    /// Without brackets.
    pub(crate) host: String,
    pub(crate) port: u16,
    /// With its query; `/` for gRPC, which has paths of its own.
    pub(crate) path: String,
}

impl Endpoint {
    /// Host and port.
    pub(crate) fn authority(&self) -> String {
        let Self { host, port, .. } = self;
        if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        write!(f, "{scheme}://{}{}", self.authority(), self.path)
    }
}

/// The options as they are given; an empty text is none, as with upstream.
#[derive(Default)]
pub(crate) struct OtlpOptions {
    pub(crate) protocol: Option<Protocol>,
    pub(crate) endpoint: Option<String>,
    pub(crate) service_name: Option<String>,
    pub(crate) tls_key: Option<PathBuf>,
    pub(crate) tls_cert: Option<PathBuf>,
    pub(crate) tls_ca: Option<PathBuf>,
    pub(crate) insecure: Option<bool>,
    pub(crate) certificate_file: Option<PathBuf>,
    pub(crate) timeout: Option<Duration>,
    pub(crate) gzip: Option<bool>,
}

/// The time for one batch, if none is given.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(10);

impl OtlpOptions {
    /// What they make together; or each option that does not fit, and why.
    pub(crate) fn build(self) -> Result<Tracing, Vec<(&'static str, String)>> {
        let protocol = self.protocol.unwrap_or(Protocol::Grpc);
        let mut faults = self.options_of_other_protocol(protocol);
        let endpoint = match protocol {
            Protocol::Grpc => grpc_endpoint(self.endpoint.as_deref(), self.insecure),
            Protocol::HttpProtobuf => http_endpoint(self.endpoint.as_deref()),
        };
        if protocol == Protocol::Grpc && self.tls_cert.is_some() != self.tls_key.is_some() {
            let missing = if self.tls_cert.is_some() { "tls_key" } else { "tls_cert" };
            faults.push((missing, "missing; tls_cert and tls_key are needed together".to_owned()));
        }
        let endpoint = match endpoint {
            Ok(endpoint) if faults.is_empty() => endpoint,
            Ok(_) => return Err(faults),
            Err(reason) => {
                faults.push(("endpoint", reason));
                return Err(faults);
            }
        };
        Ok(Tracing {
            protocol,
            endpoint,
            service_name: self.service_name.unwrap_or_else(|| "zuul".to_owned()),
            identity: self.tls_cert.zip(self.tls_key),
            authorities: self.tls_ca.or(self.certificate_file),
            timeout: self.timeout.unwrap_or(TIMEOUT),
            gzip: self.gzip.unwrap_or_default(),
        })
    }

    /// Options of the other protocol: upstream's services refuse them as well.
    fn options_of_other_protocol(&self, protocol: Protocol) -> Vec<(&'static str, String)> {
        let (given, other): (Vec<(&'static str, bool)>, _) = match protocol {
            Protocol::Grpc => {
                (vec![("certificate_file", self.certificate_file.is_some())], "http/protobuf")
            }
            Protocol::HttpProtobuf => (
                vec![
                    ("tls_key", self.tls_key.is_some()),
                    ("tls_cert", self.tls_cert.is_some()),
                    ("tls_ca", self.tls_ca.is_some()),
                    ("insecure", self.insecure == Some(true)),
                ],
                "grpc",
            ),
        };
        let instead = match protocol {
            Protocol::Grpc => "name the authority in tls_ca",
            Protocol::HttpProtobuf => {
                "name the authority in certificate_file, and say by http:// or https:// whether to use TLS"
            }
        };
        let given = given.into_iter().filter(|(_, given)| *given);
        given.map(|(key, _)| (key, format!("is for protocol {other} alone; {instead}"))).collect()
    }
}

/// As gRPC's libraries take it: the port is 443 if there is none, and without a scheme or with https
/// it is TLS, unless `insecure` speaks against that.
fn grpc_endpoint(text: Option<&str>, insecure: Option<bool>) -> Parsed<Endpoint> {
    let text = text.unwrap_or("http://localhost:4317");
    let uri = uri(text, "HOST:PORT, http://HOST:PORT or https://HOST:PORT")?;
    let tls = match uri.scheme_str() {
        Some("https") => true,
        Some(_) => !insecure.unwrap_or(true),
        None => !insecure.unwrap_or(false),
    };
    endpoint(&uri, tls, 443, "/".to_owned())
}

/// The whole URL, with the path.
fn http_endpoint(text: Option<&str>) -> Parsed<Endpoint> {
    let text = text.unwrap_or("http://localhost:4318/v1/traces");
    let wanted =
        "http://HOST:PORT/PATH or https://HOST:PORT/PATH, most often with the path /v1/traces";
    let uri = uri(text, wanted)?;
    let tls = match uri.scheme_str() {
        Some(scheme) => scheme == "https",
        None => return Err(format!("must be {wanted}")),
    };
    let path = uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
    endpoint(&uri, tls, if tls { 443 } else { 80 }, path)
}

fn uri(text: &str, wanted: &str) -> Parsed<Uri> {
    let uri = text.parse::<Uri>().ok();
    let known = |uri: &Uri| matches!(uri.scheme_str(), None | Some("http" | "https"));
    let uri = uri.filter(|uri| known(uri) && uri.host().is_some() && !text.contains('@'));
    uri.ok_or_else(|| format!("must be {wanted}"))
}

fn endpoint(uri: &Uri, tls: bool, default: u16, path: String) -> Parsed<Endpoint> {
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    let port = uri.port_u16().unwrap_or(default);
    match port {
        0 => Err("must have a port from 1 to 65535".to_owned()),
        _ => Ok(Endpoint { tls, host: parse::hostname(host)?, port, path }),
    }
}

/// Whether to compress. Zuul's manual says `gzip`; what its services take of it for gRPC is the number
/// of an algorithm.
pub(crate) fn compression(text: &str) -> Parsed<bool> {
    match text {
        "gzip" | "2" => Ok(true),
        "none" | "0" => Ok(false),
        _ => Err("must be gzip or none".to_owned()),
    }
}

/// What Python's `int()` takes for a time. Zuul's manual says milliseconds, and its services take it for
/// seconds. Nobody gives a collector a quarter of an hour, nor a tenth of a second: what is below 1000 is
/// meant by those who have tried it, the rest by those who have read it.
pub(crate) fn timeout(text: &str) -> Parsed<Option<Duration>> {
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

    fn endpoint_of(given: OtlpOptions) -> Result<String, String> {
        let faults = |faults: Vec<(&str, String)>| format!("{}: {}", faults[0].0, faults[0].1);
        given.build().map(|tracing| tracing.endpoint.to_string()).map_err(faults)
    }

    #[test]
    fn endpoints_of_grpc() {
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
    fn endpoints_of_http() {
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
    fn times_and_compression() {
        let seconds = |text| timeout(text).map(|time| time.map(|time| time.as_secs_f64()));
        assert_eq!(seconds("10"), Ok(Some(10.0)));
        assert_eq!(seconds("10000"), Ok(Some(10.0)));
        assert_eq!(seconds("1500"), Ok(Some(1.5)));
        assert_eq!(seconds(" 0 "), Ok(None), "upstream's default");
        for bad in ["", "x", "10.5", "-5", "600001"] {
            assert!(timeout(bad).is_err(), "{bad}");
        }
        assert_eq!((compression("gzip"), compression("none")), (Ok(true), Ok(false)));
        assert!(compression("deflate").is_err());
    }

    #[test]
    fn options_of_the_other_protocol() {
        let file = || Some(PathBuf::from("/f"));
        let keys = |given: OtlpOptions| -> Vec<_> {
            given.build().unwrap_err().into_iter().map(|(key, _)| key).collect()
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
