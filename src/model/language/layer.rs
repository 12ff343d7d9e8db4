//! One LLaMA decoder layer (Touvron et al. 2023; HF `LlamaDecoderLayer`), forward and backward.

use crate::error::Result;
use crate::model::linear::{self, InputGrad, Linear};
use crate::model::norm::Norm;
use crate::model::params::{Grads, Module, Param};
use crate::model::segment::{Segment, Side};
use crate::ops::activation::{swiglu, swiglu_backward};
use crate::ops::matmul::add_;
use crate::ops::norm::Stats;
use crate::ops::{attention, rope};
use crate::recipe::schema::Activations;
use candle_core::Tensor;

/// x → x + attention(norm(x)) → that + mlp(norm(that)).
#[derive(Debug, Clone)]
pub struct Layer {
    /// E.g. `language.layers.0`.
    pub name: String,
    /// What this layer keeps, if it is not what the pass says.
    pub policy: Option<Activations>,
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
}

/// Activations of one pass. Norm and SwiGLU outputs are rebuilt elementwise when a trained layer needs them.
pub struct Saved {
    stats: [Stats; 2],
    qkv: [Tensor; 3],
    o: Tensor,
    lse: Tensor,
    /// After attention, `[N, D]`.
    mid: Tensor,
    gate: Tensor,
    up: Tensor,
    linears: [linear::Saved; 7],
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
        Ok(self.run(x, side, Some(cache))?.0)
    }

    fn run(&self, x: &Tensor, side: &Side, cache: Option<&mut Cache>) -> Result<(Tensor, Saved)> {
        let (h, stats1) = self.input_layernorm.forward(x)?;
        let (q, sq) = self.q_proj.forward(&h, side)?;
        let (mut k, sk) = self.k_proj.forward(&h, side)?;
        let (mut v, sv) = self.v_proj.forward(&h, side)?;
        if let Some((cos, sin)) = &side.rope {
            rope::rotate_(&q, &k, cos, sin)?;
        }
        if let Some(cache) = cache {
            (k, v) = cache.extend(k, v)?;
        }
        let (o, lse) = attention::forward(self.attention, &side.sequences, &q, &k, &v)?;
        let (mid, so) = self.o_proj.forward(&o, side)?;
        let (h, stats2) = self.post_attention_layernorm.forward_residual_(&mid, x)?;
        let (gate, sg) = self.gate_proj.forward(&h, side)?;
        let (up, su) = self.up_proj.forward(&h, side)?;
        let (y, sd) = self.down_proj.forward(&swiglu(&gate, &up)?, side)?;
        add_(&y, 1.0, &mid)?;
        let linears = [sq, sk, sv, so, sg, su, sd];
        Ok((y, Saved { stats: [stats1, stats2], qkv: [q, k, v], o, lse, mid, gate, up, linears }))
    }
}

impl Segment for Layer {
    type Saved = Saved;

    fn name(&self) -> &str {
        &self.name
    }

    fn policy(&self) -> Option<Activations> {
        self.policy
    }

    fn forward(&self, x: &Tensor, side: &Side) -> Result<(Tensor, Saved)> {
        self.run(x, side, None)
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
        let [sq, sk, sv, so, sg, su, sd] = &s.linears;
        // MLP
        let mut dact = InputGrad::Empty;
        let rest = self.down_proj.backward_to_input(sd, &dy, side, grads, &mut dact)?;
        let act = swiglu_backward(&s.gate, &s.up, dact.sum()?, self.down_proj.needs_input())?;
        self.down_proj.backward_from_input(rest, act.y.as_ref(), &dy, side, grads)?;
        let (dgate, dup) = (act.gate, act.up);
        let needs = self.gate_proj.needs_input() || self.up_proj.needs_input();
        let h = needs.then(|| self.post_attention_layernorm.rebuild(&s.mid, &s.stats[1])).transpose()?;
        let mut dh = InputGrad::Empty;
        self.gate_proj.backward(sg, h.as_ref(), &dgate, side, grads, &mut dh)?;
        self.up_proj.backward(su, h.as_ref(), &dup, side, grads, &mut dh)?;
        let dmid = dy;
        self.post_attention_layernorm.backward_into(&s.mid, &s.stats[1], dh.sum()?, grads, &dmid)?;
        // attention
        let mut d_o = InputGrad::Empty;
        self.o_proj.backward(so, Some(&s.o), &dmid, side, grads, &mut d_o)?;
        let [q, k, v] = &s.qkv;
        let saved = attention::Saved { q, k, v, o: &s.o, lse: &s.lse };
        let (dq, dk, dv) = attention::backward(self.attention, &side.sequences, saved, d_o.sum()?)?;
        if let Some((cos, sin)) = &side.rope {
            rope::rotate_back_(&dq, &dk, cos, sin)?;
        }
        let trained = [&self.q_proj, &self.k_proj, &self.v_proj].iter().any(|l| l.needs_input());
        let h = trained.then(|| self.input_layernorm.rebuild(x, &s.stats[0])).transpose()?;
        let norm_trains = self.input_layernorm.weight.trainable;
        let mut dh = InputGrad::new(need_dx || norm_trains);
        for (l, saved, d) in [(&self.q_proj, sq, &dq), (&self.k_proj, sk, &dk), (&self.v_proj, sv, &dv)] {
            l.backward(saved, h.as_ref(), d, side, grads, &mut dh)?;
        }
        let Some(dh) = dh.take() else { return Ok(None) };
        self.input_layernorm.backward_into(x, &s.stats[0], &dh, grads, &dmid)?;
        Ok(need_dx.then_some(dmid))
    }
}

impl Module for Layer {
    fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
        self.input_layernorm.visit(f);
        self.for_each_linear(&mut |l| l.visit(f));
        self.post_attention_layernorm.visit(f);
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
