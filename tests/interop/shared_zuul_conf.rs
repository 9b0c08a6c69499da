//! Zuul's gateway and ours run from the same `zuul.conf`.

use crate::executor::{Executor, new_build, pieces};
use crate::support::client::{Client, Ending};
use crate::support::gateway::Builder;
use crate::support::system::{Entry, System};
use crate::zuul_conf::ZuulConf;
use crate::zuul_gateway::ZuulGateway;

/// Other contents of a real site's `zuul.conf`: sections of other services, keys that gateways
/// ignore.
const REST: &str = r#"state_dir = /var/lib/zuul

[scheduler]
tenant_config = /etc/zuul/main.yaml

[executor]
finger_port = 7900
private_key_file = %(ZUUL_HOME)s/id_rsa
trusted_ro_paths = /opt/zuul
    /opt/more

# A password with the sign of interpolation in it.
[connection "gerrit"]
driver: gerrit
password = 100%%
"#;

/// Both programs register the same values, and serve the same build to TLS clients.
#[tokio::test]
async fn both_programs_run_from_one_file() {
    let system = System::new().await;
    let identity = system.zookeeper.authority.identity("gateway");
    let lines = format!("{}{REST}", identity.zuul_conf());
    let conf = ZuulConf::gateway(&system, "west", &lines);
    let mut executor = Executor::start(&system, Some("west")).await;
    let theirs = ZuulGateway::start(&system, &conf).await;
    let ours = conf.ours().await;

    let entries =
        system.until("both to run", |all| all.len() == 2 && all.iter().all(is_running)).await;
    let announced = |port: u16| {
        let entry = entries.iter().find(|entry| entry.content["public_port"] == port);
        let mut content = entry.expect("an entry with the port").content.clone();
        content.as_object_mut().expect("an object").retain(|key, _| {
            // Values that must differ.
            key != "public_port" && key != "version"
        });
        content
    };
    assert_eq!(announced(ours.port()), announced(theirs.address.port()));

    for (build, expected) in [(new_build(), "Build not found"), {
        let build = new_build();
        executor.submit(&build, Some("west")).await;
        (build, "Build did not start yet")
    }] {
        let text = Client::ask_tls(ours.address(), &identity, &build).await.text().await;
        assert_eq!(text.trim_end(), expected);
        let (text, _) = Client::ask_tls(theirs.address, &identity, &build).await.rest().await;
        assert_eq!(String::from_utf8_lossy(&text), expected);
    }

    let (build, mut log) = executor.run(Some("west")).await;
    let mut at_ours = Client::ask_tls(ours.address(), &identity, &build).await;
    let mut at_theirs = Client::ask_tls(theirs.address, &identity, &build).await;
    for piece in pieces() {
        log.write(&piece);
        at_ours.expect(&piece).await;
        at_theirs.expect(&piece).await;
    }
    log.remove();
    assert_eq!(at_ours.rest().await, (Vec::new(), Ending::Clean));
    assert_eq!(at_theirs.rest().await, (Vec::new(), Ending::Truncated));
}

/// `tls_client_only`: a plain listener, and certificates for the connection to the other zone.
#[tokio::test]
async fn both_programs_dial_by_tls_only() {
    let system = System::new().await;
    let identity = system.zookeeper.authority.identity("gateway");
    let lines = format!("{}tls_client_only = true\n", identity.zuul_conf());
    let conf = ZuulConf::gateway(&system, "east", &lines);
    let theirs = ZuulGateway::start(&system, &conf).await;
    let ours = conf.ours().await;
    let there = Builder::new(&system).zone("west").tls(&identity).listeners(&["tls = true"]);
    let mut there = there.ready().await;
    let mut executor = Executor::start(&system, Some("west")).await;

    for address in [ours.address(), theirs.address] {
        let (build, log) = executor.run(Some("west")).await;
        let mut client = Client::ask(address, &build).await;
        assert_eq!(log.grow(&pieces(), &mut client).await, Ending::Clean);
        there.logged("a stream of the build", |line| line.contains(&build)).await;
    }
}

fn is_running(entry: &Entry) -> bool {
    entry.content["state"] == "running"
}
