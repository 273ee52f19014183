//! The CPU's kernels on tiny-sd's shapes, beside candle's own op for the same shape:
//! `cargo bench --bench kernels [-- conv2d]`.

use std::hint::black_box;
use std::time::Duration;

use candle_core::{D, DType, Device as CandleDevice, Tensor as Candle};
use criterion::{Criterion, criterion_group, criterion_main};
use tiny_sd::Result;
use tiny_sd::backend::cpu::{Device, Storage};
use tiny_sd::backend::{Activation, Attention, Conv2d, GroupNorm, HostTensor, Role, Size2d};
use tiny_sd::tensor::Tensor;

type Cpu = Tensor<Storage>;

/// The same numbers here and there.
fn pair(dims: &[usize], device: &Device) -> Result<(Cpu, Candle)> {
    let value = |i: usize| ((i * 7919 + 13) % 2003) as f32 / 2003.0 - 0.5;
    let values: Vec<f32> = (0..dims.iter().product()).map(value).collect();
    let ours = Tensor::from_slice(&values, dims, device)?;
    Ok((ours, Candle::from_vec(values, dims, &CandleDevice::Cpu)?))
}

/// Both in bf16, for kernels that multiply or read it as it is.
fn halves((ours, candle): &(Cpu, Candle)) -> Result<(Cpu, Candle)> {
    Ok((ours.to_dtype(DType::BF16)?, candle.to_dtype(DType::BF16)?))
}

/// An image as it lies in memory between ops.
fn image(x: &Cpu) -> Result<Cpu> {
    x.permute(&[0, 2, 3, 1])?.contiguous()?.permute(&[0, 3, 1, 2])
}

fn side_by_side<T, U>(
    criterion: &mut Criterion,
    name: &str,
    mut ours: impl FnMut() -> Result<T>,
    mut candle: impl FnMut() -> candle_core::Result<U>,
) {
    let mut group = criterion.benchmark_group(name);
    group.sample_size(10).warm_up_time(Duration::from_millis(300));
    group.measurement_time(Duration::from_millis(1000));
    group.bench_function("ours", |bencher| bencher.iter(|| black_box(ours()).is_ok()));
    group.bench_function("candle", |bencher| bencher.iter(|| black_box(candle()).is_ok()));
    group.finish();
}

/// A row for bf16, in which candle's ops take minutes.
fn alone<T>(criterion: &mut Criterion, name: &str, mut ours: impl FnMut() -> Result<T>) {
    let mut group = criterion.benchmark_group(name);
    group.sample_size(10).warm_up_time(Duration::from_millis(300));
    group.measurement_time(Duration::from_millis(1000));
    group.bench_function("ours in bf16", |bencher| bencher.iter(|| black_box(ours()).is_ok()));
    group.finish();
}

fn conv2d(criterion: &mut Criterion, device: &Device) -> Result<()> {
    let shapes = [
        // batch, channels, out, side, kernel, stride
        [2, 320, 320, 64, 3, 1],
        [2, 960, 320, 64, 1, 1],
        [2, 320, 320, 64, 3, 2],
        [1, 4, 320, 64, 3, 1],
        [1, 512, 512, 64, 3, 1],
        [1, 128, 3, 512, 3, 1],
    ];
    for [batch, channels, out, side, kernel, stride] in shapes {
        let (x, candle) = pair(&[batch, channels, side, side], device)?;
        let (weight, candle_weight) = pair(&[out, channels, kernel, kernel], device)?;
        let (x, weight) = (image(&x)?, weight.prepare(Role::Conv2d { stride })?);
        let op = Conv2d { stride, ..Conv2d::same(kernel) };
        let name = format!("conv2d {batch}x{channels}x{side}x{side} to {out} by {kernel}/{stride}");
        side_by_side(
            criterion,
            &name,
            || x.conv2d(&weight, None, op),
            || candle.conv2d(&candle_weight, kernel / 2, stride, 1, 1),
        );
    }
    Ok(())
}

/// The convolutions of UNet and VAE that move by one, by Winograd's method and directly
/// (`--low-memory`); an enlarged image counts with the size that it is enlarged to.
fn conv2d_forms(criterion: &mut Criterion, device: &Device) -> Result<()> {
    let direct = device.clone().with_low_memory(true);
    let shapes = [
        // batch, channels, out, side, enlarged
        [2, 320, 320, 64, 1],
        [2, 960, 320, 64, 1],
        [2, 640, 640, 32, 1],
        [2, 1920, 640, 32, 1],
        [2, 1280, 1280, 16, 1],
        [2, 2560, 1280, 16, 1],
        [2, 1280, 1280, 16, 2],
        [2, 640, 640, 32, 2],
        [1, 512, 512, 64, 1],
        [1, 512, 512, 64, 2],
        [1, 512, 512, 128, 2],
        [1, 256, 256, 256, 1],
        [1, 256, 256, 256, 2],
        [1, 128, 128, 512, 1],
    ];
    for [batch, channels, out, side, enlarged] in shapes {
        let made = side * enlarged;
        let (x, _) = pair(&[batch, channels, side, side], device)?;
        let (x, role) = (image(&x)?, Role::Conv2d { stride: 1 });
        let weight = pair(&[out, channels, 3, 3], device)?.0.prepare(role)?;
        let plain = pair(&[out, channels, 3, 3], &direct)?.0.prepare(role)?;
        let upsample = (enlarged > 1).then_some(Size2d { height: made, width: made });
        let op = Conv2d { upsample, ..Conv2d::same(3) };
        let mut group =
            criterion.benchmark_group(format!("conv2d {batch}x{channels}x{made}x{made} to {out}"));
        group.sample_size(10).warm_up_time(Duration::from_millis(300));
        group.measurement_time(Duration::from_millis(1000));
        // What the direct kernel multiplies and adds, whatever the form.
        let flops = 2 * batch * channels * out * 9 * made * made;
        group.throughput(criterion::Throughput::Elements(flops as u64));
        for (name, weight) in [("winograd", &weight), ("direct", &plain)] {
            group.bench_function(name, |bencher| {
                bencher.iter(|| black_box(x.conv2d(weight, None, op)).is_ok());
            });
        }
        group.finish();
    }
    Ok(())
}

fn attention(criterion: &mut Criterion, device: &Device) -> Result<()> {
    let shapes = [
        // batch, queries, keys, heads, head_dim
        [2, 4096, 4096, 8, 40],
        [2, 1024, 1024, 8, 80],
        [2, 256, 256, 8, 160],
        [2, 4096, 77, 8, 40],
        [1, 4096, 4096, 1, 512],
    ];
    for [batch, queries, keys, heads, head_dim] in shapes {
        let inner = heads * head_dim;
        let (query, key) =
            (pair(&[batch, queries, inner], device)?, pair(&[batch, keys, inner], device)?);
        let ((query_bf16, _), (key_bf16, _)) = (halves(&query)?, halves(&key)?);
        let ((query, candle_query), (key, candle_key)) = (query, key);
        let scale = 1.0 / (head_dim as f64).sqrt();
        let op = Attention { heads, scale, causal: false };
        let split = |x: &Candle, len| {
            x.reshape((batch, len, heads, head_dim))?.transpose(1, 2)?.contiguous()
        };
        let name = format!("attention {batch}x{heads}x{queries}x{keys} of {head_dim}");
        side_by_side(
            criterion,
            &name,
            || query.attention(&key, &key, op),
            || {
                let (query, key) = (split(&candle_query, queries)?, split(&candle_key, keys)?);
                let scores = (query.matmul(&key.transpose(2, 3)?)? * scale)?;
                let heads = candle_nn::ops::softmax_last_dim(&scores)?.matmul(&key)?;
                heads.transpose(1, 2)?.reshape((batch, queries, inner))
            },
        );
        alone(criterion, &name, || query_bf16.attention(&key_bf16, &key_bf16, op));
    }
    Ok(())
}

fn norms(criterion: &mut Criterion, device: &Device) -> Result<()> {
    for [batch, channels, side] in [[2, 320, 64], [2, 1280, 16], [1, 128, 512]] {
        let (x, candle) = pair(&[batch, channels, side, side], device)?;
        let (weight, x) = (pair(&[channels], device)?, image(&x)?);
        let ((weight_bf16, _), x_bf16) = (halves(&weight)?, x.to_dtype(DType::BF16)?);
        let (weight, candle_weight) = weight;
        let op = GroupNorm { groups: 32, eps: 1e-6, silu: true };
        let norm =
            candle_nn::GroupNorm::new(candle_weight.clone(), candle_weight, channels, 32, 1e-6)?;
        let name = format!("group_norm and silu {batch}x{channels}x{side}x{side}");
        side_by_side(
            criterion,
            &name,
            || x.group_norm(&weight, &weight, op),
            || candle_nn::Module::forward(&norm, &candle)?.silu(),
        );
        alone(criterion, &name, || x_bf16.group_norm(&weight_bf16, &weight_bf16, op));
    }
    let (x, weight) = (pair(&[2, 4096, 320], device)?, pair(&[320], device)?);
    let ((x_bf16, _), (weight_bf16, _)) = (halves(&x)?, halves(&weight)?);
    let ((x, candle), (weight, candle_weight)) = (x, weight);
    side_by_side(
        criterion,
        "layer_norm 2x4096x320",
        || x.layer_norm(&weight, &weight, 1e-5),
        || candle_nn::ops::layer_norm(&candle, &candle_weight, &candle_weight, 1e-5),
    );
    alone(criterion, "layer_norm 2x4096x320", || {
        x_bf16.layer_norm(&weight_bf16, &weight_bf16, 1e-5)
    });
    Ok(())
}

fn linear(criterion: &mut Criterion, device: &Device) -> Result<()> {
    let shapes = [
        [8192, 320, 2560],
        [8192, 1280, 320],
        [2048, 640, 5120],
        [512, 1280, 1280],
        [2, 1280, 1280],
    ];
    for [rows, inner, out] in shapes {
        let (x, weight) = (pair(&[rows, inner], device)?, pair(&[out, inner], device)?);
        let ((x_bf16, _), (weight_bf16, _)) = (halves(&x)?, halves(&weight)?);
        let ((x, candle), (weight, candle_weight)) = (x, weight);
        let (weight, weight_bf16) =
            (weight.prepare(Role::Linear)?, weight_bf16.prepare(Role::Linear)?);
        let name = format!("linear {rows}x{inner} to {out}");
        side_by_side(
            criterion,
            &name,
            || x.linear(&weight, None, Activation::Identity),
            || candle.matmul(&candle_weight.t()?),
        );
        alone(criterion, &name, || x_bf16.linear(&weight_bf16, None, Activation::Identity));
    }
    let both = pair(&[2, 4096, 2560], device)?;
    let ((x_bf16, _), (x, candle)) = (halves(&both)?, both);
    alone(criterion, "geglu 2x4096x2560", || x_bf16.geglu());
    side_by_side(
        criterion,
        "geglu 2x4096x2560",
        || x.geglu(),
        || {
            let halves = candle.chunk(2, D::Minus1)?;
            &halves[0] * halves[1].gelu_erf()?
        },
    );
    Ok(())
}

/// candle's own elementwise sums on channels-last images, against its sums of plain ones.
fn sums(criterion: &mut Criterion, device: &Device) -> Result<()> {
    for [batch, channels, side] in [[2, 320, 64], [1, 128, 512]] {
        let (x, candle) = pair(&[batch, channels, side, side], device)?;
        let (bias, candle_bias) = pair(&[batch, channels, 1, 1], device)?;
        let x = image(&x)?;
        let (x_bf16, bias_bf16) = (x.to_dtype(DType::BF16)?, bias.to_dtype(DType::BF16)?);
        let name = format!("add {batch}x{channels}x{side}x{side}");
        alone(criterion, &name, || x_bf16.add(&x_bf16));
        alone(criterion, &format!("{name} per channel"), || x_bf16.add(&bias_bf16));
        side_by_side(criterion, &name, || x.add(&x), || &candle + &candle);
        side_by_side(
            criterion,
            &format!("{name} per channel"),
            || x.add(&bias),
            || candle.broadcast_add(&candle_bias),
        );
    }
    Ok(())
}

/// What joins, mixes and shows images: skips of the UNet, a step of a scheduler, the last op.
fn moves(criterion: &mut Criterion, device: &Device) -> Result<()> {
    for [batch, channels, skip, side] in [[2, 320, 320, 64], [2, 640, 320, 64], [2, 1280, 640, 32]]
    {
        let (x, candle) = pair(&[batch, channels, side, side], device)?;
        let (y, candle_skip) = pair(&[batch, skip, side, side], device)?;
        let (x, y) = (image(&x)?, image(&y)?);
        side_by_side(
            criterion,
            &format!("cat {batch}x{channels}+{skip}x{side}x{side}"),
            || Tensor::cat(&[&x, &y], 1),
            || Candle::cat(&[&candle, &candle_skip], 1),
        );
    }
    let (x, candle) = pair(&[1, 4, 64, 64], device)?;
    side_by_side(
        criterion,
        "linear_combination of 3 latents",
        || Tensor::linear_combination(&[(0.5, &x), (0.25, &x), (-0.125, &x)]),
        || ((&candle * 0.5)? + (&candle * 0.25)?)? - (&candle * 0.125)?,
    );
    let (x, candle) = pair(&[1, 3, 512, 512], device)?;
    let x = image(&x)?;
    side_by_side(
        criterion,
        "pixels 512x512",
        || x.pixels(),
        || {
            let scaled = ((&candle + 1.0)? * 127.5)?.clamp(0f32, 255f32)?;
            scaled.permute((0, 2, 3, 1))?.round()?.to_dtype(DType::U8)?.contiguous()
        },
    );
    Ok(())
}

/// A weight as tiny-sd's files hold it, half and channels-last; beside it candle's conversion.
fn loading(criterion: &mut Criterion, device: &Device) -> Result<()> {
    let dims = [1280, 1280, 3, 3];
    let (_, candle) = pair(&dims, device)?;
    let bytes: Vec<u8> = (0..2 * candle.elem_count()).map(|i| (i % 60) as u8).collect();
    let layout = tiny_sd::backend::order::channels_last(dims);
    let host = HostTensor::new(DType::F16, layout, std::sync::Arc::new(bytes), 0)?;
    let candle = candle.to_dtype(DType::F16)?.permute((0, 3, 1, 2))?;
    side_by_side(
        criterion,
        "upload 1280x1280x3x3 f16",
        || Cpu::upload(&host, DType::F32, device),
        || candle.to_dtype(DType::F32),
    );
    let weight = Cpu::upload(&host, DType::F32, device)?;
    side_by_side(
        criterion,
        "prepare 1280x1280x3x3",
        || weight.prepare(Role::Conv2d { stride: 1 }),
        || candle.contiguous(),
    );
    Ok(())
}

fn all(criterion: &mut Criterion) {
    let run = |criterion: &mut Criterion| -> Result<()> {
        let device = Device::with_threads(0)?;
        conv2d(criterion, &device)?;
        conv2d_forms(criterion, &device)?;
        attention(criterion, &device)?;
        norms(criterion, &device)?;
        linear(criterion, &device)?;
        sums(criterion, &device)?;
        moves(criterion, &device)?;
        loading(criterion, &device)
    };
    if let Err(error) = run(criterion) {
        panic!("{error}");
    }
}

criterion_group!(benches, all);
criterion_main!(benches);
