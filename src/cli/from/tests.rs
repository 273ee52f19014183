//! Tests of what strangers' files ask for. Separate because there are many kinds of them.

use super::*;
use crate::cli::job::tests::{Fake, job_of, parse_words};
use crate::cli::settings::tests::settings;
use crate::cli::{At, Job};
use crate::cli::{DtypeChoice, Request};
use crate::image::{ImageSize, Parameters, Picture};

fn picture() -> Picture {
    Picture::new(ImageSize { height: 1, width: 1 }, vec![1, 2, 3]).unwrap()
}

/// A picture that carries the record.
pub fn with_record(record: &str) -> Vec<u8> {
    let parameters = Parameters {
        prompt: "not read".into(),
        negative_prompt: String::new(),
        steps: 1,
        sampler: "no".into(),
        schedule_type: None,
        guidance_scale: 0.0,
        seed: 0,
        size: ImageSize { height: 1, width: 1 },
        model: String::new(),
        clip_skip: 0,
        denoising_strength: None,
    };
    picture().to_png(&parameters, record).unwrap()
}

/// A picture that carries the text.
fn with_text(text: &str) -> Vec<u8> {
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, 1, 1);
    encoder.add_itxt_chunk("parameters".into(), text.into()).unwrap();
    let mut writer = encoder.write_header().unwrap();
    writer.write_image_data(&[0]).unwrap();
    drop(writer);
    file
}

pub fn from(file: Vec<u8>, words: &str) -> std::result::Result<Job, String> {
    let there = vec![("x.png", At::File)];
    let mut fake = Fake { there, files: vec![("x.png", file)], ..Fake::default() };
    match parse_words(&format!("--from|x.png{words}"), &mut fake) {
        Ok(Request::Paint(job)) => Ok(*job),
        Ok(other) => panic!("{other:?}"),
        Err(error) => Err(error.to_string()),
    }
}

#[test]
fn a_record_becomes_the_job_it_was_and_flags_that_are_given_win() {
    let file = with_record(&settings().to_json());
    let words = "a fox|-n|blurry|-s|18446744073709551615|--steps|3|-g|7.1|-W|128|-H|64\
                 |-m|org/name|--dtype|f32";
    let job = from(file.clone(), "").unwrap();
    assert_eq!(job, job_of(words));
    // The model's own scheduler is the model's own again, and another model gets the same.
    let other = from(file.clone(), "|-m|other/name").unwrap();
    assert_eq!(other.scheduler, Some(SchedulerKind::Ddim.into()));
    type Change = fn(&mut Job);
    let rows: [(&str, Change); 10] = [
        ("|a cat", |job| job.prompt = "a cat".into()),
        ("|--prompt|", |job| job.prompt = String::new()),
        ("|-n|", |job| job.negative_prompt = String::new()),
        ("|-s|7", |job| job.seed = 7),
        // Also where they are the default.
        ("|--steps|25", |job| job.steps = "25".parse().unwrap()),
        ("|--prompt-syntax|a1111", |job| job.prompt_syntax = PromptSyntax::A1111),
        ("|--clip-skip|2", |job| job.clip_skip = "2".parse().unwrap()),
        ("|-g|7.5", |job| job.guidance_scale = "7.5".parse().unwrap()),
        ("|--dtype|auto", |job| job.dtype = DtypeChoice::Auto),
        ("|--scheduler|euler", |job| job.scheduler = Some(SchedulerKind::Euler.into())),
    ];
    for (flag, change) in rows {
        let mut expected = job.clone();
        change(&mut expected);
        assert_eq!(from(file.clone(), flag).unwrap(), expected, "{flag}");
    }
}

#[test]
fn little_memory_is_taken_from_a_record_and_never_away() {
    let file = |low_memory| with_record(&Settings { low_memory, ..settings() }.to_json());
    let check = |low_memory, words: &str, expected: bool| {
        let found = from(file(low_memory), words).unwrap();
        assert_eq!(found.low_memory, expected, "{low_memory} {words}");
    };
    check(false, "", false);
    check(false, "|--low-memory", true);
    check(true, "", true);
    let there = vec![("x.png", At::File)];
    let files = vec![("x.png", file(false)), ("c", b"low-memory = true".to_vec())];
    let variables = vec![("TINY_SD_CONFIG", "c")];
    let mut fake = Fake { there, files, variables, ..Fake::default() };
    let Ok(Request::Paint(job)) = parse_words("--from|x.png", &mut fake) else { panic!("a job") };
    assert!(job.low_memory);
}

#[test]
fn a_newer_record_is_taken_with_a_word_of_warning() {
    let job = |schema| {
        let record = Settings { schema, ..settings() };
        from(with_record(&record.to_json()), "").unwrap()
    };
    let (own, newer) = (job(1), job(7));
    assert_eq!(own.notes, [""; 0]);
    let note = "x.png: its record is of schema 7, and this tiny-sd reads 1: what it says may mean \
                something else";
    assert_eq!(newer.notes, [note]);
    assert_eq!(Job { notes: Vec::new(), ..newer }, own);
}

#[test]
fn layers_to_leave_out_that_nobody_writes_are_refused() {
    let text = |skip: &str| with_text(&format!("a\nSteps: 2, Seed: 1, Clip skip: {skip}"));
    for skip in ["-1", "0", "1"] {
        assert_eq!(from(text(skip), "").unwrap().clip_skip, job_of("a").clip_skip, "{skip}");
    }
    let error = from(text("-5"), "").unwrap_err().to_string();
    assert!(error.contains("its clip skip \"-5\""), "{error}");
    from(text("-5"), "|--clip-skip|1").unwrap();
}

#[test]
fn other_programs_settings_are_taken_and_what_is_not_is_said() {
    let text = "a fox\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a, Schedule type: \
                Automatic, CFG scale: 7, Seed: 5, Size: 512x768, Model: v1-5, Clip skip: 2";
    let job = from(with_text(text), "").unwrap();
    let same = "a fox|-n|blurry|--steps|20|--scheduler|euler-a|-g|7|-s|5|-W|512|-H|768\
                |--clip-skip|1|--prompt-syntax|a1111";
    assert_eq!(Job { notes: Vec::new(), ..job.clone() }, job_of(same));
    let note = "x.png: another program drew other noise from its seed; \
                not used: Model: v1-5";
    assert_eq!(job.notes, [note]);
    let cpp = "a\nSteps: 2, CFG scale: 7.000000, Seed: 1, Size: 8x8, RNG: cuda, \
               Sampler: dpm++2m discrete, Version: stable-diffusion.cpp";
    let job = from(with_text(cpp), "").unwrap();
    assert_eq!(job.scheduler, Some(SchedulerKind::DpmSolverMultistep.into()));
    assert_eq!(job.guidance_scale.get(), 7.0);
}

#[test]
fn samplers_have_their_names_and_other_schedules_are_refused_by_name() {
    let check = |sampler: &str, schedule: Option<&str>, expected: &str| {
        let found = scheduler(sampler, schedule);
        let found = found.map_or_else(|e| e.to_string(), |choice| choice.to_string());
        assert!(found.contains(expected), "{sampler}: {found}");
    };
    for kind in SchedulerKind::ALL {
        check(kind.info().label, None, kind.name());
    }
    check("Euler a", Some("Automatic"), "euler-a");
    check("euler_a", None, "euler-a");
    check("euler discrete", None, "euler");
    check("DPM++ 2M", Some("Karras"), "dpm++2m-karras");
    check("DPM++ 2M Karras", None, "dpm++2m-karras");
    check("dpm++2m karras", Some("discrete"), "dpm++2m-karras");
    check("DPM++ 2M SDE", Some("Exponential"), "dpm++2m-sde-exponential");
    check("DPM2 a", Some("Beta"), "kdpm2-a-beta");
    check("DPM++ 2M", Some("SGM Uniform"), "its schedule \"SGM Uniform\" is none that dpm++2m");
    check("euler_a karras", None, "its schedule \"karras\" is none that euler-a has");
    check("Euler a", Some("Karras"), "--scheduler euler-a takes its sampler");
    check("DPM++ 2S a", None, "its sampler \"DPM++ 2S a\" is none of tiny-sd's");
    check("DPM fast", None, "choose one with --scheduler (dpm++2m, ");
    check("", None, "its sampler \"\"");
}

#[test]
fn what_cannot_be_is_one_line_that_names_the_picture_and_the_flag() {
    let record = |from: &str, to: &str| {
        let json = settings().to_json();
        assert!(json.contains(from), "{json}");
        with_record(&json.replace(from, to))
    };
    for (file, words, expected) in [
        (b"GIF89a".to_vec(), "", "--from x.png: it is no PNG, JPEG or WebP"),
        (with_text(""), "", "says nothing about how it was made"),
        (picture().to_plain_png().unwrap(), "", "says nothing about how it was made"),
        (with_record("{}"), "", "its record cannot be read: missing field"),
        (record("\"steps\":3", "\"steps\":3000"), "", "its steps \"3000\": a whole number"),
        (record("\"steps\":3", "\"steps\":3000"), "|--steps|5", ""),
        (record("\"width\":128", "\"width\":4000000000"), "", "give --width"),
        (record("7.1", "-1.0"), "", "its guidance scale \"-1\""),
        (record("org/name", "none"), "", "its model \"none\": there is no such folder"),
        (record("org/name", r"\\\\evil\\share"), "", "is on another machine"),
        (record("\"ddim\"", "\"evil\""), "|-m|a/b", "--scheduler \"evil\" is unknown"),
        (with_text("x\nSteps: 2, Seed: -1, Size: 8x8"), "", "its seed \"-1\""),
        (with_text("x\nSteps: 2, Seed: -1, Size: 9x8"), "|-s|1", "its width \"9\""),
        (with_text("x\nSteps: 2, Seed: 1, Sampler: Restart"), "", "its sampler \"Restart\""),
        (with_text("x\nSteps: 2, Seed: 1, Sampler: Restart"), "|--scheduler|ddim", ""),
    ] {
        let message = from(file, words).err().unwrap_or_default();
        assert!(message.contains(expected), "{expected}: {message}");
        assert!(expected.is_empty() == message.is_empty(), "{expected}: {message}");
        assert!(!message.contains('\n'), "{message}");
    }
    let error = parse_words("--from|none.png", &mut Fake::default()).unwrap_err();
    assert_eq!(error.to_string(), "--from none.png: there is no such file");
}
