//! PNDM (Liu et al. 2022): diffusers' `PNDMScheduler`. With `skip_prk_steps`, as Stable Diffusion's
//! configurations have it, it is PLMS; without, three steps by Runge-Kutta come first.

use super::config::Fields;
use super::plan::{Blend, Combination, Plan, Source, Step, Store};
use super::prediction::Prediction;
use super::spacing::{Spacing, Timesteps, round};
use super::training::{Betas, NoiseSchedule, Rescaling};
use super::{Compile, Run};
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
        training: NoiseSchedule::read(fields, Betas::USUAL, Rescaling::Unknown)?,
        prediction: Prediction::read_without_sample(fields)?,
        timesteps: Timesteps::read(fields, Spacing::Leading)?,
        set_alpha_to_one: fields.flag("set_alpha_to_one", false)?,
        skip_prk_steps: fields.flag("skip_prk_steps", false)?,
    })
}

impl Compile for Pndm {
    /// More evaluations than `steps`: one with `skip_prk_steps`, else nine.
    fn compile(&self, run: &Run) -> Result<Plan> {
        let train = self.training.len();
        let visited = round(self.timesteps.visit(train, run.steps));
        let visited: Vec<i64> = visited.into_iter().map(|timestep| timestep as i64).collect();
        let stride = (train / run.steps) as i64;
        let runge_kutta = match self.skip_prk_steps {
            true => Vec::new(),
            false => runge_kutta(&visited, stride / 2)?,
        };
        let evaluated = match visited.as_slice() {
            // The second timestep is visited twice, the second time to improve the first step.
            [first, second, rest @ ..] if self.skip_prk_steps => {
                [&[*first, *second, *second], rest].concat()
            }
            _ if self.skip_prk_steps => visited,
            _ => [&runge_kutta, &visited[RUNGE_KUTTA_STEPS..]].concat(),
        };
        // A run that begins later counts from there: diffusers knows no other place in the list.
        let evaluated = run.rest(evaluated)?;
        let mut planned = Vec::with_capacity(evaluated.len());
        let mut kept = 0;
        for (count, timestep) in evaluated.iter().copied().enumerate() {
            let mut step = match runge_kutta.get(count / 4 * 4) {
                Some(from) if count < runge_kutta.len() => {
                    self.runge_kutta_step(count, *from, timestep, stride / 2, kept)?
                }
                Some(_) | None => self.multistep(count, timestep, stride, kept)?,
            };
            kept += step.stores.iter().filter(|store| store.slot < RING).count();
            if let Some(next) = evaluated.get(count + 1) {
                step.noised = self.training.noised(*next)?;
            }
            planned.push(step);
        }
        Plan::new(run.start(1.0, self.training.noised(evaluated[0])?), planned)
    }
}

/// The timesteps of three steps by the classic Runge-Kutta method, of four evaluations each.
fn runge_kutta(visited: &[i64], half: i64) -> Result<Vec<i64>> {
    if visited.len() <= RUNGE_KUTTA_STEPS {
        return Err(Error::usage(format!(
            "--steps {}: without skip_prk_steps in its configuration it takes at least {}",
            visited.len(),
            RUNGE_KUTTA_STEPS + 1
        )));
    }
    let pairs = visited.windows(2).take(RUNGE_KUTTA_STEPS);
    Ok(pairs.flat_map(|pair| [pair[0], pair[1] + half, pair[1] + half, pair[1]]).collect())
}

impl Pndm {
    /// Evaluation `count` of a Runge-Kutta step from timestep `from`.
    fn runge_kutta_step(
        &self,
        count: usize,
        from: i64,
        timestep: i64,
        half: i64,
        kept: usize,
    ) -> Result<Step> {
        let place = count % EVALUATIONS.len();
        let to = if place.is_multiple_of(2) { timestep - half } else { timestep };
        let output = Combination::from(Source::Output);
        let weighted = Combination::default().plus(Source::Output, EVALUATIONS[place]);
        let mean = weighted.clone().plus(Source::Stored(MEAN_OUTPUT), 1.0);
        let first = Source::Stored(FIRST_SAMPLE);
        let store = |value| Store { slot: MEAN_OUTPUT, value };
        match place {
            0 => {
                let sample = self.transfer(Source::Sample, &output, from, to)?;
                let stores = vec![keep_output(kept), keep_sample(), store(weighted)];
                self.step(timestep, stores, sample)
            }
            1 | 2 => {
                let sample = self.transfer(first, &output, from, to)?;
                self.step(timestep, vec![store(mean)], sample)
            }
            _ => {
                let sample = self.transfer(first, &mean, from, to)?;
                self.step(timestep, Vec::new(), sample)
            }
        }
    }

    /// Evaluation `count` of the multistep method, of this output and the `kept` ones before it.
    fn multistep(&self, count: usize, timestep: i64, stride: i64, kept: usize) -> Result<Step> {
        if count == 1 {
            let mean =
                Combination::default().plus(Source::Output, 0.5).plus(Source::Stored(0), 0.5);
            let first = Source::Stored(FIRST_SAMPLE);
            let sample = self.transfer(first, &mean, timestep + stride, timestep)?;
            return self.step(timestep, Vec::new(), sample);
        }
        let output = adams_bashforth(kept);
        let sample = self.transfer(Source::Sample, &output, timestep, timestep - stride)?;
        let mut stores = vec![keep_output(kept)];
        if count == 0 {
            stores.push(keep_sample());
        }
        self.step(timestep, stores, sample)
    }

    fn step(&self, timestep: i64, stores: Vec<Store>, sample: Combination) -> Result<Step> {
        let alpha = self.training.alpha_cumprod_or_final(timestep, self.set_alpha_to_one)?;
        let original = self.prediction.original(alpha.sqrt(), (1.0 - alpha).sqrt());
        let (timestep, noised) = (timestep as f64, Blend::IMAGE);
        Ok(Step { timestep, input_scale: 1.0, stores, sample, original, noised })
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
