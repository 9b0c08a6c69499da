//! Evaluates the access rules of a listener. Pure.
//!
//! A listener without rules is open: a client that knows the UUID of a build gets its log, as from
//! Zuul's gateway. With rules, a request is allowed if it meets all conditions of one of them.

use std::error::Error;
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::config::Rule;

/// A client and the rules that apply to it.
pub(crate) struct Access<'r> {
    rules: &'r [Rule],
    address: IpAddr,
    names: Vec<String>,
}

/// Why a request is denied: the first condition that eliminates all rules that were left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Denial {
    Address,
    /// The names in the certificate, if there is one.
    Client(Vec<String>),
    Tenant(Option<String>),
}

impl Error for Denial {}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address => f.write_str("no rule allows this address"),
            Self::Client(names) if names.is_empty() => {
                f.write_str("no rule allows a client without a certificate's name")
            }
            Self::Client(names) => {
                write!(f, "no rule allows the client {}", names.join(", ").escape_default())
            }
            Self::Tenant(None) => f.write_str("no rule allows a build without a tenant"),
            Self::Tenant(Some(tenant)) => {
                write!(f, "no rule allows tenant {}", tenant.escape_default())
            }
        }
    }
}

/// Returns whether one of `networks` contains `address`. An IPv4-mapped IPv6 address counts as
/// IPv4.
pub(crate) fn any_contains(networks: &[IpNet], address: IpAddr) -> bool {
    let address = address.to_canonical();
    networks.iter().any(|network| network.contains(&address))
}

/// Compares names case-insensitively; `*.` in `pattern` matches exactly one label, the first (RFC
/// 6125, section 6.4.3).
fn is_named(pattern: &str, name: &str) -> bool {
    match (pattern.strip_prefix("*."), name.split_once('.')) {
        (Some(rest), Some((label, domain))) => {
            !label.is_empty() && rest.eq_ignore_ascii_case(domain)
        }
        (Some(_), None) => false,
        (None, _) => pattern.eq_ignore_ascii_case(name),
    }
}

impl Rule {
    fn has_address(&self, address: IpAddr) -> bool {
        self.networks.as_ref().is_none_or(|networks| any_contains(networks, address))
    }

    fn has_client(&self, names: &[String]) -> bool {
        let named = |pattern: &String| names.iter().any(|name| is_named(pattern, name));
        self.clients.as_ref().is_none_or(|clients| clients.iter().any(named))
    }

    fn has_tenant(&self, tenant: Option<&str>) -> bool {
        let has =
            |tenants: &Vec<String>| tenants.iter().any(|known| Some(known.as_str()) == tenant);
        self.tenants.as_ref().is_none_or(has)
    }
}

impl<'r> Access<'r> {
    /// Returns the access of a client at `address` by `rules`; `None` if there are no rules.
    /// `names` returns the names in its certificate and is called only if a rule needs them.
    pub(crate) fn new(
        rules: &'r [Rule],
        address: IpAddr,
        names: impl FnOnce() -> Vec<String>,
    ) -> Option<Self> {
        if rules.is_empty() {
            return None;
        }
        let wanted = rules.iter().any(|rule| rule.clients.is_some());
        let names = if wanted { names() } else { Vec::new() };
        Some(Self { rules, address, names })
    }

    /// Returns whether a build of `tenant` is allowed; `None` is a build without a tenant.
    ///
    /// # Errors
    /// The reason for the denial.
    pub(crate) fn allows(&self, tenant: Option<&str>) -> Result<(), Denial> {
        let by_address: Vec<_> =
            self.rules.iter().filter(|rule| rule.has_address(self.address)).collect();
        if by_address.is_empty() {
            return Err(Denial::Address);
        }
        let mut by_client =
            by_address.into_iter().filter(|rule| rule.has_client(&self.names)).peekable();
        if by_client.peek().is_none() {
            return Err(Denial::Client(self.names.clone()));
        }
        match by_client.any(|rule| rule.has_tenant(tenant)) {
            true => Ok(()),
            false => Err(Denial::Tenant(tenant.map(str::to_owned))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn list(text: &str) -> Option<Vec<String>> {
        (text != "-").then(|| text.split_whitespace().map(str::to_owned).collect())
    }

    /// A rule of three lists, `-` for one that is not given.
    fn rule(networks: &str, tenants: &str, clients: &str) -> Rule {
        let networks = list(networks);
        let networks = networks.map(|list| list.iter().map(|text| text.parse().unwrap()).collect());
        Rule { networks, tenants: list(tenants), clients: list(clients) }
    }

    fn ask(rules: &[Rule], address: &str, names: &str, tenant: &str) -> Result<(), Denial> {
        let access = Access::new(rules, address.parse().unwrap(), || list(names).unwrap());
        access.expect("rules").allows(Some(tenant).filter(|tenant| !tenant.is_empty()))
    }

    #[test]
    fn names_are_not_read_without_rules() {
        assert!(Access::new(&[], "192.0.2.1".parse().unwrap(), || panic!("asked")).is_none());
        let rules = [rule("192.0.2.0/24", "a", "-")];
        let access = Access::new(&rules, "192.0.2.1".parse().unwrap(), || panic!("asked"));
        assert_eq!(access.unwrap().allows(Some("a")), Ok(()));
    }

    #[test]
    fn all_that_a_rule_names_must_be_met() {
        let rules = [rule("10.0.0.0/8 2001:db8::/32", "a b", "gw.east.org")];
        assert_eq!(ask(&rules, "10.1.2.3", "gw.east.org", "a"), Ok(()));
        assert_eq!(ask(&rules, "2001:db8::7", "x GW.east.org", "b"), Ok(()));
        assert_eq!(ask(&rules, "::ffff:10.1.2.3", "gw.east.org", "a"), Ok(()), "IPv4 on [::]");
        assert_eq!(ask(&rules, "11.1.2.3", "gw.east.org", "a"), Err(Denial::Address));
        let other = Err(Denial::Client(vec!["gw.west.org".to_owned()]));
        assert_eq!(ask(&rules, "10.1.2.3", "gw.west.org", "a"), other);
        assert_eq!(ask(&rules, "10.1.2.3", "", "a"), Err(Denial::Client(Vec::new())));
        let tenant = |name: &str| Err(Denial::Tenant(Some(name.to_owned())));
        assert_eq!(ask(&rules, "10.1.2.3", "gw.east.org", "c"), tenant("c"));
        assert_eq!(ask(&rules, "10.1.2.3", "gw.east.org", "A"), tenant("A"), "as Zuul writes it");
        assert_eq!(ask(&rules, "10.1.2.3", "gw.east.org", ""), Err(Denial::Tenant(None)));
    }

    /// Conditions of different rules are not combined.
    #[test]
    fn one_rule_is_enough_and_has_to_be_one() {
        let rules = [rule("10.0.0.0/8", "-", "-"), rule("-", "open", "-")];
        assert_eq!(ask(&rules, "10.0.0.1", "", "secret"), Ok(()));
        assert_eq!(ask(&rules, "10.0.0.1", "", ""), Ok(()));
        assert_eq!(ask(&rules, "192.0.2.1", "", "open"), Ok(()));
        assert!(ask(&rules, "192.0.2.1", "", "secret").is_err());
        let rules = [rule("10.0.0.0/8", "a", "-"), rule("192.0.2.0/24", "b", "-")];
        assert!(ask(&rules, "10.0.0.1", "", "b").is_err());
        assert!(ask(&rules, "192.0.2.1", "", "a").is_err());
    }

    #[test]
    fn names_of_clients() {
        for (pattern, name, same) in [
            ("gw.example.org", "GW.Example.org", true),
            ("gw.example.org", "gw.example.org.evil", false),
            ("gw.example.org", "example.org", false),
            ("*.example.org", "gw.example.org", true),
            ("*.example.org", "a.gw.example.org", false),
            ("*.example.org", "example.org", false),
            ("*.example.org", ".example.org", false),
            ("gw.example.org", "*.example.org", false),
            ("gateway", "gateway", true),
            ("*.org", "", false),
        ] {
            assert_eq!(is_named(pattern, name), same, "{pattern} {name}");
        }
    }

    #[test]
    fn denial_is_one_line_whatever_peers_write() {
        let names = vec!["a\nb".to_owned(), "\u{1b}[2J".to_owned()];
        for denial in [Denial::Client(names), Denial::Tenant(Some("x\r\ny".to_owned()))] {
            assert!(!denial.to_string().contains(char::is_control), "{denial}");
        }
    }

    fn any_list(item: &'static str) -> impl Strategy<Value = Option<Vec<String>>> {
        prop::option::of(prop::collection::vec(item, 1..3))
    }

    prop_compose! {
        fn any_rule()(
            networks in prop::option::of(prop::collection::vec((0u8..4, 0u8..=32), 1..3)),
            tenants in any_list("[ab]"),
            clients in any_list("([ab]|\\*\\.c)"),
        ) -> Rule {
            let network = |(last, bits): (u8, u8)| {
                IpNet::new([192, 0, 2, last].into(), bits).unwrap().trunc()
            };
            Rule { networks: networks.map(|all| all.into_iter().map(network).collect()), tenants, clients }
        }
    }

    proptest! {
        /// Compares with a second implementation: a client is allowed if all conditions of some
        /// rule hold.
        #[test]
        fn any_rules(
            rules in prop::collection::vec(any_rule(), 1..4),
            last in 0u8..4,
            names in prop::collection::vec("([ab]|[ab]\\.c)", 0..3),
            tenant in prop::option::of("[abc]"),
        ) {
            let expected = rules.iter().any(|rule| {
                let network = rule.networks.iter().flatten().any(|network| {
                    let IpNet::V4(network) = network else { unreachable!() };
                    let mask = u32::MAX.checked_shl(32 - u32::from(network.prefix_len())).unwrap_or(0);
                    u32::from_be_bytes([192, 0, 2, last]) & mask == u32::from(network.addr())
                });
                let client = rule.clients.iter().flatten().any(|pattern| {
                    names.iter().any(|name| name == pattern || pattern == "*.c" && name.ends_with(".c"))
                });
                let known = tenant.is_some() && rule.tenants.iter().flatten().any(|t| tenant.as_ref() == Some(t));
                (rule.networks.is_none() || network)
                    && (rule.clients.is_none() || client)
                    && (rule.tenants.is_none() || known)
            });
            let access = Access::new(&rules, [192, 0, 2, last].into(), || names.clone()).unwrap();
            prop_assert_eq!(access.allows(tenant.as_deref()).is_ok(), expected);
        }
    }
}
