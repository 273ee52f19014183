//! The readers on files that torch and safetensors wrote (`tests/generate_weights.py`), whole, cut
//! and mutated. Separate because both readers are held to the same.

use std::path::PathBuf;
use std::sync::Arc;

use candle_core::DType;
use half::{bf16, f16};
use serde_json::Value;

use super::*;
use crate::backend::host::SharedBytes;

fn fixture(name: &str) -> PathBuf {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/weights");
    PathBuf::from(folder).join(name)
}

fn format_of(name: &str) -> Format {
    if name.ends_with(".bin") { Format::Pickle } else { Format::Safetensors }
}

fn read(name: &str) -> Result<Checkpoint> {
    Checkpoint::read(&fixture(name), format_of(name))
}

fn read_bytes(format: Format, bytes: Vec<u8>) -> Result<Checkpoint> {
    let bytes: SharedBytes = Arc::new(bytes);
    let read = match format {
        Format::Safetensors => safetensors::read(&bytes),
        Format::Pickle => pickle::read(&bytes),
    };
    read.and_then(Checkpoint::all)
}

/// The elements in row-major order, through strides and offset.
fn values(tensor: &HostTensor) -> Vec<f64> {
    let layout = tensor.layout();
    let size = tensor.dtype().size_in_bytes();
    let element = |index: usize| {
        let bytes = &tensor.bytes()[index * size..][..size];
        match tensor.dtype() {
            DType::F16 => f16::from_le_bytes(bytes.try_into().unwrap()).to_f64(),
            DType::BF16 => bf16::from_le_bytes(bytes.try_into().unwrap()).to_f64(),
            DType::F32 => f32::from_le_bytes(bytes.try_into().unwrap()).into(),
            DType::I64 => i64::from_le_bytes(bytes.try_into().unwrap()) as f64,
            other => panic!("{other:?} is not read"),
        }
    };
    let mut indices = vec![layout.start_offset()];
    for (&dim, &stride) in layout.dims().iter().zip(layout.stride()) {
        let step = |index: usize| (0..dim).map(move |n| index + n * stride);
        indices = indices.into_iter().flat_map(step).collect();
    }
    indices.into_iter().map(element).collect()
}

#[test]
fn every_layout_and_dtype_reads_as_torch_reads_it() {
    let expected: Value = json::read(&fixture("expected.json")).unwrap();
    for (file, tensors) in expected.as_object().unwrap() {
        let checkpoint = read(file).unwrap();
        let tensors = tensors.as_object().unwrap();
        assert_eq!(checkpoint.len(), tensors.len(), "{file}");
        for (name, expected) in tensors {
            let tensor = checkpoint.get(name).unwrap();
            let dtype = match tensor.dtype() {
                DType::F16 => "float16",
                DType::BF16 => "bfloat16",
                DType::F32 => "float32",
                DType::I64 => "int64",
                other => panic!("{other:?}"),
            };
            let as_json = |sizes: &[usize]| serde_json::to_value(sizes).unwrap();
            assert_eq!(expected["dtype"], dtype, "{file} {name}");
            assert_eq!(expected["shape"], as_json(tensor.layout().dims()), "{file} {name}");
            if file.ends_with(".bin") {
                assert_eq!(expected["stride"], as_json(tensor.layout().stride()), "{name}");
            }
            // Every value here is one of f32, to which it rounds back if serde_json is off by a
            // last bit of f64.
            let expected = expected["values"].as_array().unwrap().iter();
            let expected: Vec<f32> = expected.map(|v| v.as_f64().unwrap() as f32).collect();
            let found: Vec<f32> = values(tensor).into_iter().map(|v| v as f32).collect();
            assert_eq!(found, expected, "{file} {name}");
        }
    }
}

#[test]
fn a_weight_has_one_digest_whichever_format_it_is_read_from() {
    let (pickle, safetensors) = (read("layouts.bin").unwrap(), read("dense.safetensors").unwrap());
    let mut strided = 0;
    for (name, dense) in safetensors.iter() {
        let tensor = pickle.get(name).unwrap();
        assert_eq!(tensor.digest(), dense.digest(), "{name}");
        // Both are known to lie in their files, so that the digests can be remembered.
        let (origin, dense_origin) = (tensor.origin().unwrap(), dense.origin().unwrap());
        assert_eq!(origin.file.path, fixture("layouts.bin").canonicalize().unwrap());
        assert_ne!(origin.file, dense_origin.file);
        strided += usize::from(!tensor.layout().is_contiguous());
    }
    assert!(strided > 2, "{strided}");
}

#[test]
fn the_fixture_has_the_layouts_that_matter() {
    let checkpoint = read("layouts.bin").unwrap();
    let layout = |name: &str| checkpoint.get(name).unwrap().layout().clone();
    assert_eq!(layout("channels_last_f16").stride(), [16, 1, 8, 4]);
    assert_eq!(layout("offset_view").start_offset(), 7);
    assert_eq!(layout("expanded").stride(), [1, 0]);
    // Two names, one storage, mapped once.
    let bytes = |name: &str| checkpoint.get(name).unwrap().bytes().as_ptr();
    assert_eq!(bytes("same_a"), bytes("same_b"));
    assert_eq!(bytes("same_a"), bytes("strided_view"));
}

#[test]
fn a_file_that_is_not_read_is_refused_by_what_it_is() {
    let check = |name: &str, expected: &str| {
        let error = read(name).unwrap_err();
        assert_eq!(error.kind(), crate::error::Kind::Model);
        let error = error.to_string();
        assert!(error.contains(name) && error.contains(expected), "{error}");
        assert!(!error.contains('\n'), "{error}");
    };
    check("old_format.bin", "the format of PyTorch before 1.6");
    check("malicious.bin", "asks for \"posix.system\"");
    check("parameter.bin", "asks for \"torch._utils._rebuild_parameter\"");
    check("double.bin", "elements of \"torch.DoubleStorage\"; f16, bf16, f32 and i64 are read");
    check("double.safetensors", "tensor \"weight\": it has elements of \"F64\"");
    check("protocol_4.bin", "pickle protocol 4");
    check("compressed.bin", "is compressed");
    check("big_endian.bin", "not little-endian");
    check("short_storage.bin", "\"weight\": its storage data/0 has 20 bytes");
    check("expected.json", "not a safetensors file");
    let tar = [vec![b'x'; 257], b"ustar\0".to_vec()].concat();
    let error = read_bytes(Format::Pickle, tar).unwrap_err().to_string();
    assert!(error.contains("the format of PyTorch before 1.6"), "{error}");
    let error = read_bytes(Format::Pickle, b"<html>".to_vec()).unwrap_err().to_string();
    assert!(error.contains("not a PyTorch checkpoint"), "{error}");
}

#[test]
fn the_state_dict_of_a_training_checkpoint_is_read_and_nothing_else_of_it() {
    let weights = read("nested.bin").unwrap();
    assert_eq!((weights.len(), values(weights.get("weight").unwrap()).len()), (1, 6));
    // What is not read is left, unless all is asked for.
    let some = Checkpoint::read_some(&fixture("malicious.bin"), None).unwrap();
    assert_eq!(some.iter().map(|(name, _)| name).collect::<Vec<_>>(), ["weight"]);
    let some = Checkpoint::read_some(&fixture("double.safetensors"), None).unwrap();
    assert!(some.is_empty());
}

#[test]
fn a_safetensors_header_must_cover_the_file_exactly() {
    let check = |header: &str, elements: usize, expected: &str| {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(vec![0; elements]);
        match read_bytes(Format::Safetensors, bytes) {
            Ok(_) => assert_eq!(expected, "", "{header}"),
            Err(error) => {
                let error = error.to_string();
                assert!(!expected.is_empty() && error.contains(expected), "{header}: {error}");
            }
        }
    };
    let tensor = |name: &str, dtype: &str, shape: &str, from: u64, to: u64| {
        format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{from},{to}]}}"#)
    };
    let of = |tensors: &[String]| format!("{{{}}}  ", tensors.join(","));
    let half = |name, from, to| tensor(name, "F16", "[2]", from, to);
    check(&of(&[half("b", 4, 8), half("a", 0, 4)]), 8, "");
    check(r#"{"__metadata__":{"format":"pt"}}"#, 0, "");
    check(&of(&[half("a", 0, 4), half("b", 2, 6)]), 6, "tensor \"b\": its bytes 2 to 6");
    check(&of(&[half("a", 0, 4), half("b", 6, 10)]), 10, "tensor \"b\": its bytes 6 to 10");
    check(&of(&[half("a", 0, 4)]), 8, "its tensors take 4 bytes, but 8 follow");
    check(&of(&[half("a", 0, 4)]), 2, "reach beyond the end of the file");
    check(&of(&[half("a", 0, 6)]), 6, "hold f16 of shape [2]");
    check(&of(&[half("a", 4, 0)]), 4, "tensor \"a\"");
    check(&of(&[half("a", 0, 4), half("a", 4, 8)]), 8, "tensor \"a\" is there twice");
    check(&of(&[tensor("q", "F8_E4M3", "[4]", 0, 4)]), 4, "tensor \"q\": it has elements of \"F8_");
    let huge = u64::MAX;
    check(&of(&[tensor("a", "F16", &format!("[{huge},2]"), 0, 4)]), 4, "tensor \"a\"");
    check(&of(&[tensor("a", "F16", &format!("[0,{huge},{huge}]"), 0, 0)]), 0, "too large");
    check(&of(&[tensor("a", "F16", "[1,1,1,1,1,1,1,1,1]", 0, 2)]), 2, "9 dimensions");
    let most = huge / 4;
    let parts: Vec<_> = (0..5)
        .map(|n: u64| {
            let from = n.saturating_mul(most).min(huge);
            let to = from.saturating_add(most) & !1;
            tensor(&n.to_string(), "F16", &format!("[{}]", (to - from) / 2), from, to)
        })
        .collect();
    check(&of(&parts), 8, "tensor \"0\"");
    check("[1]", 0, "its header cannot be read");
    check(r#"{"a":{"dtype":"F16","shape":[-1],"data_offsets":[0,2]}}"#, 2, "header cannot be read");
}

/// What a device would do with a tensor: read every element.
fn use_all(checkpoint: &Checkpoint) -> usize {
    let small = |tensor: &&HostTensor| tensor.layout().shape().elem_count() < 10_000;
    checkpoint.iter().map(|(_, tensor)| tensor).filter(small).map(|t| values(t).len()).sum()
}

const MUTATED: [&str; 5] =
    ["layouts.bin", "module.bin", "dict.bin", "nested.bin", "dense.safetensors"];

#[test]
fn a_file_cut_at_any_length_is_an_error() {
    for name in MUTATED {
        let whole = std::fs::read(fixture(name)).unwrap();
        for len in 0..whole.len() {
            let cut = read_bytes(format_of(name), whole[..len].to_vec());
            assert!(cut.is_err(), "{name} cut to {len} bytes of {}", whole.len());
        }
    }
}

#[test]
fn bytes_that_somebody_changed_never_panic() {
    let seed = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    // Shown by the test harness if the test fails.
    println!("seed {seed}");
    let mut state = seed;
    let mut below = |limit: usize| {
        // splitmix64
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % limit as u64) as usize
    };
    let mut read_anyway = 0;
    for name in MUTATED {
        let whole = std::fs::read(fixture(name)).unwrap();
        for _ in 0..5_000 {
            let mut bytes = whole.clone();
            for _ in 0..=below(6) {
                let at = below(bytes.len());
                match below(4) {
                    0 => bytes[at] = below(256) as u8,
                    1 => bytes[at] ^= 1 << below(8),
                    2 => drop(bytes.remove(at)),
                    _ => bytes.insert(at, [0, 0xff, b'(', b'R', b'.'][below(5)]),
                }
            }
            if let Ok(checkpoint) = read_bytes(format_of(name), bytes) {
                use_all(&checkpoint);
                read_anyway += 1;
            }
        }
    }
    // Otherwise the mutations never get past the first check.
    assert!(read_anyway > 100, "only {read_anyway} of the mutated files were readable");
}
