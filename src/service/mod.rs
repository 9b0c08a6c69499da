//! Being a good daemon: signals, the service manager and its watchdog, descriptors, whom to run as, the
//! command socket, detaching.

pub(crate) mod activation;
pub(crate) mod control;
pub(crate) mod descriptors;
pub(crate) mod detach;
pub(crate) mod memory;
pub(crate) mod pid_file;
pub(crate) mod privileges;
pub(crate) mod runtime;
pub(crate) mod signals;
pub(crate) mod socket_file;
pub(crate) mod status;
pub(crate) mod systemd;
pub(crate) mod watchdog;
