//! The transformer block that backbones are built from: x → x + attention(norm(x)) → that + mlp(norm(that)), forward and backward.
//!
//! What differs between architectures is a [`Shape`] (kind of norm, biases, heads, MLP) and the [`Names`] of its modules; adapters
//! may be inserted before it all, and behind attention and MLP.

mod mlp;

use super::build::{linear, norm};
use super::init::Source;
use super::insert::{Inputs, Inserts};
use super::linear::{self, InputGrad, Linear};
use super::norm::Norm;
use super::params::{Grads, module};
use super::role::Scope;
use super::segment::{Kept, Segment, Side, kept_or, outputs_per_row, sum_bytes};
use crate::error::Result;
use crate::ops::matmul::add_;
use crate::ops::norm::{Kind, Stats};
use crate::ops::{attention, bytes, rope};
use candle_core::Tensor;
use mlp::Inner;
pub use mlp::{Mlp, MlpKind};

/// What a block computes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    /// Of the stream of rows.
    pub width: usize,
    /// Heads, and who sees whom.
    pub attention: attention::Config,
    /// Of both norms.
    pub norm: Kind,
    /// Of both norms.
    pub eps: f64,
    /// Have q, k and v biases?
    pub qkv_bias: bool,
    /// Has the projection behind attention one?
    pub out_bias: bool,
    /// Gated or not, and its activation.
    pub mlp: MlpKind,
    /// Width inside the MLP.
    pub hidden: usize,
    /// Have the MLP's layers biases?
    pub mlp_bias: bool,
}

/// What an architecture calls the modules of a block, as HF does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Names {
    /// Before attention, before the MLP.
    pub norms: [&'static str; 2],
    pub qkv: [&'static str; 3],
    /// Behind attention.
    pub out: &'static str,
    /// The layers that the MLP begins with: one, or gate and up.
    pub open: &'static [&'static str],
    /// The layer that it ends with.
    pub close: &'static str,
}

/// One block.
#[derive(Debug, Clone)]
pub struct Block {
    /// E.g. `language.layers.0`.
    pub scope: Scope,
    /// What this block keeps, if it is not what the pass says.
    pub policy: Option<Kept>,
    attention: attention::Config,
    norms: [Norm; 2],
    qkv: [Linear; 3],
    out: Linear,
    mlp: Mlp,
    /// On the block's input.
    pub before: Inserts,
    /// On what attention and the MLP give, before it is added to the stream.
    pub after: [Inserts; 2],
}

/// Activations of one pass; [`Segment::bytes_per_row`] counts the same.
pub struct Saved {
    stats: [Stats; 2],
    qkv: [Tensor; 3],
    o: Tensor,
    /// Of attention; none where nothing is kept.
    lse: Option<Tensor>,
    /// After attention, `[N, D]`.
    mid: Tensor,
    /// Before the MLP's activation.
    inner: Inner,
    /// Of q, k, v; out; the MLP's first and last.
    linears: [linear::Saved; 4],
    /// Outputs of both norms and of the activation, where they are kept because a layer that trains reads them.
    outputs: [Option<Tensor>; 3],
    /// The stream behind the inserts before the block, if there are any.
    entered: Option<Tensor>,
    /// What went into inserts: before the block, behind attention, behind the MLP.
    inserted: [Inputs; 3],
}

/// Keys and values of the tokens seen so far, one sequence, `[seen, kv_heads·hd]`.
#[derive(Debug, Clone, Default)]
pub struct Cache(Option<(Tensor, Tensor)>);

impl Cache {
    fn extend(&mut self, k: Tensor, v: Tensor) -> Result<(Tensor, Tensor)> {
        let kv = match self.0.take() {
            Some((ks, vs)) => (Tensor::cat(&[ks, k], 0)?, Tensor::cat(&[vs, v], 0)?),
            None => (k, v),
        };
        self.0 = Some(kv.clone());
        Ok(kv)
    }
}

impl Block {
    /// Builds a block from `src`.
    pub fn new(of: &Scope, shape: &Shape, names: &Names, src: &mut dyn Source) -> Result<Self> {
        let (d, a) = (shape.width, shape.attention);
        let [q, kv] = [a.heads, a.kv_heads].map(|heads| heads * a.head_dim);
        let [first, second] = names.norms;
        let projection =
            |src: &mut dyn Source, i: usize, width| linear(src, &of.at(names.qkv[i]), width, d, shape.qkv_bias);
        let before_attention = norm(src, shape.norm, &of.at(first), d, shape.eps)?;
        let qkv = [projection(src, 0, q)?, projection(src, 1, kv)?, projection(src, 2, kv)?];
        let out = linear(src, &of.at(names.out), d, q, shape.out_bias)?;
        let before_mlp = norm(src, shape.norm, &of.at(second), d, shape.eps)?;
        let mlp = Mlp::new(of, shape, names, src)?;
        Ok(Self {
            policy: None,
            attention: a,
            norms: [before_attention, before_mlp],
            qkv,
            out,
            mlp,
            before: Inserts::default(),
            after: Default::default(),
            scope: of.clone(),
        })
    }

    /// The block on the newest tokens of one sequence; keys and values of the older ones come from `cache`.
    pub fn extend(&self, x: &Tensor, side: &Side, cache: &mut Cache) -> Result<Tensor> {
        Ok(self.run(x, side, Some(cache), Kept::Nothing)?.0)
    }

    /// Width of the stream.
    pub fn width(&self) -> Result<usize> {
        Ok(self.out.dims()?.0)
    }

    /// Every linear layer, in order.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.qkv.iter().chain([&self.out]).chain(self.mlp.layers())
    }

    /// [`Block::linears`], to change them.
    pub fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.qkv.iter_mut().chain([&mut self.out]).chain(self.mlp.layers_mut())
    }

    fn qkv(&self) -> [&Linear; 3] {
        self.qkv.each_ref()
    }

    /// Which inputs of linear layers backward reads: that of q, k and v, that of the MLP's first, that of its last.
    fn needs(&self) -> [bool; 3] {
        let any = |layers: &[Linear]| layers.iter().any(Linear::needs_input);
        [any(&self.qkv), any(&self.mlp.open), self.mlp.close.needs_input()]
    }

    fn run(&self, x: &Tensor, side: &Side, cache: Option<&mut Cache>, kept: Kept) -> Result<(Tensor, Saved)> {
        let keeps = self.needs().map(|needed| needed && kept == Kept::All);
        let (x, before) = self.before.forward(x.clone(), side)?;
        let entered = (!self.before.is_empty()).then(|| x.clone());
        let (h, stats1) = self.norms[0].forward(&x)?;
        let ([q, mut k, mut v], sqkv) = linear::forward_all(self.qkv(), &h, side)?;
        let norm1 = keeps[0].then_some(h);
        if let Some((cos, sin)) = &side.rope {
            rope::rotate_(&q, &k, cos, sin)?;
        }
        if let Some(cache) = cache {
            (k, v) = cache.extend(k, v)?;
        }
        let recorded = kept != Kept::Nothing;
        let (o, lse) = attention::forward_kept(self.attention, &side.sequences, &q, &k, &v, recorded)?;
        let (mid, so) = self.out.forward(&o, side)?;
        let (mid, after_attention) = self.after[0].forward(mid, side)?;
        let (h, stats2) = self.norms[1].forward_residual_(&mid, &x)?;
        let (inner, s1) = self.mlp.open(&h, side)?;
        let norm2 = keeps[1].then_some(h);
        let act = self.mlp.activate(&inner)?;
        let (y, s2) = self.mlp.close.forward(&act, side)?;
        let (y, after_mlp) = self.after[1].forward(y, side)?;
        add_(&y, 1.0, &mid)?;
        let inserted = [before, after_attention, after_mlp];
        let (linears, outputs) = ([sqkv, so, s1, s2], [norm1, norm2, keeps[2].then_some(act)]);
        let (stats, qkv) = ([stats1, stats2], [q, k, v]);
        Ok((y, Saved { stats, qkv, o, lse, mid, inner, linears, outputs, entered, inserted }))
    }
}

impl Segment for Block {
    type Saved = Saved;

    fn name(&self) -> &str {
        self.scope.name()
    }

    fn policy(&self) -> Option<Kept> {
        self.policy
    }

    fn forward(&self, x: &Tensor, side: &Side, kept: Kept) -> Result<(Tensor, Saved)> {
        self.run(x, side, None, kept)
    }

    fn bytes(s: &Saved) -> usize {
        let tensors = s.qkv.iter().chain(s.stats.iter().map(|s| &s.0)).chain([&s.o, &s.mid]).chain(&s.inner);
        let linears = s.linears.iter().map(linear::Saved::bytes);
        // The first input before the block is the block's own; what came out of these inserts takes its place in the sum.
        let inserted = s.inserted.iter().map(Inputs::bytes);
        tensors.chain(&s.lse).chain(s.outputs.iter().flatten()).map(bytes).chain(linears).chain(inserted).sum()
    }

    fn bytes_per_row(&self, kept: Kept) -> Result<usize> {
        let ((q, d), (kv, _), (m, _)) = (self.qkv[0].dims()?, self.qkv[1].dims()?, self.mlp.open[0].dims()?);
        let dtype = self.out.place().dtype;
        let (e, sums) = (dtype.size_in_bytes(), sum_bytes(dtype));
        match kept {
            Kept::Nothing => return Ok(0),
            Kept::Input => return Ok(e * d),
            Kept::Minimal | Kept::All => {}
        }
        // x, mid; q, o; k, v; before the activation; log-sum-exp and the norms' statistics.
        let inner = self.mlp.open.len() * m;
        let mut all = e * (2 * d + 2 * q + 2 * kv + inner) + sums * (self.attention.heads + 4);
        for l in self.linears() {
            all += l.saved_bytes()?;
        }
        if kept == Kept::All {
            all += e * outputs_per_row(self.needs(), [d, d, m]);
        }
        let inserts = self.before.len() + self.after.iter().map(Inserts::len).sum::<usize>();
        Ok(all + e * d * inserts)
    }

    fn backward(
        &self,
        x: &Tensor,
        s: Saved,
        dy: Tensor,
        side: &Side,
        grads: &mut Grads,
        need_dx: bool,
    ) -> Result<Option<Tensor>> {
        let ([sqkv, so, s1, s2], [norm1, norm2, act], needs) = (&s.linears, s.outputs, self.needs());
        let [before, after_attention, after_mlp] = &s.inserted;
        let x = s.entered.as_ref().unwrap_or(x);
        // MLP
        let dinserted = self.after[1].backward(after_mlp, &dy, side, grads, true)?;
        let dinner = self.mlp.backward(&s.inner, s2, act, dinserted.as_ref().unwrap_or(&dy), side, grads)?;
        let h = kept_or(norm2, needs[1], || self.norms[1].rebuild(&s.mid, &s.stats[1]))?;
        let (open, dinner): (Vec<_>, Vec<_>) = self.mlp.open.iter().zip(&dinner).unzip();
        let mut dh = InputGrad::Empty;
        linear::backward_all(&open, s1, h.as_ref(), &dinner, side, grads, &mut dh)?;
        let dmid = dy;
        self.norms[1].backward_into(&s.mid, &s.stats[1], dh.sum()?, grads, &dmid)?;
        // attention
        let dinserted = self.after[0].backward(after_attention, &dmid, side, grads, true)?;
        let mut d_o = InputGrad::Empty;
        self.out.backward(so, Some(&s.o), dinserted.as_ref().unwrap_or(&dmid), side, grads, &mut d_o)?;
        let [q, k, v] = &s.qkv;
        let saved = attention::Saved { q, k, v, o: &s.o, lse: attention::kept(s.lse.as_ref())? };
        let (dq, dk, dv) = attention::backward(self.attention, &side.sequences, saved, d_o.sum()?)?;
        if let Some((cos, sin)) = &side.rope {
            rope::rotate_back_(&dq, &dk, cos, sin)?;
        }
        let h = kept_or(norm1, needs[0], || self.norms[0].rebuild(x, &s.stats[0]))?;
        let entered = !self.before.is_empty();
        let mut dh = InputGrad::new(need_dx || entered || self.norms[0].trains());
        linear::backward_all(&self.qkv(), sqkv, h.as_ref(), &[&dq, &dk, &dv], side, grads, &mut dh)?;
        let Some(dh) = dh.take() else { return Ok(None) };
        self.norms[0].backward_into(x, &s.stats[0], &dh, grads, &dmid)?;
        let dinput = self.before.backward(before, &dmid, side, grads, need_dx)?;
        Ok(need_dx.then_some(dinput.unwrap_or(dmid)))
    }
}

module!(Block: before, norms, qkv, out, mlp, after);
