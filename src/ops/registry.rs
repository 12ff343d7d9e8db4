//! Every op with its test cases: shapes (awkward ones among them), forward, backward, and the same function composed
//! of candle's own ops as an oracle. Tests and benches walk this one list.

mod activation;
mod attention;
mod cross_entropy;
mod embedding;
mod lora;
mod matmul;
mod norm;
mod rope;
pub mod verify;

use crate::error::Result;
use candle_core::{DType, Tensor};

type Forward = Box<dyn Fn(&[Tensor]) -> Result<Tensor>>;
type Backward = Box<dyn Fn(&[Tensor], &Tensor) -> Result<Vec<Option<Tensor>>>>;

/// One op at one set of shapes.
pub struct Case {
    /// The op's name.
    pub op: &'static str,
    /// Its shapes, for messages.
    pub label: String,
    /// Shapes of the random inputs.
    pub inputs: Vec<Vec<usize>>,
    /// The op.
    pub forward: Forward,
    /// Gradients of the inputs (None: not differentiated) from inputs and dy.
    pub backward: Backward,
    /// The op from candle's differentiable ops.
    pub oracle: Forward,
}

/// All cases of all ops.
pub fn all() -> Vec<Case> {
    let families = [
        matmul::cases(),
        norm::cases(),
        activation::cases(),
        rope::cases(),
        attention::cases(),
        embedding::cases(),
        lora::cases(),
        cross_entropy::cases(),
    ];
    families.into_iter().flatten().collect()
}

/// Rows and columns of what is computed row by row or element by element.
const SIZES: [(usize, usize); 4] = [(1, 1), (3, 5), (17, 33), (8, 96)];

/// The type of sums and gradients beside values of `t`'s type.
fn sum_type(t: &Tensor) -> DType {
    if t.dtype() == DType::BF16 { DType::F32 } else { t.dtype() }
}
