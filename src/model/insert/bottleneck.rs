//! A narrow residual block on what attention or the MLP gives, before the layer adds it to its stream (Houlsby et al. 2019,
//! "Parameter-efficient transfer learning for NLP"): y = x + up(dropout(act(down(norm(x))))). `up` begins at zero, so that
//! the layer begins as it was.

use super::{Insert, Seen};
use crate::error::Result;
use crate::model::init::Source;
use crate::model::island::Vars;
use crate::model::layers::{LayerNorm, Linear};
use crate::model::params::module;
use crate::model::role::{Linears, Scope};
use crate::ops::graph::activate;
use crate::spec::{Activation, BottleneckAdapter};
use candle_core::Tensor;

/// `norm` if the recipe asks for it, `down`, `up`.
#[derive(Debug, Clone)]
pub struct Bottleneck {
    adapter: String,
    /// E.g. `language.layers.0.mlp.bottleneck.sft`.
    name: String,
    act: Activation,
    dropout: f64,
    norm: Option<LayerNorm>,
    down: Linear,
    up: Linear,
}

impl Bottleneck {
    /// At `place`, on rows of width `d`.
    pub fn new(cfg: &BottleneckAdapter, adapter: &str, place: &Scope, d: usize, src: &mut dyn Source) -> Result<Self> {
        let of = place.adapter("bottleneck", adapter);
        Ok(Self {
            adapter: adapter.to_string(),
            act: cfg.act,
            dropout: cfg.dropout,
            norm: if cfg.norm { Some(LayerNorm::new(&of.at("norm"), d, src)?) } else { None },
            down: Linear::new(&of.at("down"), d, cfg.dim, true, src)?,
            up: Linear::new(&of.at("up").with(Linears::Zero), cfg.dim, d, true, src)?,
            name: of.name().to_string(),
        })
    }
}

impl Insert for Bottleneck {
    fn adapter(&self) -> &str {
        &self.adapter
    }

    fn forward(&self, x: &Tensor, _: Option<Seen>, vars: &mut Vars) -> Result<Tensor> {
        let h = self.norm.as_ref().map_or(Ok(x.clone()), |norm| norm.forward(x, vars))?;
        let h = activate(self.act, &self.down.forward(&h, vars)?)?;
        let h = vars.dropout(&self.name, h, self.dropout)?;
        Ok((x + self.up.forward(&h, vars)?)?)
    }

    fn learns(&self) -> bool {
        self.down.learns() || self.up.learns() || self.norm.as_ref().is_some_and(LayerNorm::learns)
    }

    fn boxed(&self) -> Box<dyn Insert> {
        Box::new(self.clone())
    }
}

module!(Bottleneck: norm, down, up);
