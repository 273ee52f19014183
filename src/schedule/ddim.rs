//! DDIM (Song et al. 2020) with eta 0, as diffusers' `DDIMScheduler`.

use super::config::Fields;
use super::plan::{Blend, Combination, Plan, Step};
use super::prediction::Prediction;
use super::spacing::{Spacing, Timesteps, round};
use super::training::{Betas, NoiseSchedule, Rescaling};
use super::{Compile, Run};
use crate::Result;

pub(super) struct Ddim {
    training: NoiseSchedule,
    prediction: Prediction,
    timesteps: Timesteps,
    set_alpha_to_one: bool,
}

pub(super) fn read(fields: &Fields) -> Result<Ddim> {
    fields.must_be("thresholding", false, false)?;
    // diffusers' own default; Stable Diffusion's configurations set it to false.
    fields.must_be("clip_sample", true, false)?;
    Ok(Ddim {
        training: NoiseSchedule::read(fields, Betas::USUAL, Rescaling::ToZero)?,
        prediction: Prediction::read(fields)?,
        timesteps: Timesteps::read(fields, Spacing::Leading)?,
        set_alpha_to_one: fields.flag("set_alpha_to_one", true)?,
    })
}

impl Compile for Ddim {
    fn compile(&self, run: &Run) -> Result<Plan> {
        let train = self.training.len();
        let stride = (train / run.steps) as i64;
        let timesteps = run.rest(round(self.timesteps.visit(train, run.steps)))?;
        let noised = |index: usize| {
            let visited = timesteps.get(index).map(|timestep| *timestep as i64);
            visited.map_or(Ok(Blend::IMAGE), |visited| self.training.noised(visited))
        };
        let step = |(index, timestep): (usize, &f64)| {
            let (timestep, visited) = (*timestep, *timestep as i64);
            let alpha_cumprod = self.training.alpha_cumprod(visited)?;
            let next =
                self.training.alpha_cumprod_or_final(visited - stride, self.set_alpha_to_one)?;
            let (alpha, sigma) = (alpha_cumprod.sqrt(), (1.0 - alpha_cumprod).sqrt());
            let original = self.prediction.original(alpha, sigma);
            let sample = Combination::default()
                .plus_all(next.sqrt(), &original)
                .plus_all((1.0 - next).sqrt(), &self.prediction.noise(alpha, sigma));
            let noised = noised(index + 1)?;
            Ok(Step { timestep, input_scale: 1.0, stores: Vec::new(), sample, original, noised })
        };
        let steps = timesteps.iter().enumerate().map(step).collect::<Result<_>>()?;
        Plan::new(run.start(1.0, noised(0)?), steps)
    }
}
