//! The CPU's kernels against the composed definitions, over dtypes, layouts, threads and batches.

use candle_core::DType;
use half::bf16;
use tiny_sd::Result;
use tiny_sd::backend::cpu::{Device, Storage};
use tiny_sd::backend::weighted::Weighted;
use tiny_sd::backend::{
    Activation, Attention, Conv2d, Fused, GroupNorm, LayerNorm, Linear, Role, Size2d,
};
use tiny_sd::tensor::{Tensor, reference};

use crate::numbers::{LIES, Lie, Random, distance, tensor, values};

type Cpu = Tensor<Storage>;
type Case = (Fused, Vec<Vec<usize>>);

fn conv(stride: usize, padding: usize, upsample: Option<(usize, usize)>) -> Fused {
    let upsample = upsample.map(|(height, width)| Size2d { height, width });
    Fused::Conv2d(Conv2d { stride, padding, upsample, residual: false })
}

fn linear(activation: Activation) -> Fused {
    Fused::Linear(Linear { activation, residual: false })
}

fn conv_onto(stride: usize, padding: usize) -> Fused {
    Fused::Conv2d(Conv2d { stride, padding, upsample: None, residual: true })
}

fn linear_onto(activation: Activation) -> Fused {
    Fused::Linear(Linear { activation, residual: true })
}

fn attention(heads: usize, causal: bool) -> Fused {
    Fused::Attention(Attention { heads, scale: 0.3, causal })
}

/// Every op with shapes that are odd, tiny, or just beyond a tile.
fn cases() -> Vec<Case> {
    let case = |op: Fused, shapes: &[&[usize]]| (op, shapes.iter().map(|s| s.to_vec()).collect());
    let norm = |groups, silu| Fused::GroupNorm(GroupNorm { groups, eps: 1e-5, silu });
    vec![
        case(conv(1, 1, None), &[&[2, 5, 7, 9], &[6, 5, 3, 3], &[6]]),
        case(conv(1, 1, None), &[&[1, 64, 14, 13], &[49, 64, 3, 3], &[49]]),
        case(conv(2, 1, None), &[&[2, 4, 9, 8], &[33, 4, 3, 3], &[33]]),
        case(conv(1, 0, None), &[&[2, 17, 5, 6], &[40, 17, 1, 1]]),
        case(conv(1, 1, Some((8, 6))), &[&[2, 3, 4, 3], &[5, 3, 3, 3], &[5]]),
        case(conv(1, 1, Some((7, 5))), &[&[1, 3, 3, 4], &[5, 3, 3, 3], &[5]]),
        case(conv(3, 2, None), &[&[1, 3, 11, 10], &[4, 3, 5, 2], &[4]]),
        // By Winograd: whole and partial tiles, several rows of channels, doubled or enlarged
        // pixels, paddings.
        case(conv(1, 1, None), &[&[2, 33, 7, 9], &[47, 33, 3, 3], &[47]]),
        case(conv(1, 1, None), &[&[1, 400, 8, 1], &[33, 400, 3, 3]]),
        case(conv(1, 1, Some((10, 6))), &[&[2, 37, 5, 3], &[81, 37, 3, 3], &[81]]),
        case(conv(1, 1, Some((11, 7))), &[&[1, 32, 5, 4], &[32, 32, 3, 3], &[32]]),
        case(conv(1, 0, Some((8, 6))), &[&[1, 32, 4, 3], &[32, 32, 3, 3], &[32]]),
        case(conv(1, 3, None), &[&[1, 48, 5, 2], &[32, 48, 3, 3], &[32]]),
        // Onto a residual: direct, by Winograd, without a bias; linear.
        case(conv_onto(2, 1), &[&[2, 4, 9, 8], &[33, 4, 3, 3], &[33], &[2, 33, 5, 4]]),
        case(conv_onto(1, 1), &[&[2, 33, 7, 9], &[47, 33, 3, 3], &[47], &[2, 47, 7, 9]]),
        case(conv_onto(1, 0), &[&[2, 17, 5, 6], &[40, 17, 1, 1], &[2, 40, 5, 6]]),
        case(linear_onto(Activation::Identity), &[&[2, 3, 37], &[50, 37], &[50], &[2, 3, 50]]),
        case(linear_onto(Activation::Gelu), &[&[2, 200, 31], &[33, 31], &[2, 200, 33]]),
        case(norm(3, false), &[&[2, 6, 5, 7], &[6], &[6]]),
        case(norm(8, true), &[&[2, 32, 33, 37], &[32], &[32]]),
        case(Fused::LayerNorm(LayerNorm { eps: 1e-5 }), &[&[2, 3, 37], &[37], &[37]]),
        case(Fused::LayerNorm(LayerNorm { eps: 1e-5 }), &[&[5, 768], &[768], &[768]]),
        case(attention(2, false), &[&[2, 5, 6], &[2, 9, 6], &[2, 9, 6]]),
        case(attention(2, true), &[&[2, 77, 80], &[2, 77, 80], &[2, 77, 80]]),
        case(attention(1, true), &[&[1, 450, 8], &[1, 450, 8], &[1, 450, 8]]),
        case(attention(3, false), &[&[1, 130, 120], &[1, 800, 120], &[1, 800, 120]]),
        case(attention(1, false), &[&[1, 40, 512], &[1, 40, 512], &[1, 40, 512]]),
        case(linear(Activation::Identity), &[&[2, 3, 37], &[50, 37], &[50]]),
        case(linear(Activation::Silu), &[&[5, 400], &[16, 400], &[16]]),
        case(linear(Activation::QuickGelu), &[&[2, 200, 31], &[33, 31]]),
        case(linear(Activation::Gelu), &[&[3, 31], &[400, 31], &[400]]),
        case(Fused::Geglu, &[&[2, 5, 38]]),
        case(Fused::LinearCombination(vec![0.5, -2.0, 3e-3]), &[&[2, 4, 5, 6][..]; 3]),
        case(Fused::Cat { dim: 1 }, &[&[2, 3, 4, 5], &[2, 7, 4, 5], &[2, 1, 4, 5]]),
        case(Fused::Cat { dim: 0 }, &[&[2, 30, 4], &[3, 30, 4]]),
        case(Fused::Cat { dim: 2 }, &[&[2, 5, 4], &[2, 5, 9]]),
        case(Fused::Pixels, &[&[2, 3, 5, 7]]),
    ]
}

/// Each case with each dtype.
fn cases_of(dtypes: &[DType]) -> impl Iterator<Item = (Case, DType)> {
    cases().into_iter().flat_map(move |case| dtypes.iter().map(move |dtype| (case.clone(), *dtype)))
}

/// Whether `found` is what the definition gives for contiguous copies of the operands.
fn check(op: &Fused, args: &[Cpu], found: &Cpu, what: &str) -> Result<()> {
    let plain: Vec<Cpu> = args
        .iter()
        .map(|x| Tensor::from_slice(&values(x)?, x.dims(), x.device())?.to_dtype(x.dtype()))
        .collect::<Result<_>>()?;
    let expected = reference::fused(op, &plain.iter().collect::<Vec<_>>())?;
    assert_eq!((found.dims(), found.dtype()), (expected.dims(), expected.dtype()));
    let tolerance = match expected.dtype() {
        DType::F16 => 1.1e-3,
        DType::BF16 => 9e-3,
        _ => 1e-5,
    };
    // One unit of a byte: the definition may round the other way at a half.
    let tolerance = if matches!(op, Fused::Pixels) { 1.1 / 255.0 } else { tolerance };
    let distance = distance(&values(found)?, &values(&expected)?);
    assert!(distance <= tolerance, "{op:?} of {args:?}, {what}: off by {distance}");
    Ok(())
}

fn arguments(
    seed: u64,
    shapes: &[Vec<usize>],
    lie: impl Fn(usize) -> Lie,
    dtype: DType,
    device: &Device,
) -> Result<Vec<Cpu>> {
    let mut random = Random(seed);
    let shapes = shapes.iter().enumerate();
    shapes.map(|(i, dims)| tensor(&mut random, dims, lie(i), dtype, device)).collect()
}

fn run(op: &Fused, args: &[Cpu]) -> Result<Cpu> {
    Tensor::fused(op, &args.iter().collect::<Vec<_>>())
}

#[test]
fn every_op_matches_its_definition_for_every_dtype_and_layout() -> Result<()> {
    let device = Device::with_threads(2)?;
    for (op, shapes) in cases() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for (i, lie) in LIES.into_iter().enumerate() {
                let args = arguments(i as u64, &shapes, |_| lie, dtype, &device)?;
                check(&op, &args, &run(&op, &args)?, &format!("{lie:?}"))?;
            }
        }
        // Each operand otherwise.
        for turn in 0..LIES.len() {
            let lie = |i| LIES[(i * 2 + turn) % LIES.len()];
            let args = arguments(turn as u64 + 9, &shapes, lie, DType::F32, &device)?;
            check(&op, &args, &run(&op, &args)?, "mixed layouts")?;
        }
    }
    Ok(())
}

#[test]
fn a_prepared_weight_gives_the_bits_of_a_plain_one() -> Result<()> {
    let device = Device::with_threads(2)?;
    for (op, shapes) in cases() {
        for (dtype, lie) in [DType::F32, DType::F16, DType::BF16].into_iter().zip(LIES) {
            let args = arguments(3, &shapes, |_| lie, dtype, &device)?;
            let prepared = match &op {
                Fused::Conv2d(op) => {
                    let Weighted { x, weight, bias, residual } = Weighted::of(&args, op.residual)?;
                    let weight = weight.prepare(Role::Conv2d { stride: op.stride })?;
                    x.conv2d_onto(&weight, bias, residual, *op)?
                }
                Fused::Linear(op) => {
                    let Weighted { x, weight, bias, residual } = Weighted::of(&args, op.residual)?;
                    let weight = weight.prepare(Role::Linear)?;
                    x.linear_onto(&weight, bias, residual, op.activation)?
                }
                _ => continue,
            };
            assert_eq!(values(&prepared)?, values(&run(&op, &args)?)?, "{op:?}");
        }
    }
    Ok(())
}

#[test]
fn a_weight_in_half_the_memory_gives_the_same_bits() -> Result<()> {
    use tiny_sd::backend::{Backend, View};
    let spacious = Device::with_threads(2)?;
    let small = Device::with_threads(2)?.with_low_memory(true);
    for stored in [DType::F16, DType::BF16, DType::F32] {
        // As it is loaded: what the file says, in the dtype of the computation.
        let weight = |device: &Device| -> Result<Cpu> {
            let weight: Cpu = tensor(&mut Random(1), &[70, 40], Lie::Offset, stored, device)?;
            weight.to_dtype(DType::F32)
        };
        let apply = |device: &Device| -> Result<Vec<f32>> {
            let x: Cpu = tensor(&mut Random(2), &[9, 40], Lie::Contiguous, DType::F32, device)?;
            values(&x.linear(
                &weight(device)?.prepare(Role::Linear)?,
                None,
                Activation::Identity,
            )?)
        };
        assert_eq!(apply(&spacious)?, apply(&small)?, "{stored:?}");
        let held = |device: &Device, role: Role| -> Result<u64> {
            let weight = match role {
                Role::Linear => weight(device)?,
                Role::Conv2d { .. } => weight(device)?.reshape(vec![70, 40, 1, 1])?,
            };
            let view = View { storage: &**weight.storage(), layout: weight.layout() };
            let prepared = Storage::fused(&Fused::Prepare(role), &[view])?;
            Ok(prepared.held_bytes().unwrap_or(0))
        };
        let pixelwise = Role::Conv2d { stride: 1 };
        let whole = held(&spacious, pixelwise)?;
        // What is in neither half stays as it is.
        let less = if stored == DType::F32 { whole } else { whole / 2 };
        let found = [(&spacious, Role::Linear), (&small, Role::Linear), (&small, pixelwise)]
            .map(|(device, role)| held(device, role));
        assert_eq!(found.into_iter().collect::<Result<Vec<_>>>()?, [less; 3], "{stored:?}");
    }
    Ok(())
}

#[test]
fn the_number_of_threads_changes_no_bit() -> Result<()> {
    let devices: Vec<_> = (1..4).map(Device::with_threads).collect::<Result<_>>()?;
    for ((op, shapes), dtype) in cases_of(&[DType::F32, DType::BF16]) {
        let mut all = devices.iter().map(|device| {
            values(&run(&op, &arguments(4, &shapes, |_| Lie::Contiguous, dtype, device)?)?)
        });
        let one = all.next().expect("three runs")?;
        for more in all {
            assert_eq!(one, more?, "{op:?} {dtype:?}");
        }
    }
    Ok(())
}

#[test]
fn what_else_is_in_the_batch_changes_no_bit() -> Result<()> {
    let device = Device::with_threads(2)?;
    for ((op, shapes), dtype) in cases_of(&[DType::F32, DType::BF16]) {
        let last = shapes.len() - 1;
        let is_batched = |i: usize| match &op {
            Fused::Attention(_) | Fused::LinearCombination(_) => true,
            Fused::Conv2d(Conv2d { residual, .. }) | Fused::Linear(Linear { residual, .. }) => {
                i == 0 || *residual && i == last
            }
            _ => i == 0,
        };
        if let Fused::Cat { .. } = op {
            continue;
        }
        let args = arguments(5, &shapes, |_| Lie::Contiguous, dtype, &device)?;
        let single = run(&op, &args)?;
        // The same pictures behind three others.
        let more: Vec<Cpu> = args
            .iter()
            .enumerate()
            .map(|(i, x)| {
                let mut dims = x.dims().to_vec();
                if !is_batched(i) {
                    return Ok(x.clone());
                }
                dims[0] = 3;
                let others = tensor(&mut Random(6), &dims, Lie::Contiguous, dtype, &device)?;
                Tensor::cat(&[&others, x], 0)
            })
            .collect::<Result<_>>()?;
        let batch = run(&op, &more)?.narrow(0, 3, single.dims()[0])?;
        assert_eq!(values(&single)?, values(&batch)?, "{op:?} {dtype:?}");
    }
    Ok(())
}

#[test]
fn products_of_any_shape_match_their_definition() -> Result<()> {
    let device = Device::with_threads(2)?;
    let mut random = Random(13);
    for round in 0..40 {
        let mut size = |most: usize| 1 + random.below(most);
        let (heads, causal) = (size(3), round % 3 == 0);
        // Beyond what is summed at once in f32, and in bf16.
        let (rows, inner, out) = (size(40), size(if round % 8 == 0 { 2000 } else { 90 }), size(99));
        let (queries, keys, head_dim) = (size(150), size(400), size(70));
        let keys = if causal { queries } else { keys };
        let activation = [Activation::Identity, Activation::Silu][round % 2];
        let (query, key) = (vec![2, queries, heads * head_dim], vec![2, keys, heads * head_dim]);
        for (op, shapes) in [
            (linear(activation), vec![vec![rows, inner], vec![out, inner], vec![out]]),
            (attention(heads, causal), vec![query, key.clone(), key]),
        ] {
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let lie = |i| LIES[(i + round) % LIES.len()];
                let args = arguments(round as u64, &shapes, lie, dtype, &device)?;
                check(&op, &args, &run(&op, &args)?, &format!("round {round}"))?;
            }
        }
    }
    Ok(())
}

#[test]
fn nothing_of_an_earlier_tensor_shows_in_a_large_result() -> Result<()> {
    let device = Device::with_threads(2)?;
    let norm = GroupNorm { groups: 4, eps: 1e-5, silu: true };
    let large: Vec<Case> = vec![
        (conv(1, 1, Some((256, 257))), vec![vec![1, 3, 128, 129], vec![17, 3, 3, 3], vec![17]]),
        (Fused::GroupNorm(norm), vec![vec![1, 20, 256, 256], vec![20], vec![20]]),
        (Fused::LayerNorm(LayerNorm { eps: 1e-5 }), vec![vec![4097, 257], vec![257], vec![257]]),
        (attention(5, false), vec![vec![1, 4097, 260], vec![1, 7, 260], vec![1, 7, 260]]),
        (linear(Activation::Silu), vec![vec![1025, 3], vec![1030, 3]]),
        (Fused::Geglu, vec![vec![1025, 2060]]),
    ];
    for (op, shapes) in large {
        for (lie, dtype) in [
            (Lie::ChannelsLast, DType::F32),
            (Lie::LastFirst, DType::F32),
            (Lie::LastFirst, DType::BF16),
        ] {
            let args = arguments(11, &shapes, |_| lie, dtype, &device)?;
            let shape = op.infer(&args.iter().map(|x| x.meta()).collect::<Vec<_>>())?.layout;
            let count = shape.shape().elem_count();
            assert!(count >= 1 << 20, "{op:?} gives too few elements to be kept");
            for _ in 0..2 {
                let earlier = Cpu::from_slice(&vec![f32::NAN; count], count, &device)?;
                drop(earlier.to_dtype(dtype)?);
            }
            check(&op, &args, &run(&op, &args)?, "after another tensor")?;
        }
    }
    Ok(())
}

#[test]
fn large_sums_are_those_of_small_ones() -> Result<()> {
    let device = Device::with_threads(2)?;
    let mut random = Random(12);
    for dtype in [DType::F32, DType::BF16] {
        large_sums(&mut random, dtype, &device)?;
    }
    Ok(())
}

fn large_sums(random: &mut Random, dtype: DType, device: &Device) -> Result<()> {
    let x: Cpu = tensor(random, &[2, 33, 40, 41], Lie::ChannelsLast, dtype, device)?;
    for (dims, lie) in [
        (vec![2, 33, 40, 41], Lie::ChannelsLast),
        (vec![2, 33, 40, 41], Lie::Contiguous),
        (vec![2, 33, 1, 1], Lie::Contiguous),
        (vec![33, 1, 1], Lie::Strided),
        (vec![2, 1, 40, 41], Lie::Offset),
        (vec![41], Lie::Contiguous),
    ] {
        let y: Cpu = tensor(random, &dims, lie, dtype, device)?;
        let (a, b) = (values(&x)?, values(&y.broadcast_as(x.dims())?)?);
        let round = |sum: f32| if dtype == DType::F32 { sum } else { bf16::from_f32(sum).into() };
        let expected: Vec<f32> = a.iter().zip(&b).map(|(a, b)| round(a + b)).collect();
        assert_eq!(values(&x.add(&y)?)?, expected, "{dims:?} {lie:?}");
        assert_eq!(values(&y.add(&x)?)?, expected, "{dims:?} {lie:?} in front");
    }
    Ok(())
}

#[test]
fn group_norm_keeps_its_precision_far_from_zero() -> Result<()> {
    let device = Device::with_threads(2)?;
    let op = Fused::GroupNorm(GroupNorm { groups: 2, eps: 1e-6, silu: false });
    let x: Cpu = tensor(&mut Random(7), &[1, 4, 64, 64], Lie::ChannelsLast, DType::F32, &device)?;
    let far = x.affine(1.0, 64.0)?;
    let one = Tensor::from_slice(&[1f32; 4], 4, &device)?;
    let zero = Tensor::from_slice(&[0f32; 4], 4, &device)?;
    let (near, far) = (run(&op, &[x, one.clone(), zero.clone()])?, run(&op, &[far, one, zero])?);
    let distance = distance(&values(&far)?, &values(&near)?);
    assert!(distance < 1e-5, "off by {distance}");
    Ok(())
}

#[test]
fn empty_operands_give_empty_results() -> Result<()> {
    let device = Device::with_threads(1)?;
    let check = |op: Fused, shapes: &[&[usize]], expected: &[usize]| -> Result<()> {
        let shapes: Vec<Vec<usize>> = shapes.iter().map(|s| s.to_vec()).collect();
        let args = arguments(8, &shapes, |_| Lie::Contiguous, DType::F32, &device)?;
        assert_eq!(run(&op, &args)?.dims(), expected, "{op:?}");
        Ok(())
    };
    check(conv(1, 1, None), &[&[0, 3, 4, 4], &[5, 3, 3, 3]], &[0, 5, 4, 4])?;
    check(conv(1, 1, None), &[&[1, 0, 4, 4], &[5, 0, 3, 3], &[5]], &[1, 5, 4, 4])?;
    check(linear(Activation::Identity), &[&[0, 3], &[5, 3]], &[0, 5])?;
    check(linear(Activation::Identity), &[&[2, 3], &[0, 3]], &[2, 0])?;
    check(attention(1, false), &[&[1, 0, 3], &[1, 2, 3], &[1, 2, 3]], &[1, 0, 3])?;
    check(Fused::Cat { dim: 0 }, &[&[0, 3], &[2, 3]], &[2, 3])?;
    check(Fused::Geglu, &[&[0, 4]], &[0, 2])
}

#[test]
fn what_kernels_cannot_take_is_an_error() -> Result<()> {
    use tiny_sd::backend::{Backend, View};
    let device = Device::with_threads(1)?;
    let x: Cpu = Tensor::from_slice(&[1f32; 12], vec![2, 6], &device)?;
    let beyond = candle_core::Layout::new((3, 6).into(), vec![6, 1], 0);
    for op in [Fused::Geglu, Fused::Cat { dim: 0 }, Fused::Prepare(Role::Linear)] {
        let view = View { storage: &**x.storage(), layout: &beyond };
        assert!(Storage::fused(&op, &[view]).is_err(), "{op:?} read beyond its operand");
    }
    let weight = x.prepare(Role::Linear)?;
    assert!(x.linear(&weight, None, Activation::Identity).is_ok());
    assert!(x.reshape(vec![1, 2, 6, 1])?.conv2d(&weight, None, Conv2d::same(1)).is_err());
    assert!(run(&Fused::Geglu, &[x.to_dtype(DType::F64)?]).is_err());
    Ok(())
}
