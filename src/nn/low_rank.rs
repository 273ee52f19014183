//! Low-rank changes of a weight, on its device: only the factors go there, and the weight itself
//! stays the one that everybody knows. Separate because no layer knows whether its weight was
//! changed.

use candle_core::DType;

use super::Loader;
use crate::backend::{Activation, Backend, Role};
use crate::error::Result;
use crate::tensor::Tensor;
use crate::weights::LowRank;

impl<B: Backend> Loader<'_, B> {
    /// The weight with what changes it added, in f32 and in their order, and rounded once.
    pub(super) fn changed(&self, weight: Tensor<B>, changes: &[LowRank]) -> Result<Tensor<B>> {
        let dtype = weight.dtype();
        let mut changed = weight.to_dtype(DType::F32)?;
        for change in changes {
            let product = self.product(change)?.reshape(weight.dims().to_vec())?;
            changed = Tensor::linear_combination(&[(1.0, &changed), (change.scale, &product)])?;
        }
        changed.to_dtype(dtype)
    }

    /// The factors multiplied: as many elements as the weight, in its order.
    fn product(&self, LowRank { down, up, mid, .. }: &LowRank) -> Result<Tensor<B>> {
        let factor = |host| Tensor::upload(host, DType::F32, self.device);
        let (down, up) = (factor(down)?, factor(up)?);
        let matrix = |tensor: Tensor<B>| {
            let rows = tensor.dims().first().copied().unwrap_or(0);
            let columns = tensor.elem_count().checked_div(rows).unwrap_or(0);
            tensor.reshape(vec![rows, columns])
        };
        let (down, up) = (matrix(down)?, matrix(up)?);
        let Some(mid) = mid else { return times(&up, &down) };
        let mid = factor(mid)?; // (up's rank, down's rank, kernel, kernel)
        let [outer, inner, height, width] = mid.dims_exact()?;
        let rows = outer.saturating_mul(height).saturating_mul(width);
        let mid = mid.permute(&[0, 2, 3, 1])?.contiguous()?.reshape(vec![rows, inner])?;
        let input = down.dims().last().copied().unwrap_or(0);
        let right = times(&mid, &down)?.reshape(vec![outer, height, width, input])?;
        times(&up, &matrix(right.permute(&[0, 3, 1, 2])?.contiguous()?)?)
    }
}

/// (m, k) times (k, n), by the kernel of linear layers, whose sums do not depend on threads.
fn times<B: Backend>(left: &Tensor<B>, right: &Tensor<B>) -> Result<Tensor<B>> {
    let right = right.permute(&[1, 0])?.contiguous()?.prepare(Role::Linear)?;
    left.linear(&right, None, Activation::Identity)
}
