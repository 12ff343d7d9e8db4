//! Cross-attention from text to visual tokens, before a decoder layer.
//!
//! `gated` is Flamingo's block (Alayrac et al. 2022; OpenFlamingo's `GatedCrossAttentionBlock`, whose names its parameters
//! have): x + tanh(attn_gate)·attn(norm(x), v), and to that + tanh(ff_gate)·ff(norm(that)). Both gates begin at zero: the
//! language model begins exactly as it was. `post_norm` is the simple form LayerNorm(x + attn(x, v)).
//! Rows before the first picture of their sequence see nothing: attention gives them zero.

use super::{Insert, Seen};
use crate::bail;
use crate::error::Result;
use crate::model::init::Source;
use crate::model::island::Vars;
use crate::model::layers::{FeedForward, LayerNorm, Linear};
use crate::model::params::{Module, Param, module};
use crate::model::role::{Init, Scope};
use crate::ops::attention::Config;
use crate::ops::graph::{attention, gated};
use crate::spec::{CrossAttention as Recipe, CrossAttentionForm, Sees};
use candle_core::Tensor;

/// One block.
#[derive(Debug, Clone)]
pub struct CrossAttention {
    adapter: String,
    sees: Sees,
    config: Config,
    to_q: Linear,
    /// Keys, then values, each of all heads.
    to_kv: Linear,
    to_out: Linear,
    form: Form,
}

#[derive(Debug, Clone)]
enum Form {
    Gated(Box<Gated>),
    PostNorm(Box<LayerNorm>),
}

#[derive(Debug, Clone)]
struct Gated {
    norm: LayerNorm,
    /// `[1]` each.
    gates: [Param; 2],
    ff: FeedForward,
}

impl CrossAttention {
    /// Before the layer `place`, on rows of width `d`.
    pub fn new(cfg: &Recipe, adapter: &str, place: &Scope, d: usize, src: &mut dyn Source) -> Result<Self> {
        let of = place.adapter("cross_attention", adapter);
        // Attention, its norm and its gate work on what is seen alone; the MLP, and a norm behind the sum, on any row.
        let (eyes, attn) = (of.seeing(), of.at("attn").seeing());
        let inner = cfg.heads * cfg.head_dim;
        let to_q = Linear::new(&attn.at("to_q"), d, inner, false, src)?;
        let to_kv = Linear::new(&attn.at("to_kv"), d, 2 * inner, false, src)?;
        let to_out = Linear::new(&attn.at("to_out"), inner, d, false, src)?;
        let form = match cfg.form {
            CrossAttentionForm::PostNorm => Form::PostNorm(Box::new(LayerNorm::new(&of.at("norm"), d, src)?)),
            CrossAttentionForm::Gated => Form::Gated(Box::new(Gated {
                norm: LayerNorm::new(&attn.at("norm"), d, src)?,
                gates: [
                    src.master(&eyes, "attn_gate", &[1], Init::Zeros)?,
                    src.master(&of, "ff_gate", &[1], Init::Zeros)?,
                ],
                ff: FeedForward::new(&of.at("ff"), d, cfg.ff_mult * d, src)?,
            })),
        };
        let config = Config { heads: cfg.heads, kv_heads: cfg.heads, head_dim: cfg.head_dim, causal: false };
        Ok(Self { adapter: adapter.to_string(), sees: cfg.sees, config, to_q, to_kv, to_out, form })
    }

    /// `x` `[N, D]`, normed or not → `[N, D]`; `None` where no row sees anything.
    fn attend(&self, x: &Tensor, seen: Seen, vars: &mut Vars) -> Result<Option<Tensor>> {
        if seen.sequences.is_empty() {
            return Ok(None);
        }
        let q = self.to_q.forward(x, vars)?;
        let kv = self.to_kv.forward(seen.tokens, vars)?;
        let inner = self.config.heads * self.config.head_dim;
        let (k, v) = (kv.narrow(1, 0, inner)?, kv.narrow(1, inner, inner)?);
        self.to_out.forward(&attention(self.config, seen.sequences, &q, &k, &v)?, vars).map(Some)
    }
}

impl Insert for CrossAttention {
    fn adapter(&self) -> &str {
        &self.adapter
    }

    fn forward(&self, x: &Tensor, visual: Option<Seen>, vars: &mut Vars) -> Result<Tensor> {
        let Some(seen) = visual else { bail!("adapter `{}` was given no visual tokens to look at", self.adapter) };
        let form = match &self.form {
            Form::Gated(form) => form,
            Form::PostNorm(norm) => {
                let x = self.attend(x, seen, vars)?.map_or(Ok(x.clone()), |a| x + a)?;
                return norm.forward(&x, vars);
            }
        };
        let [attn_gate, ff_gate] = &form.gates;
        let mut x = x.clone();
        if !seen.sequences.is_empty()
            && let Some(a) = self.attend(&form.norm.forward(&x, vars)?, seen, vars)?
        {
            x = (x + gated(&a, &vars.get(attn_gate)?)?)?;
        }
        let h = form.ff.forward(&x, vars)?;
        Ok((x + gated(&h, &vars.get(ff_gate)?)?)?)
    }

    fn sees(&self) -> Option<Sees> {
        Some(self.sees)
    }

    fn learns(&self) -> bool {
        let form = match &self.form {
            Form::PostNorm(norm) => norm.learns(),
            Form::Gated(g) => g.norm.learns() || g.ff.learns() || g.gates.iter().any(|p| p.trainable),
        };
        form || [&self.to_q, &self.to_kv, &self.to_out].iter().any(|l| l.learns())
    }

    fn boxed(&self) -> Box<dyn Insert> {
        Box::new(self.clone())
    }
}

module!(CrossAttention: to_q, to_kv, to_out, form);
module!(Gated: norm, gates, ff);

impl Module for Form {
    fn visit<'a>(&'a self, f: &mut dyn FnMut(&'a Param)) {
        match self {
            Self::Gated(gated) => gated.visit(f),
            Self::PostNorm(norm) => norm.visit(f),
        }
    }

    fn visit_mut(&mut self, f: &mut dyn FnMut(&mut Param)) {
        match self {
            Self::Gated(gated) => gated.visit_mut(f),
            Self::PostNorm(norm) => norm.visit_mut(f),
        }
    }
}
