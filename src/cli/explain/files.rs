//! The files that are chosen, and what their weights take in memory, by their headers. Separate
//! because it is the one part that opens files of weights.

use candle_core::DType;
use serde_json::{Value, json};

use super::{Here, Said};
use crate::backend::cpu;
use crate::cli::device::DeviceSpec;
use crate::cli::info::megabytes;
use crate::cli::job::Job;
use crate::error::Result;
use crate::weights::{Checkpoint, Component, choose, names};

/// What is computed in: every device prefers f32.
pub(super) fn dtype(job: &Job) -> DType {
    let unet = job.device.resolve().ok().map(|plan| plan.stages);
    let is_cuda = matches!(unet, Some([_, DeviceSpec::Cuda(_), _]));
    job.dtype.or(if is_cuda { DType::F16 } else { DType::F32 })
}

pub(super) fn say(
    job: &Job,
    here: Option<(&Here, &[Checkpoint; 3])>,
    said: &mut Said,
) -> Result<()> {
    let embeddings = job.additions.embeddings.iter().map(|file| (&file.path, "embedding", None));
    let loras = job.additions.loras.iter().map(|file| (&file.path, "lora", Some(file.scale)));
    let mut additions = Vec::new();
    for (path, kind, scale) in embeddings.chain(loras) {
        let path = path.display().to_string();
        let shown = scale.map_or(path.clone(), |scale| format!("{path}, {scale} times"));
        said.line(kind, shown);
        additions.push(json!({"kind": kind, "file": path, "scale": scale}));
    }
    said.field("additions", additions);
    let Some((here, checkpoints)) = here else {
        said.field("components", Value::Null);
        said.field("weight_bytes", Value::Null);
        return Ok(());
    };
    let plan = job.device.resolve()?;
    let (mut components, mut sum) = (Vec::new(), 0u64);
    let components_here = Component::ALL.into_iter().zip(checkpoints);
    for ((component, checkpoint), device) in components_here.zip(&plan.stages) {
        let (json, bytes) = of_component(job, here, (component, checkpoint), device, said)?;
        sum = sum.saturating_add(bytes);
        components.push(json);
    }
    said.line("weights", format!("about {} in memory, in all", megabytes(sum)));
    said.field("components", components);
    said.field("weight_bytes", sum);
    Ok(())
}

fn of_component(
    job: &Job,
    Here { model, variant }: &Here,
    (component, checkpoint): (Component, &Checkpoint),
    device: &DeviceSpec,
    said: &mut Said,
) -> Result<(Value, u64)> {
    let files = model.weight_files(component, variant.as_ref())?;
    let is_shared = files.iter().any(|file| file.is_shared);
    let why = match (component, model.vae(), model.path()) {
        (Component::Vae, Some(_), _) => "--vae".to_owned(),
        (_, _, None) => "in the program".to_owned(),
        (_, _, Some(_)) if is_shared => "one file has it all".to_owned(),
        (_, _, Some(path)) => {
            let exists = |name: &str| path.join(name).is_file();
            choose(component, variant.as_ref(), &exists)?.why(variant.as_ref(), &exists)
        }
    };
    let weights = Weights::of(job, component, checkpoint, device);
    let list: Vec<_> = files.iter().map(|file| file.name.as_str()).collect();
    let name = component.folder();
    said.line(name, format!("{} ({why})", list.join(", ")));
    let more = match weights.transformed_bytes {
        0 => String::new(),
        bytes => format!(", {} of them transformed for Winograd's convolution", megabytes(bytes)),
    };
    let Weights { stored_bytes, held_bytes, transformed_bytes } = weights;
    let (stored, held) = (megabytes(stored_bytes), megabytes(held_bytes));
    said.line("", format!("{stored} as they are stored, about {held} in memory{more}"));
    let json = json!({
        "name": name,
        "files": list,
        "why": why,
        "stored_bytes": stored_bytes,
        "memory_bytes": held_bytes,
        "winograd_bytes": transformed_bytes,
    });
    Ok((json, held_bytes))
}

/// Bytes of a component's weights that this job needs.
#[derive(Default)]
struct Weights {
    stored_bytes: u64,
    held_bytes: u64,
    /// Of the latter.
    transformed_bytes: u64,
}

impl Weights {
    fn of(job: &Job, component: Component, weights: &Checkpoint, device: &DeviceSpec) -> Self {
        let encodes = job.image.is_some();
        let is_cpu = *device == DeviceSpec::Cpu;
        let used = weights.iter().filter(|(name, _)| encodes || names::is_used(component, name));
        let mut sum = Self::default();
        for (name, tensor) in used {
            let dims = tensor.layout().dims();
            let stride = if name.contains("downsamplers.") { 2 } else { 1 };
            let transformed = cpu::transformed_bytes(dims, stride);
            let transformed = transformed.filter(|_| is_cpu && !job.low_memory);
            let elements = tensor.layout().shape().elem_count() as u64;
            let element = match is_cpu {
                true => element_bytes_on_cpu(job, name, dims, tensor.dtype()),
                false => dtype(job).size_in_bytes(),
            };
            let plain = elements.saturating_mul(element as u64);
            sum.stored_bytes = sum.stored_bytes.saturating_add(tensor.byte_len());
            sum.held_bytes = sum.held_bytes.saturating_add(transformed.unwrap_or(plain));
            sum.transformed_bytes =
                sum.transformed_bytes.saturating_add(transformed.unwrap_or_default());
        }
        sum
    }
}

/// Bytes of an element of a weight that is not transformed: matrices are kept in halves where that
/// loses nothing, convolutions only with `--low-memory`.
fn element_bytes_on_cpu(job: &Job, name: &str, dims: &[usize], stored: DType) -> usize {
    let is_table = ["token_embedding.", "position_embedding."].iter().any(|t| name.contains(t));
    let is_half = [stored, dtype(job)].iter().any(|dtype| dtype.size_in_bytes() == 2);
    match dims.len() {
        2 if !is_table && is_half => 2,
        4 if job.low_memory && is_half => 2,
        // In f32, whatever they are computed in.
        4 if dtype(job) == DType::F16 => 4,
        _ => dtype(job).size_in_bytes(),
    }
}
