//! Position embeddings at another picture size: interpolated bicubically as HF's
//! `CLIPVisionEmbeddings.interpolate_pos_encoding` does it, that is by torch's `interpolate` with `align_corners=False` and
//! without antialiasing (Keys' cubic with A = −3/4, the border repeated). The class token's stays as it is.
//!
//! Interpolation is linear in the table, so it is a matrix: its product with the table in forward, with its transpose in
//! backward. The parameter keeps the shape that it has in files.

use crate::error::Result;
use crate::ops::embedding::scatter_add_;
use crate::ops::matmul::{Mat, matmul};
use crate::ops::tensor;
use candle_core::{DType, Device, Tensor};

/// From the positions of a square of patches to those of another one.
#[derive(Debug, Clone)]
pub struct Positions {
    /// `[to² + 1, from² + 1]`, in the type of sums.
    matrix: Tensor,
}

impl Positions {
    /// `from` and `to` are patches along an edge; `dtype` is that of the table.
    pub fn new(from: usize, to: usize, dtype: DType, device: &Device) -> Result<Self> {
        let (axis, columns) = (axis(from, to), from * from + 1);
        let mut m = vec![0.0; (to * to + 1) * columns];
        m[0] = 1.0;
        for (y, x) in (0..to).flat_map(|y| (0..to).map(move |x| (y, x))) {
            let row = &mut m[(y * to + x + 1) * columns + 1..][..from * from];
            for (iy, wy) in &axis[y] {
                // Neighbours beyond the border are the border's own, so an index may come twice.
                axis[x].iter().for_each(|(ix, wx)| row[iy * from + ix] += wy * wx);
            }
        }
        let sums = if dtype == DType::BF16 { DType::F32 } else { dtype };
        Ok(Self { matrix: tensor(m, (to * to + 1, columns))?.to_dtype(sums)?.to_device(device)? })
    }

    /// The table `[from² + 1, D]` at the new size, `[to² + 1, D]`; always a new tensor.
    pub fn forward(&self, table: &Tensor) -> Result<Tensor> {
        let y = matmul(Mat::N(&self.matrix), Mat::N(&table.to_dtype(self.matrix.dtype())?))?;
        Ok(y.to_dtype(table.dtype())?)
    }

    /// The table's gradient from that of the rows of whole pictures, `[B·(to² + 1), D]`, in the type of sums.
    pub fn backward(&self, drows: &Tensor) -> Result<Tensor> {
        let (t, (n, d)) = (self.matrix.dim(0)?, drows.dims2()?);
        let sum = Tensor::zeros((t, d), self.matrix.dtype(), drows.device())?;
        let places: Vec<u32> = (0..n).map(|i| (i % t) as u32).collect();
        scatter_add_(&sum, &places, drows)?;
        matmul(Mat::T(&self.matrix), Mat::N(&sum))
    }
}

/// For each of `to` points on a line of `from` ones: its four neighbours and their weights.
fn axis(from: usize, to: usize) -> Vec<[(usize, f64); 4]> {
    let one = |i: usize| {
        let at = (i as f64 + 0.5) * from as f64 / to as f64 - 0.5;
        let (first, weights) = (at.floor() as i64 - 1, cubic(at - at.floor()));
        std::array::from_fn(|k| ((first + k as i64).clamp(0, from as i64 - 1) as usize, weights[k]))
    };
    (0..to).map(one).collect()
}

/// Weights of the four neighbours of a point that lies `t`, from 0 to 1, after the second.
fn cubic(t: f64) -> [f64; 4] {
    const A: f64 = -0.75;
    let near = |x: f64| ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0;
    let far = |x: f64| ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A;
    [far(t + 1.0), near(t), near(1.0 - t), far(2.0 - t)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_sum_to_one_and_the_same_size_is_the_identity() {
        for (from, to) in [(4, 6), (6, 4), (2, 5), (7, 7), (1, 3)] {
            let p = Positions::new(from, to, DType::F64, &Device::Cpu).unwrap();
            let m: Vec<Vec<f64>> = p.matrix.to_vec2().unwrap();
            assert!(m.iter().all(|row| (row.iter().sum::<f64>() - 1.0).abs() < 1e-12), "{from} to {to}");
            assert!(m[0][0] == 1.0 && m[1..].iter().all(|row| row[0] == 0.0));
            if from == to {
                assert!(m.iter().enumerate().all(|(i, row)| row[i] == 1.0));
            }
        }
    }
}
