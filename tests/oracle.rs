//! Whole models against independent implementations with the same weights: candle-transformers' CLIP and LLaMA
//! (forward), and the chain composed of stock candle's differentiable ops (gradients).

mod stock;
mod tiny;

use adfreeze::adapters::lora;
use adfreeze::model::backbone::{LanguageConfig, RopeScaling, VisionConfig};
use adfreeze::model::init::{Fresh, Place};
use adfreeze::model::language::Language;
use adfreeze::model::params::{Grads, Module};
use adfreeze::model::segment::Kept;
use adfreeze::model::vision::Tower;
use adfreeze::model::vlm::Mode;
use adfreeze::spec::{Lora, SelectFeature};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{clip, llama};
use std::collections::HashMap;
use stock::Stock;
use tiny::*;

/// The module's parameters in f32 under the names that candle-transformers reads.
fn builder(m: &mut dyn Module, rename: impl Fn(&str) -> String) -> VarBuilder<'static> {
    let mut tensors = HashMap::new();
    m.visit_mut(&mut |p| {
        p.value = p.value.to_dtype(DType::F32).unwrap();
        tensors.insert(rename(&p.name), p.value.clone());
    });
    VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu)
}

fn off(a: &Tensor, b: &Tensor) -> f64 {
    distance(&a.to_dtype(DType::F64).unwrap(), &b.to_dtype(DType::F64).unwrap())
}

fn source32() -> Fresh {
    Fresh { place: Place::cpu(), ..source() }
}

/// Perturbs in f64, so that the noise has one type.
fn perturb32(m: &mut dyn Module) {
    m.visit_mut(&mut |p| p.value = p.value.to_dtype(DType::F64).unwrap());
    perturb(m);
}

#[test]
fn llama_gives_the_logits_of_candle_transformers() {
    let scaled = RopeScaling::Llama3 {
        factor: 4.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 16.0,
    };
    for (kv_heads, tie, rope_scaling) in
        [(4, false, RopeScaling::None), (2, true, RopeScaling::None), (1, false, scaled)]
    {
        let config = LanguageConfig {
            hidden_size: 16,
            head_dim: 4,
            num_key_value_heads: kv_heads,
            tie_word_embeddings: tie,
            rope_scaling,
            ..llama()
        };
        let mut ours = Language::new(config.clone(), &mut source32()).unwrap();
        perturb32(&mut ours);
        let vb = builder(&mut ours, |n| match n.strip_prefix("language.").unwrap() {
            "lm_head.weight" => "lm_head.weight".to_string(),
            other => format!("model.{other}"),
        });
        let rope_scaling = match config.rope_scaling {
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                Some(llama::Llama3RopeConfig {
                    factor: factor as f32,
                    low_freq_factor: low_freq_factor as f32,
                    high_freq_factor: high_freq_factor as f32,
                    original_max_position_embeddings: original_max_position_embeddings as usize,
                    rope_type: llama::Llama3RopeType::Llama3,
                })
            }
            _ => None,
        };
        let theirs = llama::Config {
            hidden_size: 16,
            intermediate_size: config.intermediate_size,
            vocab_size: config.vocab_size,
            num_hidden_layers: config.num_hidden_layers,
            num_attention_heads: config.num_attention_heads,
            num_key_value_heads: kv_heads,
            use_flash_attn: false,
            rms_norm_eps: config.rms_norm_eps,
            rope_theta: config.rope_theta as f32,
            bos_token_id: None,
            eos_token_id: None,
            rope_scaling,
            max_position_embeddings: 64,
            tie_word_embeddings: tie,
        };
        let oracle = llama::Llama::load(vb, &theirs).unwrap();
        let ids: Vec<u32> = (0..21).map(|i| i * 5 % 22).collect();
        let side = ours.side(&[ids.len()], None, false).unwrap();
        let rows: Vec<u32> = (0..ids.len() as u32).collect();
        let all = ours.logits(ours.embed(&ids).unwrap(), &side, &rows).unwrap();
        let mut cache = ours.cache();
        // It gives the last position's logits only: one prefix after the other.
        for n in 1..=ids.len() {
            let mut kv = llama::Cache::new(false, DType::F32, &theirs, &Device::Cpu).unwrap();
            let prefix = Tensor::new(&ids[..n], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
            let want = oracle.forward(&prefix, 0, &mut kv).unwrap().squeeze(0).unwrap();
            let d = off(&all.get(n - 1).unwrap(), &want);
            assert!(d < 1e-5, "{kv_heads} key heads, {n} tokens: logits differ by {d:e}");
            // The cache grows by one token, at first by three.
            if n >= 3 {
                let newest = if n == 3 { &ids[..3] } else { &ids[n - 1..n] };
                let got = ours.extend(ours.embed(newest).unwrap(), None, &mut cache).unwrap();
                let d = off(&got, &want);
                assert!(d < 1e-5, "{kv_heads} key heads, {n} tokens with a cache: logits differ by {d:e}");
            }
        }
        assert_eq!(cache.seen(), ids.len());
    }
}

#[test]
fn clip_gives_the_hidden_states_of_candle_transformers() {
    let config = VisionConfig { image_size: 12, ..clip() };
    let theirs = clip::vision_model::ClipVisionConfig {
        embed_dim: config.hidden_size,
        activation: clip::text_model::Activation::QuickGelu,
        intermediate_size: config.intermediate_size,
        num_hidden_layers: config.num_hidden_layers,
        num_attention_heads: config.num_attention_heads,
        projection_dim: 4,
        num_channels: 3,
        image_size: config.image_size,
        patch_size: config.patch_size,
    };
    let pixels = noise("pixels", &[3, 3, 12, 12], 1.0).to_dtype(DType::F32).unwrap();
    for depth in 1..=config.num_hidden_layers {
        let mut ours = Tower::new(config.clone(), depth as i64, SelectFeature::Full, &mut source32()).unwrap();
        perturb32(&mut ours);
        let vb = builder(&mut ours, |n| n.strip_prefix("vision.").unwrap().to_string());
        let oracle = clip::vision_model::ClipVisionTransformer::new(vb, &theirs).unwrap();
        // Its list starts after the first layer; HF's `hidden_states` with the embeddings.
        let want = oracle.output_hidden_states(&pixels).unwrap().swap_remove(depth - 1);
        let (got, _) = ours.forward(&pixels, None, false, Kept::Minimal, false).unwrap();
        let d = off(&got, &want.flatten(0, 1).unwrap());
        assert!(d < 1e-5, "{depth} layers: hidden states differ by {d:e}");
    }
}

#[test]
fn the_chain_gives_the_gradients_of_stock_candle() {
    type Setting = (&'static str, fn(&str) -> bool);
    let settings: [Setting; 4] = [
        ("everything", |n| !n.contains("layers.2.") && !n.contains("post_layernorm") && !n.contains("lora")),
        ("projector", |n| n.starts_with("projector.")),
        ("LoRA", |n| n.contains(".lora_") && !n.starts_with("vision.encoder.layers.2.")),
        ("LoRA on the language model, projector", |n| {
            n.contains("language.") && n.contains(".lora_") || n.starts_with("projector.")
        }),
    ];
    for tie in [false, true] {
        let mut vlm =
            vlm(clip(), -2, SelectFeature::Patch, &mlp(false), LanguageConfig { tie_word_embeddings: tie, ..llama() });
        let target = vec!["*".to_string()];
        let cfg = Lora { rank: 2, alpha: 1.0, target, ..Lora::default() };
        lora::attach(&mut vlm, &cfg, "sft", key("lora")).unwrap();
        perturb(&mut vlm);
        for (what, trains) in settings {
            let chosen = names(&mut vlm, trains);
            vlm.train_only(&chosen);
            let stock = Stock::new(&mut vlm, 2);
            let all = sequences();
            let batch = pack(&vlm, &all.iter().collect::<Vec<_>>());
            let weights = coefs(batch.targets.len());
            let grads = gradients(&vlm, &batch, &weights, Mode::default());
            let (mut want, mut value) = (Grads::new(), 0.0);
            for (i, s) in all.iter().enumerate() {
                let own: Vec<f64> =
                    batch.owners.iter().zip(&weights).filter(|(o, _)| **o == i).map(|(_, w)| *w).collect();
                let loss = stock.loss(&pack(&vlm, &[s]), &own).unwrap();
                value += stock::number(&loss);
                let store = loss.backward().unwrap();
                for (name, var) in &stock.vars {
                    if let Some(g) = store.get(var) {
                        want.add(name, g.detach().copy().unwrap()).unwrap();
                    }
                }
            }
            let d = (loss(&vlm, &batch, &weights, Mode::default()) - value).abs();
            assert!(d < 1e-10, "{what}, tied {tie}: the loss differs by {d:e}");
            assert_close(&format!("{what}, tied {tie}"), &grads, want.by_name(), 1e-9);
        }
    }
}
