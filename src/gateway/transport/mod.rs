//! Connections, plain or TLS, and the buffers for what is read from them.

pub(crate) mod buffer_pool;
pub(crate) mod connection;
pub(crate) mod read_ahead;
