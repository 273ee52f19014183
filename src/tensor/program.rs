//! Programs: work that is done again and again with other inputs. Separate because it is neither a
//! view nor an op: a device may record it once and replay it by one message (remote) or one launch
//! (a graph).

use std::fmt::Write;
use std::sync::Arc;

use super::Tensor;
use crate::backend::{Backend, Begun, Device, Outputs, Recording, View};
use crate::error::{Error, Result};

/// Runs `work` on `inputs`, or has the device replay what it did before.
///
/// `name` stands for everything that `work` uses beside its inputs, the model's identity included:
/// under one name, only the inputs' values may vary. Inputs of other shapes, strides or dtypes are
/// another program.
///
/// # Errors
/// What `work` says, or if the device is gone.
pub fn program<B: Backend>(
    name: &str,
    device: &B::Device,
    inputs: &[&Tensor<B>],
    work: impl FnOnce() -> Result<Tensor<B>>,
) -> Result<Tensor<B>> {
    let mut key = name.to_string();
    for input in inputs {
        // Writing to a String cannot fail.
        let _ = write!(key, " {input:?}");
    }
    let storages: Vec<&B> = inputs.iter().map(|input| &*input.storage).collect();
    match device.begin_program(&key, &storages)? {
        Begun::Run => work(),
        Begun::Record => {
            let recording = Recording::of(device);
            let output = work()?;
            let view = View { storage: &*output.storage, layout: &output.layout };
            match recording.end(&[view])? {
                Some(outputs) => the_one(outputs, name),
                None => Ok(output),
            }
        }
        Begun::Replayed(outputs) => the_one(outputs, name),
    }
}

fn the_one<B: Backend>(mut outputs: Outputs<B>, name: &str) -> Result<Tensor<B>> {
    match (outputs.pop(), outputs.is_empty()) {
        (Some((storage, layout)), true) => Ok(Tensor { storage: Arc::new(storage), layout }),
        _ => Err(Error::other(format!("program {name} has not the one result it had"))),
    }
}
