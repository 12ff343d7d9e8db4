//! The look at pictures and captions, on a model whose embeddings are made to be what its pictures look like.

mod tiny;

use adfreeze::data::{IGNORE, ImageRef, Item, Pixels, Sample};
use adfreeze::model::params::Module;
use adfreeze::model::vlm::Vlm;
use adfreeze::spec::SelectFeature;
use adfreeze::train::align::{Alignment, measure};
use candle_core::{DType, Tensor};
use std::collections::BTreeMap;
use std::sync::Arc;
use tiny::*;

const EMBEDDINGS: &str = "language.embed_tokens.weight";

fn image(i: usize) -> ImageRef {
    ImageRef {
        path: format!("picture {i}").into(),
        resize: Default::default(),
        alpha: Default::default(),
        size: 6,
        tiles: None,
    }
}

/// A text that shows `pictures` and says `words`; what is asked is not part of the caption.
fn sample(pictures: &[usize], words: &[u32]) -> Item {
    let mut ids = vec![0, 2, 2];
    ids.extend(vec![IMAGE; 4 * pictures.len()]);
    let mut labels = vec![IGNORE; ids.len()];
    ids.extend(words);
    labels.extend(words.iter().map(|w| *w as i32));
    let id = format!("{pictures:?} {words:?}");
    Item::Sample(Sample {
        id,
        ids,
        labels,
        images: pictures.iter().map(|i| image(*i)).collect(),
        category: None,
        absent: vec![],
    })
}

fn pixels() -> Pixels {
    let of = |i: usize| noise(&format!("p{i}"), &[3 * 36], 1.0).to_dtype(DType::F32).unwrap().to_vec1().unwrap();
    (0..4).map(|i| (image(i), Arc::new(of(i)))).collect()
}

/// The mean visual token of each of the four pictures.
fn looks(vlm: &Vlm) -> Vec<Vec<f64>> {
    let all: Vec<f32> = pixels().values().flat_map(|p| p.to_vec()).collect();
    let batch = Tensor::from_vec(all, (4, 3, 6, 6), vlm.language.device()).unwrap();
    let tokens = vlm.project(&batch).unwrap().unwrap().1;
    tokens.reshape((4, 4, 12)).unwrap().mean(1).unwrap().to_vec2().unwrap()
}

/// Token 5 + i looks like picture `order[i]`.
fn model(order: [usize; 4]) -> Vlm {
    let mut vlm = vlm(clip(), -2, SelectFeature::Patch, &mlp(false), llama());
    let looks = looks(&vlm);
    let mut rows: Vec<Vec<f64>> = vlm.language.embed_tokens.value.to_vec2().unwrap();
    for (i, picture) in order.into_iter().enumerate() {
        rows[5 + i] = looks[picture].iter().map(|x| 3.0 * x).collect();
    }
    let table = Tensor::new(rows, vlm.language.device()).unwrap();
    vlm.assign(&BTreeMap::from([(EMBEDDINGS.to_string(), table)])).unwrap();
    vlm
}

fn look(vlm: &Vlm, items: &[Item], micro: usize) -> Alignment {
    measure(vlm, &items.iter().collect::<Vec<_>>(), micro, |_| Ok(pixels())).unwrap()
}

#[test]
fn words_that_look_like_their_pictures_have_cosine_one() {
    let items: Vec<Item> = [2usize, 0, 3, 1].map(|i| sample(&[i], &[5 + i as u32])).into();
    let vlm = model([0, 1, 2, 3]);
    for micro in [1, 3, 4] {
        let a = look(&vlm, &items, micro);
        assert!((a.cosine - 1.0).abs() < 1e-12 && a.retrieval == 1.0 && a.n == 4 && a.chance == 0.25, "{a:?}");
    }
    // Two words change places: two pictures find the wrong caption.
    let a = look(&model([1, 0, 2, 3]), &items, 4);
    assert!(a.cosine < 0.999 && a.retrieval == 0.5, "{a:?}");
}

#[test]
fn means_are_taken_over_pictures_and_over_words() {
    let (vlm, looks) = (model([0, 1, 2, 3]), looks(&model([0, 1, 2, 3])));
    let items = [sample(&[0, 3], &[5, 6, 6]), sample(&[1], &[7, 8])];
    let mix = |parts: &[(usize, f64)]| -> Vec<f64> {
        (0..12).map(|k| parts.iter().map(|(i, w)| w * looks[*i][k]).sum()).collect()
    };
    let cos = |a: &[f64], b: &[f64]| {
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
        dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
    };
    let first = cos(&mix(&[(0, 1.0), (3, 1.0)]), &mix(&[(0, 1.0), (1, 2.0)]));
    let second = cos(&mix(&[(1, 1.0)]), &mix(&[(2, 1.0), (3, 1.0)]));
    let a = look(&vlm, &items, 2);
    assert!((a.cosine - (first + second) / 2.0).abs() < 1e-12, "{a:?}, {first}, {second}");
}

#[test]
fn what_is_no_number_is_named() {
    let mut vlm = model([0, 1, 2, 3]);
    let name = "projector.linear_2.bias";
    let broken = (&vlm.params()[name] * f64::NAN).unwrap();
    vlm.assign(&BTreeMap::from([(name.to_string(), broken)])).unwrap();
    let items = [sample(&[0], &[5]), sample(&[1], &[6])];
    let e = measure(&vlm, &items.iter().collect::<Vec<_>>(), 2, |_| Ok(pixels())).unwrap_err();
    assert!(e.cause().contains("[0] [5]") && e.hint_text().is_some(), "{e}");
}
