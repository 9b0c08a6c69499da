//! Limits on what peers may use.

use std::time::Duration;

use ipnet::IpNet;

/// Limits on what peers may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Concurrent connections, over all listeners.
    pub(crate) connections: usize,
    /// Concurrent connections of one client address, over all listeners.
    pub(crate) connections_per_address: usize,
    /// Bits of an IPv6 address that identify a client address, 1 to 128.
    pub(crate) ipv6_prefix: u8,
    /// Networks whose connections do not count against their addresses.
    pub(crate) exempt_networks: Vec<IpNet>,
    /// Concurrent TLS handshakes of clients, over all listeners.
    pub(crate) handshakes: usize,
    /// TLS handshakes per minute of one client address that has not presented a certificate.
    pub(crate) handshakes_per_minute: usize,
    /// Streams per minute of one client address that are logged at info.
    pub(crate) streams_logged_per_minute: usize,
    /// Concurrent lookups.
    pub(crate) lookups: usize,
    /// Timeout of a client's TLS handshake.
    pub(crate) handshake_timeout: Duration,
    /// Timeout of a client's request, from the connection on.
    pub(crate) request_timeout: Duration,
    /// Timeout of a lookup in ZooKeeper.
    pub(crate) lookup_timeout: Duration,
    /// Timeout of a connection to a hop, TLS handshake included.
    pub(crate) connect_timeout: Duration,
    /// Timeout of a hop's first byte.
    pub(crate) first_byte_timeout: Duration,
    /// How long a client may take to accept one buffer.
    pub(crate) write_timeout: Duration,
    /// Bytes that the kernel may buffer for a stream in each direction, including its own overhead:
    /// those that came from the hop, and those that the client has not acknowledged.
    pub(crate) stream_buffer: usize,
    /// How long a stream may be idle after its first byte; `None` is forever.
    pub(crate) stream_idle: Option<Duration>,
    /// How long a stream may last, from the request on; `None` is forever.
    pub(crate) stream_total: Option<Duration>,
    /// Idle time before the first TCP keepalive probe.
    pub(crate) keepalive: Duration,
    /// When the gateway stops: how long it accepts connections after it deregistered; may be 0.
    pub(crate) lame_duck: Duration,
    /// When the gateway stops: how long open streams may go on.
    pub(crate) grace: Duration,
}

impl Limits {
    /// The fraction of all connections, one in so many, that may wait for a client that does not
    /// read.
    pub(crate) const WAITING: usize = 8;

    /// Lowers the connections to `fitting`. If that is fewer than configured, one address may have
    /// at most half of them.
    pub(crate) fn fit_connections(&mut self, fitting: usize) {
        if fitting < self.connections {
            self.connections = fitting;
            self.connections_per_address = self.connections_per_address.min(fitting.div_ceil(2));
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 10_000,
            connections_per_address: 1000,
            ipv6_prefix: 64,
            exempt_networks: Vec::new(),
            handshakes: 2048,
            handshakes_per_minute: 3000,
            streams_logged_per_minute: 1200,
            lookups: 4096,
            handshake_timeout: Duration::from_secs(10),
            request_timeout: Duration::from_secs(10),
            lookup_timeout: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(5),
            first_byte_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(60),
            stream_buffer: 1024 * 1024,
            stream_idle: None,
            stream_total: None,
            keepalive: Duration::from_secs(60),
            lame_duck: Duration::from_secs(2),
            grace: Duration::from_secs(30),
        }
    }
}
