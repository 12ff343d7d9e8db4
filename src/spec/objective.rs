//! `objective` of a stage: what it minimises.

use serde::{Deserialize, Serialize};

/// What a stage minimises.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Objective {
    /// Next-token cross-entropy on the labelled tokens.
    #[default]
    Sft,
    /// Preferences between pairs of answers (Rafailov et al. 2023).
    Dpo(Dpo),
}

/// Direct preference optimisation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dpo {
    /// How closely the policy is held to the reference.
    #[serde(default = "default_beta")]
    pub beta: f64,
    /// What becomes of a pair's margin.
    #[serde(default)]
    pub loss: DpoLoss,
    /// What the policy is compared with.
    #[serde(default)]
    pub reference: Reference,
    /// ε of `robust`.
    #[serde(default)]
    pub label_smoothing: f64,
}

/// The loss of a pair, in TRL's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DpoLoss {
    /// −log σ(margin), as published.
    #[default]
    Sigmoid,
    /// A square, on means over the tokens (Azar et al. 2023).
    Ipo,
    /// max(1 − margin, 0) (SLiC).
    Hinge,
    /// The sigmoid loss, freed of a share `label_smoothing` of wrong labels (Chowdhury et al. 2024).
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

fn default_beta() -> f64 {
    0.1
}
