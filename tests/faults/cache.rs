//! A worker's cache whose files are damaged, or whose disk is full: the picture is right.

use std::path::PathBuf;

use super::local;
use crate::processes::{Worker, paint, picture, succeeds, weight_bytes};

/// Flips a bit, cuts off, empties and deletes: bytes of the weights that are lost by it.
fn damage(worker: &Worker) -> u64 {
    let entries = std::fs::read_dir(worker.cache()).unwrap();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let damages: [fn(&PathBuf, Vec<u8>); 4] = [
        |path, mut bytes| {
            *bytes.last_mut().unwrap() ^= 1;
            std::fs::write(path, bytes).unwrap();
        },
        |path, bytes| std::fs::write(path, &bytes[..bytes.len() - 1]).unwrap(),
        |path, _| std::fs::write(path, b"").unwrap(),
        |path, _| std::fs::remove_file(path).unwrap(),
    ];
    let damaged = damages.iter().zip(&files).map(|(damage, path)| {
        let bytes = std::fs::read(path).unwrap();
        let len = bytes.len() as u64 - 128;
        // Not in place: a file that shrinks under a mapping is another matter.
        std::fs::remove_file(path).unwrap();
        std::fs::write(path, &bytes).unwrap();
        damage(path, bytes);
        len
    });
    damaged.sum()
}

#[test]
fn damaged_weights_are_noticed_and_sent_again() {
    let folder = tempfile::tempdir().unwrap();
    let expected = local(folder.path(), &[]);
    let output = folder.path().join("x.png");
    let mut worker = Worker::start();
    succeeds(&paint("tiny", &worker.url, &output, &[]));
    for is_restarted in [false, true] {
        let lost = damage(&worker);
        if is_restarted {
            worker = Worker::start_in(worker.kill(), &[]);
        }
        let stderr = succeeds(&paint("tiny", &worker.url, &output, &[]));
        assert!(picture(&output) == expected, "another picture");
        assert_eq!(weight_bytes(&stderr), lost);
        assert_eq!(worker.log().matches("it will be sent again").count(), 3, "{}", worker.log());
    }
}

#[cfg(unix)]
#[test]
fn a_full_disk_is_one_warning_and_the_picture_is_right() {
    let folder = tempfile::tempdir().unwrap();
    let expected = local(folder.path(), &[]);
    let output = folder.path().join("x.png");
    // No file may have more than 32 blocks: small weights fit, the others break off while they are
    // written, as on a disk that fills up.
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", "trap '' XFSZ; ulimit -f 32; exec \"$0\" \"$@\""]);
    shell.arg(env!("CARGO_BIN_EXE_tiny-sd"));
    let worker = Worker::start_by(shell, tempfile::tempdir().unwrap(), &[]);
    succeeds(&paint("tiny", &worker.url, &output, &[]));
    assert!(picture(&output) == expected, "another picture");
    let log = worker.log();
    assert_eq!(log.matches("WARN").count(), 1, "{log}");
    assert!(log.contains("cache of weights cannot be written"), "{log}");
    // What is in memory is there for others as well.
    let second = succeeds(&paint("tiny", &worker.url, &output, &[]));
    assert_eq!(weight_bytes(&second), 0);
    assert!(picture(&output) == expected, "another picture");
}
