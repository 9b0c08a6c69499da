//! What a reload applies to the running configuration. Pure.

use super::{Config, Listener, Log, ZooKeeper};

/// The result of reading a configuration again.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ConfigDiff {
    /// The configuration that runs after the reload: the new one, except for the keys that wait.
    pub(crate) config: Config,
    /// The keys whose change takes effect.
    pub(crate) applied: Vec<&'static str>,
    /// The keys whose change needs a restart.
    pub(crate) waiting: Vec<&'static str>,
}

/// A key in our TOML, the option of a `zuul.conf` that sets the same, if there is one, and whether
/// two configurations differ in it.
type Key = (&'static str, &'static str, fn(&Config, &Config) -> bool);

macro_rules! key {
    ($toml:literal, $conf:literal, $($field:ident).+) => {
        ($toml, $conf, |one, other| one.$($field).+ != other.$($field).+)
    };
}

const KEYS: &[Key] = &[
    key!("hostname", "[fingergw] hostname", hostname),
    key!("zone", "[fingergw] zone", zone),
    key!("public_port", "[fingergw] public_port", public_port),
    ("listener", "[fingergw] listen_address, port or whether it speaks TLS", |one, other| {
        sockets(one) != sockets(other)
    }),
    ("listener.client_certificate", "", |one, other| differ(one, other, |listener| listener.tls)),
    ("listener.proxy_protocol", "", |one, other| {
        differ(one, other, |listener| listener.proxy_protocol.clone())
    }),
    ("listener.allow", "", |one, other| differ(one, other, |listener| listener.allow.clone())),
    key!("tls.cert, tls.key or tls.ca", "[fingergw] tls_cert, tls_key or tls_ca", tls),
    key!(
        "tls.verify_hostnames or tls.common_name_fallback",
        "[fingergw] tls_verify_hostnames",
        name_check
    ),
    key!("zookeeper.hosts", "[zookeeper] hosts", zookeeper.hosts),
    key!(
        "zookeeper.tls_cert, zookeeper.tls_key or zookeeper.tls_ca",
        "[zookeeper] tls_cert, tls_key or tls_ca",
        zookeeper.tls
    ),
    key!("zookeeper.session_timeout", "[zookeeper] session_timeout", zookeeper.session_timeout),
    key!("zookeeper.verify_hostnames", "", zookeeper.verify_hostnames),
    key!("admin.address", "[fingergw] prometheus_port or prometheus_addr", admin),
    key!("user", "[fingergw] user", user),
    key!("", "[fingergw] pidfile", pid_file),
    key!("control.socket", "[fingergw] command_socket", control),
    key!("limits.connections", "", limits.connections),
    key!("limits.connections_per_address", "", limits.connections_per_address),
    key!("limits.ipv6_prefix", "", limits.ipv6_prefix),
    key!("limits.exempt_networks", "", limits.exempt_networks),
    key!("limits.handshakes", "", limits.handshakes),
    key!("limits.handshakes_per_minute", "", limits.handshakes_per_minute),
    key!("limits.streams_logged_per_minute", "", limits.streams_logged_per_minute),
    key!("limits.lookups", "", limits.lookups),
    key!("limits.handshake_timeout", "", limits.handshake_timeout),
    key!("limits.request_timeout", "", limits.request_timeout),
    key!("limits.lookup_timeout", "", limits.lookup_timeout),
    key!("limits.connect_timeout", "", limits.connect_timeout),
    key!("limits.first_byte_timeout", "", limits.first_byte_timeout),
    key!("limits.write_timeout", "", limits.write_timeout),
    key!("limits.stream_buffer", "", limits.stream_buffer),
    key!("limits.stream_idle", "", limits.stream_idle),
    key!("limits.stream_total", "", limits.stream_total),
    key!("limits.keepalive", "", limits.keepalive),
    key!("limits.lame_duck", "", limits.lame_duck),
    key!("limits.grace", "", limits.grace),
    key!("log.level", "[fingergw] log_config (its level)", log.level),
    key!("log.format", "[fingergw] log_config", log.format),
    key!("log.output", "[fingergw] log_config (its output)", log.output),
    key!("tracing", "[tracing]", tracing),
];

impl Config {
    /// Determines what changes when the file of this configuration, TOML or not, now has `wanted`.
    pub(crate) fn diff(&self, wanted: Self, is_toml: bool) -> ConfigDiff {
        let config = self.reloaded(&wanted);
        let keys = |one: &Self, other: &Self| {
            let changed = KEYS.iter().filter(|(.., differs)| differs(one, other));
            changed.map(|(toml, conf, _)| if is_toml { *toml } else { *conf }).collect()
        };
        ConfigDiff { applied: keys(self, &config), waiting: keys(&config, &wanted), config }
    }

    /// This configuration with the settings of `wanted` that do not need a restart. Sockets, the
    /// registry entry, the user and open outputs stay.
    fn reloaded(&self, wanted: &Self) -> Self {
        let listeners = self.listeners.iter().enumerate().map(|(index, listener)| {
            let same = same_socket(listener, index, &wanted.listeners).unwrap_or(listener).clone();
            // Whether it is advertised is part of the registry entry.
            Listener { advertised: listener.advertised, ..same }
        });
        Self {
            listeners: listeners.collect(),
            tls: wanted.tls.clone(),
            name_check: wanted.name_check,
            // The ZooKeeper client takes the other settings once for all connections of a session.
            zookeeper: ZooKeeper { tls: wanted.zookeeper.tls.clone(), ..self.zookeeper.clone() },
            limits: wanted.limits.clone(),
            log: Log {
                level: wanted.log.level,
                log_config: wanted.log.log_config.clone(),
                ..self.log.clone()
            },
            file_warnings: wanted.file_warnings.clone(),
            ..self.clone()
        }
    }
}

/// The settings of the listeners that need a restart.
fn sockets(config: &Config) -> Vec<(&str, u16, bool, bool)> {
    let listeners = config.listeners.iter();
    listeners.map(|l| (l.host.as_str(), l.port, l.tls.is_some(), l.advertised)).collect()
}

/// The listener among `others` with the address of `listener`, which speaks TLS if `listener` does.
/// Prefers the one at `index`, because several can have the same address: port 0 takes any port.
fn same_socket<'l>(
    listener: &Listener,
    index: usize,
    others: &'l [Listener],
) -> Option<&'l Listener> {
    let is_same = |other: &&Listener| {
        (&other.host, other.port, other.tls.is_some())
            == (&listener.host, listener.port, listener.tls.is_some())
    };
    others.get(index).filter(is_same).or_else(|| others.iter().find(is_same))
}

/// Whether a listener of both configurations has another `setting` in each.
fn differ<T: PartialEq>(one: &Config, other: &Config, setting: fn(&Listener) -> T) -> bool {
    one.listeners.iter().enumerate().any(|(index, listener)| {
        let same = same_socket(listener, index, &other.listeners);
        same.is_some_and(|same| setting(same) != setting(listener))
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::{ClientCertificate, Limits, LogOutput, toml, zuul_conf};

    const ZOOKEEPER: &str = r#"
        [zookeeper]
        hosts = "zk1.example.org:2281"
        tls_cert = "/c"
        tls_key = "/k"
        tls_ca = "/a"
    "#;
    const FILES: &str = "[tls]\ncert = \"/c\"\nkey = \"/k\"\nca = \"/a\"\n";

    fn toml(text: &str) -> Config {
        toml::read("f.toml", &format!("{text}{ZOOKEEPER}")).unwrap()
    }

    /// The result when a gateway that runs `running` reads `wanted`.
    fn change(running: &str, wanted: &str) -> ConfigDiff {
        toml(running).diff(toml(wanted), true)
    }

    #[test]
    fn same_file_changes_nothing() {
        let text = format!("zone = \"west\"\n[[listener]]\ntls = true\n{FILES}");
        let change = change(&text, &text);
        assert_eq!(change, ConfigDiff { config: toml(&text), applied: vec![], waiting: vec![] });
    }

    #[test]
    fn settings_that_need_no_restart_are_applied() {
        let text = "[limits]\nconnections = 5\nconnections_per_address = 5\nipv6_prefix = 56
            exempt_networks = [\"192.0.2.0/24\"]\nhandshakes = 5\nhandshakes_per_minute = 5\nstreams_logged_per_minute = 5
            lookups = 5\nstream_buffer = 65536
            stream_idle = \"1h\"\nstream_total = \"1h\"\nhandshake_timeout = \"1s\"\nrequest_timeout = \"1s\"
            lookup_timeout = \"1s\"\nconnect_timeout = \"1s\"\nfirst_byte_timeout = \"1s\"
            write_timeout = \"1s\"\nkeepalive = \"1s\"\nlame_duck = \"0s\"\ngrace = \"1s\"\n[log]\nlevel = \"debug\"
            [tls]\ncert = \"/c\"\nkey = \"/k\"\nca = \"/a\"\nverify_hostnames = false\n";
        let change = change("", text);
        assert_eq!(change.config, toml(text));
        assert_eq!(change.waiting, [""; 0]);
        let applied = [
            "tls.cert, tls.key or tls.ca",
            "tls.verify_hostnames or tls.common_name_fallback",
            "limits.connections",
            "limits.connections_per_address",
            "limits.ipv6_prefix",
            "limits.exempt_networks",
            "limits.handshakes",
            "limits.handshakes_per_minute",
            "limits.streams_logged_per_minute",
            "limits.lookups",
            "limits.handshake_timeout",
            "limits.request_timeout",
            "limits.lookup_timeout",
            "limits.connect_timeout",
            "limits.first_byte_timeout",
            "limits.write_timeout",
            "limits.stream_buffer",
            "limits.stream_idle",
            "limits.stream_total",
            "limits.keepalive",
            "limits.lame_duck",
            "limits.grace",
            "log.level",
        ];
        assert_eq!(change.applied, applied);
    }

    #[test]
    fn settings_that_need_a_restart_wait_and_others_are_applied() {
        let text = "hostname = \"gw\"\nzone = \"west\"\npublic_port = 1\nuser = \"zuul\"
            [[listener]]\naddress = \"[::]:7979\"\n[admin]\naddress = \"[::]:9090\"
            [control]\nsocket = \"/s\"\n[log]\nformat = \"json\"\noutput = \"stderr\"
            [limits]\ngrace = \"1s\"\n";
        let change = change("", text);
        let mut expected = toml("");
        expected.limits.grace = Duration::from_secs(1);
        assert_eq!((change.config, change.applied), (expected, vec!["limits.grace"]));
        let waiting = [
            "hostname",
            "zone",
            "public_port",
            "listener",
            "admin.address",
            "user",
            "control.socket",
            "log.format",
            "log.output",
        ];
        assert_eq!(change.waiting, waiting);
    }

    /// The fields are read from the debug output, so that a new one cannot be forgotten.
    #[test]
    fn every_limit_has_a_key() {
        let limits = format!("{:#?}", Limits::default());
        let is_field = |line: &&str| line.starts_with("    ") && !line.starts_with("     ");
        let fields = limits.lines().filter(is_field).filter_map(|line| line.split_once(": "));
        let names: Vec<_> = fields.map(|(name, _)| format!("limits.{}", name.trim())).collect();
        assert!(names.len() >= 20, "{names:?}");
        for name in names {
            assert!(KEYS.iter().any(|(key, ..)| *key == name), "{name}");
        }
    }

    #[test]
    fn tracing_needs_a_restart() {
        let text = "[zookeeper]\nhosts = zk\ntls_cert = c\ntls_key = k\ntls_ca = a\n";
        let running = zuul_conf::read("f", text, []).unwrap();
        let wanted = zuul_conf::read("f", &format!("{text}[tracing]\nenabled = on\n"), []).unwrap();
        assert!(wanted.tracing.is_some());
        let ConfigDiff { config, applied, waiting } = running.diff(wanted, false);
        assert_eq!((config, applied, waiting), (running, vec![], vec!["[tracing]"]));
    }

    #[test]
    fn only_the_files_of_zookeeper_need_no_restart() {
        let running = toml("");
        let mut wanted = running.clone();
        wanted.zookeeper.hosts.chroot = "/zuul".to_owned();
        wanted.zookeeper.session_timeout = Duration::from_secs(1);
        wanted.zookeeper.tls.ca = "/other".into();
        wanted.zookeeper.verify_hostnames = false;
        let ConfigDiff { config, applied, waiting } = running.diff(wanted.clone(), true);
        let kept = ["zookeeper.hosts", "zookeeper.session_timeout", "zookeeper.verify_hostnames"];
        assert_eq!(waiting, kept);
        assert_eq!(applied, ["zookeeper.tls_cert, zookeeper.tls_key or zookeeper.tls_ca"]);
        let expected = ZooKeeper { tls: wanted.zookeeper.tls, ..running.zookeeper };
        assert_eq!(config.zookeeper, expected);
    }

    /// The client certificate policies of two running TLS listeners after `wanted` is read, and the
    /// result.
    fn policies(wanted: &str) -> (Vec<Option<ClientCertificate>>, ConfigDiff) {
        let running = "[[listener]]\naddress = \"[::]:1\"\ntls = true\n
                       [[listener]]\naddress = \"[::]:2\"\ntls = true\n";
        let change = change(&format!("{running}{FILES}"), &format!("{wanted}{FILES}"));
        (change.config.listeners.iter().map(|listener| listener.tls).collect(), change)
    }

    #[test]
    fn client_certificate_policies_follow_the_address_of_the_listener() {
        use ClientCertificate::{None, Optional, Required};
        let one = "[[listener]]\naddress = \"[::]:1\"\ntls = true\n";
        let two = "[[listener]]\naddress = \"[::]:2\"\ntls = true\n";
        let (policies_now, change) = policies(&format!(
            "{one}client_certificate = \"none\"\n{two}client_certificate = \"optional\"\n"
        ));
        assert_eq!(policies_now, [Some(None), Some(Optional)]);
        assert_eq!(change.applied, ["listener.client_certificate"]);
        assert_eq!(change.waiting, [""; 0]);
        // In another order, with a new one or without one of them: a listener is found by its
        // address, and keeps its policy if it is not found.
        let (policies_now, change) = policies(&format!(
            "[[listener]]\n{two}client_certificate = \"none\"\n{one}client_certificate = \"none\"\n"
        ));
        assert_eq!(policies_now, [Some(None), Some(None)]);
        assert_eq!(change.waiting, ["listener"]);
        let (policies_now, change) = policies(&format!("{two}client_certificate = \"none\"\n"));
        assert_eq!(policies_now, [Some(Required), Some(None)]);
        assert_eq!((change.applied.len(), change.waiting.len()), (1, 1));
        let (policies_now, change) = policies(&one.replace("true", "false"));
        assert_eq!(policies_now, [Some(Required), Some(Required)]);
        assert_eq!((change.applied.len(), change.waiting.len()), (0, 1));
    }

    #[test]
    fn rules_and_proxies_follow_the_address_of_the_listener() {
        let rule = |tenant: &str| format!("[[listener.allow]]\ntenants = [\"{tenant}\"]\n");
        let one = "[[listener]]\naddress = \"[::]:1\"\n";
        let two = "[[listener]]\naddress = \"[::]:2\"\nproxy_protocol = [\"10.0.0.0/8\"]\n";
        let running = format!("{one}{}{two}", rule("a"));
        let wanted = format!("{one}{}{}{two}", rule("a"), rule("b"));
        let changed = change(&running, &wanted);
        assert_eq!((changed.config, changed.applied), (toml(&wanted), vec!["listener.allow"]));
        let wanted = two.replace("10", "11") + one;
        let changed = change(&running, &wanted);
        assert_eq!(changed.applied, ["listener.proxy_protocol", "listener.allow"]);
        assert_eq!(changed.waiting, ["listener"], "another order");
        let [first, second] = changed.config.listeners.as_slice() else { panic!("two") };
        assert!(first.allow.is_empty() && first.port == 1);
        assert_eq!(second.proxy_protocol, ["11.0.0.0/8".parse().unwrap()]);
        // A listener that was removed from the file stays until the restart, and so do its rules.
        let changed = change(&running, two);
        assert_eq!((changed.config, changed.waiting), (toml(&running), vec!["listener"]));
    }

    #[test]
    fn options_of_a_zuul_conf_are_named_as_there() {
        let conf = |fingergw: &str| {
            let text = format!(
                "[zookeeper]\nhosts = zk:2281\ntls_cert = c\ntls_key = k\ntls_ca = a\n\
                 [fingergw]\n{fingergw}\n"
            );
            zuul_conf::read("zuul.conf", &text, []).unwrap()
        };
        let tls = "tls_cert = c\ntls_key = k\ntls_ca = a\ntls_verify_hostnames = no\n";
        let mut wanted = conf(&format!("{tls}pidfile = /p\nprometheus_port = 1\n"));
        wanted.log.output = LogOutput::Stderr;
        let ConfigDiff { config, applied, waiting } = conf("").diff(wanted, false);
        let files = "[fingergw] tls_cert, tls_key or tls_ca";
        assert_eq!(applied, [files, "[fingergw] tls_verify_hostnames"]);
        assert_eq!(
            waiting,
            [
                "[fingergw] listen_address, port or whether it speaks TLS",
                "[fingergw] prometheus_port or prometheus_addr",
                "[fingergw] pidfile",
                "[fingergw] log_config (its output)",
            ]
        );
        assert_eq!(config.listeners[0].tls, None);
    }
}
