//! The worker's cache of weights: any bytes as a file of it, in memory, and folders of damaged
//! files, loaded as a worker does that starts again.

use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use candle_core::{DType, Layout};
use tiny_sd::backend::HostTensor;
use tiny_sd::remote::disk_library::{DiskLibrary, Limits, header, verified};
use tiny_sd::remote::library::Library;
use tiny_sd::remote::op::{Digest, Op};
use tiny_sd::remote::wire::{Reader, Wire};

use super::choices::Choices;
use super::{Target, damaged, noise};
use crate::numbers::Random;

/// A file's bytes, in memory.
pub const TARGET: Target =
    Target { name: "cache", run, draw, max_memory_bytes: |len| (16 << 10) + 4 * len };

/// A folder of files.
pub const FILES: Target = Target {
    name: "cache-files",
    run: files,
    draw: |random| {
        let len = 10 + random.below(80);
        noise(random, len)
    },
    max_memory_bytes: |len| (256 << 10) + 4 * len,
};

/// Where the elements of a weight begin in its file.
const HEADER_BYTES: usize = 128;

/// A weight of the worker: what it is named for, and its file.
struct Weight {
    digest: Digest,
    dtype: DType,
    dims: Vec<usize>,
    file: Vec<u8>,
}

impl Weight {
    fn new(dtype: DType, dims: &[usize]) -> Self {
        let count = dims.iter().product::<usize>() * dtype.size_in_bytes();
        let elements: Vec<u8> = (0..count).map(|n| n as u8).collect();
        let layout = Layout::contiguous(dims);
        let tensor = HostTensor::new(dtype, layout, Arc::new(elements.clone()), 0);
        let digest = Digest(tensor.expect("a tensor").digest());
        let mut file = header(digest, dtype, dims).expect("a header");
        file.extend(elements);
        Self { digest, dtype, dims: dims.to_vec(), file }
    }

    fn elements(&self) -> &[u8] {
        self.file.get(HEADER_BYTES..).unwrap_or_default()
    }
}

fn weights() -> &'static [Weight] {
    static WEIGHTS: OnceLock<Vec<Weight>> = OnceLock::new();
    WEIGHTS.get_or_init(|| {
        let dims: [(DType, &[usize]); 6] = [
            (DType::F16, &[2, 3]),
            (DType::F32, &[]),
            (DType::F32, &[0, 3]),
            (DType::U8, &[1, 1, 1, 1, 1, 1, 1, 5]),
            (DType::I64, &[7]),
            (DType::BF16, &[4, 1, 3, 3]),
        ];
        dims.iter().map(|(dtype, dims)| Weight::new(*dtype, dims)).collect()
    })
}

/// The digest that the file should have comes first: of a weight that is known, or of whatever the
/// file says that it is, so that damaged headers pass too.
fn run(bytes: &[u8]) {
    let Some((&kind, file)) = bytes.split_first() else { return };
    let digest = match weights().get(usize::from(kind)) {
        Some(weight) => weight.digest,
        None => claimed(file),
    };
    let Ok(tensor) = verified(Arc::new(file.to_vec()), &digest) else { return };
    let mut elements = Vec::new();
    tensor.row_major(&mut |part| elements.extend_from_slice(part));
    assert_eq!(elements.len() as u64, tensor.byte_len());
    assert_eq!(elements, file.get(HEADER_BYTES..).unwrap_or_default());
    if let Some(weight) = weights().get(usize::from(kind)) {
        let found = (tensor.dtype(), tensor.layout().dims(), &*elements);
        assert_eq!(found, (weight.dtype, &*weight.dims, weight.elements()));
    }
}

/// The digest of the tensor that a header describes, of as many bytes as there are.
fn claimed(file: &[u8]) -> Digest {
    let elements = file.get(HEADER_BYTES..).unwrap_or_default();
    let record = file.get(8..HEADER_BYTES).unwrap_or_default();
    match Op::get(&mut Reader::new(record)) {
        // candle cannot even hold a shape beyond this machine.
        Ok(Op::Weight { dtype, dims, .. })
            if dims.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim.max(1))).is_some() =>
        {
            let layout = Layout::contiguous(dims);
            let tensor = HostTensor::new(dtype, layout, Arc::new(elements.to_vec()), 0);
            Digest(tensor.map_or([0; 32], |tensor| tensor.digest()))
        }
        _ => Digest([0; 32]),
    }
}

fn draw(random: &mut Random) -> Vec<u8> {
    if random.below(16) == 0 {
        let len = random.below(300);
        return noise(random, len);
    }
    let known = random.below(weights().len());
    let kind = if random.below(2) == 0 { known as u8 } else { 255 };
    let mut bytes = vec![kind];
    bytes.extend(damaged(random, &weights()[known].file));
    bytes
}

/// A folder of weights, damaged as the bytes say.
fn files(bytes: &[u8]) {
    let mut choices = Choices(bytes);
    let folder = tempfile::tempdir().expect("a folder");
    let limits = Limits {
        cache_bytes: if choices.byte() < 32 { 300 } else { 1 << 20 },
        weight_bytes: 4096,
        transfers: 4,
        transfer_bytes: 16_384,
        stall: Duration::ZERO,
    };
    for weight in weights() {
        put(folder.path(), weight, &mut choices);
    }
    let library = DiskLibrary::open(folder.path(), limits).expect("a folder that can be written");
    assert!(library.used_bytes() <= limits.cache_bytes, "{} bytes", library.used_bytes());
    let session = library.session();
    let mut is_changed = false;
    let digests: Vec<_> = weights().iter().map(|weight| weight.digest).collect();
    for (weight, is_there) in weights().iter().zip(session.has(&digests)) {
        if choices.byte() < 32 {
            // While the worker runs, as another worker on the same folder would.
            is_changed = true;
            put(folder.path(), weight, &mut choices);
        }
        check(&*library.session(), weight);
        let found = session.get(&weight.digest);
        assert!(found.is_ok() || !is_there, "what a session has seen goes");
    }
    let used = library.used_bytes();
    assert!(is_changed || used <= limits.cache_bytes, "{used} bytes");
}

/// What is found is right, and what is not found can be sent.
fn check(session: &dyn Library, weight: &Weight) {
    let elements = |tensor: &HostTensor| {
        let mut elements = Vec::new();
        tensor.row_major(&mut |part| elements.extend_from_slice(part));
        elements
    };
    if let Ok(tensor) = session.get(&weight.digest) {
        assert_eq!(elements(&tensor), weight.elements());
        return;
    }
    let Ok(mut sink) = session.receive(weight.digest, weight.dtype, &weight.dims) else { return };
    if sink.write(weight.elements()).and_then(|()| sink.finish()).is_ok() {
        let tensor = session.get(&weight.digest).expect("it was sent");
        assert_eq!(elements(&tensor), weight.elements());
    }
}

/// The file of a weight: whole, damaged, none, or something else under its name.
fn put(folder: &Path, weight: &Weight, choices: &mut Choices<'_>) {
    let name: String = weight.digest.0.iter().map(|byte| format!("{byte:02x}")).collect();
    let path = folder.join(name);
    let new = tempfile::NamedTempFile::new_in(folder).expect("a file");
    let mut file = weight.file.clone();
    match choices.byte() {
        0..=99 => {}
        100..=219 => choices.damage(&mut file),
        220..=229 => {
            let other = choices.below(weights().len());
            file = weights()[other].file.clone();
        }
        230..=239 => return,
        240..=247 => {
            // Where there is a file, it stays.
            let _ = std::fs::create_dir(&path);
            return;
        }
        _ => file.clear(),
    }
    std::fs::write(new.path(), file).expect("a file is written");
    // Where there is a folder, it stays.
    let _ = new.persist(&path);
}
