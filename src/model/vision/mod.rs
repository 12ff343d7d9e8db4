//! The vision tower, of any architecture (`model::backbone`): pictures → hidden states of the selected layer.
//! Layers past the selected one are loaded but never computed.

pub mod positions;

use super::backbone::VisionConfig;
use super::block::Block;
use super::build::norm;
use super::init::{Place, Shapes, Source};
use super::norm::Norm;
use super::params::{Grads, Module, Param, module};
use super::role::{Init, Level, Linears, Part, Role, Scope};
use super::segment::{self, Kept, Side, Tape};
use super::watch;
use crate::bail;
use crate::error::Result;
use crate::ops::embedding::{gather, scatter_, scatter_add_};
use crate::ops::matmul::{Mat, matmul, matmul_wide, sum_rows};
use crate::ops::norm::{Kind, Stats};
use crate::ops::patches;
use crate::spec::SelectFeature;
use candle_core::Tensor;
use positions::Positions;
use std::collections::BTreeMap;

/// The features of one picture: a square of patches row by row, a class token before it or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// Height and width of the picture in pixels.
    pub image_size: usize,
    pub patch_size: usize,
    pub class_token: bool,
}

impl Grid {
    /// Patches of a row, and rows.
    pub fn side(self) -> usize {
        self.image_size / self.patch_size
    }

    /// Features of the picture.
    pub fn tokens(self) -> usize {
        self.side() * self.side() + usize::from(self.class_token)
    }
}

/// The tower.
#[derive(Debug, Clone)]
pub struct Tower {
    pub config: VisionConfig,
    /// Height and width of the pictures that it sees now, in pixels; `config` has those that it was made for.
    size: usize,
    /// From the positions of `config` to those of `size`, where they differ.
    positions: Option<Positions>,
    class_embedding: Param,
    /// `[D, C·p·p]` after flattening.
    patch_embedding: Param,
    position_embedding: Param,
    pre_layrnorm: Norm,
    pub layers: Vec<Block>,
    post_layernorm: Norm,
    /// Layers that run: up to the selected hidden state.
    depth: usize,
    select: SelectFeature,
    frontier: Option<usize>,
}

/// What a pass through the tower left for backward.
pub struct Saved {
    side: Side,
    patches: Tensor,
    embedded: Tensor,
    stats: Stats,
    tape: Tape<Block>,
}

impl Saved {
    /// Bytes that the layers keep.
    pub(super) fn kept_bytes(&self) -> usize {
        self.tape.bytes()
    }
}

impl Tower {
    /// Builds the tower from `src`; `select_layer` indexes HF's `hidden_states` (0 is the embeddings' output).
    pub fn new(config: VisionConfig, select_layer: i64, select: SelectFeature, src: &mut dyn Source) -> Result<Self> {
        let (n, c) = (config.num_hidden_layers, &config);
        let depth = if select_layer < 0 { n as i64 + 1 + select_layer } else { select_layer };
        if !(0..=n as i64).contains(&depth) {
            bail!("select_layer {select_layer} does not exist: the tower has {n} layers"; "use {} to {n}, or −1 for the last layer's output", -(n as i64) - 1)
        }
        if c.num_attention_heads == 0
            || c.hidden_size % c.num_attention_heads != 0
            || c.patch_size == 0
            || c.image_size % c.patch_size != 0
        {
            bail!(
                "the tower's config does not fit together: hidden size {}, {} heads, {} px, patch {}",
                c.hidden_size,
                c.num_attention_heads,
                c.image_size,
                c.patch_size
            )
        }
        let (d, p) = (c.hidden_size, c.patch_size);
        let of = Scope::vision();
        let (below, table) = (of.below().at("embeddings"), Init::Normal(Linears::DEVIATION));
        let class_embedding = src.param(&below, "class_embedding", &[d], table)?;
        let patch_embedding = src.param(&below.at("patch_embedding"), "weight", &[d, c.num_channels, p, p], table)?;
        let position_embedding =
            src.param(&below.at("position_embedding"), "weight", &[c.num_patches() + 1, d], table)?;
        let pre_layrnorm = norm(src, Kind::Layer, &of.below().at("pre_layrnorm"), d, c.layer_norm_eps)?;
        let mut layers = Vec::with_capacity(n);
        for i in 0..n {
            layers.push(Block::new(&of.layer("encoder.layers", i), &c.block(), &c.architecture.block, src)?);
        }
        let post_layernorm = norm(src, Kind::Layer, &of.at("post_layernorm"), d, c.layer_norm_eps)?;
        let depth = depth as usize;
        Ok(Self {
            size: config.image_size,
            positions: None,
            config,
            class_embedding,
            patch_embedding,
            position_embedding,
            pre_layrnorm,
            layers,
            post_layernorm,
            depth,
            select,
            frontier: None,
        })
    }

    /// Names and shapes of all its parameters.
    pub fn parameters(config: &VisionConfig) -> Result<BTreeMap<String, Vec<usize>>> {
        Ok(Self::new(config.clone(), -1, SelectFeature::Patch, &mut Shapes(Place::cpu()))?.shapes())
    }

    /// Layers that run.
    pub fn depth(&self) -> usize {
        self.depth
    }

    /// Is a parameter or a layer of this role ever computed? Layers of the tower above the selected one are not.
    pub fn computes(&self, role: &Role) -> bool {
        role.part != Part::Vision || !matches!(role.level, Level::Layer(i) if i >= self.depth)
    }

    /// How the features of one picture lie.
    pub fn grid(&self) -> Grid {
        let (image_size, patch_size) = (self.size, self.config.patch_size);
        Grid { image_size, patch_size, class_token: self.select == SelectFeature::Full }
    }

    /// Lets the tower see pictures of `size` pixels a side from now on.
    ///
    /// # Errors
    /// If patches do not fill such a picture.
    pub fn set_size(&mut self, size: usize) -> Result<()> {
        let VisionConfig { image_size, patch_size: p, .. } = self.config;
        if size == 0 || !size.is_multiple_of(p) {
            let below = (size / p).max(1) * p;
            bail!("patches of {p} px do not fill a picture of {size} px"; "sizes near it that they fill: {below}, {}", below + p)
        }
        if size != self.size {
            let table = &self.position_embedding.value;
            let positions = || Positions::new(image_size / p, size / p, table.dtype(), table.device());
            self.positions = if size == image_size { None } else { Some(positions()?) };
            self.size = size;
        }
        Ok(())
    }

    /// Tokens of one picture inside the tower: the class token and the patches.
    pub fn rows(&self) -> usize {
        (self.size / self.config.patch_size).pow(2) + 1
    }

    /// Recomputes where backward has to go; called when what trains has changed.
    pub fn plan(&mut self) {
        let below = self.embeddings_train();
        let f = segment::frontier(&self.layers[..self.depth], below);
        self.frontier = (below || f < self.depth).then_some(f);
    }

    /// Does backward reach the tower?
    pub fn reached(&self) -> bool {
        self.frontier.is_some()
    }

    /// Names of parameters that no gradient can reach, with the reason.
    pub fn unreachable(&self) -> Vec<(String, String)> {
        let (mut out, depth, n) = (Vec::new(), self.depth, self.layers.len());
        let mut note = |p: &Param, why: &str| {
            if p.trainable {
                out.push((p.name.clone(), why.to_string()));
            }
        };
        let why = format!(
            "the features are taken after layer {depth} of {n} (select_layer), so this layer is never computed"
        );
        self.layers[depth..].iter().for_each(|l| l.visit(&mut |p| note(p, &why)));
        self.post_layernorm
            .visit(&mut |p| note(p, "hidden states are taken before the tower's last norm, so it is never computed"));
        out
    }

    /// `pixels` `[B, C, S, S]` of any type on any device → features `[B·grid.tokens(), D]`; keeps what backward needs if
    /// the tower is reached.
    pub fn forward(
        &self,
        pixels: &Tensor,
        dropout: Option<crate::ops::random::Key>,
        adapters_off: bool,
        kept: Kept,
        record: bool,
    ) -> Result<(Tensor, Option<Saved>)> {
        let b = pixels.dim(0)?;
        let (patches, embedded) = self.embed(pixels)?;
        let (x, stats) = self.pre_layrnorm.forward(&embedded)?;
        watch::see("vision.pre_layrnorm", &x)?;
        let mut side = Side::packed(&vec![self.rows(); b]);
        (side.dropout, side.adapters_off) = (dropout, adapters_off);
        let frontier = if record { self.frontier } else { None };
        let (y, tape) = segment::forward(&self.layers[..self.depth], x, &side, frontier.unwrap_or(self.depth), kept)?;
        let features = match self.select {
            SelectFeature::Full => y,
            SelectFeature::Patch => gather(&y, &self.patch_rows(b))?,
        };
        Ok((features, frontier.map(|_| Saved { side, patches, embedded, stats, tape })))
    }

    /// The first layer that backward reaches; `None` if it does not reach the tower.
    pub fn frontier(&self) -> Option<usize> {
        self.frontier
    }

    /// Bytes a picture that a recorded pass keeps of the layers.
    pub fn bytes_per_picture(&self, kept: Kept) -> Result<usize> {
        let reached = &self.layers[self.frontier.unwrap_or(self.depth)..self.depth];
        Ok(self.rows() * segment::bytes_per_row(reached, kept)?)
    }

    /// Gradients of what trains in the tower, from the gradient of its features.
    pub fn backward(&self, saved: Saved, dfeatures: Tensor, grads: &mut Grads) -> Result<()> {
        let Saved { side, patches, embedded, stats, tape } = saved;
        let b = side.sequences.len();
        let dy = match self.select {
            SelectFeature::Full => dfeatures,
            SelectFeature::Patch => {
                let dy = embedded.zeros_like()?;
                scatter_(&dy, &self.patch_rows(b), &dfeatures)?;
                dy
            }
        };
        let below = self.embeddings_train();
        let Some(dx) = segment::backward(&self.layers[..self.depth], tape, dy, &side, grads, below)? else {
            return Ok(());
        };
        let dx = self.pre_layrnorm.backward(&embedded, &stats, &dx, grads)?;
        let t = self.rows();
        if self.position_embedding.trainable {
            match &self.positions {
                Some(positions) => grads.add(&self.position_embedding.name, positions.backward(&dx)?)?,
                None => {
                    let rows: Vec<u32> = (0..b).flat_map(|_| 0..t as u32).collect();
                    scatter_add_(grads.slot(&self.position_embedding)?, &rows, &dx)?;
                }
            }
        }
        if self.class_embedding.trainable {
            let rows: Vec<u32> = (0..b as u32).map(|i| i * t as u32).collect();
            grads.add(&self.class_embedding.name, sum_rows(&gather(&dx, &rows)?)?)?;
        }
        if self.patch_embedding.trainable {
            let d = gather(&dx, &self.patch_rows(b))?;
            let dw = matmul_wide(Mat::T(&d), Mat::N(&patches))?;
            grads.add(&self.patch_embedding.name, dw.reshape(self.patch_embedding.value.shape())?)?;
        }
        Ok(())
    }

    /// Patches `[B·P, C·p·p]` and embedded tokens `[B·(P+1), D]`: class token first, positions added.
    fn embed(&self, pixels: &Tensor) -> Result<(Tensor, Tensor)> {
        let (c, size) = (self.config.num_channels, self.size);
        if pixels.dims()[1..] != [c, size, size] {
            bail!("the tower takes pictures of [{c}, {size}, {size}], found {:?}", &pixels.dims()[1..])
        }
        let (b, d, t) = (pixels.dim(0)?, self.config.hidden_size, self.rows());
        let kernel = self.patch_embedding.compute().reshape((d, ()))?;
        let pixels = pixels.to_device(kernel.device())?.to_dtype(kernel.dtype())?;
        let patches = patches::unfold(&pixels, self.config.patch_size)?;
        // A copy in any case: `repeat` of a single picture would hand out the parameter itself.
        let positions: Vec<u32> = (0..b).flat_map(|_| 0..t as u32).collect();
        let table = self.position_embedding.compute();
        let x = match &self.positions {
            Some(at_size) => gather(&at_size.forward(table)?, &positions)?,
            None => gather(table, &positions)?,
        };
        let words = matmul(Mat::N(&patches), Mat::T(&kernel))?;
        scatter_add_(&x, &self.patch_rows(b), &words)?;
        let class_rows: Vec<u32> = (0..b as u32).map(|i| i * t as u32).collect();
        scatter_add_(&x, &class_rows, &self.class_embedding.compute().reshape((1, d))?.repeat((b, 1))?)?;
        Ok((patches, x))
    }

    fn patch_rows(&self, b: usize) -> Vec<u32> {
        let t = self.rows();
        (0..b * t).filter(|i| i % t != 0).map(|i| i as u32).collect()
    }

    /// Does something below the layers train?
    pub fn embeddings_train(&self) -> bool {
        let pre = &self.pre_layrnorm;
        [&self.class_embedding, &self.patch_embedding, &self.position_embedding, &pre.weight]
            .iter()
            .any(|p| p.trainable)
            || pre.bias.as_ref().is_some_and(|b| b.trainable)
    }
}

module!(Tower: class_embedding, patch_embedding, position_embedding, pre_layrnorm, layers, post_layernorm);
