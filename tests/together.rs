//! Pictures that go through the UNet together are the very ones that each would be alone.

use std::process::{Command, Stdio};

use tempfile::TempDir;
use tiny_sd::Result;
use tiny_sd::backend::cpu;
use tiny_sd::image::ImageSize;
use tiny_sd::pipeline::{PictureRequest, Pipeline, TextOptions};
use tiny_sd::progress::Silent;
use tiny_sd::schedule::SchedulerKind;

use super::end_to_end::read_png;
use super::golden::{fixtures, load};

/// Requests that go together: each has its own prompts and seed, and two share a prompt.
fn requests(steps: usize, guidance_scale: f64) -> Vec<PictureRequest<'static>> {
    let request = |(prompt, negative_prompt, seed)| PictureRequest {
        prompt,
        negative_prompt,
        seed,
        steps,
        guidance_scale,
        text: TextOptions::default(),
        size: ImageSize { height: 72, width: 40 },
        image: None,
        scheduler: None,
        preview_every: None,
    };
    let requests =
        [("a red cube", "", 1), ("a blue ball", "a red cube", 2), ("a red cube", "fog", 1)];
    requests.into_iter().map(request).collect()
}

fn check(what: &str, pipeline: &Pipeline<cpu::Storage>, requests: &[PictureRequest<'_>]) {
    let together = pipeline.paint_together(requests, &Silent).unwrap();
    assert_eq!(together.len(), requests.len());
    for (request, picture) in requests.iter().zip(&together) {
        let alone = pipeline.paint(request, &Silent).unwrap();
        assert!(picture == &alone, "{what}: {request:?}");
    }
    assert!(together[0] != together[2], "{what}: negative prompts or seeds are mixed up");
}

#[test]
fn pictures_made_together_are_those_made_alone_for_every_scheduler() {
    let device = cpu::Device::with_threads(2).unwrap();
    for kind in SchedulerKind::ALL {
        let pipeline = load("tiny", Some((*kind).into()), &device);
        check(kind.name(), &pipeline, &requests(3, 7.5));
    }
    let pipeline = load("sd1", Some(SchedulerKind::EulerAncestral.into()), &device);
    check("without guidance", &pipeline, &{
        let mut requests = requests(3, 1.0);
        requests[2].seed = 3;
        requests
    });
}

#[test]
fn a_request_may_name_another_scheduler_than_the_pipeline_has() -> Result<()> {
    let device = cpu::Device::with_threads(2)?;
    let kind = SchedulerKind::EulerAncestral.into();
    let (own, other) = (load("tiny", None, &device), load("tiny", Some(kind), &device));
    let mut request = requests(3, 7.5)[0];
    let expected = other.paint(&request, &Silent)?;
    assert!(own.paint(&request, &Silent)? != expected);
    request.scheduler = Some(kind);
    assert!(own.paint(&request, &Silent)? == expected);
    Ok(())
}

#[test]
fn pictures_of_different_settings_are_not_made_together() {
    let pipeline = load("tiny", None, &cpu::Device::with_threads(2).unwrap());
    let base = requests(3, 7.5)[0];
    for other in [
        PictureRequest { steps: 4, ..base },
        PictureRequest { text: TextOptions { clip_skip: 1, ..base.text }, ..base },
        PictureRequest { guidance_scale: 7.0, ..base },
        PictureRequest { size: ImageSize { height: 40, width: 72 }, ..base },
        PictureRequest { scheduler: Some(SchedulerKind::Ddim.into()), ..base },
        PictureRequest { preview_every: std::num::NonZeroUsize::new(1), ..base },
    ] {
        assert!(!base.goes_with(&other), "{other:?}");
        assert!(pipeline.paint_together(&[base, other], &Silent).is_err(), "{other:?}");
    }
    assert!(base.goes_with(&PictureRequest { prompt: "x", seed: 9, ..base }));
    assert!(pipeline.paint_together(&[], &Silent).is_err());
}

#[test]
fn batch_size_changes_no_picture_on_any_device() {
    let run = |device: &str, batch_size: &str| -> Vec<Vec<u8>> {
        let folder = TempDir::new().unwrap();
        let model = fixtures().join("models/tiny");
        let words =
            ["a red cube", "-s", "5", "--steps", "3", "-W", "64", "-H", "64", "-o", "x.png"];
        let output = Command::new(env!("CARGO_BIN_EXE_tiny-sd"))
            .args(words)
            .args(["--count", "3", "--threads", "2", "-m", model.to_str().unwrap()])
            .args(["--device", device, "--batch-size", batch_size, "--preview", "1"])
            .env("TINY_SD_CONFIG", "")
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{stderr}");
        assert_eq!(stderr.lines().count(), 3, "{stderr}");
        assert_eq!(stderr.contains("together"), batch_size != "1", "{stderr}");
        let names = std::fs::read_dir(folder.path()).unwrap();
        assert_eq!(names.count(), 3, "previews go at the end");
        let read = |i| read_png(&folder.path().join(format!("x-{i}.png"))).0;
        (1..=3).map(read).collect()
    };
    let alone = run("cpu", "1");
    for (device, batch_size) in [("cpu", "2"), ("cpu", "auto"), ("mock", "3")] {
        assert!(run(device, batch_size) == alone, "{device} {batch_size}");
    }
}
