//! Signature algorithms for the ZooKeeper client.
//!
//! Where host names are not verified, `zookeeper-client` 0.11 checks the signature of a TLS 1.3
//! handshake with the function for TLS 1.2. That function accepts RSA PKCS#1 and curves that do not
//! belong to the scheme, which TLS 1.3 forbids (RFC 8446, section 4.2.3). Its verifier cannot be
//! replaced, but it takes its algorithms from the default provider of the process: the algorithms
//! here refuse to verify messages that only TLS 1.3 signs.

use std::sync::LazyLock;

use rustls::SignatureScheme;
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{AlgorithmIdentifier, InvalidSignature, SignatureVerificationAlgorithm};

use super::provider;

/// The algorithms of [`provider`]. Those that TLS 1.3 forbids do not verify its signatures.
pub(crate) static ALGORITHMS: LazyLock<WebPkiSupportedAlgorithms> = LazyLock::new(|| {
    let all = provider().signature_verification_algorithms;
    let mapping = all.mapping.iter().map(|(scheme, algorithms)| {
        let allowed = usize::from(!matches!(
            *scheme,
            SignatureScheme::RSA_PKCS1_SHA256
                | SignatureScheme::RSA_PKCS1_SHA384
                | SignatureScheme::RSA_PKCS1_SHA512
        ));
        // Of several algorithms, TLS 1.3 allows the first one: the curve in the name of the scheme.
        let (allowed, others) = algorithms.split_at(allowed.min(algorithms.len()));
        let others = others.iter().map(|algorithm| {
            &*Box::leak(Box::new(NotForTls13(*algorithm))) as &dyn SignatureVerificationAlgorithm
        });
        let algorithms: Vec<_> = allowed.iter().copied().chain(others).collect();
        (*scheme, &*algorithms.leak())
    });
    let mapping: Vec<_> = mapping.collect();
    WebPkiSupportedAlgorithms { mapping: mapping.leak(), ..all }
});

/// An algorithm that does not verify the signature of a TLS 1.3 handshake.
#[derive(Debug)]
struct NotForTls13(&'static dyn SignatureVerificationAlgorithm);

impl SignatureVerificationAlgorithm for NotForTls13 {
    fn verify_signature(
        &self,
        public_key: &[u8],
        message: &[u8],
        signature: &[u8],
    ) -> Result<(), InvalidSignature> {
        // RFC 8446, section 4.4.3. Signed messages of TLS 1.2 begin with our random, and those of
        // CAs are DER.
        if message.starts_with(&[b' '; 64]) {
            return Err(InvalidSignature);
        }
        self.0.verify_signature(public_key, message, signature)
    }

    fn public_key_alg_id(&self) -> AlgorithmIdentifier {
        self.0.public_key_alg_id()
    }

    fn signature_alg_id(&self) -> AlgorithmIdentifier {
        self.0.signature_alg_id()
    }

    fn fips(&self) -> bool {
        self.0.fips()
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{KeyPair, PKCS_ECDSA_P384_SHA384, PKCS_RSA_SHA256, PublicKeyData, SigningKey};
    use rustls::crypto::CryptoProvider;

    use super::*;

    /// Whether any algorithm of `scheme` verifies what `key` has signed.
    fn verifies(scheme: SignatureScheme, key: &KeyPair, message: &[u8]) -> bool {
        let signature = key.sign(message).expect("a signature");
        let found = ALGORITHMS.mapping.iter().find(|(known, _)| *known == scheme);
        let (_, algorithms) = found.expect("a known scheme");
        let verify = |algorithm: &&dyn SignatureVerificationAlgorithm| {
            algorithm.verify_signature(key.der_bytes(), message, &signature).is_ok()
        };
        algorithms.iter().any(verify)
    }

    #[test]
    fn provider_of_the_process_has_these_algorithms() {
        crate::tls::install_provider();
        let installed = CryptoProvider::get_default().expect("a provider");
        let algorithms = format!("{:?}", installed.signature_verification_algorithms.mapping);
        assert_eq!(algorithms, format!("{:?}", ALGORITHMS.mapping));
        assert!(algorithms.contains("NotForTls13"), "{algorithms}");
    }

    #[test]
    fn tls_13_signatures_are_verified_only_by_what_tls_13_allows() {
        let tls13 = [&[b' '; 64][..], b"TLS 1.3, server CertificateVerify\0", &[7; 32]].concat();
        let tls12 = [7; 64];
        let rsa = KeyPair::generate_for(&PKCS_RSA_SHA256).expect("a key");
        assert!(verifies(SignatureScheme::RSA_PKCS1_SHA256, &rsa, &tls12));
        assert!(!verifies(SignatureScheme::RSA_PKCS1_SHA256, &rsa, &tls13));
        let p384 = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).expect("a key");
        assert!(verifies(SignatureScheme::ECDSA_NISTP384_SHA384, &p384, &tls13));
        let p256 = KeyPair::generate().expect("a key");
        assert!(verifies(SignatureScheme::ECDSA_NISTP256_SHA256, &p256, &tls13));
        let wrapped = |scheme| {
            let found = ALGORITHMS.mapping.iter().find(|(known, _)| *known == scheme);
            let algorithms = format!("{:?}", found.expect("a known scheme").1);
            algorithms.matches("NotForTls13").count()
        };
        assert_eq!(wrapped(SignatureScheme::ECDSA_NISTP256_SHA256), 2);
        assert_eq!(wrapped(SignatureScheme::RSA_PSS_SHA256), 0);
        assert_eq!(wrapped(SignatureScheme::RSA_PKCS1_SHA512), 1);
    }
}
