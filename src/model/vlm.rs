//! The whole model: tower → projector → visual tokens spliced into the text → language model → log-probabilities.

mod stream;

use super::block::Block;
use super::init::Place;
use super::island;
use super::language::{self, Language};
use super::linear::{Linear, LowRank};
use super::params::{Grads, Module, Param, module};
use super::projector::Projector;
use super::role::Part;
use super::segment::{Kept, Segment, Side};
use super::vision::{self, Tower};
use super::visual::{Layout, Visual};
use super::watch;
use crate::bail;
use crate::error::Result;
use crate::ops::cross_entropy::LogProbs;
use crate::ops::embedding::{gather, scatter_, scatter_add_};
use crate::ops::launch::widen;
use crate::ops::matmul::sum_rows;
use crate::ops::random::Key;
use crate::spec::pattern::Patterns;
use crate::spec::{Deliver, PrefixPlace};
use candle_core::Tensor;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::OnceLock;
use stream::Stream;
use tracing::debug_span;

/// Tower and projector may be absent: then it is a language model.
#[derive(Debug, Clone)]
pub struct Vlm {
    pub vision: Option<Tower>,
    pub projector: Option<Projector>,
    /// The visual token that ends each row of a picture in tiles, `[D]`; a model that never sees any has none.
    pub newline: Option<Param>,
    pub language: Language,
    /// Id that stands for a visual token in `Batch::ids`; `None` without a tower.
    pub image_token_id: Option<u32>,
    /// Where visual tokens go.
    pub deliver: Deliver,
    /// Soft tokens in front of sequences and pictures, an adapter's each.
    pub prefixes: Vec<Prefix>,
    /// What backward has to reach, see [`Vlm::plan`].
    projector_trains: bool,
    /// [`Projector::kept_bytes`], once it was asked for.
    projector_keeps: OnceLock<[usize; 2]>,
}

/// Soft tokens (Lester et al. 2021; PEFT's prompt tuning): trained embeddings in front of every sequence, or of every picture.
#[derive(Debug, Clone)]
pub struct Prefix {
    /// The adapter that they are.
    pub adapter: String,
    /// Where they stand.
    pub before: PrefixPlace,
    /// `[tokens, D]`.
    pub embeddings: Param,
}

/// Sequences of a micro-batch, packed without padding.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// Token ids of all sequences; a visual token has the image token's id.
    pub ids: Vec<u32>,
    /// Length of each sequence.
    pub lengths: Vec<usize>,
    /// What the tower sees of the distinct pictures, `[pieces, C, S, S]`.
    pub pixels: Option<Tensor>,
    /// How each distinct picture is made of those; `None`, or nothing at all: it is one of them.
    pub layouts: Vec<Option<Layout>>,
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
    /// Pictures of the tower: distinct ones, or the pieces of such.
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
    stream: Stream,
    projected: Option<Tensor>,
}

impl Saved {
    /// Bytes that layers and projector keep; for tests and measurements.
    pub fn kept_bytes(&self) -> usize {
        let projector: usize = self.projector.as_ref().map_or(0, |tape| tape.kept_bytes().iter().sum());
        self.language.kept_bytes() + self.vision.as_ref().map_or(0, vision::Saved::kept_bytes) + projector
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
        let mut vlm = Self {
            vision,
            projector,
            newline: None,
            language,
            image_token_id: image_token_id.into(),
            deliver: Deliver::Splice,
            prefixes: Vec::new(),
            projector_trains: false,
            projector_keeps: OnceLock::new(),
        };
        vlm.plan();
        vlm
    }

    /// Recomputes the frontier; call it whenever what trains has changed (`set_trainable` does).
    pub fn plan(&mut self) {
        if let Some(v) = &mut self.vision {
            v.plan();
        }
        self.projector_keeps = OnceLock::new();
        self.projector_trains = self.projector.as_ref().is_some_and(Module::trains);
        let visual = self.visual_learns();
        let prefixes = self.prefixes.iter().any(|p| p.embeddings.trainable);
        self.language.plan(prefixes || visual && self.deliver == Deliver::Splice, visual);
    }

    /// Does something that makes the visual tokens train?
    fn visual_learns(&self) -> bool {
        let newline = self.newline.as_ref().is_some_and(|p| p.trainable);
        newline || self.projector_trains || self.vision.as_ref().is_some_and(Tower::reached)
    }

    /// Trains exactly these parameters, and plans backward accordingly.
    pub fn train_only(&mut self, names: &BTreeSet<String>) {
        self.set_trainable(names);
        self.plan();
    }

    /// Lets the tower see pictures of `size` pixels a side from now on; an error if it, or the projector, cannot.
    pub fn set_image_size(&mut self, size: usize) -> Result<()> {
        let Some(tower) = &mut self.vision else {
            bail!("the model has no vision tower"; "leave image_size out, or set model.vision")
        };
        tower.set_size(size)?;
        self.projector_keeps = OnceLock::new();
        self.visual_tokens_per_image().map(drop)
    }

    /// Visual tokens of one picture, none without a tower; an error if the projector cannot take the tower's grid.
    pub fn visual_tokens_per_image(&self) -> Result<usize> {
        let (Some(tower), Some(projector)) = (&self.vision, &self.projector) else { return Ok(0) };
        projector.tokens(tower.grid())
    }

    /// Image tokens that a picture takes in a text: one for each visual token, or a single one where those stand beside the text.
    pub fn tokens_per_image(&self) -> Result<usize> {
        Ok(self.deliver.image_tokens(self.visual_tokens_per_image()?))
    }

    /// Do visual tokens stand beside the text with no layer that reads them?
    pub fn is_blind(&self) -> bool {
        self.deliver == Deliver::CrossAttention && self.language.first_that_sees().is_none()
    }

    /// Trainable parameters that no gradient can reach, with the reason. `pictures`: does the data show any?
    pub fn unreachable(&self, pictures: bool) -> Vec<(String, String)> {
        let mut out = self.vision.as_ref().map_or_else(Vec::new, Tower::unreachable);
        let why = match (pictures, self.is_blind()) {
            (false, _) => "no sample of this stage has a picture",
            (true, true) => "no cross_attention adapter reads the visual tokens",
            (true, false) => return out,
        };
        let mut lost: Vec<String> = self.names(|p| p.trainable && p.role.sees).into_iter().collect();
        let soft = self.prefixes.iter().filter(|p| !pictures && p.before == PrefixPlace::Picture);
        lost.extend(soft.filter(|p| p.embeddings.trainable).map(|p| p.embeddings.name.clone()));
        lost.retain(|n| !out.iter().any(|(told, _)| told == n));
        out.extend(lost.into_iter().map(|n| (n, why.to_string())));
        out
    }

    /// Log-probabilities of the batch's targets.
    pub fn forward(&self, batch: &Batch, mode: Mode) -> Result<(LogProbs, Option<Saved>)> {
        let stream = self.stream(batch, mode.adapters_off)?;
        let mut side = self.language.side(&stream.lengths, mode.dropout, mode.adapters_off)?;
        let visual = self.visual_tokens(batch, mode)?;
        let x = self.embed_stream(&stream, visual.as_ref().map(|v| &v.tokens))?;
        side.visual = self.beside(&stream, visual.as_ref().map(|v| &v.tokens), mode.record);
        let (out, saved) = self.language.forward(x, &side, &stream.targets, mode.kept, mode.record)?;
        let saved = saved.map(|language| {
            let (vision, projector, projected) =
                visual.map_or((None, None, None), |v| (v.saved, v.tape, Some(v.tokens)));
            Saved { vision, projector, language, side, stream, projected }
        });
        Ok((out, saved))
    }

    /// Gradients of Σ coefᵢ·log pᵢ over the batch's targets, added to `grads`.
    pub fn backward(&self, saved: Saved, coefs: &[f64], grads: &mut Grads) -> Result<()> {
        let Saved { vision, projector, language, side, stream, projected } = saved;
        let strangers: Vec<u32> = stream.spliced.iter().chain(stream.prefixes.iter().flatten()).copied().collect();
        let dx = self.language.backward(language, &stream.ids, &side, coefs, &strangers, grads)?;
        if let Some(dx) = &dx {
            self.prefix_grads(&stream, dx, grads)?;
        }
        let dtokens = match &projected {
            Some(tokens) => self.visual_grads(&stream, dx.as_ref(), tokens, grads)?,
            None => None,
        };
        let (Some(dtokens), Some(tape)) = (dtokens, projector) else { return Ok(()) };
        let dfeatures = debug_span!("projector backward").in_scope(|| island::backward(tape, &dtokens, grads))?;
        if let (Some(tower), Some(saved), Some(d)) = (&self.vision, vision, dfeatures) {
            debug_span!("tower backward").in_scope(|| tower.backward(saved, d, grads))?;
        }
        Ok(())
    }

    /// The gradient of the projected features, if there is one; that of the newline token, the last row of `tokens` if one is
    /// shown, is added to `grads`.
    fn visual_grads(
        &self,
        stream: &Stream,
        dx: Option<&Tensor>,
        tokens: &Tensor,
        grads: &mut Grads,
    ) -> Result<Option<Tensor>> {
        let projected = tokens.dim(0)? - usize::from(stream.newline.is_some());
        let learns = self.newline.as_ref().filter(|p| p.trainable && stream.newline.is_some());
        if self.deliver == Deliver::CrossAttention {
            let Some(sum) = grads.take_visual() else { return Ok(None) };
            if let Some(newline) = learns {
                grads.add(&newline.name, sum.narrow(0, projected, 1)?.flatten_all()?.copy()?)?;
            }
            return Ok(Some(sum.narrow(0, 0, projected)?.to_dtype(tokens.dtype())?));
        }
        let Some(dx) = dx else { return Ok(None) };
        let places = stream.spliced.iter().zip(&stream.features).map(|(place, row)| (*place, *row));
        let (ends, words): (Vec<(u32, u32)>, Vec<_>) = places.partition(|(_, row)| Some(*row) == stream.newline);
        if let Some(newline) = learns {
            let ends: Vec<u32> = ends.into_iter().map(|(place, _)| place).collect();
            grads.add(&newline.name, sum_rows(&gather(dx, &ends)?)?)?;
        }
        let (places, rows): (Vec<u32>, Vec<u32>) = words.into_iter().unzip();
        let sum = widen(&tokens.narrow(0, 0, projected)?)?.zeros_like()?;
        scatter_add_(&sum, &rows, &gather(dx, &places)?)?;
        Ok(Some(sum.to_dtype(tokens.dtype())?))
    }

    /// The sums over all sequences, in their order.
    fn prefix_grads(&self, stream: &Stream, dx: &Tensor, grads: &mut Grads) -> Result<()> {
        for (prefix, rows) in self.prefixes.iter().zip(&stream.prefixes) {
            if prefix.embeddings.trainable {
                let tokens = prefix.embeddings.value.dim(0)? as u32;
                let places: Vec<u32> = (0..rows.len() as u32).map(|i| i % tokens).collect();
                scatter_add_(grads.slot(&prefix.embeddings)?, &places, &gather(dx, rows)?)?;
            }
        }
        Ok(())
    }

    /// Projected features of the batch's distinct pictures, `[pieces·visual_tokens_per_image, D]`, and behind them the newline if
    /// one of them is in tiles.
    fn visual_tokens(&self, batch: &Batch, mode: Mode) -> Result<Option<Projected>> {
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
        watch::see("projector", &tokens)?;
        let tokens = match &self.newline {
            Some(newline) if batch.layouts.iter().any(Option::is_some) => {
                let row = newline.compute().reshape((1, ()))?;
                Tensor::cat(&[&tokens, &row.to_dtype(tokens.dtype())?], 0)?
            }
            _ => tokens,
        };
        Ok(Some(Projected { tokens, tape, saved }))
    }

    /// Embedded rows of a stream.
    fn embed_stream(&self, stream: &Stream, visual: Option<&Tensor>) -> Result<Tensor> {
        let x = self.language.embed(&stream.ids)?;
        if let (Some(tokens), Deliver::Splice) = (visual, self.deliver) {
            scatter_(&x, &stream.spliced, &gather(tokens, &stream.features)?)?;
        }
        for (prefix, rows) in self.prefixes.iter().zip(&stream.prefixes) {
            let tokens = prefix.embeddings.value.dim(0)? as u32;
            let places: Vec<u32> = (0..rows.len() as u32).map(|i| i % tokens).collect();
            scatter_(&x, rows, &gather(prefix.embeddings.compute(), &places)?)?;
        }
        Ok(x)
    }

    /// What stands beside a stream for layers to read.
    fn beside(&self, stream: &Stream, visual: Option<&Tensor>, record: bool) -> Option<Visual> {
        let tokens = visual.filter(|_| self.deliver == Deliver::CrossAttention)?;
        Some(Visual::new(tokens.clone(), record && self.visual_learns(), &stream.shown))
    }

    /// A prompt of one sequence, for generation: its embedded rows, and what it and what follows may see beside them.
    pub fn prompt(&self, batch: &Batch) -> Result<(Tensor, [Option<Visual>; 2])> {
        let stream = self.stream(batch, false)?;
        let visual = self.visual_tokens(batch, Mode::default())?.map(|v| v.tokens);
        let x = self.embed_stream(&stream, visual.as_ref())?;
        let here = self.beside(&stream, visual.as_ref(), false);
        // A new row sees what the prompt's last one saw.
        let mut after = Stream { shown: stream.shown.clone(), ..stream };
        let n = after.shown.len();
        for (i, s) in after.shown.iter_mut().enumerate() {
            s.rows = if i + 1 == n { 0..1 } else { 0..0 };
        }
        let there = self.beside(&after, visual.as_ref(), false);
        Ok((x, [here, there]))
    }

    /// Embedded rows of a batch without what stands beside them; for tests.
    pub fn embed_prompt(&self, batch: &Batch) -> Result<Tensor> {
        Ok(self.prompt(batch)?.0)
    }

    /// Features of the tower and visual tokens of `pixels`; for tests and measurements.
    pub fn project(&self, pixels: &Tensor) -> Result<Option<(Tensor, Tensor)>> {
        let (Some(tower), Some(projector)) = (&self.vision, &self.projector) else { return Ok(None) };
        let (features, _) = tower.forward(pixels, None, false, Kept::Input, false)?;
        let (tokens, _) = projector.forward(&features, tower.grid(), island::Pass::default())?;
        Ok(Some((features, tokens)))
    }

    /// Bytes that layers and projector keep of a recorded pass of this size.
    pub fn kept_bytes(&self, load: Load, kept: Kept) -> Result<usize> {
        let tower = self.vision.as_ref().map_or(Ok(0), |v| v.bytes_per_picture(kept))?;
        let layers = load.tokens * self.language.bytes_per_token(kept)? + load.pictures * tower;
        Ok(layers + self.kept_by_projector(load)?)
    }

    /// [`Vlm::kept_bytes`] of the projector, the same whatever the layers keep.
    pub fn kept_by_projector(&self, load: Load) -> Result<usize> {
        let (Some(tower), Some(projector)) = (&self.vision, &self.projector) else { return Ok(0) };
        if load.pictures == 0 || !(self.projector_trains || tower.reached()) {
            return Ok(0);
        }
        let [fixed, picture] = match self.projector_keeps.get() {
            Some(known) => *known,
            None => {
                let place = Place { device: self.language.device().clone(), dtype: self.language.dtype() };
                let told = projector.kept_bytes(tower.config.hidden_size, tower.grid(), &place, tower.reached())?;
                *self.projector_keeps.get_or_init(|| told)
            }
        };
        Ok(fixed + load.pictures * picture)
    }

    /// [`Vlm::kept_bytes`] of each layer by its name, those below the frontier left out, and of the projector.
    pub fn kept_by_layer(&self, load: Load, kept: Kept) -> Result<BTreeMap<&str, usize>> {
        let mut all = BTreeMap::new();
        let projector = self.kept_by_projector(load)?;
        if projector > 0 {
            all.insert("projector", projector);
        }
        if let Some(v) = &self.vision {
            let reached = v.frontier().unwrap_or(v.depth())..v.depth();
            let rows = load.pictures * v.rows();
            for l in &v.layers[reached] {
                all.insert(l.scope.name(), rows * l.bytes_per_row(l.policy().unwrap_or(kept))?);
            }
        }
        for l in &self.language.layers[self.language.frontier().0..] {
            all.insert(l.scope.name(), load.tokens * l.bytes_per_row(l.policy().unwrap_or(kept))?);
        }
        Ok(all)
    }

    /// Where backward stops: what lies right below the lowest module that it reaches, in the tower and in the language model.
    /// Empty if it goes down to all inputs.
    pub fn stops_above(&self) -> Vec<String> {
        let mut all = Vec::new();
        if let Some(v) = self.vision.as_ref().filter(|_| self.visual_learns()) {
            let top = |depth: usize| match depth.checked_sub(1) {
                Some(i) => format!("vision.encoder.layers.{i}"),
                None => "vision.pre_layrnorm".to_string(),
            };
            match v.frontier() {
                Some(_) if v.embeddings_train() => {}
                first => all.push(top(first.unwrap_or(v.depth()))),
            }
        }
        let n = self.language.layers.len();
        match self.language.frontier() {
            (_, true) => {}
            (first, _) if first == n && !self.language.reaches_norm() => all.push("language.norm".to_string()),
            (0, _) => all.push("language.embed_tokens".to_string()),
            (first, _) => all.push(format!("language.layers.{}", first - 1)),
        }
        all
    }

    /// Rows that soft tokens add to every sequence, and to every picture in one.
    pub fn prefix_rows(&self) -> [usize; 2] {
        [PrefixPlace::Text, PrefixPlace::Picture].map(|place| {
            let there = self.prefixes.iter().filter(|p| p.before == place);
            there.filter_map(|p| p.embeddings.value.dims().first()).sum()
        })
    }

    /// Bytes that one layer's activations take at most while it runs, recorded or not.
    pub fn largest_layer(&self, load: Load) -> Result<usize> {
        let mut most = 0;
        for l in &self.language.layers {
            most = most.max(load.tokens * l.bytes_per_row(Kept::All)?);
        }
        if let Some(v) = &self.vision {
            let rows = load.pictures * v.rows();
            for l in &v.layers {
                most = most.max(rows * l.bytes_per_row(Kept::All)?);
            }
        }
        Ok(most)
    }

    /// How far each parameter stands from the top of its backbone (see [`Role::from_top`]); of the tower the layers that run.
    ///
    /// [`Role::from_top`]: super::role::Role::from_top
    pub fn distances(&self) -> BTreeMap<String, usize> {
        let (vision, language) = (self.vision.as_ref().map_or(0, Tower::depth), self.language.layers.len());
        let mut all = BTreeMap::new();
        self.visit(&mut |p| {
            let depth = if p.role.part == Part::Vision { vision } else { language };
            all.insert(p.name.clone(), p.role.from_top(depth));
        });
        all
    }

    /// The blocks of tower and language model.
    pub fn blocks(&self) -> impl Iterator<Item = &Block> {
        self.vision.iter().flat_map(|v| &v.layers).chain(&self.language.layers)
    }

    /// [`Vlm::blocks`], to change them.
    pub fn blocks_mut(&mut self) -> impl Iterator<Item = &mut Block> {
        self.vision.iter_mut().flat_map(|v| &mut v.layers).chain(&mut self.language.layers)
    }

    /// Every linear layer of tower and language model that an adapter can sit on.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.blocks().flat_map(Block::linears)
    }

    /// [`Vlm::linears`], to change them.
    pub fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.blocks_mut().flat_map(Block::linears_mut)
    }

    /// Lets the layers whose names match `patterns` recompute; the others follow the pass.
    pub fn recompute(&mut self, patterns: &[String]) -> Result<()> {
        let known: Vec<String> = self.blocks().map(|b| b.scope.name().to_string()).collect();
        let matcher = if patterns.is_empty() { None } else { Some(Patterns::new(patterns, &known)?) };
        let policy = |name: &str| matcher.as_ref().filter(|m| m.matches(name)).map(|_| Kept::Input);
        for b in self.blocks_mut() {
            b.policy = policy(b.scope.name());
        }
        Ok(())
    }

    /// Names of those linear layers.
    pub fn linear_names(&self) -> Vec<String> {
        self.linears().map(|l| l.name().to_string()).collect()
    }

    /// All low-rank updates of an adapter by the name of their layer.
    pub fn deltas(&self, adapter: &str) -> BTreeMap<String, LowRank> {
        let own = |l: &Linear| Some((l.name().to_string(), l.deltas.iter().find(|d| d.adapter == adapter)?.clone()));
        self.linears().filter_map(own).collect()
    }
}

struct Projected {
    tokens: Tensor,
    tape: Option<island::Tape>,
    saved: Option<vision::Saved>,
}

module!(Prefix: embeddings);
module!(Vlm: vision, projector, newline, prefixes, language);
