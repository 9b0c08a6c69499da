//! Reads PEM files (RFC 7468) strictly: returns every block, or an error with the line.
//!
//! OpenSSL and most libraries skip blocks that they cannot read. In a CA file a skipped block is a
//! CA that is not trusted. Therefore this reader skips only text outside of blocks, lines that
//! begin with `#`, and blocks whose label is known and not needed here.

use std::borrow::Cow;

use rustls::pki_types::{CertificateDer, CertificateRevocationListDer};
use rustls_pemfile::Item;
use x509_parser::asn1_rs::{self, Any, Class, FromDer, Tag, oid};

const BEGIN: &[u8] = b"-----BEGIN";
const END: &[u8] = b"-----END";
const DASHES: &[u8] = b"-----";
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// The longest label shown in an error, in characters.
const LABEL_MAX: usize = 40;

/// One block of a file.
#[derive(Debug)]
pub(crate) struct Block {
    /// The line of its `-----BEGIN`, counted from 1.
    pub(crate) line: usize,
    pub(crate) content: Content,
}

/// The content of a block, decoded from base64 but not parsed.
#[derive(Debug)]
pub(crate) enum Content {
    Certificate(CertificateDer<'static>),
    /// A certificate with a list of the uses that it is trusted for.
    Trusted(CertificateDer<'static>, TrustedUses),
    /// A private key in one of the three formats that rustls reads.
    Key(Vec<u8>),
    EncryptedKey,
    /// A private key in a format that rustls does not read, with its label.
    OtherKey(String),
    RevocationList(CertificateRevocationListDer<'static>),
    /// Parameters, requests, public keys.
    Unused,
}

/// The uses that OpenSSL's trust settings allow for a CA (x509(1), TRUST SETTINGS).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TrustedUses {
    pub(crate) servers: bool,
    pub(crate) clients: bool,
}

/// Why a file is not valid PEM.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {problem}")]
pub(crate) struct PemError {
    /// The line, counted from 1.
    pub(crate) line: usize,
    pub(crate) problem: Cow<'static, str>,
}

impl PemError {
    fn new(line: usize, problem: impl Into<Cow<'static, str>>) -> Self {
        Self { line, problem: problem.into() }
    }
}

/// A block whose `-----END` has not been read yet.
struct Open {
    label: String,
    line: usize,
    body: Vec<u8>,
    /// It has the header of an encrypted key (RFC 1421, section 4.6.1.1).
    encrypted: bool,
}

/// Returns all blocks of `file`. The text around them may be of any encoding.
///
/// # Errors
/// The first block that is incomplete, or whose label is unknown.
pub(crate) fn read(file: &[u8]) -> Result<Vec<Block>, PemError> {
    let mut blocks = Vec::new();
    let mut open: Option<Open> = None;
    let numbered = file.split(|byte| *byte == b'\n').zip(1..);
    let lines = numbered.flat_map(|(line, number)| {
        line.split(|byte| *byte == b'\r').map(move |line| (line, number))
    });
    for (line, number) in lines {
        let line = line.trim_ascii();
        let line = line.strip_prefix(BYTE_ORDER_MARK).unwrap_or(line).trim_ascii();
        let Some(block) = &mut open else {
            open = begin(line, number)?;
            continue;
        };
        if line.starts_with(END) {
            end(line, number, block)?;
            let Open { label, line, body, encrypted } = block;
            blocks.push(Block { line: *line, content: content(label, *line, body, *encrypted)? });
            open = None;
        } else if contains(line, BEGIN) {
            return Err(unfinished(block));
        } else if contains(line, DASHES) {
            let problem = format!("a newline is missing before -----END {}-----", block.label);
            return Err(PemError::new(number, problem));
        } else if line.contains(&b':') {
            block.encrypted |= line.starts_with(b"Proc-Type:") && contains(line, b"ENCRYPTED");
        } else {
            block.body.extend_from_slice(line);
            block.body.push(b'\n');
        }
    }
    match &open {
        Some(block) => Err(unfinished(block)),
        None => Ok(blocks),
    }
}

/// Reads a line outside of blocks.
fn begin(line: &[u8], number: usize) -> Result<Option<Open>, PemError> {
    if line.starts_with(b"#") {
        return Ok(None);
    }
    if !contains(line, BEGIN) {
        if line.starts_with(END) {
            return Err(PemError::new(number, "-----END without a -----BEGIN before it"));
        }
        return Ok(None);
    }
    let Some(rest) = line.strip_prefix(BEGIN) else {
        return Err(PemError::new(number, "-----BEGIN must be at the start of its line"));
    };
    let label = rest.strip_prefix(b" ").and_then(|rest| rest.strip_suffix(DASHES));
    let label = label.filter(|label| !label.is_empty() && !contains(label, DASHES));
    let Some(label) = label else {
        return Err(PemError::new(number, "the line must be -----BEGIN, a label and -----"));
    };
    let label = String::from_utf8_lossy(label).into_owned();
    Ok(Some(Open { label, line: number, body: Vec::new(), encrypted: false }))
}

/// Checks that `line` is the end of `block`.
fn end(line: &[u8], number: usize, block: &Open) -> Result<(), PemError> {
    let expected = format!("-----END {}-----", block.label);
    match line.strip_prefix(expected.as_bytes()) {
        Some(b"") => Ok(()),
        Some(_) => Err(PemError::new(number, format!("a newline is missing after {expected}"))),
        None => {
            let shown = shown(&block.label);
            let problem =
                format!("-----BEGIN {shown}----- of line {} does not end with this", block.line);
            Err(PemError::new(number, problem))
        }
    }
}

fn unfinished(block: &Open) -> PemError {
    let label = shown(&block.label);
    PemError::new(block.line, format!("-----BEGIN {label}----- has no -----END {label}-----"))
}

/// Returns a label for an error message: printable, at most [`LABEL_MAX`] characters.
fn shown(label: &str) -> String {
    label.escape_debug().take(LABEL_MAX).collect()
}

fn content(label: &str, line: usize, body: &[u8], encrypted: bool) -> Result<Content, PemError> {
    Ok(match label {
        "CERTIFICATE" | "X509 CERTIFICATE" => Content::Certificate(decode(line, body)?.into()),
        "TRUSTED CERTIFICATE" => trusted(line, &decode(line, body)?)?,
        "ENCRYPTED PRIVATE KEY" => Content::EncryptedKey,
        label if encrypted && label.ends_with("PRIVATE KEY") => Content::EncryptedKey,
        "PRIVATE KEY" | "RSA PRIVATE KEY" | "EC PRIVATE KEY" => Content::Key(decode(line, body)?),
        label if label.ends_with("PRIVATE KEY") => Content::OtherKey(shown(label)),
        "X509 CRL" => Content::RevocationList(decode(line, body)?.into()),
        "CERTIFICATE REQUEST" | "NEW CERTIFICATE REQUEST" => Content::Unused,
        label if label.ends_with("PARAMETERS") || label.ends_with("PUBLIC KEY") => Content::Unused,
        "PKCS7" | "PKCS #7 SIGNED DATA" | "CMS" => {
            let problem = "the certificates are wrapped in PKCS#7; unwrap them with openssl pkcs7 \
                           -print_certs";
            return Err(PemError::new(line, problem));
        }
        label => {
            let problem = format!("unknown label -----BEGIN {}-----", shown(label));
            return Err(PemError::new(line, problem));
        }
    })
}

/// Decodes the base64 of the block that begins in `line`.
fn decode(line: usize, body: &[u8]) -> Result<Vec<u8>, PemError> {
    // The label only selects the `Item` that is returned.
    let text = [b"-----BEGIN CERTIFICATE-----\n", body, b"-----END CERTIFICATE-----\n"].concat();
    match rustls_pemfile::read_one_from_slice(&text) {
        Ok(Some((Item::X509Certificate(der), _))) if !der.is_empty() => Ok(der.to_vec()),
        Ok(_) => Err(PemError::new(line, "the block is empty")),
        Err(_) => Err(PemError::new(line, "the block is not valid base64")),
    }
}

/// Returns the certificate in OpenSSL's `TRUSTED CERTIFICATE` and its trusted uses, which follow it
/// (x509(1), TRUST SETTINGS).
fn trusted(line: usize, der: &[u8]) -> Result<Content, PemError> {
    let malformed = |_| PemError::new(line, "the block is not a certificate");
    let mut uses = None;
    let (settings, _) = Any::from_der(der).map_err(malformed)?;
    if !settings.is_empty() {
        let (_, settings) = Any::from_der(settings).map_err(malformed)?;
        let mut rest = settings.data;
        while !rest.is_empty() {
            let (after, setting) = Any::from_der(rest).map_err(malformed)?;
            // `reject` of `X509_CERT_AUX` is element [0].
            if setting.class() == Class::ContextSpecific && setting.tag().0 == 0 {
                let problem = "the certificate has rejected uses (openssl x509 -addreject), which \
                               are not supported; remove it, or the rejections: openssl x509 \
                               -clrreject";
                return Err(PemError::new(line, problem));
            }
            if setting.tag() == Tag::Sequence {
                uses = Some(trusted_uses(setting.data).map_err(malformed)?);
            }
            rest = after;
        }
    }
    let certificate = der[..der.len() - settings.len()].to_vec().into();
    Ok(match uses {
        Some(uses) => Content::Trusted(certificate, uses),
        None => Content::Certificate(certificate),
    })
}

/// Reads the list of uses in `trust` of `X509_CERT_AUX`.
fn trusted_uses(mut list: &[u8]) -> Result<TrustedUses, asn1_rs::Err<asn1_rs::Error>> {
    let mut uses = TrustedUses { servers: false, clients: false };
    while !list.is_empty() {
        let (rest, oid) = Any::from_der(list)?;
        let is = |expected: &asn1_rs::Oid<'_>| oid.data == expected.as_bytes();
        let any = is(&oid!(2.5.29.37.0));
        uses.servers |= any || is(&oid!(1.3.6.1.5.5.7.3.1));
        uses.clients |= any || is(&oid!(1.3.6.1.5.5.7.3.2));
        list = rest;
    }
    Ok(uses)
}

fn contains(line: &[u8], part: &[u8]) -> bool {
    line.windows(part.len()).any(|window| window == part)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Valid DER that is not a certificate.
    const DER: &[u8] = &[0x30, 0x03, 0x02, 0x01, 0x07];

    fn block(label: &str) -> String {
        ::pem::encode_config(
            &::pem::Pem::new(label, DER),
            ::pem::EncodeConfig::new().set_line_ending(::pem::LineEnding::LF),
        )
    }

    fn lines_and_contents(file: impl AsRef<[u8]>) -> Vec<(usize, String)> {
        let blocks = read(file.as_ref()).expect("a valid file");
        blocks.iter().map(|block| (block.line, format!("{:?}", block.content))).collect()
    }

    #[track_caller]
    fn assert_refused(file: impl AsRef<[u8]>, line: usize, problem: &str) {
        let error = read(file.as_ref()).expect_err(problem);
        assert_eq!((error.line, &*error.problem), (line, problem));
    }

    fn certificates(file: impl AsRef<[u8]>) -> usize {
        let blocks = read(file.as_ref()).expect("a valid file");
        let is_whole = |block: &&Block| matches!(&block.content, Content::Certificate(der) if der.as_ref() == DER);
        blocks.iter().filter(is_whole).count()
    }

    #[test]
    fn text_outside_of_blocks_is_skipped() {
        let one = block("CERTIFICATE");
        for (file, count) in [
            (Vec::new(), 0),
            (b"Gateway of T\xfcbingen\n".to_vec(), 0),
            ([b"friendlyName: G\xe4teway\n", one.as_bytes(), b"\xff\xfe"].concat(), 1),
            ([BYTE_ORDER_MARK, one.as_bytes(), BYTE_ORDER_MARK, one.as_bytes()].concat(), 2),
            (format!("{one}# -----BEGIN CERTIFICATE-----\n# MII\n").into(), 1),
            (one.replace('\n', "\r\n").into(), 1),
            (one.replace('\n', "\r").into(), 1),
            (one.replace('\n', " \t\n  ").into(), 1),
            (one.trim_end().into(), 1),
            ("-----BEGIN CERTIFICATE-----\nMAMC\nAQc=\n-----END CERTIFICATE-----".into(), 1),
        ] {
            assert_eq!(certificates(&file), count, "{}", file.escape_ascii());
        }
    }

    #[test]
    fn labels_select_the_content() {
        let certificate = |label: &str| certificates(block(label));
        for label in ["CERTIFICATE", "X509 CERTIFICATE", "TRUSTED CERTIFICATE"] {
            assert_eq!(certificate(label), 1, "{label}");
        }
        for (label, expected) in [
            ("PRIVATE KEY", "Key("),
            ("RSA PRIVATE KEY", "Key("),
            ("EC PRIVATE KEY", "Key("),
            ("ENCRYPTED PRIVATE KEY", "EncryptedKey"),
            ("OPENSSH PRIVATE KEY", "OtherKey("),
            ("X509 CRL", "RevocationList("),
            ("EC PARAMETERS", "Unused"),
            ("X9.42 DH PARAMETERS", "Unused"),
            ("PUBLIC KEY", "Unused"),
            ("CERTIFICATE REQUEST", "Unused"),
        ] {
            let text = format!("\n{}{}", block(label), block("CERTIFICATE"));
            let found = lines_and_contents(text);
            assert_eq!((found.len(), found[0].0, found[1].0), (2, 2, 5), "{label}");
            assert!(found[0].1.starts_with(expected), "{label}: {}", found[0].1);
        }
        assert_refused(block("CERTIFICAT"), 1, "unknown label -----BEGIN CERTIFICAT-----");
        assert!(read(block("PKCS7").as_bytes()).unwrap_err().problem.contains("print_certs"));
    }

    #[test]
    fn headers_are_skipped_and_mark_encrypted_keys() {
        let with = |header: &str, label: &str| block(label).replacen('\n', header, 1);
        let encrypted = "\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\n";
        let found = lines_and_contents(with(encrypted, "EC PRIVATE KEY"));
        assert_eq!(found, [(1, "EncryptedKey".to_owned())]);
        assert_eq!(certificates(with("\nComment: ours\n\n", "CERTIFICATE")), 1);
    }

    #[test]
    fn incomplete_blocks_are_errors() {
        let one = block("CERTIFICATE");
        let glued = format!("{}{one}", one.trim_end());
        assert_refused(glued, 3, "a newline is missing after -----END CERTIFICATE-----");
        assert_refused(format!("old {one}"), 1, "-----BEGIN must be at the start of its line");
        assert_refused(
            one.replacen("=\n-----END", "=-----END", 1),
            2,
            "a newline is missing before -----END CERTIFICATE-----",
        );
        let without = "-----BEGIN CERTIFICATE----- has no -----END CERTIFICATE-----";
        let begin = "-----BEGIN CERTIFICATE-----\nAAAA\n";
        assert_refused(format!("\n{begin}{one}"), 2, without);
        assert_refused(format!("{one}{begin}"), 4, without);
        assert_refused(
            one.replacen("END CERTIFICATE", "END CERTIFICATES", 1),
            3,
            "-----BEGIN CERTIFICATE----- of line 1 does not end with this",
        );
        for broken in
            ["-----BEGIN CERTIFICATE---\n", "-----BEGIN\n", "-----BEGINCERTIFICATE-----\n"]
        {
            assert_refused(broken, 1, "the line must be -----BEGIN, a label and -----");
        }
        assert_refused(
            one.replacen("-----BEGIN", "----BEGIN", 1),
            3,
            "-----END without a -----BEGIN before it",
        );
        assert_refused(one.replacen("MAMC", "!AMC", 1), 1, "the block is not valid base64");
        let empty = "-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n";
        assert_refused(empty, 1, "the block is empty");
        let hostile = block("x\u{1b}[2J");
        let error = read(hostile.as_bytes()).unwrap_err();
        assert!(error.problem.contains("\\u{1b}"), "{error:?}");
    }

    #[test]
    fn trust_settings_are_cut_off_unless_they_reject() {
        let trusted = |settings: &[u8]| {
            let der = [DER, settings].concat();
            read(::pem::encode(&::pem::Pem::new("TRUSTED CERTIFICATE", der)).as_bytes())
        };
        // An alias; a list of rejected uses.
        let alias = [0x30, 0x04, 0x0c, 0x02, b'g', b'w'];
        for settings in [&[][..], &[0x30, 0x00], &alias] {
            let blocks = trusted(settings).expect("a certificate");
            assert!(matches!(&blocks[0].content, Content::Certificate(der) if der.as_ref() == DER));
        }
        let rejected = [0x30, 0x07, 0xa0, 0x05, 0x06, 0x03, 0x2a, 0x03, 0x04];
        let error = trusted(&rejected).expect_err("a rejection");
        assert!(error.problem.contains("rejected uses"), "{error:?}");
        assert!(trusted(&[0x30, 0x7f]).is_err());
    }

    #[test]
    fn trusted_uses_are_read() {
        let any: &[u8] = &[0x06, 0x04, 0x55, 0x1d, 0x25, 0x00];
        let server: &[u8] = &[0x06, 0x08, 0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x01];
        let client: &[u8] = &[0x06, 0x08, 0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x02];
        let mail: &[u8] = &[0x06, 0x08, 0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x04];
        for (list, servers, clients) in [
            (vec![any], true, true),
            (vec![server], true, false),
            (vec![mail, client], false, true),
            (vec![server, client], true, true),
            (vec![mail], false, false),
        ] {
            let sequence = |content: &[u8]| {
                [&[0x30, u8::try_from(content.len()).expect("short")], content].concat()
            };
            let der = [DER, &sequence(&sequence(&list.concat()))].concat();
            let file = ::pem::encode(&::pem::Pem::new("TRUSTED CERTIFICATE", der));
            let blocks = read(file.as_bytes()).expect("a certificate");
            let Content::Trusted(certificate, uses) = &blocks[0].content else {
                panic!("{blocks:?}")
            };
            assert_eq!(certificate.as_ref(), DER);
            assert_eq!(*uses, TrustedUses { servers, clients }, "{list:?}");
        }
    }

    /// Pieces of random files.
    const PIECES: [&str; 14] = [
        "-----BEGIN CERTIFICATE-----",
        "-----END CERTIFICATE-----",
        "-----BEGIN EC PARAMETERS-----",
        "-----END EC PARAMETERS-----",
        "-----BEGIN",
        "-----END",
        "-----",
        "\n",
        "\r\n",
        "MAMCAQc=",
        "Proc-Type: 4,ENCRYPTED",
        "#",
        " ",
        "\u{feff}",
    ];

    proptest::proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes in proptest::collection::vec(0_u8.., 0..300)) {
            let _ = read(&bytes);
        }

        /// A file that is read has as many blocks as `-----BEGIN` marks outside of comments.
        #[test]
        fn every_begin_mark_is_a_block(pieces in proptest::collection::vec(0..PIECES.len(), 0..24)) {
            let text: String = pieces.iter().map(|index| PIECES[*index]).collect();
            if let Ok(blocks) = read(text.as_bytes()) {
                let is_comment = |line: &&str| {
                    let line = line.trim().trim_start_matches('\u{feff}').trim();
                    line.starts_with('#')
                };
                let lines = text.split(['\n', '\r']).filter(|line| !is_comment(line));
                let marks: usize = lines.map(|line| line.matches("-----BEGIN").count()).sum();
                proptest::prop_assert_eq!(blocks.len(), marks, "{:?}", text);
            }
        }
    }
}
