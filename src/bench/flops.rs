//! FLOPs that a step needs, counted by hand; a product and a sum are two. What is frozen has no gradient, so its products
//! are two, forward and dX; what is made again (scores in attention's backward) counts, since every implementation without a
//! matrix of scores does so; layers that run again (`recompute`) do not count.

use super::preset::Preset;
use crate::error::Result;
use crate::model::backbone::{LanguageConfig, VisionConfig};
use serde::Serialize;

/// The formula, as it is printed.
pub const FORMULA: &str = "linear layers of the language model 4·N a token (forward 2·N, dX 2·N, frozen: no dW), without dX of the \
    first q, k, v if nothing below trains; low-rank updates 6·r·(in + out) a token; attention 14·heads·width a layer and pair of \
    tokens that see each other (forward 4, backward 10); head 4·V·D a label; tower forward only; projector's own \
    forward (2 a weight and row, 4·width a pair of attention), of which backward is twice as much, once in layers that read the \
    frozen tower's features, 2.5 times in attention, nothing where it is frozen";

/// One step's batch and what trains.
#[derive(Debug, Clone)]
pub struct Pass {
    /// Distinct pictures.
    pub pictures: usize,
    /// Sequences of the language model, and the tokens of each.
    pub sequences: usize,
    /// Tokens of a sequence.
    pub length: usize,
    /// Tokens that are predicted, of all sequences.
    pub labels: usize,
    /// Does the projector train?
    pub projector: bool,
    /// Rank of updates of all linear layers of the language model, if they train.
    pub rank: Option<usize>,
}

/// FLOPs by what needs them.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Flops {
    /// Of the tower.
    pub tower: u64,
    /// Of the projector.
    pub projector: u64,
    /// Of the language model's frozen linear layers.
    pub linears: u64,
    /// Of their low-rank updates.
    pub updates: u64,
    /// Of the language model's attention.
    pub attention: u64,
    /// Of the head.
    pub head: u64,
}

impl Flops {
    /// Of one step.
    pub fn of(preset: &Preset, pass: &Pass) -> Result<Self> {
        let (c, d) = (&preset.language, preset.language.hidden_size as u64);
        let tokens = (pass.sequences * pass.length) as u64;
        // The first layer's q, k and v see no trained thing below them.
        let untouched = if pass.projector { 0 } else { first_qkv(c) };
        let work = preset.projector_work()?;
        let projector = if pass.projector { work.training() } else { work.forward() };
        let updates = pass.rank.map_or(0, |r| {
            let skipped = if pass.projector { 0 } else { 3 * d };
            r as u64 * (6 * update_widths(c) - 2 * skipped)
        });
        let pairs = (pass.sequences * pass.length * (pass.length + 1) / 2) as u64;
        let heads = (c.num_attention_heads * c.head_dim * c.num_hidden_layers) as u64;
        Ok(Self {
            tower: pass.pictures as u64 * picture(&preset.vision, preset.depth()),
            projector: pass.pictures as u64 * projector,
            linears: tokens * (4 * linears(c) - 2 * untouched),
            updates: tokens * updates,
            attention: 14 * pairs * heads,
            head: 4 * (pass.labels * c.vocab_size) as u64 * d,
        })
    }

    /// All together.
    pub fn total(&self) -> u64 {
        self.tower + self.projector + self.linears + self.updates + self.attention + self.head
    }
}

/// (in, out) of a decoder layer's linear layers: q, k, v, o, gate, up, down.
fn layer(c: &LanguageConfig) -> [(u64, u64); 7] {
    let (d, m) = (c.hidden_size as u64, c.intermediate_size as u64);
    let [q, kv] = [c.num_attention_heads, c.num_key_value_heads].map(|heads| (heads * c.head_dim) as u64);
    [(d, q), (d, kv), (d, kv), (q, d), (d, m), (d, m), (m, d)]
}

/// Weights of the language model's linear layers, the head left out.
pub fn linears(c: &LanguageConfig) -> u64 {
    c.num_hidden_layers as u64 * layer(c).iter().map(|(i, o)| i * o).sum::<u64>()
}

/// Weights of the first layer's q, k and v.
fn first_qkv(c: &LanguageConfig) -> u64 {
    layer(c)[..3].iter().map(|(i, o)| i * o).sum()
}

/// Σ in + out of the linear layers.
fn update_widths(c: &LanguageConfig) -> u64 {
    c.num_hidden_layers as u64 * layer(c).iter().map(|(i, o)| i + o).sum::<u64>()
}

/// The tower's forward pass of one picture through `depth` layers.
pub fn picture(c: &VisionConfig, depth: usize) -> u64 {
    let [d, m, patches] = [c.hidden_size, c.intermediate_size, c.num_patches()].map(|n| n as u64);
    let t = patches + 1;
    let embedding = 2 * patches * (c.num_channels * c.patch_size * c.patch_size) as u64 * d;
    embedding + depth as u64 * (2 * t * (4 * d * d + 2 * d * m) + 4 * t * t * d)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(got: u64, want: f64, tolerance: f64) {
        assert!((got as f64 / want - 1.0).abs() < tolerance, "{got:e} is not {want:e}");
    }

    #[test]
    fn the_tiny_model_by_hand() {
        let preset = Preset::named("tiny").unwrap();
        let pass = Pass { pictures: 2, sequences: 2, length: 20, labels: 5, projector: true, rank: Some(4) };
        let flops = Flops::of(&preset, &pass).unwrap();
        // 16 patches of 4 × 4 pixels in 3 colours and a class token; two layers of width 32 and 64.
        let layer = 2 * 17 * (4 * 32 * 32 + 2 * 32 * 64) + 2 * (2 * 17 * 17 * 32);
        assert_eq!(flops.tower, 2 * (2 * 16 * 48 * 32 + 2 * layer));
        assert_eq!(flops.projector, 2 * 16 * (4 * 32 * 48 + 6 * 48 * 48));
        // Two layers: q and o 48 × 48, k and v 48 × 24, gate, up and down 48 × 80.
        assert_eq!(linears(&preset.language), 2 * (2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 80));
        assert_eq!(flops.linears, 40 * 4 * linears(&preset.language));
        assert_eq!(flops.updates, 40 * 6 * 4 * 2 * (2 * 96 + 2 * 72 + 3 * 128));
        // Each token sees itself and those before: 210 pairs a sequence.
        assert_eq!(flops.attention, 14 * 2 * 210 * 48 * 2);
        assert_eq!(flops.head, 4 * 5 * 96 * 48);
        let alone = Flops::of(&preset, &Pass { projector: false, ..pass.clone() }).unwrap();
        assert_eq!(flops.linears - alone.linears, 40 * 2 * (48 * 48 + 2 * 48 * 24));
        assert_eq!(flops.updates - alone.updates, 40 * 2 * 4 * 3 * 48);
        assert_eq!(alone.projector, 2 * 16 * 2 * (32 * 48 + 48 * 48));
        assert_eq!(Flops::of(&preset, &Pass { rank: None, ..pass }).unwrap().updates, 0);
    }

    #[test]
    fn known_numbers_of_llava() {
        let preset = Preset::named("llava-1.5-7b").unwrap();
        near(linears(&preset.language), 6.476e9, 1e-4);
        near((preset.language.vocab_size * preset.language.hidden_size) as u64, 0.131e9, 5e-3);
        near(picture(&preset.vision, preset.depth()), 366e9, 2e-3);
        let align = Pass { pictures: 1, sequences: 1, length: 620, labels: 43, projector: true, rank: None };
        near(Flops::of(&preset, &align).unwrap().total(), 16.7e12, 0.015);
        let sft = Pass { pictures: 8, sequences: 8, length: 2048, labels: 8 * 2048, projector: true, rank: Some(128) };
        near(Flops::of(&preset, &sft).unwrap().total(), 498e12, 5e-3);
    }
}
