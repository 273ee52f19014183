//! The pairing URL, `quic://TOKEN@HOST:PORT?cert=FINGERPRINT`: where a worker is, how it is
//! recognised, and the secret that opens it. Separate because it is read from arguments, files and
//! the environment, and because only this module decides where the token may be shown.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::str::FromStr;

use super::trust::{Fingerprint, Identity, Token};
use crate::error::{Error, Result};

/// The port where nothing else is said.
pub const DEFAULT_PORT: u16 = 4433;
/// Where the device comes from when `--device` does not say: a URL or `@file`.
pub const DEVICE_VARIABLE: &str = "TINY_SD_DEVICE";
/// Bytes of a pairing URL, or of a file with one.
const MAX_URL_BYTES: u64 = 4 << 10;
const SCHEME: &str = "quic://";
const SHAPE: &str = "quic://TOKEN@HOST:PORT?cert=FINGERPRINT";

/// A parsed pairing URL. Neither `Display` nor `Debug` shows the token.
#[derive(Clone)]
pub struct PairingUrl {
    host: String,
    port: u16,
    token: Token,
    fingerprint: Fingerprint,
    /// What is wrong with the file that it came from.
    warning: Option<String>,
}

/// The same worker, wherever the URL came from.
impl PartialEq for PairingUrl {
    fn eq(&self, other: &Self) -> bool {
        let Self { host, port, token, fingerprint, warning: _ } = self;
        (host, port) == (&other.host, &other.port)
            && token == &other.token
            && fingerprint == &other.fingerprint
    }
}

impl Eq for PairingUrl {}

impl PairingUrl {
    /// A worker at `host`, a name or an address without brackets.
    ///
    /// # Errors
    /// If `host` is neither.
    pub fn new(host: &str, port: u16, token: Token, fingerprint: Fingerprint) -> Result<Self> {
        if host.parse::<IpAddr>().is_err() {
            check_name(host)?;
        }
        Ok(Self { host: host.to_owned(), port, token, fingerprint, warning: None })
    }

    /// What `--device` was given: the URL itself, or `@file` for a file that holds it, so that the
    /// token stays out of the list of processes.
    ///
    /// # Errors
    /// If the file cannot be read, or a part of the URL is wrong; the message names the part.
    pub fn from_argument(argument: &str) -> Result<Self> {
        let Some(path) = argument.strip_prefix('@') else { return argument.parse() };
        let mut text = String::new();
        let read = File::open(path).and_then(|file| {
            let warning = exposure(path, &file);
            file.take(MAX_URL_BYTES.saturating_add(1)).read_to_string(&mut text)?;
            Ok(warning)
        });
        let warning = read.map_err(|error| {
            Error::usage(format!("cannot read the pairing URL in {path}: {error} (--device @file)"))
        })?;
        let line = text.lines().map(str::trim).find(|line| !line.is_empty());
        let line = line.ok_or_else(|| Error::usage(format!("{path} holds no pairing URL")))?;
        let url: Self = line.parse().map_err(|error: Error| error.context(path))?;
        Ok(Self { warning, ..url })
    }

    /// What the user should know about the file that it came from.
    pub fn warning(&self) -> Option<&str> {
        self.warning.as_deref()
    }

    /// The value of [`DEVICE_VARIABLE`], if it is set; `@file` works there too. What it holds need
    /// not be a URL (`cpu` is a device as well), so it is handed back as an argument.
    pub fn environment_argument() -> Option<String> {
        std::env::var(DEVICE_VARIABLE).ok().filter(|value| !value.is_empty())
    }

    /// The URL with its token: for the one line on the worker's stdout, and nowhere else.
    pub fn to_secret_string(&self) -> String {
        format!("{SCHEME}{}@{}?cert={}", self.token.to_hex(), self.name(), self.fingerprint)
    }

    /// `HOST:PORT`: the worker's name in messages.
    pub fn name(&self) -> String {
        let Self { host, port, .. } = self;
        if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The secret.
    pub fn token(&self) -> &Token {
        &self.token
    }

    /// Which certificate the worker must show.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// Every address of the host, at least one. May ask the name server, and so block.
    ///
    /// # Errors
    /// If the name is unknown.
    pub fn resolve(&self) -> Result<Vec<SocketAddr>> {
        let found = (self.host.as_str(), self.port).to_socket_addrs();
        let found: Vec<_> = found
            .map_err(|error| {
                Error::remote(format!(
                    "cannot find the worker's host {}: {error}; check the HOST in {SHAPE}",
                    self.host
                ))
            })?
            .collect();
        if found.is_empty() {
            return Err(Error::remote(format!("the worker's host {} has no address", self.host)));
        }
        Ok(found)
    }
}

/// The URLs under which a worker that listens on `bound` is reached. For an address that stands for
/// all, that is the one that packets to the outside world leave from, else the machine itself.
pub fn pairing_urls(bound: SocketAddr, identity: &Identity) -> Vec<PairingUrl> {
    let host = if bound.ip().is_unspecified() { outward_address(bound) } else { bound.ip() };
    vec![PairingUrl {
        host: host.to_string(),
        port: bound.port(),
        token: identity.token().clone(),
        fingerprint: identity.fingerprint(),
        warning: None,
    }]
}

/// The routing table answers `connect` on a datagram socket; no packet is sent.
fn outward_address(bound: SocketAddr) -> IpAddr {
    // Addresses that are set aside for documentation: routed by default, owned by nobody.
    let v4 = ("0.0.0.0:0", "192.0.2.1:9");
    let v6 = ("[::]:0", "[2001:db8::1]:9");
    let candidates: &[_] = if bound.is_ipv6() { &[v6, v4] } else { &[v4] };
    let outward = candidates.iter().find_map(|(local, remote)| {
        let socket = UdpSocket::bind(local).ok()?;
        socket.connect(remote).ok()?;
        Some(socket.local_addr().ok()?.ip()).filter(|ip| !ip.is_unspecified())
    });
    let loopback: IpAddr =
        if bound.is_ipv6() { Ipv6Addr::LOCALHOST.into() } else { [127, 0, 0, 1].into() };
    outward.unwrap_or(loopback)
}

impl FromStr for PairingUrl {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if text.len() as u64 > MAX_URL_BYTES {
            return Err(wrong(&format!("is longer than {MAX_URL_BYTES} bytes")));
        }
        let rest = text.strip_prefix(SCHEME).ok_or_else(|| wrong("does not begin with quic://"))?;
        let (rest, query) = rest.split_once('?').ok_or_else(|| wrong("has no ?cert= part"))?;
        // The token may be anything until it is parsed, so no message repeats it.
        let (token, place) = rest.rsplit_once('@').ok_or_else(|| wrong("has no TOKEN@ part"))?;
        let token = Token::from_hex(token)
            .ok_or_else(|| wrong("has a token that is not 64 hexadecimal digits"))?;
        let (host, port) = parse_place(place.strip_suffix('/').unwrap_or(place))?;
        Ok(Self { host, port, token, fingerprint: parse_query(query)?, warning: None })
    }
}

/// Whoever can read the file can use the worker.
#[cfg(unix)]
fn exposure(path: &str, file: &File) -> Option<String> {
    use std::os::unix::fs::MetadataExt;
    let metadata = file.metadata().ok().filter(|metadata| metadata.is_file())?;
    let mode = metadata.mode() & 0o777;
    (mode & 0o077 != 0).then(|| {
        format!("{path} holds a worker's secret and is open to others (mode {mode:03o}): chmod 600")
    })
}

#[cfg(not(unix))]
fn exposure(_path: &str, _file: &File) -> Option<String> {
    None
}

fn parse_place(place: &str) -> Result<(String, u16)> {
    let (host, rest) = if let Some(bracketed) = place.strip_prefix('[') {
        let (host, rest) =
            bracketed.split_once(']').ok_or_else(|| wrong("has a [ without its ] in the host"))?;
        if host.parse::<Ipv6Addr>().is_err() {
            return Err(wrong(&format!("has a host [{host}] that is no IPv6 address")));
        }
        (host, rest)
    } else {
        let colon = place.find(':').unwrap_or(place.len());
        let (host, rest) = place.split_at(colon);
        if rest.matches(':').count() > 1 {
            return Err(wrong(&format!("has an IPv6 address without brackets: write [{place}]")));
        }
        check_name(host)?;
        (host, rest)
    };
    let port = match rest.strip_prefix(':') {
        None if rest.is_empty() => DEFAULT_PORT,
        None => return Err(wrong(&format!("has {rest:?} after the host"))),
        Some(port) => port.parse().ok().filter(|&port| port > 0).ok_or_else(|| {
            wrong(&format!("has the port {port:?}, which is not a number from 1 to 65535"))
        })?,
    };
    Ok((host.to_owned(), port))
}

fn check_name(host: &str) -> Result<()> {
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
    if host.is_empty() {
        return Err(wrong("has no host"));
    }
    // A label has at most 63 letters, so that a token is no name.
    let is_short = host.len() <= 253 && host.split('.').all(|label| label.len() <= 63);
    if !is_short || !host.bytes().all(is_name) {
        return Err(wrong(&format!("has a host {host:?} that is neither a name nor an address")));
    }
    Ok(())
}

fn parse_query(query: &str) -> Result<Fingerprint> {
    let mut fingerprint = None;
    for pair in query.split('&') {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        if key != "cert" || fingerprint.is_some() {
            return Err(wrong(&format!("has {key:?} after the ?, where one cert= belongs")));
        }
        fingerprint =
            Some(Fingerprint::from_hex(value).ok_or_else(|| {
                wrong("has a cert= fingerprint that is not 64 hexadecimal digits")
            })?);
    }
    fingerprint.ok_or_else(|| wrong("has no ?cert= part"))
}

/// `what` may quote a part of the URL, in which the token may have landed by a typing error.
fn wrong(what: &str) -> Error {
    let what = without_tokens(what);
    Error::usage(format!("the pairing URL {what}; it looks like {SHAPE}, as the worker prints it"))
}

/// The text with its long runs of hexadecimal digits left out.
fn without_tokens(text: &str) -> String {
    const TOKEN_LIKE: usize = 12;
    let mut clean = String::new();
    let mut rest = text;
    while let Some(start) = rest.find(|c: char| c.is_ascii_hexdigit()) {
        let (before, from) = rest.split_at(start);
        let len = from.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(from.len());
        let (digits, behind) = from.split_at(len);
        clean.push_str(before);
        clean.push_str(if len < TOKEN_LIKE { digits } else { "***" });
        rest = behind;
    }
    clean.push_str(rest);
    clean
}

impl fmt::Display for PairingUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}?cert={}", self.name(), self.fingerprint)
    }
}

impl fmt::Debug for PairingUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PairingUrl({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const TOKEN: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
    const CERT: &str = "ffeeddccbbaa99887766554433221100ffeeddccbbaa99887766554433221100";

    fn parse(url: &str) -> Result<PairingUrl> {
        url.replace("TOKEN", TOKEN).replace("CERT", CERT).parse()
    }

    #[test]
    fn a_url_names_host_and_port() {
        for (url, name) in [
            ("quic://TOKEN@gpu.local:5000?cert=CERT", "gpu.local:5000"),
            ("quic://TOKEN@10.0.0.7?cert=CERT", "10.0.0.7:4433"),
            ("quic://TOKEN@[::1]:7/?cert=CERT", "[::1]:7"),
            ("quic://TOKEN@[fe80::2]?cert=CERT", "[fe80::2]:4433"),
        ] {
            let parsed = parse(url).unwrap();
            assert_eq!(parsed.name(), name);
            assert_eq!(parsed.to_secret_string().parse::<PairingUrl>().unwrap(), parsed, "{url}");
        }
    }

    #[test]
    fn the_wrong_part_is_named_and_the_token_is_not_shown() {
        for (url, part) in [
            ("http://TOKEN@h?cert=CERT", "quic://"),
            ("quic://TOKEN@h:1", "?cert="),
            ("quic://h:1?cert=CERT", "TOKEN@"),
            ("quic://TOKEN7@h:1?cert=CERT", "token"),
            ("quic://TOKEN@:1?cert=CERT", "no host"),
            ("quic://TOKEN@a b:1?cert=CERT", "host \"a b\""),
            ("quic://TOKEN@h:0?cert=CERT", "port \"0\""),
            ("quic://TOKEN@h:99999?cert=CERT", "port \"99999\""),
            ("quic://TOKEN@::1:4433?cert=CERT", "brackets"),
            ("quic://TOKEN@[::1?cert=CERT", "["),
            ("quic://TOKEN@[h]:1?cert=CERT", "no IPv6"),
            ("quic://TOKEN@h:1?cert=12", "fingerprint"),
            ("quic://TOKEN@h:1?cert=CERT&cert=CERT", "one cert="),
            ("quic://TOKEN@h:1?key=CERT", "\"key\""),
            ("quic://TOKEN@h:1?TOKEN", "\"***\" after the ?"),
            ("quic://TOKEN@h/TOKEN?cert=CERT", "host \"h/***\""),
            ("quic://TOKEN@TOKEN?cert=CERT", "host \"***\""),
            ("quic://TOKEN@h:TOKEN?cert=CERT", "port \"***\""),
        ] {
            let message = parse(url).unwrap_err().to_string();
            assert!(message.contains(part), "{url}: {message}");
            assert!(!message.contains(TOKEN), "{message}");
        }
    }

    #[test]
    fn the_token_is_never_displayed() {
        let url = parse("quic://TOKEN@h:1?cert=CERT").unwrap();
        for shown in [format!("{url}"), format!("{url:?}"), format!("{:?}", url.token())] {
            assert!(!shown.contains("0011"), "{shown}");
        }
    }

    #[test]
    fn a_file_holds_the_url() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(file, "\nquic://{TOKEN}@h:1?cert={CERT}").unwrap();
        let argument = format!("@{}", file.path().display());
        assert_eq!(PairingUrl::from_argument(&argument).unwrap().name(), "h:1");

        let missing = PairingUrl::from_argument("@/no/such/file").unwrap_err().to_string();
        assert!(missing.contains("/no/such/file"), "{missing}");
    }

    #[test]
    fn a_worker_on_all_addresses_is_reached_at_one_of_them() {
        let identity = Identity::generate().unwrap();
        for (bound, port) in [("0.0.0.0:5", 5), ("[::]:6", 6), ("127.0.0.1:7", 7)] {
            for url in pairing_urls(bound.parse().unwrap(), &identity) {
                let parsed: PairingUrl = url.to_secret_string().parse().unwrap();
                assert_eq!(parsed.port(), port);
                assert!(!parsed.resolve().unwrap()[0].ip().is_unspecified());
            }
        }
    }
}
