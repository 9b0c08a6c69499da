//! Parsers of single values, the same for both kinds of file. Each error names what is allowed.

use std::borrow::Cow;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::RangeInclusive;
use std::time::Duration;

use ipnet::IpNet;
use rustls::pki_types::{DnsName, ServerName};

use super::Hosts;

/// A value, or what is allowed instead.
pub(super) type Parsed<T> = Result<T, String>;

/// Returns the one of `known` that `name` is most likely a misspelling of, if any is similar.
pub(super) fn closest<'k>(name: &str, known: impl IntoIterator<Item = &'k str>) -> Option<&'k str> {
    let similarity = |known| (strsim::jaro_winkler(name, known), known);
    let close = known.into_iter().map(similarity).filter(|(similarity, _)| *similarity > 0.85);
    close.max_by(|(one, _), (other, _)| one.total_cmp(other)).map(|(_, known)| known)
}

/// A duration in `range`: a whole number and its unit.
pub(super) fn duration(text: &str, range: &RangeInclusive<Duration>) -> Parsed<Duration> {
    let allowed = || {
        let (least, most) = (range.start(), range.end());
        format!(
            "must be a time from {least:?} to {most:?}: a whole number and ms, s, m or h, in quotes"
        )
    };
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let number: u64 = text[..digits].parse().map_err(|_| allowed())?;
    let factor = match &text[digits..] {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(allowed()),
    };
    let time = number.checked_mul(factor).map(Duration::from_millis);
    time.filter(|time| range.contains(time)).ok_or_else(allowed)
}

/// A network, `ADDRESS/BITS`, or one address.
pub(super) fn network(text: &str) -> Parsed<IpNet> {
    let allowed =
        || "must be a network such as \"192.0.2.0/24\", \"2001:db8::/32\" or an address".to_owned();
    let network = match text.contains('/') {
        true => text.parse::<IpNet>().map_err(|_| allowed())?,
        false => IpNet::from(text.parse::<IpAddr>().map_err(|_| allowed())?),
    };
    let address = network.addr();
    if address.to_canonical() != address {
        return Err(format!("must be written as IPv4, such as {}", address.to_canonical()));
    }
    if network != network.trunc() {
        return Err(format!("has bits set after its prefix; the network is {}", network.trunc()));
    }
    Ok(network)
}

/// Returns the name to resolve, and to check in a certificate, for `name`: its A-label form if it
/// is not ASCII (UTS 46), or `None` if it has no such form. Python's codec `idna`, with which Zuul
/// dials, does the same by an older standard; letters such as the German sharp s differ.
pub(crate) fn to_ascii(name: &str) -> Option<Cow<'_, str>> {
    if name.is_ascii() {
        return Some(Cow::Borrowed(name));
    }
    idna::domain_to_ascii(name).ok().map(Cow::Owned)
}

/// A host name or IP address that a certificate can be checked against, in its [`to_ascii`] form.
pub(super) fn hostname(text: &str) -> Parsed<String> {
    to_ascii(text)
        .filter(|name| ServerName::try_from(name.trim_end_matches('.')).is_ok())
        .map(Cow::into_owned)
        .ok_or_else(|| "must be a host name or an IP address".to_owned())
}

/// Returns `text` if it is valid and has no control characters, and `allowed` as the error
/// otherwise.
fn name(text: &str, is_valid: bool, allowed: &str) -> Parsed<String> {
    match is_valid && !text.chars().any(char::is_control) {
        true => Ok(text.to_owned()),
        false => Err(allowed.to_owned()),
    }
}

/// The name of a zone, which is also that of a znode.
pub(super) fn zone(text: &str) -> Parsed<String> {
    // Other gateways do not accept a longer one from the registry (`crate::model`).
    let is_valid = (1..=255).contains(&text.len()) && !text.contains('/');
    let allowed = "must be a zone's name: 1 to 255 bytes, without / and control characters";
    name(text, is_valid, allowed)
}

/// The name of a user. Whether the user exists is checked where it matters.
pub(super) fn user(text: &str) -> Parsed<String> {
    let is_valid = !text.is_empty() && !text.contains([':', '/']);
    name(text, is_valid, "must be the name of a user")
}

/// The name of the service in traces.
pub(super) fn service_name(text: &str) -> Parsed<String> {
    name(text, !text.is_empty(), "must be a name")
}

/// `HOST:PORT`, IPv6 addresses in brackets.
pub(super) fn address(text: &str) -> Parsed<(String, u16)> {
    split_address(text)
        .and_then(|(host, port)| Some((hostname(host).ok()?, port?.parse().ok()?)))
        .ok_or_else(|| "must be ADDRESS:PORT, such as \"[::]:79\" or \"192.0.2.1:7979\"".to_owned())
}

/// Whether the two addresses are the same. Port 0 is another free port each time. Names are not
/// resolved.
pub(super) fn is_same((host, port): (&str, u16), (other, other_port): (&str, u16)) -> bool {
    let same = host.trim_end_matches('.').eq_ignore_ascii_case(other.trim_end_matches('.'));
    port != 0 && port == other_port && same
}

/// Whether one of the two addresses is a wildcard that includes the other. Both can be bound only
/// as sockets with options that this program does not set, such as `IPV6_V6ONLY`: `::` includes
/// IPv4.
pub(super) fn overlap((host, port): (&str, u16), (other, other_port): (&str, u16)) -> bool {
    let includes = |wildcard: &str, host: &str| match wildcard {
        "::" => host.parse::<IpAddr>().is_ok(),
        "0.0.0.0" => host.parse::<Ipv4Addr>().is_ok(),
        _ => false,
    };
    port != 0 && port == other_port && (includes(host, other) || includes(other, host))
}

/// The name of a tenant of Zuul.
pub(super) fn tenant(text: &str) -> Parsed<String> {
    name(text, !text.is_empty(), "must be a tenant's name")
}

/// A name in a certificate. `*.` may stand for one label in front of a domain.
pub(super) fn client(text: &str) -> Parsed<String> {
    let is_valid = match text.strip_prefix("*.") {
        Some(domain) => domain.contains('.') && DnsName::try_from(domain).is_ok(),
        None => !text.is_empty() && !text.contains('*'),
    };
    let allowed = "must be a name as in a certificate, such as \"gw.example.org\" or \
                   \"*.example.org\"";
    name(text, is_valid, allowed)
}

/// The connect string of ZooKeeper, `HOST[:PORT],...[/CHROOT]`. `default_port` is that of servers
/// without a port.
pub(super) fn hosts(text: &str, default_port: u16) -> Parsed<Hosts> {
    let (list, chroot) = text.split_at(text.find('/').unwrap_or(text.len()));
    let chroot = chroot.trim_end_matches('/');
    let servers: Option<Vec<_>> = list
        .split(',')
        .map(|server| {
            let (host, port) = split_address(server.trim())?;
            let port = port.map_or(Ok(default_port), str::parse).ok().filter(|port| *port != 0)?;
            Some((hostname(host).ok()?, port))
        })
        .collect();
    match servers {
        Some(servers) if !chroot.contains("//") && !chroot.contains(',') => {
            Ok(Hosts { servers, chroot: chroot.to_owned() })
        }
        _ => Err("must be HOST:PORT,HOST:PORT,... with an optional /CHROOT after the last; IPv6 \
                  addresses in brackets"
            .to_owned()),
    }
}

/// Splits `host`, `host:port`, `[v6]` or `[v6]:port` into host and port.
fn split_address(text: &str) -> Option<(&str, Option<&str>)> {
    if let Some(rest) = text.strip_prefix('[') {
        let (host, rest) = rest.split_once(']')?;
        return match rest.strip_prefix(':') {
            Some(port) => Some((host, Some(port))),
            None => rest.is_empty().then_some((host, None)),
        };
    }
    match text.split_once(':') {
        Some((host, port)) => Some((host, Some(port))),
        None => Some((text, None)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_need_a_unit_and_have_a_range() {
        let day = Duration::from_millis(1)..=Duration::from_secs(86_400);
        let duration = |text| duration(text, &day);
        assert_eq!(duration("10s"), Ok(Duration::from_secs(10)));
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(duration("24h"), Ok(Duration::from_secs(86_400)));
        for text in ["", "10", "s", "0s", "25h", "-1s", "1.5s", "1 s", "99999999999999999999s"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn addresses_need_a_port_and_brackets_for_ipv6() {
        assert_eq!(address("[::]:79"), Ok(("::".into(), 79)));
        assert_eq!(address("127.0.0.1:0"), Ok(("127.0.0.1".into(), 0)));
        assert_eq!(address("gw.example.org:7979"), Ok(("gw.example.org".into(), 7979)));
        for text in
            ["", "79", "[::]", "[::]79", "host", "host:port", "host:70000", "::1:79", "a b:1"]
        {
            assert!(address(text).is_err(), "{text}");
        }
    }

    #[test]
    fn networks_are_written_without_host_bits() {
        let network = |text| network(text).map(|network| network.to_string());
        for good in ["192.0.2.0/24", "2001:db8::/32", "0.0.0.0/0", "::/0", "192.0.2.1/32"] {
            assert_eq!(network(good), Ok(good.to_owned()));
        }
        assert_eq!(network("192.0.2.1"), Ok("192.0.2.1/32".into()));
        assert_eq!(network("2001:db8::1"), Ok("2001:db8::1/128".into()));
        let hint = network("192.0.2.1/24").unwrap_err();
        assert!(hint.ends_with("the network is 192.0.2.0/24"), "{hint}");
        let hint = network("::ffff:192.0.2.0/120").unwrap_err();
        assert!(hint.ends_with("such as 192.0.2.0"), "{hint}");
        for text in ["", "/", "192.0.2.0/33", "192.0.2/24", "example.org", "192.0.2.0/24 "] {
            assert!(network(text).is_err(), "{text}");
        }
    }

    #[test]
    fn connect_strings_of_zookeeper_are_parsed() {
        let hosts = |text| hosts(text, 2281).map(|hosts| hosts.to_string());
        assert_eq!(hosts("zk1:2281"), Ok("zk1:2281".into()));
        assert_eq!(
            hosts("zk1:2281, [::1]:2281,zk3/a/b/"),
            Ok("zk1:2281,[::1]:2281,zk3:2281/a/b".into())
        );
        assert_eq!(hosts("zk1/"), Ok("zk1:2281".into()));
        for text in ["", ",", "zk1:", "zk1:0", "zk1:x", "zk1,", "z k:1", "zk1//a", "zk1:1/a,zk2"] {
            assert!(hosts(text).is_err(), "{text}");
        }
    }

    #[test]
    fn tenants_and_clients_are_checked() {
        assert_eq!(tenant("b c"), Ok("b c".to_owned()));
        assert!(tenant("").is_err() && tenant("a\n").is_err());
        for good in ["gw.example.org", "*.example.org", "zuul-web", "Zuul Web"] {
            assert_eq!(client(good), Ok(good.to_owned()));
        }
        for bad in ["", "*", "*.", "*.org", "*.*.org", "gw*.example.org", "*.a b.org", "a\n"] {
            assert!(client(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn names_of_hosts_and_zones_are_checked() {
        for good in ["gw.example.org", "gw.example.org.", "192.0.2.1", "2001:db8::1", "a_b"] {
            assert!(hostname(good).is_ok(), "{good}");
        }
        for bad in ["", "a b", "a/b", "a\n", "-", "\u{fffd}"] {
            assert!(hostname(bad).is_err(), "{bad:?}");
        }
        assert_eq!(hostname("b\u{fc}cher.test").as_deref(), Ok("xn--bcher-kva.test"));
        assert!(zone("zone one").is_ok());
        for bad in ["", "a/b", "a\tb", &"z".repeat(256)] {
            assert!(zone(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn names_beyond_ascii_become_a_labels() {
        for (name, expected) in [
            ("gw.example.org.", Some("gw.example.org.")),
            ("fe80::1%eth0", Some("fe80::1%eth0")),
            ("b\u{fc}cher.test", Some("xn--bcher-kva.test")),
            ("B\u{dc}CHER.test.", Some("xn--bcher-kva.test.")),
            ("\u{4f8b}\u{3048}.\u{30c6}\u{30b9}\u{30c8}", Some("xn--r8jz45g.xn--zckzah")),
            ("a\u{fffd}", None),
        ] {
            assert_eq!(to_ascii(name).as_deref(), expected, "{name}");
        }
    }
}
