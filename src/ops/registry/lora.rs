//! Cases of low-rank updates.

use super::super::lora;
use super::super::random::{Key, dropout};
use super::{Case, sum_type};
use crate::error::Error;
use candle_core::Tensor;

pub(super) fn cases() -> Vec<Case> {
    let shapes = [
        (7, 136, 72, 16, 0.1),
        (5, 70, 77, 8, 0.0),
        (130, 72, 40, 24, 0.1),
        (9, 33, 21, 32, 0.3),
        (33, 72, 48, 64, 0.1),
        (9, 35, 51, 64, 0.0),
        (12, 72, 40, 128, 0.1),
        (3, 71, 13, 200, 0.1),
        (6, 16, 24, 3, 0.1),
    ];
    let both = |(n, k, m, rank, p)| [true, false].map(|b_trains| lora_case(n, k, m, rank, p, b_trains));
    shapes.into_iter().flat_map(both).collect()
}

/// y + s·(drop(x)·Aᵀ)·Bᵀ.
fn lora_case(n: usize, k: usize, m: usize, rank: usize, p: f64, b_trains: bool) -> Case {
    const S: f64 = 0.5;
    let key = Key::new(5, "lora");
    let mask = (p > 0.0).then_some((key, p));
    Case {
        op: "lora",
        label: format!("[{n}, {k}] → {rank} → {m}, dropout {p}{}", if b_trains { "" } else { ", B frozen" }),
        inputs: vec![vec![n, k], vec![rank, k], vec![m, rank], vec![n, m]],
        forward: Box::new(move |t| {
            let y = t[3].copy()?;
            lora::up_(&y, &lora::down(&t[0], &t[1], mask)?, &t[2], S)?;
            Ok(y)
        }),
        backward: Box::new(move |t, dy| {
            let zeros = |t: &Tensor| Ok::<_, Error>(t.zeros_like()?.to_dtype(sum_type(t))?);
            let (dx, da, db) = (t[0].zeros_like()?, zeros(&t[1])?, zeros(&t[2])?);
            let h = lora::down(&t[0], &t[1], mask)?;
            let u = lora::back(dy, &h, &t[2], S, b_trains.then_some(&db))?;
            lora::add_da(&da, &u, &t[0], mask)?;
            lora::add_dx_(&dx, &u, &t[1], mask)?;
            Ok(vec![Some(dx), Some(da), b_trains.then_some(db), Some(dy.clone())])
        }),
        oracle: Box::new(move |t| {
            let x = match mask {
                Some((key, p)) => (&t[0] * dropout(key, &t[0].ones_like()?.detach(), p)?)?,
                None => t[0].clone(),
            };
            Ok((&t[3] + (x.matmul(&t[1].t()?)?.matmul(&t[2].t()?)? * S)?)?)
        }),
    }
}
