//! Client and worker with real weights between them, and the cache under everything that happens to
//! it. Separate because it drives more than this folder.

mod harness;

use std::path::Path;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Layout};

use self::harness::{Connection, Worker};
use super::incoming::Incoming;
use super::*;
use crate::backend::cpu::{Device as Cpu, Storage as CpuBuffer};
use crate::backend::elements::to_bytes;
use crate::backend::{Device as _, HostTensor, Role};
use crate::error::{Error, Kind};
use crate::remote::device::Device;
use crate::remote::library::{Recipe, Weights, prepare};
use crate::remote::op::Digest;
use crate::remote::transport::BulkSink as _;

/// A convolution's weight (out, 6, 3, 3) in f16, by `seed`, row-major or channels-last.
fn weight(seed: u16, out: usize, is_channels_last: bool) -> HostTensor {
    let value = |o: usize, i: usize, t: usize| {
        let number = f32::from(seed) + ((o * 54 + i * 9 + t) % 97) as f32 / 64.0;
        half::f16::from_f32(number).to_le_bytes()
    };
    let mut bytes = vec![0u8; out * 54 * 2];
    for (o, i, t) in (0..out * 54).map(|n| (n / 54, n / 9 % 6, n % 9)) {
        let place = o * 54 + if is_channels_last { t * 6 + i } else { i * 9 + t };
        bytes[place * 2..place * 2 + 2].copy_from_slice(&value(o, i, t));
    }
    let stride = if is_channels_last { vec![54, 1, 18, 6] } else { vec![54, 9, 3, 1] };
    let layout = Layout::new((out, 6, 3, 3).into(), stride, 0);
    HostTensor::new(DType::F16, layout, Arc::new(bytes), 0).unwrap()
}

fn model(is_channels_last: bool) -> Vec<HostTensor> {
    (1..6).map(|seed| weight(seed, 4 * usize::from(seed), is_channels_last)).collect()
}

fn total(model: &[HostTensor]) -> u64 {
    model.iter().map(HostTensor::byte_len).sum()
}

fn announce(device: &Device, model: &[HostTensor]) -> Result<(u64, u64)> {
    let mut last = (0, 0);
    device.announce(&model.iter().collect::<Vec<_>>(), DType::F32, &mut |done, total| {
        last = (done, total);
        Ok(())
    })?;
    Ok(last)
}

fn bytes_of(storage: &CpuStorage) -> Vec<u8> {
    to_bytes(storage).unwrap()
}

/// Every weight as the worker has it is what it is here.
fn check_use(device: &Device, model: &[HostTensor]) {
    let cpu = Cpu::with_threads(1).unwrap();
    for tensor in model {
        let there = device.upload(tensor, DType::F32).unwrap().to_cpu_storage().unwrap();
        let here = cpu.upload(tensor, DType::F32).unwrap().to_cpu_storage().unwrap();
        assert!(bytes_of(&there) == bytes_of(&here));
    }
}

/// A whole run: announces, uses, and says how many bytes of weights were sent for it.
fn run(worker: &Worker, model: &[HostTensor]) -> u64 {
    let connection = Connection::new(worker, u64::MAX);
    announce(&connection.device, model).unwrap();
    let sent = connection.sent();
    check_use(&connection.device, model);
    assert_eq!(connection.sent(), sent, "after the announcement nothing is sent");
    sent
}

fn files(folder: &Path) -> Vec<std::path::PathBuf> {
    let mut files: Vec<_> = folder.read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn a_second_run_sends_nothing_also_after_a_restart_and_from_another_file_format() {
    let folder = tempfile::tempdir().unwrap();
    let worker = Worker::open(folder.path());
    let model_as_pickle = model(true);
    assert_eq!(run(&worker, &model_as_pickle), total(&model_as_pickle));
    assert_eq!(run(&worker, &model(false)), 0);
    drop(worker);
    let worker = Worker::open(folder.path());
    assert_eq!(run(&worker, &model(true)), 0);
    assert_eq!(files(folder.path()).len(), model_as_pickle.len());
    // Without a folder they go with the worker.
    let worker = Worker::new(DiskLibrary::in_memory(Limits::new(1 << 20)));
    assert_eq!(run(&worker, &model(true)), total(&model_as_pickle));
    assert_eq!(run(&worker, &model(false)), 0);
}

#[test]
fn a_weight_that_was_not_announced_is_sent_when_it_is_used() {
    let worker = Worker::new(DiskLibrary::in_memory(Limits::new(1 << 20)));
    let connection = Connection::new(&worker, u64::MAX);
    let model = model(true);
    check_use(&connection.device, &model);
    check_use(&connection.device, &model);
    assert_eq!(connection.sent(), total(&model));
    // One probe and one read each, then reads alone.
    let trips = connection.device.session().statistics().round_trips;
    assert_eq!(trips, 3 * model.len() as u64);
}

#[test]
fn one_probe_serves_a_model_and_progress_is_told() {
    let worker = Worker::new(DiskLibrary::in_memory(Limits::new(1 << 20)));
    let model = model(true);
    let connection = Connection::new(&worker, u64::MAX);
    let all = total(&model);
    assert_eq!(announce(&connection.device, &model).unwrap(), (all, all));
    assert_eq!(connection.device.session().statistics().round_trips, 1);
    // Nothing new, nothing to ask.
    assert_eq!(announce(&connection.device, &model).unwrap(), (0, 0));
    assert_eq!(connection.device.session().statistics().round_trips, 1);
}

#[test]
fn damaged_files_are_noticed_and_sent_again() {
    let folder = tempfile::tempdir().unwrap();
    let (model, len) = (model(true), 4 * 54 * 2u64);
    let all = total(&model);
    type Damage = fn(Vec<u8>) -> Vec<u8>;
    let damages: [(&str, Damage); 6] = [
        ("cut", |bytes| bytes[..bytes.len() - 1].to_vec()),
        ("cut within the header", |bytes| bytes[..50].to_vec()),
        ("emptied", |_| Vec::new()),
        ("longer", |bytes| [bytes, vec![0]].concat()),
        ("flipped", |mut bytes| {
            let last = bytes.len() - 1;
            bytes[last] ^= 4;
            bytes
        }),
        ("another shape", |mut bytes| {
            let place = bytes.windows(4).position(|dims| dims == [4, 6, 3, 3]).unwrap();
            bytes[place..place + 4].copy_from_slice(&[6, 4, 3, 3]);
            bytes
        }),
    ];
    for is_restarted in [false, true] {
        for (name, damage) in damages {
            let mut worker = Worker::open(folder.path());
            assert!([0, all].contains(&run(&worker, &model)));
            if is_restarted {
                worker = Worker::open(folder.path());
            }
            let path =
                file::path(&folder.path().canonicalize().unwrap(), &Digest(model[0].digest()));
            let bytes = std::fs::read(&path).unwrap();
            // In the place of the file, which may be mapped.
            std::fs::write(folder.path().join("new"), damage(bytes.clone())).unwrap();
            std::fs::rename(folder.path().join("new"), &path).unwrap();
            assert_eq!(run(&worker, &model), len, "{name}, restarted: {is_restarted}");
            assert_eq!(std::fs::read(&path).unwrap(), bytes, "{name}");
        }
    }
}

#[test]
fn what_is_not_what_it_says_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let limits = Limits { weight_bytes: 1000, transfers: 2, ..Limits::new(1 << 20) };
    for library in
        [DiskLibrary::open(folder.path(), limits).unwrap(), DiskLibrary::in_memory(limits)]
    {
        let send = |digest: u8, dims: &[usize], bytes: &[u8]| {
            let session = library.session();
            let digest = Digest([digest; 32]);
            let received = session.receive(digest, DType::F16, dims).and_then(|mut sink| {
                sink.write(bytes)?;
                sink.finish()
            });
            let error = received.unwrap_err().to_string();
            assert_eq!(session.has(&[digest]), [false]);
            // Whoever waits hears the cause, at once.
            assert_eq!(session.get(&digest).unwrap_err().to_string(), error);
            drop(session);
            assert_eq!((library.used_bytes(), files(folder.path()).len()), (0, 0));
            error
        };
        let error = send(7, &[2], &[1, 2, 3, 4]);
        assert!(error.contains("weight 0707") && error.contains("others than its digest"));
        assert!(
            send(7, &[2], &[1, 2, 3]).contains("3 bytes came for a weight of [2], which has 4")
        );
        assert!(send(7, &[2], &[1, 2, 3, 4, 5]).contains("5 bytes came"));
    }
}

#[test]
fn what_is_too_large_is_refused_before_a_byte_is_taken() {
    let limits =
        Limits { weight_bytes: 1000, transfers: 2, transfer_bytes: 1500, ..Limits::new(3000) };
    let library = DiskLibrary::in_memory(limits);
    let session = library.session();
    let receive =
        |digest: u8, dims: &[usize]| session.receive(Digest([digest; 32]), DType::F16, dims);
    for dims in [&[501][..], &[usize::MAX; 8], &[usize::MAX, usize::MAX, 0], &[1 << 40]] {
        assert!(receive(1, dims).err().unwrap().to_string().contains("larger than 1000 bytes"));
    }
    let first = receive(1, &[500]).unwrap();
    assert!(receive(2, &[500]).err().unwrap().to_string().contains("1500 bytes of them at once"));
    let second = receive(2, &[50]).unwrap();
    assert!(receive(3, &[1]).err().unwrap().to_string().contains("more than 2 weights"));
    assert_eq!(library.used_bytes(), 1000 + 100 + 2 * file::HEADER_LEN as u64);
    drop((first, second));
    assert_eq!(library.used_bytes(), 0);
}

/// Sends one weight in `session`.
fn send(session: &dyn Library, tensor: &HostTensor) -> Result<Digest> {
    let digest = Digest(tensor.digest());
    let mut sink = session.receive(digest, tensor.dtype(), tensor.layout().dims())?;
    let mut written = Ok(());
    tensor.row_major(&mut |bytes| {
        if written.is_ok() {
            written = sink.write(bytes);
        }
    });
    written?;
    sink.finish()?;
    Ok(digest)
}

#[test]
fn what_was_used_least_recently_goes_and_what_is_in_use_stays() {
    let folder = tempfile::tempdir().unwrap();
    let [a, b, c, d] = [1, 2, 3, 4].map(|seed| weight(seed, 8, true));
    let room = 2 * (a.byte_len() + file::HEADER_LEN as u64) + 100;
    let open = || DiskLibrary::open(folder.path(), Limits::new(room)).unwrap();
    let library = open();
    let first = library.session();
    let [a, b] = [&a, &b].map(|tensor| send(&*first, tensor).unwrap());
    let error = send(&*first, &c).unwrap_err().to_string();
    assert!(error.contains("no room for a weight") && error.contains("--cache-size"), "{error}");
    drop(first);
    // After a restart the order of use is known, too: b was used last, then a.
    let session = library.session();
    assert_eq!((session.has(&[b]), session.has(&[a])), (vec![true], vec![true]));
    drop((session, library));
    let library = open();
    let session = library.session();
    let c = send(&*session, &c).unwrap();
    assert_eq!(session.has(&[b, a, c]), [false, true, true]);
    // What a session found stays for it.
    let other = library.session();
    assert!(send(&*other, &d).is_err());
    drop(session);
    assert_eq!(other.has(&[c]), [true]);
    let another = library.session();
    let d = send(&*another, &d).unwrap();
    assert_eq!(other.has(&[a, c, d]), [false, true, true]);
    assert!(library.used_bytes() <= room);
    assert_eq!(files(folder.path()).len(), 2);
}

#[test]
fn an_evicted_weight_stays_readable_for_whoever_has_it() {
    let folder = tempfile::tempdir().unwrap();
    let tensor = weight(1, 8, false);
    let library = DiskLibrary::open(folder.path(), Limits::new(1 << 20)).unwrap();
    let session = library.session();
    let digest = send(&*session, &tensor).unwrap();
    let mapped = session.get(&digest).unwrap();
    assert_eq!(mapped.bytes().as_ptr().addr() % 64, 0);
    files(folder.path()).iter().for_each(|path| std::fs::remove_file(path).unwrap());
    assert_eq!(mapped.bytes(), tensor.bytes());
    // And whoever comes next sends it again.
    let next = library.session();
    assert_eq!(next.has(&[digest]), [false]);
    send(&*next, &tensor).unwrap();
    assert_eq!(next.has(&[digest]), [true]);
    assert_eq!(library.used_bytes(), tensor.byte_len() + file::HEADER_LEN as u64);
}

#[cfg(target_os = "linux")]
#[test]
fn on_a_full_disk_weights_stay_in_memory_and_take_their_room() {
    let folder = tempfile::tempdir().unwrap();
    let [tensor, other] = [1, 2].map(|seed| weight(seed, 8, false));
    let room = tensor.byte_len() + file::HEADER_LEN as u64;
    let table = Arc::new(Table::open(folder.path(), Limits::new(room)).unwrap());
    let session = Session::new(table.clone());
    let full = |folder: &Path| {
        let path = tempfile::Builder::new().tempfile_in(folder)?.into_temp_path();
        let file = std::fs::File::options().write(true).open("/dev/full")?;
        Ok(tempfile::NamedTempFile::from_parts(file, path))
    };
    let (digest, dims) = (Digest(tensor.digest()), tensor.layout().dims());
    let (dtype, len) = (tensor.dtype(), tensor.byte_len());
    let mut sink = Incoming::new(session.0.clone(), digest, dtype, dims, len, full).unwrap();
    tensor.row_major(&mut |bytes| sink.write(bytes).unwrap());
    Box::new(sink).finish().unwrap();
    assert_eq!((table.used_bytes(), files(folder.path()).len()), (room, 0));
    // It is there for others, and goes when nobody needs it and room is needed.
    let next = Session::new(table.clone());
    assert_eq!(next.get(&digest).unwrap().bytes(), tensor.bytes());
    drop((session, next));
    let next = Session::new(table.clone());
    send(&next, &other).unwrap();
    assert_eq!((table.used_bytes(), files(folder.path()).len()), (room, 1));
    assert_eq!(next.has(&[digest]), [false]);
}

#[cfg(target_os = "linux")]
#[test]
fn a_folder_that_cannot_be_written_is_no_reason_not_to_serve() {
    // Nobody may make files there, not even root.
    let library = DiskLibrary::open(Path::new("/proc/self/fdinfo"), Limits::new(1 << 20)).unwrap();
    let tensor = weight(1, 8, true);
    let digest = send(&*library.session(), &tensor).unwrap();
    assert_eq!(library.session().has(&[digest]), [true]);
}

#[test]
fn what_a_killed_worker_left_goes_and_what_a_running_one_writes_stays() {
    let folder = tempfile::tempdir().unwrap();
    let open = || DiskLibrary::open(folder.path(), Limits::new(1 << 20)).unwrap();
    let running = open();
    let (tensor, session) = (weight(1, 8, false), running.session());
    let (digest, dims) = (Digest(tensor.digest()), tensor.layout().dims());
    let mut sink = session.receive(digest, tensor.dtype(), dims).unwrap();
    std::fs::write(folder.path().join(".incoming-left"), b"half").unwrap();
    open();
    assert_eq!(files(folder.path()).len(), 1);
    tensor.row_major(&mut |bytes| sink.write(bytes).unwrap());
    sink.finish().unwrap();
    assert_eq!(open().session().has(&[digest]), [true]);
    assert_eq!(files(folder.path()).len(), 1);
}

#[test]
fn sessions_that_send_the_same_at_once_both_get_it() {
    let folder = tempfile::tempdir().unwrap();
    let worker = Worker::open(folder.path());
    let model = model(true);
    let start = std::sync::Barrier::new(3);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let connection = Connection::new(&worker, u64::MAX);
                start.wait();
                announce(&connection.device, &model).unwrap();
                check_use(&connection.device, &model);
            });
        }
    });
    let headers = (model.len() * file::HEADER_LEN) as u64;
    assert_eq!(worker.library.used_bytes(), total(&model) + headers);
    assert_eq!(files(folder.path()).len(), model.len());
    // In f32, once for all sessions.
    assert_eq!(worker.shared.weights.used_bytes(), 2 * total(&model));
}

#[test]
fn after_a_cut_only_the_rest_is_sent() {
    let folder = tempfile::tempdir().unwrap();
    let (worker, model) = (Worker::open(folder.path()), model(true));
    // In the middle of the fourth of five.
    let whole = total(&model[..3]);
    let cut = whole + model[3].byte_len() / 2;
    let connection = Connection::new(&worker, cut);
    let error = announce(&connection.device, &model).unwrap_err();
    assert_eq!(error.to_string(), "the cable was cut");
    // Who uses the others anyway hears of the cause.
    assert!(connection.device.upload(&model[4], DType::F32).is_err());
    drop(connection);
    assert_eq!(files(folder.path()).len(), 3);
    assert_eq!(run(&worker, &model), total(&model) - whole);
}

#[test]
fn whoever_watches_may_end_the_sending() {
    let worker = Worker::new(DiskLibrary::in_memory(Limits::new(1 << 20)));
    let connection = Connection::new(&worker, u64::MAX);
    let model = model(true);
    let tensors: Vec<_> = model.iter().collect();
    let ended = connection.device.announce(&tensors, DType::F32, &mut |_, total| match total {
        0 => Ok(()),
        _ => Err(Error::interrupted()),
    });
    assert_eq!(ended.unwrap_err().kind(), Kind::Interrupted);
}

#[test]
fn nobody_waits_for_what_never_comes() {
    let limits = Limits { stall: Duration::from_millis(1), ..Limits::new(1 << 20) };
    let library = DiskLibrary::in_memory(limits);
    let error = library.session().get(&Digest([1; 32])).unwrap_err().to_string();
    assert!(error.contains("weight 010101010101 did not come"), "{error}");
    // Nor after the client is gone.
    let library = DiskLibrary::in_memory(Limits::new(1 << 20));
    let session = library.session();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| session.get(&Digest([1; 32])).unwrap_err().to_string());
        session.end();
        assert_eq!(waiting.join().unwrap(), "the client is gone");
    });
}

#[test]
fn a_weight_is_cast_where_that_costs_fewer_bytes_and_its_bits_are_the_same() {
    let worker = Worker::new(DiskLibrary::in_memory(Limits::new(1 << 20)));
    let cpu = Cpu::with_threads(1).unwrap();
    let bytes: Vec<u8> = (0..60).flat_map(|n| (1.0 / (n as f32 - 7.3)).to_le_bytes()).collect();
    let layout = Layout::new((3, 4, 5).into(), vec![1, 15, 3], 0);
    let tensor = HostTensor::new(DType::F32, layout, Arc::new(bytes), 0).unwrap();
    for (dtype, size) in [(DType::BF16, 2), (DType::F16, 2), (DType::F32, 4), (DType::BF16, 0)] {
        let connection = Connection::new(&worker, u64::MAX);
        connection.device.announce(&[&tensor], dtype, &mut |_, _| Ok(())).unwrap();
        let there = connection.device.upload(&tensor, dtype).unwrap().to_cpu_storage().unwrap();
        let here = cpu.upload(&tensor, dtype).unwrap().to_cpu_storage().unwrap();
        assert_eq!(bytes_of(&there), bytes_of(&here), "{dtype:?}");
        assert_eq!(connection.sent(), 60 * size, "{dtype:?}");
    }
}

#[test]
fn buffers_are_made_once_and_counted_as_they_are() {
    let library = DiskLibrary::in_memory(Limits::new(1 << 20));
    let session = library.session();
    let (a, b) = (weight(1, 32, true), weight(2, 32, true));
    let recipe = |tensor: &HostTensor, role| {
        let (digest, dims) = (send(&*session, tensor).unwrap(), tensor.layout().dims().to_vec());
        Recipe { digest, dtype: DType::F16, dims, role }
    };
    let (plain, packed) = (recipe(&a, None), recipe(&a, Some(Role::Conv2d { stride: 1 })));
    let (cpu, len) = (Cpu::with_threads(1).unwrap(), a.byte_len());
    // Half as plain, single as packed, with columns filled up.
    let weights = Weights::<CpuBuffer>::new(3 * len);
    let get = |recipe: &Recipe| {
        let fetch = || session.get(&recipe.digest);
        weights.get(recipe, fetch, |host| prepare(recipe, host, &cpu))
    };
    let first = get(&plain).unwrap();
    assert_eq!(weights.used_bytes(), len);
    let second = get(&packed).unwrap();
    assert_eq!(weights.used_bytes(), 3 * len);
    assert!(Arc::ptr_eq(&first, &get(&plain).unwrap()));
    assert!(Arc::ptr_eq(&second, &get(&packed).unwrap()));
    // While both are used there is no room.
    let other = recipe(&b, None);
    let error = get(&other).unwrap_err().to_string();
    assert!(error.contains("out of memory"), "{error}");
    assert_eq!(weights.used_bytes(), 3 * len);
    drop(second);
    get(&other).unwrap();
    assert_eq!(weights.used_bytes(), 2 * len);
    assert!(Arc::ptr_eq(&first, &get(&plain).unwrap()));
    // A shape that does not fit changes nothing.
    let wrong = Recipe { dims: vec![5], ..other };
    assert!(get(&wrong).is_err() && weights.used_bytes() == 2 * len);
}
