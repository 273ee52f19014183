//! What the model predicts, as linear combinations of the sample and the model's output. Separate
//! because every scheduler asks it for the same two things.

use super::config::Fields;
use super::plan::{Combination, Source};
use crate::Result;

/// `prediction_type` of a scheduler's configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Prediction {
    /// The noise in the sample.
    Epsilon,
    /// `alpha * noise - sigma * original` (Salimans and Ho 2022).
    Velocity,
    /// The original sample.
    Sample,
}

impl Prediction {
    /// Reads `prediction_type`, default `epsilon` in every class.
    pub(super) fn read(fields: &Fields) -> Result<Self> {
        use Prediction::{Epsilon, Sample, Velocity};
        let known = [("epsilon", Epsilon), ("v_prediction", Velocity), ("sample", Sample)];
        fields.choice("prediction_type", Epsilon, &known)
    }

    /// As [`Self::read`] for the classes that have no formula for `sample`.
    pub(super) fn read_without_sample(fields: &Fields) -> Result<Self> {
        use Prediction::{Epsilon, Velocity};
        fields.choice(
            "prediction_type",
            Epsilon,
            &[("epsilon", Epsilon), ("v_prediction", Velocity)],
        )
    }

    /// The original sample that the output stands for, where
    /// `sample = alpha * original + sigma * noise` with `alpha² + sigma² = 1`.
    pub(super) fn original(self, alpha: f64, sigma: f64) -> Combination {
        let sum = Combination::default();
        match self {
            Self::Epsilon => {
                sum.plus(Source::Sample, 1.0 / alpha).plus(Source::Output, -sigma / alpha)
            }
            Self::Velocity => sum.plus(Source::Sample, alpha).plus(Source::Output, -sigma),
            Self::Sample => Source::Output.into(),
        }
    }

    /// The noise that the output stands for.
    pub(super) fn noise(self, alpha: f64, sigma: f64) -> Combination {
        let sum = Combination::default();
        match self {
            Self::Epsilon => Source::Output.into(),
            Self::Velocity => sum.plus(Source::Sample, sigma).plus(Source::Output, alpha),
            Self::Sample => {
                sum.plus(Source::Sample, 1.0 / sigma).plus(Source::Output, -alpha / sigma)
            }
        }
    }
}
