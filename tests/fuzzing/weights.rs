//! Weight files of anybody's: archives of pickles, and safetensors.

use std::io::{Cursor, Write};
use std::sync::Arc;

use tiny_sd::backend::host::SharedBytes;
use tiny_sd::weights::{Checkpoint, pickle, safetensors};
use zip::write::SimpleFileOptions;

use super::{Target, damaged, noise};
use crate::numbers::Random;

/// Objects, marks and values of a pickle have caps of their own: 2²⁰ of 56 bytes.
pub const TARGET: Target =
    Target { name: "weights", run, draw, max_memory_bytes: |len| (256 << 20) + 400 * len };

fn run(bytes: &[u8]) {
    let bytes: SharedBytes = Arc::new(bytes.to_vec());
    for read in [pickle::read, safetensors::read] {
        read(&bytes).iter().for_each(use_all);
    }
}

/// What a device would do with the tensors: read every element.
fn use_all(checkpoint: &Checkpoint) {
    for (_, tensor) in checkpoint.iter().filter(|(_, tensor)| tensor.byte_len() < 10_000) {
        let mut found = 0;
        tensor.row_major(&mut |bytes| found += bytes.len() as u64);
        assert_eq!(found, tensor.byte_len());
    }
}

/// Parts of pickles as torch and pytorch_lightning write them.
const PARTS: [&[u8]; 12] = [
    b"}",
    b"X\x0a\0\0\0state_dict",
    b"X\x01\0\0\0a",
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\n\
      X\x01\0\0\x000X\x03\0\0\0cpuK\x04tQK\0K\x02K\x02\x86K\x02K\x01\x86\x89}tR",
    b"ctorch\nDoubleStorage\n",
    b"cos\nsystem\n",
    b"X\x02\0\0\0ls\x85R",
    b"ccollections\nOrderedDict\n)R",
    b")\x81}b",
    b"s",
    b"](K\x01K\x02e",
    b"h\0",
];

fn draw(random: &mut Random) -> Vec<u8> {
    let header = br#"{"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},
        "b":{"dtype":"F64","shape":[1],"data_offsets":[4,12]}}"#;
    match random.below(4) {
        0 => {
            let len = random.below(80);
            noise(random, len)
        }
        1 => {
            let file = [&(header.len() as u64).to_le_bytes(), &header[..], &[0; 12]].concat();
            damaged(random, &file)
        }
        _ => {
            let mut pickle = b"\x80\x02}q\0X\x0a\0\0\0state_dict}X\x01\0\0\0a".to_vec();
            pickle.extend(PARTS[3]);
            pickle.extend(b"ss");
            for _ in 0..random.below(8) {
                pickle.extend(PARTS[random.below(PARTS.len())]);
            }
            pickle.push(b'.');
            if random.below(2) == 0 {
                pickle = damaged(random, &pickle);
            }
            let file = archive(&pickle, &[0; 16]);
            if random.below(4) == 0 { damaged(random, &file) } else { file }
        }
    }
}

/// As `torch.save` writes it.
fn archive(pickle: &[u8], storage: &[u8]) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (name, bytes) in [("m/data.pkl", pickle), ("m/data/0", storage)] {
        zip.start_file(name, options).expect("a name");
        zip.write_all(bytes).expect("memory");
    }
    zip.finish().expect("memory").into_inner()
}
