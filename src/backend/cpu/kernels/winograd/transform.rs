//! The three transforms of F(4×4, 3×3), vectorised over channels. Separate because they are plain
//! arithmetic: the points of interpolation and what follows from them are here and nowhere else.
//!
//! With the points 0, 1, r, q, −q and ∞ along each side, a tile of 6 × 6 pixels d becomes
//! V = Bᵀ d B, a kernel g becomes U = G g Gᵀ, and 4 × 4 results are Aᵀ (U · V) A, where U · V is
//! summed over channels for each of the 36 places on its own. r = −1/2 and q = 7/4 have half the
//! rounding error of the usual −1 and 2, and are exact in f32. The point 1 must stay: in an image
//! whose pixels are all doubled the transform at r vanishes then.

use super::super::memory::Shared;
use super::super::micro::{ROW, WIDTH};
use super::super::simd::{for_each_isa, prefetch};

/// Channels that are worked on at once.
pub const LANES: usize = 16;
/// Pixels along a side of what a tile sees, and the places of its transform along a side.
pub const SEEN: usize = 6;
/// Pixels along a side of a tile of the result.
pub const MADE: usize = 4;
/// Pixels along a side of what a tile of an image with doubled pixels sees of the small image.
pub const SEEN_DOUBLED: usize = 4;
/// The places along a side that do not vanish in an image with doubled pixels.
pub const PLACES_DOUBLED: [usize; 5] = [0, 1, 3, 4, 5];

const R: f32 = -0.5;
const Q: f32 = 1.75;

type Lanes = [f32; LANES];

/// `a·x + b·y`, each product rounded.
#[inline(always)]
fn mix(a: f32, x: Lanes, b: f32, y: Lanes) -> Lanes {
    let mut sum = x;
    for i in 0..LANES {
        sum[i] = a * x[i] + b * y[i];
    }
    sum
}

/// `x + b·y`
#[inline(always)]
fn plus(x: Lanes, b: f32, y: Lanes) -> Lanes {
    let mut sum = x;
    for i in 0..LANES {
        sum[i] = x[i] + b * y[i];
    }
    sum
}

/// `x + y`
#[inline(always)]
fn add(x: Lanes, y: Lanes) -> Lanes {
    let mut sum = x;
    for i in 0..LANES {
        sum[i] = x[i] + y[i];
    }
    sum
}

#[inline(always)]
fn load(from: &[f32], start: usize) -> Lanes {
    let mut lanes = [0.0; LANES];
    lanes.copy_from_slice(&from[start..start + LANES]);
    lanes
}

/// As [`load`], and asks for what lies `next` elements further: the same of the next tile.
#[inline(always)]
fn load_and_prefetch(from: &[f32], start: usize, next: usize) -> Lanes {
    prefetch::<false, f32>(from.as_ptr().wrapping_add(start).wrapping_add(next));
    load(from, start)
}

/// One side of a transform: `FROM` vectors to `TO`. A trait, because a function that is passed by
/// value would not be compiled for the caller's instruction set.
trait Side<const FROM: usize, const TO: usize> {
    fn side(from: &[Lanes; FROM]) -> [Lanes; TO];
}

/// Bᵀ d: row i holds the coefficients of the product of (x − p) over all points p but the i-th.
struct Input;

impl Side<SEEN, SEEN> for Input {
    #[inline(always)]
    fn side(&[d0, d1, d2, d3, d4, d5]: &[Lanes; SEEN]) -> [Lanes; SEEN] {
        // Times (x² − q²), then (x − r) or (x − 1).
        let (u1, u2) = (plus(d3, -Q * Q, d1), plus(d4, -Q * Q, d2));
        // Times (x − 1)(x − r), then what is left.
        let (v0, v1) = (three(d2, d1, d0), three(d3, d2, d1));
        let (v2, v3) = (three(d4, d3, d2), three(d5, d4, d3));
        [
            plus(v2, -Q * Q, v0),
            plus(u2, -R, u1),
            plus(u2, -1.0, u1),
            plus(v2, Q, v1),
            plus(v2, -Q, v1),
            plus(v3, -Q * Q, v1),
        ]
    }
}

/// The coefficients of (x − 1)(x − r).
#[inline(always)]
fn three(x: Lanes, y: Lanes, z: Lanes) -> Lanes {
    add(x, mix(-1.0 - R, y, R, z))
}

/// [`Input`] of a, b, b, c, c, d without the place that vanishes.
struct InputDoubled;

impl Side<SEEN_DOUBLED, 5> for InputDoubled {
    #[inline(always)]
    fn side(&[a, b, c, d]: &[Lanes; SEEN_DOUBLED]) -> [Lanes; 5] {
        let [v0, v1, _, v3, v4, v5] = Input::side(&[a, b, b, c, c, d]);
        [v0, v1, v3, v4, v5]
    }
}

/// Aᵀ m: row k holds the k-th powers of the points, the last one at ∞ too.
struct Output;

impl Side<SEEN, MADE> for Output {
    #[inline(always)]
    fn side(&[m0, m1, mr, mq, mn, end]: &[Lanes; SEEN]) -> [Lanes; MADE] {
        let (even, odd) = (add(mq, mn), plus(mq, -1.0, mn));
        [
            add(add(m0, m1), add(mr, even)),
            plus(plus(m1, R, mr), Q, odd),
            plus(plus(m1, R * R, mr), Q * Q, even),
            add(plus(plus(m1, R * R * R, mr), Q * Q * Q, odd), end),
        ]
    }
}

/// [`Output`] where the place that vanishes is left out.
struct OutputDoubled;

impl Side<5, MADE> for OutputDoubled {
    #[inline(always)]
    fn side(&[m0, m1, mq, mn, end]: &[Lanes; 5]) -> [Lanes; MADE] {
        let (even, odd) = (add(mq, mn), plus(mq, -1.0, mn));
        [
            add(add(m0, m1), even),
            plus(m1, Q, odd),
            plus(m1, Q * Q, even),
            add(plus(m1, Q * Q * Q, odd), end),
        ]
    }
}

/// Both sides of a transform of squares `FROM` × `FROM` to `TO` × `TO`. `half`, with anything in
/// it, is the caller's, because to fill it each time would take as long as the transform.
#[inline(always)]
fn both_sides<S: Side<FROM, TO>, const FROM: usize, const TO: usize>(
    half: &mut [[Lanes; FROM]; TO],
    read: impl Fn(usize, usize) -> Lanes,
    mut write: impl FnMut(usize, usize, &Lanes),
) {
    for x in 0..FROM {
        let mut column = [[0.0; LANES]; FROM];
        for (y, lanes) in column.iter_mut().enumerate() {
            *lanes = read(y, x);
        }
        for (row, lanes) in half.iter_mut().zip(&S::side(&column)) {
            row[x] = *lanes;
        }
    }
    for (i, row) in half.iter().enumerate() {
        for (j, lanes) in S::side(row).iter().enumerate() {
            write(i, j, lanes);
        }
    }
}

/// Where the transform of one tile goes: a vector of channels in each plane. The next tile's goes
/// a [`ROW`] further.
pub struct Target<'a> {
    to: &'a Shared<'a, f32>,
    at: usize,
    plane: usize,
    len: usize,
}

impl<'a> Target<'a> {
    /// `len` elements from `at` on, and after each `plane` elements again.
    ///
    /// # Safety
    /// While it is in use, no other piece of `to` may overlap those elements.
    pub unsafe fn new(to: &'a Shared<'a, f32>, at: usize, plane: usize, len: usize) -> Self {
        Self { to, at, plane, len }
    }

    #[inline(always)]
    fn write(&mut self, place: usize, channel: usize, lanes: &Lanes) {
        assert!(channel + LANES <= self.len, "beyond the target's channels");
        let start = self.at + place * self.plane + channel;
        self.to.prefetch(start + ROW);
        // SAFETY: among the elements that are this target's own, as its maker promised.
        unsafe { self.to.piece(start, LANES) }.copy_from_slice(lanes);
    }
}

for_each_isa! {
    /// V of one tile, of channels that are whole [`LANES`]; `pixels` in rows of [`SEEN`]. The next
    /// tile's are likely `next` elements further.
    pub fn input(pixels: &[&[f32]], next: usize, target: &mut Target<'_>) {
        let mut half = [[[0.0; LANES]; SEEN]; SEEN];
        for channel in (0..pixels[0].len()).step_by(LANES) {
            both_sides::<Input, SEEN, SEEN>(
                &mut half,
                |y, x| load_and_prefetch(pixels[y * SEEN + x], channel, next),
                |i, j, lanes| target.write(i * SEEN + j, channel, lanes),
            );
        }
    }
}

for_each_isa! {
    /// V of one tile of an image with doubled pixels, without the places that vanish, from the
    /// pixels of the small one in rows of [`SEEN_DOUBLED`].
    pub fn input_doubled(pixels: &[&[f32]], next: usize, target: &mut Target<'_>) {
        let mut half = [[[0.0; LANES]; SEEN_DOUBLED]; 5];
        for channel in (0..pixels[0].len()).step_by(LANES) {
            both_sides::<InputDoubled, SEEN_DOUBLED, 5>(
                &mut half,
                |y, x| load_and_prefetch(pixels[y * SEEN_DOUBLED + x], channel, next),
                |i, j, lanes| target.write(i * 5 + j, channel, lanes),
            );
        }
    }
}

/// The results of one tile, in rows of [`MADE`], for the columns of a panel.
pub type Made = [[f32; WIDTH]; MADE * MADE];

for_each_isa! {
    /// The results of one tile: `planes[place · plane + column]` is U · V, `bias` as wide as the
    /// panel. The next tile's is likely `next` elements further.
    pub fn output(planes: &[f32], plane: usize, next: usize, bias: &[f32], made: &mut Made) {
        let mut half = [[[0.0; LANES]; SEEN]; MADE];
        for column in (0..bias.len()).step_by(LANES) {
            let bias = load(bias, column);
            both_sides::<Output, SEEN, MADE>(
                &mut half,
                |y, x| load_and_prefetch(planes, (y * SEEN + x) * plane + column, next),
                |i, j, lanes| {
                    made[i * MADE + j][column..column + LANES].copy_from_slice(&add(*lanes, bias));
                },
            );
        }
    }
}

for_each_isa! {
    /// As [`output`], of the places that do not vanish.
    pub fn output_doubled(
        planes: &[f32],
        plane: usize,
        next: usize,
        bias: &[f32],
        made: &mut Made,
    ) {
        let mut half = [[[0.0; LANES]; 5]; MADE];
        for column in (0..bias.len()).step_by(LANES) {
            let bias = load(bias, column);
            both_sides::<OutputDoubled, 5, MADE>(
                &mut half,
                |y, x| load_and_prefetch(planes, (y * 5 + x) * plane + column, next),
                |i, j, lanes| {
                    made[i * MADE + j][column..column + LANES].copy_from_slice(&add(*lanes, bias));
                },
            );
        }
    }
}

/// G g, in f64 so that U is rounded once: row i holds 1, p and p² of the i-th point p, divided by
/// the product of p's distances from the others.
#[inline(always)]
fn kernel_side(g: [[f64; LANES]; 3]) -> [[f64; LANES]; SEEN] {
    const POINTS: [f64; 5] = [0.0, 1.0, R as f64, Q as f64, -Q as f64];
    let mut result = [[0.0; LANES]; SEEN];
    for (i, (row, p)) in result.iter_mut().zip(POINTS).enumerate() {
        let others = POINTS.iter().enumerate().filter(|&(j, _)| j != i);
        let scale = 1.0 / others.map(|(_, other)| p - other).product::<f64>();
        for (lane, to) in row.iter_mut().enumerate() {
            *to = (g[0][lane] + p * (g[1][lane] + p * g[2][lane])) * scale;
        }
    }
    result[SEEN - 1] = g[2];
    result
}

for_each_isa! {
    /// U of kernels: from 9 planes that follow each other to 36 which are `plane` elements apart.
    pub fn kernel(taps: &[f32], to: &mut [f32], plane: usize) {
        let len = taps.len() / 9;
        for at in (0..len).step_by(LANES) {
            let mut half = [[[0.0; LANES]; 3]; SEEN];
            for x in 0..3 {
                let mut column = [[0.0; LANES]; 3];
                for (y, wide) in column.iter_mut().enumerate() {
                    for (wide, &tap) in wide.iter_mut().zip(&taps[(y * 3 + x) * len + at..]) {
                        *wide = f64::from(tap);
                    }
                }
                for (row, lanes) in half.iter_mut().zip(kernel_side(column)) {
                    row[x] = lanes;
                }
            }
            for (i, row) in half.into_iter().enumerate() {
                for (j, lanes) in kernel_side(row).into_iter().enumerate() {
                    let to = &mut to[(i * SEEN + j) * plane + at..][..LANES];
                    for (to, lane) in to.iter_mut().zip(lanes) {
                        *to = lane as f32;
                    }
                }
            }
        }
    }
}
