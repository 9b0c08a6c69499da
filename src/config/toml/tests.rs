use super::*;
use crate::config::error::ConfigError;
use crate::config::{Listener, Rule};

const EXAMPLE: &str = include_str!("../../../etc/zuul-fingergw.toml");
const LEAST: &str = r#"
    [zookeeper]
    hosts = "zk1.example.org:2281"
    tls_cert = "/c"
    tls_key = "/k"
    tls_ca = "/a"
"#;

fn errors(text: &str) -> Vec<ConfigError> {
    read("f.toml", text).err().map(|errors| errors.list().to_vec()).unwrap_or_default()
}

/// The example file with its commented keys: those that show defaults or, with `examples`, all.
fn uncommented(examples: bool) -> String {
    let mut text = String::new();
    for line in EXAMPLE.lines() {
        let setting = line.strip_prefix('#').filter(|rest| !rest.starts_with([' ', '#']));
        let is_example = line.ends_with("# example");
        // A rule that names clients needs TLS.
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
fn example_file_is_valid() {
    assert_eq!(errors(EXAMPLE), []);
}

#[test]
fn example_file_shows_the_defaults() {
    let shown = read("f.toml", &uncommented(false)).unwrap();
    assert_eq!(shown, read("f.toml", EXAMPLE).unwrap());
    let text = uncommented(false);
    assert!(text.contains("\ngrace = ") && text.contains("\n[[listener]]"), "reads nothing");
}

/// Variants of the text with an unknown key in one table each, and the line of the key.
fn mutants(text: &str) -> Vec<(String, usize)> {
    let headers = text
        .match_indices("\n[")
        .map(|(header, _)| header + 1 + text[header + 1..].find('\n').expect("a line's end") + 1);
    let mutant = |at: usize| {
        let mutant = format!("{}spurious = 1\n{}", &text[..at], &text[at..]);
        (mutant, 1 + text[..at].matches('\n').count())
    };
    headers.chain([0]).map(mutant).collect()
}

#[test]
fn unknown_key_in_any_table_is_an_error() {
    let mutants = mutants(&uncommented(true));
    assert_eq!(mutants.len(), 10, "tables");
    for (mutant, line) in mutants {
        let errors = errors(&mutant);
        assert_eq!(errors.len(), 1, "{errors:?}");
        assert!(errors[0].key.ends_with("spurious"), "{errors:?}");
        assert_eq!(errors[0].line, Some(line));
    }
}

/// The error for an unknown key lists the known ones.
#[test]
fn example_file_has_every_key() {
    let text = uncommented(true);
    let mut keys = 0;
    for (mutant, line) in mutants(&text) {
        let table = mutant.lines().skip(line);
        let table: Vec<_> = table.take_while(|line| !line.starts_with('[')).collect();
        let error = errors(&mutant).pop().expect("the spurious key");
        let (_, known) = error.reason.split_once("known here: ").expect("the known keys");
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
fn every_key_of_the_example_file_has_a_comment() {
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
fn missing_keys_have_defaults() {
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
        .map_err(|errors| errors.list().iter().map(ToString::to_string).collect())
}

#[test]
fn tracing_that_is_off_is_still_checked() {
    assert_eq!(traced(""), Ok(None));
    assert_eq!(traced("certificate_file = \"/f\"\ntls_ca = \"/f\""), Ok(None), "as in Zuul");
    let typo = traced("protocol = \"http\"").unwrap_err();
    assert!(typo[0].ends_with("must be one of \"grpc\", \"http/protobuf\""), "{typo:?}");
}

#[cfg(not(feature = "otlp"))]
#[test]
fn tracing_without_the_feature_is_an_error() {
    let errors = traced("enabled = true\ninsecure = true\n").unwrap_err();
    let expected = "f.toml:8: tracing.enabled = true: this program was built without it: build it \
                    with cargo's feature otlp";
    assert_eq!(errors, [expected]);
}

#[cfg(feature = "otlp")]
#[test]
fn tracing_options_are_read() {
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
    let http = traced("enabled = true\nprotocol = \"http/protobuf\"\ncertificate_file = \"/a\"");
    assert_eq!(http.unwrap().unwrap().authorities, Some(PathBuf::from("/a")));
    let errors =
        traced("enabled = true\nprotocol = \"http/protobuf\"\ntls_ca = \"/a\"\nendpoint = \"c:1\"");
    let errors = errors.unwrap_err();
    assert_eq!(errors.len(), 2, "{errors:?}");
    let expected = "f.toml:10: tracing.tls_ca = \"/a\": is for protocol grpc only; ";
    assert!(errors[0].starts_with(expected), "{errors:?}");
    assert!(errors[1].contains("tracing.endpoint = \"c:1\": must be http://"), "{errors:?}");
}

#[test]
fn name_check_follows_two_keys() {
    let names =
        |lines: &str| read("f.toml", &format!("[tls]\n{lines}\n{LEAST}")).unwrap().name_check;
    assert_eq!(names(""), NameCheck::SanOrCommonName);
    assert_eq!(names("common_name_fallback = false"), NameCheck::SanOnly);
    assert_eq!(names("verify_hostnames = false"), NameCheck::Off);
}

const FILES: &str = "[tls]\ncert = \"/c\"\nkey = \"/k\"\nca = \"/a\"\n";

#[test]
fn rules_of_listeners_are_read() {
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
fn errors_of_rules_have_line_and_reason() {
    let error = |listener: &str| {
        let errors = errors(&format!("[[listener]]\n{listener}\n{FILES}{LEAST}"));
        assert_eq!(errors.len(), 1, "{listener}: {errors:?}");
        errors[0].to_string()
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
            "f.toml:3: listener.allow.networks = []: must have at least one entry",
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
            "listener.allow.clients = [\"a\"]: this listener has no TLS: set tls = true",
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
        let error = error(listener);
        assert!(error.contains(expected), "{listener}: {error}");
    }
}

#[test]
fn examples_of_the_access_page_are_valid() {
    let page = include_str!("../../../docs/access.md");
    let examples = page.split("```toml\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    let mut rules = 0;
    for example in examples {
        let config = read("f.toml", &format!("{example}{FILES}{LEAST}")).unwrap();
        assert_eq!(config.warnings(), [""; 0]);
        rules += config.listeners.iter().map(|listener| listener.allow.len()).sum::<usize>();
    }
    assert_eq!(rules, 5);
}

#[test]
fn open_listeners_and_open_proxy_networks_are_warned_of() {
    let warnings =
        |listeners: &str| read("f.toml", &format!("{listeners}{FILES}{LEAST}")).unwrap().warnings();
    let rule = "[[listener.allow]]\ntenants = [\"a\"]\n";
    let plain = "[[listener]]\naddress = \"[::]:79\"\n";
    let tls = "[[listener]]\naddress = \"gw:7979\"\ntls = true\n";
    assert_eq!(warnings(&format!("{plain}{tls}")), [""; 0]);
    assert_eq!(warnings(&format!("{plain}{rule}{tls}")), [""; 0], "its clients have certificates");
    let open = warnings(&format!("{plain}{tls}{rule}"));
    assert_eq!(open.len(), 1);
    assert!(
        open[0].starts_with("the listener on gw:7979 has rules and the one on [::]:79 has none")
    );
    let optional = format!("{tls}client_certificate = \"optional\"\n");
    assert_eq!(warnings(&format!("{plain}{rule}{optional}")).len(), 1);
    let all = warnings(&format!("{plain}proxy_protocol = [\"10.0.0.0/8\", \"::/0\"]\n"));
    assert!(
        all.len() == 1 && all[0].contains("trusts PROXY headers from every address"),
        "{all:?}"
    );
}

#[test]
fn same_address_twice_is_an_error_and_overlap_a_warning() {
    let text = |listeners: &[&str], admin: &str| {
        let table = |address| format!("[[listener]]\naddress = \"{address}\"\n");
        let listeners: String = listeners.iter().map(table).collect();
        format!("{listeners}[admin]\naddress = \"{admin}\"\n{LEAST}")
    };
    let good = ["[::]:0", "[::]:0", "127.0.0.1:79", "127.0.0.2:79", "[::1]:79", "gw:79"];
    assert_eq!(errors(&text(&good, "127.0.0.1:9090")), []);
    for bad in [["[::]:79", "[::]:79"], ["gw.example.org:79", "GW.example.org.:79"]] {
        let errors = errors(&text(&bad, "127.0.0.1:9090"));
        let expected = format!("f.toml:4: listener.address = \"{}\": the listener on ", bad[1]);
        assert!(errors.len() == 1 && errors[0].to_string().starts_with(&expected), "{errors:?}");
    }
    let default = errors(&format!("[[listener]]\n[[listener]]\n{LEAST}"));
    let default: Vec<_> = default.iter().map(ToString::to_string).collect();
    let expected =
        "f.toml:2: listener.address = [[listener]]: the listener on [::]:79 has this address";
    assert!(default.len() == 1 && default[0].starts_with(expected), "{default:?}");
    let errors = errors(&text(&["127.0.0.1:79"], "127.0.0.1:79"));
    assert_eq!(errors.len(), 1);
    assert!(errors[0].to_string().starts_with("f.toml:4: admin.address"), "{errors:?}");

    // These work if a service manager passes sockets for one version of IP each.
    for [one, other] in [
        ["[::]:79", "127.0.0.1:79"],
        ["[::1]:79", "[::]:79"],
        ["[::]:79", "0.0.0.0:79"],
        ["0.0.0.0:79", "192.0.2.1:79"],
    ] {
        let expected = format!("the addresses {one} and {other} overlap: ");
        let pair = text(&[one, other], "127.0.0.1:9090");
        for text in [pair, text(&[one], other)] {
            let warnings = read("f.toml", &text).expect("no error").warnings();
            assert!(warnings.len() == 1 && warnings[0].starts_with(&expected), "{warnings:?}");
        }
    }
    let apart = text(&["0.0.0.0:79", "[2001:db8::1]:79", "[::]:0"], "0.0.0.0:0");
    assert_eq!(read("f.toml", &apart).expect("no error").warnings(), [""; 0]);
}

#[test]
fn plain_advertised_listener_of_a_zone_with_certificates_is_warned_of() {
    let warnings = |text: &str| read("f.toml", &format!("{text}{LEAST}")).unwrap().warnings();
    let tls = "[[listener]]\naddress = \"[::]:7979\"\ntls = true\n";
    let zone = "zone = \"west\"\n";
    assert_eq!(warnings(&format!("{zone}{tls}{FILES}")), [""; 0]);
    assert_eq!(warnings(zone), [""; 0], "there are no certificates");
    assert_eq!(warnings(FILES), [""; 0], "no zone");
    let plain = warnings(&format!("{zone}{FILES}"));
    assert!(plain.len() == 1 && plain[0].contains("logs of zone west"), "{plain:?}");
    let plain = "[[listener]]\naddress = \"[::]:79\"\nadvertised = true\n";
    assert_eq!(warnings(&format!("{zone}{plain}{tls}{FILES}")).len(), 1);
}

#[test]
fn first_tls_listener_is_advertised_by_default() {
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
fn all_errors_are_reported_together_with_line_key_value_and_reason() {
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
    let errors = errors(text);
    let lines: Vec<_> = errors.iter().map(|error| (error.line, error.key.as_str())).collect();
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
        errors[1].to_string(),
        "f.toml:2: public_port = 0: must be a whole number from 1 to 65535"
    );
    assert_eq!(
        errors[14].to_string(),
        "f.toml: zookeeper.tls_ca: missing; tls_cert, tls_key and tls_ca are needed together"
    );
}

#[test]
fn syntax_errors_have_lines() {
    let errors = errors("zone = \nhostname = \"gw\nx y\n");
    assert!(errors.iter().any(|error| error.line == Some(1)), "{errors:?}");
    assert!(errors.iter().any(|error| error.line == Some(3)), "{errors:?}");
}

#[test]
fn errors_of_common_mistakes_name_the_fix() {
    let error = |line: &str| {
        let errors = errors(&format!("{line}\n{LEAST}"));
        assert_eq!(errors.len(), 1, "{line}: {errors:?}");
        errors[0].to_string()
    };
    for (line, expected) in [
        ("zone = west", "f.toml:1: zone = west: a string must be in quotes: \"...\""),
        ("hostname = gw.example.org", "hostname = gw.example.org: a string must be in quotes"),
        ("zone = \u{201c}west\u{201d}", "zone: typographic quotes; write \"...\""),
        ("zon = \"west\"", "zon: unknown key (did you mean zone?); known here: "),
        ("xyz = 1", "xyz: unknown key; known here: "),
        ("[limits]\ngrace = \"1s\"\n[limits]", "f.toml:3: limits: is defined twice"),
        ("zone = \"a\"\nzone = \"b\"", "f.toml:2: zone: is defined twice"),
    ] {
        let error = error(line);
        assert!(error.contains(expected), "{line}: {error}");
    }
}

#[test]
fn command_socket_is_found_in_a_file_with_errors() {
    let socket = |text: &str| command_socket(text);
    let found = Some(PathBuf::from("/s"));
    for errory in ["", "grace = 5 s\n", "hostname = \"gw\nzone = west\n", "listner = 1\n"] {
        assert_eq!(socket(&format!("{errory}[control]\nsocket = \"/s\"\n")), found, "{errory}");
    }
    for none in ["", "[control]\nsocket = 1\n", "[control]\nsocket = \"s\"\n", "control = 1"] {
        assert_eq!(socket(none), None, "{none}");
    }
}

#[test]
fn toml_in_a_file_with_another_name_is_recognized() {
    for toml in [EXAMPLE, LEAST, "[[listener]]\ntls = maybe\n"] {
        assert!(is_likely(toml), "{toml}");
    }
    for other in ["[zookeeper]\nhosts = zk:2281\n", "[zookeeper]\nport = 1\n", ""] {
        assert!(!is_likely(other), "{other}");
    }
}

#[test]
fn log_output_is_a_stream_or_an_absolute_path() {
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
fn second_advertised_listener_is_an_error() {
    let twice = "[[listener]]\naddress = \"[::]:0\"\nadvertised = true\n".repeat(2);
    let errors = errors(&format!("{twice}{LEAST}"));
    assert_eq!(errors.len(), 1, "{errors:?}");
    assert_eq!(errors[0].reason, "only one can be advertised");
}
