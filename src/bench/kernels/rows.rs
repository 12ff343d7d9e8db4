//! What goes over rows and elements: norms, activations, rotary embedding, sums, copies. Its floor is the copy bandwidth.

use super::{Item, Shapes, Work};
use crate::bench::noise::Noise;
use crate::error::Result;
use crate::model::init::Place;
use crate::ops::matmul::{add_, scale_rows, sum_rows};
use crate::ops::norm::{self, Kind, Stats};
use crate::ops::random::{Key, dropout};
use crate::ops::{activation, embedding, patches, rope};
use crate::spec::Activation;
use candle_core::Tensor;

/// Bytes of an f32, in which statistics, angles and factors stand, and of an index.
const WORD: usize = 4;

const EPS: f64 = 1e-5;

pub(super) fn items(s: Shapes, place: &Place) -> Vec<Item> {
    let e = place.dtype.size_in_bytes();
    let mut all = norms("rms_norm", "rms_norm of a sum", Kind::Rms, (s.rows, s.hidden), e);
    all.extend(norms("layer_norm", "layer_norm of a sum", Kind::Layer, (s.tower_rows(), s.tower), e));
    all.extend(activations("quick_gelu", Activation::QuickGelu, (s.tower_rows(), s.tower_mlp), e));
    all.extend(activations("gelu", Activation::Gelu, (s.pictures * s.patches(), s.hidden), e));
    all.extend(swiglus((s.rows, s.mlp), e));
    all.push(rotation(s, e));
    all.extend(sums((s.rows, s.hidden), e));
    all.extend(copies(s, e));
    all
}

/// Work that moves bytes alone.
fn moved(bytes: usize) -> Work {
    Work { bytes, flops: 0 }
}

fn label((n, d): (usize, usize)) -> String {
    format!("[{n}, {d}]")
}

/// What norms take: the stream and what is added to it, the gradient of the output, scale and shift, the statistics.
struct Normed {
    kind: Kind,
    x: Tensor,
    r: Tensor,
    dy: Tensor,
    w: Tensor,
    b: Option<Tensor>,
    stats: Stats,
}

impl Normed {
    fn new(noise: &mut Noise, kind: Kind, (n, d): (usize, usize)) -> Result<Self> {
        let x = noise.normal("x", &[n, d], 1.0)?;
        // What is added again and again is small, so that values stay what they are.
        let [r, dy] = [noise.normal("r", &[n, d], 1e-3)?, noise.normal("dy", &[n, d], 1e-3)?];
        let w = noise.normal("w", &[d], 1.0)?;
        let b = if kind == Kind::Layer { Some(noise.normal("b", &[d], 1.0)?) } else { None };
        let (_, stats) = norm::forward(kind, &x, &w, b.as_ref(), EPS)?;
        Ok(Self { kind, x, r, dy, w, b, stats })
    }
}

fn norms(alone: &'static str, summed: &'static str, kind: Kind, size: (usize, usize), e: usize) -> Vec<Item> {
    let (n, d) = size;
    let (all, stats, scale) = (n * d * e, n * 2 * WORD, d * e);
    let both = scale * if kind == Kind::Layer { 2 } else { 1 };
    let item = |op: &'static str, what: &str, bytes: usize, run: fn(&Normed) -> Result<()>| {
        Item::new(op, format!("{op}, {what}"), label(size), moved(bytes), move |noise| {
            let t = Normed::new(noise, kind, size)?;
            Ok(Box::new(move || run(&t)))
        })
    };
    vec![
        item(alone, "forward", 2 * all + stats + both, |t| {
            norm::forward(t.kind, &t.x, &t.w, t.b.as_ref(), EPS).map(drop)
        }),
        item(alone, "rebuilt", 2 * all + stats + both, |t| norm::rebuild(&t.x, &t.w, t.b.as_ref(), &t.stats).map(drop)),
        item(alone, "backward, scale too", 3 * all + stats + scale + 2 * d * WORD, |t| {
            norm::backward(t.kind, &t.x, &t.w, &t.stats, &t.dy, true).map(drop)
        }),
        item(summed, "forward", 4 * all + stats + both, |t| {
            norm::forward_residual_(t.kind, &t.x, &t.r, &t.w, t.b.as_ref(), EPS).map(drop)
        }),
        item(summed, "backward", 4 * all + stats + scale, |t| {
            norm::backward_into(t.kind, &t.x, &t.w, &t.stats, &t.dy, false, &t.r).map(drop)
        }),
    ]
}

fn activations(name: &str, act: Activation, size: (usize, usize), e: usize) -> [Item; 2] {
    let (n, d) = size;
    [
        Item::new("activation", format!("{name}, forward"), label(size), moved(2 * n * d * e), move |noise| {
            let x = noise.normal("x", &[n, d], 1.0)?;
            Ok(Box::new(move || activation::forward(act, &x).map(drop)))
        }),
        Item::new("activation", format!("{name}, backward"), label(size), moved(3 * n * d * e), move |noise| {
            let [x, dy] = [noise.normal("x", &[n, d], 1.0)?, noise.normal("dy", &[n, d], 1.0)?];
            Ok(Box::new(move || activation::backward(act, &x, &dy).map(drop)))
        }),
    ]
}

fn swiglus(size: (usize, usize), e: usize) -> Vec<Item> {
    let (n, d) = size;
    let backward = |op: &'static str, what: &str, tensors: usize, rebuild: bool| {
        Item::new(op, what, label(size), moved(tensors * n * d * e), move |noise| {
            let [gate, up] = [noise.normal("gate", &[n, d], 1.0)?, noise.normal("up", &[n, d], 1.0)?];
            let dy = noise.normal("dy", &[n, d], 1.0)?;
            Ok(Box::new(move || activation::swiglu_backward(&gate, &up, &dy, rebuild).map(drop)))
        })
    };
    vec![
        Item::new("swiglu", "swiglu, forward", label(size), moved(3 * n * d * e), move |noise| {
            let [gate, up] = [noise.normal("gate", &[n, d], 1.0)?, noise.normal("up", &[n, d], 1.0)?];
            Ok(Box::new(move || activation::swiglu(&gate, &up).map(drop)))
        }),
        backward("swiglu", "swiglu, backward", 5, false),
        backward("swiglu, rebuilt", "swiglu, backward, y rebuilt", 6, true),
    ]
}

/// Queries and keys at once; the way back is the same kernel.
fn rotation(s: Shapes, e: usize) -> Item {
    let (n, d, half) = (s.rows, s.hidden, s.hidden / s.heads / 2);
    let work = moved(4 * n * d * e + 2 * n * half * WORD);
    Item::new("rope", "rope, q and k", format!("2 × [{n}, {d}]"), work, move |noise| {
        let [q, k] = [noise.normal("q", &[n, d], 1.0)?, noise.normal("k", &[n, d], 1.0)?];
        // A rotation, so that values stay what they are however often it is applied.
        let angle = noise.wide("angle", &[n, half], 1.0)?;
        let (cos, sin) = (angle.cos()?, angle.sin()?);
        Ok(Box::new(move || rope::rotate_(&q, &k, &cos, &sin)))
    })
}

fn sums(size: (usize, usize), e: usize) -> Vec<Item> {
    let (n, d) = size;
    vec![
        Item::new("add", "add", label(size), moved(3 * n * d * e), move |noise| {
            let [c, x] = [noise.normal("c", &[n, d], 1.0)?, noise.normal("x", &[n, d], 1e-3)?];
            Ok(Box::new(move || add_(&c, 1.0, &x)))
        }),
        Item::new("scale_rows", "scale_rows", label(size), moved(2 * n * d * e + n * WORD), move |noise| {
            let (x, factors) = (noise.normal("x", &[n, d], 1.0)?, vec![0.5; n]);
            Ok(Box::new(move || scale_rows(&x, &factors).map(drop)))
        }),
        Item::new("linear", "sum_rows, a bias's gradient", label(size), moved(n * d * e + d * WORD), move |noise| {
            let x = noise.normal("x", &[n, d], 1.0)?;
            Ok(Box::new(move || sum_rows(&x).map(drop)))
        }),
        Item::new("dropout", "dropout", label(size), moved(2 * n * d * e), move |noise| {
            let x = noise.normal("x", &[n, d], 1.0)?;
            Ok(Box::new(move || dropout(Key::new(1, "mask"), &x, 0.05).map(drop)))
        }),
    ]
}

/// Embeddings, visual features into their rows and back, pictures to patches.
fn copies(s: Shapes, e: usize) -> Vec<Item> {
    let (n, d, features) = (s.rows, s.hidden, s.rows / 2);
    let (gathered, scattered) = (n * d * e, features * d * e);
    let spots = move || (0..features as u32).map(|i| 2 * i).collect::<Vec<_>>();
    let pixels = s.pictures * 3 * s.edge * s.edge * e;
    let square = format!("[{}, 3, {e}, {e}] by {}", s.pictures, s.patch, e = s.edge);
    vec![
        Item::new("gather", "gather, embeddings", label((n, d)), moved(2 * gathered + n * WORD), move |noise| {
            let table = noise.normal("table", &[s.vocab, d], 1.0)?;
            let ids: Vec<u32> = (0..n).map(|i| (i * 7919 % s.vocab) as u32).collect();
            Ok(Box::new(move || embedding::gather(&table, &ids).map(drop)))
        }),
        Item::new(
            "scatter",
            "scatter, visual tokens",
            label((features, d)),
            moved(2 * scattered + features * WORD),
            move |noise| {
                let [x, rows] = [noise.normal("x", &[n, d], 1.0)?, noise.normal("rows", &[features, d], 1.0)?];
                let ids = spots();
                Ok(Box::new(move || embedding::scatter_(&x, &ids, &rows)))
            },
        ),
        Item::new(
            "scatter_add",
            "scatter_add, their gradient",
            label((features, d)),
            moved(3 * scattered + features * WORD),
            move |noise| {
                let [x, rows] = [noise.normal("x", &[n, d], 1.0)?, noise.normal("rows", &[features, d], 1e-3)?];
                let ids = spots();
                Ok(Box::new(move || embedding::scatter_add_(&x, &ids, &rows)))
            },
        ),
        Item::new("patches", "patches", square, moved(2 * pixels), move |noise| {
            let pixels = noise.normal("pixels", &[s.pictures, 3, s.edge, s.edge], 1.0)?;
            Ok(Box::new(move || patches::unfold(&pixels, s.patch).map(drop)))
        }),
    ]
}
