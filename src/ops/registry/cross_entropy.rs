//! Cases of the head's cross-entropy.

use super::super::{cross_entropy, matmul, tensor};
use super::{Case, sum_type};
use candle_core::{D, DType, Tensor};

pub(super) fn cases() -> Vec<Case> {
    // The last two keep several warps of a row's block busy, without and with aligned accesses.
    [(1, 3, 2), (9, 5, 31), (300, 4, 17), (3, 5, 700), (2, 4, 1024)].map(|(m, d, v)| cross_entropy_case(m, d, v)).into()
}

fn cross_entropy_case(m: usize, d: usize, v: usize) -> Case {
    let targets = move || (0..m).map(|i| (i * 7 % v) as u32).collect::<Vec<_>>();
    Case {
        op: "cross_entropy",
        label: format!("[{m}, {d}] × [{v}, {d}]ᵀ"),
        inputs: vec![vec![m, d], vec![v, d]],
        forward: Box::new(move |t| {
            let out = cross_entropy::forward(&t[0], &t[1], &targets(), false)?;
            Ok(tensor(out.logps()?, m)?.to_dtype(sum_type(&t[0]))?)
        }),
        backward: Box::new(move |t, dy| {
            let coefs: Vec<f64> = dy.to_dtype(DType::F64)?.to_vec1()?;
            let out = cross_entropy::forward(&t[0], &t[1], &targets(), true)?;
            let dx = out.dx.map(|dx| matmul::scale_rows(&dx, &coefs)).transpose()?;
            let dw = t[1].zeros_like()?.to_dtype(sum_type(&t[1]))?;
            cross_entropy::add_weight_grad(&dw, &t[0], &t[1], &targets(), &coefs)?;
            Ok(vec![dx, Some(dw)])
        }),
        oracle: Box::new(move |t| {
            let lp = candle_nn::ops::log_softmax(&t[0].matmul(&t[1].t()?)?, D::Minus1)?;
            Ok(lp.gather(&Tensor::new(targets(), t[0].device())?.unsqueeze(1)?, 1)?.squeeze(1)?)
        }),
    }
}
