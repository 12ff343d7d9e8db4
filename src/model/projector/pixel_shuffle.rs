//! Fewer and wider tokens: each square of `factor` × `factor` patches becomes one token of `factor²` times the width, then
//! linear layers as in [`super::mlp`].
//!
//! Tokens stand row by row, as the patches did; within a token the patches of its square stand row by row, each with all its
//! channels. That is the order of transformers' `Idefics3Connector` (SmolVLM's is the same) and of its `InternVLModel`.

use super::mlp::Mlp;
use super::{Ends, Kind, Work};
use crate::bail;
use crate::error::Result;
use crate::model::init::Source;
use crate::model::island::Vars;
use crate::model::params::module;
use crate::model::vision::Grid;
use crate::spec::PixelShuffleProjector;
use candle_core::Tensor;

/// The layers have the names of an `mlp`'s.
#[derive(Debug, Clone)]
pub struct PixelShuffle {
    factor: usize,
    then: Mlp,
}

impl PixelShuffle {
    /// `cfg.then` takes `factor²` times the tower's width.
    pub fn new(cfg: &PixelShuffleProjector, ends: Ends, src: &mut dyn Source) -> Result<Self> {
        let ends = Ends { vision: ends.vision * cfg.factor * cfg.factor, ..ends };
        Ok(Self { factor: cfg.factor, then: Mlp::after(&cfg.then, ends, src)? })
    }
}

impl Kind for PixelShuffle {
    fn tokens(&self, grid: Grid) -> Result<usize> {
        let (side, factor) = (grid.side(), self.factor);
        if grid.class_token {
            bail!("pixel_shuffle takes patches alone, but the tower hands over its class token with them";
                "set model.vision.select_feature = \"patch\"")
        }
        if factor == 0 || side % factor != 0 {
            let fits: Vec<String> = (1..=side).filter(|f| side % f == 0).map(|f| f.to_string()).collect();
            bail!("pixel_shuffle: factor {factor} does not divide the {side} × {side} patches of a picture ({} px, patches of {} px)",
                grid.image_size, grid.patch_size; "factors that do: {}", fits.join(", "))
        }
        Ok((side / factor) * (side / factor))
    }

    fn square(&self, grid: Grid) -> Option<usize> {
        Some(grid.side() / self.factor)
    }

    fn forward(&self, x: &Tensor, grid: Grid, vars: &mut Vars) -> Result<Tensor> {
        let (tokens, f, side) = (self.tokens(grid)?, self.factor, grid.side() / self.factor);
        let (rows, width) = x.dims2()?;
        let pictures = rows / grid.tokens();
        // [picture, token row, row in the square, token column, column in the square, channels]
        let squares = x.reshape(&[pictures, side, f, side, f, width])?.permute([0, 1, 3, 2, 4, 5])?;
        let wide = squares.contiguous()?.reshape((pictures * tokens, f * f * width))?;
        self.then.rows(&wide, vars)
    }

    fn work(&self, grid: Grid) -> Result<Work> {
        Ok(self.then.work_of(self.tokens(grid)?))
    }

    fn boxed(&self) -> Box<dyn Kind> {
        Box::new(self.clone())
    }
}

module!(PixelShuffle: then);
