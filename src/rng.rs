//! torch's CPU random numbers: what `torch.Generator("cpu").manual_seed(seed)` and
//! `torch.randn(shape, dtype=torch.float32)` give. Separate because noise is an op that every
//! device runs on its host, and the same seed must give the same bits on every platform: nothing
//! here calls a platform's libm, only `+ - * / sqrt` and integer arithmetic, which are exact.
//!
//! Uniforms are torch's bit for bit (mt19937 seeded with the low 32 bits of the seed); normals lie
//! within 4e-6 of torch's, whose own SIMD paths differ among themselves by 2e-6.
//! Sources: ATen/core/MT19937RNGEngine.h, ATen/native/cpu/DistributionTemplates.h (`normal_fill`),
//! ATen/core/DistributionsHelper.h (`normal_distribution`).

use crate::{Error, Result};

/// The most normals that one [`randn`] draws: a latent of 16384×16384 pixels has a quarter of it.
pub const COUNT_MAX: usize = 1 << 26;

/// The furthest engine position that [`randn`] reaches, some seconds of skipping.
pub const POSITION_MAX: u64 = 1 << 32;

const STATE_LEN: usize = 624;
const STATE_MIDDLE: usize = 397;

/// torch's CPU generator after `manual_seed`.
#[derive(Clone)]
pub struct Generator {
    state: [u32; STATE_LEN],
    /// Index of the next word of `state`; `STATE_LEN` when the state must be twisted first.
    next: usize,
    position: u64,
    /// The second value of the last Box-Muller pair of a draw of fewer than 16.
    cached_normal: Option<f64>,
}

impl Generator {
    /// `manual_seed(seed)`. torch uses the low 32 bits only: 5 and 2^32 + 5 are the same generator.
    pub fn new(seed: u64) -> Self {
        let mut state = [(seed & 0xffff_ffff) as u32; STATE_LEN];
        for index in 1..STATE_LEN {
            let before = state[index - 1];
            state[index] =
                1_812_433_253_u32.wrapping_mul(before ^ (before >> 30)).wrapping_add(index as u32);
        }
        Self { state, next: STATE_LEN, position: 0, cached_normal: None }
    }

    /// How many 32-bit outputs of the engine have been consumed since the seed.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// `torch.randn(count)` in f32, with all that torch does: 16 and more are filled in chunks of
    /// 16, fewer are drawn in f64 pairs whose odd one waits for the next such draw.
    pub fn randn(&mut self, count: usize) -> Vec<f32> {
        if count < CHUNK {
            return (0..count).map(|_| self.normal_f64() as f32).collect();
        }
        let mut values: Vec<f32> = (0..count).map(|_| self.uniform_f32()).collect();
        let (chunks, rest) = values.as_chunks_mut::<CHUNK>();
        chunks.iter_mut().for_each(box_muller);
        if !rest.is_empty() {
            // torch draws the last 16 anew, over values that were normals already.
            let mut last = [0.0; CHUNK];
            last.fill_with(|| self.uniform_f32());
            box_muller(&mut last);
            values[count - CHUNK..].copy_from_slice(&last);
        }
        values
    }

    /// Steps over `outputs` 32-bit outputs, as if they had been drawn.
    pub fn skip(&mut self, outputs: u64) {
        self.position += outputs;
        let mut left = outputs;
        while left > 0 {
            if self.next == STATE_LEN {
                self.twist();
            }
            let taken = left.min((STATE_LEN - self.next) as u64);
            self.next += taken as usize;
            left -= taken;
        }
    }

    fn output(&mut self) -> u32 {
        if self.next == STATE_LEN {
            self.twist();
        }
        let mut word = self.state[self.next];
        self.next += 1;
        self.position += 1;
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c_5680;
        word ^= (word << 15) & 0xefc6_0000;
        word ^ (word >> 18)
    }

    fn twist(&mut self) {
        let state = &mut self.state;
        let twisted = |here: u32, after: u32| {
            let odd = if after & 1 == 1 { 0x9908_b0df } else { 0 };
            (((here & 0x8000_0000) | (after & 0x7fff_ffff)) >> 1) ^ odd
        };
        const TURN: usize = STATE_LEN - STATE_MIDDLE;
        for index in 0..TURN {
            state[index] = state[index + STATE_MIDDLE] ^ twisted(state[index], state[index + 1]);
        }
        for index in TURN..STATE_LEN - 1 {
            state[index] = state[index - TURN] ^ twisted(state[index], state[index + 1]);
        }
        state[STATE_LEN - 1] =
            state[STATE_LEN - 1 - TURN] ^ twisted(state[STATE_LEN - 1], state[0]);
        self.next = 0;
    }

    /// In [0, 1), of 24 bits.
    fn uniform_f32(&mut self) -> f32 {
        (self.output() & 0x00ff_ffff) as f32 * (1.0 / 16_777_216.0)
    }

    /// In [0, 1), of 53 bits: the first output is the high word.
    fn uniform_f64(&mut self) -> f64 {
        let high = u64::from(self.output());
        let word = (high << 32) | u64::from(self.output());
        (word & ((1 << 53) - 1)) as f64 * (1.0 / 9_007_199_254_740_992.0)
    }

    /// torch's `normal_distribution<double>`.
    fn normal_f64(&mut self) -> f64 {
        if let Some(cached) = self.cached_normal.take() {
            return cached;
        }
        let angle = std::f64::consts::TAU * self.uniform_f64();
        // log1p(-u) of torch: a uniform of 53 bits makes 1 - u exact.
        let radius = (-2.0 * ln(1.0 - self.uniform_f64())).sqrt();
        let (sin, cos) = sin_cos(angle);
        self.cached_normal = Some(radius * sin);
        radius * cos
    }
}

/// The op: `count` normals of a generator seeded with `seed` that has already given `skip` 32-bit
/// outputs. For 16 and more it continues [`Generator::randn`] exactly; the odd normal that a draw
/// of fewer than 16 leaves behind is not part of a position, so such draws must be even.
///
/// # Errors
/// More than [`COUNT_MAX`] normals or a position beyond [`POSITION_MAX`].
pub fn randn(seed: u64, skip: u64, count: usize) -> Result<Vec<f32>> {
    if count > COUNT_MAX {
        return Err(Error::usage(format!("randn of {count} values: at most {COUNT_MAX} at once")));
    }
    if skip > POSITION_MAX - outputs_consumed(count) {
        return Err(Error::usage(format!(
            "randn of {count} values after {skip} outputs: at most {POSITION_MAX} outputs"
        )));
    }
    let mut generator = Generator::new(seed);
    generator.skip(skip);
    Ok(generator.randn(count))
}

/// How many 32-bit outputs `randn(count)` consumes when no odd normal waits.
pub fn outputs_consumed(count: usize) -> u64 {
    let count = count as u64;
    if count < CHUNK as u64 {
        count.div_ceil(2) * 4
    } else if count.is_multiple_of(CHUNK as u64) {
        count
    } else {
        count.saturating_add(CHUNK as u64)
    }
}

/// torch fills normals in chunks of 16: eight radii, then eight angles.
const CHUNK: usize = 16;

/// Sixteen uniforms to sixteen normals. Every intermediate is rounded to f32 where torch's AVX2
/// path rounds, which is what keeps the angle's error common to both.
fn box_muller(chunk: &mut [f32; CHUNK]) {
    let (radii, angles) = chunk.split_at_mut(CHUNK / 2);
    for (first, second) in radii.iter_mut().zip(angles) {
        let radius = (-2.0 * ln(f64::from(1.0 - *first)) as f32).sqrt();
        let (sin, cos) = sin_cos(f64::from(std::f32::consts::TAU * *second));
        *first = radius * cos as f32;
        *second = radius * sin as f32;
    }
}

/// Natural logarithm of a normal `x` in (0, 1], to 2 ulp: `x = m * 2^e` with m in [√½, √2), and
/// `ln m = 2 artanh(s)`, s = (m - 1) / (m + 1), |s| ≤ 0.172, whose series ends at s^21.
fn ln(x: f64) -> f64 {
    let bits = x.to_bits();
    let mut exponent = (bits >> 52) as i64 - 1023;
    let mut mantissa = f64::from_bits((bits & ((1 << 52) - 1)) | (1023 << 52));
    if mantissa > std::f64::consts::SQRT_2 {
        mantissa *= 0.5;
        exponent += 1;
    }
    let s = (mantissa - 1.0) / (mantissa + 1.0);
    let square = s * s;
    let mut series = 0.0;
    for odd in (1..=21).rev().step_by(2) {
        series = series * square + 1.0 / f64::from(odd);
    }
    exponent as f64 * std::f64::consts::LN_2 + 2.0 * s * series
}

/// Sine and cosine of `x` in [0, 2π], to 1e-15: the nearest multiple of π/2 is taken off in two
/// parts, and Taylor's series on [-π/4, π/4] end at x^17 and x^18.
fn sin_cos(x: f64) -> (f64, f64) {
    // π/2 = HIGH + LOW; HIGH has 33 bits, so that `quarter * HIGH` is exact.
    const HIGH: f64 = 1.570_796_326_734_125_6;
    const LOW: f64 = 6.077_100_506_506_192e-11;
    let quarter = (x * std::f64::consts::FRAC_2_PI + 0.5) as u32;
    let reduced = (x - f64::from(quarter) * HIGH) - f64::from(quarter) * LOW;
    let square = reduced * reduced;
    // 1 - x²/(k(k+1)) (1 - …), from the inside out.
    let (mut sin, mut cos) = (1.0, 1.0);
    for k in (1..=8).rev().map(|half| f64::from(2 * half)) {
        sin = 1.0 - square / (k * (k + 1.0)) * sin;
    }
    for k in (1..=9).rev().map(|half| f64::from(2 * half)) {
        cos = 1.0 - square / (k * (k - 1.0)) * cos;
    }
    let sin = reduced * sin;
    match quarter % 4 {
        0 => (sin, cos),
        1 => (cos, -sin),
        2 => (-sin, -cos),
        _ => (-cos, sin),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn cases() -> Vec<Value> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/noise.json");
        let text = std::fs::read_to_string(path).expect("the fixture of tests/generate_noise.py");
        serde_json::from_str(&text).expect("JSON")
    }

    fn seed(case: &Value) -> u64 {
        case["seed"].as_u64().expect("seed")
    }

    fn list<'a>(case: &'a Value, key: &str) -> &'a Vec<Value> {
        case[key].as_array().expect(key)
    }

    #[test]
    fn uniforms_are_those_of_torch_bit_for_bit() {
        for case in cases() {
            let mut generator = Generator::new(seed(&case));
            for (index, bits) in list(&case, "uniform_bits_24").iter().enumerate() {
                let ours = (generator.uniform_f32() * 16_777_216.0) as u64;
                assert_eq!(Some(ours), bits.as_u64(), "seed {} f32 {index}", seed(&case));
            }
            generator.skip(case["skipped"].as_u64().expect("skipped"));
            for (index, bits) in list(&case, "uniform_bits_53").iter().enumerate() {
                let ours = (generator.uniform_f64() * 9_007_199_254_740_992.0) as u64;
                assert_eq!(Some(ours), bits.as_u64(), "seed {} f64 {index}", seed(&case));
            }
        }
    }

    /// Draws one after the other from one generator, the odd normal kept in between.
    #[test]
    fn normals_are_those_of_torch_in_every_count_and_in_succession() {
        let mut compared = 0;
        for case in cases() {
            let mut generator = Generator::new(seed(&case));
            for draw in list(&case, "draws") {
                let count = draw["count"].as_u64().expect("count") as usize;
                let values: Vec<f64> = generator.randn(count).into_iter().map(f64::from).collect();
                let mut check = |name: &str, ours: f64, theirs: &Value, tolerance: f64| {
                    let error = (ours - theirs.as_f64().expect("number")).abs();
                    compared += 1;
                    assert!(error <= tolerance, "seed {} count {count} {name}", seed(&case));
                };
                for (index, theirs) in list(draw, "first").iter().enumerate() {
                    check("first", values[index], theirs, 4e-6);
                }
                for (index, theirs) in list(draw, "last").iter().rev().enumerate() {
                    check("last", values[count - 1 - index], theirs, 4e-6);
                }
                // Every value weighs in, and so does its place.
                let sums = values.iter().enumerate().fold([0.0; 2], |[sum, placed], (i, v)| {
                    [sum + v, placed + v * ((i % 97) as f64 - 48.0) / 48.0]
                });
                check("sum", sums[0], &draw["sum"], 1e-6 * count as f64);
                check("placed sum", sums[1], &draw["placed_sum"], 1e-6 * count as f64);
            }
        }
        assert!(compared > 1000, "only {compared} values were compared");
    }

    #[test]
    fn the_op_with_a_skip_continues_the_generator() {
        for seed in [0, 7, u64::MAX] {
            let mut generator = Generator::new(seed);
            for count in [16, 4, 17, 31, 14, 1024, 2500, 64] {
                let skip = generator.position();
                let continued = generator.randn(count);
                assert_eq!(generator.position() - skip, outputs_consumed(count), "{count}");
                assert_eq!(randn(seed, skip, count).expect("in range"), continued, "{count}");
            }
        }
    }

    #[test]
    fn a_seed_counts_by_its_low_32_bits() {
        assert_eq!(Generator::new(5).randn(20), Generator::new((9 << 32) + 5).randn(20));
        assert_ne!(Generator::new(5).randn(20), Generator::new(6).randn(20));
    }

    #[test]
    fn a_draw_or_skip_without_bounds_is_refused() {
        for (skip, count) in [(0, COUNT_MAX + 1), (0, usize::MAX), (u64::MAX, 16), (1 << 32, 1)] {
            assert!(randn(1, skip, count).is_err(), "skip {skip}, count {count}");
        }
    }

    #[test]
    fn our_functions_agree_with_the_platforms() {
        for index in 1..=100_000 {
            let x = f64::from(index) / 100_000.0;
            assert!((ln(x) - x.ln()).abs() <= 4e-16 * (1.0 + x.ln().abs()), "ln {x}");
            let (sin, cos) = sin_cos(x * std::f64::consts::TAU);
            let theirs = (x * std::f64::consts::TAU).sin_cos();
            assert!((sin - theirs.0).abs() < 1e-15, "sin {x}: {sin}, {}", theirs.0);
            assert!((cos - theirs.1).abs() < 1e-15, "cos {x}: {cos}, {}", theirs.1);
        }
        for exponent in 1..=53 {
            let x = 0.5_f64.powi(exponent);
            assert!((ln(x) - x.ln()).abs() <= 1e-14, "ln 2^-{exponent}");
        }
    }

    /// Frozen bits: the same on every platform, whatever its libm.
    #[test]
    fn the_bits_never_change() {
        let mut generator = Generator::new(42);
        let mut hash: u32 = 0x811c_9dc5;
        for count in [4, 16, 31, 1000] {
            for value in generator.randn(count) {
                hash = (hash ^ value.to_bits()).wrapping_mul(0x0100_0193);
            }
        }
        assert_eq!(hash, FROZEN_HASH);
    }

    const FROZEN_HASH: u32 = 3_150_746_313;
}
