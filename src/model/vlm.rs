//! The whole model: tower → projector → visual tokens spliced into the text → language model → log-probabilities.

use super::island;
use super::language::{self, Language};
use super::linear::{Linear, LowRank};
use super::params::{Grads, Module, Param};
use super::projector::Projector;
use super::segment::{Kept, Segment, Side};
use super::vision::{self, Tower};
use crate::bail;
use crate::error::Result;
use crate::ops::cross_entropy::LogProbs;
use crate::ops::embedding::{gather, scatter_, scatter_add_};
use crate::ops::random::Key;
use crate::recipe::pattern::Patterns;
use candle_core::Tensor;
use std::collections::{BTreeMap, BTreeSet};
use tracing::debug_span;

/// Tower and projector may be absent: then it is a language model.
#[derive(Debug, Clone)]
pub struct Vlm {
    pub vision: Option<Tower>,
    pub projector: Option<Projector>,
    pub language: Language,
    /// Id that stands for a visual token in `Batch::ids`; `None` without a tower.
    pub image_token_id: Option<u32>,
    /// What backward has to reach, see [`Vlm::plan`].
    projector_trains: bool,
}

/// Sequences of a micro-batch, packed without padding.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// Token ids of all sequences; a visual token has the image token's id.
    pub ids: Vec<u32>,
    /// Length of each sequence.
    pub lengths: Vec<usize>,
    /// The distinct pictures, `[I, C, S, S]`.
    pub pixels: Option<Tensor>,
    /// Which picture each run of visual tokens shows, in the order of the rows.
    pub pictures: Vec<u32>,
    /// Labelled tokens: the row that predicts it, and its id.
    pub targets: Vec<(u32, u32)>,
    /// The sequence that each target belongs to.
    pub owners: Vec<usize>,
}

/// Size of a micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Load {
    /// Distinct pictures.
    pub pictures: usize,
    /// Tokens of all sequences, visual ones among them.
    pub tokens: usize,
}

/// How to run a pass.
#[derive(Debug, Clone, Copy, Default)]
pub struct Mode {
    /// Keep what backward needs.
    pub record: bool,
    pub kept: Kept,
    /// Key of the dropout masks; none outside training.
    pub dropout: Option<Key>,
    pub adapters_off: bool,
}

/// What a recorded pass left for backward.
pub struct Saved {
    vision: Option<vision::Saved>,
    projector: Option<island::Tape>,
    language: language::Saved,
    side: Side,
    image_rows: Vec<u32>,
    feature_rows: Vec<u32>,
    projected: Option<Tensor>,
}

impl Saved {
    /// Bytes that the layers keep; for tests and measurements.
    pub fn kept_bytes(&self) -> usize {
        self.language.kept_bytes() + self.vision.as_ref().map_or(0, vision::Saved::kept_bytes)
    }
}

impl Vlm {
    /// Puts the parts together, everything frozen.
    pub fn new(
        vision: Option<Tower>,
        projector: Option<Projector>,
        language: Language,
        image_token_id: impl Into<Option<u32>>,
    ) -> Self {
        let image_token_id = image_token_id.into();
        let mut vlm = Self { vision, projector, language, image_token_id, projector_trains: false };
        vlm.plan();
        vlm
    }

    /// Recomputes the frontier; call it whenever what trains has changed (`set_trainable` does).
    pub fn plan(&mut self) {
        if let Some(v) = &mut self.vision {
            v.plan();
        }
        self.projector_trains = self.projector.as_mut().is_some_and(Module::trains);
        let below = self.projector_trains || self.vision.as_ref().is_some_and(Tower::reached);
        self.language.plan(below);
    }

    /// Trains exactly these parameters, and plans backward accordingly.
    pub fn train_only(&mut self, names: &BTreeSet<String>) {
        self.set_trainable(names);
        self.plan();
    }

    /// Visual tokens of one picture, none without a tower; an error if the projector cannot take the tower's grid.
    pub fn tokens_per_image(&self) -> Result<usize> {
        let (Some(tower), Some(projector)) = (&self.vision, &self.projector) else { return Ok(0) };
        projector.tokens(tower.grid())
    }

    /// Trainable parameters that no gradient can reach, with the reason. `pictures`: does the data show any?
    pub fn unreachable(&mut self, pictures: bool) -> Vec<(String, String)> {
        let mut out = self.vision.as_mut().map_or_else(Vec::new, Tower::unreachable);
        if !pictures {
            for name in self.trainable().into_keys() {
                if name.starts_with("vision.") || name.starts_with("projector.") {
                    out.push((name, "no sample of this stage has a picture".to_string()));
                }
            }
        }
        out
    }

    /// Log-probabilities of the batch's targets.
    pub fn forward(&self, batch: &Batch, mode: Mode) -> Result<(LogProbs, Option<Saved>)> {
        let x = self.language.embed(&batch.ids)?;
        let side = self.language.side(&batch.lengths, mode.dropout, mode.adapters_off)?;
        let visual = self.visual_tokens(batch, mode)?;
        let (image_rows, feature_rows) = self.splice_rows(batch)?;
        if let Some(v) = &visual {
            scatter_(&x, &image_rows, &gather(&v.tokens, &feature_rows)?)?;
        }
        let (out, saved) = self.language.forward(x, &side, &batch.targets, mode.kept, mode.record)?;
        let saved = saved.map(|language| {
            let (vision, projector, projected) =
                visual.map_or((None, None, None), |v| (v.saved, v.tape, Some(v.tokens)));
            Saved { vision, projector, language, side, image_rows, feature_rows, projected }
        });
        Ok((out, saved))
    }

    /// Gradients of Σ coefᵢ·log pᵢ over the batch's targets, added to `grads`.
    pub fn backward(&self, batch: &Batch, saved: Saved, coefs: &[f64], grads: &mut Grads) -> Result<()> {
        let Saved { vision, projector, language, side, image_rows, feature_rows, projected } = saved;
        let dx = self.language.backward(language, &batch.ids, &side, coefs, &image_rows, grads)?;
        let (Some(dx), Some(tape), Some(projected)) = (dx, projector, projected) else { return Ok(()) };
        let dtokens = projected.zeros_like()?;
        scatter_add_(&dtokens, &feature_rows, &gather(&dx, &image_rows)?)?;
        let dfeatures = debug_span!("projector backward").in_scope(|| island::backward(tape, &dtokens, grads))?;
        if let (Some(tower), Some(saved), Some(d)) = (&self.vision, vision, dfeatures) {
            debug_span!("tower backward").in_scope(|| tower.backward(saved, d, grads))?;
        }
        Ok(())
    }

    /// Projected features of the batch's distinct pictures, `[I·tokens_per_image, D]`.
    fn visual_tokens(&self, batch: &Batch, mode: Mode) -> Result<Option<Visual>> {
        let (Some(pixels), Some(tower), Some(projector)) = (&batch.pixels, &self.vision, &self.projector) else {
            return Ok(None);
        };
        let (features, saved) = debug_span!("tower")
            .in_scope(|| tower.forward(pixels, mode.dropout, mode.adapters_off, mode.kept, mode.record))?;
        let pass = island::Pass {
            trains: mode.record && self.projector_trains,
            need_dx: saved.is_some(),
            dropout: mode.dropout.filter(|_| self.projector_trains),
        };
        let (tokens, tape) = debug_span!("projector").in_scope(|| projector.forward(&features, tower.grid(), pass))?;
        Ok(Some(Visual { tokens, tape, saved }))
    }

    /// Rows of the stream that hold visual tokens, and the rows of the projected features that belong there.
    fn splice_rows(&self, batch: &Batch) -> Result<(Vec<u32>, Vec<u32>)> {
        let per = self.tokens_per_image()?;
        let rows: Vec<u32> = batch
            .ids
            .iter()
            .enumerate()
            .filter(|(_, id)| Some(**id) == self.image_token_id)
            .map(|(i, _)| i as u32)
            .collect();
        if rows.len() != batch.pictures.len() * per {
            bail!("{} visual tokens for {} pictures of {per} tokens", rows.len(), batch.pictures.len();
                "a text holds the image token itself, or the sample's tokens were cut inside a picture")
        }
        let features = batch.pictures.iter().flat_map(|p| (0..per as u32).map(move |k| p * per as u32 + k)).collect();
        Ok((rows, features))
    }

    /// Embedded rows of one prompt, for generation.
    pub fn embed_prompt(&self, batch: &Batch) -> Result<Tensor> {
        let x = self.language.embed(&batch.ids)?;
        if let Some(v) = self.visual_tokens(batch, Mode::default())? {
            let (rows, features) = self.splice_rows(batch)?;
            scatter_(&x, &rows, &gather(&v.tokens, &features)?)?;
        }
        Ok(x)
    }

    /// Features of the tower and visual tokens of `pixels`; for tests and measurements.
    pub fn project(&self, pixels: &Tensor) -> Result<Option<(Tensor, Tensor)>> {
        let (Some(tower), Some(projector)) = (&self.vision, &self.projector) else { return Ok(None) };
        let (features, _) = tower.forward(pixels, None, false, Kept::Input, false)?;
        let (tokens, _) = projector.forward(&features, tower.grid(), island::Pass::default())?;
        Ok(Some((features, tokens)))
    }

    /// Bytes that the layers keep of a recorded pass of this size.
    pub fn kept_bytes(&self, load: Load, kept: Kept) -> Result<usize> {
        let tower = self.vision.as_ref().map_or(Ok(0), |v| v.bytes_per_picture(kept))?;
        Ok(load.tokens * self.language.bytes_per_token(kept)? + load.pictures * tower)
    }

    /// Bytes that one layer's activations take at most while it runs, recorded or not.
    pub fn largest_layer(&self, load: Load) -> Result<usize> {
        let mut most = 0;
        for l in &self.language.layers {
            most = most.max(load.tokens * l.bytes_per_row(Kept::All)?);
        }
        if let Some(v) = &self.vision {
            let rows = load.pictures * (v.config.num_patches() + 1);
            for l in &v.layers {
                most = most.max(rows * l.bytes_per_row(Kept::All)?);
            }
        }
        Ok(most)
    }

    /// Every linear layer of tower and language model that an adapter can sit on.
    pub fn for_each_linear(&mut self, f: &mut dyn FnMut(&mut Linear)) {
        if let Some(v) = &mut self.vision {
            v.for_each_linear(f);
        }
        self.language.for_each_linear(f);
    }

    /// Lets the layers whose names match `patterns` recompute; the others follow the pass.
    pub fn recompute(&mut self, patterns: &[String]) -> Result<()> {
        let towers = self.vision.iter().flat_map(|v| &v.layers).map(|l| l.name.clone());
        let known: Vec<String> = towers.chain(self.language.layers.iter().map(|l| l.name.clone())).collect();
        let matcher = if patterns.is_empty() { None } else { Some(Patterns::new(patterns, &known)?) };
        let policy = |name: &str| matcher.as_ref().filter(|m| m.matches(name)).map(|_| Kept::Input);
        for l in self.vision.iter_mut().flat_map(|v| &mut v.layers) {
            l.policy = policy(&l.name);
        }
        for l in &mut self.language.layers {
            l.policy = policy(&l.name);
        }
        Ok(())
    }

    /// Names of those linear layers.
    pub fn linear_names(&mut self) -> Vec<String> {
        let mut names = Vec::new();
        self.for_each_linear(&mut |l| names.push(l.name().to_string()));
        names
    }

    /// All low-rank updates of an adapter by the name of their layer.
    pub fn deltas(&mut self, adapter: &str) -> BTreeMap<String, LowRank> {
        let mut out = BTreeMap::new();
        self.for_each_linear(&mut |l| {
            if let Some(d) = l.deltas.iter().find(|d| d.adapter == adapter) {
                out.insert(l.name().to_string(), d.clone());
            }
        });
        out
    }
}

struct Visual {
    tokens: Tensor,
    tape: Option<island::Tape>,
    saved: Option<vision::Saved>,
}

impl Module for Vlm {
    fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
        if let Some(v) = &mut self.vision {
            v.visit(f);
        }
        if let Some(p) = &mut self.projector {
            p.visit(f);
        }
        self.language.visit(f);
    }
}
