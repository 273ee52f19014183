//! The factors of one change: which part a key names, and whether they fit each other and their
//! weight. Separate because this knows shapes and no names of modules.

use candle_core::DType;

use super::scaling::Scaling;
use crate::backend::host::HostTensor;
use crate::error::{Error, Result};

/// What of a change a tensor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// (rank, in, …)
    Down,
    /// (out, rank, …)
    Up,
    /// (rank, rank, kernel, kernel): kohya's and LyCORIS' convolutions.
    Mid,
    /// A number.
    Alpha,
}

/// How keys end.
const ENDS: [(&str, Kind); 14] = [
    (".lora_down.weight", Kind::Down),
    (".lora_up.weight", Kind::Up),
    (".lora_mid.weight", Kind::Mid),
    (".alpha", Kind::Alpha),
    (".lora.down.weight", Kind::Down),
    (".lora.up.weight", Kind::Up),
    (".lora_linear_layer.down.weight", Kind::Down),
    (".lora_linear_layer.up.weight", Kind::Up),
    ("_lora.down.weight", Kind::Down),
    ("_lora.up.weight", Kind::Up),
    (".lora_A.weight", Kind::Down),
    (".lora_B.weight", Kind::Up),
    (".lora_A.default.weight", Kind::Down),
    (".lora_B.default.weight", Kind::Up),
];

impl Kind {
    /// What a key's end says, and what stands before it; none if it is no part of a LoRA.
    pub(super) fn of(key: &str) -> Option<(&str, Self)> {
        ENDS.iter().find_map(|(end, kind)| Some((key.strip_suffix(end)?, *kind)))
    }
}

/// The tensors of one change, as they are found.
#[derive(Debug)]
pub(super) struct Factors {
    /// One of their keys.
    pub(super) key: String,
    down: Option<HostTensor>,
    up: Option<HostTensor>,
    mid: Option<HostTensor>,
    alpha: Option<HostTensor>,
}

/// A change of a weight: `scale · (up · down)`, or with `mid` between them.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// (rank, in, …)
    pub down: HostTensor,
    /// (out, rank, …)
    pub up: HostTensor,
    /// (rank, rank, kernel, kernel), where a convolution is three factors.
    pub mid: Option<HostTensor>,
    /// The user's scale times alpha / rank.
    pub scale: f64,
}

/// Whether a change is of its weight.
pub(super) enum Fit {
    Fits(Box<LowRank>),
    /// The key, and the shapes.
    Misfit(String),
}

impl LowRank {
    /// All factors.
    pub fn factors(&self) -> impl Iterator<Item = &HostTensor> {
        [Some(&self.down), Some(&self.up), self.mid.as_ref()].into_iter().flatten()
    }
}

impl Factors {
    pub(super) fn new(key: &str) -> Self {
        Self { key: key.to_owned(), down: None, up: None, mid: None, alpha: None }
    }

    /// Takes in a tensor. A change is called as its down is.
    pub(super) fn put(&mut self, key: &str, kind: Kind, tensor: &HostTensor) -> Result<()> {
        if kind == Kind::Down {
            key.clone_into(&mut self.key);
        }
        let place = match kind {
            Kind::Down => &mut self.down,
            Kind::Up => &mut self.up,
            Kind::Mid => &mut self.mid,
            Kind::Alpha => &mut self.alpha,
        };
        match place.replace(tensor.clone()) {
            None => Ok(()),
            Some(_) => Err(Error::model(format!("{}: it is there in two layouts", self.key))),
        }
    }

    /// The change of a weight of this shape, or how it does not fit; `scaling` is what the file
    /// says of all its changes.
    pub(super) fn into_change(
        self,
        weight: &[usize],
        scale: f64,
        scaling: Option<&Scaling>,
    ) -> Result<Fit> {
        let Self { key, down, up, mid, alpha } = self;
        let (Some(down), Some(up)) = (down, up) else {
            return Err(Error::model(format!("{key}: of down and up one is missing")));
        };
        let [down_dims, up_dims] = [&down, &up].map(|factor| factor.layout().dims());
        let mid_dims = mid.as_ref().map(|mid| mid.layout().dims());
        let Some(rank) = rank(down_dims, up_dims, mid_dims, weight) else {
            let mid = mid_dims.map(|dims| format!(", mid {dims:?}")).unwrap_or_default();
            return Ok(Fit::Misfit(format!(
                "{key}: down {down_dims:?} and up {up_dims:?}{mid} do not fit the weight {weight:?}"
            )));
        };
        let per_rank = match (&alpha, scaling) {
            (Some(alpha), _) => {
                number(alpha)
                    .filter(|alpha| alpha.is_finite())
                    .ok_or_else(|| Error::model(format!("{key}: its alpha is no number")))?
                    / rank as f64
            }
            (None, Some(Scaling { alpha, is_rank_stabilized: true })) => {
                alpha / (rank as f64).sqrt()
            }
            (None, Some(Scaling { alpha, is_rank_stabilized: false })) => alpha / rank as f64,
            (None, None) => 1.0,
        };
        Ok(Fit::Fits(Box::new(LowRank { down, up, mid, scale: scale * per_rank })))
    }
}

/// The rank, if factors of these shapes give a weight of that one.
fn rank(down: &[usize], up: &[usize], mid: Option<&[usize]>, weight: &[usize]) -> Option<usize> {
    let (&out, inner) = weight.split_first()?;
    let (&rank, down_inner) = down.split_first()?;
    let (&up_out, up_inner) = up.split_first()?;
    let product = |dims: &[usize]| dims.iter().try_fold(1usize, |n, dim| n.checked_mul(*dim));
    let is_dense = |dim: &usize| *dim != 0;
    let fits = match mid {
        None => {
            up_inner.first() == Some(&rank)
                && product(up_inner)? == rank
                && product(down_inner)? == product(inner)?
                && down_inner.first() == inner.first()
        }
        Some(mid) => {
            let (&[mid_up, mid_down, ref kernel @ ..], [weight_in, weight_kernel @ ..]) =
                (mid, inner)
            else {
                return None;
            };
            mid_down == rank
                && up_inner.first() == Some(&mid_up)
                && product(up_inner)? == mid_up
                && kernel == weight_kernel
                && product(down_inner)? == *weight_in
        }
    };
    let is_whole = weight.iter().chain(down).chain(up).all(is_dense);
    (fits && is_whole && up_out == out).then_some(rank)
}

/// The value of a tensor of one element.
fn number(tensor: &HostTensor) -> Option<f64> {
    if tensor.layout().shape().elem_count() != 1 {
        return None;
    }
    let mut bytes = Vec::new();
    tensor.row_major(&mut |piece| bytes.extend_from_slice(piece));
    match tensor.dtype() {
        DType::F32 => Some(f32::from_le_bytes(bytes.try_into().ok()?).into()),
        DType::F16 => Some(half::f16::from_le_bytes(bytes.try_into().ok()?).into()),
        DType::BF16 => Some(half::bf16::from_le_bytes(bytes.try_into().ok()?).into()),
        DType::I64 => Some(i64::from_le_bytes(bytes.try_into().ok()?) as f64),
        _ => None,
    }
}
