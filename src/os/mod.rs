//! Interfaces of the operating system and of the service manager. Nothing here knows of the
//! gateway.

pub(crate) mod daemonize;
pub(crate) mod fd_limit;
pub(crate) mod file;
pub(crate) mod heap;
pub(crate) mod memory_limit;
pub(crate) mod pid_file;
pub(crate) mod privileges;
pub(crate) mod runtime;
pub(crate) mod sd_notify;
pub(crate) mod signals;
pub(crate) mod socket_activation;
pub(crate) mod watchdog;
