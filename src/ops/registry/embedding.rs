//! Cases of rows that are gathered and scattered, and of patches.

use super::super::{embedding, patches};
use super::{Case, sum_type};
use candle_core::Tensor;

pub(super) fn cases() -> Vec<Case> {
    let mut out = Vec::new();
    for d in [5, 64] {
        out.push(gather_case(7, d, &[3, 3, 0, 6]));
        out.push(scatter_case(7, d, &[3, 0, 6]));
        out.push(scatter_add_case(7, d, &[3, 3, 0, 6]));
    }
    out.extend([(1, 1, 4, 2), (2, 3, 6, 3)].map(|(b, c, s, p)| patches_case(b, c, s, p)));
    out
}

fn gather_case(v: usize, d: usize, ids: &'static [u32]) -> Case {
    Case {
        op: "gather",
        label: format!("[{v}, {d}] at {ids:?}"),
        inputs: vec![vec![v, d]],
        forward: Box::new(move |t| embedding::gather(&t[0], ids)),
        backward: Box::new(move |t, dy| {
            let dt = t[0].zeros_like()?.to_dtype(sum_type(&t[0]))?;
            embedding::scatter_add_(&dt, ids, dy)?;
            Ok(vec![Some(dt)])
        }),
        oracle: Box::new(move |t| Ok(t[0].index_select(&Tensor::new(ids, t[0].device())?, 0)?)),
    }
}

fn scatter_case(v: usize, d: usize, ids: &'static [u32]) -> Case {
    Case {
        op: "scatter",
        label: format!("[{v}, {d}] at {ids:?}"),
        inputs: vec![vec![v, d], vec![ids.len(), d]],
        forward: Box::new(move |t| {
            let table = t[0].copy()?;
            embedding::scatter_(&table, ids, &t[1])?;
            Ok(table)
        }),
        backward: Box::new(move |t, dy| {
            let dt = dy.copy()?;
            embedding::scatter_(&dt, ids, &t[1].zeros_like()?)?;
            Ok(vec![Some(dt), Some(embedding::gather(dy, ids)?)])
        }),
        oracle: Box::new(move |t| {
            let index = Tensor::new(ids, t[0].device())?;
            let kept = t[0].index_add(&index, &t[0].index_select(&index, 0)?.neg()?, 0)?;
            Ok(kept.index_add(&index, &t[1], 0)?)
        }),
    }
}

/// Into a table of the rows' own type.
fn scatter_add_case(v: usize, d: usize, ids: &'static [u32]) -> Case {
    Case {
        op: "scatter_add",
        label: format!("[{v}, {d}] at {ids:?}"),
        inputs: vec![vec![v, d], vec![ids.len(), d]],
        forward: Box::new(move |t| {
            let table = t[0].copy()?;
            embedding::scatter_add_(&table, ids, &t[1])?;
            Ok(table)
        }),
        backward: Box::new(move |_, dy| Ok(vec![Some(dy.clone()), Some(embedding::gather(dy, ids)?)])),
        oracle: Box::new(move |t| Ok(t[0].index_add(&Tensor::new(ids, t[0].device())?, &t[1], 0)?)),
    }
}

fn patches_case(b: usize, c: usize, s: usize, p: usize) -> Case {
    Case {
        op: "patches",
        label: format!("[{b}, {c}, {s}, {s}] by {p}"),
        inputs: vec![vec![b, c, s, s]],
        forward: Box::new(move |t| patches::unfold(&t[0], p)),
        backward: Box::new(|_, _| Ok(vec![None])),
        oracle: Box::new(move |t| {
            let g = s / p;
            let x = t[0].reshape((b, c, g, p, g, p))?.permute((0, 2, 4, 1, 3, 5))?;
            Ok(x.reshape((b * g * g, c * p * p))?)
        }),
    }
}
