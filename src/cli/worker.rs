//! `tiny-sd worker`: its flags, and running it. Separate from pictures because a worker knows
//! nothing of Stable Diffusion: it owns buffers and runs ops.

use std::ffi::OsString;
use std::io::Write;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use clap::{CommandFactory, Parser, ValueEnum};

use super::command::usage;
use super::device::cuda_ordinal;
use super::job::Request;
use crate::backend::{Backend, cache_folder, cpu, cuda};
use crate::error::{Error, Result};
use crate::remote::disk_library::{self, DiskLibrary};
use crate::remote::executor::Limits as SessionLimits;
use crate::remote::hello::Offer;
use crate::remote::quic::server::{self, Limits, Server};
use crate::remote::trust::Identity;
use crate::remote::url::pairing_urls;
use crate::remote::worker::Worker;
use crate::remote::{PROTOCOL_VERSION, hello};

/// Buffers of one session: a UNet has some thousands of tensors, programs some more.
const MAX_BUFFERS: usize = 1 << 17;

/// Lends this machine's power to `tiny-sd --device quic://…` on other machines.
///
/// Once it listens, standard output holds its pairing URL, which contains the secret token: whoever
/// has it can use the worker. Everything else goes to standard error, and never the token.
#[derive(Debug, Parser)]
#[command(name = "tiny-sd worker", version, after_help = EXAMPLES)]
pub struct WorkerJob {
    /// Address and UDP port to listen on; port 0 is any free one
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:4433")]
    pub listen: String,

    /// Where ops run: cpu, cuda (the first NVIDIA GPU), or cuda:N; `tiny-sd devices` lists them
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: WorkerDevice,

    /// Threads of the CPU [default: one per physical core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,

    /// Keep weights small: about half the memory, slower convolutions
    #[arg(long)]
    pub low_memory: bool,

    /// Clients at a time; others wait for their turn
    #[arg(long, value_name = "N", default_value = "4")]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=256))]
    pub max_sessions: u16,

    /// Clients that wait for their turn; others are told that the worker is busy
    #[arg(long, value_name = "N", default_value = "16")]
    #[arg(value_parser = clap::value_parser!(u16).range(0..=1024))]
    pub max_waiting: u16,

    /// Memory of one session's buffers, such as 8G
    #[arg(long, value_name = "SIZE", default_value = "8G")]
    pub session_memory: Bytes,

    /// Memory of the weights that sessions share, such as 16G
    #[arg(long, value_name = "SIZE", default_value = "16G")]
    pub weights_memory: Bytes,

    /// Folder for weights that clients have sent; none keeps them in memory
    /// [default: ~/.cache/tiny-sd/weights]
    #[arg(long, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,

    /// Size of that folder at most, or of memory where it cannot be written; the least recently
    /// used weights go first
    #[arg(long, value_name = "SIZE", default_value = "20G")]
    pub cache_size: Bytes,

    /// End a session after so many seconds without a word [default: never]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    pub idle_timeout: Option<u32>,

    /// File with the certificate and the token; made if it is not there
    /// [default: ~/.local/state/tiny-sd/worker-identity]
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,

    /// How the log on standard error looks
    #[arg(long, value_enum, default_value = "text")]
    pub log_format: LogFormat,
}

const EXAMPLES: &str = "\
Examples:
  tiny-sd worker --listen 0.0.0.0:4433              for other machines
  (umask 077; tiny-sd worker --listen 127.0.0.1:0 > url.txt)
                                                    any free port; the URL is secret
  tiny-sd \"a fox\" --device @url.txt                 a client, whose token does not show in ps

Exit codes: 0 ended as asked, 2 a wrong command line or something it names that cannot be used (an
address, the token file), 1 anything else.

SIGTERM or Ctrl-C ends it when the running sessions have ended, a second one at once.";

/// Where a worker's ops run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WorkerDevice {
    /// This machine's processor.
    Cpu,
    /// An NVIDIA GPU of this machine, by its number.
    Cuda(usize),
}

impl std::fmt::Display for WorkerDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            WorkerDevice::Cpu => f.write_str("cpu"),
            WorkerDevice::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl FromStr for WorkerDevice {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "cpu" => Ok(WorkerDevice::Cpu),
            text if text.starts_with("cuda") => cuda_ordinal(text).map(WorkerDevice::Cuda),
            _ => Err("a worker's device is cpu, cuda, or cuda:N".into()),
        }
    }
}

/// How the log looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// A number of bytes, written with K, M, G or T (powers of 1024).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (number, unit) = text.split_at(text.trim_end_matches(char::is_alphabetic).len());
        let shift = match unit.to_ascii_uppercase().as_str() {
            "" | "B" => Some(0),
            "K" | "KB" | "KIB" => Some(10),
            "M" | "MB" | "MIB" => Some(20),
            "G" | "GB" | "GIB" => Some(30),
            "T" | "TB" | "TIB" => Some(40),
            _ => None,
        };
        let bytes = number.parse::<u64>().ok().zip(shift);
        let bytes = bytes.and_then(|(number, shift)| number.checked_mul(1 << shift));
        match bytes {
            Some(bytes) if bytes > 0 => Ok(Bytes(bytes)),
            _ => Err("a size such as 512M or 8G".into()),
        }
    }
}

/// Its flags.
pub(super) fn command() -> clap::Command {
    WorkerJob::command()
}

/// Parses what follows `tiny-sd worker`.
///
/// # Errors
/// One line that names what is wrong.
pub(super) fn parse(flags: impl Iterator<Item = OsString>) -> Result<Request> {
    let words = std::iter::once("tiny-sd worker".into()).chain(flags);
    match WorkerJob::try_parse_from(words) {
        Ok(job) => Ok(Request::Work(Box::new(job))),
        Err(error) if !error.use_stderr() => Ok(Request::Show(error)),
        Err(error) => Err(usage(&error)),
    }
}

/// Runs a worker until it is asked to stop.
///
/// # Errors
/// If it cannot listen, or its files cannot be used.
pub fn work(job: &WorkerJob) -> Result<()> {
    cpu::check_kernel_path()?;
    start_log(job.log_format);
    let identity = Identity::load_or_create(job.token_file.as_deref())?;
    let (tell, lost) = channel();
    let server = Arc::new(start(job, &identity, tell)?);
    let mut stdout = std::io::stdout().lock();
    for url in pairing_urls(server.local_addr(), &identity) {
        writeln!(stdout, "{}", url.to_secret_string())
            .and_then(|()| stdout.flush())
            .map_err(|error| Error::other(format!("cannot print the pairing URL: {error}")))?;
    }
    drop(stdout);
    tracing::info!(address = %server.local_addr(), device = job.device.to_string(), "listening");
    let signalled = server.clone();
    let mut is_ending = false;
    ctrlc::set_handler(move || {
        if std::mem::replace(&mut is_ending, true) {
            signalled.stop();
        } else {
            tracing::info!("ending when the running sessions have ended; again ends at once");
            signalled.begin_shutdown();
        }
    })
    .map_err(|error| Error::other(format!("cannot watch for signals: {error}")))?;
    let is_lost = Arc::new(AtomicBool::new(false));
    let (watched, found) = (server.clone(), is_lost.clone());
    std::thread::spawn(move || {
        if lost.recv().is_ok() {
            found.store(true, Ordering::Relaxed);
            // The client whose session showed it is told so before all ends.
            watched.begin_shutdown();
            std::thread::sleep(LAST_WORDS);
            watched.stop();
        }
    });
    server.wait();
    if is_lost.load(Ordering::Relaxed) {
        return Err(Error::other(format!("{} {LOST}", job.device)));
    }
    tracing::info!("ended");
    Ok(())
}

/// How long sessions may go on when the device has failed: they cannot do anything with it.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What is wrong with a device that will not work again in this process.
const LOST: &str = "has failed, and works again only when the worker is started anew";

fn start(job: &WorkerJob, identity: &Identity, tell: Sender<()>) -> Result<Server> {
    let library = match &job.cache_dir {
        Some(folder) if folder.as_os_str() == "none" => {
            DiskLibrary::in_memory(disk_library::Limits::new(job.cache_size.0))
        }
        Some(folder) => open_library(folder.clone(), job)?,
        None => open_library(default_cache()?, job)?,
    };
    let threads = job.threads.map_or(0, usize::from);
    let settings = cpu::Settings { threads, low_memory: job.low_memory };
    let start = Start { job, identity, library, tell };
    match job.device {
        WorkerDevice::Cpu => start.on::<cpu::Storage>(cpu::Device::open(settings)?),
        WorkerDevice::Cuda(ordinal) => start.on::<cuda::Storage>(cuda::Device::open(ordinal)?),
    }
}

/// What a worker needs beside its device.
struct Start<'a> {
    job: &'a WorkerJob,
    identity: &'a Identity,
    library: DiskLibrary,
    /// Told when the device has failed for good.
    tell: Sender<()>,
}

impl Start<'_> {
    fn on<B: Backend>(self, device: B::Device) -> Result<Server> {
        let Self { job, identity, library, tell } = self;
        let limits = SessionLimits { memory_bytes: job.session_memory.0, buffers: MAX_BUFFERS };
        let offer = offer(&device);
        let worker = Worker::<B>::new(device, limits, job.weights_memory.0);
        let limits = Limits {
            max_sessions: job.max_sessions.into(),
            max_waiting: job.max_waiting.into(),
            idle_timeout: job.idle_timeout.map(|seconds| Duration::from_secs(seconds.into())),
            offer,
            ..Limits::default()
        };
        serve(address(&job.listen)?, identity, limits, (worker, tell), library)
    }
}

fn offer(device: &impl crate::backend::Device) -> Offer {
    Offer { kernel_path: device.kernel_path(), default_dtype: Some(device.default_dtype()) }
}

/// A worker on this machine's processor that anything in this process can reach: `--device mock`.
///
/// # Errors
/// If it cannot listen.
pub(super) fn start_mock(settings: cpu::Settings, identity: &Identity) -> Result<Server> {
    let limits = SessionLimits { memory_bytes: u64::MAX, buffers: MAX_BUFFERS };
    let device = cpu::Device::open(settings)?;
    let server = Limits { offer: offer(&device), ..Limits::default() };
    let worker = Worker::<cpu::Storage>::new(device, limits, u64::MAX);
    let library = DiskLibrary::in_memory(disk_library::Limits::new(64 << 30));
    let here = SocketAddr::from(([127, 0, 0, 1], 0));
    let (tell, _) = channel();
    serve(here, identity, server, (worker, tell), library)
}

fn serve<B: Backend>(
    address: SocketAddr,
    identity: &Identity,
    limits: Limits,
    (worker, tell): (Worker<B>, Sender<()>),
    library: DiskLibrary,
) -> Result<Server> {
    let hello = hello::Hello { version: PROTOCOL_VERSION, schema: crate::remote::schema() };
    server::serve(address, identity, hello, limits, move |info| {
        if worker.is_lost() {
            // Of several one is enough.
            let _ = tell.send(());
            return Err(Error::other(format!("the worker's device {LOST}")));
        }
        let span = tracing::info_span!("session", number = info.number);
        span.in_scope(|| worker.session(library.session(), info.waker))
    })
}

fn open_library(folder: PathBuf, job: &WorkerJob) -> Result<DiskLibrary> {
    DiskLibrary::open(&folder, disk_library::Limits::new(job.cache_size.0))
}

fn default_cache() -> Result<PathBuf> {
    let folder = cache_folder::of_user("weights");
    folder.ok_or_else(|| Error::usage("there is no home folder: give --cache-dir"))
}

fn address(listen: &str) -> Result<SocketAddr> {
    let found = listen.to_socket_addrs().ok().and_then(|mut addresses| addresses.next());
    found.ok_or_else(|| {
        Error::usage(format!("--listen {listen}: not an address such as 0.0.0.0:4433"))
    })
}

fn start_log(format: LogFormat) {
    let log = tracing_subscriber::fmt().with_writer(std::io::stderr).with_target(false);
    // A second log in one process (tests) stays with the first.
    let _ = match format {
        LogFormat::Text => log.with_ansi(false).try_init(),
        LogFormat::Json => log.json().try_init(),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_their_units() {
        let check = |text: &str, expected: Option<u64>| {
            assert_eq!(text.parse::<Bytes>().ok().map(|bytes| bytes.0), expected, "{text}");
        };
        check("512", Some(512));
        check("8G", Some(8 << 30));
        check("1kib", Some(1 << 10));
        check("0", None);
        check("G", None);
        check("8X", None);
        check("99999999999T", None);
        check("-1G", None);
    }
}
