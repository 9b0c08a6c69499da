//! Being a good daemon: signals, the service manager, descriptors, whom to run as.

pub(crate) mod descriptors;
pub(crate) mod privileges;
pub(crate) mod signals;
pub(crate) mod systemd;
