//! A model as a folder in diffusers layout: one folder per component, each with its configuration
//! and weights. Separate because the choice of files is made from names, and this has the files;
//! what is downloaded from a hub ends as such a folder too.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::choice::{Choice, Component, Variant, choose, config_files};
use super::{Checkpoint, defaults, json, names};
use crate::error::{Error, Result};

/// A folder that has the configuration of every component. Weights are looked for when they are
/// asked for.
#[derive(Debug, Clone)]
pub struct ModelFolder {
    path: PathBuf,
    /// Whether it is a VAE's alone: a component's folder, without the folder's name.
    is_vae: bool,
}

impl ModelFolder {
    /// Looks at what is there; nothing is read yet. A `model_index.json` may be missing.
    ///
    /// # Errors
    /// If there is no such folder, or it lacks configurations or the tokenizer: all are named.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let folder = Self { path: path.into(), is_vae: false };
        let path = folder.path.display();
        if folder.path.is_file() {
            return Err(Error::model(format!(
                "{path} is a file: give the folder of a model in diffusers layout, which has \
                 unet/, vae/, text_encoder/, scheduler/ and tokenizer/"
            )));
        }
        if folder.path.exists() && !folder.path.is_dir() {
            return Err(Error::model(format!("{path} is neither a file nor a folder")));
        }
        if !folder.path.is_dir() {
            return Err(Error::model(format!("there is no folder {path}")));
        }
        config_files(&|name| folder.has(name)).map_err(|error| error.context(path))?;
        Ok(folder)
    }

    /// A folder with a VAE: as a model has it, or its files at the top.
    ///
    /// # Errors
    /// If there is no such folder, or it has no configuration of a VAE.
    pub fn vae(path: impl Into<PathBuf>) -> Result<Self> {
        let mut folder = Self { path: path.into(), is_vae: true };
        let path = folder.path.display();
        if !folder.path.is_dir() {
            return Err(Error::model(format!("--vae {path}: there is no such folder")));
        }
        // A model that is given for its VAE has a configuration of its own at the top at most.
        let [alone, within] = [true, false].map(|is_vae| {
            let folder = Self { path: folder.path.clone(), is_vae };
            folder.has(Component::Vae.config_file())
        });
        if !alone && !within {
            return Err(Error::model(format!(
                "--vae {path}: it has neither config.json nor vae/config.json"
            )));
        }
        folder.is_vae = !within;
        Ok(folder)
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `model_index.json`, which names the pipeline and its components' classes.
    ///
    /// # Errors
    /// If it is there and is not JSON.
    pub fn model_index(&self) -> Result<Option<Value>> {
        let name = "model_index.json";
        self.has(name).then(|| json::read(&self.file(name))).transpose()
    }

    /// The `config.json` of a component.
    ///
    /// # Errors
    /// If it cannot be read or is not JSON.
    pub fn config(&self, component: Component) -> Result<Value> {
        json::read(&self.file(component.config_file()))
    }

    /// `scheduler/scheduler_config.json`; see [`json::as_f64`] for its `-Infinity`.
    ///
    /// # Errors
    /// If it cannot be read or is not JSON.
    pub fn scheduler_config(&self) -> Result<Value> {
        json::read(&self.file("scheduler/scheduler_config.json"))
    }

    /// What its [`defaults`] say; nothing where it has none.
    ///
    /// # Errors
    /// If they cannot be read or are none.
    pub fn defaults(&self) -> Result<Map<String, Value>> {
        if !self.has(defaults::FILE) {
            return Ok(Map::new());
        }
        let path = self.file(defaults::FILE);
        let text = json::read_text(&path)?;
        defaults::parse(&text).map_err(|error| error.context(path.display()))
    }

    /// The folder of the tokenizer's files.
    pub fn tokenizer_dir(&self) -> PathBuf {
        self.file("tokenizer")
    }

    /// A component's weights under today's names, mapped: nothing is copied.
    ///
    /// # Errors
    /// If there are none, with the names looked for; if a file cannot be read as what it should
    /// be; if an index names a file that is not there; if two tensors have one name.
    pub fn checkpoint(
        &self,
        component: Component,
        variant: Option<&Variant>,
    ) -> Result<Checkpoint> {
        let choice = choose(component, variant, &|name| self.has(name))
            .map_err(|error| error.context(self.path.display()))?;
        let checkpoint = if choice.is_index {
            self.read_shards(&choice)?
        } else {
            Checkpoint::read(&self.file(&choice.file), choice.format)?
        };
        names::canonical_names(component, checkpoint)
            .map_err(|error| error.context(self.file(&choice.file).display()))
    }

    /// The files of a component's weights, by their paths in the folder.
    ///
    /// # Errors
    /// As [`checkpoint`](Self::checkpoint).
    pub fn weight_files(
        &self,
        component: Component,
        variant: Option<&Variant>,
    ) -> Result<Vec<String>> {
        let choice = choose(component, variant, &|name| self.has(name))
            .map_err(|error| error.context(self.path.display()))?;
        if choice.is_index { self.shards(&choice) } else { Ok(vec![choice.file]) }
    }

    /// The weight files that an index names; all are there.
    fn shards(&self, choice: &Choice) -> Result<Vec<String>> {
        let index_path = self.file(&choice.file);
        let index = json::read_text(&index_path)?;
        let shards = choice.shards(&index).map_err(|error| error.context(self.path.display()))?;
        let missing: Vec<_> = shards.iter().filter(|name| !self.has(name)).cloned().collect();
        if !missing.is_empty() {
            return Err(Error::model(format!(
                "{} names files that are not there: {}",
                index_path.display(),
                missing.join(", ")
            )));
        }
        Ok(shards)
    }

    fn read_shards(&self, choice: &Choice) -> Result<Checkpoint> {
        let mut whole = Checkpoint::default();
        for shard in self.shards(choice)? {
            let path = self.file(&shard);
            for (name, tensor) in Checkpoint::read(&path, choice.format)?.tensors {
                whole.insert(name, tensor).map_err(|error| error.context(path.display()))?;
            }
        }
        Ok(whole)
    }

    fn has(&self, name: &str) -> bool {
        self.file(name).is_file()
    }

    fn file(&self, name: &str) -> PathBuf {
        match name.strip_prefix("vae/") {
            Some(name) if self.is_vae => self.path.join(name),
            Some(_) | None => self.path.join(name),
        }
    }

    /// Where one of the [`weight_files`](Self::weight_files) is.
    pub(super) fn weight_path(&self, name: &str) -> PathBuf {
        self.file(name)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A folder with the configurations of a model and the fixture of safetensors as its VAE.
    fn model() -> (tempfile::TempDir, ModelFolder) {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "text_encoder/config.json",
            "unet/config.json",
            "vae/config.json",
            "scheduler/scheduler_config.json",
            "tokenizer/tokenizer.json",
        ] {
            write(dir.path(), name, br#"{"a": -Infinity, "b": null}"#);
        }
        write(dir.path(), "vae/diffusion_pytorch_model.safetensors", &fixture("dense.safetensors"));
        let folder = ModelFolder::open(dir.path()).unwrap();
        (dir, folder)
    }

    fn fixture(name: &str) -> Vec<u8> {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/weights");
        fs::read(fixtures.join(name)).unwrap()
    }

    fn write(dir: &Path, name: &str, bytes: &[u8]) {
        let path = dir.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    fn message<T>(result: Result<T>) -> String {
        result.err().unwrap().to_string()
    }

    #[test]
    fn a_folder_gives_configurations_and_weights() {
        let (dir, folder) = model();
        let scheduler = folder.scheduler_config().unwrap();
        assert_eq!(json::as_f64(&scheduler["a"]), Some(f64::NEG_INFINITY));
        assert!(folder.config(Component::Unet).unwrap()["b"].is_null());
        assert!(folder.tokenizer_dir().join("tokenizer.json").is_file());
        assert_eq!(folder.model_index().unwrap(), None);
        write(dir.path(), "model_index.json", br#"{"_class_name": "StableDiffusionPipeline"}"#);
        let index = folder.model_index().unwrap().unwrap();
        assert_eq!(index["_class_name"], "StableDiffusionPipeline");
        assert_eq!(folder.checkpoint(Component::Vae, None).unwrap().len(), 16);
        // A pickle where there is nothing better.
        write(dir.path(), "unet/diffusion_pytorch_model.bin", &fixture("layouts.bin"));
        let unet = folder.checkpoint(Component::Unet, None).unwrap();
        assert_eq!(unet.get("channels_last").unwrap().layout().stride(), [16, 1, 8, 4]);
        let error = message(folder.checkpoint(Component::TextEncoder, None));
        assert!(error.contains("text_encoder has no weights: looked for text_encoder/model.saf"));
    }

    #[test]
    fn shards_become_one_checkpoint() {
        let (dir, folder) = model();
        let index = |shards: [&str; 2]| {
            let map = serde_json::json!({"weight_map": {"weight": shards[0], "0.bias": shards[1]}});
            map.to_string().into_bytes()
        };
        let variant = Variant::parse("fp16").unwrap();
        let unet = || folder.checkpoint(Component::Unet, Some(&variant));
        let name = "unet/diffusion_pytorch_model.bin.index.fp16.json";
        write(dir.path(), name, &index(["a-1.bin", "a-2.bin"]));
        write(dir.path(), "unet/a-1.bin", &fixture("dict.bin"));
        let error = message(unet());
        assert!(error.ends_with("names files that are not there: unet/a-2.bin"), "{error}");
        write(dir.path(), "unet/a-2.bin", &fixture("module.bin"));
        let whole = unet().unwrap();
        assert!(whole.get("weight").is_some() && whole.get("0.bias").is_some());
        assert_eq!(whole.len(), 1 + 5);
        write(dir.path(), "unet/a-2.bin", &fixture("dict.bin"));
        let error = message(unet());
        assert!(error.contains("a-2.bin: tensor \"weight\" is there twice"), "{error}");
        write(dir.path(), name, &index(["../vae/a.bin", "a-2.bin"]));
        let error = message(unet());
        assert!(error.contains("index.fp16.json") && error.contains("../vae/a.bin"), "{error}");
    }

    #[test]
    fn what_is_no_model_folder_is_refused_with_what_it_lacks() {
        let (dir, folder) = model();
        let error = message(ModelFolder::open(dir.path().join("unet/config.json")));
        assert!(error.contains("is a file: give the folder"), "{error}");
        if cfg!(unix) {
            let error = message(ModelFolder::open("/dev/null"));
            assert_eq!(error, "/dev/null is neither a file nor a folder");
        }
        let error = message(ModelFolder::open(dir.path().join("none")));
        assert!(error.starts_with("there is no folder"), "{error}");
        let error = message(ModelFolder::open(dir.path().join("vae")));
        assert!(error.contains("not a model in diffusers layout"), "{error}");
        fs::remove_file(dir.path().join("unet/config.json")).unwrap();
        let error = message(ModelFolder::open(folder.path()));
        assert!(error.ends_with("the model lacks unet/config.json"), "{error}");
    }
}
