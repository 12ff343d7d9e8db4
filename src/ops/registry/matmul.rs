//! Cases of products, sums and scalings of matrices, and of dropout.

use super::super::matmul::{Mat, add_, linear, matmul, scale_rows, sum_rows};
use super::super::random::{Key, dropout};
use super::super::tensor;
use super::{Case, SIZES, sum_type};

pub(super) fn cases() -> Vec<Case> {
    let shapes = [(1, 1, 1), (5, 7, 3), (33, 17, 65), (64, 96, 48)];
    let mut out: Vec<Case> =
        shapes.into_iter().flat_map(|(m, k, n)| [true, false].map(|bias| linear_case(m, k, n, bias))).collect();
    for (n, d) in SIZES {
        out.extend([add_case(n, d), scale_rows_case(n, d), dropout_case(n, d)]);
    }
    out
}

fn linear_case(m: usize, k: usize, n: usize, bias: bool) -> Case {
    let mut inputs = vec![vec![m, k], vec![n, k]];
    if bias {
        inputs.push(vec![n]);
    }
    Case {
        op: "linear",
        label: format!("[{m}, {k}] × [{n}, {k}]ᵀ{}", if bias { " + bias" } else { "" }),
        inputs,
        forward: Box::new(|t| linear(&t[0], &t[1], t.get(2))),
        backward: Box::new(|t, dy| {
            let mut g = vec![Some(matmul(Mat::N(dy), Mat::N(&t[1]))?), Some(matmul(Mat::T(dy), Mat::N(&t[0]))?)];
            if t.len() > 2 {
                g.push(Some(sum_rows(dy)?));
            }
            Ok(g)
        }),
        oracle: Box::new(|t| {
            let y = t[0].matmul(&t[1].t()?)?;
            Ok(match t.get(2) {
                Some(b) => y.broadcast_add(b)?,
                None => y,
            })
        }),
    }
}

fn add_case(n: usize, d: usize) -> Case {
    Case {
        op: "add",
        label: format!("[{n}, {d}]"),
        inputs: vec![vec![n, d], vec![n, d]],
        forward: Box::new(|t| {
            let c = t[0].to_dtype(sum_type(&t[0]))?.copy()?;
            add_(&c, 0.5, &t[1])?;
            let c = c.to_dtype(t[0].dtype())?.copy()?;
            add_(&c, -2.0, &t[1])?;
            Ok(c)
        }),
        backward: Box::new(|_, dy| Ok(vec![Some(dy.clone()), Some((dy * -1.5)?)])),
        oracle: Box::new(|t| Ok((&t[0] + (&t[1] * -1.5)?)?)),
    }
}

fn scale_rows_case(n: usize, d: usize) -> Case {
    let factors: Vec<f64> = (0..n).map(|i| 0.25 + i as f64).collect();
    let (f1, f2) = (factors.clone(), factors.clone());
    Case {
        op: "scale_rows",
        label: format!("[{n}, {d}]"),
        inputs: vec![vec![n, d]],
        forward: Box::new(move |t| scale_rows(&t[0], &f1)),
        backward: Box::new(move |_, dy| Ok(vec![Some(scale_rows(dy, &f2)?)])),
        oracle: Box::new(move |t| Ok(t[0].broadcast_mul(&tensor(factors.clone(), (n, 1))?.to_dtype(t[0].dtype())?)?)),
    }
}

fn dropout_case(n: usize, d: usize) -> Case {
    let key = Key::new(5, "registry");
    Case {
        op: "dropout",
        label: format!("[{n}, {d}]"),
        inputs: vec![vec![n, d]],
        forward: Box::new(move |t| dropout(key, &t[0], 0.3)),
        backward: Box::new(move |_, dy| Ok(vec![Some(dropout(key, dy, 0.3)?)])),
        oracle: Box::new(move |t| Ok((&t[0] * dropout(key, &t[0].ones_like()?.detach(), 0.3)?)?)),
    }
}
