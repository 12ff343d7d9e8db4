//! Shapes of published models, to be filled with random weights.

use super::noise::Noise;
use crate::bail;
use crate::error::{Result, near};
use crate::model::backbone::{Config, LanguageConfig, VisionConfig};
use crate::model::init::{Place, Shapes};
use crate::model::language::Language;
use crate::model::projector::{Projector, Work};
use crate::model::vision::{Grid, Tower};
use crate::model::vlm::Vlm;
use crate::spec::{self, Activation, MlpProjector, SelectFeature};
use serde_json::json;

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
    pub language: LanguageConfig,
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
            "llava-1.5-7b" => llava(),
            "smollm2-135m-dinov2-s" => smollm2(),
            "tiny" => tiny(),
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

/// CLIP ViT-L/14 at 336 pixels and Vicuna-7B v1.5, whose vocabulary llava-hf/llava-1.5-7b-hf pads to 32,064.
fn llava() -> Result<Preset> {
    Ok(Preset {
        name: NAMES[0],
        vision: VisionConfig::from_init(&json!({
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            "image_size": 336, "patch_size": 14
        }))?,
        select_layer: -2,
        language: LanguageConfig::from_init(&json!({
            "vocab_size": 32_064, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096
        }))?,
        image_token: 32_000,
        rank: 128,
        dropout: 0.05,
        caption: 44,
        sequence: 2048,
        micro: [16, 8, 4],
    })
}

/// The models of `recipes/smollm2-dinov2-easyvqa.toml`.
fn smollm2() -> Result<Preset> {
    Ok(Preset {
        name: NAMES[1],
        vision: VisionConfig::from_init(&json!({
            "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6,
            "image_size": 112, "patch_size": 14, "hidden_act": "gelu"
        }))?,
        select_layer: -1,
        language: LanguageConfig::from_init(&json!({
            "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "rope_theta": 100_000.0, "tie_word_embeddings": true
        }))?,
        image_token: 4,
        rank: 16,
        dropout: 0.0,
        caption: 24,
        sequence: 104,
        micro: [8, 8, 4],
    })
}

/// Seconds on a CPU.
fn tiny() -> Result<Preset> {
    Ok(Preset {
        name: NAMES[2],
        vision: VisionConfig::from_init(&json!({
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
            "image_size": 16, "patch_size": 4
        }))?,
        select_layer: -2,
        language: LanguageConfig::from_init(&json!({
            "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096
        }))?,
        image_token: 95,
        rank: 4,
        dropout: 0.1,
        caption: 6,
        sequence: 32,
        micro: [4, 2, 2],
    })
}
