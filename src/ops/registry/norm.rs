//! Cases of RMSNorm and LayerNorm.

use super::super::norm::{self, Kind};
use super::{Case, SIZES};
use candle_core::{D, Tensor};

pub(super) fn cases() -> Vec<Case> {
    let both = |(n, d)| {
        [Kind::Rms, Kind::Layer].into_iter().flat_map(move |k| [norm_case(k, n, d), residual_norm_case(k, n, d)])
    };
    SIZES.into_iter().flat_map(both).collect()
}

fn norm_case(kind: Kind, n: usize, d: usize) -> Case {
    const EPS: f64 = 1e-3;
    let bias = kind == Kind::Layer;
    let mut inputs = vec![vec![n, d], vec![d]];
    if bias {
        inputs.push(vec![d]);
    }
    Case {
        op: if bias { "layer_norm" } else { "rms_norm" },
        label: format!("[{n}, {d}]"),
        inputs,
        forward: Box::new(move |t| Ok(norm::forward(kind, &t[0], &t[1], t.get(2), EPS)?.0)),
        backward: Box::new(move |t, dy| {
            let (_, stats) = norm::forward(kind, &t[0], &t[1], t.get(2), EPS)?;
            let (dx, scale) = norm::backward(kind, &t[0], &t[1], &stats, dy, true)?;
            let (dw, db) = scale.map_or((None, None), |s| (Some(s.weight), Some(s.bias)));
            Ok(if bias { vec![Some(dx), dw, db] } else { vec![Some(dx), dw] })
        }),
        oracle: Box::new(move |t| {
            let x = if bias { t[0].broadcast_sub(&t[0].mean_keepdim(D::Minus1)?)? } else { t[0].clone() };
            let y = x.broadcast_div(&(x.sqr()?.mean_keepdim(D::Minus1)? + EPS)?.sqrt()?)?.broadcast_mul(&t[1])?;
            Ok(match t.get(2) {
                Some(b) => y.broadcast_add(b)?,
                None => y,
            })
        }),
    }
}

/// s = x + r and norm(s), side by side; backward with the gradient of s already there.
fn residual_norm_case(kind: Kind, n: usize, d: usize) -> Case {
    const EPS: f64 = 1e-3;
    let bias = kind == Kind::Layer;
    let mut inputs = vec![vec![n, d], vec![n, d], vec![d]];
    if bias {
        inputs.push(vec![d]);
    }
    let plain = norm_case(kind, n, d);
    Case {
        op: if bias { "layer_norm of a sum" } else { "rms_norm of a sum" },
        label: format!("[{n}, {d}]"),
        inputs,
        forward: Box::new(move |t| {
            let s = t[0].copy()?;
            let (y, _) = norm::forward_residual_(kind, &s, &t[1], &t[2], t.get(3), EPS)?;
            Ok(Tensor::cat(&[s, y], 1)?)
        }),
        backward: Box::new(move |t, dy| {
            let s = t[0].copy()?;
            let (_, stats) = norm::forward_residual_(kind, &s, &t[1], &t[2], t.get(3), EPS)?;
            let (ds, dy) = (dy.narrow(1, 0, d)?.contiguous()?.copy()?, dy.narrow(1, d, d)?.contiguous()?);
            let scale = norm::backward_into(kind, &s, &t[2], &stats, &dy, true, &ds)?;
            let (dw, db) = scale.map_or((None, None), |s| (Some(s.weight), Some(s.bias)));
            let both = [Some(ds.clone()), Some(ds), dw];
            Ok(if bias { [both.as_slice(), &[db]].concat() } else { both.to_vec() })
        }),
        oracle: Box::new(move |t| {
            let s = (&t[0] + &t[1])?;
            let y = (plain.oracle)(&[std::slice::from_ref(&s), &t[2..]].concat())?;
            Ok(Tensor::cat(&[s, y], 1)?)
        }),
    }
}
