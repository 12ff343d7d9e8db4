//! A narrow residual block on the tower's features (Houlsby et al. 2019, "Parameter-efficient transfer learning for NLP"):
//! y = out(x + up(dropout(act(down(norm(x)))))). `up` begins at zero, so that the block begins as the identity. It keeps the
//! tower's width: 2·width·dim weights beside biases and norm. Where the language model has another width, the linear layer
//! `out` leads there; else there is none.

use super::{Ends, Kind, Work};
use crate::error::Result;
use crate::model::init::Source;
use crate::model::island::Vars;
use crate::model::layers::{LayerNorm, Linear};
use crate::model::params::module;
use crate::model::role::{Linears, Scope};
use crate::model::vision::Grid;
use crate::ops::graph::activate;
use crate::spec::{Activation, BottleneckProjector};
use candle_core::Tensor;

/// `norm`, `down`, `up`, `out`.
#[derive(Debug, Clone)]
pub struct Bottleneck {
    act: Activation,
    dropout: f64,
    norm: LayerNorm,
    down: Linear,
    up: Linear,
    out: Option<Linear>,
}

impl Bottleneck {
    /// With `cfg.dim` between `down` and `up`.
    pub fn new(cfg: &BottleneckProjector, ends: Ends, src: &mut dyn Source) -> Result<Self> {
        let (of, Ends { vision, language, bias }) = (Scope::projector(), ends);
        Ok(Self {
            act: cfg.act,
            dropout: cfg.dropout,
            norm: LayerNorm::new(&of.at("norm"), vision, src)?,
            down: Linear::new(&of.at("down"), vision, cfg.dim, bias, src)?,
            up: Linear::new(&of.at("up").with(Linears::Zero), cfg.dim, vision, bias, src)?,
            out: if vision == language { None } else { Some(Linear::new(&of.at("out"), vision, language, bias, src)?) },
        })
    }
}

impl Kind for Bottleneck {
    fn square(&self, grid: Grid) -> Option<usize> {
        (!grid.class_token).then_some(grid.side())
    }

    fn forward(&self, x: &Tensor, _: Grid, vars: &mut Vars) -> Result<Tensor> {
        let h = self.down.forward(&self.norm.forward(x, vars)?, vars)?;
        let h = vars.dropout("projector.bottleneck", activate(self.act, &h)?, self.dropout)?;
        let y = (x + self.up.forward(&h, vars)?)?;
        self.out.as_ref().map_or(Ok(y.clone()), |out| out.forward(&y, vars))
    }

    fn work(&self, grid: Grid) -> Result<Work> {
        let weights: u64 = [&self.down, &self.up].into_iter().chain(&self.out).map(Linear::weights).sum();
        Ok(Work { inner: 2 * grid.tokens() as u64 * weights, ..Work::default() })
    }

    fn boxed(&self) -> Box<dyn Kind> {
        Box::new(self.clone())
    }
}

module!(Bottleneck: norm, down, up, out);
