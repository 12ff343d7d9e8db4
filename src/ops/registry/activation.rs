//! Cases of activations and SwiGLU.

use super::super::activation;
use super::{Case, SIZES};
use crate::bail;
use crate::ops::launch::host;
use crate::spec::Activation;

pub(super) fn cases() -> Vec<Case> {
    use Activation::{Gelu, GeluTanh, QuickGelu, Relu, Silu};
    let mut out = Vec::new();
    for (n, d) in SIZES {
        out.extend([Gelu, GeluTanh, QuickGelu, Silu, Relu].map(|a| activation_case(a, n, d)));
        out.extend([swiglu_case(n, d), rebuilt_swiglu_case(n, d)]);
    }
    out
}

fn activation_case(act: Activation, n: usize, d: usize) -> Case {
    Case {
        op: "activation",
        label: format!("{act:?} [{n}, {d}]"),
        inputs: vec![vec![n, d]],
        forward: Box::new(move |t| activation::forward(act, &t[0])),
        backward: Box::new(move |t, dy| Ok(vec![Some(activation::backward(act, &t[0], dy)?)])),
        oracle: Box::new(move |t| {
            let x = &t[0];
            Ok(match act {
                // Not `gelu_erf` and `gelu`: their backward is exact to 1e-7 only.
                Activation::Gelu => ((x * 0.5)? * ((x * std::f64::consts::FRAC_1_SQRT_2)?.erf()? + 1.0)?)?,
                Activation::GeluTanh => {
                    let u = ((x + (x.powf(3.0)? * 0.044_715)?)? * (2.0 / std::f64::consts::PI).sqrt())?;
                    ((x * 0.5)? * (u.tanh()? + 1.0)?)?
                }
                Activation::QuickGelu => (x * candle_nn::ops::sigmoid(&(x * 1.702)?)?)?,
                Activation::Silu => (x * candle_nn::ops::sigmoid(x)?)?,
                Activation::Relu => x.relu()?,
            })
        }),
    }
}

fn swiglu_case(n: usize, d: usize) -> Case {
    Case {
        op: "swiglu",
        label: format!("[{n}, {d}]"),
        inputs: vec![vec![n, d], vec![n, d]],
        forward: Box::new(|t| activation::swiglu(&t[0], &t[1])),
        backward: Box::new(|t, dy| {
            let g = activation::swiglu_backward(&t[0], &t[1], dy, false)?;
            Ok(vec![Some(g.gate), Some(g.up)])
        }),
        oracle: Box::new(|t| Ok(((&t[0] * candle_nn::ops::sigmoid(&t[0])?)? * &t[1])?)),
    }
}

/// y as the backward pass rebuilds it, which must have the forward pass's bits.
fn rebuilt_swiglu_case(n: usize, d: usize) -> Case {
    Case {
        op: "swiglu, rebuilt",
        forward: Box::new(|t| {
            let y = activation::swiglu(&t[0], &t[1])?;
            match activation::swiglu_backward(&t[0], &t[1], &t[1], true)?.y {
                Some(again) if host(&again.ne(&y)?.max_all()?)?.to_scalar::<u8>()? == 0 => Ok(again),
                _ => bail!("swiglu: the rebuilt output is not the first one"),
            }
        }),
        backward: Box::new(|t, dy| {
            let g = activation::swiglu_backward(&t[0], &t[1], dy, true)?;
            Ok(vec![Some(g.gate), Some(g.up)])
        }),
        ..swiglu_case(n, d)
    }
}
