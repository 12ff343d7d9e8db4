//! What a recorded pass keeps: as many bytes as were told beforehand, in every type, and the choice by free memory.

use super::tiny::*;
use adfreeze::adapters::lora;
use adfreeze::model::init::{Fresh, Place};
use adfreeze::model::language::Language;
use adfreeze::model::segment::Kept;
use adfreeze::model::vlm::{Load, Mode, Vlm};
use adfreeze::pipeline::memory::choose;
use adfreeze::spec::{Activations, Lora, SelectFeature};
use candle_core::DType;

fn adapted(vlm: &mut Vlm, name: &str, rank: usize, target: &str) {
    let target = vec![target.to_string()];
    let cfg = Lora { rank, alpha: 3.0, target, dora: name == "dora", ..Lora::default() };
    lora::attach(vlm, &cfg, name, key("lora")).unwrap();
}

/// Which parameters train, by name.
type Trains = fn(&str) -> bool;

#[test]
fn a_whole_model_keeps_as_many_bytes_as_it_says() {
    let mut vlm = vlm(clip(), -2, SelectFeature::Patch, &mlp(false), llama());
    adapted(&mut vlm, "sft", 2, "*");
    adapted(&mut vlm, "dpo", 3, "language.layers.*.self_attn.{q,v}_proj");
    adapted(&mut vlm, "dora", 1, "*.layers.*.{q,k}_proj");
    let batch = pack(&vlm, &sequences().iter().collect::<Vec<_>>());
    let load = Load { pictures: batch.pixels.as_ref().unwrap().dims()[0], tokens: batch.ids.len() };
    let cases: [(Trains, &[&str]); 5] = [
        (|n| n.contains("lora_"), &[]),
        (|n| n.contains("lora_"), &["*.layers[1..]"]),
        (|n| n.contains("layers.1.") && n.contains("lora_"), &[]),
        (|n| n.starts_with("projector."), &[]),
        (|n| n == "language.norm.weight", &[]),
    ];
    for (i, (trains, recompute)) in cases.into_iter().enumerate() {
        let chosen = names(&mut vlm, trains);
        vlm.train_only(&chosen);
        vlm.recompute(&recompute.iter().map(|p| p.to_string()).collect::<Vec<_>>()).unwrap();
        let mut sizes = Vec::new();
        for kept in [Kept::All, Kept::Minimal, Kept::Input] {
            let (_, saved) = vlm.forward(&batch, Mode { record: true, kept, ..Mode::default() }).unwrap();
            let told = vlm.kept_bytes(load, kept).unwrap();
            assert_eq!(saved.unwrap().kept_bytes(), told, "case {i}, {kept:?}");
            sizes.push(told);
        }
        // Nothing is kept for layers that pass a gradient on but train nothing: there is less to choose from.
        let differ = i < 3;
        assert!(if differ { sizes[0] > sizes[1] } else { sizes[0] == sizes[1] }, "case {i}: {sizes:?}");
        assert!(if i < 4 { sizes[1] > sizes[2] } else { sizes == [0, 0, 0] }, "case {i}: {sizes:?}");
    }
}

#[test]
fn in_narrow_types_sums_stay_wide() {
    for dtype in [DType::F32, DType::BF16] {
        let mut source = Fresh { key: key("weights"), place: Place { dtype, ..Place::cpu() } };
        let mut vlm = Vlm::new(None, None, Language::new(llama(), &mut source).unwrap(), IMAGE);
        adapted(&mut vlm, "sft", 8, "*");
        adapted(&mut vlm, "dora", 8, "language.layers.*");
        let chosen = names(&mut vlm, |n| n.contains("lora_"));
        vlm.train_only(&chosen);
        let text: Vec<_> = sequences().into_iter().map(|s| Sequence { pictures: vec![], ..s }).collect();
        let batch = pack(&vlm, &text.iter().collect::<Vec<_>>());
        for kept in [Kept::All, Kept::Minimal, Kept::Input] {
            let (_, saved) = vlm.forward(&batch, Mode { record: true, kept, ..Mode::default() }).unwrap();
            let load = Load { pictures: 0, tokens: batch.ids.len() };
            assert_eq!(saved.unwrap().kept_bytes(), vlm.kept_bytes(load, kept).unwrap(), "{dtype:?}, {kept:?}");
        }
    }
}

#[test]
fn auto_keeps_the_most_that_fits() {
    let mut vlm = vlm(clip(), -2, SelectFeature::Patch, &mlp(false), llama());
    adapted(&mut vlm, "sft", 2, "*");
    let chosen = names(&mut vlm, |n| n.contains("lora_"));
    vlm.train_only(&chosen);
    let loads = [Load { pictures: 0, tokens: 900 }, Load { pictures: 4, tokens: 500 }];
    let need = |kept| {
        let of = |l: &Load| vlm.kept_bytes(*l, kept).unwrap() + 2 * vlm.largest_layer(*l).unwrap();
        (loads.iter().map(of).max().unwrap() + 12_000) as u64
    };
    let pick = |activations, free| choose(activations, &vlm, &loads, 12_000, || Ok(free)).unwrap();
    // Nine tenths of what is free must do.
    let least = |kept| (need(kept)..).find(|free| free - free / 10 >= need(kept)).unwrap();
    for (free, kept, name) in [
        (least(Kept::All), Kept::All, "none"),
        (least(Kept::All) - 1, Kept::Minimal, "minimal"),
        (least(Kept::Minimal), Kept::Minimal, "minimal"),
        (least(Kept::Minimal) - 1, Kept::Input, "recompute"),
        (0, Kept::Input, "recompute"),
    ] {
        let (found, line) = pick(Activations::Auto, Some(free));
        assert_eq!(found, kept, "{free} bytes free");
        let line = line.unwrap();
        assert!(line.starts_with(&format!("activations: {name} (")) && line.ends_with(" free)"), "{line}");
    }
    let (found, line) = pick(Activations::Auto, None);
    assert!(found == Kept::Minimal && line.unwrap().contains("cannot be told"));
    for (activations, kept) in
        [(Activations::None, Kept::All), (Activations::Minimal, Kept::Minimal), (Activations::Recompute, Kept::Input)]
    {
        let untold = choose(activations, &vlm, &loads, 12_000, || panic!("it is said already")).unwrap();
        assert_eq!(untold, (kept, None));
    }
}
