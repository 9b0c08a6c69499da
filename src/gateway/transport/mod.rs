//! TCP connections with and without TLS, and the buffers for what is read from them.

pub(crate) mod buffer_pool;
pub(crate) mod connection;
#[cfg(test)]
pub(crate) mod in_memory;
pub(crate) mod read_ahead;
pub(crate) mod socket;
