//! The op table: every op that can cross the wire, once. What it is ([`Op`]), what it gives
//! ([`Op::infer`]), what runs it ([`execute`](execute::execute)) and which cases test it
//! ([`cases`](cases::cases)) follow from this enum; the compiler names what a new variant lacks.
//!
//! Separate from [`backend`](crate::backend) because operands here are foreign: everything is
//! checked before a kernel sees it.

pub mod cases;
pub mod execute;
pub mod infer;

use candle_core::op::{BinaryOpT, CmpOp, ReduceOp, UnaryOpT};
use candle_core::{DType, Layout};

use crate::backend::{Fused, Noise, Size2d};

/// One op with its attributes. Scalars are attributes, never tensors.
#[derive(Debug, Clone, PartialEq)]
pub enum Op {
    /// `(x)`: mul · x + add.
    Affine { mul: f64, add: f64 },
    /// `(x)`: x to a power.
    Powf { exponent: f64 },
    /// `(x)`: x where positive, else alpha · (eˣ − 1).
    Elu { alpha: f64 },
    /// `(x)`: sum, minimum, maximum or where they are, over dimensions that stay with size 1.
    Reduce { op: Reduce, dims: Vec<usize> },
    /// `(a, b)`: 1 where the comparison holds, else 0, as u8.
    Compare(Compare),
    /// `(x)`: another dtype; of the same dtype a row-major copy.
    Cast { dtype: DType },
    /// `(x)`
    Unary(Unary),
    /// `(a, b)`
    Binary(Binary),
    /// `(condition, yes, no)`
    Where,
    /// `(x)`: mean over windows.
    AvgPool2d { kernel: Size2d, stride: Size2d },
    /// `(x)`: maximum over windows.
    MaxPool2d { kernel: Size2d, stride: Size2d },
    /// `(x)`: repeats pixels of (batch, channels, width).
    UpsampleNearest1d { width: usize },
    /// `(x)`: repeats pixels of (batch, channels, height, width).
    UpsampleNearest2d { size: Size2d },
    /// `(x)`: interpolates pixels of (batch, channels, height, width).
    UpsampleBilinear2d {
        size: Size2d,
        align_corners: bool,
        scale_height: Option<f64>,
        scale_width: Option<f64>,
    },
    /// `(x, ids)`: as torch's `gather`.
    Gather { dim: usize },
    /// `(x, ids)`: entries of a dimension.
    IndexSelect { dim: usize },
    /// `(x, ids, source)`: x with source added at ids.
    IndexAdd { dim: usize },
    /// `(a, b)`: matrices (…, m, k) and (…, k, n).
    Matmul,
    /// `(x)`: the whole storage, whatever the view.
    Copy,
    /// An op of ours.
    Fused(Fused),
    /// `(target, ids, source)`, in place: as torch's `scatter_`.
    ScatterSet { dim: usize },
    /// `(target, ids, source)`, in place: as torch's `scatter_add_`.
    ScatterAddSet { dim: usize },
    /// `(target, source)`, in place: the source in row-major order, from `offset` on.
    CopyStrided { offset: usize },
    /// `(target, source)`, in place: rows of one buffer into another.
    Copy2d(Copy2d),
    /// `(target)`, in place: one value at every element of the view.
    ConstSet { value: f64 },
    /// `()`
    Zeros { dtype: DType, dims: Vec<usize> },
    /// `()`: torch's noise.
    Randn { noise: Noise, dtype: DType, dims: Vec<usize> },
    /// `()`: the device's own noise, as candle's `rand_uniform`.
    RandUniform { from: f64, to: f64, dtype: DType, dims: Vec<usize> },
    /// `()`: the device's own noise, as candle's `rand_normal`.
    RandNormal { mean: f64, std: f64, dtype: DType, dims: Vec<usize> },
    /// `()`: a small host tensor, little-endian.
    Constant { dtype: DType, bytes: Vec<u8> },
    /// `()`: a large host tensor that arrives on a stream of its own.
    Received { transfer: u64, dtype: DType, len: usize },
    /// `()`: a weight by its content, cast to `dtype`.
    Weight { digest: Digest, dtype: DType, dims: Vec<usize> },
}

/// BLAKE3-256 of a tensor's dtype, shape and row-major bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(pub [u8; 32]);

/// As candle's `copy2d`; all in elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copy2d {
    pub rows: usize,
    pub columns: usize,
    pub source_stride: usize,
    pub target_stride: usize,
    pub source_offset: usize,
    pub target_offset: usize,
}

/// One op to run: on the wire its result's id is implicit, the next in order.
#[derive(Debug, Clone, PartialEq)]
pub struct Call {
    /// What to run.
    pub op: Op,
    /// On what.
    pub args: Vec<Operand>,
}

/// A view of a buffer of this session.
#[derive(Debug, Clone, PartialEq)]
pub struct Operand {
    /// The buffer.
    pub id: Id,
    /// Which of its elements, in which order; `None` is all of them as they lie: the layout that
    /// [`Op::infer`] gave when the buffer was made.
    pub layout: Option<Layout>,
}

/// A buffer of one session, numbered by the client in the order of creation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Id(pub u64);

impl Op {
    /// Whether the op writes into its first operand instead of making a buffer.
    pub fn is_in_place(&self) -> bool {
        match self {
            Op::ScatterSet { .. }
            | Op::ScatterAddSet { .. }
            | Op::CopyStrided { .. }
            | Op::Copy2d(_)
            | Op::ConstSet { .. } => true,
            Op::Affine { .. }
            | Op::Powf { .. }
            | Op::Elu { .. }
            | Op::Reduce { .. }
            | Op::Compare(_)
            | Op::Cast { .. }
            | Op::Unary(_)
            | Op::Binary(_)
            | Op::Where
            | Op::AvgPool2d { .. }
            | Op::MaxPool2d { .. }
            | Op::UpsampleNearest1d { .. }
            | Op::UpsampleNearest2d { .. }
            | Op::UpsampleBilinear2d { .. }
            | Op::Gather { .. }
            | Op::IndexSelect { .. }
            | Op::IndexAdd { .. }
            | Op::Matmul
            | Op::Copy
            | Op::Fused(_)
            | Op::Zeros { .. }
            | Op::Randn { .. }
            | Op::RandUniform { .. }
            | Op::RandNormal { .. }
            | Op::Constant { .. }
            | Op::Received { .. }
            | Op::Weight { .. } => false,
        }
    }
}

/// A table of candle's ops of one kind: our name for each is candle's type.
macro_rules! table {
    ($(#[$doc:meta])* $table:ident of $kind:ident: $($op:ident),* $(,)?) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $table { $(#[allow(missing_docs)] $op),* }

        impl $table {
            /// Every op of the table.
            pub const ALL: &[$table] = &[$($table::$op),*];

            /// The op of candle's type `T`, which is not `'static`: known by its name.
            pub fn of<T: $kind>() -> Option<Self> {
                $(if T::NAME == <candle_core::op::$op as $kind>::NAME {
                    return Some($table::$op);
                })*
                None
            }

            /// candle's name.
            pub fn name(self) -> &'static str {
                match self { $($table::$op => <candle_core::op::$op as $kind>::NAME),* }
            }
        }
    };
}

table! {
    /// candle's elementwise ops with one operand.
    Unary of UnaryOpT: Exp, Log, Sin, Cos, Abs, Neg, Recip, Sqr, Sqrt, Gelu, GeluErf, Erf, Relu,
    Silu, Tanh, Floor, Ceil, Round, Sign,
}

table! {
    /// candle's elementwise ops with two operands.
    Binary of BinaryOpT: Add, Sub, Mul, Div, Maximum, Minimum,
}

/// candle's reductions, which are not ours to derive from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reduce {
    Sum,
    Min,
    Max,
    ArgMin,
    ArgMax,
}

/// candle's comparisons, which are not ours to derive from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compare {
    Eq,
    Ne,
    Le,
    Ge,
    Lt,
    Gt,
}

impl Compare {
    /// Every op of the table.
    pub const ALL: &[Compare] =
        &[Compare::Eq, Compare::Ne, Compare::Le, Compare::Ge, Compare::Lt, Compare::Gt];
}

impl From<ReduceOp> for Reduce {
    fn from(op: ReduceOp) -> Self {
        match op {
            ReduceOp::Sum => Self::Sum,
            ReduceOp::Min => Self::Min,
            ReduceOp::Max => Self::Max,
            ReduceOp::ArgMin => Self::ArgMin,
            ReduceOp::ArgMax => Self::ArgMax,
        }
    }
}

impl From<Reduce> for ReduceOp {
    fn from(op: Reduce) -> Self {
        match op {
            Reduce::Sum => Self::Sum,
            Reduce::Min => Self::Min,
            Reduce::Max => Self::Max,
            Reduce::ArgMin => Self::ArgMin,
            Reduce::ArgMax => Self::ArgMax,
        }
    }
}

impl From<CmpOp> for Compare {
    fn from(op: CmpOp) -> Self {
        match op {
            CmpOp::Eq => Self::Eq,
            CmpOp::Ne => Self::Ne,
            CmpOp::Le => Self::Le,
            CmpOp::Ge => Self::Ge,
            CmpOp::Lt => Self::Lt,
            CmpOp::Gt => Self::Gt,
        }
    }
}

impl From<Compare> for CmpOp {
    fn from(op: Compare) -> Self {
        match op {
            Compare::Eq => Self::Eq,
            Compare::Ne => Self::Ne,
            Compare::Le => Self::Le,
            Compare::Ge => Self::Ge,
            Compare::Lt => Self::Lt,
            Compare::Gt => Self::Gt,
        }
    }
}

impl Op {
    /// For messages and statistics.
    pub fn name(&self) -> &'static str {
        match self {
            Op::Affine { .. } => "affine",
            Op::Powf { .. } => "powf",
            Op::Elu { .. } => "elu",
            Op::Reduce { .. } => "reduce",
            Op::Compare(_) => "compare",
            Op::Cast { .. } => "cast",
            Op::Unary(op) => op.name(),
            Op::Binary(op) => op.name(),
            Op::Where => "where",
            Op::AvgPool2d { .. } => "avg_pool2d",
            Op::MaxPool2d { .. } => "max_pool2d",
            Op::UpsampleNearest1d { .. } => "upsample_nearest1d",
            Op::UpsampleNearest2d { .. } => "upsample_nearest2d",
            Op::UpsampleBilinear2d { .. } => "upsample_bilinear2d",
            Op::Gather { .. } => "gather",
            Op::IndexSelect { .. } => "index_select",
            Op::IndexAdd { .. } => "index_add",
            Op::Matmul => "matmul",
            Op::Copy => "copy",
            Op::Fused(op) => op.name(),
            Op::ScatterSet { .. } => "scatter",
            Op::ScatterAddSet { .. } => "scatter_add",
            Op::CopyStrided { .. } => "copy_strided",
            Op::Copy2d(_) => "copy2d",
            Op::ConstSet { .. } => "const_set",
            Op::Zeros { .. } => "zeros",
            Op::Randn { .. } => "randn",
            Op::RandUniform { .. } => "rand_uniform",
            Op::RandNormal { .. } => "rand_normal",
            Op::Constant { .. } => "constant",
            Op::Received { .. } => "received",
            Op::Weight { .. } => "weight",
        }
    }
}
