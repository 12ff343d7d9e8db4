//! Names of projectors' tensors in the files of others, and our canonical names (under `projector.`).
//!
//! | file | spelling |
//! |---|---|
//! | whole models of transformers | `multi_modal_projector…`, `image_newline` |
//! | the original LLaVA code | `model.mm_projector.0.weight`, `model.mm_projector.2.weight`; beside a LoRA `base_model.model.model.mm_projector…` |
//! | connector of Idefics2 | `model.connector.modality_projection…`, `model.connector.perceiver_resampler…`; alone, without `connector.` |
//! | resampler of OpenFlamingo | `perceiver.latents`, `perceiver.layers…` |
//! | Q-Former of BLIP-2 | `query_tokens`, `qformer…`, `language_projection…`; see [`bare_qformer`] |

/// The canonical name of a projector tensor in any file that may hold one; `None` for everything else.
pub fn canonical(name: &str) -> Option<String> {
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

/// The name of a projector's tensor in a file of its own, as a whole model of transformers has it; `None` for everything else.
pub fn stored(canonical: &str) -> Option<String> {
    match canonical.strip_prefix("projector.")? {
        newline @ "image_newline" => Some(newline.into()),
        rest => Some(format!("multi_modal_projector.{rest}")),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn projectors_of_the_original_code() {
        assert_eq!(canonical("model.mm_projector.0.bias").unwrap(), "projector.linear_1.bias");
        assert_eq!(canonical("model.mm_projector.2.weight").unwrap(), "projector.linear_2.weight");
        assert_eq!(canonical("base_model.model.model.mm_projector.2.bias").unwrap(), "projector.linear_2.bias");
        assert_eq!(canonical("mm_projector.weight").unwrap(), "projector.linear_1.weight");
        assert_eq!(canonical("mm_projector.1.weight"), None);
        let down = "modality_projection.down_proj.weight";
        for name in [down.to_string(), format!("connector.{down}"), format!("model.connector.{down}")] {
            assert_eq!(canonical(&name).unwrap(), format!("projector.{down}"));
        }
        for name in ["query_tokens", "qformer.encoder.layer.0.output_query.dense.weight", "language_projection.bias"] {
            assert_eq!(canonical(name).unwrap(), format!("projector.{name}"));
        }
        assert_eq!(
            canonical("perceiver.layers.0.0.to_q.weight").unwrap(),
            "projector.perceiver.layers.0.0.to_q.weight"
        );
        assert_eq!(canonical("lang_encoder.gated_cross_attn_layers.0.attn_gate"), None);
        // Other parts of a whole BLIP-2, a Q-Former's text among them.
        let layer = "qformer.encoder.layer.3";
        for part in ["intermediate.dense.weight", "output.LayerNorm.bias"] {
            assert_eq!(canonical(&format!("{layer}.{part}")), None);
        }
        assert!(canonical(&format!("{layer}.attention.output.dense.bias")).is_some());
        assert_eq!(canonical("qformer.embeddings.position_ids"), None);
        assert_eq!(canonical("vision_model.encoder.layers.0.mlp.fc1.weight"), None);
        assert!(bare_qformer(["layernorm.weight", "encoder.layer.0.crossattention.output.dense.bias"].into_iter()));
        // DINOv2's towers have layers of that name, too.
        assert!(!bare_qformer(["layernorm.weight", "encoder.layer.0.attention.output.dense.bias"].into_iter()));
        assert_eq!(canonical("model.embed_tokens.weight"), None);
    }
}
