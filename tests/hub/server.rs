//! A small hub on a loopback port: HTTP/1.1 by hand, so that a test can cut, stall and lie.
//! Separate because the tests should read as what they test.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use sha2::{Digest, Sha256};

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A request as it came; header names in lower case.
#[derive(Debug, Clone)]
pub struct Request {
    pub method: String,
    pub path: String,
    pub headers: BTreeMap<String, String>,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// A request for the content of a file, wherever it is kept.
    pub fn is_download(&self) -> bool {
        self.method == "GET" && !self.path.starts_with("/api/")
    }

    pub fn is_listing(&self) -> bool {
        self.path.starts_with("/api/")
    }
}

#[derive(Debug, Clone, Default)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// Bytes of the body after which the connection is closed.
    pub cut: Option<usize>,
    /// What is sent is followed by nothing, until the client goes away.
    pub stall: bool,
}

impl Reply {
    pub fn new(status: u16) -> Self {
        Self { status, ..Self::default() }
    }

    pub fn header(mut self, name: &str, value: impl ToString) -> Self {
        self.headers.retain(|(other, _)| !other.eq_ignore_ascii_case(name));
        self.headers.push((name.to_owned(), value.to_string()));
        self
    }

    pub fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }

    pub fn cut(mut self, after: usize) -> Self {
        self.cut = Some(after);
        self
    }
}

type Handler = dyn Fn(&Request) -> Reply + Send + Sync;

/// Listens until it is dropped.
pub struct Server {
    address: SocketAddr,
    log: Arc<Mutex<Vec<Request>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub fn start(handler: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let (log, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (shared, stopped) = (Arc::clone(&log), Arc::clone(&stop));
        let handler: Arc<Handler> = Arc::new(handler);
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::SeqCst) {
                    break;
                }
                let (log, handler) = (Arc::clone(&shared), Arc::clone(&handler));
                std::thread::spawn(move || {
                    // A client that goes away in the middle is what some tests are about.
                    let _ = serve(stream.expect("a client"), &log, &*handler);
                });
            }
        });
        Self { address, log, stop, thread: Some(thread) }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What has been asked so far, and forgets it.
    pub fn take_log(&self) -> Vec<Request> {
        std::mem::take(&mut self.log.lock().expect("the log"))
    }

    pub fn downloads(&self) -> usize {
        self.log.lock().expect("the log").iter().filter(|r| r.is_download()).count()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the one who accepts.
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(mut stream: TcpStream, log: &Mutex<Vec<Request>>, handler: &Handler) -> Option<()> {
    let request = read_request(&mut BufReader::new(stream.try_clone().ok()?))?;
    log.lock().expect("the log").push(request.clone());
    let reply = handler(&request);
    let mut head = format!("HTTP/1.1 {} Reason\r\nConnection: close\r\n", reply.status);
    for (name, value) in &reply.headers {
        head += &format!("{name}: {value}\r\n");
    }
    if !reply.headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("content-length")) {
        head += &format!("Content-Length: {}\r\n", reply.body.len());
    }
    stream.write_all(format!("{head}\r\n").as_bytes()).ok()?;
    if request.method != "HEAD" {
        let end = reply.cut.unwrap_or(reply.body.len()).min(reply.body.len());
        stream.write_all(&reply.body[..end]).ok()?;
    }
    if reply.stall {
        // Returns when the client closes.
        let _ = stream.read(&mut [0; 1]);
    }
    Some(())
}

fn read_request(reader: &mut impl BufRead) -> Option<Request> {
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split_whitespace();
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        match line.trim_end().split_once(": ") {
            Some((name, value)) => headers.insert(name.to_ascii_lowercase(), value.to_owned()),
            None => break,
        };
    }
    Some(Request { method, path, headers })
}

/// A repository `org/name`, served as huggingface.co does it.
#[derive(Clone)]
pub struct Model {
    pub commit: String,
    /// Path, content, and whether it is in large-file storage.
    pub files: Vec<(String, Vec<u8>, bool)>,
    /// Where large files are kept: the beginning of their address.
    pub storage: String,
}

impl Model {
    /// A small file and a large one.
    pub fn new() -> Self {
        Self {
            commit: COMMIT.to_owned(),
            files: vec![
                ("model_index.json".to_owned(), b"{}".to_vec(), false),
                ("unet/big file.bin".to_owned(), large(), true),
            ],
            storage: "/storage".to_owned(),
        }
    }

    pub fn reply(&self, request: &Request) -> Reply {
        if let Some(revision) = request.path.strip_prefix("/api/models/org/name/revision/") {
            return match revision {
                "main" | "v1%2Fa" => Reply::new(200).body(self.listing()),
                revision if revision == self.commit => Reply::new(200).body(self.listing()),
                _ => Reply::new(404).header("X-Error-Code", "RevisionNotFound"),
            };
        }
        if let Some(sha256) = request.path.strip_prefix("/storage/") {
            let file = self.files.iter().find(|(_, content, _)| sha256_of(content) == sha256);
            return file.map_or(Reply::new(404), |(_, content, _)| ranged(request, content));
        }
        let prefix = format!("/org/name/resolve/{}/", self.commit);
        let Some(name) = request.path.strip_prefix(&prefix).map(|name| name.replace("%20", " "))
        else {
            return Reply::new(404).header("X-Error-Code", "RepoNotFound");
        };
        match self.files.iter().find(|(file, ..)| *file == name) {
            None => Reply::new(404).header("X-Error-Code", "EntryNotFound"),
            Some((_, content, false)) => ranged(request, content)
                .header("ETag", format!("\"{}\"", &sha256_of(content)[..40]))
                .header("X-Repo-Commit", &self.commit),
            Some((_, content, true)) => {
                let sha256 = sha256_of(content);
                Reply::new(302)
                    .header("Location", format!("{}/{sha256}", self.storage))
                    .header("X-Linked-Etag", format!("\"{sha256}\""))
                    .header("X-Linked-Size", content.len())
                    .header("X-Repo-Commit", &self.commit)
            }
        }
    }

    fn listing(&self) -> String {
        let files: Vec<String> =
            self.files.iter().map(|(file, ..)| format!("{{\"rfilename\": {file:?}}}")).collect();
        format!("{{\"sha\": \"{}\", \"siblings\": [{}]}}", self.commit, files.join(", "))
    }
}

/// The content of the large file of [`Model::new`].
pub fn large() -> Vec<u8> {
    (0..100_000u32).flat_map(u32::to_le_bytes).collect()
}

pub fn sha256_of(content: &[u8]) -> String {
    Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The content, or the part of it that a `Range: bytes=N-` asks for.
pub fn ranged(request: &Request, content: &[u8]) -> Reply {
    let start = request.header("range").and_then(|range| range.strip_prefix("bytes="));
    match start.and_then(|range| range.strip_suffix('-')?.parse::<usize>().ok()) {
        None => Reply::new(200).header("Content-Length", content.len()).body(content),
        Some(start) if start >= content.len() => Reply::new(416),
        Some(start) => Reply::new(206)
            .header(
                "Content-Range",
                format!("bytes {start}-{}/{}", content.len() - 1, content.len()),
            )
            .body(&content[start..]),
    }
}
