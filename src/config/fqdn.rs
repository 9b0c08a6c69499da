//! The fully qualified name of this machine, for configurations without a host name.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use dns_lookup::{AddrInfoHints, getaddrinfo, getnameinfo};

use crate::os::file;

/// `NI_NAMEREQD` of getnameinfo(3): an address without a name is an error.
const NAME_REQUIRED: i32 = 8;

/// Returns the fully qualified name of this machine as Zuul's gateway determines it (Python's
/// `socket.getfqdn`): of the names of the host name's first address the first with a dot, else the
/// canonical name, else the host name itself. Calls the resolver, and may block as long as that
/// does.
pub(crate) fn fully_qualified() -> String {
    let own = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let mut infos = getaddrinfo(Some(&own), None, Some(AddrInfoHints::default())).into_iter();
    let address = infos.by_ref().flatten().flatten().next().map(|info| info.sockaddr.ip());
    let names = address.map(names_of).unwrap_or_default();
    let qualified = names.iter().find(|name| name.contains('.')).or(names.first());
    qualified.cloned().unwrap_or(own)
}

/// Returns the canonical name of `address` and its aliases. getnameinfo(3) has no aliases, and
/// those of gethostbyaddr(3) are from /etc/hosts, so that is read first. If it exceeds the limit of
/// [`file::read`] it counts as empty.
fn names_of(address: IpAddr) -> Vec<String> {
    let hosts = file::read(Path::new("/etc/hosts")).unwrap_or_default();
    let names = names_in(&String::from_utf8_lossy(&hosts), address);
    if !names.is_empty() {
        return names;
    }
    let found = getnameinfo(&SocketAddr::new(address, 0), NAME_REQUIRED);
    found.map(|(name, _)| name).into_iter().collect()
}

/// Returns the names in the first line of `hosts` for `address` (hosts(5)).
fn names_in(hosts: &str, address: IpAddr) -> Vec<String> {
    for line in hosts.lines() {
        let mut words = line.split('#').next().unwrap_or_default().split_ascii_whitespace();
        let found = words.next().and_then(|word| word.parse::<IpAddr>().ok());
        if found.is_some_and(|found| found.to_canonical() == address.to_canonical()) {
            return words.map(str::to_owned).collect();
        }
    }
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_first_line_for_the_address() {
        let hosts = "# 10.0.0.5 no\n127.0.0.1 localhost\n10.0.0.5\tnode1 node1.example.org # c d\n\
                     10.0.0.5 other\n::ffff:10.0.0.6 mapped\nnonsense\n10.0.0.7\n";
        let names = |address: &str| names_in(hosts, address.parse().expect("an address"));
        assert_eq!(names("10.0.0.5"), ["node1", "node1.example.org"]);
        assert_eq!(names("10.0.0.6"), ["mapped"]);
        assert!(names("10.0.0.7").is_empty() && names("10.0.0.8").is_empty());
    }
}
