//! What becomes of a running configuration when its file is read again. Pure.

use super::{Config, Limits, Listener, Log, ZooKeeper};

/// A configuration that takes the place of a running one.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ConfigDiff {
    /// What runs from then on: what is wanted, but for the keys that wait.
    pub(crate) config: Config,
    /// The keys whose change takes effect.
    pub(crate) taken: Vec<&'static str>,
    /// The keys that differ and wait for a restart.
    pub(crate) waiting: Vec<&'static str>,
}

/// How a key is called in our TOML and in a `zuul.conf`.
type Key = (&'static str, &'static str);

struct Differences {
    toml: bool,
    taken: Vec<&'static str>,
    waiting: Vec<&'static str>,
}

impl Differences {
    fn name(&self, (toml, conf): Key) -> &'static str {
        if self.toml { toml } else { conf }
    }

    /// Lets a key change.
    fn take<T: PartialEq>(&mut self, key: Key, running: &T, wanted: T) -> T {
        if *running != wanted {
            self.taken.push(self.name(key));
        }
        wanted
    }

    /// Leaves a key as it is: sockets, the registry entry and the user are what they are.
    fn keep<T: Clone + PartialEq>(&mut self, key: Key, running: &T, wanted: T) -> T {
        if *running != wanted {
            self.waiting.push(self.name(key));
        }
        running.clone()
    }
}

impl Config {
    /// What becomes of this configuration when its file, TOML or not, says `wanted`.
    pub(crate) fn change(&self, wanted: Self, toml: bool) -> ConfigDiff {
        let Self {
            hostname,
            zone,
            public_port,
            listeners,
            tls,
            name_check,
            zookeeper,
            admin,
            user,
            pid_file,
            control,
            limits,
            log,
            tracing,
            file_warnings,
        } = wanted;
        let found = &mut Differences { toml, taken: Vec::new(), waiting: Vec::new() };
        let config = Self {
            hostname: found.keep(("hostname", "[fingergw] hostname"), &self.hostname, hostname),
            zone: found.keep(("zone", "[fingergw] zone"), &self.zone, zone),
            public_port: found.keep(
                ("public_port", "[fingergw] public_port"),
                &self.public_port,
                public_port,
            ),
            listeners: change_listeners(&self.listeners, listeners, found),
            tls: found.take(
                ("tls.cert, tls.key or tls.ca", "[fingergw] tls_cert, tls_key or tls_ca"),
                &self.tls,
                tls,
            ),
            name_check: found.take(
                (
                    "tls.verify_hostnames or tls.common_name_fallback",
                    "[fingergw] tls_verify_hostnames",
                ),
                &self.name_check,
                name_check,
            ),
            zookeeper: change_zookeeper(&self.zookeeper, zookeeper, found),
            admin: found.keep(
                ("admin.address", "[fingergw] prometheus_port or prometheus_addr"),
                &self.admin,
                admin,
            ),
            user: found.keep(("user", "[fingergw] user"), &self.user, user),
            pid_file: found.keep(("", "[fingergw] pidfile"), &self.pid_file, pid_file),
            control: found.keep(
                ("control.socket", "[fingergw] command_socket"),
                &self.control,
                control,
            ),
            limits: change_limits(&self.limits, limits, found),
            log: change_log(&self.log, log, found),
            tracing: found.keep(("tracing", "[tracing]"), &self.tracing, tracing),
            file_warnings,
        };
        let Differences { taken, waiting, .. } = found;
        ConfigDiff { config, taken: std::mem::take(taken), waiting: std::mem::take(waiting) }
    }
}

/// Sockets stay, and so does whether they speak TLS, which the registry entry tells. What a
/// listener wants of its clients may change.
fn change_listeners(
    running: &[Listener],
    wanted: Vec<Listener>,
    found: &mut Differences,
) -> Vec<Listener> {
    let is_same = |one: &Listener, other: &Listener| {
        (&one.host, one.port, one.tls.is_some()) == (&other.host, other.port, other.tls.is_some())
    };
    let changed: Vec<_> = running
        .iter()
        .enumerate()
        .map(|(index, listener)| {
            // Several may have the same address: port 0 is any.
            let same = wanted.get(index).filter(|other| is_same(listener, other));
            let same = same.or_else(|| wanted.iter().find(|other| is_same(listener, other)));
            let Listener { host: _, port: _, tls, advertised: _, proxy_protocol, allow } =
                same.unwrap_or(listener).clone();
            Listener { tls, proxy_protocol, allow, ..listener.clone() }
        })
        .collect();
    fn each<'l, T: 'l>(of: &'l [Listener], what: fn(&'l Listener) -> T) -> Vec<T> {
        of.iter().map(what).collect()
    }
    found.take(
        ("listener.client_certificate", ""),
        &each(running, |listener| listener.tls),
        each(&changed, |listener| listener.tls),
    );
    found.take(
        ("listener.proxy_protocol", ""),
        &each(running, |listener| &listener.proxy_protocol),
        each(&changed, |listener| &listener.proxy_protocol),
    );
    found.take(
        ("listener.allow", ""),
        &each(running, |listener| &listener.allow),
        each(&changed, |listener| &listener.allow),
    );
    found.keep(
        ("listener", "[fingergw] listen_address, port or whether it speaks TLS"),
        &changed,
        wanted,
    )
}

fn change_zookeeper(running: &ZooKeeper, wanted: ZooKeeper, found: &mut Differences) -> ZooKeeper {
    let ZooKeeper { hosts, tls, session_timeout, verify_hostnames } = wanted;
    ZooKeeper {
        hosts: found.keep(("zookeeper.hosts", "[zookeeper] hosts"), &running.hosts, hosts),
        tls: found.take(
            (
                "zookeeper.tls_cert, zookeeper.tls_key or zookeeper.tls_ca",
                "[zookeeper] tls_cert, tls_key or tls_ca",
            ),
            &running.tls,
            tls,
        ),
        session_timeout: found.keep(
            ("zookeeper.session_timeout", "[zookeeper] session_timeout"),
            &running.session_timeout,
            session_timeout,
        ),
        // The ZooKeeper client takes it with a session and keeps it for all connections of that.
        verify_hostnames: found.keep(
            ("zookeeper.verify_hostnames", ""),
            &running.verify_hostnames,
            verify_hostnames,
        ),
    }
}

fn change_limits(running: &Limits, wanted: Limits, found: &mut Differences) -> Limits {
    let Limits {
        connections,
        connections_per_address,
        ipv6_prefix,
        exempt_networks,
        handshakes,
        handshakes_per_minute,
        streams_logged_per_minute,
        lookups,
        handshake_timeout,
        request_timeout,
        lookup_timeout,
        connect_timeout,
        first_byte_timeout,
        write_timeout,
        stream_buffer,
        stream_idle,
        stream_total,
        keepalive,
        lame_duck,
        grace,
    } = wanted;
    let mut count = |key, running, wanted| found.take((key, ""), running, wanted);
    let connections = count("limits.connections", &running.connections, connections);
    let connections_per_address = count(
        "limits.connections_per_address",
        &running.connections_per_address,
        connections_per_address,
    );
    let handshakes = count("limits.handshakes", &running.handshakes, handshakes);
    let handshakes_per_minute = count(
        "limits.handshakes_per_minute",
        &running.handshakes_per_minute,
        handshakes_per_minute,
    );
    let streams_logged_per_minute = count(
        "limits.streams_logged_per_minute",
        &running.streams_logged_per_minute,
        streams_logged_per_minute,
    );
    let lookups = count("limits.lookups", &running.lookups, lookups);
    let stream_buffer = count("limits.stream_buffer", &running.stream_buffer, stream_buffer);
    let ipv6_prefix = found.take(("limits.ipv6_prefix", ""), &running.ipv6_prefix, ipv6_prefix);
    let exempt_networks =
        found.take(("limits.exempt_networks", ""), &running.exempt_networks, exempt_networks);
    let mut allowance = |key, running, wanted| found.take((key, ""), running, wanted);
    let stream_idle = allowance("limits.stream_idle", &running.stream_idle, stream_idle);
    let stream_total = allowance("limits.stream_total", &running.stream_total, stream_total);
    let mut time = |key, running, wanted| found.take((key, ""), running, wanted);
    Limits {
        connections,
        connections_per_address,
        ipv6_prefix,
        exempt_networks,
        handshakes,
        handshakes_per_minute,
        streams_logged_per_minute,
        lookups,
        stream_buffer,
        stream_idle,
        stream_total,
        handshake_timeout: time(
            "limits.handshake_timeout",
            &running.handshake_timeout,
            handshake_timeout,
        ),
        request_timeout: time("limits.request_timeout", &running.request_timeout, request_timeout),
        lookup_timeout: time("limits.lookup_timeout", &running.lookup_timeout, lookup_timeout),
        connect_timeout: time("limits.connect_timeout", &running.connect_timeout, connect_timeout),
        first_byte_timeout: time(
            "limits.first_byte_timeout",
            &running.first_byte_timeout,
            first_byte_timeout,
        ),
        write_timeout: time("limits.write_timeout", &running.write_timeout, write_timeout),
        keepalive: time("limits.keepalive", &running.keepalive, keepalive),
        lame_duck: time("limits.lame_duck", &running.lame_duck, lame_duck),
        grace: time("limits.grace", &running.grace, grace),
    }
}

fn change_log(running: &Log, wanted: Log, found: &mut Differences) -> Log {
    let Log { level, format, output, log_config } = wanted;
    Log {
        level: found.take(
            ("log.level", "[fingergw] log_config (its level)"),
            &running.level,
            level,
        ),
        format: found.keep(("log.format", "[fingergw] log_config"), &running.format, format),
        output: found.keep(
            ("log.output", "[fingergw] log_config (its output)"),
            &running.output,
            output,
        ),
        // Only tells where the others come from.
        log_config,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::ClientCertificate;
    use crate::config::{LogOutput, toml, zuul_conf};

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

    /// What becomes of `running` when `wanted` is read.
    fn change(running: &str, wanted: &str) -> ConfigDiff {
        toml(running).change(toml(wanted), true)
    }

    #[test]
    fn nothing_changes() {
        let text = format!("zone = \"west\"\n[[listener]]\ntls = true\n{FILES}");
        let change = change(&text, &text);
        assert_eq!(change, ConfigDiff { config: toml(&text), taken: vec![], waiting: vec![] });
    }

    #[test]
    fn what_can_change_does() {
        let text = "[limits]\nconnections = 5\nconnections_per_address = 5\nipv6_prefix = 56
            exempt_networks = [\"192.0.2.0/24\"]\nhandshakes = 5\nlookups = 5\nstream_buffer = 65536
            stream_idle = \"1h\"\nstream_total = \"1h\"\nhandshake_timeout = \"1s\"\nrequest_timeout = \"1s\"
            lookup_timeout = \"1s\"\nconnect_timeout = \"1s\"\nfirst_byte_timeout = \"1s\"
            write_timeout = \"1s\"\nkeepalive = \"1s\"\nlame_duck = \"0s\"\ngrace = \"1s\"\n[log]\nlevel = \"debug\"
            [tls]\ncert = \"/c\"\nkey = \"/k\"\nca = \"/a\"\nverify_hostnames = false\n";
        let change = change("", text);
        assert_eq!(change.config, toml(text));
        assert_eq!(change.waiting, [""; 0]);
        let taken = [
            "tls.cert, tls.key or tls.ca",
            "tls.verify_hostnames or tls.common_name_fallback",
            "limits.connections",
            "limits.connections_per_address",
            "limits.handshakes",
            "limits.lookups",
            "limits.stream_buffer",
            "limits.ipv6_prefix",
            "limits.exempt_networks",
            "limits.stream_idle",
            "limits.stream_total",
            "limits.handshake_timeout",
            "limits.request_timeout",
            "limits.lookup_timeout",
            "limits.connect_timeout",
            "limits.first_byte_timeout",
            "limits.write_timeout",
            "limits.keepalive",
            "limits.lame_duck",
            "limits.grace",
            "log.level",
        ];
        assert_eq!(change.taken, taken);
    }

    #[test]
    fn what_cannot_change_waits_and_the_rest_does_not() {
        let text = "hostname = \"gw\"\nzone = \"west\"\npublic_port = 1\nuser = \"zuul\"
            [[listener]]\naddress = \"[::]:7979\"\n[admin]\naddress = \"[::]:9090\"
            [control]\nsocket = \"/s\"\n[log]\nformat = \"json\"\noutput = \"stderr\"
            [limits]\ngrace = \"1s\"\n";
        let change = change("", text);
        let mut expected = toml("");
        expected.limits.grace = Duration::from_secs(1);
        assert_eq!((change.config, change.taken), (expected, vec!["limits.grace"]));
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

    #[test]
    fn tracing_waits() {
        let text = "[zookeeper]\nhosts = zk\ntls_cert = c\ntls_key = k\ntls_ca = a\n";
        let running = zuul_conf::read("f", text, []).unwrap();
        let wanted = zuul_conf::read("f", &format!("{text}[tracing]\nenabled = on\n"), []).unwrap();
        assert!(wanted.tracing.is_some());
        let ConfigDiff { config, taken, waiting } = running.change(wanted, false);
        assert_eq!((config, taken, waiting), (running, vec![], vec!["[tracing]"]));
    }

    #[test]
    fn zookeeper() {
        let running = toml("");
        let mut wanted = running.clone();
        wanted.zookeeper.hosts.chroot = "/zuul".to_owned();
        wanted.zookeeper.session_timeout = Duration::from_secs(1);
        wanted.zookeeper.tls.ca = "/other".into();
        wanted.zookeeper.verify_hostnames = false;
        let ConfigDiff { config, taken, waiting } = running.change(wanted.clone(), true);
        let kept = ["zookeeper.hosts", "zookeeper.session_timeout", "zookeeper.verify_hostnames"];
        assert_eq!(waiting, kept);
        assert_eq!(taken, ["zookeeper.tls_cert, zookeeper.tls_key or zookeeper.tls_ca"]);
        let expected = ZooKeeper { tls: wanted.zookeeper.tls, ..running.zookeeper };
        assert_eq!(config.zookeeper, expected);
    }

    /// The policies of two running TLS listeners, and what changes, when `wanted` is read.
    fn policies(wanted: &str) -> (Vec<Option<ClientCertificate>>, ConfigDiff) {
        let running = "[[listener]]\naddress = \"[::]:1\"\ntls = true\n
                       [[listener]]\naddress = \"[::]:2\"\ntls = true\n";
        let change = change(&format!("{running}{FILES}"), &format!("{wanted}{FILES}"));
        (change.config.listeners.iter().map(|listener| listener.tls).collect(), change)
    }

    #[test]
    fn what_a_listener_wants_of_its_clients() {
        use ClientCertificate::{None, Optional, Required};
        let one = "[[listener]]\naddress = \"[::]:1\"\ntls = true\n";
        let two = "[[listener]]\naddress = \"[::]:2\"\ntls = true\n";
        let (policies_now, change) = policies(&format!(
            "{one}client_certificate = \"none\"\n{two}client_certificate = \"optional\"\n"
        ));
        assert_eq!(policies_now, [Some(None), Some(Optional)]);
        assert_eq!(change.taken, ["listener.client_certificate"]);
        assert_eq!(change.waiting, [""; 0]);
        // In another order, with another one among them, or gone: found by its address, else as it
        // was.
        let (policies_now, change) = policies(&format!(
            "[[listener]]\n{two}client_certificate = \"none\"\n{one}client_certificate = \"none\"\n"
        ));
        assert_eq!(policies_now, [Some(None), Some(None)]);
        assert_eq!(change.waiting, ["listener"]);
        let (policies_now, change) = policies(&format!("{two}client_certificate = \"none\"\n"));
        assert_eq!(policies_now, [Some(Required), Some(None)]);
        assert_eq!((change.taken.len(), change.waiting.len()), (1, 1));
        let (policies_now, change) = policies(&one.replace("true", "false"));
        assert_eq!(policies_now, [Some(Required), Some(Required)]);
        assert_eq!((change.taken.len(), change.waiting.len()), (0, 1));
    }

    #[test]
    fn who_may_see_what() {
        let rule = |tenant: &str| format!("[[listener.allow]]\ntenants = [\"{tenant}\"]\n");
        let one = "[[listener]]\naddress = \"[::]:1\"\n";
        let two = "[[listener]]\naddress = \"[::]:2\"\nproxy_protocol = [\"10.0.0.0/8\"]\n";
        let running = format!("{one}{}{two}", rule("a"));
        let wanted = format!("{one}{}{}{two}", rule("a"), rule("b"));
        let changed = change(&running, &wanted);
        assert_eq!((changed.config, changed.taken), (toml(&wanted), vec!["listener.allow"]));
        let wanted = two.replace("10", "11") + one;
        let changed = change(&running, &wanted);
        assert_eq!(changed.taken, ["listener.proxy_protocol", "listener.allow"]);
        assert_eq!(changed.waiting, ["listener"], "another order");
        let [first, second] = changed.config.listeners.as_slice() else { panic!("two") };
        assert!(first.allow.is_empty() && first.port == 1);
        assert_eq!(second.proxy_protocol, ["11.0.0.0/8".parse().unwrap()]);
        // A listener that is gone from the file is there until the restart, and so are its rules.
        let changed = change(&running, two);
        assert_eq!((changed.config, changed.waiting), (toml(&running), vec!["listener"]));
    }

    #[test]
    fn keys_of_a_zuul_conf() {
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
        let ConfigDiff { config, taken, waiting } = conf("").change(wanted, false);
        let files = "[fingergw] tls_cert, tls_key or tls_ca";
        assert_eq!(taken, [files, "[fingergw] tls_verify_hostnames"]);
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
