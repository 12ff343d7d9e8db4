use super::*;
use std::path::Path;

const F32: DType = DType::F32;

fn golden(folder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/a").join(folder)
}

/// All tensors of `weights` by canonical name, as bit patterns.
fn drain(mut weights: Weights) -> BTreeMap<String, (Vec<usize>, Vec<u32>)> {
    let shapes: Vec<_> = weights.names().map(|n| (n.to_string(), weights.info(n).unwrap().shape.clone())).collect();
    let take = |(name, shape): (String, Vec<usize>)| {
        let t = weights.take(&name, &shape, F32, &Device::Cpu).unwrap();
        let bits = t.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect();
        (name, (shape, bits))
    };
    let all = shapes.into_iter().map(take).collect();
    weights.finish().unwrap();
    all
}

#[test]
fn every_folder_of_the_golden_model_gives_the_same_tensors() {
    let whole = drain(Weights::llava(&golden("model")).unwrap().1);
    assert_eq!(whole.len(), 89);
    assert_eq!(whole, drain(Weights::llava(&golden("model_hub_naming")).unwrap().1));
    let mut parts = drain(Weights::vision(&golden("vision")).unwrap().1);
    assert_eq!(parts, drain(Weights::vision(&golden("vision_clip_full")).unwrap().1));
    assert_eq!(parts, drain(Weights::vision(&golden("model")).unwrap().1));
    let language = drain(Weights::language(&golden("language")).unwrap().1);
    assert_eq!(language, drain(Weights::language(&golden("model_hub_naming")).unwrap().1));
    parts.extend(language);
    let projector = drain(Weights::projector(&golden("projector_init.safetensors")).unwrap());
    assert_eq!(projector, drain(Weights::projector(&golden("model")).unwrap()));
    assert_eq!(projector.len(), 4);
    parts.extend(projector);
    assert_eq!(whole, parts);
}

#[test]
fn a_missing_misshaped_or_forgotten_tensor_is_named() {
    let (_, mut weights) = Weights::language(&golden("language")).unwrap();
    let mut fail = |name: &str, shape: &[usize]| weights.take(name, shape, F32, &Device::Cpu).unwrap_err().report();
    let missing = fail("language.layers.0.self_attn.q_proj.bias", &[32]);
    assert!(missing.contains("`language.layers.0.self_attn.q_proj.bias` is missing"), "{missing}");
    assert!(missing.contains("`language.layers.0.self_attn.q_proj.weight`; does"), "{missing}");
    let shape = fail("language.layers.0.self_attn.k_proj.weight", &[32, 32]);
    assert!(
        shape.contains("(`model.layers.0.self_attn.k_proj.weight` in ") && shape.contains("model.safetensors"),
        "{shape}"
    );
    assert!(shape.contains("has the shape [16, 32], but [32, 32] is expected"), "{shape}");
    weights.skip("language.layers.");
    weights.take("language.norm.weight", &[32], DType::BF16, &Device::Cpu).unwrap();
    let left = weights.finish().unwrap_err().report();
    assert!(left.contains("does not use: `model.embed_tokens.weight`, `lm_head.weight`"), "{left}");
}
