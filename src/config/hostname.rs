//! This machine's own name, where the configuration gives none.

use dns_lookup::{AddrInfoHints, getaddrinfo, lookup_addr};

/// `AI_CANONNAME` of getaddrinfo(3).
const CANONICAL_NAME: i32 = 0x0002;

/// The fully qualified name of this machine, found as upstream finds it (Python's
/// `socket.getfqdn`): the first name with a dot in it that belongs to the host name's addresses,
/// else the host name as it is. Asks the resolver; may take as long as that takes.
pub(crate) fn fully_qualified() -> String {
    let own = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let hints = AddrInfoHints { flags: CANONICAL_NAME, ..AddrInfoHints::default() };
    let mut names = Vec::new();
    for info in getaddrinfo(Some(&own), None, Some(hints)).into_iter().flatten().flatten() {
        names.extend(lookup_addr(&info.sockaddr.ip()));
        names.extend(info.canonname);
    }
    names.into_iter().find(|name| name.contains('.')).unwrap_or(own)
}
