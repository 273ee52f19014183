//! `tiny-sd compare`, the program itself: on devices that agree, and beside a worker that is wrong
//! on purpose.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use tiny_sd::Result;
use tiny_sd::backend::cpu;
use tiny_sd::remote::disk_library::{self, DiskLibrary};
use tiny_sd::remote::executor;
use tiny_sd::remote::hello::Hello;
use tiny_sd::remote::quic::server::{Limits, Server, serve};
use tiny_sd::remote::trust::Identity;
use tiny_sd::remote::url::pairing_urls;
use tiny_sd::remote::worker::Worker;
use tiny_sd::remote::{PROTOCOL_VERSION, schema};

use super::wrong::{self, Fault};

/// Compares a picture of a miniature model; `words` are separated by `|`.
fn compare(folder: &Path, model: &str, words: &str) -> Output {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models").join(model);
    Command::new(env!("CARGO_BIN_EXE_tiny-sd"))
        .args(["compare", "a red fox", "--steps", "2", "-s", "7", "--threads", "1", "-m"])
        .arg(model)
        .args(words.split('|'))
        .env_remove("TINY_SD_DEVICE")
        .env("TINY_SD_CONFIG", "")
        .env("XDG_CACHE_HOME", folder)
        .current_dir(folder)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn a_worker_of_the_same_kind_gives_every_result_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    for (model, more) in [("tiny", ""), ("sd2", "|--dtype|f16")] {
        let words = format!("-q|--device|cpu|--against|mock{more}");
        let output = compare(folder.path(), model, &words);
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(0), "{stdout}{stderr}");
        let lines: Vec<_> = stdout.lines().collect();
        let [title, counts] = lines[..] else { panic!("{stdout}") };
        assert_eq!(title, "cpu and mock, seed 7: no op differs");
        let numbers: Vec<u64> =
            counts.split([' ', ':']).filter_map(|word| word.parse().ok()).collect();
        let [ops, compared, identical, prepared] = numbers[..] else { panic!("{counts}") };
        assert!(compared > 1000 && compared == identical, "{counts}");
        assert!(prepared > 50 && prepared + compared == ops, "{counts}");
        assert_eq!(stderr, "");
    }
    // No picture.
    assert!(!folder.path().join("tiny-sd-7.png").exists());
}

/// A worker on a device that is wrong about one op, and the file with its URL in `folder`.
fn wrong_worker(folder: &Path, op: &'static str, fault: Fault) -> Result<Server> {
    let device = wrong::Device::new(&cpu::Device::with_threads(1)?, op, fault);
    let limits = executor::Limits { memory_bytes: 1 << 30, buffers: 1 << 17 };
    let worker = Worker::<wrong::Storage>::new(device, limits, 1 << 30);
    let library = DiskLibrary::in_memory(disk_library::Limits::new(1 << 30));
    let identity = Identity::generate()?;
    let hello = Hello { version: PROTOCOL_VERSION, schema: schema() };
    let here = SocketAddr::from(([127, 0, 0, 1], 0));
    let server = serve(here, &identity, hello, Limits::default(), move |info| {
        worker.session(library.session(), info.waker)
    })?;
    let url = &pairing_urls(server.local_addr(), &identity)[0];
    std::fs::write(folder.join("url.txt"), url.to_secret_string()).unwrap();
    Ok(server)
}

#[test]
fn an_op_of_a_worker_that_is_wrong_is_named_on_standard_output_and_by_the_exit_code() -> Result<()>
{
    let check = |op, fault, expected: &[&str]| -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let _server = wrong_worker(folder.path(), op, fault)?;
        let output = compare(folder.path(), "tiny", "-q|--device|cpu|--against|@url.txt");
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(1), "{op}: {stdout}{stderr}");
        assert!(stderr.is_empty(), "{op}: {stderr}");
        for part in expected {
            assert!(stdout.contains(part), "{op}: no {part:?} in\n{stdout}");
        }
        Ok(())
    };
    // The bug that scrambled the predecessor's pictures: a view that begins at element 0.
    check(
        "linear_combination",
        Fault::ForgetsOffset,
        &[
            "differs: linear_combination, [-6.5, 7.5]\n",
            "  in         step 1 of 2, the UNet or the scheduler\n",
            "  operand 1  f32 [1, 4, 8, 8] strides [256, 1, 32, 4] offset 0, from op ",
            "  operand 2  f32 [1, 4, 8, 8] strides [256, 1, 32, 4] offset 256, from op ",
            "  result     f32 ",
        ],
    )?;
    check(
        "upload",
        Fault::Imprecise(1e-3),
        &[
            ": op 1 differs: upload, ",
            "  in         loading: text_encoder: loading text_model.",
            "off by ",
        ],
    )?;
    let transposed = &["differs: pixels\n", "  in         the VAE's decoder\n", "  result     u8 "];
    check("pixels", Fault::SwapsStrides, transposed)
}
