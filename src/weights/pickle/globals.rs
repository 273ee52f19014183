//! The list of all that a pickle may ask for. Separate because it is what stands between a foreign
//! file and this program: nothing that is not here is ever made.

use candle_core::DType;

use super::super::shown;
use crate::error::{Error, Result};

/// All that a pickle may ask for.
const GLOBALS: [(&str, &str, Global); 6] = [
    ("collections", "OrderedDict", Global::OrderedDict),
    ("torch._utils", "_rebuild_tensor_v2", Global::RebuildTensor),
    ("torch", "HalfStorage", Global::Storage(DType::F16)),
    ("torch", "BFloat16Storage", Global::Storage(DType::BF16)),
    ("torch", "FloatStorage", Global::Storage(DType::F32)),
    ("torch", "LongStorage", Global::Storage(DType::I64)),
];

/// What a name on the list stands for.
#[derive(Debug, Clone, Copy)]
pub(super) enum Global {
    /// A dictionary.
    OrderedDict,
    /// A tensor from a storage, offset, size and stride.
    RebuildTensor,
    /// The elements of one storage.
    Storage(DType),
}

/// The global of this name, if it is on the list.
pub(super) fn allowed(module: &str, name: &str) -> Result<Global> {
    let row = GLOBALS.iter().find(|row| (row.0, row.1) == (module, name));
    row.map(|row| row.2).ok_or_else(|| {
        let asked = shown(&format!("{module}.{name}"));
        Error::model(if module == "torch" && name.ends_with("Storage") {
            format!("it holds elements of {asked}; f16, bf16, f32 and i64 are read")
        } else {
            format!(
                "the pickle asks for {asked}, which tensors have no need of and which is never \
                 run here: it may be malicious; use a safetensors version of this model"
            )
        })
    })
}
