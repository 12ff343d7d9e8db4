//! Linear layers with an activation between them, on each token alone (Liu et al. 2023, LLaVA and LLaVA-1.5); one layer
//! is the linear projector.

use super::{Ends, Kind, Work};
use crate::bail;
use crate::error::Result;
use crate::model::init::Source;
use crate::model::island::Vars;
use crate::model::layers::{LayerNorm, Linear};
use crate::model::params::module;
use crate::model::role::Scope;
use crate::model::vision::Grid;
use crate::ops::graph::activate;
use crate::spec::{Activation, Layers, LinearProjector, MlpProjector};
use candle_core::Tensor;

/// `input_norm`, `linear_1` … `linear_depth`, `norm`; the norms only where the recipe asks for them.
#[derive(Debug, Clone)]
pub struct Mlp {
    act: Activation,
    input_norm: Option<LayerNorm>,
    layers: Vec<Linear>,
    norm: Option<LayerNorm>,
}

impl Mlp {
    /// `depth` layers.
    pub fn new(cfg: &MlpProjector, ends: Ends, src: &mut dyn Source) -> Result<Self> {
        let of = Scope::projector();
        let (depth, hidden) = (cfg.depth, cfg.hidden.unwrap_or(ends.language));
        if depth == 0 {
            bail!("the projector has depth 0"; "set `depth` of model.projector's mlp to 1 or more")
        }
        let input_norm =
            if cfg.input_norm { Some(LayerNorm::new(&of.at("input_norm"), ends.vision, src)?) } else { None };
        let mut layers = Vec::with_capacity(depth);
        for i in 1..=depth {
            let d_in = if i == 1 { ends.vision } else { hidden };
            let d_out = if i == depth { ends.language } else { hidden };
            layers.push(Linear::new(&of.at(&format!("linear_{i}")), d_in, d_out, ends.bias, src)?);
        }
        let norm = if cfg.norm { Some(LayerNorm::new(&of.at("norm"), ends.language, src)?) } else { None };
        Ok(Self { act: cfg.act, input_norm, layers, norm })
    }

    /// One layer.
    pub fn linear(cfg: &LinearProjector, ends: Ends, src: &mut dyn Source) -> Result<Self> {
        let act = Activation::default();
        let one = MlpProjector { source: None, depth: 1, hidden: None, act, input_norm: cfg.input_norm, norm: false };
        Self::new(&one, ends, src)
    }

    /// Either of them, after another part of a projector.
    pub fn after(cfg: &Layers, ends: Ends, src: &mut dyn Source) -> Result<Self> {
        match cfg {
            Layers::Linear(p) => Self::linear(p, ends, src),
            Layers::Mlp(p) => Self::new(p, ends, src),
        }
    }

    /// FLOPs of `rows` rows' forward pass.
    pub fn work_of(&self, rows: usize) -> Work {
        let mut weights = self.layers.iter().map(Linear::weights);
        // A norm in front has parameters of its own, below the first layer.
        let first = if self.input_norm.is_some() { 0 } else { weights.next().unwrap_or(0) };
        let of = |weights: u64| 2 * rows as u64 * weights;
        Work { features: of(first), inner: of(weights.sum()), attention: 0 }
    }

    /// `[N, vision]` → `[N, language]`.
    pub fn rows(&self, x: &Tensor, vars: &mut Vars) -> Result<Tensor> {
        let mut x = x.clone();
        if let Some(norm) = &self.input_norm {
            x = norm.forward(&x, vars)?;
        }
        for (i, layer) in self.layers.iter().enumerate() {
            if i > 0 {
                x = activate(self.act, &x)?;
            }
            x = layer.forward(&x, vars)?;
        }
        self.norm.as_ref().map_or(Ok(x.clone()), |norm| norm.forward(&x, vars))
    }
}

impl Kind for Mlp {
    fn square(&self, grid: Grid) -> Option<usize> {
        (!grid.class_token).then_some(grid.side())
    }

    fn forward(&self, x: &Tensor, _: Grid, vars: &mut Vars) -> Result<Tensor> {
        self.rows(x, vars)
    }

    fn work(&self, grid: Grid) -> Result<Work> {
        Ok(self.work_of(grid.tokens()))
    }

    fn boxed(&self) -> Box<dyn Kind> {
        Box::new(self.clone())
    }
}

module!(Mlp: input_norm, layers, norm);
