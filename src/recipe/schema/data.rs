//! Where samples come from: data of stages, evaluations, what the binary makes itself.

use super::{Template, default_seed};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// One source of samples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// JSON or JSONL.
    pub path: PathBuf,
    /// Folder that the samples' image paths are relative to; default: the folder of `path`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images: Option<PathBuf>,
    /// Default: the model's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<Template>,
    /// How a picture becomes what the tower sees.
    #[serde(default)]
    pub resize: Resize,
    /// What becomes of transparency.
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

    /// Are its pictures cut into tiles?
    pub fn has_tiles(&self) -> bool {
        self.resize == Resize::Anyres
    }
}

/// How a picture becomes what the tower sees.
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

/// What becomes of transparency.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Alpha {
    /// Drop the alpha channel.
    #[default]
    Drop,
    /// Composite on white.
    White,
}

/// One held-out evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Eval {
    /// What is measured.
    pub metric: Metric,
    /// Where the samples come from.
    pub data: Vec<Data>,
    /// Also with these stand-ins for the pictures, to see that the answer comes from them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pictures: Vec<Pictures>,
    /// Samples a forward pass.
    #[serde(default = "default_eval_batch")]
    pub micro: usize,
}

/// What an evaluation measures.
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

/// What stands in for the pictures of an evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pictures {
    /// The mean colour.
    Blank,
    /// Another sample's picture.
    Shuffled,
}

/// Data that this binary makes: the same as `adfreeze synth KIND --out … --n … --seed …`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Synth {
    /// What it shows.
    pub kind: SynthKind,
    /// The folder that it is written to.
    pub out: PathBuf,
    /// How many pictures.
    pub n: usize,
    /// The same seed makes the same pictures.
    #[serde(default = "default_seed")]
    pub seed: u64,
}

/// What the binary can draw.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SynthKind {
    /// Coloured shapes, with questions about them.
    Shapes,
}
fn default_eval_batch() -> usize {
    32
}
