//! DoRA (Liu et al. 2024; PEFT's `DoraLinearLayer`): a low-rank update that turns the rows of a weight, beside a magnitude that
//! alone sets their lengths: W' = m∘(W + s·B·A)/‖W + s·B·A‖, norm and magnitude row by row. The norm counts as a constant in
//! backward (section 4.3 of the paper).
//!
//! Nothing of the weight's size is made: with w a row of W and b of B,
//! ‖w + s·b·A‖² = ‖w‖² + 2s·b·(A·w) + s²·b·(A·Aᵀ)·bᵀ, and ‖w‖² of a frozen weight is computed once.

use super::params::{Param, module};
use crate::bail;
use crate::error::Result;
use crate::ops::launch::{host, widen};
use crate::ops::matmul::{Mat, add_, matmul, matmul_wide, sum_rows};
use candle_core::{DType, Tensor, TensorId};
use std::sync::{Arc, Mutex, PoisonError};

/// The trained lengths of a layer's rows.
#[derive(Debug, Clone)]
pub struct Magnitude {
    /// `[out]`; f32 where the layer computes in bf16, and never rounded: its steps are small beside its values.
    pub param: Param,
    /// ‖w‖² of the layer's rows and the weight that they are of, once they were needed; copies of the layer share it.
    squares: Arc<Mutex<Option<(TensorId, Tensor)>>>,
}

module!(Magnitude: param);

impl Magnitude {
    /// A magnitude with a value of its own.
    pub fn new(param: Param) -> Self {
        Self { param, squares: Arc::default() }
    }

    /// g = m/‖W + s·B·A‖ for the layer as it computes.
    pub fn gain(&self, w: &Param, a: &Tensor, b: &Tensor, scale: f64) -> Result<Gain> {
        let lengths = lengths(w.compute(), &self.squares_of(w)?, a, b, scale)?;
        let more = ((&self.param.value / &lengths)? - 1.0)?.to_dtype(w.compute().dtype())?;
        Ok(Gain { more, lengths })
    }

    /// ‖w‖² of the rows. A weight changes in place only while it trains, else it becomes another tensor.
    fn squares_of(&self, w: &Param) -> Result<Tensor> {
        let mut known = self.squares.lock().unwrap_or_else(PoisonError::into_inner);
        let id = w.compute().id();
        if let (Some((of, squares)), false) = (&*known, w.trainable)
            && *of == id
        {
            return Ok(squares.clone());
        }
        let squares = row_squares(w.compute())?;
        *known = (!w.trainable).then(|| (id, squares.clone()));
        Ok(squares)
    }
}

/// What DoRA multiplies a layer's outputs by, in one pass.
pub struct Gain {
    /// g − 1, `[out]`, in the type of computation: near 1 that type alone would swallow g's changes.
    more: Tensor,
    /// ‖W + s·B·A‖, `[out]`, f32 where the layer computes in bf16.
    lengths: Tensor,
}

impl Gain {
    /// (g − 1)∘x, `[N, out]`, a tensor of its own.
    pub fn more(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.broadcast_mul(&self.more)?)
    }

    /// y + (g − 1)∘z.
    pub fn apply(&self, y: &Tensor, z: &Tensor) -> Result<Tensor> {
        let out = self.more(z)?;
        add_(&out, 1.0, y)?;
        Ok(out)
    }

    /// The magnitude's gradient: Σ dY∘z over the rows, divided by the lengths.
    pub fn grad(&self, dy: &Tensor, z: &Tensor) -> Result<Tensor> {
        Ok((sum_rows(&(dy * z)?)? / &self.lengths)?)
    }
}

/// ‖W + s·B·A‖ row by row, `[out]`; f32 where the operands are bf16. `squares`: [`row_squares`] of W.
pub fn lengths(w: &Tensor, squares: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    let wa = matmul_wide(Mat::N(w), Mat::T(a))?;
    let aa = matmul_wide(Mat::N(a), Mat::T(a))?;
    let b = widen(b)?;
    let mixed = ((&b * wa)?.sum(1)? * (2.0 * scale))?;
    let own = ((matmul(Mat::N(&b), Mat::N(&aa))? * &b)?.sum(1)? * (scale * scale))?;
    Ok((squares + mixed)?.add(&own)?.relu()?.sqrt()?)
}

/// ‖w‖² of each row, `[out]`; f32 where W is bf16.
pub fn row_squares(w: &Tensor) -> Result<Tensor> {
    // Elements that are widened at a time.
    const PART: usize = 1 << 24;
    let (n, d) = w.dims2()?;
    let rows = (PART / d.max(1)).max(1);
    let mut parts = Vec::new();
    for start in (0..n).step_by(rows) {
        let part = widen(&w.narrow(0, start, rows.min(n - start))?)?;
        parts.push(part.sqr()?.sum(1)?);
    }
    Ok(Tensor::cat(&parts, 0)?)
}

/// The magnitude with which an update changes no row's length: ‖W + s·B·A‖ of the layer called `layer`. An error names a row of
/// zeros, which has no direction.
pub fn unchanged(layer: &str, w: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    let lengths = lengths(w, &row_squares(w)?, a, b, scale)?;
    let host: Vec<f64> = host(&lengths.to_dtype(DType::F64)?)?.to_vec1()?;
    if let Some(row) = host.iter().position(|x| !(*x > 0.0 && x.is_finite())) {
        bail!("{layer}.weight: row {row} has length {}, which DoRA cannot scale", host[row];
            "leave the layer out of `target`, or adapt it without `dora`")
    }
    Ok(lengths)
}
