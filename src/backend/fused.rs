//! The fused ops: one closed enum with named attributes, and the one definition of what each gives
//! ([`Fused::infer`]). Separate because tensors, every backend and the wire all name these.
//!
//! **Memory order is part of the definition**: image ops ([`Conv2d`], [`GroupNorm`]) give
//! channels-last results, matrix ops row-major ones, `cat` keeps its first operand's order.

use candle_core::{DType, Layout};

use crate::backend::order::{channels_last, dense_in_order, memory_order};
use crate::backend::weighted::Weighted;
use crate::error::{Error, Result};

/// An op that candle's traits lack or only have in pieces.
#[derive(Debug, Clone, PartialEq)]
pub enum Fused {
    /// `(x, weight, bias?, residual?)`: convolution of an image.
    Conv2d(Conv2d),
    /// `(x, weight, bias)`: normalisation over groups of channels.
    GroupNorm(GroupNorm),
    /// `(x, weight, bias)`: normalisation over the last dimension.
    LayerNorm(LayerNorm),
    /// `(query, key, value)`: softmax(q kᵀ · scale) v.
    Attention(Attention),
    /// `(x, weight, bias?, residual?)`: x weightᵀ + bias, then an activation.
    Linear(Linear),
    /// `(x)`: of the halves `a, b` of the last dimension, `a · gelu(b)` with the exact (erf) gelu,
    /// as diffusers' `GEGLU`.
    Geglu,
    /// `(x₀, x₁, …)`: Σ cᵢ xᵢ of equal shapes, summed in f64 in this order and rounded once.
    LinearCombination(Vec<f64>),
    /// `(x₀, x₁, …)`: joined along a dimension.
    Cat {
        /// The dimension along which the operands follow each other.
        dim: usize,
    },
    /// `(x)`: a decoded image `(batch, 3, height, width)` in −1..1 to `(batch, height, width, 3)`
    /// u8, as diffusers' `VaeImageProcessor`: x/2 + 0.5, clamped to 0..1, times 255, rounded half
    /// to even.
    Pixels,
    /// `(weight)`: the form in which the device's kernels want a weight; done once, at load. The
    /// result is opaque: only the weight operand of the op that `Role` names takes it.
    Prepare(Role),
}

/// Convolution of `(batch, channels, height, width)` with `(out, channels, kernel, kernel)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conv2d {
    /// Distance of the window between neighbouring outputs.
    pub stride: usize,
    /// Zeros on each side.
    pub padding: usize,
    /// The input is first enlarged to this size by repeating its nearest pixels
    /// (`source = ⌊target · in / out⌋`): the upsamplers of UNet and VAE in one op.
    pub upsample: Option<Size2d>,
    /// Whether the last operand is added to the result, of whose shape it is.
    pub residual: bool,
}

/// Height and width of an image or of latents, in pixels of that image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Size2d {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

/// As torch's `GroupNorm`, optionally followed by SiLU.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GroupNorm {
    /// Number of groups; divides the channels.
    pub groups: usize,
    /// Added to the variance.
    pub eps: f64,
    /// Whether x·sigmoid(x) follows.
    pub silu: bool,
}

/// As torch's `LayerNorm` over the last dimension.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerNorm {
    /// Added to the variance.
    pub eps: f64,
}

/// As torch's `scaled_dot_product_attention` on `(batch, sequence, heads · head_dim)` operands.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Attention {
    /// Number of heads, which share the last dimension evenly.
    pub heads: usize,
    /// Multiplies the scores, usually 1/√head_dim.
    pub scale: f64,
    /// Whether a position sees only itself and those before it.
    pub causal: bool,
}

/// A matrix product with a weight `(out, in)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Linear {
    /// Applied to the result.
    pub activation: Activation,
    /// Whether the last operand is added after that; it is of the result's shape.
    pub residual: bool,
}

/// What follows a linear layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// Nothing.
    Identity,
    /// x · sigmoid(x).
    Silu,
    /// x · sigmoid(1.702 x), OpenAI's approximation.
    QuickGelu,
    /// The exact gelu, by erf.
    Gelu,
}

/// What a prepared weight is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// The weight `(out, in)` of [`Linear`].
    Linear,
    /// The weight `(out, in, kernel, kernel)` of [`Conv2d`].
    Conv2d {
        /// Of the convolutions that use it: which form is the fastest depends on it.
        stride: usize,
    },
}

/// dtype and layout of an op's result.
#[derive(Debug, Clone, PartialEq)]
pub struct Meta {
    /// The element type.
    pub dtype: DType,
    /// Shape, strides and offset, in elements.
    pub layout: Layout,
}

/// dtype and layout of an operand.
#[derive(Debug, Clone, Copy)]
pub struct MetaRef<'a> {
    /// The element type.
    pub dtype: DType,
    /// Shape, strides and offset, in elements.
    pub layout: &'a Layout,
}

impl Meta {
    /// A row-major result.
    ///
    /// # Errors
    /// If the number of bytes overflows.
    pub fn row_major(dtype: DType, dims: Vec<usize>) -> Result<Self> {
        check_size(dtype, &dims)?;
        Ok(Self { dtype, layout: Layout::contiguous(dims) })
    }

    /// An image `(batch, channels, height, width)` whose channels lie side by side in memory.
    ///
    /// # Errors
    /// If the number of bytes overflows.
    pub fn channels_last(dtype: DType, dims: [usize; 4]) -> Result<Self> {
        check_size(dtype, &dims)?;
        Ok(Self { dtype, layout: channels_last(dims) })
    }
}

impl Fused {
    /// For messages and statistics.
    pub fn name(&self) -> &'static str {
        match self {
            Fused::Conv2d(_) => "conv2d",
            Fused::GroupNorm(_) => "group_norm",
            Fused::LayerNorm(_) => "layer_norm",
            Fused::Attention(_) => "attention",
            Fused::Linear(_) => "linear",
            Fused::Geglu => "geglu",
            Fused::LinearCombination(_) => "linear_combination",
            Fused::Cat { .. } => "cat",
            Fused::Pixels => "pixels",
            Fused::Prepare(_) => "prepare",
        }
    }

    /// The result's dtype and whole layout, or why the operands do not fit. Never panics: on a
    /// worker the operands come from the network.
    ///
    /// # Errors
    /// Names the op and the shapes.
    pub fn infer(&self, args: &[MetaRef<'_>]) -> Result<Meta> {
        self.infer_checked(args).map_err(|reason| {
            let shapes: Vec<_> = args
                .iter()
                .map(|a| format!("{:?} {}", a.layout.dims(), a.dtype.as_str()))
                .collect();
            Error::other(format!("{} of {}: {reason}", self.name(), shapes.join(", ")))
        })
    }

    fn infer_checked(&self, args: &[MetaRef<'_>]) -> Result<Meta> {
        match self {
            Fused::Conv2d(attributes) => attributes.infer(args),
            Fused::GroupNorm(attributes) => attributes.infer(args),
            Fused::LayerNorm(attributes) => attributes.infer(args),
            Fused::Attention(attributes) => attributes.infer(args),
            Fused::Linear(attributes) => attributes.infer(args),
            Fused::Geglu => infer_geglu(args),
            Fused::LinearCombination(coefficients) => infer_linear_combination(coefficients, args),
            Fused::Cat { dim } => infer_cat(*dim, args),
            Fused::Pixels => infer_pixels(args),
            Fused::Prepare(role) => infer_prepare(*role, args),
        }
    }
}

impl Conv2d {
    /// A window that moves by one and keeps the size.
    pub fn same(kernel: usize) -> Self {
        Self { stride: 1, padding: kernel / 2, upsample: None, residual: false }
    }

    /// The size that the window moves over: the input's, or what it is enlarged to.
    pub fn input_size(&self, height: usize, width: usize) -> Size2d {
        self.upsample.unwrap_or(Size2d { height, width })
    }

    fn infer(&self, args: &[MetaRef<'_>]) -> Result<Meta> {
        let Weighted { x, weight, bias, residual } = Weighted::of(args, self.residual)?;
        let dtype = float(args)?;
        let (&[batch, channels, height, width], &[out, inner, kernel_h, kernel_w]) =
            (x.layout.dims(), weight.layout.dims())
        else {
            return Err(Error::other("the image and the weight must have 4 dimensions"));
        };
        if inner != channels {
            return Err(Error::other(format!("the weight takes {inner} channels, not {channels}")));
        }
        check_bias(bias, out)?;
        let size = self.input_size(height, width);
        let enlarges = self.upsample.is_none() || (height > 0 && width > 0);
        if self.stride == 0 || kernel_h == 0 || kernel_w == 0 || !enlarges {
            return Err(Error::other("stride, kernel and image must not be empty"));
        }
        let dims =
            [batch, out, self.slide(size.height, kernel_h)?, self.slide(size.width, kernel_w)?];
        check_residual(residual, &dims)?;
        Meta::channels_last(dtype, dims)
    }

    fn slide(&self, size: usize, kernel: usize) -> Result<usize> {
        self.padding
            .checked_mul(2)
            .and_then(|padding| size.checked_add(padding)?.checked_sub(kernel))
            .map(|room| room / self.stride + 1)
            .ok_or_else(|| Error::other(format!("a kernel of {kernel} does not fit into {size}")))
    }
}

impl GroupNorm {
    fn infer(&self, args: &[MetaRef<'_>]) -> Result<Meta> {
        let [x, weight, bias] = exactly(args)?;
        let dtype = float(args)?;
        let &[batch, channels, height, width] = x.layout.dims() else {
            return Err(Error::other("the image must have 4 dimensions"));
        };
        check_vector(weight, "weight", channels)?;
        check_vector(bias, "bias", channels)?;
        if self.groups == 0 || !channels.is_multiple_of(self.groups) {
            return Err(Error::other(format!("{} groups of {channels} channels", self.groups)));
        }
        Meta::channels_last(dtype, [batch, channels, height, width])
    }
}

impl LayerNorm {
    fn infer(&self, args: &[MetaRef<'_>]) -> Result<Meta> {
        let [x, weight, bias] = exactly(args)?;
        let (_, last) = split_last(x)?;
        check_vector(weight, "weight", last)?;
        check_vector(bias, "bias", last)?;
        Meta::row_major(float(args)?, x.layout.dims().to_vec())
    }
}

impl Attention {
    fn infer(&self, args: &[MetaRef<'_>]) -> Result<Meta> {
        let [query, key, value] = exactly(args)?;
        let dtype = float(args)?;
        let (&[batch, queries, inner], &[key_batch, keys, key_inner]) =
            (query.layout.dims(), key.layout.dims())
        else {
            return Err(Error::other("operands must be (batch, sequence, heads · head_dim)"));
        };
        if key.layout.dims() != value.layout.dims() || batch != key_batch || inner != key_inner {
            return Err(Error::other("query, key and value do not fit each other"));
        }
        if self.heads == 0 || inner == 0 || inner % self.heads != 0 {
            return Err(Error::other(format!("{} heads share {inner}", self.heads)));
        }
        if keys == 0 || (self.causal && keys != queries) {
            return Err(Error::other(format!("{queries} queries look at {keys} keys")));
        }
        Meta::row_major(dtype, vec![batch, queries, inner])
    }
}

impl Linear {
    fn infer(&self, args: &[MetaRef<'_>]) -> Result<Meta> {
        let Weighted { x, weight, bias, residual } = Weighted::of(args, self.residual)?;
        let dtype = float(args)?;
        let (rows, last) = split_last(*x)?;
        let &[out, inner] = weight.layout.dims() else {
            return Err(Error::other("the weight must be (out, in)"));
        };
        if last != inner {
            return Err(Error::other(format!("the weight takes {inner} features, not {last}")));
        }
        check_bias(bias, out)?;
        let dims = [rows, &[out]].concat();
        check_residual(residual, &dims)?;
        Meta::row_major(dtype, dims)
    }
}

fn infer_geglu(args: &[MetaRef<'_>]) -> Result<Meta> {
    let [x] = exactly(args)?;
    let (rows, last) = split_last(x)?;
    if last % 2 != 0 {
        return Err(Error::other("the last dimension has no halves"));
    }
    Meta::row_major(float(args)?, [rows, &[last / 2]].concat())
}

fn infer_linear_combination(coefficients: &[f64], args: &[MetaRef<'_>]) -> Result<Meta> {
    let first = args.first().ok_or_else(|| Error::other("no operands"))?;
    if coefficients.len() != args.len() {
        let (have, want) = (args.len(), coefficients.len());
        return Err(Error::other(format!("{want} coefficients for {have} operands")));
    }
    if args.iter().any(|arg| arg.layout.dims() != first.layout.dims()) {
        return Err(Error::other("the operands differ in shape"));
    }
    in_order_of(first, float(args)?, first.layout.dims())
}

fn infer_cat(dim: usize, args: &[MetaRef<'_>]) -> Result<Meta> {
    let first = args.first().ok_or_else(|| Error::other("no operands"))?;
    let mut dims = first.layout.dims().to_vec();
    let Some(&size) = dims.get(dim) else {
        return Err(Error::other(format!("there is no dimension {dim}")));
    };
    let mut total = size;
    for arg in &args[1..] {
        let other = arg.layout.dims();
        let fits = other.len() == dims.len()
            && (0..dims.len()).all(|d| d == dim || dims[d] == other[d])
            && arg.dtype == first.dtype;
        if !fits {
            return Err(Error::other(format!("the operands differ beside dimension {dim}")));
        }
        total = total.checked_add(other[dim]).ok_or_else(|| Error::other("too large"))?;
    }
    dims[dim] = total;
    in_order_of(first, first.dtype, &dims)
}

fn infer_pixels(args: &[MetaRef<'_>]) -> Result<Meta> {
    let [x] = exactly(args)?;
    float(args)?;
    let &[batch, 3, height, width] = x.layout.dims() else {
        return Err(Error::other("an image has the shape (batch, 3, height, width)"));
    };
    Meta::row_major(DType::U8, vec![batch, height, width, 3])
}

fn infer_prepare(role: Role, args: &[MetaRef<'_>]) -> Result<Meta> {
    let [weight] = exactly(args)?;
    let rank = match role {
        Role::Linear => 2,
        Role::Conv2d { .. } => 4,
    };
    if weight.layout.dims().len() != rank {
        return Err(Error::other(format!("a {role:?} weight has {rank} dimensions")));
    }
    Meta::row_major(float(args)?, weight.layout.dims().to_vec())
}

fn in_order_of(first: &MetaRef<'_>, dtype: DType, dims: &[usize]) -> Result<Meta> {
    check_size(dtype, dims)?;
    Ok(Meta { dtype, layout: dense_in_order(dims, &memory_order(first.layout)) })
}

/// Neither the elements nor the bytes of a result may overflow, empty dimensions notwithstanding.
fn check_size(dtype: DType, dims: &[usize]) -> Result<()> {
    dims.iter()
        .try_fold(dtype.size_in_bytes(), |bytes, &dim| bytes.checked_mul(dim.max(1)))
        .filter(|&bytes| isize::try_from(bytes).is_ok())
        .map(|_| ())
        .ok_or_else(|| Error::other(format!("a result of shape {dims:?} is too large")))
}

fn exactly<'a, const N: usize>(args: &[MetaRef<'a>]) -> Result<[MetaRef<'a>; N]> {
    args.try_into().map_err(|_| Error::other(format!("takes {N} operands, not {}", args.len())))
}

fn check_bias(bias: Option<&MetaRef<'_>>, out: usize) -> Result<()> {
    bias.map_or(Ok(()), |bias| check_vector(*bias, "bias", out))
}

fn check_residual(residual: Option<&MetaRef<'_>>, dims: &[usize]) -> Result<()> {
    match residual.map(|residual| residual.layout.dims()) {
        Some(found) if found != dims => {
            Err(Error::other(format!("a residual {found:?} is added to {dims:?}")))
        }
        Some(_) | None => Ok(()),
    }
}

fn check_vector(vector: MetaRef<'_>, what: &str, len: usize) -> Result<()> {
    if vector.layout.dims() != [len] {
        return Err(Error::other(format!("the {what} must have {len} elements")));
    }
    Ok(())
}

fn split_last<'a>(x: MetaRef<'a>) -> Result<(&'a [usize], usize)> {
    match x.layout.dims().split_last() {
        Some((&last, rows)) if last > 0 => Ok((rows, last)),
        _ => Err(Error::other("the last dimension must not be empty")),
    }
}

/// The one float dtype of all operands.
fn float(args: &[MetaRef<'_>]) -> Result<DType> {
    let first = args.first().ok_or_else(|| Error::other("no operands"))?.dtype;
    let computes = matches!(first, DType::F32 | DType::F16 | DType::BF16);
    if !computes || args.iter().any(|arg| arg.dtype != first) {
        return Err(Error::other("operands must all be f32, all f16 or all bf16"));
    }
    Ok(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn infer_refuses_what_does_not_fit_and_never_panics() {
        let meta = |dims: &[usize]| Layout::contiguous(dims.to_vec());
        let check = |op: Fused, shapes: &[&[usize]], expected: Option<&[usize]>| {
            let layouts: Vec<Layout> = shapes.iter().map(|dims| meta(dims)).collect();
            let args: Vec<_> =
                layouts.iter().map(|layout| MetaRef { dtype: DType::F32, layout }).collect();
            let found = op.infer(&args).ok().map(|meta| meta.layout.dims().to_vec());
            assert_eq!(found.as_deref(), expected, "{op:?} {shapes:?}");
        };
        let conv = Fused::Conv2d(Conv2d { stride: 2, padding: 1, upsample: None, residual: false });
        check(conv.clone(), &[&[1, 4, 9, 8], &[6, 4, 3, 3], &[6]], Some(&[1, 6, 5, 4]));
        check(conv.clone(), &[&[1, 4, 9, 8], &[6, 5, 3, 3], &[6]], None);
        check(conv.clone(), &[&[1, 4, 9, 8], &[6, 4, 3, 3], &[7]], None);
        check(conv.clone(), &[&[1, 4, 0, 8], &[6, 4, 3, 3]], None);
        check(conv, &[&[1, 4, 9, 8]], None);
        let huge = Conv2d { stride: 1, padding: usize::MAX, upsample: None, residual: false };
        check(Fused::Conv2d(huge), &[&[1, 4, 9, 8], &[6, 4, 3, 3]], None);
        let attention = Fused::Attention(Attention { heads: 2, scale: 1.0, causal: true });
        check(attention.clone(), &[&[1, 5, 8], &[1, 5, 8], &[1, 5, 8]], Some(&[1, 5, 8]));
        check(attention, &[&[1, 5, 8], &[1, 6, 8], &[1, 6, 8]], None);
        check(Fused::Cat { dim: 1 }, &[&[2, 3], &[2, 4]], Some(&[2, 7]));
        check(Fused::Cat { dim: 2 }, &[&[2, 3], &[2, 4]], None);
        check(Fused::Geglu, &[&[2, 6]], Some(&[2, 3]));
        check(Fused::Pixels, &[&[1, 3, 4, 5]], Some(&[1, 4, 5, 3]));
    }
}
