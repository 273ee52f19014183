//! The list of all that a pickle may ask for. Separate because it is what stands between a foreign
//! file and this program: nothing that is not here is ever made.

use candle_core::DType;

use super::super::shown;
use crate::error::Error;

/// All that a pickle may ask for.
const GLOBALS: [(&str, &str, Known); 6] = [
    ("collections", "OrderedDict", Known::OrderedDict),
    ("torch._utils", "_rebuild_tensor_v2", Known::RebuildTensor),
    ("torch", "HalfStorage", Known::Storage(DType::F16)),
    ("torch", "BFloat16Storage", Known::Storage(DType::BF16)),
    ("torch", "FloatStorage", Known::Storage(DType::F32)),
    ("torch", "LongStorage", Known::Storage(DType::I64)),
];

/// What a name on the list stands for.
#[derive(Debug, Clone, Copy)]
pub(super) enum Known {
    /// A dictionary.
    OrderedDict,
    /// A tensor from a storage, offset, size and stride.
    RebuildTensor,
    /// The elements of one storage.
    Storage(DType),
}

/// What a pickle asks for by name.
#[derive(Debug, Clone, Copy)]
pub(super) enum Global<'p> {
    /// It is on the list.
    Known(Known),
    /// Anything else, and whatever would be made of it: a name in its place, and nothing more.
    Placeholder {
        /// Its module.
        module: &'p str,
        /// Its name there.
        name: &'p str,
    },
}

/// What stands for the global of this name.
pub(super) fn global<'p>(module: &'p str, name: &'p str) -> Global<'p> {
    let row = GLOBALS.iter().find(|row| (row.0, row.1) == (module, name));
    row.map_or(Global::Placeholder { module, name }, |row| Global::Known(row.2))
}

/// Why there is no tensor where a placeholder is.
pub(super) fn refusal(module: &str, name: &str) -> Error {
    let asked = shown(&format!("{module}.{name}"));
    Error::model(if module == "torch" && name.ends_with("Storage") {
        format!("it holds elements of {asked}; f16, bf16, f32 and i64 are read")
    } else {
        format!(
            "the pickle asks for {asked}, which tensors have no need of and which is never run \
             here: it may be malicious; use a safetensors version of this model"
        )
    })
}
