//! Softmax over keys that come block after block, a lane for each query. Separate from the products
//! around it because here is where f32 and bf16 differ.

use super::micro::{Unit, WIDTH};
use super::pair::Pair;
use super::simd::{exp2_coarse, exp2_fine, for_each_isa, multiply_add};

/// One number for each query of a panel.
pub type Lanes = [f32; WIDTH];

/// Of each query of a panel: the largest score so far, scaled, and the sum of weights relative to
/// it.
pub type Running = [Lanes; 2];

/// Before the first key.
pub const START: Running = [[f32::MIN; WIDTH], [0.0; WIDTH]];

/// No query sees a key after it.
#[derive(Debug, Clone, Copy)]
pub struct Causal {
    /// The first key of a block.
    pub key: usize,
    /// The first query of a panel.
    pub query: usize,
}

/// A unit of which softmax gives the weights of values.
pub trait Weight: Unit {
    /// Turns scores of a panel, relative to the running maximum, into weights: the scores
    /// themselves, or in `buffer`.
    fn soften<'a>(
        scores: &'a mut [Lanes],
        running: &mut Running,
        scale: f32,
        causal: Option<Causal>,
        buffer: &'a mut [Self],
    ) -> &'a [Self];
}

impl Weight for f32 {
    fn soften<'a>(
        scores: &'a mut [Lanes],
        running: &mut Running,
        scale: f32,
        causal: Option<Causal>,
        _: &'a mut [f32],
    ) -> &'a [f32] {
        soften_fine(scores, running, scale, causal);
        scores.as_flattened()
    }
}

impl Weight for Pair {
    fn soften<'a>(
        scores: &'a mut [Lanes],
        running: &mut Running,
        scale: f32,
        causal: Option<Causal>,
        buffer: &'a mut [Pair],
    ) -> &'a [Pair] {
        soften_coarse(scores, running, scale, causal, buffer.as_chunks_mut().0);
        buffer
    }
}

/// Which of a panel's queries see a key.
trait Sight: Copy {
    /// For the `row`-th key of a block: how many of the first lanes do not see it.
    fn hidden(self, row: usize) -> u32;
}

/// All see all, which costs nothing.
#[derive(Clone, Copy)]
struct Open;

impl Sight for Open {
    #[inline(always)]
    fn hidden(self, _: usize) -> u32 {
        0
    }
}

impl Sight for Causal {
    #[inline(always)]
    fn hidden(self, row: usize) -> u32 {
        (self.key + row).saturating_sub(self.query).min(WIDTH) as u32
    }
}

for_each_isa! {
    /// Takes new maxima, and brings what was summed so far to them.
    pub fn advance(
        scores: &[Lanes],
        sums: &mut [Lanes],
        running: &mut Running,
        scale: f32,
        causal: Option<Causal>,
    ) {
        let largest = match causal {
            None => largest(scores, Open),
            Some(causal) => largest(scores, causal),
        };
        let [max, total] = running;
        let mut factors = [1f32; WIDTH];
        for (max, (largest, factor)) in max.iter_mut().zip(largest.iter().zip(&mut factors)) {
            let (before, now) = (*max, largest * scale);
            if now > before {
                (*max, *factor) = (now, exp2_fine::<FUSED>(before - now));
            }
        }
        if factors == [1.0; WIDTH] {
            return;
        }
        for sums in sums.iter_mut().chain([total]) {
            for (sum, factor) in sums.iter_mut().zip(&factors) {
                *sum *= factor;
            }
        }
    }
}

#[inline(always)]
fn largest(scores: &[Lanes], sight: impl Sight) -> Lanes {
    let mut largest = [f32::MIN; WIDTH];
    for (row, scores) in scores.iter().enumerate() {
        let hidden = sight.hidden(row);
        for lane in 0..WIDTH {
            let is_larger = scores[lane] > largest[lane] && lane as u32 >= hidden;
            largest[lane] = if is_larger { scores[lane] } else { largest[lane] };
        }
    }
    largest
}

for_each_isa! {
    /// Turns scores into weights, and adds them up.
    pub fn soften_fine(
        scores: &mut [Lanes],
        running: &mut Running,
        scale: f32,
        causal: Option<Causal>,
    ) {
        match causal {
            None => fine::<FUSED>(scores, running, scale, Open),
            Some(causal) => fine::<FUSED>(scores, running, scale, causal),
        }
    }
}

#[inline(always)]
fn fine<const FUSED: bool>(
    scores: &mut [Lanes],
    running: &mut Running,
    scale: f32,
    sight: impl Sight,
) {
    let [max, mut total] = *running;
    for (row, scores) in scores.iter_mut().enumerate() {
        let hidden = sight.hidden(row);
        for lane in 0..WIDTH {
            let power = multiply_add::<FUSED>(scores[lane], scale, -max[lane]);
            let weight = exp2_fine::<FUSED>(power);
            let weight = if (lane as u32) < hidden { 0.0 } else { weight };
            scores[lane] = weight;
            total[lane] += weight;
        }
    }
    running[1] = total;
}

for_each_isa! {
    /// Turns scores into weights in bf16, and adds them up.
    pub fn soften_coarse(
        scores: &[Lanes],
        running: &mut Running,
        scale: f32,
        causal: Option<Causal>,
        weights: &mut [[Pair; WIDTH]],
    ) {
        match causal {
            None => coarse::<FUSED>(scores, running, scale, Open, weights),
            Some(causal) => coarse::<FUSED>(scores, running, scale, causal, weights),
        }
    }
}

#[inline(always)]
fn coarse<const FUSED: bool>(
    scores: &[Lanes],
    running: &mut Running,
    scale: f32,
    sight: impl Sight,
    weights: &mut [[Pair; WIDTH]],
) {
    let [max, mut total] = *running;
    let (pairs, last) = scores.as_chunks::<2>();
    let weigh = |lane: usize, score: f32, hidden: u32| {
        let power = multiply_add::<FUSED>(score, scale, -max[lane]);
        if (lane as u32) < hidden { 0.0 } else { exp2_coarse::<FUSED>(power) }
    };
    // To the nearest, halves up: nothing here is negative.
    let round = |weight: f32| weight.to_bits().wrapping_add(0x8000);
    for (i, ([first, second], weights)) in pairs.iter().zip(weights.iter_mut()).enumerate() {
        let (hidden, hidden_second) = (sight.hidden(2 * i), sight.hidden(2 * i + 1));
        for lane in 0..WIDTH {
            let low = weigh(lane, first[lane], hidden);
            let high = weigh(lane, second[lane], hidden_second);
            total[lane] += low + high;
            weights[lane] = Pair::from_bits(round(low) >> 16 | round(high) & 0xffff_0000);
        }
    }
    if let ([first], Some(weights)) = (last, weights.get_mut(pairs.len())) {
        let hidden = sight.hidden(2 * pairs.len());
        for lane in 0..WIDTH {
            let low = weigh(lane, first[lane], hidden);
            total[lane] += low;
            weights[lane] = Pair::from_bits(round(low) >> 16);
        }
    }
    running[1] = total;
}
