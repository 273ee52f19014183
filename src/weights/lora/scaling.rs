//! How strongly the changes of a file act as it was trained, where no tensor of it says so: PEFT's
//! `adapter_config.json` beside the file, and the same fields in what diffusers writes into it.
//! Separate because these are configurations, and tensors say the rest.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::super::{Component, bytes, json, safetensors};
use crate::error::{Error, Result};

/// PEFT's `lora_alpha`, and whether it is divided by the root of the rank.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Scaling {
    pub(super) alpha: f64,
    pub(super) is_rank_stabilized: bool,
}

/// Of each component of which anything is said.
///
/// # Errors
/// If it is said in a way that is not covered.
pub(super) fn of_file(path: &Path) -> Result<BTreeMap<Component, Scaling>> {
    let components = [(Component::Unet, "unet."), (Component::TextEncoder, "text_encoder.")];
    let mut found = BTreeMap::new();
    let config = path.with_file_name("adapter_config.json");
    if path.file_stem().is_some_and(|stem| stem == "adapter_model") && config.is_file() {
        let config = json::read(&config)?;
        let whole = scaling(&config, "").map_err(|error| error.context("adapter_config.json"))?;
        found.extend(
            whole
                .map(|whole| components.map(|(component, _)| (component, whole)))
                .into_iter()
                .flatten(),
        );
    }
    if path.extension().is_some_and(|suffix| suffix == "safetensors") {
        let (file, _) = bytes::map(path)?;
        let metadata = safetensors::metadata(&file);
        if let Some(text) = metadata.get("lora_adapter_metadata") {
            let what = "its lora_adapter_metadata";
            let config = serde_json::from_str::<Value>(text)
                .map_err(|error| Error::model(format!("{what}: {error}")))?;
            for (component, prefix) in components {
                let part = scaling(&config, prefix).map_err(|error| error.context(what))?;
                found.extend(part.map(|part| (component, part)));
            }
        }
    }
    Ok(found)
}

/// What a configuration says under the names that begin with `prefix`.
fn scaling(config: &Value, prefix: &str) -> Result<Option<Scaling>> {
    let field = |name: &str| config.get(format!("{prefix}{name}"));
    let is_set = |name: &str| field(name).and_then(Value::as_bool).unwrap_or(false);
    let refused = ["use_dora", "lora_bias", "fan_in_fan_out"].into_iter().find(|name| is_set(name));
    let has_pattern = field("alpha_pattern").and_then(Value::as_object);
    let refused = refused.or(has_pattern.filter(|p| !p.is_empty()).map(|_| "alpha_pattern"));
    if let Some(name) = refused {
        return Err(Error::model(format!("{prefix}{name} is not covered")));
    }
    let alpha = field("lora_alpha").and_then(Value::as_f64).filter(|alpha| alpha.is_finite());
    let is_rank_stabilized = is_set("use_rslora");
    Ok(alpha.map(|alpha| Scaling { alpha, is_rank_stabilized }))
}
