//! The model as it goes from stage to stage: which adapters it carries, which of its own parameters have changed.

use crate::adapters::{self, lora};
use crate::bail;
use crate::checkpoint::safetensors::{load, save_summed};
use crate::error::{Context, Error, Result};
use crate::model::init::fresh;
use crate::model::linear::LowRank;
use crate::model::params::Module;
use crate::model::role::{Part, Role};
use crate::model::vlm::Vlm;
use crate::ops::random::Key;
use crate::spec::pattern::Patterns;
use crate::spec::{Adapter, HandOver, Recipe, START_ADAPTER, Stage};
use candle_core::Tensor;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// File of all tensors that differ from the backbones as loaded.
pub const TRAINED: &str = "trained.safetensors";

/// A model between or in stages; copies share their tensors.
#[derive(Clone)]
pub struct State {
    pub vlm: Vlm,
    /// Adapters on the model, as the recipe declared them; `freeze` is set where later ones are stacked on them.
    pub adapters: BTreeMap<String, Adapter>,
    /// Parameters of the base model that were trained, reset or merged into so far.
    pub changed: BTreeSet<String>,
}

impl State {
    /// The model as assembled; a loaded start adapter is described by `start`.
    pub fn new(vlm: Vlm, start: Option<Adapter>) -> Self {
        let projector = vlm.names(|p| p.role.part == Part::Projector);
        let adapters = start.map(|a| (START_ADAPTER.to_string(), a)).into_iter().collect();
        Self { vlm, adapters, changed: projector }
    }

    /// Lets the model see pictures as large as the stage says.
    pub fn look(&mut self, stage: &Stage) -> Result<()> {
        let size = |size| self.vlm.set_image_size(size);
        stage.image_size.map_or(Ok(()), size).context("image_size")
    }

    /// Does what the stage says about structure: size of pictures, hand-over of adapters, fresh parameters, new adapters, what
    /// trains.
    pub fn enter(&mut self, stage: &Stage, name: &str) -> Result<()> {
        self.look(stage)?;
        self.take_over(stage)?;
        self.begin(stage, name)
    }

    /// What becomes of the adapters that are there: merged into the weights, frozen, or as they are.
    pub fn take_over(&mut self, stage: &Stage) -> Result<()> {
        match hand_over(stage) {
            HandOver::Merge => self.merge()?,
            HandOver::Stack => self.adapters.values_mut().for_each(Adapter::set_freeze),
            HandOver::Continue => {}
        }
        Ok(())
    }

    /// What [`State::enter`] does after [`State::take_over`].
    pub fn begin(&mut self, stage: &Stage, name: &str) -> Result<()> {
        let continued: Vec<String> =
            self.adapters.iter().filter(|(_, a)| !a.freeze()).map(|(name, _)| name.clone()).collect();
        self.reset(stage, name)?;
        let declared = self.declare(stage, name)?;
        let trainable = self.trainable(stage, &continued, &declared)?;
        self.changed.extend(self.vlm.names(|p| trainable.contains(&p.name) && !p.is_adapter()));
        self.vlm.train_only(&trainable);
        self.vlm.recompute(&stage.recompute).with_context(|| format!("stage.{name}.recompute"))?;
        Ok(())
    }

    fn merge(&mut self) -> Result<()> {
        if let Some((name, a)) = self.adapters.iter().find(|(_, a)| !matches!(a, Adapter::Lora(_))) {
            bail!("from: the adapter `{name}` is a {} and cannot be merged into the weights", a.kind();
                "use adapters = \"continue\" or \"stack\"")
        }
        for a in std::mem::take(&mut self.adapters).into_keys() {
            self.changed.extend(self.vlm.deltas(&a).into_keys().map(|n| format!("{n}.weight")));
        }
        lora::merge(&mut self.vlm)
    }

    fn reset(&mut self, stage: &Stage, name: &str) -> Result<()> {
        if stage.reset.is_empty() {
            return Ok(());
        }
        let key = Key::new(stage.seed, &format!("reset/{name}"));
        let (params, roles) = (self.vlm.params(), self.vlm.roles());
        let known: Vec<String> = params.keys().cloned().collect();
        let patterns = Patterns::new(&stage.reset, &known).context("reset")?;
        let mut values = BTreeMap::new();
        for (n, t) in params.into_iter().filter(|(n, _)| patterns.matches(n)) {
            values.insert(n.clone(), fresh(key, &n, t.dims(), t.dtype(), roles[&n].init)?);
            if roles[&n].adapter.is_none() {
                self.changed.insert(n);
            }
        }
        self.vlm.assign(&values)?;
        lora::reset_magnitudes(&self.vlm, |n| patterns.matches(n))
    }

    /// What the learning rates of trained parameters are multiplied by, where LoRA+ (`lr_ratio`) does that: those of B and of
    /// magnitudes, as PEFT's `create_loraplus_optimizer` has it.
    pub fn lr_factors(&self) -> BTreeMap<String, f64> {
        let ratio = |adapter: &str| match self.adapters.get(adapter)? {
            Adapter::Lora(a) => a.lr_ratio,
            _ => None,
        };
        let updates = self.vlm.linears().flat_map(|l| &l.deltas).filter_map(|d| Some((d, ratio(&d.adapter)?)));
        let faster = |(d, ratio)| {
            let d: &LowRank = d;
            let params = [Some(&d.b), d.magnitude.as_ref().map(|m| &m.param)];
            params.into_iter().flatten().filter(|p| p.trainable).map(move |p| (p.name.clone(), ratio))
        };
        updates.flat_map(faster).collect()
    }

    /// Grafts the stage's own adapters; returns the names of those that train.
    fn declare(&mut self, stage: &Stage, name: &str) -> Result<Vec<String>> {
        let mut trained = Vec::new();
        for (i, cfg) in stage.adapters.iter().enumerate() {
            let adapter = cfg.name(name, i);
            let key = Key::new(stage.seed, &format!("adapter/{name}"));
            adapters::attach(&mut self.vlm, cfg, &adapter, key)
                .with_context(|| format!("adapters[{i}].{}", cfg.kind()))?;
            self.adapters.insert(adapter.clone(), cfg.clone());
            if !cfg.freeze() {
                trained.push(adapter);
            }
        }
        Ok(trained)
    }

    fn trainable(&self, stage: &Stage, continued: &[String], declared: &[String]) -> Result<BTreeSet<String>> {
        let own: Vec<String> = self.vlm.names(|p| !p.is_adapter()).into_iter().collect();
        let mut out: BTreeSet<String> = if stage.train.is_empty() {
            BTreeSet::new()
        } else {
            let patterns = Patterns::new(&stage.train, &own).context("train")?;
            own.into_iter().filter(|n| patterns.matches(n)).collect()
        };
        let adapters: Vec<&String> = continued.iter().chain(declared).collect();
        // An adapter that was loaded may lie on layers that are never computed; these stay as they are. (Of those that the recipe
        // declares it is an error.)
        let dormant = |role: &Role| {
            role.adapter() == Some(START_ADAPTER) && self.vlm.vision.as_ref().is_some_and(|tower| !tower.computes(role))
        };
        let chosen = |role: &Role| role.adapter().is_some_and(|a| adapters.iter().any(|b| *b == a)) && !dormant(role);
        out.extend(self.vlm.names(|p| chosen(&p.role)));
        if out.is_empty() {
            bail!("nothing trains in this stage"; "list patterns under `train`, or declare an adapter under `adapters`")
        }
        Ok(out)
    }

    /// Everything that differs from the loaded backbones, by name.
    pub fn own(&self) -> BTreeMap<String, Tensor> {
        let own = self.vlm.names(|p| p.is_adapter() || self.changed.contains(&p.name));
        let mut all = self.vlm.params();
        all.retain(|n, _| own.contains(n));
        all
    }

    /// Writes [`State::own`] into `dir`; returns the file's SHA-256.
    pub fn save(&self, dir: &Path) -> Result<String> {
        save_summed(&dir.join(TRAINED), &self.own(), &BTreeMap::new())
    }

    /// Takes the values of a [`State::save`]; structure must be the same.
    pub fn load(&mut self, dir: &Path) -> Result<()> {
        let path = dir.join(TRAINED);
        let values = load(&path)?;
        let known = self.vlm.params();
        for (n, t) in &values {
            match known.get(n) {
                Some(k) if k.dims() == t.dims() => {}
                Some(k) => bail!("{}: {n} has shape {:?}, the model {:?}", path.display(), t.dims(), k.dims()),
                None => {
                    bail!("{}: the model has no parameter {n}", path.display(); "the run's recipe was changed after this stage")
                }
            }
        }
        if let Some(n) = self.own().keys().find(|n| !values.contains_key(*n)) {
            bail!("{} lacks {n}", path.display(); "the file belongs to another recipe")
        }
        self.vlm.assign(&values)?;
        Ok(())
    }
}

/// What a stage does with the adapters it finds.
pub fn hand_over(stage: &Stage) -> HandOver {
    stage.from.as_ref().map_or(HandOver::Continue, |f| f.adapters)
}

/// The stage that `name` starts from: the one it names, or the one before it in the recipe's order.
pub fn parent<'a>(recipe: &'a Recipe, name: &str) -> Result<Option<&'a str>> {
    let stage = recipe.stage.get(name).ok_or_else(|| Error::new(format!("the recipe has no stage `{name}`")))?;
    if let Some(f) = &stage.from {
        return Ok(recipe.stages.iter().find(|s| **s == f.stage).map(String::as_str));
    }
    let at = recipe.stages.iter().position(|s| s == name).unwrap_or(0);
    Ok(at.checked_sub(1).map(|i| recipe.stages[i].as_str()))
}

/// The stages that lead to `name`, the first one first, `name` last.
pub fn lineage<'a>(recipe: &'a Recipe, name: &'a str) -> Result<Vec<&'a str>> {
    let mut chain = vec![name];
    while let Some(p) = parent(recipe, chain[chain.len() - 1])? {
        if chain.contains(&p) {
            bail!("stage `{p}` starts from itself")
        }
        chain.push(p);
    }
    chain.reverse();
    Ok(chain)
}
