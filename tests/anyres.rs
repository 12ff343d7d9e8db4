//! Pictures in tiles: pixel values, numbers of tokens, packed visual tokens and log-probabilities of transformers' LLaVA-NeXT, and
//! f64 gradients.

mod tiny;

use adfreeze::adapters::attach;
use adfreeze::checkpoint::safetensors;
use adfreeze::data::tiles::Tiles;
use adfreeze::data::{IGNORE, ImageProcessor, Picture, Pixels, Sample, Sight};
use adfreeze::model::init::{FromWeights, NEWLINE, Place, newline};
use adfreeze::model::language::Language;
use adfreeze::model::projector::Projector;
use adfreeze::model::segment::Kept;
use adfreeze::model::vision::Tower;
use adfreeze::model::visual::{self, Layout};
use adfreeze::model::vlm::{Batch, Mode, Vlm};
use adfreeze::model::weights::Weights;
use adfreeze::spec::{self, Data, Deliver, Resize, SelectFeature};
use adfreeze::train::collate::collate;
use candle_core::{DType, Tensor};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tiny::*;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/anyres").join(name)
}

/// The golden pictures, each with the tokens that transformers' processor expects.
fn pictures() -> BTreeMap<String, usize> {
    let counts: serde_json::Value = serde_json::from_slice(&std::fs::read(golden("counts.json")).unwrap()).unwrap();
    let of = |(name, n): (&String, &serde_json::Value)| (name.clone(), n.as_u64().unwrap() as usize);
    counts["tokens"].as_object().unwrap().iter().map(of).collect()
}

fn sight() -> Sight {
    Sight { size: 12, tokens: 16, side: Some(4), deliver: Deliver::Splice }
}

fn picture(name: &str, how: &Data) -> Picture {
    Picture::new(golden(&format!("images/{name}.png")), how)
}

fn anyres() -> Data {
    Data { resize: Resize::Anyres, ..Data::new(PathBuf::new()) }
}

fn model() -> Vlm {
    let (config, mut weights) = Weights::whole(&golden("model")).unwrap();
    let mut src = FromWeights { weights: &mut weights, place: &Place::cpu() };
    let tower = Tower::new(config.vision.clone(), config.select_layer, config.select_feature, &mut src).unwrap();
    let (d_in, d_out) = (config.vision.hidden_size, config.text.hidden_size);
    let cfg: spec::Projector = toml::from_str::<BTreeMap<String, _>>("p = { mlp = {} }").unwrap().remove("p").unwrap();
    let projector = Projector::new(&cfg, d_in, d_out, config.projector_bias, &mut src).unwrap();
    let row_end = newline(d_out, &mut src).unwrap();
    let language = Language::new(config.text.clone(), &mut src).unwrap();
    weights.finish().unwrap();
    let mut vlm = Vlm::new(Some(tower), Some(projector), language, config.image_token_index);
    vlm.newline = Some(row_end);
    vlm
}

#[test]
fn pixels_tokens_and_log_probabilities_agree_with_transformers() {
    let values = safetensors::load(&golden("values.safetensors")).unwrap();
    let processor = ImageProcessor::from_dir(&golden("model")).unwrap();
    let (vlm, how) = (model(), anyres());
    let words = [5u32, 9, 2, 117, 230, 4];
    let mut all = (Vec::new(), Pixels::new(), Vec::new());
    for (name, n) in pictures() {
        let value = |part: &str| values[&format!("{name}.{part}")].to_dtype(DType::F64).unwrap();
        let image = sight().of(&picture(&name, &how)).unwrap();
        let tiles = image.tiles.unwrap();
        assert_eq!((sight().image_tokens(&image), tiles.layout().len()), (n, n), "{name}");

        let pixels = processor.load(&image).unwrap();
        let shape = [image.pieces(), 3, 12, 12];
        assert_eq!(value("pixels").dims(), shape, "{name}");
        let ours = Tensor::from_vec(pixels.clone(), &shape, &candle_core::Device::Cpu).unwrap();
        let off = distance(&ours.to_dtype(DType::F64).unwrap(), &value("pixels"));
        assert!(off < 1e-6, "{name}: pixel values are off by {off:e}");

        let (_, tokens) = vlm.project(&ours).unwrap().unwrap();
        let newline = vlm.newline.as_ref().unwrap().value.reshape((1, 16)).unwrap();
        let table = Tensor::cat(&[&tokens, &newline], 0).unwrap();
        let layout = Layout { pieces: tiles.pieces(), tokens: tiles.layout() };
        let rows = visual::rows(&[Some(layout)], image.pieces(), 16).unwrap().remove(0);
        let index = Tensor::new(rows, &candle_core::Device::Cpu).unwrap();
        let packed = table.index_select(&index, 0).unwrap().to_dtype(DType::F64).unwrap();
        let off = distance(&packed, &value("tokens"));
        assert!(off < 2e-6, "{name}: visual tokens are off by {off:e}");

        let ids: Vec<u32> = [3].into_iter().chain(vec![380; n]).chain(words).collect();
        let first = ids.len() - words.len();
        let label = |(t, id): (usize, &u32)| if t < first { IGNORE } else { *id as i32 };
        let labels = ids.iter().enumerate().map(label).collect();
        all.1.insert(image.clone(), Arc::new(pixels));
        all.2.push(value("logps"));
        all.0.push(Sample { id: name, ids, labels, images: vec![image], category: None, absent: vec![] });
    }
    // All of them in one batch, with one that is seen at once among them.
    let plain = sight().of(&picture("odd", &Data::new(PathBuf::new()))).unwrap();
    let ids: Vec<u32> = [vec![380; 16], vec![7, 8]].concat();
    let labels = ids.iter().map(|id| if *id == 8 { 8 } else { IGNORE }).collect();
    all.1.insert(plain.clone(), Arc::new(processor.load(&plain).unwrap()));
    let odd = Sample { id: "plain".into(), ids, labels, images: vec![plain], category: None, absent: vec![] };
    let alone = vlm.forward(&collate(&[&odd], &all.1).unwrap(), Mode::default()).unwrap().0.logps().unwrap();
    all.0.insert(3, odd);
    let batch = collate(&all.0.iter().collect::<Vec<_>>(), &all.1).unwrap();
    let mut logps = vlm.forward(&batch, Mode::default()).unwrap().0.logps().unwrap();
    let apart = logps.remove(3 * words.len());
    assert!((apart - alone[0]).abs() < 1e-5, "{apart} {alone:?}");
    let want: Vec<f64> = all.2.iter().flat_map(flat).collect();
    let off = logps.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(logps.len() == want.len() && off < 5e-6, "log-probabilities are off by {off:e}");
}

/// Two pictures in tiles and one that is seen at once; the second text shows the first picture again.
fn tiled_batch(vlm: &Vlm) -> Batch {
    let tiles = |picture, grid| Tiles { picture, grid, side: 2 };
    let layout = |t: Tiles| Some(Layout { pieces: t.pieces(), tokens: t.layout() });
    let layouts = vec![layout(tiles([5, 20], [1, 2])), None, layout(tiles([30, 9], [3, 1]))];
    let count = |picture: usize| vlm.deliver.image_tokens(layouts[picture].as_ref().map_or(4, |l| l.tokens.len()));
    let mut batch = Batch { layouts: layouts.clone(), ..Batch::default() };
    for (owner, (text, shown)) in
        [([0, 3, 7, 1], vec![0, 1]), ([0, 9, 2, 1], vec![2, 0]), ([0, 4, 6, 1], vec![])].into_iter().enumerate()
    {
        let start = batch.ids.len();
        batch.ids.push(text[0]);
        for picture in shown {
            batch.ids.extend(vec![IMAGE; count(picture)]);
            batch.pictures.push(picture as u32);
        }
        for id in &text[1..] {
            batch.targets.push((batch.ids.len() as u32 - 1, *id));
            batch.owners.push(owner);
            batch.ids.push(*id);
        }
        batch.lengths.push(batch.ids.len() - start);
    }
    batch.pixels = Some(noise("pieces", &[3 + 1 + 4, 3, 6, 6], 1.0));
    batch
}

fn tiny_model(projector: &str, deliver: Deliver) -> Vlm {
    let cfg: spec::Projector =
        toml::from_str::<BTreeMap<String, _>>(&format!("p = {projector}")).unwrap().remove("p").unwrap();
    let mut vlm = vlm(clip(), -2, SelectFeature::Patch, &cfg, llama());
    vlm.newline = Some(newline(12, &mut source()).unwrap());
    vlm.deliver = deliver;
    if deliver == Deliver::CrossAttention {
        let text = "a = { cross_attention = { every = 1, heads = 2, head_dim = 3, ff_mult = 1, sees = 'all' } }";
        let adapter = toml::from_str::<BTreeMap<String, _>>(text).unwrap().remove("a").unwrap();
        attach(&mut vlm, &adapter, "new", key("adapter")).unwrap();
    }
    perturb(&mut vlm);
    vlm
}

#[test]
fn gradients_of_tiles_in_the_text_and_beside_it() {
    for deliver in [Deliver::Splice, Deliver::CrossAttention] {
        for projector in ["{ linear = {} }", "{ bottleneck = { dim = 3 } }"] {
            let mut vlm = tiny_model(projector, deliver);
            let batch = tiled_batch(&vlm);
            let weights = coefs(batch.targets.len());
            let mode = Mode { kept: Kept::Minimal, ..Mode::default() };
            let newline_alone = names(&mut vlm, |n| n == NEWLINE);
            vlm.train_only(&newline_alone);
            let alone = gradients(&vlm, &batch, &weights, mode);
            let chosen = names(&mut vlm, |n| {
                n.starts_with("projector.") || n.contains("position_embedding") || n.contains("layers.0.mlp.fc1")
            });
            vlm.train_only(&chosen);
            let frozen = snapshot(&mut vlm);
            let grads = gradients(&vlm, &batch, &weights, mode);
            assert!(snapshot(&mut vlm) == frozen, "{deliver:?}: a parameter changed");
            assert!(alone.len() == 1 && bits(&alone[NEWLINE]) == bits(&grads[NEWLINE]), "{deliver:?}");
            let what = format!("{projector}, {deliver:?}");
            check_params(&what, &mut vlm, &grads, |_| false, |v| loss(v, &batch, &weights, mode));
        }
    }
}

#[test]
fn what_does_not_fit_is_an_error() {
    let of = |how: Data, s: Sight| s.of(&picture("odd", &how)).map(|i| i.tiles.unwrap().grid);
    let grids = |list: &[[usize; 2]]| Data { grid_pinpoints: Some(list.to_vec()), ..anyres() };
    assert_eq!(of(anyres(), sight()).unwrap(), [2, 2]);
    assert_eq!(of(grids(&[[12, 12], [12, 24]]), sight()).unwrap(), [1, 2]);
    assert_eq!(of(grids(&[[12, 12]]), sight()).unwrap(), [1, 1]);
    let e = of(grids(&[[12, 20]]), sight()).unwrap_err();
    assert!(e.cause().contains("[12, 20] is no multiple of the 12 px"), "{e}");
    let e = of(anyres(), Sight { side: None, ..sight() }).unwrap_err();
    assert!(e.cause().contains("do not stand as a square") && e.hint_text().unwrap().contains("linear"), "{e}");

    let mut vlm = tiny_model("{ linear = {} }", Deliver::Splice);
    let batch = tiled_batch(&vlm);
    let short = Batch { ids: batch.ids[1..].to_vec(), ..batch.clone() };
    assert!(vlm.forward(&batch, Mode::default()).is_ok());
    let few = Batch { pixels: Some(batch.pixels.as_ref().unwrap().narrow(0, 0, 7).unwrap()), ..batch.clone() };
    let e = vlm.forward(&few, Mode::default()).err().unwrap();
    assert!(e.cause().contains("layouts do not belong to 7 pictures"), "{e}");
    let mut ids = short.ids;
    ids.insert(0, IMAGE);
    let e = vlm.forward(&Batch { ids, ..batch.clone() }, Mode::default()).err().unwrap();
    assert!(e.cause().contains("image tokens for 4 pictures that take"), "{e}");
    vlm.newline = None;
    let e = vlm.forward(&batch, Mode::default()).err().unwrap();
    assert!(e.cause().contains("no newline token"), "{e}");
}
