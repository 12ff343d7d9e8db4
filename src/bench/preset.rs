//! Shapes of published models, to be filled with random weights.

use super::noise::Noise;
use crate::bail;
use crate::error::{Result, near};
use crate::model::config::{LlamaConfig, RopeScaling, VisionConfig};
use crate::model::init::{Place, Shapes};
use crate::model::language::Language;
use crate::model::projector::{Projector, Work};
use crate::model::vision::{Grid, Tower};
use crate::model::vlm::Vlm;
use crate::spec::{self, Activation, MlpProjector, SelectFeature};

/// A model's shape and the batches that it is usually trained on.
#[derive(Debug, Clone)]
pub struct Preset {
    /// As the command line calls it.
    pub name: &'static str,
    /// The tower.
    pub vision: VisionConfig,
    /// Which of its hidden states becomes the features.
    pub select_layer: i64,
    /// The language model.
    pub language: LlamaConfig,
    /// Id of a visual token.
    pub image_token: u32,
    /// Rank of low-rank updates.
    pub rank: usize,
    /// Their dropout.
    pub dropout: f64,
    /// Text tokens behind the picture when the projector is aligned, the first of them the beginning of the text.
    pub caption: usize,
    /// Tokens of a sequence in SFT and DPO.
    pub sequence: usize,
    /// Samples (pairs in DPO) of a micro-batch: align, SFT, DPO.
    pub micro: [usize; 3],
}

/// Names of the presets.
pub const NAMES: [&str; 3] = ["llava-1.5-7b", "smollm2-135m-dinov2-s", "tiny"];

impl Preset {
    /// The preset of this name.
    pub fn named(name: &str) -> Result<Self> {
        match name {
            "llava-1.5-7b" => Ok(llava()),
            "smollm2-135m-dinov2-s" => Ok(smollm2()),
            "tiny" => Ok(tiny()),
            other => bail!("there is no preset `{other}`"; "{}", near::suggestion(other, &NAMES)),
        }
    }

    /// Layers of the tower that run.
    pub fn depth(&self) -> usize {
        let n = self.vision.num_hidden_layers as i64;
        let depth = if self.select_layer < 0 { n + 1 + self.select_layer } else { self.select_layer };
        depth.clamp(0, n) as usize
    }

    /// FLOPs of the projector's forward pass of one picture.
    pub fn projector_work(&self) -> Result<Work> {
        let (v, d) = (&self.vision, self.language.hidden_size);
        let grid = Grid { image_size: v.image_size, patch_size: v.patch_size, class_token: false };
        Projector::new(&projector(), v.hidden_size, d, true, &mut Shapes(Place::cpu()))?.work(grid)
    }

    /// The model with random weights, everything frozen.
    pub fn build(&self, noise: &mut Noise) -> Result<Vlm> {
        let (v, d) = (self.vision.hidden_size, self.language.hidden_size);
        let tower = Tower::new(self.vision.clone(), self.select_layer, SelectFeature::Patch, noise)?;
        let projector = Projector::new(&projector(), v, d, true, noise)?;
        let language = Language::new(self.language.clone(), noise)?;
        Ok(Vlm::new(Some(tower), Some(projector), language, self.image_token))
    }
}

/// LLaVA-1.5's.
fn projector() -> spec::Projector {
    let act = Activation::Gelu;
    spec::Projector::Mlp(MlpProjector { source: None, depth: 2, hidden: None, act, input_norm: false, norm: false })
}

fn clip(hidden: usize, mlp: usize, layers: usize, heads: usize, edge: usize, patch: usize) -> VisionConfig {
    VisionConfig {
        hidden_size: hidden,
        intermediate_size: mlp,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_channels: 3,
        image_size: edge,
        patch_size: patch,
        hidden_act: Activation::QuickGelu,
        layer_norm_eps: 1e-5,
    }
}

fn llama(vocab: usize, hidden: usize, mlp: usize, layers: usize, [heads, kv_heads]: [usize; 2]) -> LlamaConfig {
    LlamaConfig {
        vocab_size: vocab,
        hidden_size: hidden,
        intermediate_size: mlp,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: kv_heads,
        head_dim: hidden / heads,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        max_position_embeddings: 4096,
        attention_bias: false,
        mlp_bias: false,
        tie_word_embeddings: false,
        bos_token_id: Some(1),
        eos_token_ids: vec![2],
        pad_token_id: None,
    }
}

/// CLIP ViT-L/14 at 336 pixels and Vicuna-7B v1.5, whose vocabulary llava-hf/llava-1.5-7b-hf pads to 32,064.
fn llava() -> Preset {
    Preset {
        name: NAMES[0],
        vision: clip(1024, 4096, 24, 16, 336, 14),
        select_layer: -2,
        language: llama(32_064, 4096, 11_008, 32, [32, 32]),
        image_token: 32_000,
        rank: 128,
        dropout: 0.05,
        caption: 44,
        sequence: 2048,
        micro: [16, 8, 4],
    }
}

/// The models of `recipes/smollm2-dinov2-easyvqa.toml`.
fn smollm2() -> Preset {
    let language = llama(49_152, 576, 1536, 30, [9, 3]);
    Preset {
        name: NAMES[1],
        vision: VisionConfig { hidden_act: Activation::Gelu, ..clip(384, 1536, 12, 6, 112, 14) },
        select_layer: -1,
        language: LlamaConfig { rope_theta: 100_000.0, tie_word_embeddings: true, ..language },
        image_token: 4,
        rank: 16,
        dropout: 0.0,
        caption: 24,
        sequence: 104,
        micro: [8, 8, 4],
    }
}

/// Seconds on a CPU.
fn tiny() -> Preset {
    Preset {
        name: NAMES[2],
        vision: clip(32, 64, 3, 2, 16, 4),
        select_layer: -2,
        language: llama(96, 48, 80, 2, [4, 2]),
        image_token: 95,
        rank: 4,
        dropout: 0.1,
        caption: 6,
        sequence: 32,
        micro: [4, 2, 2],
    }
}
