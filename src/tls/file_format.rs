//! Recognizes certificate files in other formats than PEM and names the command that converts them.

use std::path::Path;

use anyhow::{Error, anyhow};
use rustls::pki_types::PrivateKeyDer;
use x509_parser::asn1_rs::{Oid, oid};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::certificate_lint::quoted;
use super::private_key::elements;

/// The content types of PKCS#7 with certificates, and of PKCS#12 (RFC 2315, section 14; RFC 7292,
/// section 4).
const SIGNED_DATA: Oid<'static> = oid!(1.2.840.113549.1.7.2);
const DATA: Oid<'static> = oid!(1.2.840.113549.1.7.1);

/// Returns an error with the format of a file that is not PEM, and the command that converts it.
pub(crate) fn other_format(path: &Path, bytes: &[u8]) -> Option<Error> {
    if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) {
        let (shown, pem) = (quoted(path), quoted(format!("{}.pem", path.display())));
        return Some(anyhow!(
            "{}: is UTF-16, not PEM; convert it: iconv -f UTF-16 -t UTF-8 {shown} >{pem}",
            path.display()
        ));
    }
    // Text around PEM blocks may have any encoding.
    if std::str::from_utf8(bytes).is_ok() || contains_begin(bytes) {
        return None;
    }
    let (name, shown) = (path.display(), quoted(path));
    let pem = quoted(format!("{name}.pem"));
    let (format, command) = if X509Certificate::from_der(bytes).is_ok() {
        ("DER", format!("openssl x509 -inform DER -in {shown} -out {pem}"))
    } else if first_oids(bytes).contains(&SIGNED_DATA) {
        ("PKCS#7", format!("openssl pkcs7 -inform DER -in {shown} -print_certs -out {pem}"))
    } else if first_oids(bytes).contains(&DATA) {
        ("PKCS#12", format!("openssl pkcs12 -in {shown} -nodes -out {pem}"))
    } else if PrivateKeyDer::try_from(bytes).is_ok() {
        ("DER", format!("openssl pkey -inform DER -in {shown} -out {pem}"))
    } else {
        return Some(anyhow!(
            "{name}: is not PEM (binary data); show its content: openssl storeutl -noout {shown}"
        ));
    };
    Some(anyhow!("{name}: is {format}, not PEM; convert it: {command}"))
}

fn contains_begin(bytes: &[u8]) -> bool {
    let begin = b"-----BEGIN ";
    bytes.windows(begin.len()).any(|window| window == begin)
}

/// Returns the object identifiers in the first two levels of a DER structure, where PKCS#7 and
/// PKCS#12 name their content.
fn first_oids(der: &[u8]) -> Vec<Oid<'_>> {
    let outer = elements(der).into_iter().take(1).flat_map(|outer| elements(outer.data));
    let outer: Vec<_> = outer.collect();
    let inner = outer.iter().filter(|element| element.header.is_constructed());
    let inner = inner.flat_map(|element| elements(element.data));
    let all = outer.clone().into_iter().chain(inner);
    all.filter_map(|element| element.oid().ok()).map(|oid| oid.to_owned()).collect()
}
