//! One CLIP encoder layer (Radford et al. 2021; HF `CLIPEncoderLayer`), forward and backward.

use crate::error::Result;
use crate::model::linear::{self, InputGrad, Linear};
use crate::model::norm::Norm;
use crate::model::params::{Grads, Module, Param};
use crate::model::segment::{Segment, Side};
use crate::ops::matmul::add_;
use crate::ops::norm::Stats;
use crate::ops::{activation, attention};
use crate::recipe::schema::{Activation, Activations};
use candle_core::Tensor;

/// x → x + attention(norm(x)) → that + mlp(norm(that)).
#[derive(Debug, Clone)]
pub struct Layer {
    /// E.g. `vision.encoder.layers.0`.
    pub name: String,
    /// What this layer keeps, if it is not what the pass says.
    pub policy: Option<Activations>,
    pub attention: attention::Config,
    pub act: Activation,
    pub layer_norm1: Norm,
    pub q_proj: Linear,
    pub k_proj: Linear,
    pub v_proj: Linear,
    pub out_proj: Linear,
    pub layer_norm2: Norm,
    pub fc1: Linear,
    pub fc2: Linear,
}

/// Activations of one pass.
pub struct Saved {
    stats: [Stats; 2],
    qkv: [Tensor; 3],
    o: Tensor,
    lse: Tensor,
    mid: Tensor,
    /// Before the activation, `[N, intermediate]`.
    inner: Tensor,
    linears: [linear::Saved; 6],
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
        let (h, stats1) = self.layer_norm1.forward(x)?;
        let (q, sq) = self.q_proj.forward(&h, side)?;
        let (k, sk) = self.k_proj.forward(&h, side)?;
        let (v, sv) = self.v_proj.forward(&h, side)?;
        let (o, lse) = attention::forward(self.attention, &side.sequences, &q, &k, &v)?;
        let (mid, so) = self.out_proj.forward(&o, side)?;
        let (h, stats2) = self.layer_norm2.forward_residual_(&mid, x)?;
        let (inner, s1) = self.fc1.forward(&h, side)?;
        let (y, s2) = self.fc2.forward(&activation::forward(self.act, &inner)?, side)?;
        add_(&y, 1.0, &mid)?;
        let linears = [sq, sk, sv, so, s1, s2];
        Ok((y, Saved { stats: [stats1, stats2], qkv: [q, k, v], o, lse, mid, inner, linears }))
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
        let [sq, sk, sv, so, s1, s2] = &s.linears;
        // MLP
        let act = self.fc2.needs_input().then(|| activation::forward(self.act, &s.inner)).transpose()?;
        let mut dact = InputGrad::Empty;
        self.fc2.backward(s2, act.as_ref(), &dy, side, grads, &mut dact)?;
        let dinner = activation::backward(self.act, &s.inner, dact.sum()?)?;
        let h = self.fc1.needs_input().then(|| self.layer_norm2.rebuild(&s.mid, &s.stats[1])).transpose()?;
        let mut dh = InputGrad::Empty;
        self.fc1.backward(s1, h.as_ref(), &dinner, side, grads, &mut dh)?;
        let dmid = dy;
        self.layer_norm2.backward_into(&s.mid, &s.stats[1], dh.sum()?, grads, &dmid)?;
        // attention
        let mut d_o = InputGrad::Empty;
        self.out_proj.backward(so, Some(&s.o), &dmid, side, grads, &mut d_o)?;
        let [q, k, v] = &s.qkv;
        let saved = attention::Saved { q, k, v, o: &s.o, lse: &s.lse };
        let (dq, dk, dv) = attention::backward(self.attention, &side.sequences, saved, d_o.sum()?)?;
        let trained = [&self.q_proj, &self.k_proj, &self.v_proj].iter().any(|l| l.needs_input());
        let h = trained.then(|| self.layer_norm1.rebuild(x, &s.stats[0])).transpose()?;
        let mut norm_trains = self.layer_norm1.weight.trainable;
        norm_trains |= self.layer_norm1.bias.as_ref().is_some_and(|b| b.trainable);
        let mut dh = InputGrad::new(need_dx || norm_trains);
        for (l, saved, d) in [(&self.q_proj, sq, &dq), (&self.k_proj, sk, &dk), (&self.v_proj, sv, &dv)] {
            l.backward(saved, h.as_ref(), d, side, grads, &mut dh)?;
        }
        let Some(dh) = dh.take() else { return Ok(None) };
        self.layer_norm1.backward_into(x, &s.stats[0], &dh, grads, &dmid)?;
        Ok(need_dx.then_some(dmid))
    }
}

impl Module for Layer {
    fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
        self.layer_norm1.visit(f);
        self.for_each_linear(&mut |l| l.visit(f));
        self.layer_norm2.visit(f);
    }
}

impl Layer {
    /// The six linear layers.
    pub fn for_each_linear(&mut self, f: &mut dyn FnMut(&mut Linear)) {
        for l in
            [&mut self.q_proj, &mut self.k_proj, &mut self.v_proj, &mut self.out_proj, &mut self.fc1, &mut self.fc2]
        {
            f(l);
        }
    }
}
