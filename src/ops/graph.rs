//! Our ops as nodes of candle's graph, for modules that are written as ordinary differentiable code (see
//! `model::island`): the same kernels and the same backward as in the trunk. A parameter may be wider than the rows that it meets:
//! they are computed in the rows' type, and its gradient, summed in f32, has its own.

use super::activation;
use super::attention::{self, Config, Sequences};
use super::launch::widen;
use super::matmul::{self, Mat, matmul as product, matmul_wide, sum_rows};
use super::norm::{self, Kind};
use super::random::{self, Key};
use crate::error::{Error, Result};
use crate::spec::Activation;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, DType, InplaceOp1, Layout, Shape, Storage, Tensor,
};
use std::sync::Mutex;

/// A parameter as rows of the type of `x` are computed with.
fn like(p: &Tensor, x: &Tensor) -> Result<Tensor> {
    Ok(p.detach().to_dtype(x.dtype())?)
}

/// `x·Wᵀ + b`: `x` `[N, in]`, `w` `[out, in]`, `b` `[out]` → `[N, out]`.
pub fn linear(x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    let own = b.map(|b| like(b, x)).transpose()?;
    let y = matmul::linear(&x.detach(), &like(w, x)?, own.as_ref())?;
    let (tracked_x, tracked_w) = (x.track_op(), w.track_op());
    let gradients = move |x: &Tensor, w: &Tensor, dy: &Tensor| -> Result<[Option<Tensor>; 2]> {
        let dx = tracked_x.then(|| product(Mat::N(dy), Mat::N(&like(w, dy)?))).transpose()?;
        let dw = tracked_w.then(|| matmul_wide(Mat::T(dy), Mat::N(x))).transpose()?;
        let dw = dw.map(|dw| dw.to_dtype(w.dtype())).transpose()?;
        Ok([dx, dw])
    };
    let Some(b) = b else {
        return node2("linear", x, w, y, Box::new(move |[x, w], at| gradients(x, w, at.dy)));
    };
    let tracked_b = b.track_op();
    let backward = move |[x, w, b]: [&Tensor; 3], Ends { dy, .. }: Ends| {
        let [dx, dw] = gradients(x, w, dy)?;
        let db = tracked_b.then(|| Ok::<_, Error>(sum_rows(dy)?.to_dtype(b.dtype())?)).transpose()?;
        Ok([dx, dw, db])
    };
    node3("linear", [x, w, b], y, Box::new(backward))
}

/// `x·tanh(g)`, rows `[N, D]` behind a gate `[1]`.
pub fn gated(x: &Tensor, g: &Tensor) -> Result<Tensor> {
    let y = x.detach().broadcast_mul(&like(&g.detach().tanh()?, x)?)?;
    let (tracked_x, tracked_g) = (x.track_op(), g.track_op());
    let backward = move |[x, g]: [&Tensor; 2], Ends { dy, .. }: Ends| {
        let t = g.tanh()?;
        let narrow = like(&t, dy)?;
        let dx = tracked_x.then(|| dy.broadcast_mul(&narrow)).transpose()?;
        let dg = || -> Result<Tensor> {
            let product = (widen(x)? * widen(dy)?)?;
            let along = sum_rows(&product)?.sum_all()?.reshape(1)?.to_dtype(g.dtype())?;
            Ok((along * (1.0 - t.sqr()?)?)?)
        };
        Ok([dx, tracked_g.then(dg).transpose()?])
    };
    node2("gated", x, g, y, Box::new(backward))
}

/// `act(x)`, any shape.
pub fn activate(act: Activation, x: &Tensor) -> Result<Tensor> {
    let y = activation::forward(act, &x.detach())?;
    node1("activation", x, y, Box::new(move |[x], at| Ok([Some(activation::backward(act, x, at.dy)?)])))
}

/// `silu(gate)·up`, of one shape.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let y = activation::swiglu(&gate.detach(), &up.detach())?;
    let backward = move |[gate, up]: [&Tensor; 2], at: Ends| {
        let g = activation::swiglu_backward(gate, up, at.dy, false)?;
        Ok([Some(g.gate), Some(g.up)])
    };
    node2("swiglu", gate, up, y, Box::new(backward))
}

/// A parameter `[Q, D]` → `[times·Q, D]` of the type `dtype`, the rows over and over; backward sums in f32.
pub fn repeat(x: &Tensor, times: usize, dtype: DType) -> Result<Tensor> {
    let (q, d) = x.dims2()?;
    // A fresh buffer also of a single copy: the node takes it.
    let y = x
        .detach()
        .to_dtype(dtype)?
        .unsqueeze(0)?
        .broadcast_as((times, q, d))?
        .force_contiguous()?
        .reshape((times * q, d))?;
    let backward = move |[x]: [&Tensor; 1], at: Ends| {
        let sum = sum_rows(&at.dy.reshape((times, q * d))?)?;
        Ok([Some(sum.reshape((q, d))?.to_dtype(x.dtype())?)])
    };
    node1("repeat", x, y, Box::new(backward))
}

/// Inverted dropout with the mask of `key`, any shape; backward draws the mask again.
pub fn dropout(key: Key, x: &Tensor, p: f64) -> Result<Tensor> {
    let y = random::dropout(key, &x.detach().contiguous()?, p)?;
    node1("dropout", x, y, Box::new(move |[_], at| Ok([Some(random::dropout(key, at.dy, p)?)])))
}

/// LayerNorm over rows, `[N, D]` with scale and shift `[D]`.
pub fn layer_norm(x: &Tensor, w: &Tensor, b: &Tensor, eps: f64) -> Result<Tensor> {
    let (y, stats) = norm::forward(Kind::Layer, &x.detach(), &like(w, x)?, Some(&like(b, x)?), eps)?;
    let scale = w.track_op() || b.track_op();
    let backward = move |[x, w, b]: [&Tensor; 3], Ends { dy, .. }: Ends| {
        let (dx, scale) = norm::backward(Kind::Layer, x, &like(w, x)?, &stats, dy, scale)?;
        let Some(scale) = scale else { return Ok([Some(dx), None, None]) };
        Ok([Some(dx), Some(scale.weight.to_dtype(w.dtype())?), Some(scale.bias.to_dtype(b.dtype())?)])
    };
    node3("layer_norm", [x, w, b], y, Box::new(backward))
}

/// RMSNorm over rows, `[N, D]` with scale `[D]`.
pub fn rms_norm(x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
    let (y, stats) = norm::forward(Kind::Rms, &x.detach(), &like(w, x)?, None, eps)?;
    let scale = w.track_op();
    let backward = move |[x, w]: [&Tensor; 2], at: Ends| {
        let (dx, scale) = norm::backward(Kind::Rms, x, &like(w, x)?, &stats, at.dy, scale)?;
        Ok([Some(dx), scale.map(|s| s.weight.to_dtype(w.dtype())).transpose()?])
    };
    node2("rms_norm", x, w, y, Box::new(backward))
}

/// Attention of the queries `[N, heads·hd]` over keys and values `[M, kv_heads·hd]`, see [`attention::forward`]. No two of the
/// `sequences` may share keys.
pub fn attention(cfg: Config, sequences: &Sequences, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let (q, k, v) = (&q.contiguous()?, &k.contiguous()?, &v.contiguous()?);
    let (y, lse) = attention::forward(cfg, sequences, &q.detach(), &k.detach(), &v.detach())?;
    let sequences = sequences.clone();
    let backward = move |[q, k, v]: [&Tensor; 3], Ends { y, dy }: Ends| {
        let saved = attention::Saved { q, k, v, o: y, lse: &lse };
        let (dq, dk, dv) = attention::backward(cfg, &sequences, saved, dy)?;
        Ok([Some(dq), Some(dk), Some(dv)])
    };
    node3("attention", [q, k, v], y, Box::new(backward))
}

/// Gradients of a node's inputs from its output and the gradient there; all tensors are detached and contiguous.
type Backward<const N: usize> = Box<dyn Fn([&Tensor; N], Ends) -> Result<[Option<Tensor>; N]> + Send + Sync>;

/// A node's output and the gradient there.
struct Ends<'a> {
    y: &'a Tensor,
    dy: &'a Tensor,
}

/// A result that is there already, waiting to become a node.
struct Node<const N: usize> {
    name: &'static str,
    out: Mutex<Option<(Storage, Shape)>>,
    backward: Backward<N>,
}

impl<const N: usize> Node<N> {
    fn new(name: &'static str, out: Tensor, backward: Backward<N>) -> Result<Self> {
        let shape = out.shape().clone();
        Ok(Self { name, out: Mutex::new(Some((take(out)?, shape))), backward })
    }

    fn take(&self) -> candle_core::Result<(Storage, Shape)> {
        let taken = self.out.lock().map_err(|_| candle_core::Error::Msg("poisoned".into()))?.take();
        taken.ok_or_else(|| candle_core::Error::Msg(format!("{}: its result was taken before", self.name)))
    }

    fn cpu(&self) -> candle_core::Result<(CpuStorage, Shape)> {
        match self.take()? {
            (Storage::Cpu(s), shape) => Ok((s, shape)),
            _ => candle_core::bail!("{}: inputs on the CPU, result elsewhere", self.name),
        }
    }

    fn cuda(&self) -> candle_core::Result<(CudaStorage, Shape)> {
        match self.take()? {
            (Storage::Cuda(s), shape) => Ok((s, shape)),
            _ => candle_core::bail!("{}: inputs on a GPU, result elsewhere", self.name),
        }
    }

    fn gradients(&self, inputs: [&Tensor; N], y: &Tensor, dy: &Tensor) -> candle_core::Result<[Option<Tensor>; N]> {
        let plain = |t: &Tensor| t.detach().contiguous();
        let mut own = Vec::with_capacity(N);
        for t in inputs {
            own.push(plain(t)?);
        }
        let inputs = std::array::from_fn(|i| &own[i]);
        (self.backward)(inputs, Ends { y: &plain(y)?, dy: &plain(dy)? })
            .map_err(|e| candle_core::Error::Msg(format!("{}: {e}", self.name)))
    }
}

fn node1(name: &'static str, x: &Tensor, y: Tensor, backward: Backward<1>) -> Result<Tensor> {
    Ok(x.apply_op1(Node::new(name, y, backward)?)?)
}

fn node2(name: &'static str, a: &Tensor, b: &Tensor, y: Tensor, backward: Backward<2>) -> Result<Tensor> {
    Ok(a.apply_op2(b, Node::new(name, y, backward)?)?)
}

fn node3(name: &'static str, [a, b, c]: [&Tensor; 3], y: Tensor, backward: Backward<3>) -> Result<Tensor> {
    Ok(a.apply_op3(b, c, Node::new(name, y, backward)?)?)
}

impl CustomOp1 for Node<1> {
    fn name(&self) -> &'static str {
        self.name
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        self.cpu()
    }
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        self.cuda()
    }
    fn bwd(&self, x: &Tensor, y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let [dx] = self.gradients([x], y, dy)?;
        Ok(dx)
    }
}

impl CustomOp2 for Node<2> {
    fn name(&self) -> &'static str {
        self.name
    }
    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.cpu()
    }
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        self.cuda()
    }
    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let [da, db] = self.gradients([a, b], y, dy)?;
        Ok((da, db))
    }
}

impl CustomOp3 for Node<3> {
    fn name(&self) -> &'static str {
        self.name
    }
    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.cpu()
    }
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        self.cuda()
    }
    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [da, db, dc] = self.gradients([a, b, c], y, dy)?;
        Ok((da, db, dc))
    }
}

/// Moves the memory out of a fresh tensor that nobody else holds, without a copy.
fn take(t: Tensor) -> Result<Storage> {
    struct Take(Mutex<Option<Storage>>);
    impl Take {
        fn put(&self, s: Storage) -> candle_core::Result<()> {
            *self.0.lock().map_err(|_| candle_core::Error::Msg("poisoned".into()))? = Some(s);
            Ok(())
        }
    }
    impl InplaceOp1 for Take {
        fn name(&self) -> &'static str {
            "take"
        }
        fn cpu_fwd(&self, s: &mut CpuStorage, _: &Layout) -> candle_core::Result<()> {
            self.put(Storage::Cpu(std::mem::replace(s, CpuStorage::U8(vec![]))))
        }
        #[cfg(feature = "cuda")]
        fn cuda_fwd(&self, s: &mut CudaStorage, _: &Layout) -> candle_core::Result<()> {
            use candle_core::backend::{BackendDevice, BackendStorage};
            // One byte takes its place: the tensor is dropped right after.
            let rest = s.device().zeros_impl(&Shape::from(1), candle_core::DType::U8)?;
            self.put(Storage::Cuda(std::mem::replace(s, rest)))
        }
    }
    if !t.is_contiguous() || t.layout().start_offset() != 0 {
        return take(t.force_contiguous()?);
    }
    let op = Take(Mutex::new(None));
    t.inplace_op1(&op)?;
    let taken = op.0.into_inner().ok().flatten();
    taken.ok_or_else(|| Error::new("a tensor's memory could not be moved into the graph"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::random::normal;
    use candle_core::{DType, Var};

    /// Σ c·f(vars) has the gradients that finite differences give.
    fn check(vars: &[Var], f: impl Fn() -> Tensor) {
        let c = normal(Key::new(7, "c"), f().dims(), 1.0, DType::F64).unwrap();
        let loss = || (f() * &c).unwrap().sum_all().unwrap();
        let grads = loss().backward().unwrap();
        for v in vars {
            let g: Vec<f64> = grads.get(v).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            let x: Vec<f64> = v.flatten_all().unwrap().to_vec1().unwrap();
            for i in 0..x.len() {
                let at = |d: f64| {
                    let mut x = x.clone();
                    x[i] += d;
                    v.set(&Tensor::from_vec(x, v.dims(), v.device()).unwrap()).unwrap();
                    loss().to_scalar::<f64>().unwrap()
                };
                let slope = (at(1e-5) - at(-1e-5)) / 2e-5;
                at(0.0);
                assert!((slope - g[i]).abs() < 1e-7 * (1.0 + slope.abs()), "{slope} {}", g[i]);
            }
        }
    }

    #[test]
    fn nodes_have_the_gradients_of_finite_differences() {
        let var = |name: &str, shape: &[usize]| {
            Var::from_tensor(&normal(Key::new(1, name), shape, 0.8, DType::F64).unwrap()).unwrap()
        };
        let (x, w, b) = (var("x", &[3, 4]), var("w", &[5, 4]), var("b", &[5]));
        let (scale, shift) = (var("s", &[5]), var("t", &[5]));
        let (scale4, gate) = (var("s4", &[4]), var("gate", &[3, 4]));
        let vars = [x.clone(), w.clone(), b.clone(), scale.clone(), shift.clone()];
        check(&vars, || {
            let y = linear(&x, &w, Some(&b)).unwrap();
            layer_norm(&activate(Activation::Gelu, &y).unwrap(), &scale, &shift, 1e-5).unwrap()
        });
        check(&[x.clone(), w.clone()], || linear(&x, &w, None).unwrap());
        check(&[x.clone(), scale4.clone()], || rms_norm(&x, &scale4, 1e-5).unwrap());
        check(&[x.clone(), gate.clone()], || swiglu(&x, &gate).unwrap());
        for times in [1, 3] {
            check(std::slice::from_ref(&x), || repeat(&x, times, DType::F64).unwrap());
        }
        let one = var("one", &[1]);
        check(&[x.clone(), one.clone()], || gated(&x, &one).unwrap());
        assert_eq!(repeat(&x, 1, DType::F64).unwrap().to_vec2::<f64>().unwrap(), x.to_vec2::<f64>().unwrap());
        check(std::slice::from_ref(&x), || dropout(Key::new(3, "mask"), &x, 0.4).unwrap());
    }

    #[test]
    fn attention_over_other_rows() {
        let var = |name: &str, shape: &[usize]| {
            Var::from_tensor(&normal(Key::new(2, name), shape, 0.8, DType::F64).unwrap()).unwrap()
        };
        // Query 2 belongs to no sequence; key 4 is nobody's.
        let (q, k, v) = (var("q", &[5, 12]), var("k", &[6, 6]), var("v", &[6, 6]));
        let cfg = Config { heads: 4, kv_heads: 2, head_dim: 3, causal: false };
        let sequences = vec![attention::Segment::new(0..2, 0..4), attention::Segment::new(3..5, 5..6)].into();
        let y = || attention(cfg, &sequences, &q, &k, &v).unwrap();
        check(&[q.clone(), k.clone(), v.clone()], y);
        assert_eq!(y().get(2).unwrap().to_vec1::<f64>().unwrap(), [0.0; 12]);
    }

    /// Rows in bf16: the gradient of an f32 parameter is a sum in f32, however many rows there are.
    #[test]
    fn gradients_of_wide_parameters_are_wide() {
        let random = |name: &str, shape: &[usize], dtype| {
            normal(Key::new(3, name), shape, 0.5, DType::F32).unwrap().to_dtype(dtype).unwrap()
        };
        let (x, dy) = (random("x", &[5000, 6], DType::BF16), random("dy", &[5000, 6], DType::BF16));
        let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
        let [w, b, gate, scale] = [("w", vec![6, 6]), ("b", vec![6]), ("gate", vec![1]), ("scale", vec![6])]
            .map(|(name, shape)| Var::from_tensor(&random(name, &shape, DType::F32)).unwrap());
        type Run<'a> = Box<dyn Fn(&Tensor, &[Tensor]) -> Tensor + 'a>;
        let cases: [(&str, Vec<&Var>, Run); 4] = [
            ("linear", vec![&w, &b], Box::new(|x, p| linear(x, &p[0], Some(&p[1])).unwrap())),
            ("gated", vec![&gate], Box::new(|x, p| gated(x, &p[0]).unwrap())),
            ("layer_norm", vec![&scale, &b], Box::new(|x, p| layer_norm(x, &p[0], &p[1], 1e-5).unwrap())),
            ("rms_norm", vec![&scale], Box::new(|x, p| rms_norm(x, &p[0], 1e-5).unwrap())),
        ];
        for (name, vars, run) in &cases {
            let own: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
            let grads = (run(&x, &own) * &dy).unwrap().sum_all().unwrap().backward().unwrap();
            let f64s: Vec<Var> = vars.iter().map(|v| Var::from_tensor(&wide(v)).unwrap()).collect();
            let own: Vec<Tensor> = f64s.iter().map(|v| v.as_tensor().clone()).collect();
            let exact = (run(&wide(&x), &own) * wide(&dy)).unwrap().sum_all().unwrap().backward().unwrap();
            for (v, v64) in vars.iter().zip(&f64s) {
                let (got, want) = (grads.get(v).unwrap(), exact.get(v64).unwrap());
                assert_eq!(got.dtype(), DType::F32, "{name}");
                let norm = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f64>().unwrap().sqrt();
                let off = norm(&(wide(got) - want).unwrap()) / norm(want);
                assert!(off < 2e-4, "{name}: off by {off:e}");
            }
        }
    }

    #[test]
    fn what_is_not_tracked_gets_no_gradient() {
        let x = Tensor::ones((2, 3), DType::F32, &candle_core::Device::Cpu).unwrap();
        let w = Var::from_tensor(&x).unwrap();
        let y = linear(&x, &w, None).unwrap();
        let grads = y.sum_all().unwrap().backward().unwrap();
        assert!(grads.get(&w).is_some() && grads.get(&x).is_none());
        assert!(!linear(&x, &x, None).unwrap().track_op());
    }
}
