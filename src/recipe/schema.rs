//! The recipe as the user writes it (TOML) and as it is saved, resolved, in the run directory.
//!
//! Every struct denies unknown keys; a variant is named by its key (`{ lora = { … } }`).

mod adapters;
mod resamplers;

pub use adapters::{Adapter, BottleneckAdapter, CrossAttention, CrossAttentionForm, Deliver, Prefix, Sees};
pub use resamplers::{PerceiverProjector, QformerPart, QformerProjector};

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
        let mut data = self.stage.values().flat_map(|s| &s.data).chain(self.eval.values().flat_map(|e| &e.data));
        data.any(|d| d.resize == Resize::Anyres)
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
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vision: Option<Vision>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub projector: Option<Projector>,
    /// Where visual tokens go.
    #[serde(default, skip_serializing_if = "is_default")]
    pub deliver: Deliver,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub language: Option<Language>,
    /// Type of frozen weights and activations.
    #[serde(default, skip_serializing_if = "is_default")]
    pub dtype: DType,
    /// A PEFT LoRA folder to start from, on top of the model above.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<String>,
    /// Default template of all data; a data entry may name another.
    #[serde(default)]
    pub template: Template,
    /// System text of `vicuna_v1`; `None` is LLaVA's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
    /// Longest sample in tokens, image tokens included. A longer one is an error unless `truncate` says otherwise.
    #[serde(default = "default_max_seq_len")]
    pub max_seq_len: usize,
    /// Cut longer samples (as LLaVA does) instead of refusing them.
    #[serde(default)]
    pub truncate: bool,
    /// Text of the image placeholder token; found in the tokenizer or taken from a reserved id.
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

/// `model.projector`: the connector between tower and language model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Projector {
    /// One linear layer with bias.
    Linear(LinearProjector),
    /// `depth` linear layers with an activation between them.
    Mlp(MlpProjector),
    /// A narrow residual block on the tower's features, which starts as the identity.
    Bottleneck(BottleneckProjector),
    /// Squares of neighbouring patches become one token.
    PixelShuffle(PixelShuffleProjector),
    /// Latents look at the features: a fixed number of tokens.
    Perceiver(PerceiverProjector),
    /// BLIP-2's Querying Transformer: a fixed number of tokens.
    Qformer(QformerProjector),
}

impl Projector {
    /// File, folder or repository of the weights to start from.
    pub fn source(&self) -> Option<&str> {
        let source = match self {
            Self::Linear(p) => &p.source,
            Self::Mlp(p) => &p.source,
            Self::Bottleneck(p) => &p.source,
            Self::PixelShuffle(p) => p.then.source(),
            Self::Perceiver(p) => &p.source,
            Self::Qformer(p) => &p.source,
        };
        source.as_deref()
    }

    /// Parts that a published `source` may lack, and which may be `fresh`: what their parameters' names begin with.
    pub fn may_be_fresh(&self) -> Vec<&'static str> {
        match self {
            Self::Qformer(_) => {
                [QformerPart::QueryTokens, QformerPart::LanguageProjection].map(|p| p.prefix()).to_vec()
            }
            _ => Vec::new(),
        }
    }

    /// What the names of parameters begin with that have fresh values in spite of a [`Projector::source`].
    pub fn fresh(&self) -> Vec<&'static str> {
        match self {
            Self::Qformer(p) => p.fresh.iter().map(|part| part.prefix()).collect(),
            _ => Vec::new(),
        }
    }
}

/// Layers that work on each token alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Layers {
    /// One linear layer with bias.
    Linear(LinearProjector),
    /// `depth` linear layers with an activation between them.
    Mlp(MlpProjector),
}

impl Layers {
    fn source(&self) -> &Option<String> {
        match self {
            Self::Linear(p) => &p.source,
            Self::Mlp(p) => &p.source,
        }
    }
}

impl Default for Layers {
    fn default() -> Self {
        Self::Linear(LinearProjector { source: None, input_norm: false })
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinearProjector {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// LayerNorm over the tower's features before the first layer (their rms may be far from the embeddings').
    #[serde(default)]
    pub input_norm: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MlpProjector {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    #[serde(default = "two")]
    pub depth: usize,
    /// Width between the layers; default: the language model's hidden size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hidden: Option<usize>,
    #[serde(default)]
    pub act: Activation,
    /// LayerNorm over the tower's features before the first layer.
    #[serde(default)]
    pub input_norm: bool,
    /// LayerNorm over the visual tokens, after the last layer.
    #[serde(default)]
    pub norm: bool,
}

/// y = out(x + up(dropout(act(down(norm(x)))))); `out`, a linear layer, is there if the widths of tower and language model
/// differ.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BottleneckProjector {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Width between `down` and `up`.
    pub dim: usize,
    #[serde(default)]
    pub act: Activation,
    #[serde(default)]
    pub dropout: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PixelShuffleProjector {
    /// `factor` × `factor` patches make one token, their features side by side; it must divide the patches of a side.
    #[serde(default = "two")]
    pub factor: usize,
    /// From there to the language model's width: `linear` (default) or `mlp`. A `source` stands here.
    #[serde(default)]
    pub then: Layers,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// Exact GELU (erf).
    #[default]
    Gelu,
    /// GELU's tanh approximation.
    GeluTanh,
    QuickGelu,
    Silu,
    Relu,
}

/// `model.language`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Language {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Random initialisation instead of `source`: the keys of HF's `LlamaConfig`.
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
    F32,
    Bf16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Template {
    /// The picture and its caption, nothing else (projector pretrain).
    Plain,
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
    #[serde(default)]
    pub objective: Objective,
    pub data: Vec<Data>,
    pub batch: Batch,
    /// Peak learning rate.
    pub lr: f64,
    /// Passes over the data; `max_steps` wins if both are given.
    #[serde(default = "one_f64")]
    pub epochs: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<usize>,
    #[serde(default)]
    pub lr_scheduler: Scheduler,
    /// Layer-wise decay: a layer's learning rate is this power of its distance from the top of its backbone, in every group that
    /// states none of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer_decay: Option<f64>,
    #[serde(default)]
    pub optimizer: Optimizer,
    /// Learning rate, schedule and weight decay by pattern; first match wins, the rest takes the stage's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub param_groups: Vec<ParamGroup>,
    /// Clip by the global norm of all trained gradients; `0` switches it off.
    #[serde(default = "one_f64")]
    pub max_grad_norm: f64,
    #[serde(default = "default_seed")]
    pub seed: u64,
    #[serde(default)]
    pub checkpoint: Checkpoint,
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

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct From {
    /// A stage that comes earlier in `stages`.
    pub stage: String,
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

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lora {
    /// Default: the stage's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    pub rank: usize,
    pub alpha: f64,
    #[serde(default)]
    pub dropout: f64,
    /// Patterns over the names of linear layers of `vision.` and `language.`.
    pub target: Vec<String>,
    /// Scale alpha/√rank instead of alpha/rank.
    #[serde(default)]
    pub rslora: bool,
    /// A trained length for each row of W + s·B·A (DoRA).
    #[serde(default)]
    pub dora: bool,
    /// Learning rate of B, and of DoRA's lengths, in learning rates of A (LoRA+, Hayou et al. 2024).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr_ratio: Option<f64>,
    #[serde(default)]
    pub freeze: bool,
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Objective {
    /// Next-token cross-entropy on the labelled tokens.
    #[default]
    Sft,
    Dpo(Dpo),
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dpo {
    #[serde(default = "default_beta")]
    pub beta: f64,
    #[serde(default)]
    pub loss: DpoLoss,
    #[serde(default)]
    pub reference: Reference,
    /// ε of `robust`.
    #[serde(default)]
    pub label_smoothing: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DpoLoss {
    #[default]
    Sigmoid,
    Ipo,
    Hinge,
    Robust,
}

/// What the policy is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reference {
    /// The policy as the stage begins, dropout off.
    #[default]
    Start,
    /// The model with its adapters off (TRL's choice for a fresh PEFT adapter).
    Base,
}

/// One source of samples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// JSON or JSONL.
    pub path: PathBuf,
    /// Folder that the samples' image paths are relative to; default: the folder of `path`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<Template>,
    #[serde(default)]
    pub resize: Resize,
    #[serde(default)]
    pub alpha: Alpha,
    /// With `anyres`: the heights and widths in pixels that tiles may fill, multiples of what the tower sees at once. Default:
    /// LLaVA-1.6's, 1 × 2, 2 × 1, 2 × 2, 3 × 1 and 1 × 3 tiles.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grid_pinpoints: Option<Vec<[usize; 2]>>,
    /// Take only the first `limit` samples.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
}

impl Data {
    /// All of a file, everything else by default.
    pub fn new(path: PathBuf) -> Self {
        let (resize, alpha) = (Resize::default(), Alpha::default());
        Self { path, images: None, template: None, resize, alpha, grid_pinpoints: None, limit: None }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resize {
    /// Shortest edge to the size, then centre crop (CLIP).
    #[default]
    Crop,
    /// Pad to a square with the mean colour first (LLaVA-1.5).
    Pad,
    /// The whole picture squeezed into a square, and beside it tiles that show it larger (LLaVA-1.6); a picture then has as many
    /// visual tokens as its size and proportions ask for.
    Anyres,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Alpha {
    /// Drop the alpha channel.
    #[default]
    Drop,
    /// Composite on white.
    White,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Batch {
    /// Samples an optimizer step.
    pub global: usize,
    /// Samples a forward pass; must divide `global`. Default: `global`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub micro: Option<usize>,
    #[serde(default)]
    pub group_by: GroupBy,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupBy {
    #[default]
    None,
    /// Samples of like length and modality (picture or text only) in one global batch.
    ModalityLength,
    /// In the order of the file, never shuffled.
    Sequential,
}

/// The warm-up is `warmup_steps` or `warmup_ratio` (of all steps, rounded up), linear from 0.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Scheduler {
    Cosine(Warmup),
    Linear(Warmup),
    Constant(Warmup),
}

impl Scheduler {
    /// Its warm-up.
    pub fn warmup(&self) -> &Warmup {
        let (Self::Cosine(w) | Self::Linear(w) | Self::Constant(w)) = self;
        w
    }
}

impl Default for Scheduler {
    fn default() -> Self {
        Self::Cosine(Warmup { warmup_ratio: Some(0.03), warmup_steps: None })
    }
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Warmup {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warmup_ratio: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warmup_steps: Option<usize>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Optimizer {
    Adamw(AdamW),
}

impl Default for Optimizer {
    fn default() -> Self {
        Self::Adamw(AdamW::default())
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamW {
    pub betas: [f64; 2],
    pub eps: f64,
    /// Decoupled; not applied to biases and norms unless a group says so.
    pub weight_decay: f64,
    /// How moments are stored.
    pub moments: MomentType,
    /// Where the model computes in bf16: backbones train in bf16 alone, rounded stochastically, without an f32 master. Adapters
    /// and projectors keep theirs. In f32 nothing is rounded.
    pub stochastic_rounding: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum MomentType {
    #[default]
    #[serde(rename = "f32")]
    F32,
    /// 8 bits in blocks of 256; parameters of less than 4096 elements keep f32.
    #[serde(rename = "8bit")]
    Eight,
}

impl Default for AdamW {
    fn default() -> Self {
        Self { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.0, moments: MomentType::F32, stochastic_rounding: false }
    }
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParamGroup {
    /// Default: the first pattern.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    pub r#match: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
    /// Its own schedule over the stage's steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr_scheduler: Option<Scheduler>,
    /// Layer-wise decay of its learning rate, see the stage's; 1 is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer_decay: Option<f64>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Checkpoint {
    /// `0`: only at the stage's end.
    pub every_steps: usize,
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

/// One held-out evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Eval {
    pub metric: Metric,
    pub data: Vec<Data>,
    /// Also with these stand-ins for the pictures, to see that the answer comes from them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pictures: Vec<Pictures>,
    #[serde(default = "default_eval_batch")]
    pub micro: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Mean negative log-likelihood of a label token.
    Loss,
    /// Share of answers that greedy decoding gives exactly, in all and by the samples' `category`;
    /// beside it the share that guessing (uniform, most frequent answer of a category) would reach.
    ExactMatch,
    /// Share of pairs whose chosen answer has the higher log-probability.
    Preference,
    /// Share of greedy answers that contain one of the sample's `absent` phrases.
    Hallucination,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pictures {
    Blank,
    Shuffled,
}

/// Data that this binary makes: the same as `adfreeze synth KIND --out … --n … --seed …`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Synth {
    pub kind: SynthKind,
    pub out: PathBuf,
    pub n: usize,
    #[serde(default = "default_seed")]
    pub seed: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SynthKind {
    Shapes,
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
fn two() -> usize {
    2
}
fn one_f64() -> f64 {
    1.0
}
fn default_seed() -> u64 {
    42
}
fn default_beta() -> f64 {
    0.1
}
fn default_eval_batch() -> usize {
    32
}
