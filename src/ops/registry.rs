//! Every op with its test cases: shapes (awkward ones among them), forward, backward, and the same function composed
//! of candle's own ops as an oracle. Tests and benches walk this one list.

use super::attention::{Config, Saved, Segment};
use super::matmul::{Mat, add_, linear, matmul, scale_rows, sum_rows};
use super::norm::Kind;
use super::random::{Key, dropout};
use super::{activation, attention, cross_entropy, embedding, lora, norm, patches, rope, tensor};
use crate::error::{Error, Result};
use crate::recipe::schema::Activation;
use candle_core::{D, DType, Tensor};

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
    let mut out = Vec::new();
    for (m, k, n) in [(1, 1, 1), (5, 7, 3), (33, 17, 65), (64, 96, 48)] {
        out.push(linear_case(m, k, n, true));
        out.push(linear_case(m, k, n, false));
    }
    for (n, d) in [(1, 1), (3, 5), (17, 33), (8, 96)] {
        out.push(norm_case(Kind::Rms, n, d));
        out.push(norm_case(Kind::Layer, n, d));
        out.push(residual_norm_case(Kind::Rms, n, d));
        out.push(residual_norm_case(Kind::Layer, n, d));
        out.push(add_case(n, d));
        out.push(scale_rows_case(n, d));
        out.push(dropout_case(n, d));
        use Activation::{Gelu, GeluTanh, QuickGelu, Relu, Silu};
        out.extend([Gelu, GeluTanh, QuickGelu, Silu, Relu].map(|a| activation_case(a, n, d)));
        out.push(swiglu_case(n, d));
    }
    out.extend([(1, 1, 1, 2), (7, 3, 1, 6), (19, 4, 2, 64)].map(|(n, h, kv, hd)| rope_case(n, h, kv, hd)));
    let spans: [&[(usize, usize)]; 4] =
        [&[(1, 1)], &[(5, 5), (1, 1), (9, 9)], &[(70, 70), (130, 130)], &[(3, 11), (1, 6)]];
    for (heads, kv_heads, head_dim) in [(1, 1, 4), (4, 2, 8), (6, 2, 5)] {
        for s in spans {
            for causal in [true, false] {
                out.push(attention_case(Config { heads, kv_heads, head_dim, causal }, s));
            }
        }
    }
    for (head_dim, s) in
        [(32, spans[1]), (64, spans[2]), (64, spans[3]), (80, spans[1]), (96, spans[3]), (128, spans[1])]
    {
        for (heads, kv_heads, causal) in [(2, 1, true), (3, 3, false)] {
            out.push(attention_case(Config { heads, kv_heads, head_dim, causal }, s));
        }
    }
    for d in [5, 64] {
        out.push(gather_case(7, d, &[3, 3, 0, 6]));
        out.push(scatter_case(7, d, &[3, 0, 6]));
        out.push(scatter_add_case(7, d, &[3, 3, 0, 6]));
    }
    for (n, k, m, rank, p) in [
        (7, 136, 72, 16, 0.1),
        (5, 70, 77, 8, 0.0),
        (130, 72, 40, 24, 0.1),
        (9, 33, 21, 32, 0.3),
        (33, 72, 48, 64, 0.1),
        (9, 35, 51, 64, 0.0),
        (12, 72, 40, 128, 0.1),
        (3, 71, 13, 200, 0.1),
        (6, 16, 24, 3, 0.1),
    ] {
        out.extend([true, false].map(|b_trains| lora_case(n, k, m, rank, p, b_trains)));
    }
    out.extend([(1, 1, 4, 2), (2, 3, 6, 3)].map(|(b, c, s, p)| patches_case(b, c, s, p)));
    out.extend([(1, 3, 2), (9, 5, 31), (300, 4, 17)].map(|(m, d, v)| cross_entropy_case(m, d, v)));
    out
}

/// The type of sums and gradients beside values of `t`'s type.
fn sum_type(t: &Tensor) -> DType {
    if t.dtype() == DType::BF16 { DType::F32 } else { t.dtype() }
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
            let (dg, du) = activation::swiglu_backward(&t[0], &t[1], dy)?;
            Ok(vec![Some(dg), Some(du)])
        }),
        oracle: Box::new(|t| Ok(((&t[0] * candle_nn::ops::sigmoid(&t[0])?)? * &t[1])?)),
    }
}

fn rope_case(n: usize, heads: usize, kv_heads: usize, head_dim: usize) -> Case {
    let angles = move |dtype: DType| -> Result<(Tensor, Tensor)> {
        let half = head_dim / 2;
        let a: Vec<f64> = (0..n * half).map(|i| (i / half) as f64 / 10f64.powi((i % half) as i32 % 5)).collect();
        let a = tensor(a, (n, half))?;
        Ok((a.cos()?.to_dtype(dtype)?, a.sin()?.to_dtype(dtype)?))
    };
    let widths = [heads * head_dim, kv_heads * head_dim];
    let turned = move |t: &[Tensor], back: bool| -> Result<[Tensor; 2]> {
        let (cos, sin) = angles(sum_type(&t[0]))?;
        let (q, k) = (t[0].copy()?, t[1].copy()?);
        if back {
            rope::rotate_back_(&q, &k, &cos, &sin)?
        } else {
            rope::rotate_(&q, &k, &cos, &sin)?
        }
        Ok([q, k])
    };
    Case {
        op: "rope",
        label: format!("[{n}, ({heads} + {kv_heads})·{head_dim}]"),
        inputs: widths.map(|w| vec![n, w]).to_vec(),
        forward: Box::new(move |t| Ok(Tensor::cat(&turned(t, false)?, 1)?)),
        backward: Box::new(move |_, dy| {
            let part = |at: usize, w: usize| Ok::<_, Error>(dy.narrow(1, at, w)?.contiguous()?);
            Ok(turned(&[part(0, widths[0])?, part(widths[0], widths[1])?], true)?.map(Some).to_vec())
        }),
        oracle: Box::new(move |t| {
            let (cos, sin) = angles(t[0].dtype())?;
            let turn = |x: &Tensor, h: usize| -> Result<Tensor> {
                let x = x.reshape((n, h, head_dim))?.transpose(0, 1)?.contiguous()?.unsqueeze(0)?;
                let y = candle_nn::rotary_emb::rope_slow(&x, &cos, &sin)?;
                Ok(y.squeeze(0)?.transpose(0, 1)?.reshape((n, h * head_dim))?)
            };
            Ok(Tensor::cat(&[turn(&t[0], heads)?, turn(&t[1], kv_heads)?], 1)?)
        }),
    }
}

fn attention_case(cfg: Config, spans: &[(usize, usize)]) -> Case {
    let (mut segments, mut n, mut m) = (Vec::new(), 0, 0);
    for (q, k) in spans {
        segments.push(Segment { q: n..n + q, k: m..m + k });
        (n, m) = (n + q, m + k);
    }
    let (qw, kw) = (cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim);
    let (s1, s2) = (segments.clone(), segments.clone());
    Case {
        op: "attention",
        label: format!(
            "{spans:?} heads {}/{} of {}{}",
            cfg.heads,
            cfg.kv_heads,
            cfg.head_dim,
            if cfg.causal { " causal" } else { "" }
        ),
        inputs: vec![vec![n, qw], vec![m, kw], vec![m, kw]],
        forward: Box::new(move |t| Ok(attention::forward(cfg, &segments, &t[0], &t[1], &t[2])?.0)),
        backward: Box::new(move |t, dy| {
            let (o, lse) = attention::forward(cfg, &s1, &t[0], &t[1], &t[2])?;
            let saved = Saved { q: &t[0], k: &t[1], v: &t[2], o: &o, lse: &lse };
            let (dq, dk, dv) = attention::backward(cfg, &s1, saved, dy)?;
            Ok(vec![Some(dq), Some(dk), Some(dv)])
        }),
        oracle: Box::new(move |t| composed_attention(cfg, &s2, &t[0], &t[1], &t[2])),
    }
}

/// Attention with all scores materialised, one sequence and head after the other.
fn composed_attention(cfg: Config, segments: &[Segment], q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let hd = cfg.head_dim;
    let mut rows = Vec::new();
    for s in segments {
        let mut heads = Vec::new();
        for h in 0..cfg.heads {
            let kvh = h / (cfg.heads / cfg.kv_heads);
            let part = |x: &Tensor, r: &std::ops::Range<usize>, h: usize| -> Result<Tensor> {
                Ok(x.narrow(0, r.start, r.len())?.narrow(1, h * hd, hd)?.contiguous()?)
            };
            let (q, k, v) = (part(q, &s.q, h)?, part(k, &s.k, kvh)?, part(v, &s.k, kvh)?);
            let mut scores = (q.matmul(&k.t()?)? / (hd as f64).sqrt())?;
            if cfg.causal {
                let (l, w) = (s.q.len(), s.k.len());
                let mask: Vec<f64> =
                    (0..l * w).map(|i| if i % w <= i / w + w - l { 0.0 } else { f64::NEG_INFINITY }).collect();
                scores = (scores + tensor(mask, (l, w))?.to_dtype(q.dtype())?)?;
            }
            heads.push(candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&v)?);
        }
        rows.push(Tensor::cat(&heads, 1)?);
    }
    Ok(Tensor::cat(&rows, 0)?)
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
            let dx = out.dx.map(|dx| super::matmul::scale_rows(&dx, &coefs)).transpose()?;
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
