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
    /// Longest answer of `hallucination` in tokens, if its end token does not come first; of what is cut there the rest is not
    /// looked at, and a warning tells how many answers that were. No answer passes the model's positions.
    #[serde(default = "default_max_new_tokens")]
    pub max_new_tokens: usize,
}

/// What an evaluation measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Mean negative log-likelihood of a label token, over all label tokens: long answers count by their length. Samples that
    /// `model.truncate` cuts count as far as they go, here and in `exact_match`.
    Loss,
    /// Share of samples whose answer greedy decoding gives exactly, token by token and through its end token (any of the model's),
    /// in all and by the samples' `category`. Of a conversation all answers must be right, each behind the right ones before it.
    /// The same words in other tokens, another case or other spaces are a miss; where a template writes no end token, a longer
    /// answer that begins right is a hit. Beside it what guessing reaches that knows the answers of this data and of each
    /// `category` their shares (one of them at random, or always the most frequent): without `category` all questions are one
    /// kind, and guesses that go by the question would be right more often.
    ExactMatch,
    /// Share of pairs whose chosen answer has the higher log-probability, summed over its tokens: of two answers the longer one is
    /// the less probable by its length alone. A pair whose answers are the same tokens counts half.
    Preference,
    /// Share of greedy answers to the samples' first questions that contain one of the sample's `absent` phrases as whole words,
    /// in any case; in scripts without spaces between words (and in Korean) anywhere. Samples that name nothing `absent` are left
    /// out. What counts is the phrase: other forms of the word (plurals) must be named too, and a denial ("there is no cat")
    /// counts as well.
    Hallucination,
}

/// What stands in for the pictures of an evaluation. Samples without a picture count as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pictures {
    /// The mean colour.
    Blank,
    /// In each picture's place the next file's, in the order of their names; it may show what the right one shows, so that even a
    /// model that looks keeps some right answers.
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
/// As `adfreeze generate`.
fn default_max_new_tokens() -> usize {
    256
}
