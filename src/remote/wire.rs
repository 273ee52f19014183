//! Calls as bytes: hand-written records of a few bytes each. Separate because these bytes come from
//! strangers: decoding is total, checked, and capped, and nothing runs until a frame is whole.
//!
//! A call is an opcode, attributes, and operands. Its result's id is implicit (the next one), ids
//! of operands count back from it or from the first, whichever is shorter, and a buffer that is
//! meant as it was made needs no layout, so `x + y` is five bytes.

use candle_core::{DType, Layout, Shape};

use super::op::infer::DTYPES;
use super::op::{Binary, Call, Compare, Copy2d, Digest, Id, Op, Operand, Reduce, Unary};
use crate::backend::{
    Activation, Attention, Conv2d, Fused, GroupNorm, LayerNorm, Linear, Noise, Role, Size2d,
};
use crate::error::{Error, Result};

/// Dimensions of a tensor.
pub const MAX_RANK: usize = 8;
/// Operands of a call; only `cat` and linear combinations have many.
pub const MAX_OPERANDS: usize = 64;
/// Bytes of a host tensor that travels between ops; larger ones have a stream of their own.
pub const MAX_INLINE_BYTES: usize = 16 << 10;

/// Bytes from somebody else, read from the front.
pub struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// Reads `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Whether everything was read.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next byte, which stays.
    pub fn peek(&self) -> Option<u8> {
        self.0.first().copied()
    }

    /// The next `len` bytes.
    ///
    /// # Errors
    /// If there are fewer.
    pub fn bytes(&mut self, len: usize) -> Result<&'a [u8]> {
        let (bytes, rest) =
            self.0.split_at_checked(len).ok_or_else(|| malformed("is cut short"))?;
        self.0 = rest;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (array, rest) = self.0.split_first_chunk().ok_or_else(|| malformed("is cut short"))?;
        self.0 = rest;
        Ok(*array)
    }
}

/// An error about what a peer sent.
pub fn malformed(what: &str) -> Error {
    Error::remote(format!("malformed message: it {what}"))
}

/// Something that travels. `get` of what `put` wrote is the same; of anything else an error.
pub trait Wire: Sized {
    /// Appends the bytes.
    fn put(&self, out: &mut Vec<u8>);

    /// Reads them back.
    ///
    /// # Errors
    /// If they are no such thing.
    fn get(input: &mut Reader<'_>) -> Result<Self>;
}

/// LEB128, at most 10 bytes, in the one shortest form.
impl Wire for u64 {
    fn put(&self, out: &mut Vec<u8>) {
        let mut rest = *self;
        while rest >= 0x80 {
            out.push(rest as u8 | 0x80);
            rest >>= 7;
        }
        out.push(rest as u8);
    }

    fn get(input: &mut Reader<'_>) -> Result<Self> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let [byte] = input.array()?;
            let bits = u64::from(byte & 0x7f);
            if bits.checked_shl(shift).is_none_or(|shifted| shifted >> shift != bits) {
                break;
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                let is_shortest = byte != 0 || shift == 0;
                return if is_shortest { Ok(value) } else { Err(malformed("has a padded number")) };
            }
        }
        Err(malformed("has a number beyond 64 bits"))
    }
}

impl Wire for usize {
    fn put(&self, out: &mut Vec<u8>) {
        (*self as u64).put(out);
    }

    fn get(input: &mut Reader<'_>) -> Result<Self> {
        usize::try_from(u64::get(input)?).map_err(|_| malformed("has a number beyond this machine"))
    }
}

impl Wire for f64 {
    fn put(&self, out: &mut Vec<u8>) {
        out.extend(self.to_bits().to_le_bytes());
    }

    fn get(input: &mut Reader<'_>) -> Result<Self> {
        Ok(f64::from_bits(u64::from_le_bytes(input.array()?)))
    }
}

impl Wire for bool {
    fn put(&self, out: &mut Vec<u8>) {
        out.push(u8::from(*self));
    }

    fn get(input: &mut Reader<'_>) -> Result<Self> {
        match input.array()? {
            [0] => Ok(false),
            [1] => Ok(true),
            [_] => Err(malformed("has a truth value that is neither")),
        }
    }
}

impl<T: Wire> Wire for Option<T> {
    fn put(&self, out: &mut Vec<u8>) {
        self.is_some().put(out);
        if let Some(value) = self {
            value.put(out);
        }
    }

    fn get(input: &mut Reader<'_>) -> Result<Self> {
        if bool::get(input)? { T::get(input).map(Some) } else { Ok(None) }
    }
}

/// A list of at most `max` items, so that a length alone never allocates.
fn get_list<T: Wire>(input: &mut Reader<'_>, max: usize) -> Result<Vec<T>> {
    let len = usize::get(input)?;
    if len > max {
        return Err(malformed(&format!("has a list of {len}, more than {max}")));
    }
    (0..len).map(|_| T::get(input)).collect()
}

fn put_list<T: Wire>(items: &[T], out: &mut Vec<u8>) {
    items.len().put(out);
    items.iter().for_each(|item| item.put(out));
}

/// Dimensions or strides.
impl Wire for Vec<usize> {
    fn put(&self, out: &mut Vec<u8>) {
        put_list(self, out);
    }

    fn get(input: &mut Reader<'_>) -> Result<Self> {
        get_list(input, MAX_RANK)
    }
}

/// Coefficients.
impl Wire for Vec<f64> {
    fn put(&self, out: &mut Vec<u8>) {
        put_list(self, out);
    }

    fn get(input: &mut Reader<'_>) -> Result<Self> {
        get_list(input, MAX_OPERANDS)
    }
}

/// A small host tensor.
impl Wire for Vec<u8> {
    fn put(&self, out: &mut Vec<u8>) {
        self.len().put(out);
        out.extend(self);
    }

    fn get(input: &mut Reader<'_>) -> Result<Self> {
        let len = usize::get(input)?;
        if len > MAX_INLINE_BYTES {
            return Err(malformed(&format!(
                "has {len} inline bytes, more than {MAX_INLINE_BYTES}"
            )));
        }
        Ok(input.bytes(len)?.to_vec())
    }
}

impl Wire for Digest {
    fn put(&self, out: &mut Vec<u8>) {
        out.extend(self.0);
    }

    fn get(input: &mut Reader<'_>) -> Result<Self> {
        Ok(Self(input.array()?))
    }
}

/// By place in the list of dtypes that travel.
impl Wire for DType {
    fn put(&self, out: &mut Vec<u8>) {
        // A dtype beyond the list is refused by the storage before it gets here.
        out.push(DTYPES.iter().position(|dtype| dtype == self).map_or(u8::MAX, |i| i as u8));
    }

    fn get(input: &mut Reader<'_>) -> Result<Self> {
        let [place] = input.array()?;
        let dtype = DTYPES.get(usize::from(place)).copied();
        dtype.ok_or_else(|| malformed("has an unknown dtype"))
    }
}

/// Fields in order: naming all of them is checked by the compiler.
macro_rules! wire_struct {
    ($($name:ident { $($field:ident),* $(,)? })*) => { $(
        impl Wire for $name {
            fn put(&self, out: &mut Vec<u8>) {
                let Self { $($field),* } = self;
                $($field.put(out);)*
            }

            fn get(input: &mut Reader<'_>) -> Result<Self> {
                $(let $field = Wire::get(input)?;)*
                Ok(Self { $($field),* })
            }
        }
    )* };
}

/// A tag byte, then what the variant holds: a missing variant or field does not compile.
macro_rules! wire_enum {
    ($($name:ident {
        $($tag:literal => $variant:ident $(($inner:ident))? $({ $($field:ident),* $(,)? })?,)*
    })*) => { $(
        impl Wire for $name {
            fn put(&self, out: &mut Vec<u8>) {
                match self {
                    $(Self::$variant $(($inner))? $({ $($field),* })? => {
                        out.push($tag);
                        $($inner.put(out);)?
                        $($($field.put(out);)*)?
                    })*
                }
            }

            fn get(input: &mut Reader<'_>) -> Result<Self> {
                let [tag] = input.array()?;
                match tag {
                    $($tag => {
                        $(let $inner = Wire::get(input)?;)?
                        $($(let $field = Wire::get(input)?;)*)?
                        Ok(Self::$variant $(($inner))? $({ $($field),* })?)
                    })*
                    _ => Err(malformed(concat!("has an unknown ", stringify!($name)))),
                }
            }
        }
    )* };
}

/// Both, and the text of the tables: what client and worker must agree on.
macro_rules! schema {
    (structs { $($structs:tt)* } enums { $($enums:tt)* }) => {
        /// The tables as text. Its hash is in the handshake.
        pub const SCHEMA: &str = concat!(stringify!($($structs)*), stringify!($($enums)*));
        wire_struct! { $($structs)* }
        wire_enum! { $($enums)* }
    };
}

schema! {
    structs {
        Size2d { height, width }
        Noise { seed, skip }
        Conv2d { stride, padding, upsample, residual }
        GroupNorm { groups, eps, silu }
        LayerNorm { eps }
        Attention { heads, scale, causal }
        Linear { activation, residual }
        Copy2d {
            rows, columns, source_stride, target_stride, source_offset, target_offset,
        }
    }
    enums {
        Activation { 0 => Identity, 1 => Silu, 2 => QuickGelu, 3 => Gelu, }
        Role { 0 => Linear, 1 => Conv2d { stride }, }
        Fused {
            0 => Conv2d(op),
            1 => GroupNorm(op),
            2 => LayerNorm(op),
            3 => Attention(op),
            4 => Linear(op),
            5 => Geglu,
            6 => LinearCombination(coefficients),
            7 => Cat { dim },
            8 => Pixels,
            9 => Prepare(role),
        }
        Unary {
            0 => Exp, 1 => Log, 2 => Sin, 3 => Cos, 4 => Abs, 5 => Neg, 6 => Recip, 7 => Sqr,
            8 => Sqrt, 9 => Gelu, 10 => GeluErf, 11 => Erf, 12 => Relu, 13 => Silu, 14 => Tanh,
            15 => Floor, 16 => Ceil, 17 => Round, 18 => Sign,
        }
        Binary { 0 => Add, 1 => Sub, 2 => Mul, 3 => Div, 4 => Maximum, 5 => Minimum, }
        Reduce { 0 => Sum, 1 => Min, 2 => Max, 3 => ArgMin, 4 => ArgMax, }
        Compare { 0 => Eq, 1 => Ne, 2 => Le, 3 => Ge, 4 => Lt, 5 => Gt, }
        Op {
            0 => Affine { mul, add },
            1 => Powf { exponent },
            2 => Elu { alpha },
            3 => Reduce { op, dims },
            4 => Compare(op),
            5 => Cast { dtype },
            6 => Unary(op),
            7 => Binary(op),
            8 => Where,
            9 => AvgPool2d { kernel, stride },
            10 => MaxPool2d { kernel, stride },
            11 => UpsampleNearest1d { width },
            12 => UpsampleNearest2d { size },
            13 => UpsampleBilinear2d { size, align_corners, scale_height, scale_width },
            14 => Gather { dim },
            15 => IndexSelect { dim },
            16 => IndexAdd { dim },
            17 => Matmul,
            18 => Copy,
            19 => Fused(op),
            20 => ScatterSet { dim },
            21 => ScatterAddSet { dim },
            22 => CopyStrided { offset },
            23 => Copy2d(copy),
            24 => ConstSet { value },
            25 => Zeros { dtype, dims },
            26 => Randn { noise, dtype, dims },
            27 => RandUniform { from, to, dtype, dims },
            28 => RandNormal { mean, std, dtype, dims },
            29 => Constant { dtype, bytes },
            30 => Received { transfer, dtype, len },
            31 => Weight { digest, dtype, dims },
        }
    }
}

/// Shape, offset, and strides only where they are not row-major.
impl Wire for Layout {
    fn put(&self, out: &mut Vec<u8>) {
        let has_strides = !self.is_contiguous();
        put_list(self.dims(), out);
        // One number for both; an offset of more than 63 bits lies in no buffer.
        ((self.start_offset() as u64) << 1 | u64::from(has_strides)).put(out);
        if has_strides {
            self.stride().iter().for_each(|stride| stride.put(out));
        }
    }

    fn get(input: &mut Reader<'_>) -> Result<Self> {
        let dims: Vec<usize> = Wire::get(input)?;
        let number = u64::get(input)?;
        let offset = usize::try_from(number >> 1);
        let offset = offset.map_err(|_| malformed("has an offset beyond this machine"))?;
        let size = dims.iter().try_fold(1usize, |size, &dim| size.checked_mul(dim.max(1)));
        if size.is_none() {
            return Err(malformed("has a shape beyond this machine"));
        }
        if number & 1 == 0 {
            return Ok(Layout::contiguous_with_offset(dims, offset));
        }
        let stride = dims.iter().map(|_| usize::get(input)).collect::<Result<_>>()?;
        Ok(Layout::new(Shape::from(dims), stride, offset))
    }
}

/// Appends the call whose result will be `next`: [`Call::put`] without a call.
pub fn put_call<'a>(
    op: &Op,
    args: impl ExactSizeIterator<Item = (Id, Option<&'a Layout>)>,
    next: Id,
    out: &mut Vec<u8>,
) {
    op.put(out);
    args.len().put(out);
    for (id, layout) in args {
        // Results are named from the end, and weights, which are old, from the beginning. One
        // number for that, for which of both it is, and for whether a layout follows.
        let back = next.0.wrapping_sub(id.0);
        let (place, from_start) = if id.0 < back { (id.0, 2) } else { (back, 0) };
        (place << 2 | from_start | u64::from(layout.is_some())).put(out);
        if let Some(layout) = layout {
            layout.put(out);
        }
    }
}

impl Call {
    /// Appends the call whose result will be `next`.
    pub fn put(&self, next: Id, out: &mut Vec<u8>) {
        put_call(&self.op, self.args.iter().map(|arg| (arg.id, arg.layout.as_ref())), next, out);
    }

    /// Reads the call whose result will be `next`.
    ///
    /// # Errors
    /// If there is none, or an operand would not have been made before.
    pub fn get(next: Id, input: &mut Reader<'_>) -> Result<Self> {
        let op = Op::get(input)?;
        let count = usize::get(input)?;
        if count > MAX_OPERANDS {
            return Err(malformed(&format!("has {count} operands, more than {MAX_OPERANDS}")));
        }
        let unmade = || malformed("names a buffer before it is made");
        let operand = |input: &mut Reader<'_>| {
            let number = u64::get(input)?;
            let place = number >> 2;
            let id = if number & 2 == 2 { Some(place) } else { next.0.checked_sub(place) };
            let id = Id(id.filter(|&id| id < next.0).ok_or_else(unmade)?);
            let layout = if number & 1 == 1 { Some(Layout::get(input)?) } else { None };
            Ok(Operand { id, layout })
        };
        let args = (0..count).map(|_| operand(input)).collect::<Result<_>>()?;
        Ok(Self { op, args })
    }
}
