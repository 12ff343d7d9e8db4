//! How a stage's parameters are updated: optimizer, schedule, groups.

use serde::{Deserialize, Serialize};

/// The warm-up is `warmup_steps` or `warmup_ratio` (of all steps, rounded up), linear from 0: the rate of its first step is 0, and a
/// stage in which it is not shorter than all steps never reaches the peak.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Scheduler {
    /// Then half a cosine down to 0.
    Cosine(Warmup),
    /// Then straight down to 0.
    Linear(Warmup),
    /// Then as it is.
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

/// How long learning rates rise; without either key they do not.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Warmup {
    /// A share of all steps, from 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warmup_ratio: Option<f64>,
    /// A number of steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warmup_steps: Option<usize>,
}

/// How gradients become updates.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Optimizer {
    /// Adam with decoupled weight decay (Loshchilov & Hutter 2019).
    Adamw(AdamW),
}

impl Default for Optimizer {
    fn default() -> Self {
        Self::Adamw(AdamW::default())
    }
}

/// AdamW's settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamW {
    /// How slowly the moments forget.
    pub betas: [f64; 2],
    /// Added to the root of the second moment. A gradient that is small throughout but above it moves a parameter by whole steps of
    /// the learning rate all the same, for AdamW looks at signs and proportions only: where no sample of a stage teaches a
    /// parameter anything, what remains is rounding, and the parameter wanders.
    pub eps: f64,
    /// Decoupled; not applied to biases and norms unless a group says so.
    pub weight_decay: f64,
    /// How moments are stored.
    pub moments: MomentType,
    /// Where the model computes in bf16: backbones train in bf16 alone, rounded stochastically, without an f32 master. Adapters
    /// and projectors keep theirs. In f32 nothing is rounded.
    pub stochastic_rounding: bool,
}

/// How moments are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum MomentType {
    /// In full.
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

/// What is different about some parameters.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParamGroup {
    /// Default: the first pattern.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Patterns over the names of parameters.
    pub r#match: Vec<String>,
    /// Peak learning rate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// Of all its parameters, biases and norms among them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
    /// Its own schedule over the stage's steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr_scheduler: Option<Scheduler>,
    /// Layer-wise decay of its learning rate, see the stage's; 1 is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer_decay: Option<f64>,
}
