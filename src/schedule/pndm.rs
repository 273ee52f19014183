//! PNDM (Liu et al. 2022): diffusers' `PNDMScheduler`. With `skip_prk_steps`, as Stable Diffusion's
//! configurations have it, it is PLMS; without, three steps by Runge-Kutta come first.

use super::Compile;
use super::config::Fields;
use super::plan::{Combination, Plan, Source, Step, Store};
use super::prediction::Prediction;
use super::spacing::{Spacing, Timesteps, round};
use super::training::NoiseSchedule;
use crate::{Error, Result};

/// Slots 0 to 2 are a ring of the last outputs; this one keeps the sample that a step repeats from.
const FIRST_SAMPLE: usize = 3;
/// What a Runge-Kutta step has of its mean output so far.
const MEAN_OUTPUT: usize = 4;
const RING: usize = 3;

/// The Runge-Kutta steps, diffusers' `pndm_order` less one, and the evaluations of each.
const RUNGE_KUTTA_STEPS: usize = 3;
const EVALUATIONS: [f64; 4] = [1.0 / 6.0, 1.0 / 3.0, 1.0 / 3.0, 1.0 / 6.0];

pub(super) struct Pndm {
    training: NoiseSchedule,
    prediction: Prediction,
    timesteps: Timesteps,
    set_alpha_to_one: bool,
    skip_prk_steps: bool,
}

pub(super) fn read(fields: &Fields) -> Result<Pndm> {
    Ok(Pndm {
        training: NoiseSchedule::read(fields, false)?,
        prediction: Prediction::read_without_sample(fields)?,
        timesteps: Timesteps::read(fields, Spacing::Leading)?,
        set_alpha_to_one: fields.flag("set_alpha_to_one", false)?,
        skip_prk_steps: fields.flag("skip_prk_steps", false)?,
    })
}

impl Compile for Pndm {
    /// More evaluations than `steps`: one with `skip_prk_steps`, else nine.
    fn compile(&self, steps: usize) -> Result<Plan> {
        let train = self.training.len();
        let timesteps = round(self.timesteps.visit(train, steps));
        let visited: Vec<i64> = timesteps.into_iter().map(|timestep| timestep as i64).collect();
        let stride = (train / steps) as i64;
        let planned = if self.skip_prk_steps {
            self.with_a_repeat(&visited, stride)?
        } else {
            self.with_runge_kutta(&visited, stride)?
        };
        Plan::new(1.0, planned)
    }
}

impl Pndm {
    /// The second timestep is visited twice, the second time to improve the first step with the
    /// mean of both outputs.
    fn with_a_repeat(&self, visited: &[i64], stride: i64) -> Result<Vec<Step>> {
        let mut planned = Vec::with_capacity(visited.len() + 1);
        for (earlier, timestep) in visited.iter().copied().enumerate() {
            let mut step = self.multistep(earlier, timestep, stride)?;
            if earlier == 0 {
                step.stores.push(keep_sample());
            }
            planned.push(step);
            // With a single step there is nothing to improve.
            if let (0, Some(second)) = (earlier, visited.get(1)) {
                let mean =
                    Combination::default().plus(Source::Output, 0.5).plus(Source::Stored(0), 0.5);
                let first = Source::Stored(FIRST_SAMPLE);
                let sample = self.transfer(first, &mean, second + stride, *second)?;
                planned.push(self.step(*second, Vec::new(), sample)?);
            }
        }
        Ok(planned)
    }

    /// Three steps by the classic Runge-Kutta method, of four evaluations each, then those that
    /// need three earlier outputs.
    fn with_runge_kutta(&self, visited: &[i64], stride: i64) -> Result<Vec<Step>> {
        if visited.len() <= RUNGE_KUTTA_STEPS {
            return Err(Error::usage(format!(
                "--steps {}: without skip_prk_steps in its configuration it takes at least {}",
                visited.len(),
                RUNGE_KUTTA_STEPS + 1
            )));
        }
        let half = stride / 2;
        let mut planned = Vec::new();
        for (earlier, pair) in visited.windows(2).take(RUNGE_KUTTA_STEPS).enumerate() {
            let (from, to) = (pair[0], pair[1]);
            // Where the model is evaluated, and where the evaluation leads.
            let places = [(from, from - half), (to + half, to + half), (to + half, to), (to, to)];
            for (place, (timestep, to)) in places.into_iter().enumerate() {
                let output = Combination::from(Source::Output);
                let weighted = Combination::default().plus(Source::Output, EVALUATIONS[place]);
                let mean = weighted.clone().plus(Source::Stored(MEAN_OUTPUT), 1.0);
                let first = Source::Stored(FIRST_SAMPLE);
                let store = |value| Store { slot: MEAN_OUTPUT, value };
                planned.push(match place {
                    0 => {
                        let sample = self.transfer(Source::Sample, &output, from, to)?;
                        let stores = vec![keep_output(earlier), keep_sample(), store(weighted)];
                        self.step(timestep, stores, sample)?
                    }
                    1 | 2 => {
                        let sample = self.transfer(first, &output, from, to)?;
                        self.step(timestep, vec![store(mean)], sample)?
                    }
                    _ => {
                        let sample = self.transfer(first, &mean, from, to)?;
                        self.step(timestep, Vec::new(), sample)?
                    }
                });
            }
        }
        for (earlier, timestep) in visited.iter().copied().enumerate().skip(RUNGE_KUTTA_STEPS) {
            planned.push(self.multistep(earlier, timestep, stride)?);
        }
        Ok(planned)
    }

    /// The step of this output and the `earlier` ones.
    fn multistep(&self, earlier: usize, timestep: i64, stride: i64) -> Result<Step> {
        let output = adams_bashforth(earlier);
        let sample = self.transfer(Source::Sample, &output, timestep, timestep - stride)?;
        self.step(timestep, vec![keep_output(earlier)], sample)
    }

    fn step(&self, timestep: i64, stores: Vec<Store>, sample: Combination) -> Result<Step> {
        let alpha = self.training.alpha_cumprod_or_final(timestep, self.set_alpha_to_one)?;
        let original = self.prediction.original(alpha.sqrt(), (1.0 - alpha).sqrt());
        Ok(Step { timestep: timestep as f64, input_scale: 1.0, stores, sample, original })
    }

    /// Formula (9) of the paper: from timestep `from` to `to` along `output`.
    fn transfer(
        &self,
        sample: Source,
        output: &Combination,
        from: i64,
        to: i64,
    ) -> Result<Combination> {
        let alpha = self.training.alpha_cumprod(from)?;
        let next = self.training.alpha_cumprod_or_final(to, self.set_alpha_to_one)?;
        let (beta, beta_next) = (1.0 - alpha, 1.0 - next);
        let noise = match self.prediction {
            Prediction::Epsilon | Prediction::Sample => output.clone(),
            Prediction::Velocity => {
                Combination::default().plus_all(alpha.sqrt(), output).plus(sample, beta.sqrt())
            }
        };
        let denominator = alpha * beta_next.sqrt() + (alpha * beta * next).sqrt();
        Ok(Combination::default()
            .plus(sample, (next / alpha).sqrt())
            .plus_all(-(next - alpha) / denominator, &noise))
    }
}

fn keep_output(earlier: usize) -> Store {
    Store { slot: earlier % RING, value: Source::Output.into() }
}

fn keep_sample() -> Store {
    Store { slot: FIRST_SAMPLE, value: Source::Sample.into() }
}

/// The Adams-Bashforth combination of this output and up to three of the `earlier` ones.
fn adams_bashforth(earlier: usize) -> Combination {
    let weights: &[f64] = match earlier {
        0 => &[1.0],
        1 => &[3.0 / 2.0, -1.0 / 2.0],
        2 => &[23.0 / 12.0, -16.0 / 12.0, 5.0 / 12.0],
        3.. => &[55.0 / 24.0, -59.0 / 24.0, 37.0 / 24.0, -9.0 / 24.0],
    };
    weights.iter().enumerate().fold(Combination::default(), |sum, (back, weight)| {
        let source = match back {
            0 => Source::Output,
            back => Source::Stored((earlier - back) % RING),
        };
        sum.plus(source, *weight)
    })
}
