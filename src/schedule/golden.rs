//! Whole trajectories against diffusers', from `tests/generate_schedules.py`. Separate from the
//! other tests because it carries a plan out, in f64, as a pipeline does on a device.

use std::path::Path;

use serde_json::Value;

use super::plan::{Blend, Combination, Plan, Source};
use super::{SchedulerChoice, SchedulerConfig, SchedulerKind};
use crate::rng::Generator;

/// The fixture's sample.
const LEN: usize = 3;

/// Of the greater of one and the value: diffusers works in f32.
const TOLERANCE: f64 = 1e-5;

/// Of the timesteps of sigmas that are not a timestep's: diffusers has f32 there, too.
const TIMESTEP_TOLERANCE: f64 = 0.02;

/// Where a schedule ends in almost no original at all, f32 loses digits on the way, and so it does
/// where a difference is divided by a small sigma, or ancestral noise leaves a small difference.
fn tolerance(config: &str, kind: SchedulerKind) -> f64 {
    use SchedulerKind::{Heun, Kdpm2, Kdpm2Ancestral};
    let is_lossy = config.starts_with("cosine betas") || config == "zero terminal snr";
    let divides = matches!(kind, Heun | Kdpm2 | Kdpm2Ancestral);
    [is_lossy, divides].into_iter().filter(|lossy| *lossy).fold(TOLERANCE, |sum, _| 10.0 * sum)
}

/// The fixture's model: its output for a scaled input.
fn model(input: [f64; LEN], timestep: f64) -> [f64; LEN] {
    input.map(|value| (value + timestep / 100.0).sin())
}

fn noise(draw: usize) -> [f64; LEN] {
    std::array::from_fn(|place| 1.5 * (12.9898 * (LEN * draw + place) as f64 + 1.0).sin())
}

fn draws() -> impl FnMut() -> [f64; LEN] {
    let mut draws = 0..;
    move || noise(draws.next().unwrap_or_default())
}

/// The fixture's image, which cases with a strength begin with, and what of it a mask keeps.
const IMAGE: [f64; LEN] = [0.4, -0.7, 1.1];
const KEPT: [bool; LEN] = [false, true, false];

/// The first sample, and the sample after every step, of a run with this model and these draws,
/// and with an image of which a part may be kept.
fn carry_out<const N: usize>(
    plan: &Plan,
    model: impl Fn([f64; N], f64) -> [f64; N],
    mut draw: impl FnMut() -> [f64; N],
    image: Option<([f64; N], [bool; N])>,
) -> Vec<[f64; N]> {
    let mut slots: Vec<Option<[f64; N]>> = vec![None; plan.slots()];
    let noise = draw();
    let (image, kept) = image.unwrap_or(([0.0; N], [false; N]));
    let noised = |blend: Blend| -> [f64; N] {
        std::array::from_fn(|place| blend.original * image[place] + blend.noise * noise[place])
    };
    let mut sample = noised(plan.start);
    let mut samples = vec![sample];
    for step in &plan.steps {
        let output = model(sample.map(|value| value * step.input_scale), step.timestep);
        let fresh = step.draws_noise().then(&mut draw);
        let value_of = |sum: &Combination| {
            sum.terms().iter().fold([0.0; N], |total, (source, weight)| {
                let value = match source {
                    Source::Sample => sample,
                    Source::Output => output,
                    Source::Stored(slot) => slots[*slot].expect("written before it is read"),
                    Source::Noise => fresh.expect("drawn"),
                };
                std::array::from_fn(|place| total[place] + weight * value[place])
            })
        };
        let next = value_of(&step.sample);
        let stored: Vec<(usize, [f64; N])> =
            step.stores.iter().map(|store| (store.slot, value_of(&store.value))).collect();
        for (slot, value) in stored {
            slots[slot] = Some(value);
        }
        let noised = noised(step.noised);
        sample = std::array::from_fn(|place| [next, noised][usize::from(kept[place])][place]);
        samples.push(sample);
    }
    samples
}

/// The largest error of a case, as a multiple of the tolerance.
fn compare(case: &Value, config: &Value) -> Result<f64, String> {
    let numbers = |value: &Value| -> Vec<f64> {
        value.as_array().expect("a list").iter().map(|n| n.as_f64().expect("number")).collect()
    };
    let choice = SchedulerChoice::parse(case["scheduler"].as_str().expect("name")).expect("known");
    let scheduler = SchedulerConfig::parse(config)
        .and_then(|config| config.for_scheduler(choice))
        .map_err(|error| error.to_string())?;
    let steps = case["steps"].as_u64().expect("steps") as usize;
    let plan = match case["strength"].as_f64() {
        Some(strength) => scheduler.plan_from(steps, strength),
        None => scheduler.plan(steps),
    };
    let plan = plan.map_err(|error| error.to_string())?;

    // Every timestep is an f32, written with the fewest digits.
    let timesteps: Vec<f64> = plan.steps.iter().map(|step| step.timestep).collect();
    let theirs: Vec<f64> =
        numbers(&case["timesteps"]).into_iter().map(|number| f64::from(number as f32)).collect();
    let choice = scheduler.choice();
    let is_between = choice.to_string().starts_with("kdpm2");
    let is_same = |(ours, theirs): (&f64, &f64)| {
        let is_whole = !is_between && (choice.sigmas().is_none() || theirs.fract() == 0.0);
        (ours - theirs).abs() <= if is_whole { 0.0 } else { TIMESTEP_TOLERANCE }
    };
    let evaluations = case["evaluations"].as_u64().expect("evaluations");
    if timesteps.len() as u64 != evaluations {
        return Err(format!("{} evaluations are not {evaluations}", timesteps.len()));
    }
    let last = &timesteps[timesteps.len() - theirs.len()..];
    if !last.iter().zip(&theirs).all(is_same) {
        return Err(format!("timesteps {last:?} are not {theirs:?}"));
    }
    let image = case["strength"].is_number().then_some((IMAGE, KEPT));
    if let Some(sigma) = case["init_noise_sigma"].as_f64()
        && ((plan.start.noise / sigma - 1.0).abs() >= 1e-6 || plan.start.original != 0.0)
    {
        return Err(format!("{:?} is not init_noise_sigma {sigma}", plan.start));
    }

    let theirs = case["samples"].as_array().expect("samples");
    let tolerance = tolerance(case["config"].as_str().expect("config"), choice.kind());
    let samples = carry_out(&plan, model, draws(), image);
    let first = case.get("first").map(|theirs| (&samples[0], theirs));
    let last = samples[samples.len() - theirs.len()..].iter().zip(theirs);
    let mut worst: f64 = 0.0;
    for (index, (ours, theirs)) in first.into_iter().chain(last).enumerate() {
        for (ours, theirs) in ours.iter().zip(numbers(theirs)) {
            let error = (ours - theirs).abs() / theirs.abs().max(1.0) / tolerance;
            if error.is_nan() || error > 1.0 {
                return Err(format!("sample {index}: {ours} is not {theirs}, {error}"));
            }
            worst = worst.max(error);
        }
    }
    Ok(worst)
}

#[test]
fn every_trajectory_is_that_of_diffusers() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/schedules.json");
    let text = std::fs::read_to_string(path).expect("the fixture of generate_schedules.py");
    let fixture: Value = serde_json::from_str(&text).expect("JSON");
    let mut worst = vec![(0.0, "no golden"); SchedulerKind::ALL.len()];
    let mut failures = Vec::new();
    for case in fixture["cases"].as_array().expect("cases") {
        let text = |name: &str| case[name].as_str().expect("text");
        let name = text("config");
        let choice = SchedulerChoice::parse(text("scheduler")).expect("known");
        match compare(case, &fixture["configs"][name]) {
            Ok(error) => {
                let worst = &mut worst[choice.kind() as usize];
                if error > worst.0 {
                    *worst = (error, name);
                }
            }
            Err(message) => {
                failures.push(format!(
                    "{name} {choice} {} {}: {message}",
                    case["steps"], case["strength"]
                ));
            }
        }
    }
    assert!(failures.is_empty(), "{}:\n{}", failures.len(), failures.join("\n"));
    for (kind, worst) in SchedulerKind::ALL.iter().zip(worst) {
        // A scheduler without a golden, or one that compares nothing, is not tested.
        assert!(worst.0 > 0.0, "{}: {}", kind.name(), worst.1);
        println!("{}: {:.3} of the tolerance ({})", kind.name(), worst.0, worst.1);
    }
}

/// `tests/fixtures/README.md` says what is in `golden/schedules.safetensors`.
#[test]
fn every_published_configuration_gives_diffusers_trajectories() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let goldens = fixtures.join("golden/schedules.safetensors");
    let goldens = candle_core::safetensors::load(goldens, &candle_core::Device::Cpu).expect("file");
    let (mut compared, mut runge_kutta) = (0, 0);
    for (key, samples) in &goldens {
        let Some(case) = key.strip_suffix(".samples") else { continue };
        let (config, rest) = case.split_once('.').expect("CONFIG.SCHEDULER.STEPS");
        let (scheduler, steps) = rest.rsplit_once('.').expect("SCHEDULER.STEPS");
        let (model, without) = config.split_once("-without-").unwrap_or((config, ""));
        let path = format!("models/{model}/scheduler/scheduler_config.json");
        // A bare word is no JSON; quoted it means the same to the reader of the configuration.
        let text = std::fs::read_to_string(fixtures.join(path)).expect("configuration");
        let text = text.replace("-Infinity", "\"-Infinity\"");
        let mut config: Value = serde_json::from_str(&text).expect("JSON");
        config.as_object_mut().expect("an object").remove(without);
        let choice = SchedulerChoice::parse(scheduler).expect(case);
        let scheduler = SchedulerConfig::parse(&config).and_then(|c| c.for_scheduler(choice));
        let plan = scheduler.and_then(|s| s.plan(steps.parse().expect(case))).expect(case);

        let mut generator = Generator::new(3);
        let draw = || {
            let normals = generator.randn(16);
            std::array::from_fn(|i| f64::from(normals[i]))
        };
        let model = |input: [f64; 16], timestep: f64| {
            std::array::from_fn(|i| 0.8 * input[i] + 0.3 * (i as f64 + timestep / 100.0).sin())
        };
        let ours = carry_out(&plan, model, draw, None);
        let theirs = samples.to_vec2::<f32>().expect(case);
        assert_eq!(ours.len(), theirs.len(), "{case}");
        for (index, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
            for (ours, theirs) in ours.iter().zip(theirs) {
                let error = (ours - f64::from(*theirs)).abs() / f64::from(*theirs).abs().max(1.0);
                assert!(error <= TOLERANCE, "{case}, row {index}: {ours} is not {theirs}");
            }
        }
        compared += 1;
        runge_kutta += usize::from(!without.is_empty());
    }
    assert_eq!((compared, runge_kutta), (3 * 5 * 5 + 2, 2));
}
