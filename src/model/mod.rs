//! Zuul's data as this gateway reads and writes it. Pure: no I/O, and nothing of the other modules.

pub(crate) mod build_id;
pub(crate) mod build_request;
pub(crate) mod component;
pub(crate) mod excerpt;
pub(crate) mod hop;
pub(crate) mod json;
pub(crate) mod trace_parent;

/// The longest host name, zone or tenant name that is accepted, in bytes. A domain name has at most
/// 255 (RFC 1035, section 2.3.4), and zones appear in file names, log lines and metric labels.
const NAME_MAX: usize = 255;

/// Whether `hostname` can be dialed: a valid name that is not empty.
fn is_hostname(hostname: &str) -> bool {
    !hostname.is_empty() && is_name(hostname)
}

/// Whether `name`, of a host, a zone or a tenant, is printable and at most [`NAME_MAX`] bytes long.
/// It may be empty.
fn is_name(name: &str) -> bool {
    name.len() <= NAME_MAX && !name.chars().any(char::is_control)
}
