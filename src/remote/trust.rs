//! Who may talk to whom: the worker's certificate and token, the file that keeps them, and TLS 1.3
//! with the one certificate that the pairing URL names. Separate because everything secret is
//! here, and because it is tested without a network.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::{env, fmt};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ClientConfig, Resumption};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::ServerConfig;
use rustls::{CertificateError, DigitallySignedStruct, SignatureScheme, version::TLS13};
use subtle::ConstantTimeEq;

use crate::error::{Error, Result};

/// The protocol in the TLS handshake. It never changes: versions are told apart in the hello, where
/// a refusal can be read.
const ALPN: &[u8] = b"tiny-sd";
/// The name on every worker's certificate: it is the fingerprint that tells them apart.
pub const SERVER_NAME: &str = "tiny-sd";
/// First line of the file that keeps an identity.
const FILE_HEADER: &str = "tiny-sd worker identity 1";
/// Bytes of that file.
const MAX_FILE_BYTES: u64 = 64 << 10;

/// 32 random bytes that open a worker. Compared in constant time and never shown.
#[derive(Clone)]
pub struct Token([u8; 32]);

impl Token {
    /// The token as it stands in a hello.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The bytes, for the hello.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Reads 64 hexadecimal digits.
    pub fn from_hex(text: &str) -> Option<Self> {
        from_hex(text)?.try_into().ok().map(Self)
    }

    /// 64 hexadecimal digits: for the pairing URL and the worker's own file only.
    pub fn to_hex(&self) -> String {
        to_hex(&self.0)
    }
}

impl PartialEq for Token {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for Token {}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(secret)")
    }
}

/// BLAKE3 of a certificate's DER bytes: public, and all that a client needs to know a worker.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// Of a certificate in DER.
    pub fn of(certificate: &[u8]) -> Self {
        Self(*blake3::hash(certificate).as_bytes())
    }

    /// Reads 64 hexadecimal digits.
    pub fn from_hex(text: &str) -> Option<Self> {
        from_hex(text)?.try_into().ok().map(Self)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&to_hex(&self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

/// What makes a worker this worker: a self-signed certificate, its key, and the token.
pub struct Identity {
    token: Token,
    certificate: CertificateDer<'static>,
    key: PrivatePkcs8KeyDer<'static>,
}

impl Identity {
    /// A new one, kept nowhere.
    ///
    /// # Errors
    /// If the system has no random numbers.
    pub fn generate() -> Result<Self> {
        let failed =
            |what: &str| Error::other(format!("cannot make the worker's identity: {what}"));
        let mut token = [0; 32];
        ring::default_provider()
            .secure_random
            .fill(&mut token)
            .map_err(|_| failed("no random numbers"))?;
        let made = rcgen::generate_simple_self_signed([SERVER_NAME.to_owned()])
            .map_err(|error| failed(&error.to_string()))?;
        Ok(Self {
            token: Token(token),
            certificate: made.cert.der().clone(),
            key: made.signing_key.serialize_der().into(),
        })
    }

    /// The one in the file at `path` (`--token-file`), or a new one that is then kept there,
    /// readable by its owner only. `None` is [`default_path`].
    ///
    /// # Errors
    /// If the file is readable by others, damaged, or cannot be written.
    pub fn load_or_create(path: Option<&Path>) -> Result<Self> {
        let path = match path {
            Some(path) => path.to_owned(),
            None => default_path()?,
        };
        if let Some(identity) = Self::load(&path)? {
            return Ok(identity);
        }
        let identity = Self::generate()?;
        match identity.save(&path) {
            Ok(()) => Ok(identity),
            // Another worker was faster: its identity is the one to use.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Self::load(&path)?
                .ok_or_else(|| unusable(&path, "is a link to nothing, or comes and goes")),
            Err(error) => Err(unusable(&path, &format!("cannot be written: {error}"))),
        }
    }

    /// The secret.
    pub fn token(&self) -> &Token {
        &self.token
    }

    /// What clients recognise the certificate by.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.certificate)
    }

    /// TLS 1.3 with this certificate, no resumption, no early data.
    ///
    /// # Errors
    /// If certificate and key do not belong together.
    pub fn server_config(&self) -> Result<ServerConfig> {
        let key = PrivateKeyDer::Pkcs8(self.key.clone_key());
        let unusable = |error: rustls::Error| {
            Error::other(format!("the worker's certificate cannot be used: {error}"))
        };
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(unusable)?
            .with_no_client_auth()
            .with_single_cert(vec![self.certificate.clone()], key)
            .map_err(unusable)?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.send_tls13_tickets = 0;
        Ok(config)
    }

    fn load(path: &Path) -> Result<Option<Self>> {
        let mut file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(unusable(path, &format!("cannot be read: {error}"))),
        };
        check_private(&file, path)?;
        let mut text = String::new();
        let read = Read::by_ref(&mut file).take(MAX_FILE_BYTES).read_to_string(&mut text);
        read.map_err(|error| unusable(path, &format!("cannot be read: {error}")))?;
        let identity = Self::parse(&text);
        identity.map(Some).ok_or_else(|| unusable(path, "is damaged; delete it for a new identity"))
    }

    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        if lines.next()? != FILE_HEADER {
            return None;
        }
        let mut field = |name: &str| lines.next()?.strip_prefix(name)?.strip_prefix(' ');
        let token = Token::from_hex(field("token")?)?;
        let certificate = from_hex(field("certificate")?)?.into();
        let key = from_hex(field("key")?)?.into();
        let identity = Self { token, certificate, key };
        identity.server_config().ok()?;
        Some(identity)
    }

    /// Whole or not at all, and never over another's.
    fn save(&self, path: &Path) -> std::io::Result<()> {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder)?;
        // Temporary files are made with mode 0600.
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        let (certificate, key) = (&self.certificate, self.key.secret_pkcs8_der());
        writeln!(file, "{FILE_HEADER}")?;
        writeln!(file, "token {}", self.token.to_hex())?;
        writeln!(file, "certificate {}", to_hex(certificate))?;
        writeln!(file, "key {}", to_hex(key))?;
        file.as_file().sync_all()?;
        file.persist_noclobber(path).map(drop).map_err(|error| error.error)
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.fingerprint())
    }
}

/// Where a worker keeps its identity when `--token-file` does not say: the folder that the platform
/// has for the state of programs.
///
/// # Errors
/// If there is no home folder.
pub fn default_path() -> Result<PathBuf> {
    let from = |variable: &str| {
        env::var_os(variable).map(PathBuf::from).filter(|folder| folder.is_absolute())
    };
    let home = env::home_dir().filter(|folder| folder.is_absolute());
    let folder = if cfg!(windows) {
        from("LOCALAPPDATA")
    } else if cfg!(target_os = "macos") {
        home.map(|home| home.join("Library/Application Support"))
    } else {
        from("XDG_STATE_HOME").or_else(|| home.map(|home| home.join(".local/state")))
    };
    let folder = folder.ok_or_else(|| {
        Error::usage("there is no home folder for the worker's token: name one with --token-file")
    })?;
    Ok(folder.join("tiny-sd").join("worker-identity"))
}

/// Accepts exactly the certificate with one fingerprint, from whoever proves to have its key.
#[derive(Debug)]
pub struct PinnedCertificate {
    pinned: Fingerprint,
    algorithms: WebPkiSupportedAlgorithms,
    stranger: OnceLock<Fingerprint>,
}

impl PinnedCertificate {
    /// For the worker with this fingerprint.
    pub fn new(pinned: Fingerprint) -> Arc<Self> {
        let algorithms = provider().signature_verification_algorithms;
        Arc::new(Self { pinned, algorithms, stranger: OnceLock::new() })
    }

    /// Which other certificate was shown, if one was: for the message.
    pub fn stranger(&self) -> Option<Fingerprint> {
        self.stranger.get().copied()
    }

    /// TLS 1.3 with this verifier, no resumption, no early data.
    ///
    /// # Errors
    /// None that depend on anything at run time.
    pub fn client_config(self: &Arc<Self>) -> Result<ClientConfig> {
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| Error::other(format!("TLS 1.3 is not available: {error}")))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::clone(self) as _)
            .with_no_client_auth();
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.enable_sni = false;
        config.resumption = Resumption::disabled();
        Ok(config)
    }
}

impl ServerCertVerifier for PinnedCertificate {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        let shown = Fingerprint::of(end_entity);
        if shown == self.pinned {
            return Ok(ServerCertVerified::assertion());
        }
        let _ = self.stranger.set(shown);
        Err(CertificateError::ApplicationVerificationFailure.into())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::PeerIncompatible::Tls12NotOffered.into())
    }

    /// A certificate is public; only this shows that the peer has its key.
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// Of the opened file, so that it cannot be another one by the time it is read.
#[cfg(unix)]
fn check_private(file: &File, path: &Path) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    let metadata = file.metadata().map_err(|error| unusable(path, &error.to_string()))?;
    if !metadata.is_file() {
        return Err(unusable(path, "is not a file (--token-file)"));
    }
    let mode = metadata.mode() & 0o777;
    if mode & 0o077 != 0 {
        let advice = format!("is open to others (mode {mode:03o}): chmod 600 it, or delete it");
        return Err(unusable(path, &advice));
    }
    Ok(())
}

#[cfg(not(unix))]
fn check_private(_file: &File, _path: &Path) -> Result<()> {
    Ok(())
}

fn unusable(path: &Path, why: &str) -> Error {
    Error::usage(format!("the worker's identity file {} {why}", path.display()))
}

fn to_hex(bytes: &[u8]) -> String {
    let digit = |nibble: u8| char::from_digit(nibble.into(), 16).unwrap_or('0');
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<_>> = text.chars().map(|digit| digit.to_digit(16)).collect();
    let pairs = digits?;
    let (pairs, rest) = pairs.as_chunks::<2>();
    let bytes = pairs.iter().map(|[high, low]| (high << 4 | low) as u8).collect();
    rest.is_empty().then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::server::{ClientHello, ResolvesServerCert};
    use rustls::sign::CertifiedKey;
    use rustls::{ClientConnection, ServerConnection};

    /// A server that shows one certificate and signs with whatever key it has.
    #[derive(Debug)]
    struct Shows(Arc<CertifiedKey>);

    impl ResolvesServerCert for Shows {
        fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
            Some(Arc::clone(&self.0))
        }
    }

    /// The handshake in memory: the client's verdict.
    fn handshake(
        pinned: &Arc<PinnedCertificate>,
        certificate: &Identity,
        key: &Identity,
    ) -> std::result::Result<(), rustls::Error> {
        let signing = provider().key_provider.load_private_key(key.key.clone_key().into()).unwrap();
        let certified = CertifiedKey::new(vec![certificate.certificate.clone()], signing);
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(Shows(Arc::new(certified))));
        config.alpn_protocols = vec![ALPN.to_vec()];
        let mut server = ServerConnection::new(Arc::new(config)).unwrap();
        let name = SERVER_NAME.try_into().unwrap();
        let config = pinned.client_config().unwrap();
        let mut client = ClientConnection::new(Arc::new(config), name).unwrap();
        while client.is_handshaking() {
            let mut bytes = Vec::new();
            client.write_tls(&mut bytes).unwrap();
            server.read_tls(&mut bytes.as_slice()).unwrap();
            server.process_new_packets().unwrap();
            let mut bytes = Vec::new();
            server.write_tls(&mut bytes).unwrap();
            client.read_tls(&mut bytes.as_slice()).unwrap();
            client.process_new_packets()?;
        }
        Ok(())
    }

    #[test]
    fn the_pinned_certificate_with_its_key_passes() {
        let worker = Identity::generate().unwrap();
        handshake(&PinnedCertificate::new(worker.fingerprint()), &worker, &worker).unwrap();
    }

    #[test]
    fn a_replayed_certificate_with_another_key_does_not_pass() {
        let [worker, thief] = [(); 2].map(|()| Identity::generate().unwrap());
        let pinned = PinnedCertificate::new(worker.fingerprint());
        let error = handshake(&pinned, &worker, &thief).unwrap_err();
        let bad_signature = rustls::Error::InvalidCertificate(CertificateError::BadSignature);
        assert_eq!(error, bad_signature);
    }

    #[test]
    fn another_certificate_does_not_pass_and_is_named() {
        let [worker, other] = [(); 2].map(|()| Identity::generate().unwrap());
        let pinned = PinnedCertificate::new(worker.fingerprint());
        handshake(&pinned, &other, &other).unwrap_err();
        assert_eq!(pinned.stranger(), Some(other.fingerprint()));
    }

    #[test]
    fn an_identity_is_made_once_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state").join("identity");
        let made = Identity::load_or_create(Some(&path)).unwrap();
        let loaded = Identity::load_or_create(Some(&path)).unwrap();
        assert_eq!(made.fingerprint(), loaded.fingerprint());
        assert_eq!(made.token(), loaded.token());
        handshake(&PinnedCertificate::new(made.fingerprint()), &loaded, &loaded).unwrap();
    }

    #[cfg(unix)]
    #[test]
    fn an_identity_that_others_can_read_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("identity");
        Identity::load_or_create(Some(&path)).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        for mode in [0o640, 0o604, 0o660] {
            std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
            let error = Identity::load_or_create(Some(&path)).unwrap_err().to_string();
            assert!(error.contains(&format!("{mode:o}")) && error.contains("chmod"), "{error}");
        }
    }

    #[test]
    fn a_damaged_identity_is_refused_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("identity");
        let identity = Identity::generate().unwrap();
        identity.save(&path).unwrap();
        let good = std::fs::read_to_string(&path).unwrap();
        for bad in [&good[..good.len() / 2], "", &good.replace("key 30", "key 31")] {
            std::fs::write(&path, bad).unwrap();
            let error = Identity::load_or_create(Some(&path)).unwrap_err().to_string();
            assert!(error.contains("damaged"), "{error}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), bad);
        }
    }

    #[test]
    fn tokens_differ() {
        let [a, b] = [(); 2].map(|()| Identity::generate().unwrap());
        assert_ne!(a.token(), b.token());
        assert_eq!(Token::from_hex(&a.token().to_hex()).as_ref(), Some(a.token()));
    }
}
