//! What the tests of the hub share: options, a fetch in one call, and what a result must look like.
//! Separate to keep the tests themselves in sight.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tiny_sd::error::{Error, Kind, Result};
use tiny_sd::weights::hub::{Event, Hub, HubOptions, Progress};

use super::server::{Model, Reply, Request, Server, large, sha256_of};

pub const NAMES: [&str; 2] = ["model_index.json", "unet/big file.bin"];
pub const BIG: &str = "unet/big file.bin";
pub static RUNNING: AtomicBool = AtomicBool::new(false);

/// Options as the environment gives them, but with waits that suit a test.
pub fn options(endpoint: &str, cache: &Path) -> HubOptions {
    let mut options = HubOptions::from_environment(&|name| match name {
        "HF_ENDPOINT" => Some(OsString::from(endpoint)),
        "HF_HUB_CACHE" => Some(cache.into()),
        "HF_TOKEN" => Some("hf_secret".into()),
        _ => None,
    })
    .expect("options");
    options.proxy_from_environment = false;
    options.tries = 3;
    options.retry_wait = Duration::ZERO;
    options
}

pub fn fetch(options: HubOptions, names: &[&str]) -> Result<PathBuf> {
    Hub::new(options, &RUNNING).repository("org/name")?.fetch(names, &mut ())
}

pub fn model_server() -> Server {
    Server::start(|request| Model::new().reply(request))
}

/// The model, except for what `first` answers itself; it is given how often it was called before.
pub fn server_with(
    first: impl Fn(&Request, usize) -> Option<Reply> + Send + Sync + 'static,
) -> Server {
    let calls = AtomicUsize::new(0);
    Server::start(move |request| {
        let model = Model::new();
        if !request.is_download() || request.path.starts_with("/org/") {
            return first(request, usize::MAX).unwrap_or_else(|| model.reply(request));
        }
        let call = calls.fetch_add(1, Ordering::SeqCst);
        first(request, call).unwrap_or_else(|| model.reply(request))
    })
}

pub fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

pub fn model_folder(cache: &Path) -> PathBuf {
    cache.join("models--org--name")
}

pub fn incomplete(cache: &Path) -> PathBuf {
    model_folder(cache).join(format!("blobs/{}.incomplete", sha256_of(&large())))
}

pub fn assert_whole(snapshot: &Path) {
    assert_eq!(fs::read(snapshot.join("model_index.json")).expect("the small file"), b"{}");
    assert_eq!(fs::read(snapshot.join(BIG)).expect("the large file"), large());
}

pub fn assert_one_line(error: &Error, kind: Kind, parts: &[&str]) {
    let message = error.to_string();
    assert_eq!(error.kind(), kind, "{message}");
    assert!(!message.contains(['\n', '\r']) && !message.contains("hf_secret"), "{message}");
    for part in parts {
        assert!(message.contains(part), "'{part}' is not in: {message}");
    }
}

/// Remembers the events, and does something at each.
pub struct Recorder<F>(pub Vec<String>, pub F);

impl<F: FnMut(&Event<'_>)> Progress for Recorder<F> {
    fn report(&mut self, event: &Event<'_>) {
        self.0.push(format!("{event:?}"));
        self.1(event);
    }
}
