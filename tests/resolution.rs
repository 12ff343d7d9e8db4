//! Pictures of other sizes than the tower was made for.

mod tiny;

use adfreeze::checkpoint::safetensors;
use adfreeze::model::init::{FromWeights, Place};
use adfreeze::model::params::Module;
use adfreeze::model::segment::Kept;
use adfreeze::model::vision::Tower;
use adfreeze::model::vlm::{Load, Mode};
use adfreeze::model::weights::Weights;
use adfreeze::spec::SelectFeature;
use candle_core::{DType, Device, Tensor};
use std::path::{Path, PathBuf};
use tiny::*;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn wide(t: &Tensor) -> Tensor {
    t.to_dtype(DType::F64).unwrap()
}

/// transformers' CLIP with `interpolate_pos_encoding = True`: larger, smaller, and back at the size that it was made for.
#[test]
fn features_at_other_sizes_agree_with_transformers() {
    let all = safetensors::load(&golden("positions/features.safetensors")).unwrap();
    for dtype in [DType::F32, DType::BF16] {
        let (config, mut weights) = Weights::vision(&golden("positions/model")).unwrap();
        let place = Place { device: Device::Cpu, dtype };
        let mut src = FromWeights { weights: &mut weights, place: &place };
        let mut tower = Tower::new(config, -2, SelectFeature::Patch, &mut src).unwrap();
        let shape = |t: &mut Tower| t.params()["vision.embeddings.position_embedding.weight"].dims().to_vec();
        for size in [18, 9, 12] {
            tower.set_size(size).unwrap();
            assert_eq!((tower.grid().tokens(), shape(&mut tower)), ((size / 3).pow(2), vec![17, 16]));
            let (x, want) = (&all[&format!("{size}.pixels")], &all[&format!("{size}.features")]);
            let (y, _) = tower.forward(x, None, false, Kept::Nothing, false).unwrap();
            let off = distance(&wide(&y), &wide(want));
            let bound = if dtype == DType::F32 { 1e-6 } else { 2e-2 };
            assert!(off < bound, "{size} px in {dtype:?}: {off:e}");
        }
    }
}

#[test]
fn gradients_at_another_size() {
    for size in [12, 3] {
        let mut vlm = vlm(clip(), -1, SelectFeature::Full, &mlp(false), llama());
        vlm.set_image_size(size).unwrap();
        assert_eq!(vlm.tokens_per_image().unwrap(), (size / 3).pow(2) + 1);
        let chosen = names(&mut vlm, |n| n.starts_with("vision.embeddings.") || n == "projector.linear_1.weight");
        vlm.train_only(&chosen);
        let batch = pack(&vlm, &sequences().iter().collect::<Vec<_>>());
        let weights = coefs(batch.targets.len());
        let frozen = snapshot(&mut vlm);
        for kept in [Kept::All, Kept::Input] {
            let mode = Mode { kept, ..Mode::default() };
            let grads = gradients(&vlm, &batch, &weights, mode);
            assert!(snapshot(&mut vlm) == frozen, "{size} px: a parameter changed");
            check_params(&format!("{size} px"), &mut vlm, &grads, |_| false, |v| loss(v, &batch, &weights, mode));
        }
    }
}

#[test]
fn a_size_that_patches_do_not_fill_is_refused_and_memory_follows_the_size() {
    let mut vlm = vlm(clip(), -2, SelectFeature::Patch, &mlp(false), llama());
    let e = vlm.set_image_size(10).unwrap_err();
    assert!(e.cause().contains("patches of 3 px do not fill a picture of 10 px"), "{e}");
    assert_eq!(e.hint_text(), Some("sizes near it that they fill: 9, 12"));
    let all = names(&mut vlm, |n| n.starts_with("vision."));
    vlm.train_only(&all);
    let load = Load { pictures: 2, tokens: 0 };
    let bytes = |vlm: &adfreeze::model::vlm::Vlm| {
        let mut layers = vlm.kept_by_layer(load, Kept::All).unwrap();
        // Of the projector some bytes are those of its parameters.
        assert!(layers.remove("projector").unwrap() > 0);
        layers.values().sum::<usize>()
    };
    let small = bytes(&vlm);
    vlm.set_image_size(12).unwrap();
    assert_eq!(bytes(&vlm) * 5, small * 17);
    let mut text = adfreeze::model::vlm::Vlm::new(None, None, vlm.language.clone(), None);
    assert!(text.set_image_size(12).unwrap_err().cause().contains("no vision tower"));
}
