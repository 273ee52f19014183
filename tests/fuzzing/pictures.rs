//! Pictures of anybody's: PNG, JPEG and WebP files, the texts in them, and the records and settings
//! in those.

use tiny_sd::cli::Settings;
use tiny_sd::image::{FileFormat, ImageSize, Infotext, Parameters, Picture, PictureTexts};

use super::{Target, damaged, noise};
use crate::numbers::Random;

/// Texts are unpacked to 4 MiB at most, chunks take 32 MiB, and pixels those of 8192×8192 with
/// alpha, once more as RGB, and once more turned.
pub const TARGET: Target =
    Target { name: "pictures", run, draw, max_memory_bytes: |len| (1 << 30) + 200 * len };

fn run(bytes: &[u8]) {
    if let Ok(texts) = PictureTexts::read(bytes) {
        texts.record.iter().for_each(|record| settings(record));
        texts.parameters.iter().for_each(|text| infotext(text));
    }
    if let Ok(picture) = Picture::from_file(bytes) {
        let ImageSize { height, width } = picture.size();
        assert_eq!(picture.rgb().len(), height * width * 3);
    }
    if let Ok(text) = std::str::from_utf8(bytes) {
        settings(text);
        infotext(text);
    }
}

/// A record that can be read comes back as it is.
fn settings(text: &str) {
    if let Ok(settings) = Settings::from_json(text) {
        let again = Settings::from_json(&settings.to_json()).expect("it was one");
        assert_eq!(again, settings);
        assert_eq!(again.key(), settings.key());
    }
}

/// Nothing is in the settings that was not in the text.
fn infotext(text: &str) {
    let found = Infotext::parse(text);
    let values: usize = found.values.iter().map(|(name, value)| name.len() + value.len()).sum();
    assert!(found.prompt.len() + found.negative_prompt.len() + values <= text.len(), "{text:?}");
}

fn record() -> String {
    let hash = "ab".repeat(32);
    format!(
        "{{\"schema\":1,\"version\":\"0.1.0\",\"pipeline\":1,\"prompt\":\"é\\n\",\
         \"resolved_prompt\":\"é\\n\",\"negative_prompt\":\"\",\"seed\":18446744073709551615,\
         \"steps\":25,\"guidance_scale\":7.5,\"width\":512,\"height\":512,\"scheduler\":null,\
         \"resolved_scheduler\":\"dpm++2m\",\"dtype\":\"f32\",\"model\":{{\"source\":\"a/b\",\
         \"revision\":null,\"variant\":null,\"weights_hash\":\"{hash}\",\
         \"config_hash\":\"{hash}\"}},\"device\":\"cpu\",\"kernel_path\":null}}"
    )
}

fn draw(random: &mut Random) -> Vec<u8> {
    let text = |random: &mut Random, bytes: &[u8]| {
        String::from_utf8_lossy(&damaged(random, bytes)).replace('\0', "x")
    };
    let line = b"a\nNegative prompt: b\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, \
                 Size: 8x8, Lora: \"a: b, \\\"c\\\"\", Version: stable-diffusion.cpp";
    match random.below(4) {
        0 => damaged(random, record().as_bytes()),
        1 => damaged(random, line),
        2 => {
            let len = random.below(80);
            noise(random, len)
        }
        _ => {
            let size = ImageSize { height: 1 + random.below(4), width: 1 + random.below(4) };
            let rgb = noise(random, size.height * size.width * 3);
            let picture = Picture::new(size, rgb).expect("it has so many pixels");
            let record = text(random, record().as_bytes());
            let parameters = Parameters {
                prompt: text(random, line),
                negative_prompt: text(random, line),
                steps: 1,
                sampler: "DDIM".into(),
                schedule_type: None,
                guidance_scale: 1.0,
                seed: 1,
                size,
                model: text(random, b"a/b"),
                clip_skip: 0,
                denoising_strength: None,
            };
            let formats = [FileFormat::Png, FileFormat::Jpeg, FileFormat::WebP];
            let format = formats[random.below(formats.len())];
            let file = picture.to_file(format, &parameters, &record).expect("it is small");
            damaged(random, &file)
        }
    }
}
