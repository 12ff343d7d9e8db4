//! Frozen's visual prefix (Tsimpoukelli et al. 2021): one linear layer makes a few visual tokens of the mean of a picture's features.
//! As many tokens at any resolution, and nothing of where in the picture something stands.

use super::{Ends, Kind, Work};
use crate::error::{Context, Result};
use crate::model::init::Source;
use crate::model::island::Vars;
use crate::model::layers::Linear;
use crate::model::params::module;
use crate::model::role::Scope;
use crate::model::vision::Grid;
use crate::ops::launch::widen;
use crate::spec::VisualPrefixProjector;
use candle_core::Tensor;

/// `visual_prefix`.
#[derive(Debug, Clone)]
pub struct VisualPrefix {
    tokens: usize,
    language: usize,
    /// `[tokens·language, vision]`
    layer: Linear,
}

impl VisualPrefix {
    /// `cfg.tokens` for each picture.
    pub fn new(cfg: &VisualPrefixProjector, ends: Ends, src: &mut dyn Source) -> Result<Self> {
        cfg.check().context("visual_prefix")?;
        let Ends { vision, language, bias } = ends;
        let layer = Linear::new(&Scope::projector().at("visual_prefix"), vision, cfg.tokens * language, bias, src)?;
        Ok(Self { tokens: cfg.tokens, language, layer })
    }
}

impl Kind for VisualPrefix {
    fn tokens(&self, _: Grid) -> Result<usize> {
        Ok(self.tokens)
    }

    fn forward(&self, x: &Tensor, grid: Grid, vars: &mut Vars) -> Result<Tensor> {
        let (rows, width) = x.dims2()?;
        let pictures = rows / grid.tokens();
        let mean = widen(x)?.reshape((pictures, grid.tokens(), width))?.mean(1)?.to_dtype(x.dtype())?;
        Ok(self.layer.forward(&mean, vars)?.reshape((pictures * self.tokens, self.language))?)
    }

    fn work(&self, _: Grid) -> Result<Work> {
        Ok(Work { features: 2 * self.layer.weights(), ..Work::default() })
    }

    fn boxed(&self) -> Box<dyn Kind> {
        Box::new(self.clone())
    }
}

module!(VisualPrefix: layer);
