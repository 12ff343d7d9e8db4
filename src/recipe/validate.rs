//! The rules between the values of a recipe, checked before anything is read or downloaded. Errors name the key.

use super::explain::suggestion;
use crate::bail;
use crate::error::{Context, Result};
use crate::spec::*;
use std::collections::BTreeMap;

/// Checks what the types alone do not say.
pub fn validate(recipe: &Recipe) -> Result<()> {
    model(&recipe.model).context("model")?;
    order(recipe)?;
    if recipe.output_dir.as_os_str().is_empty() {
        bail!("output_dir: empty"; "name a folder for the run, e.g. runs/first");
    }
    // Who has which name.
    let mut adapters = BTreeMap::new();
    if recipe.model.adapter.is_some() {
        adapters.insert(START_ADAPTER.to_string(), "by `model.adapter`".to_string());
    }
    for (i, name) in recipe.stages.iter().enumerate() {
        let stage = &recipe.stage[name];
        let earlier = &recipe.stages[..i];
        let mut check = || {
            numbers(stage)?;
            optimizer(stage)?;
            data(&stage.data)?;
            own_adapters(name, stage, recipe.model.deliver, &mut adapters)?;
            let inherits = recipe.model.adapter.is_some()
                || origin(stage, earlier).is_some_and(|s| has_adapters(recipe, s, earlier));
            start(stage, earlier, &recipe.stages, inherits)?;
            objective(stage, inherits)?;
            align_check(stage, recipe)?;
            evaluations(stage, &recipe.eval)
        };
        check().with_context(|| format!("stage.{name}"))?;
    }
    for (name, eval) in &recipe.eval {
        data(&eval.data).with_context(|| format!("eval.{name}"))?;
        if eval.micro == 0 {
            bail!("eval.{name}: micro = 0"; "samples a forward pass, at least 1");
        }
        if eval.max_new_tokens == 0 {
            bail!("eval.{name}: max_new_tokens = 0"; "the longest answer in tokens, at least 1, e.g. 256");
        }
    }
    for (name, synth) in &recipe.synth {
        if synth.n == 0 {
            bail!("synth.{name}: n = 0"; "say how many pictures to make");
        }
    }
    Ok(())
}

fn order(recipe: &Recipe) -> Result<()> {
    if recipe.stages.is_empty() {
        bail!("stages: empty"; "list the stages in the order in which they run, e.g. stages = [\"align\", \"sft\"]");
    }
    for (i, name) in recipe.stages.iter().enumerate() {
        if recipe.stages[..i].contains(name) {
            bail!("stages: `{name}` is listed twice"; "a stage runs once; copy its section under another name");
        }
        plain_name(name).with_context(|| format!("stage.{name}"))?;
    }
    let listed: Vec<&str> = recipe.stages.iter().map(String::as_str).collect();
    let defined: Vec<&str> = recipe.stage.keys().map(String::as_str).collect();
    stage_names(&listed, &defined)
}

/// Every name in `stages` must have its section, and every section its place in the list.
pub fn stage_names(listed: &[&str], defined: &[&str]) -> Result<()> {
    if let Some(name) = listed.iter().find(|n| !defined.contains(n)) {
        bail!("stages: there is no [stage.{name}]"; "{}", suggestion(name, defined));
    }
    if let Some(name) = defined.iter().find(|n| !listed.contains(n)) {
        bail!(
            "stage.{name}: not listed in `stages`"; "{}; add it there to say when it runs, or drop the section",
            suggestion(name, listed)
        );
    }
    Ok(())
}

/// Names of stages and adapters become folders and parts of parameter names.
fn plain_name(name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if name.is_empty() || !name.chars().all(plain) {
        bail!("`{name}` cannot be a name"; "use letters, digits, `_` and `-`: names become folders and parts of parameter names");
    }
    Ok(())
}

fn model(m: &Model) -> Result<()> {
    if m.max_seq_len == 0 {
        bail!("max_seq_len = 0"; "the longest sample in tokens, e.g. 2048");
    }
    if m.image_token.is_empty() {
        bail!("image_token: empty"; "e.g. \"<image>\"");
    }
    let whole = m.source.is_some();
    if !whole && m.language.is_none() {
        bail!("no language model"; "give `language = {{ source = … }}`, or `source = …` with a whole LLaVA model");
    }
    if !whole && m.vision.is_some() != m.projector.is_some() {
        let (has, lacks) = if m.vision.is_some() { ("vision", "projector") } else { ("projector", "vision") };
        bail!("`{has}` without `{lacks}`"; "a model sees through both; leave both out for text alone");
    }
    if let Some(v) = &m.vision {
        one_start(v.source.is_some(), v.init.is_some(), whole).context("vision")?;
    }
    if let Some(l) = &m.language {
        one_start(l.source.is_some(), l.init.is_some(), whole).context("language")?;
        if l.init.is_some() && l.tokenizer.is_none() {
            bail!("language: `init` has no tokenizer"; "name one: tokenizer = FOLDER, FILE or REPOSITORY");
        }
    }
    m.projector.as_ref().map_or(Ok(()), |p| p.check().context("projector"))
}

fn one_start(source: bool, init: bool, whole: bool) -> Result<()> {
    if source && init {
        bail!("both `source` and `init`"; "`source` loads weights, `init` makes random ones; keep one");
    }
    if !source && !init && !whole {
        bail!("neither `source` nor `init`"; "name a folder or repository: source = \"owner/name\"");
    }
    Ok(())
}

fn numbers(s: &Stage) -> Result<()> {
    positive("lr", s.lr, "to keep parameters as they are, leave them out of `train`")?;
    positive("epochs", s.epochs, "passes over the data, fractions allowed")?;
    at_most("epochs", s.epochs, "passes over the data, e.g. 3; or set max_steps")?;
    if s.image_size == Some(0) {
        bail!("image_size = 0"; "pixels along an edge, e.g. 336; leave it out to go on as before");
    }
    if s.max_steps == Some(0) {
        bail!("max_steps = 0"; "leave it out to run `epochs`, or leave the stage out of `stages`");
    }
    if !(s.max_grad_norm >= 0.0 && s.max_grad_norm.is_finite()) {
        bail!("max_grad_norm = {}", s.max_grad_norm; "a norm above 0, or 0 for no clipping");
    }
    if s.checkpoint.keep == 0 {
        bail!("checkpoint: keep = 0"; "keep at least the last one; every_steps = 0 writes none before the stage's end");
    }
    let global = s.batch.global;
    let micro = s.batch.micro.unwrap_or(global);
    if global == 0 || micro == 0 {
        bail!("batch: global = {global}, micro = {micro}"; "both are at least 1");
    }
    if !global.is_multiple_of(micro) {
        let fit = (1..=micro).rev().find(|m| global.is_multiple_of(*m)).unwrap_or(1);
        bail!("batch: micro = {micro} does not divide global = {global}"; "the nearest below is micro = {fit}");
    }
    Ok(())
}

fn positive(key: &str, value: f64, hint: &str) -> Result<()> {
    if !(value > 0.0 && value.is_finite()) {
        bail!("{key} = {value} is not a number above 0"; "{hint}");
    }
    Ok(())
}

/// A million is more than any run has; beyond it, counts overflow and scales break every number.
fn at_most(key: &str, value: f64, hint: &str) -> Result<()> {
    const MOST: f64 = 1e6;
    if value > MOST {
        bail!("{key} = {value:e} is more than {MOST}"; "{hint}");
    }
    Ok(())
}

fn optimizer(s: &Stage) -> Result<()> {
    warmup(&s.lr_scheduler)?;
    if let Some(d) = s.layer_decay {
        layer_decay(d)?;
    }
    let Optimizer::Adamw(o) = &s.optimizer;
    if let Some(b) = o.betas.iter().find(|b| !(0.0..1.0).contains(*b)) {
        bail!("optimizer.adamw: betas has {b}"; "both are from 0 to below 1, e.g. [0.9, 0.999]");
    }
    positive("optimizer.adamw: eps", o.eps, "e.g. 1e-8")?;
    decay("optimizer.adamw", o.weight_decay)?;
    for (i, g) in s.param_groups.iter().enumerate() {
        let what = format!("param_groups[{i}]");
        if g.r#match.is_empty() {
            bail!("{what}: match is empty"; "give patterns over parameter names, e.g. match = [\"projector.*\"]");
        }
        let says = [g.lr.is_some(), g.weight_decay.is_some(), g.lr_scheduler.is_some(), g.layer_decay.is_some()];
        if !says.contains(&true) && g.name.is_none() {
            bail!("{what}: neither lr nor weight_decay nor lr_scheduler nor layer_decay nor name"; "say what is different about the group");
        }
        g.lr_scheduler.as_ref().map_or(Ok(()), warmup).with_context(|| what.clone())?;
        g.layer_decay.map_or(Ok(()), layer_decay).with_context(|| what.clone())?;
        if let Some(lr) = g.lr {
            positive(&format!("{what}: lr"), lr, "to keep parameters as they are, leave them out of `train`")?;
        }
        decay(&what, g.weight_decay.unwrap_or(0.0))?;
    }
    Ok(())
}

fn warmup(scheduler: &Scheduler) -> Result<()> {
    match scheduler.warmup().warmup_ratio {
        Some(_) if scheduler.warmup().warmup_steps.is_some() => {
            bail!("lr_scheduler: both warmup_ratio and warmup_steps"; "keep one of them")
        }
        Some(r) if !(0.0..=1.0).contains(&r) => {
            bail!("lr_scheduler: warmup_ratio = {r}"; "a share of all steps, from 0 to 1; for a number of steps use warmup_steps")
        }
        _ => Ok(()),
    }
}

fn layer_decay(value: f64) -> Result<()> {
    if !(value > 0.0 && value <= 1.0) {
        bail!("layer_decay = {value}"; "above 0, at most 1, e.g. 0.9");
    }
    Ok(())
}

fn decay(what: &str, value: f64) -> Result<()> {
    if !(value >= 0.0 && value.is_finite()) {
        bail!("{what}: weight_decay = {value}"; "0 or above, e.g. 0.1");
    }
    Ok(())
}

fn data(list: &[Data]) -> Result<()> {
    if list.is_empty() {
        bail!("data: empty"; "name at least one file: data = [{{ path = \"…\" }}]");
    }
    for (i, d) in list.iter().enumerate() {
        let Some(grids) = &d.grid_pinpoints else { continue };
        if d.resize != Resize::Anyres {
            bail!("data[{i}]: grid_pinpoints without tiles"; "set resize = \"anyres\", or leave grid_pinpoints out");
        }
        if grids.is_empty() || grids.iter().any(|g| g.contains(&0)) {
            bail!("data[{i}]: grid_pinpoints = {grids:?}"; "heights and widths in pixels, e.g. [[336, 672], [672, 336]]");
        }
    }
    match list.iter().position(|d| d.limit == Some(0)) {
        Some(i) => bail!("data[{i}]: limit = 0"; "leave it out to take every sample"),
        None => Ok(()),
    }
}

fn own_adapters(stage: &str, s: &Stage, deliver: Deliver, seen: &mut BTreeMap<String, String>) -> Result<()> {
    for (i, adapter) in s.adapters.iter().enumerate() {
        let what = format!("adapters[{i}].{}", adapter.kind());
        let name = adapter.name(stage, i);
        plain_name(&name).with_context(|| format!("{what}.name"))?;
        if let Some(other) = seen.insert(name.clone(), format!("in stage `{stage}`")) {
            bail!("{what}: the name `{name}` is taken {other}"; "give the adapter its own `name`");
        }
        match adapter {
            Adapter::Lora(a) => lora(&what, a)?,
            Adapter::Bottleneck(a) => {
                at_least_one(&what, [("dim", a.dim, 64)])?;
                share(&what, "dropout", a.dropout)?;
                if a.target.is_empty() {
                    bail!("{what}: target is empty"; "give patterns over places, e.g. [\"language.layers.*.{{self_attn,mlp}}\"]");
                }
            }
            Adapter::CrossAttention(a) => {
                let sizes = [
                    ("every", a.every, 4),
                    ("heads", a.heads, 8),
                    ("head_dim", a.head_dim, 64),
                    ("ff_mult", a.ff_mult, 4),
                ];
                at_least_one(&what, sizes)?;
                if deliver != Deliver::CrossAttention {
                    bail!("{what}: the visual tokens stand in the text, and none are left to look at";
                        "set model.deliver = \"cross_attention\"");
                }
            }
            Adapter::Prefix(a) => at_least_one(&what, [("tokens", a.tokens, 16)])?,
        }
    }
    Ok(())
}

fn lora(what: &str, a: &Lora) -> Result<()> {
    at_least_one(what, [("rank", a.rank, 16)])?;
    positive(&format!("{what}: alpha"), a.alpha, "often once or twice the rank")?;
    at_most(&format!("{what}: alpha"), a.alpha, "often once or twice the rank")?;
    share(what, "dropout", a.dropout)?;
    if let Some(ratio) = a.lr_ratio {
        positive(
            &format!("{what}: lr_ratio"),
            ratio,
            "B's learning rate in learning rates of A, e.g. 16; leave it out for one",
        )?;
        if a.freeze {
            bail!("{what}: lr_ratio = {ratio} for an adapter that stays as it is"; "drop `lr_ratio`, or `freeze`");
        }
    }
    if a.target.is_empty() {
        bail!("{what}: target is empty"; "give patterns over linear layers, e.g. [\"language.layers.*.self_attn.*_proj\"]");
    }
    Ok(())
}

/// Key, value, and a usual value of each size.
fn at_least_one<const N: usize>(what: &str, sizes: [(&str, usize, usize); N]) -> Result<()> {
    match sizes.iter().find(|(_, n, _)| *n == 0) {
        Some((key, _, usual)) => bail!("{what}: {key} = 0"; "e.g. {key} = {usual}"),
        None => Ok(()),
    }
}

fn share(what: &str, key: &str, p: f64) -> Result<()> {
    if !(0.0..1.0).contains(&p) {
        bail!("{what}: {key} = {p}"; "from 0 to below 1");
    }
    Ok(())
}

/// The stage that `s` starts from: the one it names, else the one before it.
fn origin<'a>(s: &'a Stage, earlier: &'a [String]) -> Option<&'a String> {
    s.from.as_ref().map(|f| &f.stage).or(earlier.last()).filter(|o| earlier.contains(o))
}

/// Whether adapters are on the model at the end of the earlier stage `name`.
fn has_adapters(recipe: &Recipe, name: &str, earlier: &[String]) -> bool {
    let stage = &recipe.stage[name];
    if !stage.adapters.is_empty() {
        return true;
    }
    if stage.from.as_ref().is_some_and(|f| f.adapters == HandOver::Merge) {
        return false;
    }
    let before = earlier.iter().position(|s| s == name).map_or(&[][..], |i| &earlier[..i]);
    match origin(stage, before) {
        Some(o) => has_adapters(recipe, o, before),
        None => recipe.model.adapter.is_some(),
    }
}

fn start(s: &Stage, earlier: &[String], all: &[String], inherits: bool) -> Result<()> {
    if let Some(from) = &s.from {
        if !earlier.contains(&from.stage) {
            let known: Vec<&str> = earlier.iter().map(String::as_str).collect();
            if all.contains(&from.stage) {
                bail!("from: `{}` does not run before this stage", from.stage; "change the order in `stages`");
            }
            bail!("from: there is no stage `{}`", from.stage; "{}", suggestion(&from.stage, &known));
        }
        if !inherits && from.adapters != HandOver::Continue {
            bail!("from: `{}` has no adapters to stack on or merge", from.stage; "drop `adapters`, or declare some in that stage");
        }
    }
    let continued = inherits && s.from.as_ref().is_none_or(|f| f.adapters == HandOver::Continue);
    let own = s.adapters.iter().any(|a| !a.freeze());
    if s.train.is_empty() && !own && !continued {
        bail!(
            "nothing is trained";
            "give `train` patterns, declare `adapters`, or continue those of an earlier stage: from = {{ stage = …, adapters = \"continue\" }}"
        );
    }
    Ok(())
}

fn objective(s: &Stage, inherits: bool) -> Result<()> {
    let Objective::Dpo(d) = &s.objective else { return Ok(()) };
    positive("objective.dpo: beta", d.beta, "e.g. 0.1")?;
    if !(0.0..0.5).contains(&d.label_smoothing) {
        bail!("objective.dpo: label_smoothing = {}", d.label_smoothing; "the share of wrong labels, from 0 to below 0.5");
    }
    if d.label_smoothing != 0.0 && d.loss != DpoLoss::Robust {
        bail!("objective.dpo: label_smoothing is used by the robust loss alone"; "set loss = \"robust\", or drop it");
    }
    if d.reference == Reference::Base && s.adapters.is_empty() && !inherits {
        bail!("objective.dpo: reference = \"base\" means adapters off, and there are none"; "use reference = \"start\"");
    }
    if d.reference == Reference::Base && !s.train.is_empty() {
        bail!(
            "objective.dpo: reference = \"base\" would move with the parameters in `train`";
            "use reference = \"start\", or train adapters alone"
        );
    }
    Ok(())
}

fn align_check(s: &Stage, recipe: &Recipe) -> Result<()> {
    let Some(check) = &s.align_check else { return Ok(()) };
    if !(-1.0..=1.0).contains(&check.threshold) {
        bail!("align_check: threshold = {}", check.threshold; "a cosine, from -1 to 1, e.g. 0.3");
    }
    if check.samples < 2 {
        bail!("align_check: samples = {}", check.samples; "2 or more, e.g. 256");
    }
    if s.objective != Objective::Sft {
        bail!("align_check: pairs of answers are no captions"; "it is for stages with objective = \"sft\"");
    }
    if recipe.model.deliver == Deliver::CrossAttention {
        bail!("align_check: visual tokens that stand beside the text need not resemble its embeddings";
            "it is for model.deliver = \"splice\"");
    }
    match recipe.eval.contains_key("align_check") {
        true => bail!("align_check: the name is taken by [eval.align_check]"; "give the evaluation another name"),
        false => Ok(()),
    }
}

fn evaluations(s: &Stage, evals: &BTreeMap<String, Eval>) -> Result<()> {
    match s.eval.iter().position(|e| !evals.contains_key(e)) {
        Some(i) => {
            let known: Vec<&str> = evals.keys().map(String::as_str).collect();
            bail!("eval[{i}]: there is no [eval.{}]", s.eval[i]; "{}", suggestion(&s.eval[i], &known))
        }
        None => Ok(()),
    }
}
