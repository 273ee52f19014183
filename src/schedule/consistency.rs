//! LCM (Luo et al. 2023) and TCD (Zheng et al. 2024), the samplers of distilled models, as
//! diffusers' `LCMScheduler` and `TCDScheduler`. One file because they visit the same timesteps:
//! some of those on which such models are trained.

use super::config::Fields;
use super::plan::{Blend, Combination, Plan, Source, Step};
use super::prediction::Prediction;
use super::training::{Betas, NoiseSchedule, Rescaling};
use super::{Compile, Run};
use crate::{Error, Result};

pub(super) struct Consistency {
    training: NoiseSchedule,
    prediction: Prediction,
    /// Timesteps on which the model was distilled.
    original_inference_steps: usize,
    method: Method,
}

/// What a step makes of the model's output.
#[derive(Clone, Copy)]
enum Method {
    /// The original, and fresh noise on it.
    Lcm { timestep_scaling: f64 },
    /// A sample with less of the same noise: TCD with an eta of 0, which is what diffusers'
    /// `StableDiffusionPipeline` calls it with.
    Tcd,
}

/// LCM's standard deviation of the originals.
const SIGMA_DATA: f64 = 0.5;

pub(super) fn read_lcm(fields: &Fields) -> Result<Consistency> {
    let timestep_scaling = fields.number("timestep_scaling", 10.0)?;
    read_with(fields, Method::Lcm { timestep_scaling })
}

pub(super) fn read_tcd(fields: &Fields) -> Result<Consistency> {
    read_with(fields, Method::Tcd)
}

fn read_with(fields: &Fields, method: Method) -> Result<Consistency> {
    for flag in ["thresholding", "clip_sample"] {
        fields.must_be(flag, false, false)?;
    }
    let training = NoiseSchedule::read(fields, Betas::STABLE, Rescaling::ToZero)?;
    let original_inference_steps = fields.integer("original_inference_steps", 50, 1..=100_000)?;
    let (original_inference_steps, most) = (original_inference_steps as usize, training.len());
    if original_inference_steps > most {
        return Err(fields.refuse(format!(
            "original_inference_steps is {original_inference_steps}, more than the {most} of \
             num_train_timesteps"
        )));
    }
    Ok(Consistency {
        prediction: Prediction::read(fields)?,
        original_inference_steps,
        training,
        method,
    })
}

impl Compile for Consistency {
    fn compile(&self, run: &Run) -> Result<Plan> {
        let visited = run.rest(self.visit(run.steps)?)?;
        let step = |(index, timestep): (usize, &i64)| self.step(*timestep, visited.get(index + 1));
        let steps = visited.iter().enumerate().map(step).collect::<Result<_>>()?;
        Plan::new(run.start(1.0, self.training.noised(visited[0])?), steps)
    }
}

impl Consistency {
    /// From noisy to clean.
    fn visit(&self, steps: usize) -> Result<Vec<i64>> {
        let most = self.original_inference_steps;
        if steps > most {
            return Err(Error::usage(format!(
                "--steps {steps}: this scheduler takes 1 to {most}, the original_inference_steps \
                 of its configuration"
            )));
        }
        let stride = self.training.len() / most;
        let ratio = most as f64 / steps as f64;
        let places = (0..steps).map(|index| most - (index as f64 * ratio) as usize);
        Ok(places.map(|place| (place * stride) as i64 - 1).collect())
    }

    fn step(&self, timestep: i64, next: Option<&i64>) -> Result<Step> {
        let alpha_cumprod = self.training.alpha_cumprod(timestep)?;
        let (alpha, sigma) = (alpha_cumprod.sqrt(), (1.0 - alpha_cumprod).sqrt());
        let original = self.prediction.original(alpha, sigma);
        let noised = next.map_or(Ok(Blend::IMAGE), |next| self.training.noised(*next))?;
        let sample = match self.method {
            Method::Lcm { timestep_scaling } => {
                let scaled = timestep as f64 * timestep_scaling;
                let variance = scaled * scaled + SIGMA_DATA * SIGMA_DATA;
                let denoised = Combination::default()
                    .plus_all(scaled / variance.sqrt(), &original)
                    .plus(Source::Sample, SIGMA_DATA * SIGMA_DATA / variance);
                let next = Combination::default().plus_all(noised.original, &denoised);
                next.plus(Source::Noise, noised.noise)
            }
            Method::Tcd => {
                // The last step leaves the noise of timestep 0.
                let to = self.training.noised(next.copied().unwrap_or(0))?;
                let noise = self.prediction.noise(alpha, sigma);
                let next = Combination::default().plus_all(to.original, &original);
                next.plus_all(to.noise, &noise)
            }
        };
        let timestep = timestep as f64;
        Ok(Step { timestep, input_scale: 1.0, stores: Vec::new(), sample, original, noised })
    }
}
