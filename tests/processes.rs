//! The real program as worker and as client, each in a process of its own. Separate because every
//! test that crosses the loopback network, kills or signals needs them.

use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use tempfile::TempDir;

/// Longer than anything here takes.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A worker that is stopped when the test ends.
pub struct Worker {
    child: Child,
    pub url: String,
    pub folder: TempDir,
    log: Arc<Log>,
}

/// What a worker has written to standard error so far.
#[derive(Default)]
struct Log {
    lines: Mutex<Vec<String>>,
    more: Condvar,
}

impl Worker {
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    pub fn start_with(more: &[&str]) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), more)
    }

    pub fn start_in(folder: TempDir, more: &[&str]) -> Self {
        Self::start_by(program(), folder, more)
    }

    /// `program` may be a shell that starts it.
    pub fn start_by(mut program: Command, folder: TempDir, more: &[&str]) -> Self {
        let mut child = program
            .args(["worker", "--listen", "127.0.0.1:0", "--threads", "2", "--cache-dir"])
            .arg(folder.path().join("cache"))
            .arg("--token-file")
            .arg(folder.path().join("token"))
            .args(more)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Arc::<Log>::default();
        let (writes, stderr) = (log.clone(), BufReader::new(child.stderr.take().unwrap()));
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                writes.lines.lock().unwrap().push(line);
                writes.more.notify_all();
            }
        });
        let mut url = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut url).unwrap();
        let url = url.trim().to_owned();
        let worker = Self { child, url, folder, log };
        let url = &worker.url;
        assert!(url.starts_with("quic://") && url.contains("?cert="), "{url} {}", worker.log());
        worker
    }

    pub fn cache(&self) -> PathBuf {
        self.folder.path().join("cache")
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn address(&self) -> SocketAddr {
        let (_, rest) = self.url.split_once('@').unwrap();
        rest.split_once('?').unwrap().0.parse().unwrap()
    }

    /// Its URL, but by way of `address`.
    pub fn url_at(&self, address: SocketAddr) -> String {
        self.url.replace(&self.address().to_string(), &address.to_string())
    }

    /// All that it has logged so far.
    pub fn log(&self) -> String {
        self.log.lines.lock().unwrap().join("\n")
    }

    /// Waits until it logs a line with `text`.
    pub fn logs(&self, text: &str) {
        let lines = self.log.lines.lock().unwrap();
        let is_missing = |lines: &mut Vec<String>| !lines.iter().any(|line| line.contains(text));
        let (lines, waited) =
            self.log.more.wait_timeout_while(lines, PATIENCE, is_missing).unwrap();
        assert!(!waited.timed_out(), "no {text:?} in\n{}", lines.join("\n"));
    }

    /// Ends it without a word; its folder stays.
    pub fn kill(mut self) -> TempDir {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        std::mem::replace(&mut self.folder, tempfile::tempdir().unwrap())
    }

    /// Waits for its own end: the exit code.
    pub fn end(mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The program, without what this process's surroundings might tell it.
pub fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tiny-sd"));
    command.env_remove("TINY_SD_DEVICE").env("TINY_SD_CONFIG", "").stdin(Stdio::null());
    command
}

/// A client that makes a picture of a miniature model.
pub fn client(model: &str, device: &str, output: &Path, more: &[&str]) -> Command {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models").join(model);
    let is_given = |flag| more.contains(&flag);
    let mut command = program();
    command
        .args(["a red fox", "--threads", "2", "--stats", "--device", device])
        .arg("-m")
        .arg(model)
        .arg("-o")
        .arg(output)
        .args(if is_given("-s") { &[][..] } else { &["-s", "7"] })
        .args(if is_given("--steps") { &[][..] } else { &["--steps", "3"] })
        .args(more)
        .env("XDG_CACHE_HOME", output.parent().unwrap().join("client-cache"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// A picture's pixels and its `parameters`: all of it but where it was made.
pub fn picture(path: &Path) -> (Vec<u8>, String) {
    let file = BufReader::new(std::fs::File::open(path).unwrap());
    let mut reader = png::Decoder::new(file).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    reader.next_frame(&mut pixels).unwrap();
    let parameters = &reader.info().uncompressed_latin1_text[0];
    assert_eq!(parameters.keyword, "parameters");
    (pixels, parameters.text.clone())
}

/// Runs a client to its end.
pub fn paint(model: &str, device: &str, output: &Path, more: &[&str]) -> Output {
    client(model, device, output, more).output().unwrap()
}

/// What a client that must succeed says.
pub fn succeeds(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{stderr}");
    stderr
}

/// What a client says that must end with one line and the code for errors of the remote device.
pub fn fails(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(4), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.starts_with("error: "), "{stderr}");
    stderr
}

/// The bytes of weights in a client's statistics.
pub fn weight_bytes(stderr: &str) -> u64 {
    let (before, _) = stderr.split_once(" bytes of weights up").expect(stderr);
    before.rsplit(' ').next().unwrap().parse().unwrap()
}

/// A client that runs while the test goes on, and is killed when it ends.
pub struct Running(Child);

impl Running {
    pub fn start(mut command: Command) -> Self {
        Self(command.spawn().unwrap())
    }

    pub fn id(&self) -> u32 {
        self.0.id()
    }

    pub fn end(mut self) -> Output {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        self.0.stdout.take().unwrap().read_to_end(&mut stdout).unwrap();
        self.0.stderr.take().unwrap().read_to_end(&mut stderr).unwrap();
        Output { status: self.0.wait().unwrap(), stdout, stderr }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Sends a signal, such as `INT`.
pub fn signal(name: &str, id: u32) {
    let sent = Command::new("kill").args(["-s", name, &id.to_string()]).status();
    assert!(sent.unwrap().success(), "kill -s {name} {id}");
}
