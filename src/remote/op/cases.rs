//! The op table as test cases: small operands for every op, dtype and layout. Separate because
//! tests, fuzz targets and every later backend derive from this one list: `samples` says for each
//! op what it takes, and a new op does not compile without an answer.

use candle_core::{CpuStorage, DType, Layout};
use half::{bf16, f16};

use super::infer::DTYPES;
use super::{Binary, Compare, Copy2d, Digest, Op, Reduce, Unary};
use crate::backend::{
    Activation, Attention, Conv2d, Fused, GroupNorm, LayerNorm, Linear, Noise, Role, Size2d,
};

/// An op on operands.
#[derive(Debug, Clone)]
pub struct Case {
    /// What to run.
    pub op: Op,
    /// On what: a whole buffer and a view of it.
    pub operands: Vec<(CpuStorage, Layout)>,
    /// The dtype that the case is about: of the first operand, or of the result.
    pub dtype: DType,
    /// How the operands lie.
    pub lie: Lie,
}

/// How an operand lies in its buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lie {
    /// It is the buffer.
    Contiguous,
    /// There are elements before and after it.
    Offset,
    /// The last dimension is the slowest.
    Transposed,
    /// The first dimension repeats one entry.
    Broadcast,
}

/// All of them.
pub const LIES: &[Lie] = &[Lie::Contiguous, Lie::Offset, Lie::Transposed, Lie::Broadcast];

/// What an operand is made from.
struct Sample {
    dtype: DType,
    dims: Vec<usize>,
    /// Its elements are indices below this.
    below: Option<usize>,
}

/// Every op for every dtype that it takes, in every layout.
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for op in DTYPES.iter().flat_map(|&dtype| creating(dtype)).chain(computing()) {
        for &dtype in DTYPES {
            let Some(samples) = samples(&op, dtype) else { continue };
            let lies = match (&op, samples.len()) {
                (_, 0) => &LIES[..1],
                // The whole buffer is meant, in any order.
                (Op::Copy, _) => &[Lie::Contiguous, Lie::Transposed][..],
                _ => LIES,
            };
            for &lie in lies {
                let operands =
                    samples.iter().enumerate().map(|(i, sample)| sample.operand(lie, i)).collect();
                cases.push(Case { op: op.clone(), operands, dtype, lie });
            }
        }
    }
    cases
}

/// Ops that make something of `dtype` from nothing.
fn creating(dtype: DType) -> Vec<Op> {
    let (dims, size) = (vec![2, 3, 4], dtype.size_in_bytes());
    let bytes = (0..6 * size as u8).collect();
    let mut ops = vec![
        Op::Zeros { dtype, dims: dims.clone() },
        Op::Constant { dtype, bytes },
        Op::Received { transfer: 0, dtype, len: 20_000 },
    ];
    if dtype.is_float() {
        let noise = Noise { seed: 7, skip: 3 };
        ops.push(Op::Randn { noise, dtype, dims: dims.clone() });
        ops.push(Op::Weight { digest: Digest([0; 32]), dtype, dims: dims.clone() });
        ops.push(Op::RandUniform { from: -1.0, to: 2.0, dtype, dims: dims.clone() });
        ops.push(Op::RandNormal { mean: 1.0, std: 2.0, dtype, dims });
    }
    ops
}

/// Ops that take something, with attributes that differ from each other and from the defaults.
fn computing() -> Vec<Op> {
    let square = |height, width| Size2d { height, width };
    let bilinear = |size, align_corners, scale_height: Option<f64>| Op::UpsampleBilinear2d {
        size,
        align_corners,
        scale_height,
        scale_width: scale_height.map(|scale| scale + 0.25),
    };
    let mut ops = vec![
        Op::Affine { mul: 2.0, add: 1.0 },
        Op::Powf { exponent: 2.5 },
        Op::Elu { alpha: 0.75 },
        Op::Reduce { op: Reduce::Sum, dims: vec![1] },
        Op::Reduce { op: Reduce::Sum, dims: vec![2, 0] },
        Op::Reduce { op: Reduce::Min, dims: vec![0] },
        Op::Reduce { op: Reduce::Max, dims: vec![1] },
        Op::Reduce { op: Reduce::ArgMin, dims: vec![2] },
        Op::Reduce { op: Reduce::ArgMax, dims: vec![1] },
        Op::Where,
        Op::AvgPool2d { kernel: square(2, 3), stride: square(1, 2) },
        Op::MaxPool2d { kernel: square(3, 2), stride: square(2, 1) },
        Op::UpsampleNearest1d { width: 7 },
        Op::UpsampleNearest2d { size: square(7, 9) },
        bilinear(square(7, 9), false, None),
        bilinear(square(7, 9), true, None),
        bilinear(square(7, 9), false, Some(1.5)),
        bilinear(square(4, 5), false, None),
        Op::Gather { dim: 1 },
        Op::IndexSelect { dim: 1 },
        Op::IndexAdd { dim: 1 },
        Op::Matmul,
        Op::Copy,
        Op::ScatterSet { dim: 1 },
        Op::ScatterAddSet { dim: 1 },
        Op::CopyStrided { offset: 2 },
        Op::Copy2d(Copy2d {
            rows: 2,
            columns: 3,
            source_stride: 4,
            target_stride: 5,
            source_offset: 1,
            target_offset: 2,
        }),
        Op::ConstSet { value: 3.0 },
    ];
    ops.extend(Compare::ALL.iter().map(|&op| Op::Compare(op)));
    ops.extend(Unary::ALL.iter().map(|&op| Op::Unary(op)));
    ops.extend(Binary::ALL.iter().map(|&op| Op::Binary(op)));
    ops.extend(DTYPES.iter().map(|&dtype| Op::Cast { dtype }));
    ops.extend(fused().into_iter().map(Op::Fused));
    ops
}

fn fused() -> Vec<Fused> {
    let upsample = Some(Size2d { height: 8, width: 7 });
    let activations =
        [Activation::Identity, Activation::Silu, Activation::QuickGelu, Activation::Gelu];
    let mut ops = vec![
        Fused::Conv2d(Conv2d { stride: 2, ..Conv2d::same(3) }),
        Fused::Conv2d(Conv2d { upsample, ..Conv2d::same(3) }),
        Fused::Conv2d(Conv2d { residual: true, ..Conv2d::same(3) }),
        Fused::GroupNorm(GroupNorm { groups: 2, eps: 1e-5, silu: false }),
        Fused::GroupNorm(GroupNorm { groups: 2, eps: 1e-3, silu: true }),
        Fused::LayerNorm(LayerNorm { eps: 1e-5 }),
        Fused::Attention(Attention { heads: 2, scale: 0.5, causal: false }),
        Fused::Attention(Attention { heads: 1, scale: 0.7, causal: true }),
        Fused::Geglu,
        Fused::LinearCombination(vec![0.5, -2.0, 3e-3]),
        Fused::Cat { dim: 1 },
        Fused::Pixels,
        Fused::Prepare(Role::Linear),
        Fused::Prepare(Role::Conv2d { stride: 1 }),
        Fused::Prepare(Role::Conv2d { stride: 2 }),
    ];
    let linear = |activation, residual| Fused::Linear(Linear { activation, residual });
    ops.extend(activations.map(|activation| linear(activation, false)));
    ops.push(linear(Activation::Gelu, true));
    ops
}

/// What `op` takes where the case is about `dtype`; `None` if it takes no such thing.
fn samples(op: &Op, dtype: DType) -> Option<Vec<Sample>> {
    let sample = |dims: &[usize]| Sample { dtype, dims: dims.to_vec(), below: None };
    // Indices come in all three dtypes.
    let index = match dtype {
        DType::U32 | DType::F32 => DType::U32,
        DType::I64 | DType::F16 => DType::I64,
        _ => DType::U8,
    };
    let ids =
        |dims: &[usize], below| Sample { dtype: index, dims: dims.to_vec(), below: Some(below) };
    let x = || sample(&[2, 3, 4]);
    let image = || sample(&[2, 3, 4, 5]);
    let (is_float, is_unsigned) = (dtype.is_float(), matches!(dtype, DType::U8 | DType::U32));
    Some(match op {
        Op::Affine { .. } | Op::Reduce { .. } | Op::Cast { .. } | Op::Copy => vec![x()],
        Op::Powf { .. } | Op::Elu { .. } | Op::Unary(_) if is_float => vec![x()],
        Op::Powf { .. } | Op::Elu { .. } | Op::Unary(_) => return None,
        Op::Compare(_) => vec![x(), x()],
        // Below zero there is nothing, and by zero nobody divides.
        Op::Binary(Binary::Sub) if is_unsigned => return None,
        Op::Binary(Binary::Div) if !is_float => return None,
        Op::Binary(_) => vec![x(), x()],
        Op::Where => vec![ids(&[2, 3, 4], 2), x(), x()],
        Op::AvgPool2d { .. } | Op::MaxPool2d { .. } | Op::UpsampleNearest2d { .. } => {
            vec![image()]
        }
        Op::UpsampleNearest1d { .. } => vec![x()],
        Op::UpsampleBilinear2d { .. } if is_float => vec![image()],
        Op::UpsampleBilinear2d { .. } => return None,
        Op::Gather { .. } => vec![x(), ids(&[2, 5, 4], 3)],
        Op::IndexSelect { .. } => vec![x(), ids(&[5], 3)],
        Op::IndexAdd { .. } => vec![x(), ids(&[2], 3), sample(&[2, 2, 4])],
        Op::Matmul if is_float => vec![x(), sample(&[2, 4, 5])],
        Op::Matmul => return None,
        Op::Fused(op) => return fused_samples(op, dtype),
        Op::ScatterSet { .. } | Op::ScatterAddSet { .. } => {
            vec![x(), ids(&[2, 2, 4], 3), sample(&[2, 2, 4])]
        }
        Op::CopyStrided { .. } => vec![sample(&[2, 30]), x()],
        Op::Copy2d(_) => vec![x(), sample(&[2, 9])],
        Op::ConstSet { .. } => vec![x()],
        Op::Zeros { dtype: made, .. }
        | Op::Randn { dtype: made, .. }
        | Op::RandUniform { dtype: made, .. }
        | Op::RandNormal { dtype: made, .. }
        | Op::Constant { dtype: made, .. }
        | Op::Received { dtype: made, .. }
        | Op::Weight { dtype: made, .. } => {
            return (*made == dtype).then(Vec::new);
        }
    })
}

fn fused_samples(op: &Fused, dtype: DType) -> Option<Vec<Sample>> {
    let sample = |dims: &[usize]| Sample { dtype, dims: dims.to_vec(), below: None };
    let computes = matches!(dtype, DType::F32 | DType::F16 | DType::BF16);
    if !computes && !matches!(op, Fused::Cat { .. }) {
        return None;
    }
    Some(match op {
        Fused::Conv2d(op) => {
            let residual = op.residual.then(|| sample(&[2, 4, 5, 6]));
            let operands = [sample(&[2, 3, 5, 6]), sample(&[4, 3, 3, 3]), sample(&[4])];
            operands.into_iter().chain(residual).collect()
        }
        Fused::GroupNorm(_) => vec![sample(&[2, 4, 3, 5]), sample(&[4]), sample(&[4])],
        Fused::LayerNorm(_) => vec![sample(&[2, 3, 8]), sample(&[8]), sample(&[8])],
        Fused::Attention(_) => {
            vec![sample(&[2, 3, 8]), sample(&[2, 3, 8]), sample(&[2, 3, 8])]
        }
        Fused::Linear(op) => {
            let residual = op.residual.then(|| sample(&[2, 3, 5]));
            let operands = [sample(&[2, 3, 8]), sample(&[5, 8]), sample(&[5])];
            operands.into_iter().chain(residual).collect()
        }
        Fused::Geglu => vec![sample(&[2, 3, 8])],
        Fused::LinearCombination(terms) => terms.iter().map(|_| sample(&[2, 3, 4])).collect(),
        Fused::Cat { .. } => {
            vec![sample(&[2, 3, 4]), sample(&[2, 1, 4]), sample(&[2, 2, 4])]
        }
        Fused::Pixels => vec![sample(&[2, 3, 4, 5])],
        Fused::Prepare(Role::Linear) => vec![sample(&[5, 8])],
        Fused::Prepare(Role::Conv2d { .. }) => vec![sample(&[4, 3, 3, 3])],
    })
}

impl Sample {
    /// The `place`th operand of a case: each has other numbers.
    fn operand(&self, lie: Lie, place: usize) -> (CpuStorage, Layout) {
        let dims = self.dims.clone();
        let len: usize = dims.iter().product();
        match lie {
            Lie::Contiguous => (self.storage(place, len), Layout::contiguous(dims)),
            Lie::Offset => (self.storage(place, len + 5), Layout::contiguous_with_offset(dims, 3)),
            Lie::Transposed => {
                let mut stride = vec![0; dims.len()];
                let mut step = 1;
                for (stride, dim) in stride.iter_mut().zip(&dims) {
                    *stride = step;
                    step *= dim;
                }
                (self.storage(place, len), Layout::new(dims.into(), stride, 0))
            }
            Lie::Broadcast => {
                let mut stride = Layout::contiguous(dims.clone()).stride().to_vec();
                if let Some(first) = stride.first_mut() {
                    *first = 0;
                }
                let own = len / dims.first().copied().unwrap_or(1);
                (self.storage(place, own), Layout::new(dims.into(), stride, 0))
            }
        }
    }

    /// Small numbers of both signs, or indices.
    fn storage(&self, place: usize, len: usize) -> CpuStorage {
        let real = |i: usize| (((i + 3 * place) * 37) % 101) as f64 / 16.0 - 3.0;
        let whole = |i: usize| ((i + 3 * place) * 5) % self.below.unwrap_or(7);
        let (reals, wholes) = ((0..len).map(real), (0..len).map(whole));
        match self.dtype {
            DType::U8 => CpuStorage::U8(wholes.map(|x| x as u8).collect()),
            DType::U32 => CpuStorage::U32(wholes.map(|x| x as u32).collect()),
            DType::I64 => CpuStorage::I64(wholes.map(|x| x as i64).collect()),
            DType::BF16 => CpuStorage::BF16(reals.map(bf16::from_f64).collect()),
            DType::F16 => CpuStorage::F16(reals.map(f16::from_f64).collect()),
            DType::F64 => CpuStorage::F64(reals.collect()),
            // Other dtypes do not travel, so there are no cases about them.
            _ => CpuStorage::F32(reals.map(|x| x as f32).collect()),
        }
    }
}
