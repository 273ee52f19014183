//! Convolutions that the CPU does by Winograd's method: as precise as they are said to be, and the
//! same bits whatever is beside a picture.

use candle_core::{DType, Layout};
use tiny_sd::Result;
use tiny_sd::backend::cpu::{Device, Storage};
use tiny_sd::backend::{Backend, Conv2d, Fused, Role, Size2d, View};
use tiny_sd::tensor::Tensor;

use crate::numbers::{LIES, Lie, Random, tensor, values};

type Cpu = Tensor<Storage>;

/// A convolution of 3 × 3 in f64, of an image that may be enlarged.
fn exact(x: &[f32], weight: &[f32], bias: &[f32], dims: [usize; 5], up: usize) -> Vec<f64> {
    let [batch, channels, height, width, out] = dims;
    let (made_h, made_w) = (height * up, width * up);
    let mut made = Vec::with_capacity(batch * out * made_h * made_w);
    for i in 0..batch * out * made_h * made_w {
        let (pixel, n) = (i % (made_h * made_w), i / (made_h * made_w) % out);
        let (picture, y, x0) = (i / (made_h * made_w) / out, pixel / made_w, pixel % made_w);
        let mut sum = f64::from(bias[n]);
        for tap in 0..9 {
            let (y, x0) = (y + tap / 3, x0 + tap % 3);
            if (1..=made_h).contains(&y) && (1..=made_w).contains(&x0) {
                let at = (y - 1) / up * width + (x0 - 1) / up;
                for c in 0..channels {
                    let pixel = x[(picture * channels + c) * height * width + at];
                    sum += f64::from(pixel) * f64::from(weight[(n * channels + c) * 9 + tap]);
                }
            }
        }
        made.push(sum);
    }
    made
}

/// The root of the mean square of the error, relative to that of the values.
fn error(found: &[f32], exact: &[f64]) -> f64 {
    assert_eq!(found.len(), exact.len());
    let squares = found.iter().zip(exact).map(|(x, y)| (f64::from(*x) - y).powi(2));
    (squares.sum::<f64>() / exact.iter().map(|y| y * y).sum::<f64>()).sqrt()
}

fn convolve(x: &Cpu, weight: &Cpu, bias: &Cpu, up: usize) -> Result<Cpu> {
    let [_, _, height, width] = x.dims_exact()?;
    let upsample = (up > 1).then_some(Size2d { height: up * height, width: up * width });
    x.conv2d(
        &weight.prepare(Role::Conv2d { stride: 1 })?,
        Some(bias),
        Conv2d { upsample, ..Conv2d::same(3) },
    )
}

#[test]
fn the_error_is_a_few_units_in_the_last_place_for_any_shape_and_layout() -> Result<()> {
    let device = Device::with_threads(2)?;
    let direct = device.clone().with_low_memory(true);
    for seed in 0..12 {
        let mut random = Random(seed);
        let [channels, out] = [32 + random.below(60), 32 + random.below(40)];
        let [height, width] = [1 + random.below(7), 1 + random.below(7)];
        let (batch, up) = (1 + random.below(3), 1 + random.below(3));
        let shape = [batch, channels, height, width, out];
        for (dtype, most) in [(DType::F32, 3e-6), (DType::BF16, 2e-3), (DType::F16, 3e-4)] {
            let mut make = |dims: &[usize], device| {
                let lie = LIES[random.below(LIES.len())];
                tensor(&mut random, dims, lie, dtype, device)
            };
            let x: Cpu = make(&[batch, channels, height, width], &device)?;
            let (weight, bias) = (make(&[out, channels, 3, 3], &device)?, make(&[out], &device)?);
            let exact = exact(&values(&x)?, &values(&weight)?, &values(&bias)?, shape, up);
            let found = convolve(&x, &weight, &bias, up)?;
            let off = error(&values(&found)?, &exact);
            assert!(off < most, "seed {seed}, {shape:?} times {up} in {dtype:?}: off by {off}");
            let dims = vec![out, channels, 3, 3];
            let small = Tensor::from_slice(&values(&weight)?, dims, &direct)?.to_dtype(dtype)?;
            let direct = error(&values(&convolve(&x, &small, &bias, up)?)?, &exact);
            assert!(direct < most, "seed {seed}, {shape:?} times {up} in {dtype:?}: {direct}");
        }
    }
    Ok(())
}

#[test]
fn neither_neighbours_nor_threads_change_a_bit_where_tiles_fill_several_blocks() -> Result<()> {
    for (up, side) in [(1, 29), (2, 17)] {
        let mut all = Vec::new();
        for threads in [1, 3] {
            let device = Device::with_threads(threads)?;
            let mut random = Random(21);
            let mut make =
                |dims: &[usize], lie| tensor(&mut random, dims, lie, DType::F32, &device);
            let x: Cpu = make(&[3, 400, side, side], Lie::ChannelsLast)?;
            let (weight, bias) =
                (make(&[410, 400, 3, 3], Lie::Contiguous)?, make(&[410], Lie::Contiguous)?);
            let together = values(&convolve(&x, &weight, &bias, up)?)?;
            let mut alone = Vec::new();
            for i in 0..3 {
                alone.extend(values(&convolve(&x.narrow(0, i, 1)?, &weight, &bias, up)?)?);
            }
            assert!(together == alone, "{threads} threads, times {up}");
            all.push(together);
        }
        assert!(all[0] == all[1], "times {up}");
    }
    Ok(())
}

#[test]
fn a_weight_is_transformed_where_that_pays_and_memory_is_not_short() -> Result<()> {
    let check = |dims: [usize; 4], stride, low_memory, expected: usize| -> Result<()> {
        let device = Device::with_threads(1)?.with_low_memory(low_memory);
        let weight: Cpu = Tensor::zeros(dims.to_vec(), DType::F32, &device)?;
        let layout = Layout::contiguous(&dims);
        let view = View { storage: &**weight.storage(), layout: &layout };
        let held = Storage::fused(&Fused::Prepare(Role::Conv2d { stride }), &[view])?.held_bytes();
        assert_eq!(held, Some(expected as u64), "{dims:?} by {stride}, {low_memory}");
        Ok(())
    };
    check([64, 48, 3, 3], 1, false, 4 * 64 * 48 * 36)?;
    check([64, 48, 3, 3], 1, true, 2 * 64 * 48 * 9)?;
    check([64, 48, 3, 3], 2, false, 4 * 64 * 48 * 9)?;
    check([64, 48, 1, 1], 1, false, 4 * 64 * 48)?;
    check([64, 48, 5, 3], 1, false, 4 * 64 * 48 * 15)?;
    check([16, 320, 3, 3], 1, false, 4 * 16 * 320 * 9)?;
    check([320, 4, 3, 3], 1, false, 4 * 320 * 4 * 9)
}

#[test]
fn a_weight_prepared_for_one_stride_is_refused_by_another() -> Result<()> {
    let device = Device::with_threads(1)?;
    let x: Cpu = Tensor::zeros(vec![1, 32, 6, 6], DType::F32, &device)?;
    let weight: Cpu = Tensor::zeros(vec![32, 32, 3, 3], DType::F32, &device)?;
    for (prepared, used) in [(1, 2), (2, 1)] {
        let weight = weight.prepare(Role::Conv2d { stride: prepared })?;
        let op = Conv2d { stride: used, ..Conv2d::same(3) };
        let error = x.conv2d(&weight, None, op).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(&format!("stride: {prepared}")), "{error}");
        assert!(error.contains(&format!("stride: {used}")), "{error}");
    }
    Ok(())
}
