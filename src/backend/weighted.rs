//! Which operand of a convolution or a linear layer is what. Separate because their definition, the
//! reference and every backend ask it.

use crate::error::{Error, Result};

/// The operands of a convolution or a linear layer.
#[derive(Debug)]
pub struct Weighted<'a, T> {
    /// What the weight is applied to.
    pub x: &'a T,
    /// The weight.
    pub weight: &'a T,
    /// One number for each channel or feature of the result.
    pub bias: Option<&'a T>,
    /// Added to the result.
    pub residual: Option<&'a T>,
}

impl<'a, T> Weighted<'a, T> {
    /// Tells the operands apart.
    ///
    /// # Errors
    /// If there are too few or too many.
    pub fn of(args: &'a [T], has_residual: bool) -> Result<Self> {
        let (residual, rest) = match args {
            [rest @ .., residual] if has_residual => (Some(residual), rest),
            rest => (None, rest),
        };
        match rest {
            [x, weight] => Ok(Self { x, weight, bias: None, residual }),
            [x, weight, bias] => Ok(Self { x, weight, bias: Some(bias), residual }),
            _ => {
                let least = 2 + usize::from(has_residual);
                let (most, found) = (least + 1, args.len());
                Err(Error::other(format!("takes {least} or {most} operands, not {found}")))
            }
        }
    }
}
