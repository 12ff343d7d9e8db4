//! What a user writes, as types: the recipe (TOML), as it is read and as it is saved, resolved, in the run directory, and the
//! [patterns](pattern) that select parameters. Every room may use these; this one uses none but `error`.
//!
//! Every struct denies unknown keys; a variant is named by its key (`{ lora = { … } }`).

mod adapters;
mod data;
mod objective;
mod optimizer;
pub mod pattern;
mod projectors;
mod resamplers;

pub use adapters::{
    Adapter, BottleneckAdapter, CrossAttention, CrossAttentionForm, Deliver, Lora, Prefix, PrefixPlace, START_ADAPTER,
    Sees,
};
pub use data::{Alpha, Data, Eval, Metric, Pictures, Resize, Synth, SynthKind};
pub use objective::{Dpo, DpoLoss, Objective, Reference};
pub use optimizer::{AdamW, MomentType, Optimizer, ParamGroup, Scheduler, Warmup};
pub use projectors::{BottleneckProjector, Layers, LinearProjector, MlpProjector, PixelShuffleProjector, Projector};
pub use resamplers::{PerceiverProjector, QformerPart, QformerProjector, ResamplerProjector, VisualPrefixProjector};

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// A whole recipe, resolved: `extends`, `[defaults]`, `--set` and `${VAR}` are already folded in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// The backbones, the projector, and how text is rendered.
    pub model: Model,
    /// The order of the stages; TOML tables have none.
    pub stages: Vec<String>,
    /// The run directory.
    pub output_dir: PathBuf,
    /// Data that the binary makes itself before anything else, e.g. the built-in pictures.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub synth: BTreeMap<String, Synth>,
    /// The stages by name.
    pub stage: BTreeMap<String, Stage>,
    /// Held-out evaluations by name; a stage lists those that run at its end.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub eval: BTreeMap<String, Eval>,
}

impl Recipe {
    /// Are pictures cut into tiles anywhere?
    pub fn has_tiles(&self) -> bool {
        self.all_data().any(Data::has_tiles)
    }

    /// Are pictures cut into tiles whose grids no data entry states?
    pub fn has_tiles_of_usual_grids(&self) -> bool {
        self.all_data().any(|d| d.has_tiles() && d.grid_pinpoints.is_none())
    }

    fn all_data(&self) -> impl Iterator<Item = &Data> {
        self.stage.values().flat_map(|s| &s.data).chain(self.eval.values().flat_map(|e| &e.data))
    }
}

/// `[model]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// A whole LLaVA folder or repository to start from; then `vision`, `projector` and `language` may be left out, and
    /// `vision` and `language` without `source` and `init` say only what is different.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// The tower; none, and no projector, for a model of text alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vision: Option<Vision>,
    /// What leads from the tower to the language model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub projector: Option<Projector>,
    /// Where visual tokens go.
    #[serde(default, skip_serializing_if = "is_default")]
    pub deliver: Deliver,
    /// The language model and its tokenizer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub language: Option<Language>,
    /// Type of frozen weights and activations.
    #[serde(default, skip_serializing_if = "is_default")]
    pub dtype: DType,
    /// A PEFT folder to start from, on top of the model above: a LoRA or soft tokens (prompt tuning). The adapter is called
    /// `start`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<String>,
    /// Default template of all data; a data entry may name another.
    #[serde(default)]
    pub template: Template,
    /// System text of `vicuna_v1`; `None` is LLaVA's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
    /// What `strftime_now` of a chat template says, e.g. "2024-07-26", at midnight. Default: the day on which the run began, which is
    /// kept with the run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template_date: Option<String>,
    /// Longest sample in tokens, image tokens included. A longer one is an error unless `truncate` says otherwise.
    #[serde(default = "default_max_seq_len")]
    pub max_seq_len: usize,
    /// Cut longer samples (as LLaVA does) instead of refusing them.
    #[serde(default)]
    pub truncate: bool,
    /// Text of the image placeholder token, which is added to a tokenizer that has none. Visual tokens take its place, so that it
    /// needs no embedding; with `deliver = "cross_attention"` it stands in the text and must be one that has.
    #[serde(default = "default_image_token")]
    pub image_token: String,
}

/// `model.vision`: where the tower comes from and what is taken from it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vision {
    /// Folder, HF repository `owner/name[@revision]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Random initialisation instead of `source`: the keys of HF's `CLIPVisionConfig`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<serde_json::Value>,
    /// Index into HF's `hidden_states`; −2 is the output of the last layer but one. Default: that of `model.source` if the
    /// tower comes from there, else −2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub select_layer: Option<i64>,
    /// Default: that of `model.source` if the tower comes from there, else the patches.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub select_feature: Option<SelectFeature>,
}

/// Which tokens of the tower go to the projector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SelectFeature {
    /// The patches, without the class token (HF: `default`).
    #[default]
    Patch,
    /// Class token and patches (HF: `full`).
    Full,
}

/// Between linear layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// Exact GELU (erf).
    #[default]
    Gelu,
    /// GELU's tanh approximation.
    GeluTanh,
    /// CLIP's x·σ(1.702·x).
    QuickGelu,
    /// x·σ(x).
    Silu,
    /// max(x, 0).
    Relu,
}

/// `model.language`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Language {
    /// Folder, HF repository `owner/name[@revision]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Random initialisation instead of `source`: the keys of HF's `LanguageConfig`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<serde_json::Value>,
    /// Folder, file or repository of the tokenizer, when `source` has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<String>,
}

/// Type of frozen weights and activations. What trains has f32 values, gradients and moments in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DType {
    /// bf16 on a GPU, f32 on the CPU.
    #[default]
    Auto,
    /// Single precision anywhere.
    F32,
    /// bf16 anywhere.
    Bf16,
}

/// How a conversation becomes text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Template {
    /// The picture and its caption, nothing else (projector pretrain).
    Plain,
    /// `USER: … ASSISTANT: …` behind a system text (LLaVA-1.5).
    #[default]
    VicunaV1,
    /// The tokenizer's own chat template.
    Chat,
}

/// One stage: what trains, on what, how.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// Where the stage starts; default: the stage before it, its adapters continued.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<From>,
    /// Ordered patterns over parameter names, `"pattern"` or `"!pattern"`; first match wins, unmatched = frozen.
    #[serde(default)]
    pub train: Vec<String>,
    /// Parameters that start from fresh random values in this stage.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reset: Vec<String>,
    /// Adapters declared (and trained) here.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adapters: Vec<Adapter>,
    /// Height and width of what the tower sees, in pixels; default: the stage before's, at first the tower's own. Position
    /// embeddings are interpolated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_size: Option<usize>,
    /// What is minimised.
    #[serde(default)]
    pub objective: Objective,
    /// Where the samples come from, all of them mixed.
    pub data: Vec<Data>,
    /// How many samples make a step, and which.
    pub batch: Batch,
    /// Peak learning rate.
    pub lr: f64,
    /// Passes over the data; `max_steps` wins if both are given.
    #[serde(default = "one_f64")]
    pub epochs: f64,
    /// Optimizer steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<usize>,
    /// How learning rates go over the steps.
    #[serde(default)]
    pub lr_scheduler: Scheduler,
    /// Layer-wise decay: a layer's learning rate is this power of its distance from the top of its backbone, in every group that
    /// states none of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer_decay: Option<f64>,
    /// How parameters are updated.
    #[serde(default)]
    pub optimizer: Optimizer,
    /// Learning rate, schedule and weight decay by pattern; first match wins, the rest takes the stage's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub param_groups: Vec<ParamGroup>,
    /// Clip by the global norm of all trained gradients; `0` switches it off.
    #[serde(default = "one_f64")]
    pub max_grad_norm: f64,
    /// Of all that is random in the stage: the order of samples, dropout, fresh values.
    #[serde(default = "default_seed")]
    pub seed: u64,
    /// When to save, and how much of it to keep.
    #[serde(default)]
    pub checkpoint: Checkpoint,
    /// What backward makes again to save memory.
    #[serde(default)]
    pub activations: Activations,
    /// Layers that recompute whatever the rest does, by pattern, e.g. `["language.layers[0..16]"]`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub recompute: Vec<String>,
    /// Names of the evaluations that run at the end of this stage.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub eval: Vec<String>,
    /// At the stage's end: how near visual tokens have come to the embeddings of their captions, beside the stage's start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub align_check: Option<AlignCheck>,
}

/// A look at what a projector has learnt. Not made unless a stage asks for it: visual tokens may be of use far from the words.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AlignCheck {
    /// A mean cosine below it is worth a warning.
    pub threshold: f64,
    /// Samples to look at, evenly spread over the stage's data.
    pub samples: usize,
}

impl Default for AlignCheck {
    fn default() -> Self {
        Self { threshold: 0.3, samples: 256 }
    }
}

/// Where a stage starts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct From {
    /// A stage that comes earlier in `stages`.
    pub stage: String,
    /// What becomes of the adapters that are there.
    #[serde(default)]
    pub adapters: HandOver,
}

/// What happens to the adapters of the stage before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HandOver {
    /// Keep training those that trained.
    #[default]
    Continue,
    /// Freeze them; new ones go on top.
    Stack,
    /// Add them into the weights; the drift of the logits is measured.
    Merge,
}

/// How samples become steps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Batch {
    /// Samples an optimizer step.
    pub global: usize,
    /// Samples a forward pass; must divide `global`. Default: `global`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub micro: Option<usize>,
    /// Which samples go together.
    #[serde(default)]
    pub group_by: GroupBy,
}

/// Which samples a global batch is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupBy {
    /// Any, shuffled.
    #[default]
    None,
    /// Samples of like length and modality (picture or text only) in one global batch.
    ModalityLength,
    /// In the order of the file, never shuffled.
    Sequential,
}

/// When a stage saves what it can go on from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Checkpoint {
    /// `0`: only at the stage's end.
    pub every_steps: usize,
    /// How many of the newest stay, at least 1.
    pub keep: usize,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Self { every_steps: 500, keep: 3 }
    }
}

/// What backward makes again of a layer's forward pass; the result is the same to the bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activations {
    /// As little as the free memory allows, chosen as the stage begins.
    #[default]
    Auto,
    /// Nothing: all that backward reads is kept.
    None,
    /// The outputs of norms and activations, element by element. Runs of before call it `keep`.
    #[serde(alias = "keep")]
    Minimal,
    /// Everything: a layer keeps its input only and runs again.
    Recompute,
}

fn is_default<T: Default + PartialEq>(t: &T) -> bool {
    *t == T::default()
}
fn default_max_seq_len() -> usize {
    2048
}
fn default_image_token() -> String {
    "<image>".into()
}
fn one_f64() -> f64 {
    1.0
}
fn default_seed() -> u64 {
    42
}
