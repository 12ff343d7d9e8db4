//! One CLIP encoder layer (Radford et al. 2021; HF `CLIPEncoderLayer`), forward and backward.

use crate::error::Result;
use crate::model::insert::{Inputs, Inserts};
use crate::model::linear::{self, InputGrad, Linear};
use crate::model::norm::Norm;
use crate::model::params::{Grads, Module, Param};
use crate::model::segment::{Kept, Segment, Side, kept_or, outputs_per_row, sum_bytes};
use crate::ops::matmul::add_;
use crate::ops::norm::Stats;
use crate::ops::{activation, attention, bytes};
use crate::spec::Activation;
use candle_core::Tensor;

/// x → x + attention(norm(x)) → that + mlp(norm(that)); adapters may be inserted behind attention and MLP.
#[derive(Debug, Clone)]
pub struct Layer {
    /// E.g. `vision.encoder.layers.0`.
    pub name: String,
    /// What this layer keeps, if it is not what the pass says.
    pub policy: Option<Kept>,
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
    mid: Tensor,
    /// Before the activation, `[N, intermediate]`.
    inner: Tensor,
    /// Of q, k, v; out; fc1; fc2.
    linears: [linear::Saved; 4],
    /// Outputs of both norms and of the activation, where they are kept because a layer that trains reads them.
    outputs: [Option<Tensor>; 3],
    /// What went into inserts.
    inserted: [Inputs; 2],
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
        let keeps = self.needs().map(|needed| needed && kept == Kept::All);
        let (h, stats1) = self.layer_norm1.forward(x)?;
        let qkv = [&self.q_proj, &self.k_proj, &self.v_proj];
        let ([q, k, v], sqkv) = linear::forward_all(qkv, &h, side)?;
        let norm1 = keeps[0].then_some(h);
        let recorded = kept != Kept::Nothing;
        let (o, lse) = attention::forward_kept(self.attention, &side.sequences, &q, &k, &v, recorded)?;
        let (mid, so) = self.out_proj.forward(&o, side)?;
        let (mid, after_attention) = self.after[0].forward(mid, side)?;
        let (h, stats2) = self.layer_norm2.forward_residual_(&mid, x)?;
        let (inner, s1) = self.fc1.forward(&h, side)?;
        let norm2 = keeps[1].then_some(h);
        let act = activation::forward(self.act, &inner)?;
        let (y, s2) = self.fc2.forward(&act, side)?;
        let (y, after_mlp) = self.after[1].forward(y, side)?;
        add_(&y, 1.0, &mid)?;
        let inserted = [after_attention, after_mlp];
        let (linears, outputs) = ([sqkv, so, s1, s2], [norm1, norm2, keeps[2].then_some(act)]);
        Ok((y, Saved { stats: [stats1, stats2], qkv: [q, k, v], o, lse, mid, inner, linears, outputs, inserted }))
    }

    fn bytes(s: &Saved) -> usize {
        let tensors = s.qkv.iter().chain(s.stats.iter().map(|s| &s.0)).chain([&s.o, &s.mid, &s.inner]);
        let linears = s.linears.iter().map(linear::Saved::bytes);
        tensors
            .chain(&s.lse)
            .chain(s.outputs.iter().flatten())
            .map(bytes)
            .chain(linears)
            .chain(s.inserted.iter().map(Inputs::bytes))
            .sum()
    }

    fn bytes_per_row(&self, kept: Kept) -> Result<usize> {
        let ((m, d), dtype) = (self.fc1.dims()?, self.fc1.place().dtype);
        let (e, sums) = (dtype.size_in_bytes(), sum_bytes(dtype));
        match kept {
            Kept::Nothing => return Ok(0),
            Kept::Input => return Ok(e * d),
            Kept::Minimal | Kept::All => {}
        }
        // x, mid, q, k, v, o; before the activation; log-sum-exp and the norms' statistics.
        let mut all = e * (6 * d + m) + sums * (self.attention.heads + 4);
        for l in [&self.q_proj, &self.k_proj, &self.v_proj, &self.out_proj, &self.fc1, &self.fc2] {
            all += l.saved_bytes()?;
        }
        if kept == Kept::All {
            all += e * outputs_per_row(self.needs(), [d, d, m]);
        }
        Ok(all + e * d * self.after.iter().map(Inserts::len).sum::<usize>())
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
        // MLP
        let act = kept_or(act, needs[2], || activation::forward(self.act, &s.inner))?;
        let dinserted = self.after[1].backward(&s.inserted[1], &dy, side, grads, true)?;
        let mut dact = InputGrad::Empty;
        self.fc2.backward(s2, act.as_ref(), dinserted.as_ref().unwrap_or(&dy), side, grads, &mut dact)?;
        let dinner = activation::backward(self.act, &s.inner, dact.sum()?)?;
        let h = kept_or(norm2, needs[1], || self.layer_norm2.rebuild(&s.mid, &s.stats[1]))?;
        let mut dh = InputGrad::Empty;
        self.fc1.backward(s1, h.as_ref(), &dinner, side, grads, &mut dh)?;
        let dmid = dy;
        self.layer_norm2.backward_into(&s.mid, &s.stats[1], dh.sum()?, grads, &dmid)?;
        // attention
        let dinserted = self.after[0].backward(&s.inserted[0], &dmid, side, grads, true)?;
        let mut d_o = InputGrad::Empty;
        self.out_proj.backward(so, Some(&s.o), dinserted.as_ref().unwrap_or(&dmid), side, grads, &mut d_o)?;
        let [q, k, v] = &s.qkv;
        let saved = attention::Saved { q, k, v, o: &s.o, lse: attention::kept(s.lse.as_ref())? };
        let (dq, dk, dv) = attention::backward(self.attention, &side.sequences, saved, d_o.sum()?)?;
        let h = kept_or(norm1, needs[0], || self.layer_norm1.rebuild(x, &s.stats[0]))?;
        let mut norm_trains = self.layer_norm1.weight.trainable;
        norm_trains |= self.layer_norm1.bias.as_ref().is_some_and(|b| b.trainable);
        let mut dh = InputGrad::new(need_dx || norm_trains);
        let qkv = [&self.q_proj, &self.k_proj, &self.v_proj];
        linear::backward_all(&qkv, sqkv, h.as_ref(), &[&dq, &dk, &dv], side, grads, &mut dh)?;
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
        self.after.iter_mut().for_each(|i| i.visit(f));
    }
}

impl Layer {
    /// Which inputs of linear layers backward reads: that of q, k and v, that of fc1, that of fc2.
    fn needs(&self) -> [bool; 3] {
        let qkv = [&self.q_proj, &self.k_proj, &self.v_proj];
        [qkv.iter().any(|l| l.needs_input()), self.fc1.needs_input(), self.fc2.needs_input()]
    }

    /// The six linear layers.
    pub fn for_each_linear(&mut self, f: &mut dyn FnMut(&mut Linear)) {
        for l in
            [&mut self.q_proj, &mut self.k_proj, &mut self.v_proj, &mut self.out_proj, &mut self.fc1, &mut self.fc2]
        {
            f(l);
        }
    }
}
