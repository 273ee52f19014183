//! Pictures in files of every kind: what Pillow reads from them and how it resizes, byte for byte
//! where the format leaves no choice, and the program's own files, read again by the program.

use std::collections::HashMap;
use std::fs;

use candle_core::{DType, Device, Tensor as Golden};
use tempfile::TempDir;
use tiny_sd::image::{FileFormat, ImageSize, Mask, Picture, PictureTexts};

use super::golden::{fixtures, psnr};
use super::metadata::{ends_with, json, run};
use super::numbers::Random;

fn goldens() -> HashMap<String, Golden> {
    candle_core::safetensors::load(fixtures().join("pictures.safetensors"), &Device::Cpu).unwrap()
}

fn bytes(golden: &Golden) -> Vec<u8> {
    golden.to_dtype(DType::U8).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn picture(golden: &Golden) -> Picture {
    let (height, width, _) = golden.dims3().unwrap();
    Picture::new(ImageSize { height, width }, bytes(golden)).unwrap()
}

#[test]
fn a_file_of_any_kind_has_the_pixels_that_pillow_reads() {
    let goldens = goldens();
    let names = goldens.keys().filter_map(|name| name.strip_suffix(".file"));
    let mut count = 0;
    for name in names {
        let file = bytes(&goldens[&format!("{name}.file")]);
        let expected = picture(&goldens[&format!("{name}.rgb")]);
        let found = Picture::from_file(&file).unwrap();
        assert_eq!(found.size(), expected.size(), "{name}");
        assert_eq!(PictureTexts::read(&file).unwrap().upright_size(), expected.size(), "{name}");
        let psnr = psnr(found.rgb(), expected.rgb());
        // Of lossy files decoders round in their own ways.
        let least = if name.starts_with("lossy-") { 40.0 } else { f64::INFINITY };
        assert!(psnr >= least, "{name}: {psnr:.1} dB");
        count += 1;
    }
    assert_eq!(count, 28);
}

#[test]
fn a_damaged_file_is_read_or_refused_on_one_line() {
    let mut random = Random(7);
    for (name, file) in goldens().iter().filter(|(name, _)| name.ends_with(".file")) {
        let file = bytes(file);
        for round in 0..60 {
            let mut damaged = file.clone();
            for _ in 0..=random.below(3) {
                let place = random.below(damaged.len());
                damaged[place] = random.bits() as u8;
            }
            if round % 4 == 0 {
                damaged.truncate(random.below(damaged.len()));
            }
            if let Err(error) = Picture::from_file(&damaged) {
                let text = error.to_string();
                assert!(!text.contains('\n') && text.len() < 300, "{name} {round}: {text}");
            }
        }
    }
}

#[test]
fn a_picture_in_another_size_is_pillows_to_the_byte() {
    let goldens = goldens();
    for case in 0..14 {
        let expected = picture(&goldens[&format!("resize.{case}.to")]);
        let before = picture(&goldens[&format!("resize.{case}.from")]);
        let found = before.resized(expected.size()).unwrap();
        assert!(found == expected, "{case}: {found:?} of {before:?}");
    }
}

#[test]
fn a_mask_is_diffusers_and_as_large_as_the_latents_torchs() {
    let goldens = goldens();
    let size = ImageSize { height: 48, width: 64 };
    let mask = Mask::of_picture(&picture(&goldens["mask.from"]), size).unwrap();
    let found: Vec<u8> = mask.pixels().iter().copied().map(u8::from).collect();
    assert_eq!(found, bytes(&goldens["mask.to"]));
    let latents = mask.of_latents(8).unwrap();
    assert_eq!(latents.size(), ImageSize { height: 6, width: 8 });
    let found: Vec<u8> = latents.pixels().iter().copied().map(u8::from).collect();
    assert_eq!(found, bytes(&goldens["mask.latents"]));
    assert!(mask.of_latents(7).is_err() && mask.of_latents(0).is_err());
}

#[test]
fn of_deep_grey_the_upper_bits_count_where_pillow_would_cut_at_255() {
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, 2, 1);
    encoder.set_depth(png::BitDepth::Sixteen);
    let mut writer = encoder.write_header().unwrap();
    writer.write_image_data(&[0x12, 0x34, 0xff, 0xff]).unwrap();
    drop(writer);
    assert_eq!(Picture::from_file(&file).unwrap().rgb(), [18, 18, 18, 255, 255, 255]);
}

#[test]
fn a_picture_of_every_format_says_how_it_was_made_and_is_made_again() {
    let folder = TempDir::new().unwrap();
    // Longer than a segment of a JPEG.
    let long = format!("a \"red\" fox, 東京 {}", "and snow ".repeat(4000));
    let made: Vec<_> = ["x.png", "x.jpg", "x.JPEG", "x.webp"]
        .into_iter()
        .map(|name| {
            let words = [long.as_str(), "-n", "blurry", "-s", "7", "--steps", "2", "-o", name];
            ends_with(0, &run(folder.path(), &words));
            let file = fs::read(folder.path().join(name)).unwrap();
            let found = json(folder.path(), &["info", name, "--json"], 0);
            assert_eq!(found["record"]["prompt"], long, "{name}");
            assert_eq!(found["settings"]["prompt"], long, "{name}");
            assert_eq!(found["settings"]["values"]["Seed"], "7", "{name}");
            let (answer, _) = ends_with(0, &run(folder.path(), &["verify", "-q", name]));
            assert!(answer.starts_with(&format!("{name}: bit-exact")), "{answer}");
            (FileFormat::of_bytes(&file).unwrap(), Picture::from_file(&file).unwrap())
        })
        .collect();
    let [(png, original), (jpeg, lossy), (also_jpeg, same), (webp, lossless)] = &made[..] else {
        panic!("four")
    };
    assert_eq!((*png, *webp), (FileFormat::Png, FileFormat::WebP));
    assert_eq!((*jpeg, *also_jpeg), (FileFormat::Jpeg, FileFormat::Jpeg));
    assert!(original == lossless && lossy == same && original != lossy);
    assert!(psnr(original.rgb(), lossy.rgb()) > 30.0);
    // The way back from one kind to another.
    let words = ["--from", "x.webp", "-o", "again-{seed}.jpg", "--preview", "1"];
    ends_with(0, &run(folder.path(), &words));
    let again = fs::read(folder.path().join("again-7.jpg")).unwrap();
    assert!(&Picture::from_file(&again).unwrap() == lossy);
    // What another program saved again is not the same, and a record is no promise.
    let file = original.to_plain_file(FileFormat::Jpeg).unwrap();
    fs::write(folder.path().join("bare.jpg"), file).unwrap();
    let (_, stderr) = ends_with(2, &run(folder.path(), &["verify", "bare.jpg"]));
    assert!(stderr.contains("it has no record of tiny-sd's"), "{stderr}");
}

#[test]
fn a_batch_writes_the_formats_that_its_names_say() {
    let folder = TempDir::new().unwrap();
    let jobs = "--prompt a --output a.webp\n--prompt b --output b.jpg\n";
    fs::write(folder.path().join("jobs.txt"), jobs).unwrap();
    let words = ["batch", "jobs.txt", "--out-dir", "out", "--steps", "1", "--preview", "1", "-q"];
    ends_with(0, &run(folder.path(), &words));
    for (name, format) in [("a.webp", FileFormat::WebP), ("b.jpg", FileFormat::Jpeg)] {
        let file = fs::read(folder.path().join("out").join(name)).unwrap();
        assert_eq!(FileFormat::of_bytes(&file).unwrap(), format);
        assert!(PictureTexts::read(&file).unwrap().record.is_some(), "{name}");
    }
    // Nothing is left to do.
    let (stdout, _) = ends_with(0, &run(folder.path(), &words));
    assert_eq!(stdout.matches("\"skipped\":true").count(), 2, "{stdout}");
}

#[test]
fn a_preview_in_a_terminal_takes_the_place_of_the_last_one_and_goes_at_the_end() {
    let folder = TempDir::new().unwrap();
    let check = |words: &[&str], start: &str, end: &str| {
        let all = ["a", "--steps", "4", "-o", "x.png", "--preview", "1", "--preview-in"];
        let (_, stderr) = ends_with(0, &run(folder.path(), &[&all[..], words].concat()));
        let room = "\n".repeat(16);
        let drawn: Vec<_> = stderr.split(&room).collect();
        // After each step but the last, whose picture is the picture.
        assert_eq!(drawn.len(), 4, "{stderr:?}");
        for (at, part) in drawn.iter().enumerate().skip(1) {
            assert!(part.starts_with(&format!("\x1b[16A\x1b7{start}")), "{part:?}");
            let again = part.ends_with("\x1b[16B\r\x1b[16A\x1b[J");
            assert_eq!(again, at < 3, "{part:?}");
        }
        let gone = format!("\x1b[16B\r\x1b[16A\r\x1b[J{end}x.png: seed");
        assert!(drawn[3].contains(&gone), "{:?}", drawn[3]);
        let names: Vec<_> = fs::read_dir(folder.path()).unwrap().collect();
        assert!(!folder.path().join("x-preview.png").exists(), "{names:?}");
    };
    check(&["sixel"], "\x1bP0;1;0q", "");
    check(&["iterm2"], "\x1b]1337;File=inline=1;", "");
    check(&["kitty"], "\x1b_Ga=T,f=100,i=1,p=1,q=2,C=1,r=16", "\x1b_Ga=d,d=I,i=1,q=2\x1b\\");
}
