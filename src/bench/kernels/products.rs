//! Products of matrices and what consists of them: the frozen layers' GEMMs, low-rank updates in three forms, attention, the
//! head. Where a floor of FLOPs is larger than that of bytes, it counts.

use super::{Item, Shapes, Work};
use crate::bench::noise::Noise;
use crate::error::Result;
use crate::model::init::Place;
use crate::ops::attention::{self, Config, Saved, Segment, Sequences};
use crate::ops::cross_entropy;
use crate::ops::gemm::{Size, Strided, gemm};
use crate::ops::lora::{self, Update};
use crate::ops::matmul::{Mat, linear, matmul, matmul_add};
use candle_core::{DType, Tensor};

pub(super) fn items(s: Shapes, place: &Place) -> Vec<Item> {
    let e = place.dtype.size_in_bytes();
    let (n, d, m) = (s.rows, s.hidden, s.mlp);
    let mut all = Vec::new();
    for (name, k, out) in [("hidden to hidden", d, d), ("hidden to mlp", d, m), ("mlp to hidden", m, d)] {
        all.extend(gemms(name, (n, k, out), e));
    }
    all.push(with_bias(s, e));
    for (name, op, k, outs) in [
        ("q, k, v", "lora group", d, vec![d; 3]),
        ("o", "lora", d, vec![d]),
        ("gate, up", "lora group", d, vec![m; 2]),
        ("down", "lora", m, vec![d]),
    ] {
        all.extend(updates(op, name, (n, k, s.rank), outs, e));
    }
    let halves_on_cpu = place.device.is_cpu() && place.dtype == DType::BF16;
    all.extend(whole_layer((n, d, m), s.rank, e, !halves_on_cpu));
    let language = Config { heads: s.heads, kv_heads: s.heads, head_dim: d / s.heads, causal: true };
    all.extend(attentions("causal", language, (s.rows / s.sequence, s.sequence), e));
    let tower =
        Config { heads: s.tower_heads, kv_heads: s.tower_heads, head_dim: s.tower / s.tower_heads, causal: false };
    all.extend(attentions("full", tower, (s.pictures, s.patches() + 1), e));
    all.push(head(s, e));
    all
}

/// FLOPs of a product, and the bytes of its three matrices.
fn product((n, k, m): (usize, usize, usize), e: usize) -> Work {
    Work { flops: 2 * n * k * m, bytes: e * (n * k + k * m + n * m) }
}

fn label((n, k, m): (usize, usize, usize)) -> String {
    format!("[{n}, {k}] → {m}")
}

/// The frozen layers: forward, dX, the sum that has a first operand (beta = 1), and a trained weight's gradient.
fn gemms(name: &str, size: (usize, usize, usize), e: usize) -> Vec<Item> {
    type Operands<'a> = [&'a Tensor; 4];
    let ((n, k, m), base) = (size, product(size, e));
    let item = |what: &str, bytes: usize, run: fn(Operands) -> Result<()>| {
        let work = Work { bytes, ..base };
        Item::new("linear", format!("gemm, {what}, {name}"), label(size), work, move |noise| {
            let [x, y] = [noise.normal("x", &[n, k], 1.0)?, noise.normal("y", &[n, m], 1.0)?];
            let (w, dw) = (noise.normal("w", &[m, k], 0.02)?, noise.wide("dw", &[m, k], 1.0)?);
            Ok(Box::new(move || run([&x, &w, &y, &dw])))
        })
    };
    vec![
        item("x·Wᵀ", base.bytes, |[x, w, ..]| matmul(Mat::N(x), Mat::T(w)).map(drop)),
        item("y += x·Wᵀ", base.bytes + n * m * e, |[x, w, y, _]| matmul_add(y, 1e-3, Mat::N(x), Mat::T(w))),
        item("dY·W", base.bytes, |[_, w, y, _]| matmul(Mat::N(y), Mat::N(w)).map(drop)),
        item("dW += dYᵀ·x", e * (n * k + n * m) + 8 * m * k, |[x, _, y, dw]| {
            matmul_add(dw, 1e-3, Mat::T(y), Mat::N(x))
        }),
    ]
}

/// A layer of the tower.
fn with_bias(s: Shapes, e: usize) -> Item {
    let size = (s.tower_rows(), s.tower, s.tower_mlp);
    let (n, k, m) = size;
    Item::new("linear", "linear with bias, tower to its mlp", label(size), product(size, e), move |noise| {
        let [x, w] = [noise.normal("x", &[n, k], 1.0)?, noise.normal("w", &[m, k], 0.02)?];
        let b = noise.normal("b", &[m], 1.0)?;
        Ok(Box::new(move || linear(&x, &w, Some(&b)).map(drop)))
    })
}

/// A group of low-rank updates, beside the frozen products of their layers.
struct Group {
    x: Tensor,
    /// Outputs, or their gradients.
    y: Vec<Tensor>,
    a: Vec<Tensor>,
    b: Vec<Tensor>,
}

impl Group {
    fn new(noise: &mut Noise, (n, k, r): (usize, usize, usize), outs: &[usize]) -> Result<Self> {
        let mut group = Self { x: noise.normal("x", &[n, k], 1.0)?, y: vec![], a: vec![], b: vec![] };
        for (i, m) in outs.iter().enumerate() {
            group.y.push(noise.normal(&format!("y{i}"), &[n, *m], 1.0)?);
            group.a.push(noise.normal(&format!("a{i}"), &[r, k], 0.02)?);
            group.b.push(noise.normal(&format!("b{i}"), &[*m, r], 1e-3)?);
        }
        Ok(group)
    }

    fn updates(&self) -> Vec<Update<'_>> {
        self.a.iter().zip(&self.b).map(|(a, b)| Update { a, b, scale: 2.0, mask: None }).collect()
    }
}

/// What updates add to their layers: forward, and backward with the gradients of A, B and x.
fn updates(op: &'static str, name: &str, size: (usize, usize, usize), outs: Vec<usize>, e: usize) -> [Item; 2] {
    let ((n, k, r), sum, count) = (size, outs.iter().sum::<usize>(), outs.len());
    // A and B, which are read; h or u, written and read again.
    let small = e * (r * (count * k + sum) + 2 * n * r * count);
    let shape = format!("[{n}, {k}] → {r} → {count} × {}", outs[0]);
    let flops = 2 * n * r * (count * k + sum);
    let forward = Work { flops, bytes: small + e * (n * k + 2 * n * sum) };
    // dY, x and h are read, dX is added to; gradients are f32 sums.
    let backward =
        Work { flops: 2 * flops, bytes: small + e * (n * (sum + 3 * k) + n * r * count) + 8 * r * (count * k + sum) };
    let widths = outs.clone();
    [
        Item::new(op, format!("lora, forward, {name}"), &*shape, forward, move |noise| {
            let g = Group::new(noise, size, &widths)?;
            Ok(Box::new(move || {
                let updates = g.updates();
                let y: Vec<&Tensor> = g.y.iter().collect();
                lora::up_(&y, &lora::down(&g.x, &updates)?, &updates)
            }))
        }),
        Item::new(op, format!("lora, backward, {name}"), &*shape, backward, move |noise| {
            let g = Group::new(noise, size, &outs)?;
            let h = lora::down(&g.x, &g.updates())?;
            let dx = noise.normal("dx", &[n, k], 1.0)?;
            let [mut da, mut db] = [vec![], vec![]];
            for m in &outs {
                da.push(noise.wide("da", &[r, k], 1.0)?);
                db.push(noise.wide("db", &[*m, r], 1.0)?);
            }
            Ok(Box::new(move || {
                let updates = g.updates();
                let dy: Vec<&Tensor> = g.y.iter().collect();
                let [da, db] = [&da, &db].map(|all| all.iter().map(Some).collect::<Vec<_>>());
                let u = lora::back(&dy, &h, &updates, &db)?;
                lora::add_dx_(&dx, &u, &updates)?;
                lora::add_da(&da, &u, &g.x, &updates)
            }))
        }),
    ]
}

/// One adapted layer as a whole, y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ, in three forms: our kernels behind the frozen product; small products
/// that accumulate; and x·Aᵀ written beside x, so that one product with the bordered weight [W, s·B] does the rest. The last
/// is how a layer could run on nothing but GEMMs; it takes strided products, so `bordered` says whether there are any.
fn whole_layer((n, k, m): (usize, usize, usize), r: usize, e: usize, bordered: bool) -> Vec<Item> {
    let base = product((n, k, m), e);
    let work = Work { flops: base.flops + 2 * n * r * (k + m), bytes: base.bytes + e * r * (k + m) };
    let shape = format!("[{n}, {k}] → {m}, rank {r}");
    let size = (n, k, r);
    let mut all = vec![
        Item::new("lora", "adapted layer, gemm and lora", &*shape, work, move |noise| {
            let g = Group::new(noise, size, &[m])?;
            let w = noise.normal("w", &[m, k], 0.02)?;
            Ok(Box::new(move || {
                let (y, updates) = (matmul(Mat::N(&g.x), Mat::T(&w))?, g.updates());
                lora::up_(&[&y], &lora::down(&g.x, &updates)?, &updates)
            }))
        }),
        Item::new("lora", "adapted layer, three gemms", &*shape, work, move |noise| {
            let g = Group::new(noise, size, &[m])?;
            let w = noise.normal("w", &[m, k], 0.02)?;
            Ok(Box::new(move || {
                let (y, h) = (matmul(Mat::N(&g.x), Mat::T(&w))?, matmul(Mat::N(&g.x), Mat::T(&g.a[0]))?);
                matmul_add(&y, 2.0, Mat::N(&h), Mat::T(&g.b[0]))
            }))
        }),
    ];
    if bordered {
        all.push(Item::new("lora", "adapted layer, bordered weight", &*shape, work, move |noise| {
            // x stands here a second time, because a product may not read and write one tensor.
            let [x, xh] = [noise.normal("x", &[n, k], 1.0)?, noise.normal("xh", &[n, k + r], 1.0)?];
            let [w, y] = [noise.normal("w", &[m, k + r], 0.02)?, noise.normal("y", &[n, m], 1.0)?];
            let a = noise.normal("a", &[r, k], 0.02)?;
            Ok(Box::new(move || {
                let h = Strided { start: k, ..Strided::rows(&xh)? };
                gemm(Size { m: n, n: r, k, count: 1 }, 1.0, Strided::rows(&x)?, Strided::rows(&a)?.t(), 0.0, h)?;
                let (xh, w) = (Strided::rows(&xh)?, Strided::rows(&w)?.t());
                gemm(Size { m: n, n: m, k: k + r, count: 1 }, 1.0, xh, w, 0.0, Strided::rows(&y)?)
            }))
        }));
    }
    all
}

/// Packed sequences of one length.
fn attentions(name: &str, cfg: Config, (count, length): (usize, usize), e: usize) -> [Item; 3] {
    let (n, d) = (count * length, cfg.heads * cfg.head_dim);
    let pairs = count * if cfg.causal { length * (length + 1) / 2 } else { length * length };
    let rows = (0..count).map(|i| i * length).map(|at| at..at + length);
    let sequences = Sequences::from(rows.map(|r| Segment::new(r.clone(), r)).collect::<Vec<_>>());
    let shape = format!("{count} × {length}, {} heads of {}", cfg.heads, cfg.head_dim);
    // Two products of each pair of a query and a key; five with the scores made again. The log-sum-exp is f32.
    let forward = Work { flops: 4 * pairs * d, bytes: 4 * n * d * e + n * cfg.heads * 4 };
    let backward = Work { flops: 10 * pairs * d, bytes: 8 * n * d * e + n * cfg.heads * 4 };
    let (s1, s2, s3) = (sequences.clone(), sequences.clone(), sequences);
    let qkv = move |noise: &mut Noise| -> Result<[Tensor; 3]> {
        Ok([noise.normal("q", &[n, d], 1.0)?, noise.normal("k", &[n, d], 1.0)?, noise.normal("v", &[n, d], 1.0)?])
    };
    [
        Item::new("attention", format!("attention, {name}, forward"), &*shape, forward, move |noise| {
            let ([q, k, v], sequences) = (qkv(noise)?, s1.clone());
            Ok(Box::new(move || attention::forward(cfg, &sequences, &q, &k, &v).map(drop)))
        }),
        Item::new(
            "attention_unrecorded",
            format!("attention, {name}, without gradient"),
            &*shape,
            forward,
            move |noise| {
                let ([q, k, v], sequences) = (qkv(noise)?, s3.clone());
                Ok(Box::new(move || attention::forward_kept(cfg, &sequences, &q, &k, &v, false).map(drop)))
            },
        ),
        Item::new("attention", format!("attention, {name}, backward"), &*shape, backward, move |noise| {
            let ([q, k, v], sequences) = (qkv(noise)?, s2.clone());
            let d_o = noise.normal("d_o", &[n, d], 1.0)?;
            let (o, lse) = attention::forward(cfg, &sequences, &q, &k, &v)?;
            Ok(Box::new(move || {
                let saved = Saved { q: &q, k: &k, v: &v, o: &o, lse: &lse };
                attention::backward(cfg, &sequences, saved, &d_o).map(drop)
            }))
        }),
    ]
}

/// Logits, their softmax, and back to the rows, chunk by chunk.
fn head(s: Shapes, e: usize) -> Item {
    let (n, d, v) = (s.labels, s.hidden, s.vocab);
    let work = Work { flops: 4 * n * d * v, bytes: e * (2 * n * d + v * d) };
    Item::new("cross_entropy", "head and cross-entropy with dX", label((n, d, v)), work, move |noise| {
        let [x, w] = [noise.normal("x", &[n, d], 1.0)?, noise.normal("w", &[v, d], 0.02)?];
        let targets: Vec<u32> = (0..n).map(|i| (i * 7919 % v) as u32).collect();
        Ok(Box::new(move || cross_entropy::forward(&x, &w, &targets, true).map(drop)))
    })
}
