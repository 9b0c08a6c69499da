//! Inspects private keys that cannot be used, to report the reason.

use rustls::pki_types::PrivateKeyDer;
use x509_parser::asn1_rs::{Any, FromDer, Oid, Tag, oid};
use x509_parser::prelude::SubjectPublicKeyInfo;

use super::provider;

const RSA: Oid<'static> = oid!(1.2.840.113549.1.1.1);
const EC: Oid<'static> = oid!(1.2.840.10045.2.1);

/// Algorithms and curves that are common but not supported.
const OTHERS: [(Oid<'static>, &str); 5] = [
    (oid!(1.2.840.113549.1.1.10), "RSA-PSS"),
    (oid!(1.2.840.10040.4.1), "DSA"),
    (oid!(1.3.101.113), "Ed448"),
    (oid!(1.3.132.0.10), "ECDSA on secp256k1"),
    (oid!(1.3.132.0.33), "ECDSA on P-224"),
];

/// The supported sizes of RSA keys, in bits.
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=8192;

/// Why a key cannot be used.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Unsupported {
    /// RSA of a size that is not supported, in bits.
    RsaSize(usize),
    /// EC with explicit parameters instead of a named curve.
    ExplicitParameters,
    /// Another algorithm or curve, with its name if it is known.
    Kind(Option<&'static str>),
}

/// Returns why rustls refuses `key`; `None` if the reason cannot be found.
pub(crate) fn unsupported(key: &PrivateKeyDer<'_>) -> Option<Unsupported> {
    match key {
        PrivateKeyDer::Pkcs1(key) => rsa(key.secret_pkcs1_der()),
        PrivateKeyDer::Sec1(key) => {
            let elements = sequence(key.secret_sec1_der())?;
            let parameters = elements.iter().find(|element| element.tag() == Tag(0))?;
            curve(&Any::from_der(parameters.data).ok()?.1)
        }
        PrivateKeyDer::Pkcs8(key) => {
            let outer = sequence(key.secret_pkcs8_der())?;
            let algorithm = elements(outer.get(1)?.data);
            let kind = algorithm.first()?.clone().oid().ok()?;
            if kind == RSA {
                rsa(outer.get(2)?.data)
            } else if kind == EC {
                curve(algorithm.get(1)?)
            } else {
                Some(Unsupported::Kind(name(&kind)))
            }
        }
        _ => None,
    }
}

/// Whether `certificate` has the public key that belongs to `key`. Compares only the bits of the
/// key, not its parameters.
pub(crate) fn has_public_key(
    key: &PrivateKeyDer<'_>,
    certificate: &SubjectPublicKeyInfo<'_>,
) -> bool {
    let Ok(key) = provider().key_provider.load_private_key(key.clone_key()) else { return false };
    let Some(public) = key.public_key() else { return false };
    SubjectPublicKeyInfo::from_der(&public)
        .is_ok_and(|(_, public)| public.subject_public_key == certificate.subject_public_key)
}

fn rsa(der: &[u8]) -> Option<Unsupported> {
    let modulus = sequence(der)?.get(1)?.data;
    let modulus = &modulus[modulus.iter().take_while(|byte| **byte == 0).count()..];
    let bits = modulus.len() * 8 - modulus.first().map_or(0, |byte| byte.leading_zeros() as usize);
    (!RSA_BITS.contains(&bits)).then_some(Unsupported::RsaSize(bits))
}

fn curve(parameters: &Any<'_>) -> Option<Unsupported> {
    match parameters.clone().oid() {
        Ok(curve) => name(&curve).map(|name| Unsupported::Kind(Some(name))),
        Err(_) => Some(Unsupported::ExplicitParameters),
    }
}

fn name(oid: &Oid<'_>) -> Option<&'static str> {
    OTHERS.iter().find(|(known, _)| known == oid).map(|(_, name)| *name)
}

/// Returns the elements of a DER sequence.
fn sequence(der: &[u8]) -> Option<Vec<Any<'_>>> {
    Some(elements(Any::from_der(der).ok()?.1.data))
}

/// Returns the elements of `content`, up to the first that is not DER.
pub(super) fn elements(mut content: &[u8]) -> Vec<Any<'_>> {
    let mut found = Vec::new();
    while let Ok((rest, element)) = Any::from_der(content) {
        found.push(element);
        content = rest;
    }
    found
}
