//! The connector between tower and language model: features of the tower → visual tokens.
//!
//! Projectors are islands: ordinary differentiable candle modules, run on fresh variables; their small graph lives
//! from forward to backward (see [`super::island`]). Each kind has a file of its own and is a [`Kind`].

pub mod bottleneck;
pub mod mlp;
pub mod names;
pub mod perceiver;
pub mod pixel_shuffle;
pub mod published;
pub mod qformer;
pub mod resampler;
pub mod visual_prefix;

use super::init::{Place, Source};
use super::island::{self, Pass, Tape, Vars};
use super::params::{Module, module};
use super::vision::Grid;
use crate::error::Result;
use crate::ops::random::Key;
use crate::spec;
use bottleneck::Bottleneck;
use candle_core::Tensor;
use mlp::Mlp;
use perceiver::Perceiver;
use pixel_shuffle::PixelShuffle;
use qformer::Qformer;
use resampler::Resampler;
use std::fmt::Debug;
use visual_prefix::VisualPrefix;

/// What a kind of projector can do. Its parameters are named `projector.…`.
pub trait Kind: Module + Debug + Send + Sync {
    /// Visual tokens that it makes of one picture; an error if it cannot take this grid.
    fn tokens(&self, grid: Grid) -> Result<usize> {
        Ok(grid.tokens())
    }

    /// Visual tokens along an edge, where they stand as the picture's square, row by row; `None`: they have no places in it.
    fn square(&self, _: Grid) -> Option<usize> {
        None
    }

    /// Features of whole pictures `[I·grid.tokens(), vision]` → visual tokens `[I·tokens, language]`.
    fn forward(&self, x: &Tensor, grid: Grid, vars: &mut Vars) -> Result<Tensor>;

    /// FLOPs of one picture's forward pass.
    fn work(&self, grid: Grid) -> Result<Work>;

    /// A clone behind a box.
    fn boxed(&self) -> Box<dyn Kind>;
}

/// FLOPs of a projector's products in the forward pass of one picture; a product and a sum are two.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Work {
    /// Of linear layers that read the tower's features as they come: where the tower is frozen, they need no dX.
    pub features: u64,
    /// Of all other linear layers.
    pub inner: u64,
    /// Of attention: scores and weighted sums.
    pub attention: u64,
}

impl Work {
    /// Of the forward pass.
    pub fn forward(self) -> u64 {
        self.features + self.inner + self.attention
    }

    /// Of forward and backward, every weight trained, the tower frozen. Of attention, backward makes the scores again and
    /// needs four more products of their size.
    pub fn training(self) -> u64 {
        2 * self.features + 3 * self.inner + 7 * self.attention / 2
    }
}

/// What a projector connects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ends {
    /// Width of the tower's features.
    pub vision: usize,
    /// Width of the language model's embeddings.
    pub language: usize,
    /// Do linear layers have a bias?
    pub bias: bool,
}

/// A projector of any kind.
#[derive(Debug)]
pub struct Projector(Box<dyn Kind>);

impl Projector {
    /// From features of width `vision` to embeddings of width `language`.
    pub fn new(
        cfg: &spec::Projector,
        vision: usize,
        language: usize,
        bias: bool,
        src: &mut dyn Source,
    ) -> Result<Self> {
        let ends = Ends { vision, language, bias };
        Ok(Self(match cfg {
            spec::Projector::Linear(p) => Box::new(Mlp::linear(p, ends, src)?),
            spec::Projector::Mlp(p) => Box::new(Mlp::new(p, ends, src)?),
            spec::Projector::Bottleneck(p) => Box::new(Bottleneck::new(p, ends, src)?),
            spec::Projector::PixelShuffle(p) => Box::new(PixelShuffle::new(p, ends, src)?),
            spec::Projector::Perceiver(p) => Box::new(Perceiver::new(p, ends, src)?),
            spec::Projector::Resampler(p) => Box::new(Resampler::new(p, ends, src)?),
            spec::Projector::VisualPrefix(p) => Box::new(VisualPrefix::new(p, ends, src)?),
            spec::Projector::Qformer(p) => Box::new(Qformer::new(p, ends, src)?),
        }))
    }

    /// Visual tokens of one picture; an error if the projector cannot take this grid.
    pub fn tokens(&self, grid: Grid) -> Result<usize> {
        self.0.tokens(grid)
    }

    /// Visual tokens along an edge, where they stand as the picture's square; `None` if they do not.
    pub fn square(&self, grid: Grid) -> Option<usize> {
        self.0.square(grid)
    }

    /// FLOPs of one picture's forward pass.
    pub fn work(&self, grid: Grid) -> Result<Work> {
        self.0.work(grid)
    }

    /// Bytes that the graph of a recorded pass holds: whatever the pictures, and for each one. `need_dx`: does the tower train? One
    /// picture's pass is run to tell it, so that no kind of projector has to count.
    pub fn kept_bytes(&self, vision: usize, grid: Grid, place: &Place, need_dx: bool) -> Result<[usize; 2]> {
        let x = Tensor::zeros((grid.tokens(), vision), place.dtype, &place.device)?;
        let pass = Pass { trains: true, need_dx, dropout: Some(Key::new(0, "kept")) };
        Ok(self.forward(&x, grid, pass)?.1.map_or([0, 0], |tape| tape.kept_bytes()))
    }

    /// Visual tokens `[I·tokens, language]` of the features `[I·grid.tokens(), vision]` of I pictures, and the graph if
    /// `pass` wants gradients.
    pub fn forward(&self, x: &Tensor, grid: Grid, pass: Pass) -> Result<(Tensor, Option<Tape>)> {
        island::forward(x, pass, |x, vars| self.0.forward(x, grid, vars))
    }
}

impl Clone for Projector {
    fn clone(&self) -> Self {
        Self(self.0.boxed())
    }
}

module!(Projector: 0);
