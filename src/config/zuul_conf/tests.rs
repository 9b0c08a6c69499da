use super::*;

const LEAST: &str = "[zookeeper]\nhosts = zk:2281/zuul\ntls_cert = c\ntls_key = k\ntls_ca = a\n";

fn conf(fingergw: &str) -> Result<Config, ConfigErrors> {
    read("zuul.conf", &format!("{LEAST}[fingergw]\n{fingergw}\n"), [])
}

#[test]
fn defaults_are_those_of_zuul() {
    let config = read("zuul.conf", LEAST, []).unwrap();
    let listener = Listener { advertised: true, ..Listener::plain("::", 79) };
    assert_eq!(config.listeners, [listener]);
    assert_eq!(config.zookeeper.session_timeout, Duration::from_secs(120));
    assert_eq!(config.zookeeper.hosts.to_string(), "zk:2281/zuul");
    assert!(config.name_check == NameCheck::SanOrCommonName && !config.zookeeper.verify_hostnames);
    assert_eq!((config.zone, config.public_port, config.hostname), (None, None, None));
    assert_eq!(config.pid_file, Some(PathBuf::from("/var/run/zuul/fingergw.pid")));
    assert_eq!(config.control, Some(PathBuf::from("/var/lib/zuul/fingergw.socket")));
    assert_eq!(config.log, Log { format: LogFormat::Zuul, ..Log::default() });
}

#[test]
fn every_option_is_read() {
    let config = conf(
        "listen_address = 127.0.0.1\nport = 9079\npublic_port = 79\nhostname = gw\nzone = w\n\
         tls_cert = /c\ntls_key = /k\ntls_ca = /a\ntls_verify_hostnames = off\nuser = zuul\n\
         command_socket = ~/s\n\
         state_dir = /x\nprometheus_port = 9090\nprometheus_addr = ::1",
    )
    .unwrap();
    assert_eq!(
        config.listeners,
        [Listener {
            tls: Some(ClientCertificate::Required),
            advertised: true,
            ..Listener::plain("127.0.0.1", 9079)
        }]
    );
    assert_eq!(config.public_port, Some(79));
    assert_eq!(config.admin, Some(("::1".to_owned(), 9090)));
    assert_eq!((config.hostname.as_deref(), config.zone.as_deref()), (Some("gw"), Some("w")));
    assert_eq!(config.name_check, NameCheck::Off);
    assert_eq!(config.tls.unwrap().ca, PathBuf::from("/a"));
    assert_eq!(config.user.as_deref(), Some("zuul"));
    assert_eq!(config.control, Some(PathBuf::from("~/s")), "as in Zuul, not expanded");
}

#[test]
fn manual_page_has_the_options_that_are_read_and_no_others() {
    let (_, page) =
        include_str!("../../../docs/zuul-fingergw.8").split_once("\n.SH ZUUL.CONF\n").unwrap();
    let (page, _) = page.split_once("\n.SH ").unwrap();
    let mut documented = Vec::new();
    let mut section = "";
    let mut previous = "";
    for line in page.lines() {
        if let Some(name) = line.strip_prefix(".SS ") {
            section = name.trim_matches(['[', ']']);
        } else if previous == ".TP" {
            let (_, options) = line.split_once(' ').expect("a macro and the options");
            documented.extend(options.split(" \", \" ").map(|option| (section, option)));
        }
        previous = line;
    }
    // Not read without the feature.
    documented.retain(|(section, option)| {
        cfg!(feature = "otlp") || *section != TRACING || *option == "enabled"
    });
    documented.sort_unstable();
    let known = |section, option| match section {
        FINGERGW => FINGERGW_OPTIONS.contains(&option),
        ZOOKEEPER => ZOOKEEPER_OPTIONS.contains(&option),
        _ => true,
    };
    assert!(documented.iter().all(|(section, option)| known(*section, option)), "{documented:?}");
    // While tracing is off no other option of it is read.
    let ini = Ini::parse("[tracing]\nenabled = yes\n", []).unwrap();
    let mut reader = Reader::new("zuul.conf", ini);
    config(&mut reader);
    assert_eq!(documented, reader.known.into_iter().collect::<Vec<_>>());
}

#[test]
fn tls_client_only_leaves_the_listener_plain() {
    let files = "tls_cert = /c\ntls_key = /k\ntls_ca = /a\ntls_client_only = Yes";
    let config = conf(files).unwrap();
    assert!(config.listeners[0].tls.is_none() && config.tls.is_some());
}

#[test]
fn unknown_options_and_sections_are_warned_of() {
    let text = "[finger]\nport = 79\n[zookeeper]\nhost = a\nhosts = zk:2281\ntls_cert = %(dir)s/c\n\
                tls_key = k\ntls_ca = a\nDIR = /etc\nread_only = true\n[web]\nprot = 1\n";
    let environment = [("ZUUL_HOST".to_owned(), "x".to_owned())];
    let read = |text: &str| read("zuul.conf", text, environment.clone()).unwrap().warnings();
    assert_eq!(
        read(text),
        [
            "zuul.conf: [finger]: unknown section, ignored; did you mean [fingergw]?",
            "zuul.conf:4: [zookeeper] host: unknown option, ignored; did you mean hosts?",
            "zuul.conf:10: [zookeeper] read_only: unknown option, ignored",
        ]
    );
    let mut text = format!("{LEAST}[fingergw]\nstate_dir = /x\n");
    for section in [
        "scheduler",
        "executor",
        "merger",
        "web",
        "launcher",
        "keystore",
        "statsd",
        "database",
        "tracing",
        "webclient",
        "gearman",
        "connection fingergw",
        "auth zookeeper",
    ] {
        text.push_str(&format!("[{section}]\nlisten_adress = x\n"));
    }
    assert_eq!(read(&text), [""; 0]);
    assert_eq!(
        conf("listen_adress = ::1").unwrap().warnings(),
        ["zuul.conf:7: [fingergw] listen_adress: unknown option, ignored; did you mean \
             listen_address?"]
    );
}

#[test]
fn zookeeper_without_a_port_or_at_the_plain_port_is_warned_of() {
    let warnings = |hosts: &str| {
        let text = format!("[zookeeper]\nhosts = {hosts}\ntls_cert = c\ntls_key = k\ntls_ca = a\n");
        read("zuul.conf", &text, []).unwrap().warnings()
    };
    assert_eq!(warnings("zk1:2281,zk2:2281"), [""; 0]);
    for hosts in ["zk1", "zk1:2281,zk2", "zk1:2181"] {
        let warnings = warnings(hosts);
        let [warning] = warnings.as_slice() else { panic!("{hosts}: {warnings:?}") };
        assert!(warning.starts_with("zuul.conf:2: [zookeeper] hosts: zk"), "{warning}");
        assert!(warning.contains("set the port with TLS, usually zk"), "{warning}");
    }
}

#[test]
fn tilde_is_expanded_as_by_python() {
    let home = |user: &OsStr| match user.to_str()? {
        "" => Some(PathBuf::from("/root")),
        "zuul" => Some(PathBuf::from("/var/lib/zuul")),
        _ => None,
    };
    let cases = [
        ("~/gw.pid", "/root/gw.pid"),
        ("~zuul/run/gw.pid", "/var/lib/zuul/run/gw.pid"),
        ("~nobody-known/gw.pid", "~nobody-known/gw.pid"),
        ("/run/~/gw.pid", "/run/~/gw.pid"),
        ("gw.pid", "gw.pid"),
        ("~", "/root"),
    ];
    for (path, expanded) in cases {
        assert_eq!(expand_home(Path::new(path), home), Path::new(expanded), "{path}");
    }
}

#[test]
fn unusual_values_are_read_as_by_zuul() {
    let port_alone = conf("prometheus_port = 0").unwrap();
    assert_eq!(port_alone.admin, Some(("0.0.0.0".to_owned(), 0)));
    assert_eq!(conf("prometheus_addr = ::1").unwrap().admin, None);
    assert_eq!(conf("public_port = 0").unwrap().public_port, None);
    assert_eq!(conf("user =").unwrap().user, None);
    assert_eq!(conf("command_socket =").unwrap().control, None);
    assert_eq!(conf("zone =").unwrap().zone.as_deref(), Some(""));
    assert_eq!(conf("port = +7_9").unwrap().listeners[0].port, 79);
    for bad in ["port = 0x4f", "port = _79", "port = 79 ; x", "port = ++79", "port = -1"] {
        assert!(conf(bad).is_err(), "{bad}");
    }
}

#[test]
fn port_and_prometheus_port_must_differ() {
    let same =
        conf("port = 9079\nprometheus_port = 9079\nlisten_address = ::1\nprometheus_addr = ::1");
    let errors = same.expect_err("an error");
    let error = errors.list()[0].to_string();
    let expected = "zuul.conf:8: [fingergw] prometheus_port = 9079: the listener on [::1]:9079";
    assert!(errors.list().len() == 1 && error.starts_with(expected), "{error}");
    let overlapping = conf("port = 9079\nprometheus_port = 9079").expect("no error").warnings();
    let expected = "the addresses [::]:9079 and 0.0.0.0:9079 overlap: ";
    assert!(overlapping.len() == 1 && overlapping[0].starts_with(expected), "{overlapping:?}");
    assert_eq!(conf("port = 0\nprometheus_port = 0").expect("no error").warnings(), [""; 0]);
}

#[test]
fn command_socket_is_found_in_a_file_with_errors() {
    let environment = [("ZUUL_RUN".to_owned(), "/run/z".to_owned())];
    let socket = |text: &str| command_socket(text, environment.clone());
    let path = |path: &str| Some(PathBuf::from(path));
    for errory in ["port 79\n", "port = 1\nport = 2\n", "port = x\n", " = 5\n"] {
        let text = format!("stray\n[fingergw]\n{errory}");
        assert_eq!(socket(&text), path(COMMAND_SOCKET), "{text}");
        assert_eq!(socket(&format!("{text}command_socket = /s\n")), path("/s"), "{text}");
        let twice = format!("[fingergw]\ncommand_socket = /s\n[fingergw]\n{errory}");
        assert_eq!(socket(&twice), path("/s"), "{twice}");
    }
    let text = "[fingergw]\ncommand_socket = %(zuul_run)s/s\nstray\n";
    assert_eq!(socket(text), path("/run/z/s"));
    assert_eq!(socket("[fingergw]\ncommand_socket =\nstray\n"), None, "switched off");
    // The section may be hidden, so the default is not known to be ours.
    assert_eq!(socket("[web]\n[fingergw\ncommand_socket = /s\n"), None);
    assert_eq!(socket(LEAST), path(COMMAND_SOCKET));
}

#[test]
fn all_errors_are_reported_together() {
    let text = "[zookeeper]\nhosts =\ntls_cert = c\n[fingergw]\nport = x\ntls_key = k\nzone = a/b\n\
                tls_client_only = maybe\nhostname = 5%\n[other]\nbad = 5%\n";
    let errors = read("zuul.conf", text, []).unwrap_err();
    let keys: Vec<_> = errors.list().iter().map(|error| (error.line, error.key.as_str())).collect();
    assert_eq!(
        keys,
        [
            (Some(2), "[zookeeper] hosts"),
            (Some(5), "[fingergw] port"),
            (Some(7), "[fingergw] zone"),
            (Some(8), "[fingergw] tls_client_only"),
            (Some(9), "[fingergw] hostname"),
            (None, "[fingergw] tls_cert"),
            (None, "[fingergw] tls_ca"),
            (None, "[zookeeper] tls_key"),
            (None, "[zookeeper] tls_ca"),
        ]
    );
}

#[test]
fn tracing_is_read_as_by_zuul() {
    let traced = |lines: &str| conf(&format!("[tracing]\n{lines}")).map(|config| config.tracing);
    for off in ["", "enabled =", "enabled = maybe\nprotocol = x", "enabled = no\nbad = 5%"] {
        assert_eq!(traced(off), Ok(None), "{off}");
    }
    for on in ["1", "on", "Yes", "TRUE"] {
        let config = traced(&format!("enabled = {on}")).unwrap().unwrap();
        assert_eq!(config.endpoint.to_string(), "http://localhost:4317/");
        assert_eq!((config.service_name.as_str(), config.timeout.as_secs()), ("zuul", 10));
    }
    if !cfg!(feature = "otlp") {
        assert!(traced("enabled = true\nprotocol = x").is_ok(), "as Zuul's gateway");
        return;
    }
    let empty = "endpoint =\ntls_ca =\ncertificate_file =\ncompression =\ninsecure = off\n";
    let http = traced(&format!("enabled = true\nprotocol = http/protobuf\n{empty}"));
    assert_eq!(http.unwrap().unwrap().endpoint.to_string(), "http://localhost:4318/v1/traces");
}

#[cfg(feature = "otlp")]
#[test]
fn all_errors_of_tracing_are_reported() {
    let errors = |lines: &str| -> Vec<_> {
        let read = conf(&format!("[tracing]\nenabled = true\n{lines}")).unwrap_err();
        read.list().iter().map(|error| (error.line, error.key.clone())).collect()
    };
    let key = |line, key: &str| (line, format!("[tracing] {key}"));
    assert_eq!(
        errors("protocol = http\ntimeout = x\ncompression = br\nendpoint = 5%"),
        [
            key(Some(9), "protocol"),
            key(Some(10), "timeout"),
            key(Some(11), "compression"),
            key(Some(12), "endpoint"),
        ]
    );
    assert_eq!(
        errors("protocol = http/protobuf\ninsecure = yes\ntls_key = /k\nendpoint = c:1"),
        [key(Some(10), "insecure"), key(Some(11), "tls_key"), key(Some(12), "endpoint")]
    );
    assert_eq!(errors("certificate_file = /c"), [key(Some(9), "certificate_file")]);
    assert_eq!(errors("tls_key = /c"), [key(None, "tls_cert")]);
}

#[test]
fn tracing_without_effect_is_warned_of() {
    let warnings =
        |lines: &str| conf(&format!("[tracing]\nenabled = true\n{lines}")).unwrap().warnings();
    let tls_in_vain = warnings("tls_ca = /a");
    if cfg!(feature = "otlp") {
        assert!(warnings("").is_empty());
        assert!(tls_in_vain[0].contains("http://localhost:4317/ is used without TLS"));
        assert!(warnings("tls_ca = /a\nendpoint = https://c:1").is_empty());
    } else {
        assert!(tls_in_vain.len() == 1 && tls_in_vain[0].contains("--features otlp"));
    }
}

#[test]
fn file_that_python_refuses_has_all_syntax_errors_reported() {
    let errors = read("zuul.conf", "[a]\nb\n[a]\n", []).unwrap_err();
    assert_eq!(errors.list().len(), 2);
    assert_eq!(
        errors.list()[0].to_string(),
        "zuul.conf:2: neither \"option = value\" nor a [section]"
    );
}
