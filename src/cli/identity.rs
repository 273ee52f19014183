//! The hashes of the model in use, computed while its first picture is being made. Separate because
//! nothing waits for them before a picture is there: the weights of a model take a second to read.

use std::sync::OnceLock;
use std::thread::JoinHandle;
use std::time::SystemTime;

use crate::error::{Error, Result};
use crate::remote::digests::Digests;
use crate::weights::{Component, Model, UsedTensors, Variant, config_hash};

/// What a model is by its content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Identity {
    /// Of the weights.
    pub weights_hash: String,
    /// Of the VAE's encoder, if it is in use.
    pub encoder_hash: Option<String>,
    /// Of the VAE's weights, where it is not the model's own.
    pub vae_hash: Option<String>,
    /// Of the configurations and the tokenizer.
    pub config_hash: String,
}

impl Identity {
    /// Of a model on disk, which encodes images or not. Digests of weights that earlier runs
    /// computed are not computed again while their files are the same.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn of(model: &Model, variant: Option<&Variant>, encodes: bool) -> Result<Self> {
        let now = SystemTime::now();
        let tensors = UsedTensors::open(model, variant)?;
        let encoder = encodes.then(|| UsedTensors::of_encoder(model, variant)).transpose()?;
        let mut stored = tensors.as_stored();
        stored.extend(encoder.iter().flat_map(UsedTensors::as_stored));
        let digests = Digests::of_user();
        if let Some(digests) = &digests {
            digests.recall(&stored);
        }
        let weights_hash = tensors.hash();
        let encoder_hash = encoder.as_ref().map(UsedTensors::hash);
        if let Some(digests) = &digests {
            digests.keep(&stored, now);
        }
        let vae_hash = model.vae().map(|_| tensors.hash_of(Component::Vae));
        Ok(Self { weights_hash, encoder_hash, vae_hash, config_hash: config_hash(model)? })
    }
}

/// An [`Identity`] that is being found out.
pub(super) struct Pending {
    found: OnceLock<Result<Identity>>,
    thread: Option<JoinHandle<Result<Identity>>>,
}

impl Pending {
    /// Begins to find it out.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn begin(model: Model, variant: Option<Variant>, encodes: bool) -> Result<Self> {
        let work = move || Identity::of(&model, variant.as_ref(), encodes);
        let thread = std::thread::Builder::new().name("identity".into()).spawn(work);
        let thread =
            thread.map_err(|error| Error::other(format!("cannot start a thread: {error}")))?;
        Ok(Self { found: OnceLock::new(), thread: Some(thread) })
    }

    /// What is found out already.
    pub fn known(identity: Identity) -> Self {
        Self { found: OnceLock::from(Ok(identity)), thread: None }
    }

    /// Waits for it.
    ///
    /// # Errors
    /// If a file could not be read.
    pub fn wait(&mut self) -> Result<Identity> {
        let thread = self.thread.take();
        let found = self.found.get_or_init(|| match thread.map(JoinHandle::join) {
            Some(Ok(found)) => found,
            Some(Err(_)) | None => Err(Error::other("the model's hash could not be computed")),
        });
        found.clone()
    }
}
