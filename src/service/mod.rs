//! Being a good daemon: signals, the service manager, descriptors.

pub(crate) mod descriptors;
pub(crate) mod signals;
pub(crate) mod systemd;
