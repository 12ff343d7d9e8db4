//! Names of tensors: what Hugging Face files call them, and our canonical names (HF's module names under `vision.`,
//! `projector.` and `language.`).
//!
//! | file | spelling |
//! |---|---|
//! | CLIP, transformers 4 and whole `CLIPModel`s | `vision_model.encoder…` |
//! | CLIP, transformers 5 | `encoder…` |
//! | LLaMA | `model.layers…`, `lm_head.weight` |
//! | LLaVA on the hub | `vision_tower.vision_model.encoder…`, `language_model.model.layers…`, `language_model.lm_head.weight` |
//! | LLaVA, transformers 5 | `vision_tower.encoder…`, else as above |
//! | LLaVA inside transformers 5 (and PEFT keys) | `model.vision_tower.encoder…`, `model.language_model.layers…`, `lm_head.weight` |
//! | LLaVA-NeXT | as LLaVA, and `image_newline` (`model.image_newline`) |
//! | projector of the original LLaVA code | `model.mm_projector.0.weight`, `model.mm_projector.2.weight`; beside a LoRA `base_model.model.model.mm_projector…` |
//! | connector of Idefics2 | `model.connector.modality_projection…`, `model.connector.perceiver_resampler…`; alone, without `connector.` |
//! | resampler of OpenFlamingo | `perceiver.latents`, `perceiver.layers…` |
//! | Q-Former of BLIP-2 | `query_tokens`, `qformer…`, `language_projection…`; see [`bare_qformer`] |

/// Which architecture a folder holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// `CLIPVisionModel`, or the tower of a `CLIPModel`.
    Clip,
    /// `LlamaForCausalLM`.
    Llama,
    /// `LlavaForConditionalGeneration`.
    Llava,
}

/// What a name found in a file means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Name {
    /// The canonical name.
    Known(String),
    /// Belongs to a part we do not use (CLIP's text tower) or to a buffer that is computed.
    Ignored,
    /// Nothing of this architecture.
    Unknown,
}

/// The meaning of `name` in a file of this family.
pub fn canonical(family: Family, name: &str) -> Name {
    if name.ends_with(".position_ids") || name.ends_with(".rotary_emb.inv_freq") {
        return Name::Ignored;
    }
    let known = match family {
        Family::Clip => return clip(name),
        Family::Llama if sees(name) => return Name::Ignored,
        Family::Llama => language(name),
        Family::Llava => llava(name),
    };
    known.map_or(Name::Unknown, Name::Known)
}

/// The spelling that both transformers 4 and 5 read; `None` if the family has no such tensor.
pub fn for_file(family: Family, canonical: &str) -> Option<String> {
    let (part, rest) = canonical.split_once('.')?;
    let prefix = match (family, part, rest) {
        (Family::Clip, "vision", _) => "vision_model.",
        (Family::Llama, "language", "lm_head.weight") => "",
        (Family::Llama, "language", _) => "model.",
        (Family::Llava, "vision", _) => "vision_tower.vision_model.",
        (Family::Llava, "language", "lm_head.weight") => "language_model.",
        (Family::Llava, "language", _) => "language_model.model.",
        (Family::Llava, "projector", "image_newline") => "",
        (Family::Llava, "projector", _) => "multi_modal_projector.",
        _ => return None,
    };
    Some(format!("{prefix}{rest}"))
}

/// The canonical name of a projector tensor in any file that may hold one; `None` for everything else.
pub fn projector(name: &str) -> Option<String> {
    let name = name.strip_prefix("base_model.model.").unwrap_or(name);
    let name = name.strip_prefix("model.").unwrap_or(name);
    if let Some(rest) = name.strip_prefix("multi_modal_projector.").or_else(|| name.strip_prefix("projector.")) {
        return Some(format!("projector.{rest}"));
    }
    if name == "image_newline" {
        return Some("projector.image_newline".into());
    }
    let bare = name.strip_prefix("connector.").unwrap_or(name);
    let whole = [
        "modality_projection.",
        "perceiver_resampler.",
        "perceiver.",
        "query_tokens",
        "qformer.",
        "language_projection.",
    ];
    if whole.iter().any(|part| bare.starts_with(part)) {
        return (!of_text(bare)).then(|| format!("projector.{bare}"));
    }
    // A bare linear layer, or a sequence in which every second module is an activation.
    match name.strip_prefix("mm_projector.")?.split_once('.') {
        None => name.strip_prefix("mm_projector.").map(|kind| format!("projector.linear_1.{kind}")),
        Some((index, kind)) => {
            let index: usize = index.parse().ok().filter(|i| i % 2 == 0)?;
            Some(format!("projector.linear_{}.{kind}", index / 2 + 1))
        }
    }
}

/// Does a Q-Former's tensor belong to its branch for text, or is it computed?
fn of_text(name: &str) -> bool {
    let mut parts = name.strip_prefix("qformer.").unwrap_or("").split('.');
    match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some("encoder"), Some("layer"), Some(_), part) => matches!(part, Some("intermediate" | "output")),
        (part, ..) => part == Some("embeddings"),
    }
}

/// Are these the names of a `Blip2QFormerModel` saved alone, which lack their `qformer.`?
pub fn bare_qformer<'a>(mut names: impl Iterator<Item = &'a str>) -> bool {
    names.any(|n| n.starts_with("encoder.layer.") && n.contains(".crossattention."))
}

/// The canonical name of a module in any spelling, without knowing the family; `None` if it is none of ours.
pub fn module(path: &str) -> Option<String> {
    if path.starts_with("vision_model.") || path.starts_with("encoder.") {
        return Some(format!("vision.{}", path.strip_prefix("vision_model.").unwrap_or(path)));
    }
    let bare = path.strip_prefix("model.").unwrap_or(path);
    if path == "lm_head" || bare.starts_with("layers.") {
        return language(bare);
    }
    llava(path)
}

fn clip(name: &str) -> Name {
    const OTHER_PARTS: [&str; 4] = ["text_model.", "text_projection.", "visual_projection.", "logit_scale"];
    if OTHER_PARTS.iter().any(|part| name.starts_with(part)) {
        return Name::Ignored;
    }
    Name::Known(format!("vision.{}", name.strip_prefix("vision_model.").unwrap_or(name)))
}

/// Is this a part of the original LLaVA code's whole model that is not its language model?
fn sees(name: &str) -> bool {
    const PARTS: [&str; 3] = ["model.mm_projector.", "model.vision_tower.", "model.vision_resampler."];
    name == "model.image_newline" || PARTS.iter().any(|part| name.starts_with(part))
}

fn language(name: &str) -> Option<String> {
    let rest = name.strip_prefix("model.").unwrap_or(name);
    Some(format!("language.{rest}"))
}

fn llava(name: &str) -> Option<String> {
    if name == "lm_head.weight" {
        return Some("language.lm_head.weight".into());
    }
    let name = name.strip_prefix("model.").unwrap_or(name);
    if let Some(rest) = name.strip_prefix("vision_tower.") {
        return Some(format!("vision.{}", rest.strip_prefix("vision_model.").unwrap_or(rest)));
    }
    if let Some(rest) = name.strip_prefix("language_model.") {
        return language(rest);
    }
    projector(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(name: &str) -> Name {
        Name::Known(name.into())
    }

    #[test]
    fn every_spelling_of_the_golden_map_has_one_canonical_name() {
        let map = include_str!("../../../tests/golden/a/key_map.json");
        let map: Vec<serde_json::Value> = serde_json::from_str(map).unwrap();
        assert_eq!(map.len(), 89);
        for entry in &map {
            let spelling = |key: &str| entry[key].as_str().unwrap();
            let Name::Known(name) = canonical(Family::Llava, spelling("hub_file")) else { panic!("{entry}") };
            assert_eq!(known(&name), canonical(Family::Llava, spelling("transformers5_file")));
            assert_eq!(known(&name), canonical(Family::Llava, spelling("module")));
            assert_eq!(for_file(Family::Llava, &name).as_deref(), Some(spelling("hub_file")));
            let family = match name.split_once('.').unwrap().0 {
                "vision" => Family::Clip,
                "language" => Family::Llama,
                _ => {
                    assert_eq!(projector(spelling("module")), Some(name));
                    continue;
                }
            };
            assert_eq!(known(&name), canonical(family, spelling("standalone")));
            assert_eq!(known(&name), canonical(family, &for_file(family, &name).unwrap()));
        }
    }

    #[test]
    fn parts_that_are_not_used() {
        for name in ["text_model.final_layer_norm.bias", "visual_projection.weight", "logit_scale"] {
            assert_eq!(canonical(Family::Clip, name), Name::Ignored, "{name}");
        }
        assert_eq!(canonical(Family::Clip, "vision_model.embeddings.position_ids"), Name::Ignored);
        assert_eq!(canonical(Family::Llama, "model.layers.3.self_attn.rotary_emb.inv_freq"), Name::Ignored);
        assert_eq!(canonical(Family::Llava, "vision_queries"), Name::Unknown);
        assert_eq!(for_file(Family::Clip, "language.norm.weight"), None);
    }

    #[test]
    fn the_newline_of_tiles() {
        for name in ["image_newline", "model.image_newline"] {
            assert_eq!(canonical(Family::Llava, name), known("projector.image_newline"));
        }
        assert_eq!(for_file(Family::Llava, "projector.image_newline").unwrap(), "image_newline");
    }

    #[test]
    fn projectors_of_the_original_code() {
        assert_eq!(projector("model.mm_projector.0.bias").unwrap(), "projector.linear_1.bias");
        assert_eq!(projector("model.mm_projector.2.weight").unwrap(), "projector.linear_2.weight");
        assert_eq!(projector("base_model.model.model.mm_projector.2.bias").unwrap(), "projector.linear_2.bias");
        assert_eq!(projector("mm_projector.weight").unwrap(), "projector.linear_1.weight");
        // Beside them, the language model of a whole folder.
        assert_eq!(canonical(Family::Llama, "model.mm_projector.0.bias"), Name::Ignored);
        assert_eq!(canonical(Family::Llama, "model.image_newline"), Name::Ignored);
        assert_eq!(canonical(Family::Llama, "model.norm.weight"), known("language.norm.weight"));
        assert_eq!(projector("mm_projector.1.weight"), None);
        let down = "modality_projection.down_proj.weight";
        for name in [down.to_string(), format!("connector.{down}"), format!("model.connector.{down}")] {
            assert_eq!(projector(&name).unwrap(), format!("projector.{down}"));
        }
        for name in ["query_tokens", "qformer.encoder.layer.0.output_query.dense.weight", "language_projection.bias"] {
            assert_eq!(projector(name).unwrap(), format!("projector.{name}"));
        }
        assert_eq!(
            projector("perceiver.layers.0.0.to_q.weight").unwrap(),
            "projector.perceiver.layers.0.0.to_q.weight"
        );
        assert_eq!(projector("lang_encoder.gated_cross_attn_layers.0.attn_gate"), None);
        // Other parts of a whole BLIP-2, a Q-Former's text among them.
        let layer = "qformer.encoder.layer.3";
        for part in ["intermediate.dense.weight", "output.LayerNorm.bias"] {
            assert_eq!(projector(&format!("{layer}.{part}")), None);
        }
        assert!(projector(&format!("{layer}.attention.output.dense.bias")).is_some());
        assert_eq!(projector("qformer.embeddings.position_ids"), None);
        assert_eq!(projector("vision_model.encoder.layers.0.mlp.fc1.weight"), None);
        assert!(bare_qformer(["layernorm.weight", "encoder.layer.0.crossattention.output.dense.bias"].into_iter()));
        // DINOv2's towers have layers of that name, too.
        assert!(!bare_qformer(["layernorm.weight", "encoder.layer.0.attention.output.dense.bias"].into_iter()));
        assert_eq!(projector("model.embed_tokens.weight"), None);
    }
}
