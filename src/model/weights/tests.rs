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
    let whole = drain(Weights::whole(&golden("model")).unwrap().1);
    assert_eq!(whole.len(), 89);
    assert_eq!(whole, drain(Weights::whole(&golden("model_hub_naming")).unwrap().1));
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

fn pickled(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bin").join(name)
}

/// tests/golden/bin/make_claims.py.
#[test]
fn room_is_made_for_what_a_pytorch_file_holds_not_for_what_it_claims() {
    let file = Tensors::open_file(&pickled("claims.bin")).unwrap();
    let report = file.load("mm_projector.0.bias", &Device::Cpu).unwrap_err().report();
    assert!(report.contains("its storage ends after 128 of 266287972232 bytes"), "{report}");
}

#[test]
fn pytorch_files_give_what_pytorch_saved() {
    let expected = Tensors::open_file(&pickled("expected.safetensors")).unwrap();
    let check = |found: BTreeMap<String, (Vec<usize>, Vec<u32>)>, stored: &dyn Fn(&str) -> String| {
        for (name, (shape, bits)) in &found {
            let want = expected.load(&stored(name), &Device::Cpu).unwrap();
            let want_bits: Vec<_> =
                want.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect();
            assert_eq!((want.dims(), &want_bits), (shape.as_slice(), bits), "{name}");
        }
        found.len()
    };
    let llama = |name: &str| (crate::model::backbone::LANGUAGES[0].stored)(name).unwrap();
    assert_eq!(check(drain(Weights::language(&pickled("single")).unwrap().1), &llama), 12);
    assert_eq!(check(drain(Weights::language(&pickled("sharded")).unwrap().1), &llama), 12);
    let projector = |name: &str| match name.strip_prefix("projector.linear_").unwrap().split_once('.').unwrap() {
        ("1", kind) => format!("model.mm_projector.0.{kind}"),
        (_, kind) => format!("model.mm_projector.2.{kind}"),
    };
    assert_eq!(check(drain(Weights::projector(&pickled("mm_projector.bin")).unwrap()), &projector), 4);
}

#[test]
fn damaged_and_absent_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let copy = |from: PathBuf, keep: usize| {
        let to = dir.path().join(from.file_name().unwrap());
        std::fs::write(&to, &std::fs::read(from).unwrap()[..keep]).unwrap();
        to
    };
    let open = |path: &Path| Tensors::open_file(path).err().unwrap().report();
    let bin = open(&copy(pickled("single/pytorch_model.bin"), 2000));
    assert!(
        bin.contains("pytorch_model.bin (2000 bytes) cannot be read as a PyTorch file")
            && bin.contains("copy or download it")
    );
    let safe = open(&copy(golden("language/model.safetensors"), 200_000));
    assert!(safe.contains("model.safetensors is damaged: expected 240504 bytes, found 200000"), "{safe}");
    assert!(open(&dir.path().join("none.safetensors")).contains("cannot open"));
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    copy(pickled("sharded/pytorch_model-00001-of-00002.bin"), 100);
    std::fs::remove_file(dir.path().join("pytorch_model.bin")).unwrap();
    let folder = || Tensors::open(dir.path()).err().unwrap().report();
    assert!(
        folder().contains("no weights in") && folder().contains("expected one of model.safetensors, "),
        "{}",
        folder()
    );
    std::fs::copy(pickled("sharded/pytorch_model.bin.index.json"), dir.path().join("pytorch_model.bin.index.json"))
        .unwrap();
    assert!(folder().contains("pytorch_model-00002-of-00002.bin, which is missing"), "{}", folder());
    std::fs::write(dir.path().join("pytorch_model.bin.index.json"), r#"{ "weight_map": { "a": "../x.bin" } }"#)
        .unwrap();
    assert!(folder().contains("has no `weight_map` from tensors to files beside it"), "{}", folder());
}
