//! Schedulers: from a model's `scheduler_config.json` to a [`Plan`], the numbers of every step.
//! Separate because all of it is arithmetic in f64 on the host, done before the loop starts; what
//! runs on a device are the plan's linear combinations, the same for every scheduler.
//!
//! A scheduler is one file, one row in the table below and one line in
//! `tests/generate_schedules.py`.

mod config;
mod ddim;
mod dpm_solver;
mod euler;
mod euler_ancestral;
mod plan;
mod pndm;
mod prediction;
mod spacing;
mod training;

pub use config::SchedulerConfig;
pub use plan::{Blend, Combination, Plan, Source, Step, Store};

use crate::{Error, Result};
use config::Fields;

/// The rows of the table become the enum and its names; each row's module has a
/// `read(&Fields) -> Result<impl Compile>`.
macro_rules! schedulers {
    ($($kind:ident $module:ident $name:literal $class:literal $label:literal)*) => {
        /// A sampling algorithm.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum SchedulerKind {
            $(#[doc = concat!("diffusers' `", $class, "`, `", $name, "`.")] $kind,)*
        }

        impl SchedulerKind {
            /// Every scheduler, in the order in which help lists them.
            pub const ALL: &[Self] = &[$(Self::$kind),*];

            /// The name on the command line, such as `dpm++2m`.
            pub fn name(self) -> &'static str {
                match self { $(Self::$kind => $name,)* }
            }

            /// diffusers' class, as `_class_name` in a configuration names it.
            pub fn class_name(self) -> &'static str {
                match self { $(Self::$kind => $class,)* }
            }

            /// AUTOMATIC1111's name, for the "Sampler" of a picture's metadata.
            pub fn label(self) -> &'static str {
                match self { $(Self::$kind => $label,)* }
            }

            fn read(self, fields: &Fields) -> Result<Box<dyn Compile>> {
                match self { $(Self::$kind => Ok(Box::new($module::read(fields)?)),)* }
            }
        }
    };
}
schedulers! {
    // kind, file, name on the command line, diffusers' class, AUTOMATIC1111's "Sampler"
    DpmSolverMultistep dpm_solver "dpm++2m" "DPMSolverMultistepScheduler" "DPM++ 2M"
    Ddim ddim "ddim" "DDIMScheduler" "DDIM"
    Pndm pndm "pndm" "PNDMScheduler" "PLMS"
    Euler euler "euler" "EulerDiscreteScheduler" "Euler"
    EulerAncestral euler_ancestral "euler-a" "EulerAncestralDiscreteScheduler" "Euler a"
}

impl SchedulerKind {
    /// The scheduler of a command-line name, or of AUTOMATIC1111's.
    ///
    /// # Errors
    /// An unknown name: the nearest one, and all of them.
    pub fn parse(name: &str) -> Result<Self> {
        let is_named = |kind: &&Self| {
            [kind.name(), kind.label()].iter().any(|known| known.eq_ignore_ascii_case(name))
        };
        if let Some(kind) = Self::ALL.iter().find(is_named) {
            return Ok(*kind);
        }
        let known: Vec<&str> = Self::ALL.iter().map(|kind| kind.name()).collect();
        let near = known.iter().map(|known| (edit_distance(name, known), known)).min();
        let hint = match near {
            Some((distance, near)) if distance <= 2 => format!("did you mean {near}? "),
            Some(_) | None => String::new(),
        };
        Err(Error::usage(format!(
            "--scheduler {name:?} is unknown; {hint}(known: {})",
            known.join(", ")
        )))
    }
}

/// A scheduler whose every setting is known and covered: what is left is the number of steps.
pub struct Scheduler {
    kind: SchedulerKind,
    num_train_timesteps: usize,
    settings: Box<dyn Compile>,
}

impl Scheduler {
    /// Which one it is.
    pub fn kind(&self) -> SchedulerKind {
        self.kind
    }

    /// The numbers of a whole run of `steps` steps (diffusers' `num_inference_steps`; PNDM
    /// evaluates the model once more than that, or nine times with its Runge-Kutta steps).
    ///
    /// # Errors
    /// No steps, more steps than `num_train_timesteps`, or a count at which this scheduler's
    /// formulas have no finite value.
    pub fn plan(&self, steps: usize) -> Result<Plan> {
        self.compile(&Run { steps, beginning: Beginning::Noise })
    }

    /// The numbers of a run that begins with an image, whose latents get so much noise that the
    /// last `strength` of the `steps` take it out: diffusers' `StableDiffusionImg2ImgPipeline`.
    /// With `strength` 1 that are all steps, and a trace of the image is still in the first sample;
    /// where none should be (`StableDiffusionInpaintPipeline` leaves none), [`plan`](Self::plan) is
    /// the plan.
    ///
    /// # Errors
    /// A `strength` that is not between 0 and 1, or so little that no step is left; and as
    /// [`plan`](Self::plan).
    pub fn plan_from(&self, steps: usize, strength: f64) -> Result<Plan> {
        if !(0.0..=1.0).contains(&strength) {
            return Err(Error::usage(format!("--strength {strength}: it goes from 0 to 1")));
        }
        // Rounded down, in f64, as Python does it.
        let done = (steps as f64 * strength) as usize;
        if done == 0 && steps > 0 {
            return Err(Error::usage(format!(
                "--strength {strength} of --steps {steps} is not one step; try more of either"
            )));
        }
        let skipped = steps.saturating_sub(done);
        self.compile(&Run { steps, beginning: Beginning::Image { skipped } })
    }

    fn compile(&self, run: &Run) -> Result<Plan> {
        let steps = run.steps;
        if steps == 0 || steps > self.num_train_timesteps {
            return Err(Error::usage(format!(
                "--steps {steps}: the model's scheduler takes 1 to {}",
                self.num_train_timesteps
            )));
        }
        self.settings
            .compile(run)
            .map_err(|error| error.context(format!("scheduler {}", self.kind.name())))
    }
}

/// What a scheduler's file provides.
trait Compile: Send + Sync {
    /// The run's `steps` are between 1 and `num_train_timesteps`.
    fn compile(&self, run: &Run) -> Result<Plan>;
}

/// What of a schedule is planned.
struct Run {
    /// Steps of the whole schedule.
    steps: usize,
    beginning: Beginning,
}

/// What a run's first sample is.
#[derive(Clone, Copy)]
enum Beginning {
    /// Noise, as much as the schedule begins with.
    Noise,
    /// An image with the noise of where the run begins, so many steps later.
    Image { skipped: usize },
}

impl Run {
    /// Steps that are left out of `count`: less than that, so there is a first one.
    fn skipped(&self, count: usize) -> Result<usize> {
        let skipped = match self.beginning {
            Beginning::Noise => 0,
            Beginning::Image { skipped } => skipped,
        };
        if skipped < count {
            return Ok(skipped);
        }
        Err(Error::usage(format!(
            "--steps {}: its {count} timesteps leave none after the first {skipped}; try more \
             --strength",
            self.steps
        )))
    }

    /// What is left of a list that has an item for each step.
    fn rest<T>(&self, mut all: Vec<T>) -> Result<Vec<T>> {
        Ok(all.split_off(self.skipped(all.len())?))
    }

    /// The first sample: what `noised` is for the first step's level of noise, and `sigma` the
    /// factor of pure noise (diffusers' `init_noise_sigma`).
    fn start(&self, sigma: f64, noised: Blend) -> Blend {
        match self.beginning {
            Beginning::Noise => Blend::of_noise(sigma),
            Beginning::Image { .. } => noised,
        }
    }
}

/// Levenshtein's distance.
fn edit_distance(left: &str, right: &str) -> usize {
    let right: Vec<char> = right.chars().collect();
    let mut row: Vec<usize> = (0..=right.len()).collect();
    // Names are short; what a user types may not be.
    for (index, a) in left.chars().take(64).enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], index + 1);
        for (column, b) in right.iter().enumerate() {
            let cost = diagonal + usize::from(a != *b);
            diagonal = row[column + 1];
            row[column + 1] = cost.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[right.len()]
}

#[cfg(test)]
mod golden;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_step_takes_for_the_original_has_none_of_its_noise() {
        let config = serde_json::json!({
            "_class_name": "DDIMScheduler", "clip_sample": false, "set_alpha_to_one": true,
            "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
            "skip_prk_steps": true,
        });
        for kind in SchedulerKind::ALL {
            let config = SchedulerConfig::parse(&config).unwrap();
            let plan = config.for_scheduler(*kind).unwrap().plan(20).unwrap();
            for step in &plan.steps {
                let weight = |source| {
                    let terms = step.original.terms().iter();
                    terms.filter(|term| term.0 == source).map(|term| term.1).sum::<f64>()
                };
                let (of_sample, of_output) = (weight(Source::Sample), weight(Source::Output));
                // The output is the noise: `sample = alpha * original + sigma * output`.
                let (alpha, sigma) = (1.0 / of_sample, -of_output / of_sample);
                let squares =
                    (alpha * step.input_scale).powi(2) + (sigma * step.input_scale).powi(2);
                assert!((squares - 1.0).abs() < 1e-6, "{kind:?} {step:?}");
            }
            let last = plan.steps.last().unwrap();
            if matches!(kind, SchedulerKind::Euler | SchedulerKind::Ddim) {
                assert_eq!(last.sample, last.original, "{kind:?}: the end is the original");
            }
        }
    }

    #[test]
    fn a_run_from_an_image_does_the_last_steps_and_one_without_steps_is_refused() {
        let config = serde_json::json!({ "_class_name": "EulerDiscreteScheduler" });
        let scheduler = SchedulerConfig::parse(&config).unwrap().scheduler().unwrap();
        let whole = scheduler.plan(20).unwrap();
        // 0.55 * 20 is a little more than 11 in f64, 0.29 * 100 a little less than 29.
        for (steps, strength, done) in [(20, 1.0, 20), (20, 0.55, 11), (100, 0.29, 28)] {
            let plan = scheduler.plan_from(steps, strength).unwrap();
            assert_eq!(plan.steps.len(), done, "{steps} {strength}");
            assert_eq!(plan.start.original, 1.0);
        }
        let last = scheduler.plan_from(20, 0.05).unwrap();
        assert_eq!(last.steps, whole.steps[19..]);
        for (strength, named) in
            [(0.04, "--strength 0.04 of --steps 20"), (1.1, "1.1"), (f64::NAN, "NaN")]
        {
            let error = scheduler.plan_from(20, strength).expect_err("no such part");
            assert!(error.to_string().contains(named), "{error}");
            assert_eq!(error.kind(), crate::error::Kind::Usage);
        }
    }

    #[test]
    fn every_name_is_parsed_and_a_misspelt_one_is_answered() {
        for kind in SchedulerKind::ALL {
            assert_eq!(SchedulerKind::parse(kind.name()).ok(), Some(*kind));
        }
        for (typed, answer) in [
            ("eluer", "did you mean euler?"),
            ("dpm++2n", "did you mean dpm++2m?"),
            ("heun-something", "(known: dpm++2m, ddim, pndm, euler, euler-a)"),
        ] {
            let error = SchedulerKind::parse(typed).expect_err(typed);
            assert!(error.to_string().contains(answer), "{error}");
            assert_eq!(error.kind(), crate::error::Kind::Usage);
        }
    }
}
