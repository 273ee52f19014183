//! The slow, composed definition of every fused op: what kernels are tested against, on every
//! backend, in terms of candle's traits alone. Separate from the ops because it must share nothing
//! with any kernel. (It is here and not in `backend/` because it is written over tensors.)

use candle_core::DType;
use candle_core::op::{Add, Div, Exp, GeluErf, Mul, Recip, Silu, Sqrt, Sub};

use super::Tensor;
use crate::backend::weighted::Weighted;
use crate::backend::{
    Activation, Attention, Backend, Conv2d, Fused, GroupNorm, LayerNorm, Linear, Size2d,
};
use crate::error::{Error, Result};

/// The value of `op`, computed in f32 from elementary ops. The memory order is not defined here;
/// compare logical values.
///
/// # Errors
/// If the operands do not fit.
pub fn fused<B: Backend>(op: &Fused, args: &[&Tensor<B>]) -> Result<Tensor<B>> {
    let metas: Vec<_> = args.iter().map(|tensor| tensor.meta()).collect();
    let dtype = op.infer(&metas)?.dtype;
    if let Fused::Cat { dim } = op {
        return cat(args, *dim);
    }
    let args: Vec<_> = args.iter().map(|x| x.to_dtype(DType::F32)).collect::<Result<_>>()?;
    let result = match (op, args.as_slice()) {
        (Fused::Conv2d(op), args) => onto(Weighted::of(args, op.residual)?, |operands| {
            conv2d(op, operands.x, operands.weight, operands.bias)
        }),
        (Fused::GroupNorm(op), [x, weight, bias]) => group_norm(op, x, weight, bias),
        (Fused::LayerNorm(op), [x, weight, bias]) => layer_norm(op, x, weight, bias),
        (Fused::Attention(op), [query, key, value]) => attention(op, query, key, value),
        (Fused::Linear(op), args) => onto(Weighted::of(args, op.residual)?, |operands| {
            linear(op, operands.x, operands.weight, operands.bias)
        }),
        (Fused::Geglu, [x]) => geglu(x),
        (Fused::LinearCombination(coefficients), terms) => linear_combination(coefficients, terms),
        (Fused::Pixels, [x]) => return pixels(x),
        (Fused::Prepare(_), [weight]) => Ok(weight.clone()),
        (op, args) => Err(Error::other(format!("{} of {} operands", op.name(), args.len()))),
    };
    result?.to_dtype(dtype)
}

/// What `compute` makes of the operands, and the residual that is added to it.
fn onto<'a, B: Backend>(
    operands: Weighted<'a, Tensor<B>>,
    compute: impl FnOnce(&Weighted<'a, Tensor<B>>) -> Result<Tensor<B>>,
) -> Result<Tensor<B>> {
    let made = compute(&operands)?;
    operands.residual.map_or(Ok(made.clone()), |residual| made.add(residual))
}

fn conv2d<B: Backend>(
    op: &Conv2d,
    x: &Tensor<B>,
    weight: &Tensor<B>,
    bias: Option<&Tensor<B>>,
) -> Result<Tensor<B>> {
    let [batch, channels, height, width] = x.dims_exact()?;
    let [out, _, kernel_h, kernel_w] = weight.dims_exact()?;
    let size = op.input_size(height, width);
    let padded = pad(&upsample(x, size)?, op.padding)?;
    let slide = |size: usize, kernel| (size + 2 * op.padding - kernel) / op.stride + 1;
    let (out_h, out_w) = (slide(size.height, kernel_h), slide(size.width, kernel_w));
    let mut sum = Tensor::zeros(vec![batch, out_h * out_w, out], DType::F32, x.device())?;
    for ky in 0..kernel_h {
        for kx in 0..kernel_w {
            // The pixels that this tap of the kernel sees: every `stride`-th from (ky, kx) on.
            let rows = every(&padded, 2, ky, op.stride, out_h)?;
            let seen = every(&rows, 3, kx, op.stride, out_w)?;
            let seen =
                seen.permute(&[0, 2, 3, 1])?.reshape(vec![batch, out_h * out_w, channels])?;
            let tap = weight.narrow(2, ky, 1)?.narrow(3, kx, 1)?;
            let tap = tap.reshape(vec![1, out, channels])?.transpose(1, 2)?;
            let tap = tap.broadcast_as(vec![batch, channels, out])?;
            sum = sum.add(&seen.matmul(&tap)?)?;
        }
    }
    if let Some(bias) = bias {
        sum = sum.add(bias)?;
    }
    sum.reshape(vec![batch, out_h, out_w, out])?.permute(&[0, 3, 1, 2])
}

/// Entries `start`, `start + step`, … of a dimension, `count` of them.
fn every<B: Backend>(
    x: &Tensor<B>,
    dim: usize,
    start: usize,
    step: usize,
    count: usize,
) -> Result<Tensor<B>> {
    let ids: Vec<u32> = (0..count).map(|i| (start + i * step) as u32).collect();
    select(x, dim, &ids)
}

fn select<B: Backend>(x: &Tensor<B>, dim: usize, ids: &[u32]) -> Result<Tensor<B>> {
    let parts: Vec<_> =
        ids.iter().map(|&id| x.narrow(dim, id as usize, 1)).collect::<Result<_>>()?;
    cat(&parts.iter().collect::<Vec<_>>(), dim)
}

fn upsample<B: Backend>(x: &Tensor<B>, to: Size2d) -> Result<Tensor<B>> {
    let [_, _, height, width] = x.dims_exact()?;
    let nearest = |size: usize, to: usize| -> Vec<u32> {
        (0..to).map(|target| (target * size / to) as u32).collect()
    };
    select(&select(x, 2, &nearest(height, to.height))?, 3, &nearest(width, to.width))
}

fn pad<B: Backend>(x: &Tensor<B>, by: usize) -> Result<Tensor<B>> {
    if by == 0 {
        return Ok(x.clone());
    }
    let [batch, channels, height, width] = x.dims_exact()?;
    let beside = Tensor::zeros(vec![batch, channels, height, by], x.dtype(), x.device())?;
    let x = cat(&[&beside, x, &beside], 3)?;
    let above = Tensor::zeros(vec![batch, channels, by, width + 2 * by], x.dtype(), x.device())?;
    cat(&[&above, &x, &above], 2)
}

/// Joined by copying every part into its place of a fresh storage.
fn cat<B: Backend>(parts: &[&Tensor<B>], dim: usize) -> Result<Tensor<B>> {
    use candle_core::backend::BackendDevice;
    let first = parts.first().ok_or_else(|| Error::other("cat of nothing"))?;
    // With `dim` in front, parts follow each other in memory.
    let mut front: Vec<usize> = (0..first.dims().len()).collect();
    front.swap(0, dim);
    let mut dims = first.permute(&front)?.dims().to_vec();
    dims[0] = parts.iter().map(|part| part.dims()[dim]).sum();
    let mut storage = first.device().zeros_impl(&dims.clone().into(), first.dtype())?;
    let mut offset = 0;
    for part in parts {
        let part = part.permute(&front)?;
        part.storage().copy_strided_src(&mut storage, offset, part.layout())?;
        offset += part.elem_count();
    }
    Tensor::dense(storage, dims.into()).permute(&front)
}

fn group_norm<B: Backend>(
    op: &GroupNorm,
    x: &Tensor<B>,
    weight: &Tensor<B>,
    bias: &Tensor<B>,
) -> Result<Tensor<B>> {
    let [batch, channels, height, width] = x.dims_exact()?;
    let grouped = vec![batch, op.groups, channels / op.groups * height * width];
    let normal = normalise(&x.reshape(grouped)?, op.eps)?;
    let normal = normal.reshape(vec![batch, channels, height, width])?;
    let per_channel = vec![1, channels, 1, 1];
    let scaled = normal.binary::<Mul>(&weight.reshape(per_channel.clone())?)?;
    let shifted = scaled.add(&bias.reshape(per_channel)?)?;
    if op.silu { shifted.unary::<Silu>() } else { Ok(shifted) }
}

fn layer_norm<B: Backend>(
    op: &LayerNorm,
    x: &Tensor<B>,
    weight: &Tensor<B>,
    bias: &Tensor<B>,
) -> Result<Tensor<B>> {
    normalise(x, op.eps)?.binary::<Mul>(weight)?.add(bias)
}

/// To mean 0 and variance 1 over the last dimension.
fn normalise<B: Backend>(x: &Tensor<B>, eps: f64) -> Result<Tensor<B>> {
    let last = x.dims().len() - 1;
    let count = x.dims()[last] as f64;
    let mean = x.sum_keepdim(&[last])?.affine(1.0 / count, 0.0)?;
    let centred = x.binary::<Sub>(&mean)?;
    let square = centred.binary::<Mul>(&centred)?;
    let variance = square.sum_keepdim(&[last])?.affine(1.0 / count, eps)?;
    centred.binary::<Mul>(&variance.unary::<Sqrt>()?.unary::<Recip>()?)
}

fn attention<B: Backend>(
    op: &Attention,
    query: &Tensor<B>,
    key: &Tensor<B>,
    value: &Tensor<B>,
) -> Result<Tensor<B>> {
    let [batch, queries, inner] = query.dims_exact()?;
    let [_, keys, _] = key.dims_exact()?;
    let heads = |x: &Tensor<B>, len| {
        x.reshape(vec![batch, len, op.heads, inner / op.heads])?.transpose(1, 2)
    };
    let (query, key, value) = (heads(query, queries)?, heads(key, keys)?, heads(value, keys)?);
    let mut scores = query.matmul(&key.transpose(2, 3)?)?.affine(op.scale, 0.0)?;
    if op.causal {
        let hidden = |i: usize| if i % keys > i / keys { f32::NEG_INFINITY } else { 0.0 };
        let mask: Vec<f32> = (0..queries * keys).map(hidden).collect();
        scores = scores.add(&Tensor::from_slice(&mask, vec![queries, keys], query.device())?)?;
    }
    let weights = scores.binary::<Sub>(&scores.max_keepdim(3)?)?.unary::<Exp>()?;
    let weights = weights.binary::<Div>(&weights.sum_keepdim(&[3])?)?;
    weights.matmul(&value)?.transpose(1, 2)?.reshape(vec![batch, queries, inner])
}

fn linear<B: Backend>(
    op: &Linear,
    x: &Tensor<B>,
    weight: &Tensor<B>,
    bias: Option<&Tensor<B>>,
) -> Result<Tensor<B>> {
    let [out, inner] = weight.dims_exact()?;
    let rows = x.elem_count() / inner;
    let mut y = x.reshape(vec![rows, inner])?.matmul(&weight.transpose(0, 1)?)?;
    if let Some(bias) = bias {
        y = y.add(bias)?;
    }
    let mut dims = x.dims().to_vec();
    dims.pop();
    dims.push(out);
    activate(&y.reshape(dims)?, op.activation)
}

fn activate<B: Backend>(x: &Tensor<B>, activation: Activation) -> Result<Tensor<B>> {
    match activation {
        Activation::Identity => Ok(x.clone()),
        Activation::Silu => x.unary::<Silu>(),
        // silu(1.702 x) / 1.702 = x · sigmoid(1.702 x)
        Activation::QuickGelu => x.affine(1.702, 0.0)?.unary::<Silu>()?.affine(1.0 / 1.702, 0.0),
        Activation::Gelu => x.unary::<GeluErf>(),
    }
}

fn geglu<B: Backend>(x: &Tensor<B>) -> Result<Tensor<B>> {
    let halves = x.chunk(2, x.dims().len() - 1)?;
    halves[0].binary::<Mul>(&halves[1].unary::<GeluErf>()?)
}

fn linear_combination<B: Backend>(coefficients: &[f64], terms: &[Tensor<B>]) -> Result<Tensor<B>> {
    let mut sum: Option<Tensor<B>> = None;
    for (coefficient, term) in coefficients.iter().zip(terms) {
        let term = term.to_dtype(DType::F64)?.affine(*coefficient, 0.0)?;
        sum = Some(match sum {
            Some(sum) => sum.binary::<Add>(&term)?,
            None => term,
        });
    }
    sum.ok_or_else(|| Error::other("no terms"))?.to_dtype(DType::F32)
}

/// On the host: candle rounds halves away from zero, numpy to even.
fn pixels<B: Backend>(x: &Tensor<B>) -> Result<Tensor<B>> {
    let x = x.permute(&[0, 2, 3, 1])?;
    let round = |value: &f32| ((value / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round_ties_even() as u8;
    let bytes: Vec<u8> = x.to_vec::<f32>()?.iter().map(round).collect();
    Tensor::from_slice(&bytes, x.dims(), x.device())
}
