//! A plan: what a scheduler does in a whole run, as numbers. Separate because it is the one thing
//! that the schedulers, which write it, and the pipeline, which carries it out, both know.
//!
//! Everything a scheduler does is linear in the sample, the model's output, what earlier steps
//! kept and fresh noise. A step is carried out like this:
//! 1. `output = model(input_scale * sample, timestep)`;
//! 2. if [`Step::draws_noise`], noise of the sample's shape is drawn, in the order of the steps;
//! 3. the values of `stores` and of `sample` are computed, **all of them from what was there
//!    before this step**: the sample, and the slots as earlier steps left them;
//! 4. the stores' slots and the sample take their new values.

use crate::{Error, Result};

/// Every step of a run, in order.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The first sample.
    pub start: Blend,
    /// One per evaluation of the model.
    pub steps: Vec<Step>,
}

/// One evaluation of the model and what follows from it.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// The model's timestep, possibly fractional.
    pub timestep: f64,
    /// The sample's factor on its way into the model (diffusers' `scale_model_input`).
    pub input_scale: f64,
    /// What this step keeps for later ones.
    pub stores: Vec<Store>,
    /// The next sample.
    pub sample: Combination,
    /// What this step takes the finished sample to be, of this step's sample and output alone: for
    /// previews.
    pub original: Combination,
    /// What an image is at the sample's level of noise after this step: where a mask keeps the
    /// image, this takes the sample's place before the next step. The image itself in the end.
    pub noised: Blend,
}

/// A weighted sum of an image's latents and of noise, the same in the whole run: what diffusers'
/// `add_noise` makes of them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Blend {
    /// The weight of the image's latents; without an image it is 0.
    pub original: f64,
    /// The weight of the noise.
    pub noise: f64,
}

impl Blend {
    /// The image as it is.
    pub const IMAGE: Self = Self { original: 1.0, noise: 0.0 };

    /// Noise alone.
    pub fn of_noise(noise: f64) -> Self {
        Self { original: 0.0, noise }
    }
}

/// A slot and its new value.
#[derive(Debug, Clone, PartialEq)]
pub struct Store {
    /// Less than [`Plan::slots`].
    pub slot: usize,
    /// Computed from what was there before the step.
    pub value: Combination,
}

/// A tensor of the sample's shape that a step can use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The sample before the step, not scaled by `input_scale`.
    Sample,
    /// The model's output in this step.
    Output,
    /// What an earlier step stored in this slot.
    Stored(usize),
    /// Fresh normal noise; all of a step's noise is one draw.
    Noise,
}

/// A weighted sum of sources: each occurs once and no weight is zero.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Combination(Vec<(Source, f64)>);

impl Plan {
    /// A plan that can be carried out: stores that nobody reads are left out, and the last step
    /// leaves no noise in an image.
    ///
    /// # Errors
    /// A number that is not finite.
    pub(super) fn new(start: Blend, mut steps: Vec<Step>) -> Result<Self> {
        if let Some(last) = steps.last_mut() {
            last.noised = Blend::IMAGE;
        }
        let mut read_later: Vec<usize> = Vec::new();
        for step in steps.iter_mut().rev() {
            step.stores.retain(|store| read_later.contains(&store.slot));
            // What this step writes is, before it, only needed if the step itself reads it.
            read_later.retain(|slot| step.stores.iter().all(|store| store.slot != *slot));
            read_later.extend(step.combinations().flat_map(Combination::slots));
        }
        debug_assert!(read_later.is_empty(), "slots {read_later:?} are read before a write");
        for (index, step) in steps.iter().enumerate() {
            let blends = [start, step.noised].into_iter();
            let numbers = blends.flat_map(|blend| [blend.original, blend.noise]);
            let numbers = numbers.chain([step.timestep, step.input_scale]);
            let weights = step.combinations().flat_map(|sum| sum.terms().iter().map(|term| term.1));
            if !numbers.chain(weights).all(f64::is_finite) {
                return Err(Error::usage(format!(
                    "step {} of {} (timestep {}) has no finite value with these settings; try \
                     fewer --steps or another --scheduler",
                    index + 1,
                    steps.len(),
                    step.timestep
                )));
            }
        }
        Ok(Self { start, steps })
    }

    /// How many slots the steps use.
    pub fn slots(&self) -> usize {
        let stores = self.steps.iter().flat_map(|step| &step.stores);
        stores.map(|store| store.slot + 1).max().unwrap_or(0)
    }
}

impl Step {
    /// Whether fresh noise must be drawn for this step.
    pub fn draws_noise(&self) -> bool {
        self.combinations().any(|sum| sum.terms().iter().any(|term| term.0 == Source::Noise))
    }

    fn combinations(&self) -> impl Iterator<Item = &Combination> {
        self.stores.iter().map(|store| &store.value).chain([&self.sample])
    }
}

impl Combination {
    /// The summands.
    pub fn terms(&self) -> &[(Source, f64)] {
        &self.0
    }

    /// The source that this sum is, when it is nothing but that: no computation is needed.
    pub fn as_source(&self) -> Option<Source> {
        match self.0.as_slice() {
            [(source, 1.0)] => Some(*source),
            _ => None,
        }
    }

    /// The sum and `weight` times `source`.
    pub(super) fn plus(mut self, source: Source, weight: f64) -> Self {
        match self.0.iter_mut().find(|term| term.0 == source) {
            Some(term) => term.1 += weight,
            None => self.0.push((source, weight)),
        }
        self.0.retain(|term| term.1 != 0.0);
        self
    }

    /// The sum and `weight` times another.
    pub(super) fn plus_all(self, weight: f64, other: &Self) -> Self {
        other.0.iter().fold(self, |sum, (source, own)| sum.plus(*source, weight * own))
    }

    fn slots(&self) -> impl Iterator<Item = usize> {
        self.0.iter().filter_map(|(source, _)| match source {
            Source::Stored(slot) => Some(*slot),
            Source::Sample | Source::Output | Source::Noise => None,
        })
    }
}

/// `source` itself.
impl From<Source> for Combination {
    fn from(source: Source) -> Self {
        Self::default().plus(source, 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(stores: Vec<Store>, sample: Combination) -> Step {
        let (original, noised) = (Combination::default(), Blend::of_noise(1.0));
        Step { timestep: 1.0, input_scale: 1.0, stores, sample, original, noised }
    }

    #[test]
    fn a_store_that_nobody_reads_is_left_out() {
        let store = |slot| vec![Store { slot, value: Source::Output.into() }];
        let reading = Combination::from(Source::Sample).plus(Source::Stored(0), 2.0);
        let steps = vec![
            step(store(0), Source::Output.into()),
            step(store(0), reading.clone()),
            step(store(1), reading.clone()),
            step(store(0), Source::Output.into()),
        ];
        let plan = Plan::new(Blend::of_noise(1.0), steps).expect("finite");
        let kept: Vec<usize> = plan.steps.iter().map(|step| step.stores.len()).collect();
        assert_eq!(kept, [1, 1, 0, 0]);
        assert_eq!(plan.slots(), 1);
        assert_eq!(plan.steps[2].noised, Blend::of_noise(1.0));
        assert_eq!(plan.steps[3].noised, Blend::IMAGE);
    }

    #[test]
    fn a_plan_with_a_number_that_is_not_finite_is_refused() {
        for weight in [f64::NAN, f64::INFINITY] {
            let sample = Combination::from(Source::Sample).plus(Source::Output, weight);
            let finite = step(vec![], Source::Output.into());
            for (start, step) in [(1.0, step(vec![], sample)), (weight, finite)] {
                let error = Plan::new(Blend::of_noise(start), vec![step]).expect_err("not finite");
                assert!(error.to_string().contains("step 1 of 1"), "{error}");
            }
        }
    }

    #[test]
    fn a_sum_names_each_source_once() {
        let sum = Combination::from(Source::Sample).plus(Source::Output, 3.0);
        let sum = sum.clone().plus_all(-1.0, &sum).plus(Source::Noise, 1.0);
        assert_eq!(sum.as_source(), Some(Source::Noise));
    }
}
