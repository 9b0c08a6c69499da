//! Our TOML: its tables, keys, defaults, and what they make together.

pub(crate) mod reader;

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use toml::de::DeTable;
use tracing::Level;

use self::reader::{Document, Found, Table};
use super::error::ConfigErrors;
use super::otlp::{OtlpOptions, PROTOCOLS, TIMEOUT, Tracing};
use super::parse::Parsed;
use super::{
    ClientCertificate, Config, DEFAULT_HOST, DEFAULT_PORT, Hosts, Limits, Listener, Log, LogFormat,
    LogOutput, NameCheck, Rule, TlsFileKeys, TlsFiles, ZooKeeper, parse, refuse_taken,
};

/// ZooKeeper's usual port for TLS, which is all that this program speaks.
const TLS_PORT: u16 = 2281;

/// Reads the document `text` of the file called `file`.
///
/// # Errors
/// Every fault in it.
pub(crate) fn read(file: &str, text: &str) -> Result<Config, ConfigErrors> {
    let document = Document::new(file, text);
    let config = config(&document);
    ConfigErrors::ok_or_errors(config, document.into_faults())
}

/// The command socket that `text` sets, even if there are errors in it.
pub(crate) fn command_socket(text: &str) -> Option<PathBuf> {
    let (tree, _) = DeTable::parse_recoverable(text);
    let control = tree.get_ref().get("control")?.get_ref().as_table()?;
    let path = control.get("socket")?.get_ref().as_str()?;
    path.starts_with('/').then(|| PathBuf::from(path))
}

/// Whether `text`, under another kind of name, is most likely our TOML: as a `zuul.conf` it would have
/// no quotes.
pub(crate) fn is_likely(text: &str) -> bool {
    if text.lines().any(|line| line.starts_with("[[")) {
        return true;
    }
    let Ok(tree) = DeTable::parse(text) else { return false };
    let zookeeper = tree.get_ref().get("zookeeper").and_then(|table| table.get_ref().as_table());
    let hosts = zookeeper.and_then(|table| table.get("hosts"));
    hosts.is_some_and(|hosts| hosts.get_ref().as_str().is_some())
}

/// The whole configuration. Where a fault was found, any value stands in for the wrong one.
fn config(document: &Document<'_>) -> Config {
    let mut root = document.root();
    let tls_table = root.table("tls");
    let (tls, names) = tls(tls_table);
    let listeners = listeners(&mut root, tls.is_some());
    let zookeeper = zookeeper(root.table("zookeeper"));
    let admin = admin(root.table("admin"), &listeners);
    let control = control(root.table("control"));
    let limits = limits(root.table("limits"));
    let log = log(root.table("log"));
    let tracing = tracing(root.table("tracing"));
    let config = Config {
        hostname: root.text("hostname", parse::hostname),
        zone: root.text("zone", parse::zone),
        public_port: root.integer("public_port", 1..=65_535).map(|port| port as u16),
        listeners,
        tls,
        name_check: names,
        zookeeper,
        admin,
        user: root.text("user", parse::user),
        pid_file: None,
        control,
        limits,
        log,
        tracing,
        file_warnings: Vec::new(),
    };
    root.finish();
    config
}

fn tls(mut table: Table<'_>) -> (Option<TlsFiles>, NameCheck) {
    let given = table.has("cert");
    let files = table.identity(["cert", "key", "ca"], false);
    let verify = table.boolean("verify_hostnames", true);
    let fallback = table.boolean("common_name_fallback", true);
    let names = match (verify, fallback) {
        (false, _) => NameCheck::Off,
        (true, true) => NameCheck::SanOrCommonName,
        (true, false) => NameCheck::SanOnly,
    };
    table.finish();
    // A path that was refused is reported already; a listener need not complain again.
    (files.or_else(|| given.then(placeholder)), names)
}

fn listeners(root: &mut Table<'_>, tls_files: bool) -> Vec<Listener> {
    let (found, tables) = (root.find("listener"), root.tables("listener", "listener"));
    let mut listeners: Vec<Listener> = Vec::new();
    for (found, table) in tables {
        let listener = listener(found, table, tls_files, &listeners);
        listeners.push(listener);
    }
    if listeners.is_empty() {
        listeners.push(Listener::plain(DEFAULT_HOST, DEFAULT_PORT));
    }
    match listeners.iter().filter(|listener| listener.advertised).count() {
        0 => {
            let tls = listeners.iter().position(|listener| listener.tls.is_some());
            listeners[tls.unwrap_or(0)].advertised = true;
        }
        1 => {}
        _ => root.refuse("listener", found, "only one can be advertised".to_owned()),
    }
    listeners
}

/// The address of health and metrics, beside those of `listeners`.
fn admin(mut table: Table<'_>, listeners: &[Listener]) -> Option<(String, u16)> {
    let address = table.text("address", |text| {
        let (host, port) = parse::address(text)?;
        refuse_taken(&host, port, listeners)?;
        Ok((host, port))
    });
    table.finish();
    address
}

/// The listener of `table`, which is `found` in the document after those `before` it.
fn listener(
    found: Found<'_>,
    mut table: Table<'_>,
    tls_files: bool,
    before: &[Listener],
) -> Listener {
    let given = table.find("address");
    let (host, port) = match (table.text("address", parse::address), given) {
        (Some(address), _) => address,
        (None, None) => (DEFAULT_HOST.to_owned(), DEFAULT_PORT),
        // Refused already: it takes no other listener's place.
        (None, Some(_)) => (DEFAULT_HOST.to_owned(), 0),
    };
    if let Err(reason) = refuse_taken(&host, port, before) {
        table.refuse("address", given.or(Some(found)), reason);
    }
    let tls = table.boolean("tls", false);
    if tls && !tls_files {
        let found = table.find("tls");
        table.refuse("tls", found, "needs the certificate files of [tls]".to_owned());
    }
    let client = table.choice(
        "client_certificate",
        &[
            ("required", ClientCertificate::Required),
            ("optional", ClientCertificate::Optional),
            ("none", ClientCertificate::None),
        ],
    );
    let advertised = table.boolean("advertised", false);
    let tls = tls.then(|| client.unwrap_or(ClientCertificate::Required));
    let proxy_protocol = table.list("proxy_protocol", parse::network).unwrap_or_default();
    let mut allow = Vec::new();
    for (found, inner) in table.tables("allow", "listener.allow") {
        if found.get_ref().as_table().is_some_and(|table| table.is_empty()) {
            let reason = "must have networks, tenants or clients; for a listener that is open to \
                           everybody leave out all [[listener.allow]]";
            table.refuse("allow", Some(found), reason.to_owned());
        }
        allow.push(rule(inner, tls));
    }
    table.finish();
    Listener { host, port, tls, advertised, proxy_protocol, allow }
}

/// A rule of a listener that wants to see `certificate` of its clients.
fn rule(mut table: Table<'_>, certificate: Option<ClientCertificate>) -> Rule {
    let rule = Rule {
        networks: table.non_empty_list("networks", parse::network),
        tenants: table.non_empty_list("tenants", parse::tenant),
        clients: table.non_empty_list("clients", parse::client),
    };
    let why = match certificate {
        None => Some("this listener speaks no TLS: set tls = true, or leave it out"),
        Some(ClientCertificate::None) => Some(
            "this listener asks for no certificates: set client_certificate to \"required\" or \
             \"optional\", or leave it out",
        ),
        Some(ClientCertificate::Required | ClientCertificate::Optional) => None,
    };
    if let (Some(found), Some(why)) = (table.find("clients"), why) {
        table.refuse("clients", Some(found), why.to_owned());
    }
    table.finish();
    rule
}

fn zookeeper(mut table: Table<'_>) -> ZooKeeper {
    if !table.has("hosts") {
        table.refuse("hosts", None, "missing: where Zuul's ZooKeeper is".to_owned());
    }
    let zookeeper = ZooKeeper {
        hosts: table
            .text("hosts", |text| parse::hosts(text, TLS_PORT))
            .unwrap_or(Hosts { servers: Vec::new(), chroot: String::new() }),
        tls: table.identity(["tls_cert", "tls_key", "tls_ca"], true).unwrap_or_else(placeholder),
        session_timeout: table.duration("session_timeout", Duration::from_secs(40)),
        verify_hostnames: table.boolean("verify_hostnames", true),
    };
    table.finish();
    zookeeper
}

fn control(mut table: Table<'_>) -> Option<PathBuf> {
    let socket = table.path_of_file("socket");
    table.finish();
    socket
}

/// What the kernel takes for TCP_KEEPIDLE (tcp(7); Linux, `MAX_TCP_KEEPIDLE`).
const KEEPALIVE: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(32_767);

/// None at all, or as any other time.
const LAME_DUCK: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(86_400);

/// From less than a TCP segment of the loopback interface to what no link needs.
const STREAM_BUFFER: RangeInclusive<i64> = 16 * 1024..=64 * 1024 * 1024;

fn limits(mut table: Table<'_>) -> Limits {
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
        stream_idle: _,
        stream_total: _,
        keepalive,
        lame_duck,
        grace,
    } = Limits::default();
    let mut number =
        |key, default| table.integer(key, 1..=1_000_000).map_or(default, |number| number as usize);
    let limits = Limits {
        connections: number("connections", connections),
        connections_per_address: number("connections_per_address", connections_per_address),
        handshakes: number("handshakes", handshakes),
        handshakes_per_minute: number("handshakes_per_minute", handshakes_per_minute),
        streams_logged_per_minute: number("streams_logged_per_minute", streams_logged_per_minute),
        lookups: number("lookups", lookups),
        stream_buffer: table
            .integer("stream_buffer", STREAM_BUFFER)
            .map_or(stream_buffer, |bytes| bytes as usize),
        ipv6_prefix: table.integer("ipv6_prefix", 1..=128).map_or(ipv6_prefix, |bits| bits as u8),
        exempt_networks: table.list("exempt_networks", parse::network).unwrap_or(exempt_networks),
        handshake_timeout: table.duration("handshake_timeout", handshake_timeout),
        request_timeout: table.duration("request_timeout", request_timeout),
        lookup_timeout: table.duration("lookup_timeout", lookup_timeout),
        connect_timeout: table.duration("connect_timeout", connect_timeout),
        first_byte_timeout: table.duration("first_byte_timeout", first_byte_timeout),
        write_timeout: table.duration("write_timeout", write_timeout),
        stream_idle: table.duration_or_never("stream_idle"),
        stream_total: table.duration_or_never("stream_total"),
        keepalive: table.duration_in("keepalive", keepalive, &KEEPALIVE),
        lame_duck: table.duration_in("lame_duck", lame_duck, &LAME_DUCK),
        grace: table.duration("grace", grace),
    };
    table.finish();
    limits
}

fn log(mut table: Table<'_>) -> Log {
    let default = Log::default();
    let levels = [
        ("error", Level::ERROR),
        ("warn", Level::WARN),
        ("info", Level::INFO),
        ("debug", Level::DEBUG),
        ("trace", Level::TRACE),
    ];
    let formats = [("text", LogFormat::Text), ("json", LogFormat::Json), ("zuul", LogFormat::Zuul)];
    let log = Log {
        level: table.choice("level", &levels).unwrap_or(default.level),
        format: table.choice("format", &formats).unwrap_or(default.format),
        output: table.text("output", output).unwrap_or(default.output),
        log_config: None,
    };
    table.finish();
    log
}

/// Zuul's options, under their own names.
fn tracing(mut table: Table<'_>) -> Option<Tracing> {
    let enabled = table.boolean("enabled", false);
    let service = |text: &str| match text.is_empty() || text.chars().any(char::is_control) {
        true => Err("must be a name".to_owned()),
        false => Ok(text.to_owned()),
    };
    let given = OtlpOptions {
        protocol: table.choice("protocol", &PROTOCOLS),
        endpoint: table.text("endpoint", |text| Ok(text.to_owned())),
        service_name: table.text("service_name", service),
        tls_key: table.path_of_file("tls_key"),
        tls_cert: table.path_of_file("tls_cert"),
        tls_ca: table.path_of_file("tls_ca"),
        insecure: table.some_boolean("insecure"),
        certificate_file: table.path_of_file("certificate_file"),
        timeout: Some(table.duration_in("timeout", TIMEOUT, &TRACING_TIMEOUT)),
        gzip: table.choice("compression", &[("none", false), ("gzip", true)]),
    };
    let found = table.find("enabled").filter(|_| enabled);
    let tracing = found.and_then(|found| match given.build() {
        // This file is for nobody else, so whoever wrote that wants it.
        _ if !cfg!(feature = "otlp") => {
            let reason = "this program was built without it: build it with cargo's feature otlp";
            table.refuse("enabled", Some(found), reason.to_owned());
            None
        }
        Ok(tracing) => Some(tracing),
        Err(misfits) => {
            for (key, reason) in misfits {
                let found = table.find(key);
                table.refuse(key, found, reason);
            }
            None
        }
    });
    table.finish();
    tracing
}

/// For one batch of spans.
const TRACING_TIMEOUT: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(600);

fn output(text: &str) -> Parsed<LogOutput> {
    match text {
        "stdout" => Ok(LogOutput::Stdout),
        "stderr" => Ok(LogOutput::Stderr),
        _ if text.starts_with('/') => Ok(LogOutput::at(PathBuf::from(text))),
        _ => Err("must be \"stdout\", \"stderr\" or the absolute path of a file".to_owned()),
    }
}

/// Stands in for files that a fault has been noted of.
fn placeholder() -> TlsFiles {
    let [cert, key, ca] = ["", "", ""].map(PathBuf::from);
    TlsFiles { cert, key, ca, keys: TlsFileKeys::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::error::ConfigError;

    const EXAMPLE: &str = include_str!("../../../etc/zuul-fingergw.toml");
    const LEAST: &str = r#"
        [zookeeper]
        hosts = "zk1.example.org:2281"
        tls_cert = "/c"
        tls_key = "/k"
        tls_ca = "/a"
    "#;

    fn faults(text: &str) -> Vec<ConfigError> {
        read("f.toml", text).err().map(|faults| faults.list().to_vec()).unwrap_or_default()
    }

    /// The example with its commented keys switched on: those with defaults, or the examples too.
    fn uncommented(examples: bool) -> String {
        let mut text = String::new();
        for line in EXAMPLE.lines() {
            let setting = line.strip_prefix('#').filter(|rest| !rest.starts_with([' ', '#']));
            let is_example = line.ends_with("# example");
            // So that a rule may name clients.
            let setting = match setting {
                Some("tls = false") if examples => Some("tls = true"),
                setting => setting,
            };
            match setting {
                Some(setting) if !setting.is_empty() && (examples || !is_example) => {
                    text.push_str(setting);
                }
                _ => text.push_str(line),
            }
            text.push('\n');
        }
        text
    }

    #[test]
    fn the_example_is_valid_as_it_stands() {
        assert_eq!(faults(EXAMPLE), []);
    }

    #[test]
    fn the_example_shows_the_real_defaults() {
        let shown = read("f.toml", &uncommented(false)).unwrap();
        assert_eq!(shown, read("f.toml", EXAMPLE).unwrap());
        let text = uncommented(false);
        assert!(text.contains("\ngrace = ") && text.contains("\n[[listener]]"), "reads nothing");
    }

    /// The text with a key that nobody knows put into one table after the other, and where.
    fn mutants(text: &str) -> Vec<(String, usize)> {
        let headers = text.match_indices("\n[").map(|(header, _)| {
            header + 1 + text[header + 1..].find('\n').expect("a line's end") + 1
        });
        let mutant = |at: usize| {
            let mutant = format!("{}spurious = 1\n{}", &text[..at], &text[at..]);
            (mutant, 1 + text[..at].matches('\n').count())
        };
        headers.chain([0]).map(mutant).collect()
    }

    #[test]
    fn a_spurious_key_in_any_table_is_refused() {
        let mutants = mutants(&uncommented(true));
        assert_eq!(mutants.len(), 10, "tables");
        for (mutant, line) in mutants {
            let faults = faults(&mutant);
            assert_eq!(faults.len(), 1, "{faults:?}");
            assert!(faults[0].key.ends_with("spurious"), "{faults:?}");
            assert_eq!(faults[0].line, Some(line));
        }
    }

    /// A refusal names the keys that are known; the example must have them all.
    #[test]
    fn the_example_has_every_key() {
        let text = uncommented(true);
        let mut keys = 0;
        for (mutant, line) in mutants(&text) {
            let table = mutant.lines().skip(line);
            let table: Vec<_> = table.take_while(|line| !line.starts_with('[')).collect();
            let fault = faults(&mutant).pop().expect("the spurious key");
            let (_, known) = fault.reason.split_once("known here: ").expect("the known keys");
            for key in known.split(", ") {
                let shown = table.iter().any(|line| line.starts_with(&format!("{key} = ")));
                let header = text.contains(&format!("\n[{key}]\n"))
                    || text.contains(&format!("\n[[{key}]]\n"))
                    || text.contains(&format!("\n[[listener.{key}]]"));
                assert!(shown || header, "{key} of line {line}");
                keys += 1;
            }
        }
        assert_eq!(keys, 68);
    }

    #[test]
    fn every_setting_of_the_example_is_explained() {
        let lines: Vec<_> = EXAMPLE.lines().collect();
        let mut explained = 0;
        for (index, line) in lines.iter().enumerate() {
            let setting = line.trim_start_matches('#');
            let is_setting = !setting.starts_with([' ', '[']) && setting.contains(" = ");
            if is_setting && index > 0 {
                assert!(lines[index - 1].starts_with("# "), "no explanation above {line:?}");
                explained += 1;
            }
        }
        assert!(explained > 25, "{explained}");
    }

    #[test]
    fn what_is_not_said_has_its_default() {
        let config = read("f.toml", LEAST).unwrap();
        assert_eq!(config.listeners, [Listener { advertised: true, ..Listener::plain("::", 79) }]);
        assert_eq!((config.limits, config.log), (Limits::default(), Log::default()));
        assert_eq!((config.tls, config.zone, config.hostname), (None, None, None));
        assert!(config.zookeeper.verify_hostnames);
    }

    /// A whole TOML file with these lines in `[tracing]`.
    fn traced(lines: &str) -> Result<Option<Tracing>, Vec<String>> {
        let read = read("f.toml", &format!("{LEAST}[tracing]\n{lines}"));
        read.map(|config| config.tracing)
            .map_err(|faults| faults.list().iter().map(ToString::to_string).collect())
    }

    #[test]
    fn tracing_that_is_off() {
        assert_eq!(traced(""), Ok(None));
        assert_eq!(traced("certificate_file = \"/f\"\ntls_ca = \"/f\""), Ok(None), "as upstream");
        let typo = traced("protocol = \"http\"").unwrap_err();
        assert!(typo[0].ends_with("must be one of \"grpc\", \"http/protobuf\""), "{typo:?}");
    }

    /// Whoever asks for it in a file of ours is to know that this program has it not.
    #[cfg(not(feature = "otlp"))]
    #[test]
    fn tracing_that_is_not_there() {
        let faults = traced("enabled = true\ninsecure = true\n").unwrap_err();
        let expected = "f.toml:8: tracing.enabled = true: this program was built without it: build it \
                        with cargo's feature otlp";
        assert_eq!(faults, [expected]);
    }

    #[cfg(feature = "otlp")]
    #[test]
    fn tracing_that_is_on() {
        let given = traced(
            "enabled = true\nendpoint = \"https://c:1\"\ntls_ca = \"/a\"\ntls_cert = \"/c\"
             tls_key = \"/k\"\nservice_name = \"zuul-two\"\ntimeout = \"3s\"
             compression = \"gzip\"",
        );
        let given = given.unwrap().unwrap();
        assert_eq!(given.endpoint.to_string(), "https://c:1/");
        assert_eq!(given.authorities, Some(PathBuf::from("/a")));
        assert_eq!(given.identity, Some((PathBuf::from("/c"), PathBuf::from("/k"))));
        assert_eq!((given.service_name.as_str(), given.gzip), ("zuul-two", true));
        assert_eq!(given.timeout, Duration::from_secs(3));
        let http =
            traced("enabled = true\nprotocol = \"http/protobuf\"\ncertificate_file = \"/a\"");
        assert_eq!(http.unwrap().unwrap().authorities, Some(PathBuf::from("/a")));
        let misfits = traced(
            "enabled = true\nprotocol = \"http/protobuf\"\ntls_ca = \"/a\"\nendpoint = \"c:1\"",
        );
        let misfits = misfits.unwrap_err();
        assert_eq!(misfits.len(), 2, "{misfits:?}");
        let expected = "f.toml:10: tracing.tls_ca = \"/a\": is for protocol grpc alone; ";
        assert!(misfits[0].starts_with(expected), "{misfits:?}");
        assert!(misfits[1].contains("tracing.endpoint = \"c:1\": must be http://"), "{misfits:?}");
    }

    #[test]
    fn which_name_a_gateway_must_carry() {
        let names =
            |lines: &str| read("f.toml", &format!("[tls]\n{lines}\n{LEAST}")).unwrap().name_check;
        assert_eq!(names(""), NameCheck::SanOrCommonName);
        assert_eq!(names("common_name_fallback = false"), NameCheck::SanOnly);
        assert_eq!(names("verify_hostnames = false"), NameCheck::Off);
    }

    const FILES: &str = "[tls]\ncert = \"/c\"\nkey = \"/k\"\nca = \"/a\"\n";

    #[test]
    fn rules_of_listeners() {
        let text = r#"
            [[listener]]
            proxy_protocol = ["192.0.2.1"]
            [[listener.allow]]
            networks = ["10.0.0.0/8"]
            [[listener.allow]]
            tenants = ["a", "b"]
            [[listener]]
            address = "[::]:7979"
            tls = true
            [[listener.allow]]
            clients = ["*.example.org"]
            tenants = ["c"]
        "#;
        let listeners = read("f.toml", &format!("{text}{FILES}{LEAST}")).unwrap().listeners;
        let names = |names: &[&str]| Some(names.iter().map(ToString::to_string).collect());
        let [one, two] = listeners.as_slice() else { panic!("{listeners:?}") };
        assert_eq!(one.proxy_protocol, ["192.0.2.1/32".parse().unwrap()]);
        assert!(two.proxy_protocol.is_empty());
        let networks = Some(vec!["10.0.0.0/8".parse().unwrap()]);
        assert_eq!(
            one.allow,
            [
                Rule { networks, tenants: None, clients: None },
                Rule { networks: None, tenants: names(&["a", "b"]), clients: None },
            ]
        );
        let clients = names(&["*.example.org"]);
        assert_eq!(two.allow, [Rule { networks: None, tenants: names(&["c"]), clients }]);
    }

    #[test]
    fn faults_of_rules() {
        let fault = |listener: &str| {
            let faults = faults(&format!("[[listener]]\n{listener}\n{FILES}{LEAST}"));
            assert_eq!(faults.len(), 1, "{listener}: {faults:?}");
            faults[0].to_string()
        };
        for (listener, expected) in [
            (
                "[[listener.allow]]",
                "f.toml:2: listener.allow = [[listener.allow]]: must have networks, tenants or clients",
            ),
            (
                "allow = 3",
                "f.toml:2: listener.allow = 3: must be an array of tables: [[listener.allow]]",
            ),
            ("allow = [3]", "f.toml:2: listener.allow = 3: must be a table: [[listener.allow]]"),
            (
                "[[listener.allow]]\nnetworks = []",
                "f.toml:3: listener.allow.networks = []: must name one at least",
            ),
            ("[[listener.allow]]\nnetworks = \"::/0\"", "must be a list of strings"),
            ("[[listener.allow]]\ntenants = [\"a\", 3]", "= 3: must be a string in quotes"),
            ("[[listener.allow]]\nnetworks = [\"10.0.0.1/8\"]", "the network is 10.0.0.0/8"),
            (
                "[[listener.allow]]\ntenant = [\"a\"]",
                "f.toml:3: listener.allow.tenant: unknown key (did you mean tenants?); known here: clients, networks, tenants",
            ),
            (
                "[[listener.allow]]\nclients = [\"a\"]",
                "listener.allow.clients = [\"a\"]: this listener speaks no TLS: set tls = true",
            ),
            (
                "tls = true\nclient_certificate = \"none\"\n[[listener.allow]]\nclients = [\"a\"]",
                "set client_certificate to \"required\" or \"optional\"",
            ),
            (
                "proxy_protocol = true",
                "f.toml:2: listener.proxy_protocol = true: must be a list of strings",
            ),
            ("proxy_protocol = [\"balancer\"]", "must be a network such as"),
        ] {
            let fault = fault(listener);
            assert!(fault.contains(expected), "{listener}: {fault}");
        }
    }

    /// What the documentation shows can be used.
    #[test]
    fn the_examples_of_the_access_page() {
        let page = include_str!("../../../docs/access.md");
        let examples =
            page.split("```toml\n").skip(1).map(|rest| rest.split("```").next().unwrap());
        let mut rules = 0;
        for example in examples {
            let config = read("f.toml", &format!("{example}{FILES}{LEAST}")).unwrap();
            assert_eq!(config.warnings(), [""; 0]);
            rules += config.listeners.iter().map(|listener| listener.allow.len()).sum::<usize>();
        }
        assert_eq!(rules, 5);
    }

    #[test]
    fn likely_mistakes() {
        let warnings = |listeners: &str| {
            read("f.toml", &format!("{listeners}{FILES}{LEAST}")).unwrap().warnings()
        };
        let rule = "[[listener.allow]]\ntenants = [\"a\"]\n";
        let plain = "[[listener]]\naddress = \"[::]:79\"\n";
        let tls = "[[listener]]\naddress = \"gw:7979\"\ntls = true\n";
        assert_eq!(warnings(&format!("{plain}{tls}")), [""; 0]);
        assert_eq!(warnings(&format!("{plain}{rule}{tls}")), [""; 0], "those have a certificate");
        let open = warnings(&format!("{plain}{tls}{rule}"));
        assert_eq!(open.len(), 1);
        assert!(
            open[0]
                .starts_with("the listener on gw:7979 has rules and the one on [::]:79 has none")
        );
        let optional = format!("{tls}client_certificate = \"optional\"\n");
        assert_eq!(warnings(&format!("{plain}{rule}{optional}")).len(), 1);
        let all = warnings(&format!("{plain}proxy_protocol = [\"10.0.0.0/8\", \"::/0\"]\n"));
        assert!(all.len() == 1 && all[0].contains("believes everybody's PROXY header"), "{all:?}");
    }

    #[test]
    fn two_sockets_on_one_address_are_an_error() {
        let text = |listeners: &[&str], admin: &str| {
            let table = |address| format!("[[listener]]\naddress = \"{address}\"\n");
            let listeners: String = listeners.iter().map(table).collect();
            format!("{listeners}[admin]\naddress = \"{admin}\"\n{LEAST}")
        };
        let good = ["[::]:0", "[::]:0", "127.0.0.1:79", "127.0.0.2:79", "[::1]:79", "gw:79"];
        assert_eq!(faults(&text(&good, "127.0.0.1:9090")), []);
        for bad in [["[::]:79", "[::]:79"], ["gw.example.org:79", "GW.example.org.:79"]] {
            let faults = faults(&text(&bad, "127.0.0.1:9090"));
            let expected = format!("f.toml:4: listener.address = \"{}\": the listener on ", bad[1]);
            assert!(
                faults.len() == 1 && faults[0].to_string().starts_with(&expected),
                "{faults:?}"
            );
        }
        let default = faults(&format!("[[listener]]\n[[listener]]\n{LEAST}"));
        let default: Vec<_> = default.iter().map(ToString::to_string).collect();
        let expected = "f.toml:2: listener.address = [[listener]]: the listener on [::]:79 takes";
        assert!(default.len() == 1 && default[0].starts_with(expected), "{default:?}");
        let faults = faults(&text(&["127.0.0.1:79"], "127.0.0.1:79"));
        assert_eq!(faults.len(), 1);
        assert!(faults[0].to_string().starts_with("f.toml:4: admin.address"), "{faults:?}");

        // These work if a service manager passes sockets that are for one version of IP.
        for [one, other] in [
            ["[::]:79", "127.0.0.1:79"],
            ["[::1]:79", "[::]:79"],
            ["[::]:79", "0.0.0.0:79"],
            ["0.0.0.0:79", "192.0.2.1:79"],
        ] {
            let expected = format!("the addresses {one} and {other} overlap: ");
            let pair = text(&[one, other], "127.0.0.1:9090");
            for text in [pair, text(&[one], other)] {
                let warnings = read("f.toml", &text).expect("no fault").warnings();
                assert!(warnings.len() == 1 && warnings[0].starts_with(&expected), "{warnings:?}");
            }
        }
        let apart = text(&["0.0.0.0:79", "[2001:db8::1]:79", "[::]:0"], "0.0.0.0:0");
        assert_eq!(read("f.toml", &apart).expect("no fault").warnings(), [""; 0]);
    }

    /// A gateway of a zone is there to be asked by those of others, across networks.
    #[test]
    fn a_zone_without_tls_although_there_are_certificates_is_warned_of() {
        let warnings = |text: &str| read("f.toml", &format!("{text}{LEAST}")).unwrap().warnings();
        let tls = "[[listener]]\naddress = \"[::]:7979\"\ntls = true\n";
        let zone = "zone = \"west\"\n";
        assert_eq!(warnings(&format!("{zone}{tls}{FILES}")), [""; 0]);
        assert_eq!(warnings(zone), [""; 0], "there is nothing to speak TLS with");
        assert_eq!(warnings(FILES), [""; 0], "nobody asks it for a zone's logs");
        let plain = warnings(&format!("{zone}{FILES}"));
        assert!(plain.len() == 1 && plain[0].contains("logs of zone west"), "{plain:?}");
        let plain = "[[listener]]\naddress = \"[::]:79\"\nadvertised = true\n";
        assert_eq!(warnings(&format!("{zone}{plain}{tls}{FILES}")).len(), 1);
    }

    #[test]
    fn the_advertised_listener() {
        let advertised = |listeners: &str| {
            let config = read("f.toml", &format!("{listeners}{FILES}{LEAST}")).unwrap();
            config.listeners.iter().position(|listener| listener.advertised).unwrap()
        };
        let plain = "[[listener]]\naddress = \"[::]:79\"\n";
        let tls = "[[listener]]\naddress = \"[::]:7979\"\ntls = true\n";
        let other = "[[listener]]\naddress = \"[::]:80\"\n";
        assert_eq!(advertised(&format!("{plain}{other}")), 0);
        assert_eq!(advertised(&format!("{plain}{tls}")), 1);
        assert_eq!(advertised(&format!("{plain}advertised = true\n{tls}")), 0);
    }

    #[test]
    fn all_faults_come_out_at_once_with_line_key_value_and_what_is_allowed() {
        let text = r#"hostname = "a b"
public_port = 0
zone = ""
listner = 1
[[listener]]
address = "::1:79"
tls = true
client_certificate = "maybe"
[[listener]]
adress = "[::]:79"
[zookeeper]
hosts = ""
tls_cert = "relative.pem"
tls_key = "/k"
session_timeout = 40
[limits]
connections = "many"
grace = "30"
[log]
level = "loud"
"#;
        let faults = faults(text);
        let lines: Vec<_> = faults.iter().map(|fault| (fault.line, fault.key.as_str())).collect();
        assert_eq!(
            lines,
            [
                (Some(1), "hostname"),
                (Some(2), "public_port"),
                (Some(3), "zone"),
                (Some(4), "listner"),
                (Some(6), "listener.address"),
                (Some(7), "listener.tls"),
                (Some(8), "listener.client_certificate"),
                (Some(10), "listener.adress"),
                (Some(12), "zookeeper.hosts"),
                (Some(13), "zookeeper.tls_cert"),
                (Some(15), "zookeeper.session_timeout"),
                (Some(17), "limits.connections"),
                (Some(18), "limits.grace"),
                (Some(20), "log.level"),
                (None, "zookeeper.tls_ca"),
            ]
        );
        assert_eq!(
            faults[1].to_string(),
            "f.toml:2: public_port = 0: must be a whole number from 1 to 65535"
        );
        assert_eq!(
            faults[14].to_string(),
            "f.toml: zookeeper.tls_ca: missing; tls_cert, tls_key and tls_ca are needed together"
        );
    }

    #[test]
    fn syntax_faults_have_their_lines() {
        let faults = faults("zone = \nhostname = \"gw\nx y\n");
        assert!(faults.iter().any(|fault| fault.line == Some(1)), "{faults:?}");
        assert!(faults.iter().any(|fault| fault.line == Some(3)), "{faults:?}");
    }

    #[test]
    fn common_mistakes_are_named() {
        let fault = |line: &str| {
            let faults = faults(&format!("{line}\n{LEAST}"));
            assert_eq!(faults.len(), 1, "{line}: {faults:?}");
            faults[0].to_string()
        };
        for (line, expected) in [
            ("zone = west", "f.toml:1: zone = west: a string must be in quotes: \"...\""),
            ("hostname = gw.example.org", "hostname = gw.example.org: a string must be in quotes"),
            ("zone = \u{201c}west\u{201d}", "zone: typographic quotes; write \"...\""),
            ("zon = \"west\"", "zon: unknown key (did you mean zone?); known here: "),
            ("xyz = 1", "xyz: unknown key; known here: "),
            ("[limits]\ngrace = \"1s\"\n[limits]", "f.toml:3: limits: there is one already"),
            ("zone = \"a\"\nzone = \"b\"", "f.toml:2: zone: there is one already"),
        ] {
            let fault = fault(line);
            assert!(fault.contains(expected), "{line}: {fault}");
        }
    }

    #[test]
    fn the_command_socket_is_found_in_a_faulty_file() {
        let socket = |text: &str| command_socket(text);
        let found = Some(PathBuf::from("/s"));
        for faulty in ["", "grace = 5 s\n", "hostname = \"gw\nzone = west\n", "listner = 1\n"] {
            assert_eq!(socket(&format!("{faulty}[control]\nsocket = \"/s\"\n")), found, "{faulty}");
        }
        for none in ["", "[control]\nsocket = 1\n", "[control]\nsocket = \"s\"\n", "control = 1"] {
            assert_eq!(socket(none), None, "{none}");
        }
    }

    #[test]
    fn toml_under_another_name_is_known() {
        for toml in [EXAMPLE, LEAST, "[[listener]]\ntls = maybe\n"] {
            assert!(is_likely(toml), "{toml}");
        }
        for other in ["[zookeeper]\nhosts = zk:2281\n", "[zookeeper]\nport = 1\n", ""] {
            assert!(!is_likely(other), "{other}");
        }
    }

    #[test]
    fn where_the_log_goes() {
        let read = |output: &str| {
            let text = format!("{LEAST}[log]\noutput = \"{output}\"\n");
            read("f.toml", &text).map(|config| config.log.output)
        };
        assert_eq!(read("stderr"), Ok(LogOutput::Stderr));
        assert_eq!(read("/var/log/x"), Ok(LogOutput::File(PathBuf::from("/var/log/x"))));
        for bad in ["", "syslog", "fingergw.log", "~/log"] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_one_listener_is_advertised() {
        let twice = "[[listener]]\naddress = \"[::]:0\"\nadvertised = true\n".repeat(2);
        let faults = faults(&format!("{twice}{LEAST}"));
        assert_eq!(faults.len(), 1, "{faults:?}");
        assert_eq!(faults[0].reason, "only one can be advertised");
    }
}
