//! Every metric there is, in the order in which `docs/metrics.md` tells of them.

use prometheus_client::metrics::MetricType::{Counter, Gauge, Histogram};

use super::descriptor::{Descriptor, Label, Unit, Values};

/// Every metric, below the headings of its page.
#[cfg(test)]
pub(crate) const PAGE: [(&str, &[&Descriptor]); 7] = [
    (
        "The service",
        &[&READY, &ZOOKEEPER_CONNECTED, &ZOOKEEPER_SESSIONS, &DRAINING, &BUILD_INFO, &ZONE_INFO],
    ),
    ("Connections and limits", &[&ACCEPTED, &ACTIVE, &REJECTED]),
    ("Requests and streams", &[&REQUESTS, &STREAMS, &LOOKUP, &FIRST_BYTE, &STREAM, &STREAMED]),
    (
        "Routes and zones",
        &[
            &ROUTES,
            &CONNECT,
            &EXECUTOR_WAIT,
            &FAILOVERS,
            &WIRING_FAULTS,
            &NO_LOCAL_PORT,
            &ZONE_GATEWAYS,
            &ZONE_GATEWAYS_AVOIDED,
        ],
    ),
    ("TLS and certificates", &[&HANDSHAKES, &RESUMED, &NOT_AFTER]),
    (
        "Configuration, log and tracing",
        &[
            &RELOADS,
            &LAST_RELOAD_OK,
            &LAST_GOOD_RELOAD,
            &LOG_LINES_LOST,
            &STREAMS_NOT_LOGGED,
            &SPANS,
        ],
    ),
    (
        "The process",
        &[&CPU_SECONDS, &RESIDENT_MEMORY, &VIRTUAL_MEMORY, &OPEN_FDS, &MAX_FDS, &START_TIME],
    ),
];

pub(crate) const READY: Descriptor = Descriptor {
    name: "zuul_fingergw_ready",
    kind: Gauge,
    unit: Unit::YesNo,
    help: "Whether new streams can be served, as /health/ready says it: running and registered",
    labels: &[],
    advice: "0 is normal for seconds at a start and while it stops. Else `zuul-fingergw status`, and \
             the last warning in the log.",
};

pub(crate) const ZOOKEEPER_CONNECTED: Descriptor = Descriptor {
    name: "zuul_fingergw_zookeeper_connected",
    kind: Gauge,
    unit: Unit::YesNo,
    help: "Whether the gateway's own entry is known to stand in ZooKeeper",
    labels: &[],
    advice: "0 for a moment: a ZooKeeper server was restarted. For longer: \
             operating.md, \"When ZooKeeper is in trouble\". Running streams do not notice.",
};

pub(crate) const ZOOKEEPER_SESSIONS: Descriptor = Descriptor {
    name: "zuul_fingergw_zookeeper_sessions",
    kind: Counter,
    unit: Unit::Count("sessions"),
    help: "Sessions with ZooKeeper since the start: one, and one more for each that was lost",
    labels: &[],
    advice: "Several an hour: a network that drops packets, servers that are slow, or a \
             `zookeeper.session_timeout` that is too short for them.",
};

pub(crate) const DRAINING: Descriptor = Descriptor {
    name: "zuul_fingergw_draining",
    kind: Gauge,
    unit: Unit::YesNo,
    help: "Whether the gateway is stopping: out of the registry, running streams come to their end",
    labels: &[],
    advice: "1 lasts `limits.lame_duck` and `limits.grace` at most.",
};

pub(crate) const BUILD_INFO: Descriptor = Descriptor {
    name: "zuul_fingergw_build_info",
    kind: Gauge,
    unit: Unit::Count("always 1"),
    help: "The version of this program",
    labels: &[Label { name: "version", values: Values::Any("the version") }],
    advice: "More than one version for long: an upgrade has stopped halfway.",
};

pub(crate) const ZONE_INFO: Descriptor = Descriptor {
    name: "zuul_fingergw_zone_info",
    kind: Gauge,
    unit: Unit::Count("always 1"),
    help: "The zone that this gateway serves",
    labels: &[Label { name: "zone", values: Values::Any("the zone; empty: none") }],
    advice: "To choose the gateways of a zone; it changes with a restart.",
};

const LISTENERS: [(&str, &str); 2] =
    [("plain", "of listeners without TLS"), ("tls", "of listeners with TLS")];

pub(crate) const ACCEPTED: Descriptor = Descriptor {
    name: "zuul_fingergw_connections_accepted",
    kind: Counter,
    unit: Unit::Count("connections"),
    help: "Connections that were given a place; those that were refused one are not among them",
    labels: &[Label { name: "listener", values: Values::These(&LISTENERS) }],
    advice: "None at all, and people complain: the port forward, the balancer or the firewall in \
             front.",
};

pub(crate) const ACTIVE: Descriptor = Descriptor {
    name: "zuul_fingergw_connections_active",
    kind: Gauge,
    unit: Unit::Count("connections"),
    help: "Connections open now, at most limits.connections together",
    labels: &[Label { name: "listener", values: Values::These(&LISTENERS) }],
    advice: "It grows all day and never falls: set `limits.stream_idle`.",
};

pub(crate) const REJECTED: Descriptor = Descriptor {
    name: "zuul_fingergw_connections_rejected",
    kind: Counter,
    unit: Unit::Count("connections"),
    help: "Connections refused at a limit, by which limit it was",
    labels: &[Label {
        name: "reason",
        values: Values::These(&[
            (
                "limit",
                "`limits.connections`, or what the limits of open files and memory leave of it; also connections that had not asked yet and were closed for a new one",
            ),
            ("address", "`limits.connections_per_address`"),
            (
                "handshakes",
                "`limits.handshakes`, or half of it from one address: the oldest is closed",
            ),
            ("handshake_rate", "`limits.handshakes_per_minute` from one address"),
            ("lookups", "`limits.lookups`"),
            ("accept", "the kernel had no descriptor or no memory; each failed accept counts"),
        ]),
    }],
    advice: "operating.md, \"When a limit is reached\", has a line for each.",
};

pub(crate) const REQUESTS: Descriptor = Descriptor {
    name: "zuul_fingergw_requests",
    kind: Counter,
    unit: Unit::Count("connections"),
    help: "Connections that are over, by how they ended: each connection with a place counts once",
    labels: &[Label {
        name: "result",
        values: Values::These(&[
            ("ok", "the whole log was sent"),
            (
                "upstream_cut",
                "the executor or gateway cut a log that had begun; the client saw a cut",
            ),
            ("client_left", "the client closed, reset or vanished: normal, browsers do it all day"),
            ("client_stalled", "the client took nothing for `limits.write_timeout`"),
            ("client_evicted", "the client took nothing for longest, and too many did"),
            ("stopped", "cut, because this gateway stopped and `limits.grace` was over"),
            ("stream_idle", "cut: silent for `limits.stream_idle`"),
            ("stream_total", "cut: it ran for `limits.stream_total`"),
            ("not_found", "no such build, or it is over"),
            ("not_started", "the build waits for an executor"),
            ("denied", "a rule denies the build; the client is told that it is not found"),
            ("bad_request", "the request was too long"),
            ("timeout", "no request within `limits.request_timeout`"),
            (
                "rejected",
                "refused at a limit after the accept: look-ups, handshakes, the address that a \
                          balancer names; or closed for a newer connection before it had asked",
            ),
            ("zookeeper", "ZooKeeper could not be asked in time"),
            ("unreadable", "the build's entry in ZooKeeper cannot be read"),
            ("upstream_unreachable", "the executor could not be reached"),
            ("upstream_silent", "the executor or gateway took the request and said nothing"),
            ("zone_unreachable", "no gateway of the zone could be reached, nor the executor"),
            ("other_zone", "another gateway of this kind wanted one of another zone"),
            ("proxy_header", "a balancer's connection did not begin with a PROXY header"),
            ("tls", "the TLS handshake failed or took too long"),
            ("probe", "closed before it asked for anything: health checks, port scans"),
        ]),
    }],
    advice: "`zookeeper`, `unreadable`, `upstream_*` and `zone_unreachable` are faults of the \
             service; `zuul-fingergw resolve UUID` and the log's \"stream ended\" lines say which. \
             The others are the clients' doing, or as configured.",
};

pub(crate) const STREAMS: Descriptor = Descriptor {
    name: "zuul_fingergw_streams_active",
    kind: Gauge,
    unit: Unit::Count("streams"),
    help: "Streams under way now",
    labels: &[],
    advice: "`zuul-fingergw status` lists them.",
};

pub(crate) const LOOKUP: Descriptor = Descriptor {
    name: "zuul_fingergw_lookup_seconds",
    kind: Histogram,
    unit: Unit::Seconds,
    help: "Finding out where a build runs, from 0.0005 to 10 s; at most limits.lookup_timeout",
    labels: &[],
    advice: "Usually below 0.01. More: ZooKeeper is slow, or far away.",
};

pub(crate) const FIRST_BYTE: Descriptor = Descriptor {
    name: "zuul_fingergw_first_byte_seconds",
    kind: Histogram,
    unit: Unit::Seconds,
    help: "From the end of the look-up to the log's first byte, from 0.0005 to 10 s",
    labels: &[],
    advice: "What people feel. Compare with `upstream_connect_seconds`: if that is short, executors \
             are slow to read their logs. Where streams are traced, each bucket names a trace of late \
             ([tracing.md](tracing.md#from-a-slow-stream-to-its-trace)).",
};

pub(crate) const STREAM: Descriptor = Descriptor {
    name: "zuul_fingergw_stream_seconds",
    kind: Histogram,
    unit: Unit::Seconds,
    help: "From the end of the look-up to the end of the stream, or of the vain wait for it, from 0.1 \
           to 21600 s",
    labels: &[],
    advice: "As long as builds and people's patience are.",
};

pub(crate) const STREAMED: Descriptor = Descriptor {
    name: "zuul_fingergw_streamed_bytes",
    kind: Counter,
    unit: Unit::Bytes,
    help: "Bytes of logs that clients' connections have taken",
    labels: &[],
    advice: "None, while there are active streams: nobody's build says anything, or executors hang.",
};

const ROUTE_VALUES: [(&str, &str); 3] = [
    ("direct", "an executor of our zone, or of none"),
    ("zone", "a gateway of the executor's zone"),
    ("fallback", "an executor of another zone, because no gateway of that zone had the log"),
];

pub(crate) const ROUTES: Descriptor = Descriptor {
    name: "zuul_fingergw_routes",
    kind: Counter,
    unit: Unit::Count("streams"),
    help: "Streams that are over, failed ones as well, by the hop they came from",
    labels: &[Label { name: "route", values: Values::These(&ROUTE_VALUES) }],
    advice: "`fallback` grows: the gateways of a zone fail; `zuul-fingergw resolve UUID` names them.",
};

pub(crate) const CONNECT: Descriptor = Descriptor {
    name: "zuul_fingergw_upstream_connect_seconds",
    kind: Histogram,
    unit: Unit::Seconds,
    help: "Reaching a next hop, TLS handshake included, from 0.0005 to 10 s; successes only",
    labels: &[Label { name: "route", values: Values::These(&ROUTE_VALUES) }],
    advice: "It jumps to 1 s or 3 s: packets are lost on the way.",
};

pub(crate) const EXECUTOR_WAIT: Descriptor = Descriptor {
    name: "zuul_fingergw_executor_wait_seconds",
    kind: Histogram,
    unit: Unit::Seconds,
    help: "Waiting until fewer than three connections to the executor wait for their first byte, from \
           0.0005 to 10 s; requests that did not have to wait are not among them",
    labels: &[],
    advice: "Below a second: many ask at the same moment, and are served. Seconds: an executor that \
             is slow to answer, or hangs; the log's lines `stream ended` name it.",
};

pub(crate) const FAILOVERS: Descriptor = Descriptor {
    name: "zuul_fingergw_failovers",
    kind: Counter,
    unit: Unit::Count("attempts"),
    help: "Gateways of other zones that were asked and passed over, by what was wrong with them",
    labels: &[Label {
        name: "reason",
        values: Values::These(&[
            ("timeout", "no connection within `limits.connect_timeout`"),
            ("connect", "refused, unreachable, or its name has no address"),
            ("tls", "the TLS handshake failed"),
            ("no_certificate", "it speaks TLS and this gateway has no certificate"),
            ("circle", "requests to it come back"),
            ("zone", "a gateway of another zone answered"),
            ("silent", "it took the request and said nothing"),
            ("cut", "the connection failed before the first byte"),
            ("overtaken", "it said nothing in its head start, and another hop was faster"),
            ("refused", "it answered that it cannot serve the log"),
        ]),
    }],
    advice: "A client notices nothing as long as one hop serves. `zuul-fingergw resolve UUID` says \
             which gateway it is; operating.md, \"Which way a log takes\".",
};

pub(crate) const WIRING_FAULTS: Descriptor = Descriptor {
    name: "zuul_fingergw_wiring_faults",
    kind: Counter,
    unit: Unit::Count("requests"),
    help: "Requests that met a mistake in the wiring of zones, by kind",
    labels: &[Label {
        name: "kind",
        values: Values::These(&[
            ("circle", "requests come back"),
            ("zone", "a registered address leads to a gateway of another zone"),
        ]),
    }],
    advice: "A warning in the log names both ends; operating.md, \"Mistakes in the wiring\".",
};

pub(crate) const NO_LOCAL_PORT: Descriptor = Descriptor {
    name: "zuul_fingergw_dials_without_port",
    kind: Counter,
    unit: Unit::Count("attempts"),
    help: "Connections to executors and gateways that failed with EADDRNOTAVAIL: every local port \
           towards that address was in use",
    labels: &[],
    advice: "It grows: set `net.ipv4.tcp_tw_reuse=1`, widen `net.ipv4.ip_local_port_range`, and look \
             with `ss -tan state time-wait` for what holds the ports.",
};

const ZONE: &str =
    "a zone with gateways, as the registry knows them; empty: gateways without a zone";

pub(crate) const ZONE_GATEWAYS: Descriptor = Descriptor {
    name: "zuul_fingergw_zone_gateways",
    kind: Gauge,
    unit: Unit::Count("gateways"),
    help: "Gateways that are registered, running and have a port, by zone, this one included; a zone \
           without any has no series",
    labels: &[Label { name: "zone", values: Values::Any(ZONE) }],
    advice: "Every gateway tells the same. A zone that vanishes has lost its last gateway.",
};

pub(crate) const ZONE_GATEWAYS_AVOIDED: Descriptor = Descriptor {
    name: "zuul_fingergw_zone_gateways_avoided",
    kind: Gauge,
    unit: Unit::Count("gateways"),
    help: "Those of zone_gateways that come behind the others now because they failed here, each for \
           60 s at most",
    labels: &[Label { name: "zone", values: Values::Any(ZONE) }],
    advice: "`zuul-fingergw resolve UUID`, with a build of that zone, says which and why.",
};

pub(crate) const HANDSHAKES: Descriptor = Descriptor {
    name: "zuul_fingergw_tls_handshakes",
    kind: Counter,
    unit: Unit::Count("handshakes"),
    help: "TLS handshakes with clients and with gateways of other zones, by how they ended",
    labels: &[
        Label { name: "side", values: Values::These(&SIDES) },
        Label {
            name: "result",
            values: Values::These(&[
                ("ok", "done"),
                ("timeout", "not done within its deadline"),
                ("closed", "the peer closed or reset the connection"),
                ("not_tls", "what came is no TLS"),
                ("no_certificate", "the peer shows no certificate, or wants one of us"),
                ("unknown_authority", "no authority of `tls.ca` has issued the peer's certificate"),
                ("dates", "the peer's certificate has expired, or is not valid yet"),
                ("name", "the peer's certificate is for another name"),
                ("certificate", "the peer's certificate cannot be used for another reason"),
                ("refused_by_peer", "the peer sent an alert: most often about our certificate"),
                ("protocol", "anything else"),
            ]),
        },
    ],
    advice: "`upstream` fails: `zuul-fingergw check` on both hosts. `client` fails: port scanners do \
             that all day; gateways and zuul-webs that fail are named in the log.",
};

const SIDES: [(&str, &str); 2] =
    [("client", "who connects to this gateway"), ("upstream", "to whom this gateway connects")];

pub(crate) const RESUMED: Descriptor = Descriptor {
    name: "zuul_fingergw_tls_sessions_resumed",
    kind: Counter,
    unit: Unit::Count("handshakes"),
    help: "Those of the TLS handshakes done that were short, because gateways of this kind resumed a \
           session",
    labels: &[Label { name: "side", values: Values::These(&SIDES) }],
    advice: "None between zones: the other side is upstream's gateway, or is restarted all the time.",
};

pub(crate) const SPANS: Descriptor = Descriptor {
    name: "zuul_fingergw_spans",
    kind: Counter,
    unit: Unit::Count("spans"),
    help: "Spans of streams for the OpenTelemetry collector; none where `tracing.enabled` is not set",
    labels: &[Label {
        name: "result",
        values: Values::These(&[
            ("exported", "the collector has taken them"),
            ("lost", "it could not be reached, refused them or was too slow, and too many waited"),
        ]),
    }],
    advice: "`lost` rises: the last warning in the log names the collector and the reason. Streams do \
             not notice.",
};

pub(crate) const NOT_AFTER: Descriptor = Descriptor {
    name: "zuul_fingergw_certificate_not_after_timestamp_seconds",
    kind: Gauge,
    unit: Unit::Time,
    help: "When this gateway's certificates expire; without a certificate there is no series",
    labels: &[Label {
        name: "role",
        values: Values::Any(
            "`gateway`: for clients and other gateways; `zookeeper`: for ZooKeeper; `gateway_ca`, \
             `zookeeper_ca`: of the authorities in `tls.ca` and `zookeeper.tls_ca` the one that ends \
             first, of those that have not ended yet",
        ),
    }],
    advice: "Put the new files in place, then `zuul-fingergw check` and `zuul-fingergw reload`.",
};

pub(crate) const RELOADS: Descriptor = Descriptor {
    name: "zuul_fingergw_config_reloads",
    kind: Counter,
    unit: Unit::Count("reloads"),
    help: "Times the configuration and the certificates were read again",
    labels: &[Label {
        name: "result",
        values: Values::These(&[
            ("ok", "what was read is in use"),
            ("failed", "what was read has a fault; all stays as it was"),
        ]),
    }],
    advice: "`failed` grows: `zuul-fingergw check` says what is wrong.",
};

pub(crate) const LAST_RELOAD_OK: Descriptor = Descriptor {
    name: "zuul_fingergw_config_last_reload_successful",
    kind: Gauge,
    unit: Unit::YesNo,
    help: "Whether the configuration was good when last read",
    labels: &[],
    advice: "0: the old one is in use, and a restart would fail. `zuul-fingergw check`.",
};

pub(crate) const LAST_GOOD_RELOAD: Descriptor = Descriptor {
    name: "zuul_fingergw_config_last_reload_success_timestamp_seconds",
    kind: Gauge,
    unit: Unit::Time,
    help: "When the configuration was last read and good",
    labels: &[],
    advice: "Older than the change you made: it waits for `zuul-fingergw reload`.",
};

pub(crate) const LOG_LINES_LOST: Descriptor = Descriptor {
    name: "zuul_fingergw_log_lines_lost",
    kind: Counter,
    unit: Unit::Count("lines"),
    help: "Log lines that could not be written",
    labels: &[],
    advice: "The disk of the log file is full or hangs, or its directory is gone; or the process that \
             reads standard output or standard error has stalled. Standard error has the reason, if \
             there was an error. It recovers without a restart.",
};

pub(crate) const STREAMS_NOT_LOGGED: Descriptor = Descriptor {
    name: "zuul_fingergw_streams_not_logged",
    kind: Counter,
    unit: Unit::Count("streams"),
    help: "Streams logged at debug instead of info, because their address was over limits.streams_logged_per_minute",
    labels: &[],
    advice: "An address asks very often; the log names one at most every ten minutes. A NAT address or a proxy \
             belongs into `limits.exempt_networks`.",
};

pub(crate) const CPU_SECONDS: Descriptor = Descriptor {
    name: "process_cpu_seconds",
    kind: Counter,
    unit: Unit::Seconds,
    help: "Time of processors spent, user and system together",
    labels: &[],
    advice: "Its rate is how many processors are busy.",
};

pub(crate) const RESIDENT_MEMORY: Descriptor = Descriptor {
    name: "process_resident_memory_bytes",
    kind: Gauge,
    unit: Unit::Bytes,
    help: "Memory in use",
    labels: &[],
    advice: "About 10 MiB, and for each quiet stream 3 KiB, over TLS 12 KiB.",
};

pub(crate) const VIRTUAL_MEMORY: Descriptor = Descriptor {
    name: "process_virtual_memory_bytes",
    kind: Gauge,
    unit: Unit::Bytes,
    help: "Address space taken, used or not",
    labels: &[],
    advice: "Says little; Zuul's services have it.",
};

pub(crate) const OPEN_FDS: Descriptor = Descriptor {
    name: "process_open_fds",
    kind: Gauge,
    unit: Unit::Count("descriptors"),
    help: "File descriptors open now: two for each stream, and few more",
    labels: &[],
    advice: "Near `process_max_fds`: raise `LimitNOFILE`.",
};

pub(crate) const MAX_FDS: Descriptor = Descriptor {
    name: "process_max_fds",
    kind: Gauge,
    unit: Unit::Count("descriptors"),
    help: "File descriptors that may be open at once; without a limit there is no series",
    labels: &[],
    advice: "`LimitNOFILE` of the unit: two for each of `limits.connections`, and 300 more.",
};

pub(crate) const START_TIME: Descriptor = Descriptor {
    name: "process_start_time_seconds",
    kind: Gauge,
    unit: Unit::Time,
    help: "When the process was started",
    labels: &[],
    advice: "It changes though nobody restarted it: `journalctl -u zuul-fingergw`, or \
             `kubectl logs --previous`.",
};
