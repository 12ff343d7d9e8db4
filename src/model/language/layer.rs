//! One LLaMA decoder layer (Touvron et al. 2023; HF `LlamaDecoderLayer`), forward and backward.

use crate::error::Result;
use crate::model::insert::{Inputs, Inserts};
use crate::model::linear::{self, InputGrad, Linear};
use crate::model::norm::Norm;
use crate::model::params::{Grads, Module, Param};
use crate::model::segment::{Kept, Segment, Side, kept_or, outputs_per_row, sum_bytes};
use crate::ops::activation::{swiglu, swiglu_backward};
use crate::ops::matmul::add_;
use crate::ops::norm::Stats;
use crate::ops::{attention, bytes, rope};
use candle_core::Tensor;

/// x → x + attention(norm(x)) → that + mlp(norm(that)); adapters may be inserted before it all, and behind attention and MLP.
#[derive(Debug, Clone)]
pub struct Layer {
    /// E.g. `language.layers.0`.
    pub name: String,
    /// What this layer keeps, if it is not what the pass says.
    pub policy: Option<Kept>,
    pub attention: attention::Config,
    pub input_layernorm: Norm,
    pub q_proj: Linear,
    pub k_proj: Linear,
    pub v_proj: Linear,
    pub o_proj: Linear,
    pub post_attention_layernorm: Norm,
    pub gate_proj: Linear,
    pub up_proj: Linear,
    pub down_proj: Linear,
    /// On the layer's input.
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
    gate: Tensor,
    up: Tensor,
    /// Of q, k, v; o; gate, up; down.
    linears: [linear::Saved; 4],
    /// Outputs of both norms and of SwiGLU, where they are kept because a layer that trains reads them.
    outputs: [Option<Tensor>; 3],
    /// The stream behind the inserts before the layer, if there are any.
    entered: Option<Tensor>,
    /// What went into inserts: before the layer, behind attention, behind the MLP.
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

impl Layer {
    /// The layer on the newest tokens of one sequence; keys and values of the older ones come from `cache`.
    pub fn extend(&self, x: &Tensor, side: &Side, cache: &mut Cache) -> Result<Tensor> {
        Ok(self.run(x, side, Some(cache), Kept::Nothing)?.0)
    }

    /// Which inputs of linear layers backward reads: that of q, k and v, that of gate and up, that of down.
    fn needs(&self) -> [bool; 3] {
        let any = |layers: &[&Linear]| layers.iter().any(|l| l.needs_input());
        [
            any(&[&self.q_proj, &self.k_proj, &self.v_proj]),
            any(&[&self.gate_proj, &self.up_proj]),
            any(&[&self.down_proj]),
        ]
    }

    fn run(&self, x: &Tensor, side: &Side, cache: Option<&mut Cache>, kept: Kept) -> Result<(Tensor, Saved)> {
        let keeps = self.needs().map(|needed| needed && kept == Kept::All);
        let (x, before) = self.before.forward(x.clone(), side)?;
        let entered = (!self.before.is_empty()).then(|| x.clone());
        let (h, stats1) = self.input_layernorm.forward(&x)?;
        let qkv = [&self.q_proj, &self.k_proj, &self.v_proj];
        let ([q, mut k, mut v], sqkv) = linear::forward_all(qkv, &h, side)?;
        let norm1 = keeps[0].then_some(h);
        if let Some((cos, sin)) = &side.rope {
            rope::rotate_(&q, &k, cos, sin)?;
        }
        if let Some(cache) = cache {
            (k, v) = cache.extend(k, v)?;
        }
        let recorded = kept != Kept::Nothing;
        let (o, lse) = attention::forward_kept(self.attention, &side.sequences, &q, &k, &v, recorded)?;
        let (mid, so) = self.o_proj.forward(&o, side)?;
        let (mid, after_attention) = self.after[0].forward(mid, side)?;
        let (h, stats2) = self.post_attention_layernorm.forward_residual_(&mid, &x)?;
        let ([gate, up], sgu) = linear::forward_all([&self.gate_proj, &self.up_proj], &h, side)?;
        let norm2 = keeps[1].then_some(h);
        let act = swiglu(&gate, &up)?;
        let (y, sd) = self.down_proj.forward(&act, side)?;
        let (y, after_mlp) = self.after[1].forward(y, side)?;
        add_(&y, 1.0, &mid)?;
        let inserted = [before, after_attention, after_mlp];
        let (linears, outputs) = ([sqkv, so, sgu, sd], [norm1, norm2, keeps[2].then_some(act)]);
        let saved = Saved {
            stats: [stats1, stats2],
            qkv: [q, k, v],
            o,
            lse,
            mid,
            gate,
            up,
            linears,
            outputs,
            entered,
            inserted,
        };
        Ok((y, saved))
    }
}

impl Segment for Layer {
    type Saved = Saved;

    fn name(&self) -> &str {
        &self.name
    }

    fn policy(&self) -> Option<Kept> {
        self.policy
    }

    fn forward(&self, x: &Tensor, side: &Side, kept: Kept) -> Result<(Tensor, Saved)> {
        self.run(x, side, None, kept)
    }

    fn bytes(s: &Saved) -> usize {
        let tensors = s.qkv.iter().chain(s.stats.iter().map(|s| &s.0)).chain([&s.o, &s.mid, &s.gate, &s.up]);
        let linears = s.linears.iter().map(linear::Saved::bytes);
        // The first input before the layer is the layer's own; what came out of these inserts takes its place in the sum.
        let inserted = s.inserted.iter().map(Inputs::bytes);
        tensors.chain(&s.lse).chain(s.outputs.iter().flatten()).map(bytes).chain(linears).chain(inserted).sum()
    }

    fn bytes_per_row(&self, kept: Kept) -> Result<usize> {
        let ((q, d), (kv, _), (m, _)) = (self.q_proj.dims()?, self.k_proj.dims()?, self.gate_proj.dims()?);
        let dtype = self.q_proj.place().dtype;
        let (e, sums) = (dtype.size_in_bytes(), sum_bytes(dtype));
        match kept {
            Kept::Nothing => return Ok(0),
            Kept::Input => return Ok(e * d),
            Kept::Minimal | Kept::All => {}
        }
        // x, mid; q, o; k, v; gate, up; log-sum-exp and the norms' statistics.
        let mut all = e * (2 * d + 2 * q + 2 * kv + 2 * m) + sums * (self.attention.heads + 4);
        let layers = [&self.q_proj, &self.k_proj, &self.v_proj, &self.o_proj, &self.gate_proj, &self.up_proj];
        for l in layers.into_iter().chain([&self.down_proj]) {
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
        let ([sqkv, so, sgu, sd], [norm1, norm2, act], needs) = (&s.linears, s.outputs, self.needs());
        let [before, after_attention, after_mlp] = &s.inserted;
        let x = s.entered.as_ref().unwrap_or(x);
        // MLP
        let dinserted = self.after[1].backward(after_mlp, &dy, side, grads, true)?;
        let mut dact = InputGrad::Empty;
        let (down, dys) = ([&self.down_proj], [dinserted.as_ref().unwrap_or(&dy)]);
        let rest = linear::backward_to_input(&down, sd, &dys, side, grads, &mut dact)?;
        let inner = swiglu_backward(&s.gate, &s.up, dact.sum()?, needs[2] && act.is_none())?;
        linear::backward_from_input(&down, rest, act.or(inner.y).as_ref(), side, grads)?;
        let h = kept_or(norm2, needs[1], || self.post_attention_layernorm.rebuild(&s.mid, &s.stats[1]))?;
        let (gate_up, dys) = ([&self.gate_proj, &self.up_proj], [&inner.gate, &inner.up]);
        let mut dh = InputGrad::Empty;
        linear::backward_all(&gate_up, sgu, h.as_ref(), &dys, side, grads, &mut dh)?;
        let dmid = dy;
        self.post_attention_layernorm.backward_into(&s.mid, &s.stats[1], dh.sum()?, grads, &dmid)?;
        // attention
        let dinserted = self.after[0].backward(after_attention, &dmid, side, grads, true)?;
        let mut d_o = InputGrad::Empty;
        self.o_proj.backward(so, Some(&s.o), dinserted.as_ref().unwrap_or(&dmid), side, grads, &mut d_o)?;
        let [q, k, v] = &s.qkv;
        let saved = attention::Saved { q, k, v, o: &s.o, lse: attention::kept(s.lse.as_ref())? };
        let (dq, dk, dv) = attention::backward(self.attention, &side.sequences, saved, d_o.sum()?)?;
        if let Some((cos, sin)) = &side.rope {
            rope::rotate_back_(&dq, &dk, cos, sin)?;
        }
        let h = kept_or(norm1, needs[0], || self.input_layernorm.rebuild(x, &s.stats[0]))?;
        let entered = !self.before.is_empty();
        let mut dh = InputGrad::new(need_dx || entered || self.input_layernorm.weight.trainable);
        let qkv = [&self.q_proj, &self.k_proj, &self.v_proj];
        linear::backward_all(&qkv, sqkv, h.as_ref(), &[&dq, &dk, &dv], side, grads, &mut dh)?;
        let Some(dh) = dh.take() else { return Ok(None) };
        self.input_layernorm.backward_into(x, &s.stats[0], &dh, grads, &dmid)?;
        let dinput = self.before.backward(before, &dmid, side, grads, need_dx)?;
        Ok(need_dx.then_some(dinput.unwrap_or(dmid)))
    }
}

impl Module for Layer {
    fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
        self.before.visit(f);
        self.input_layernorm.visit(f);
        self.for_each_linear(&mut |l| l.visit(f));
        self.post_attention_layernorm.visit(f);
        self.after.iter_mut().for_each(|i| i.visit(f));
    }
}

impl Layer {
    /// The seven linear layers.
    pub fn for_each_linear(&mut self, f: &mut dyn FnMut(&mut Linear)) {
        for l in [
            &mut self.q_proj,
            &mut self.k_proj,
            &mut self.v_proj,
            &mut self.o_proj,
            &mut self.gate_proj,
            &mut self.up_proj,
            &mut self.down_proj,
        ] {
            f(l);
        }
    }
}
