//! The innermost loop of f32 products for NEON, which every 64-bit ARM processor has. Separate from
//! the other instruction sets because it is compiled for other processors than those.

use std::arch::aarch64::{vdupq_n_f32, vfmaq_n_f32, vld1q_f32, vst1q_f32};

use super::micro::{Args, ROW};

/// Lanes of a vector.
const LANES: usize = 4;

/// The sums take `ROWS · VECTORS` of the 32 registers, at most 24.
///
/// # Safety
/// As [`Unit::kernel`](super::micro::Unit::kernel), with `ROWS` rows and a width of `4 · VECTORS`.
pub unsafe fn neon<const ROWS: usize, const VECTORS: usize, const STRIP: bool>(args: Args<f32>) {
    let Args { depth, a, b, c, c_row, fresh } = args;
    // SAFETY: all addresses are those that the caller promised: `ROWS × VECTORS` vectors of `c`,
    // `depth × VECTORS` of `b`, `depth` elements of `ROWS` rows of `a`; NEON is there.
    unsafe {
        let mut sums = [[vdupq_n_f32(0.0); VECTORS]; ROWS];
        if !fresh {
            for (r, row) in sums.iter_mut().enumerate() {
                for (v, sum) in row.iter_mut().enumerate() {
                    *sum = vld1q_f32(c.add(r * c_row + v * LANES));
                }
            }
        }
        for k in 0..depth {
            let mut x = [0f32; ROWS];
            for (r, x) in x.iter_mut().enumerate() {
                *x = *a.add(if STRIP { k * ROWS + r } else { r * ROW + k });
            }
            for v in 0..VECTORS {
                let column = vld1q_f32(b.add((k * VECTORS + v) * LANES));
                for (row, x) in sums.iter_mut().zip(x) {
                    row[v] = vfmaq_n_f32(row[v], column, x);
                }
            }
        }
        for (r, row) in sums.iter().enumerate() {
            for (v, sum) in row.iter().enumerate() {
                vst1q_f32(c.add(r * c_row + v * LANES), *sum);
            }
        }
    }
}
