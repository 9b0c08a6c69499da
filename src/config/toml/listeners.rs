//! The listeners of our TOML, their access rules, and the address for health and metrics.

use super::reader::{Found, Table};
use crate::config::{
    ClientCertificate, DEFAULT_HOST, DEFAULT_PORT, Listener, Rule, check_address_is_free, parse,
};

/// Reads all listeners. `has_tls_files` is whether there are certificates for those with TLS.
pub(super) fn listeners(root: &mut Table<'_>, has_tls_files: bool) -> Vec<Listener> {
    let mut listeners: Vec<Listener> = Vec::new();
    for (found, table) in root.tables("listener", "listener") {
        let listener = listener(found, table, has_tls_files, &listeners);
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
        _ => {
            let found = root.find("listener");
            root.error("listener", found, "only one can be advertised".to_owned());
        }
    }
    listeners
}

/// Reads the listener of `table`, which is `found` in the document after the listeners `before`.
fn listener(
    found: Found<'_>,
    mut table: Table<'_>,
    has_tls_files: bool,
    before: &[Listener],
) -> Listener {
    let given = table.find("address");
    let (host, port) = match (table.text("address", parse::address), given) {
        (Some(address), _) => address,
        (None, None) => (DEFAULT_HOST.to_owned(), DEFAULT_PORT),
        // An error already; port 0 is not the address of another listener.
        (None, Some(_)) => (DEFAULT_HOST.to_owned(), 0),
    };
    if let Err(reason) = check_address_is_free(&host, port, before) {
        table.error("address", given.or(Some(found)), reason);
    }
    let tls = table.boolean("tls").unwrap_or(false);
    if tls && !has_tls_files {
        let found = table.find("tls");
        table.error("tls", found, "needs the certificate files of [tls]".to_owned());
    }
    let policies = [
        ("required", ClientCertificate::Required),
        ("optional", ClientCertificate::Optional),
        ("none", ClientCertificate::None),
    ];
    let policy = table.choice("client_certificate", &policies);
    let tls = tls.then_some(policy.unwrap_or(ClientCertificate::Required));
    let advertised = table.boolean("advertised").unwrap_or(false);
    let proxy_protocol = table.list("proxy_protocol", parse::network).unwrap_or_default();
    let mut allow = Vec::new();
    for (found, inner) in table.tables("allow", "listener.allow") {
        if found.get_ref().as_table().is_some_and(|table| table.is_empty()) {
            let reason = "must have networks, tenants or clients; leave out all [[listener.allow]] of \
                          a listener that is open to every client";
            table.error("allow", Some(found), reason.to_owned());
        }
        allow.push(rule(inner, tls));
    }
    table.reject_unknown_keys();
    Listener { host, port, tls, advertised, proxy_protocol, allow }
}

/// Reads a rule of a listener that requests client certificates as `policy` requires.
fn rule(mut table: Table<'_>, policy: Option<ClientCertificate>) -> Rule {
    let rule = Rule {
        networks: table.non_empty_list("networks", parse::network),
        tenants: table.non_empty_list("tenants", parse::tenant),
        clients: table.non_empty_list("clients", parse::client),
    };
    let reason = match policy {
        None => Some("this listener has no TLS: set tls = true, or leave this key out"),
        Some(ClientCertificate::None) => Some(
            "this listener requests no certificates: set client_certificate to \"required\" or \
             \"optional\", or leave this key out",
        ),
        Some(ClientCertificate::Required | ClientCertificate::Optional) => None,
    };
    if let (Some(found), Some(reason)) = (table.find("clients"), reason) {
        table.error("clients", Some(found), reason.to_owned());
    }
    table.reject_unknown_keys();
    rule
}

/// Reads the address for health and metrics, which none of `listeners` may have.
pub(super) fn admin(mut table: Table<'_>, listeners: &[Listener]) -> Option<(String, u16)> {
    let address = table.text("address", |text| {
        let (host, port) = parse::address(text)?;
        check_address_is_free(&host, port, listeners)?;
        Ok((host, port))
    });
    table.reject_unknown_keys();
    address
}
