//! Which certificates of peers are trusted.

use std::fs;

use crate::support::certificates::{Authority, Identity};
use crate::support::system::System;
use crate::tls::served_with;

/// A second authority in `tls.ca`, written in each way that OpenSSL reads. Once it was skipped
/// without a word.
#[tokio::test]
async fn every_authority_of_the_file_is_trusted() {
    let second = Authority::new();
    let text = Identity::text(&second.ca());
    let marked = format!("\u{feff}{text}");
    let labelled = text.replace(" CERTIFICATE", " X509 CERTIFICATE");
    let trusted = text.replace(" CERTIFICATE", " TRUSTED CERTIFICATE");
    for (how, text) in [("marked", marked), ("X509", labelled), ("TRUSTED", trusted)] {
        let system = System::new().await;
        let mut identity = system.zookeeper.authority.identity("gateway");
        let both = identity.cert.with_file_name("both-authorities.pem");
        fs::write(&both, Identity::text(&identity.ca) + &text).expect("a CA file");
        identity.ca = both;
        let served = served_with(system, identity, "", "").await;
        let client = second.identity("client");
        assert!(served.serves(Some(&client)).await, "{how}");
        assert!(!served.serves(Some(&Authority::new().identity("client"))).await, "{how}");
    }
}
