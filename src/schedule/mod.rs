//! Schedulers: from a model's `scheduler_config.json` to a [`Plan`], the numbers of every step.
//! Separate because all of it is arithmetic in f64 on the host, done before the loop starts; what
//! runs on a device are the plan's linear combinations, the same for every scheduler.
//!
//! A scheduler is one file, one row in the table below and one line in
//! `tests/generate_schedules.py`.

mod beta;
mod config;
mod consistency;
mod ddim;
mod ddpm;
mod deis;
mod dpm_singlestep;
mod dpm_solver;
mod euler;
mod euler_ancestral;
mod heun;
mod kdpm2;
mod lms;
mod names;
mod plan;
mod pndm;
mod prediction;
mod sigma_schedule;
mod sigmas;
mod solver;
mod spacing;
mod training;
mod unipc;

pub use config::SchedulerConfig;
pub use names::{SchedulerChoice, SchedulerInfo};
pub use plan::{Blend, Combination, Plan, Source, Step, Store};
pub use sigma_schedule::SigmaSchedule;

use crate::{Error, Result};
use config::Fields;

/// The rows of the table become the enum and what is known of each scheduler. A row's function
/// reads a configuration: it is a `fn(&Fields) -> Result<impl Compile>`.
macro_rules! schedulers {
    ($($kind:ident $read:path {
        $name:literal, $class:literal, $label:literal, $others:expr, $algorithm:expr,
        $takes:literal, $note:literal
    })*) => {
        /// A sampling algorithm.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum SchedulerKind {
            $(#[doc = concat!("diffusers' `", $class, "`, `", $name, "`.")] $kind,)*
        }

        impl SchedulerKind {
            /// Every scheduler, in the order in which help lists them.
            pub const ALL: &[Self] = &[$(Self::$kind),*];

            /// What the table says of it.
            pub fn info(self) -> &'static SchedulerInfo {
                match self {
                    $(Self::$kind => &SchedulerInfo {
                        name: $name,
                        class_name: $class,
                        label: $label,
                        other_names: $others,
                        algorithm_type: $algorithm,
                        takes_sigma_schedules: $takes,
                        note: $note,
                    },)*
                }
            }

            fn read(self, fields: &Fields) -> Result<Box<dyn Compile>> {
                match self { $(Self::$kind => Ok(Box::new($read(fields)?)),)* }
            }
        }
    };
}
// kind, what reads its configuration, name on the command line, diffusers' class, AUTOMATIC1111's
// "Sampler" or our name where it has none, other programs' names, which algorithm of its class it
// is if there are several, whether its class knows Karras' sigmas and the others, a note for users.
schedulers! {
    DpmSolverMultistep dpm_solver::read {
        "dpm++2m", "DPMSolverMultistepScheduler", "DPM++ 2M", &[], Some("dpmsolver++"), true,
        "second order from two steps; solver_order 1 to 3"
    }
    DpmSolverMultistepSde dpm_solver::read {
        "dpm++2m-sde", "DPMSolverMultistepScheduler", "DPM++ 2M SDE", &[],
        Some("sde-dpmsolver++"), true, "as dpm++2m; draws noise in every step"
    }
    DpmSolverSinglestep dpm_singlestep::read {
        "dpm++2s", "DPMSolverSinglestepScheduler", "DPM++ 2S", &[], None, true,
        "second order in groups of two steps; solver_order 1 to 3"
    }
    Ddim ddim::read {
        "ddim", "DDIMScheduler", "DDIM", &[], None, false, "first order, eta 0"
    }
    Ddpm ddpm::read {
        "ddpm", "DDPMScheduler", "DDPM", &[], None, false,
        "first order; draws noise in every step; for many steps"
    }
    Pndm pndm::read {
        "pndm", "PNDMScheduler", "PLMS", &[], None, false,
        "fourth order from four steps; evaluates the UNet once more than there are steps"
    }
    Euler euler::read {
        "euler", "EulerDiscreteScheduler", "Euler", &[], None, true, "first order"
    }
    EulerAncestral euler_ancestral::read {
        "euler-a", "EulerAncestralDiscreteScheduler", "Euler a", &["euler_ancestral"], None, false,
        "first order; draws noise in every step"
    }
    Heun heun::read {
        "heun", "HeunDiscreteScheduler", "Heun", &[], None, true,
        "second order; evaluates the UNet twice a step"
    }
    Lms lms::read {
        "lms", "LMSDiscreteScheduler", "LMS", &[], None, true, "fourth order from four steps"
    }
    Deis deis::read {
        "deis", "DEISMultistepScheduler", "DEIS", &[], None, true,
        "second order from two steps; solver_order 1 to 3"
    }
    UniPc unipc::read {
        "unipc", "UniPCMultistepScheduler", "UniPC", &[], None, true,
        "second order from two steps, each corrected by the next; solver_order 1 to 3"
    }
    Kdpm2 kdpm2::read {
        "kdpm2", "KDPM2DiscreteScheduler", "DPM2", &[], None, true,
        "second order; evaluates the UNet twice a step"
    }
    Kdpm2Ancestral kdpm2::read_ancestral {
        "kdpm2-a", "KDPM2AncestralDiscreteScheduler", "DPM2 a", &["dpm_2_ancestral"], None, true,
        "second order; evaluates the UNet twice a step; draws noise in every step"
    }
    Lcm consistency::read_lcm {
        "lcm", "LCMScheduler", "LCM", &[], None, false,
        "for models and LoRAs distilled for it, 2 to 8 steps; draws noise in every step"
    }
    Tcd consistency::read_tcd {
        "tcd", "TCDScheduler", "TCD", &[], None, false,
        "for models and LoRAs distilled for it, 2 to 8 steps; eta 0, as in diffusers' pipeline"
    }
}

impl SchedulerKind {
    /// The name on the command line, such as `dpm++2m`.
    pub fn name(self) -> &'static str {
        self.info().name
    }
}

/// A scheduler whose every setting is known and covered: what is left is the number of steps.
pub struct Scheduler {
    choice: SchedulerChoice,
    num_train_timesteps: usize,
    settings: Box<dyn Compile>,
}

impl Scheduler {
    /// Which one it is, and how its sigmas are spaced.
    pub fn choice(&self) -> SchedulerChoice {
        self.choice
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
            .map_err(|error| error.context(format!("scheduler {}", self.choice)))
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
            let plan = config.for_scheduler((*kind).into()).unwrap().plan(20).unwrap();
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
}
