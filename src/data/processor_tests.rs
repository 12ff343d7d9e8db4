use super::*;
use crate::data::image::load_rgb;
use crate::spec::{Alpha, Resize};
use std::path::Path;

const TESTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests");

/// tests/pictures/make_processors.py: what transformers gives, configuration by configuration.
#[test]
fn every_configuration_gives_the_values_of_transformers() {
    let bytes = std::fs::read(Path::new(TESTS).join("pictures/processors.json")).unwrap();
    let cases: Vec<Value> = serde_json::from_slice(&bytes).unwrap();
    for case in &cases {
        let p = ImageProcessor::from_json(&case["config"]).unwrap_or_else(|e| panic!("{}: {e}", case["config"]));
        assert_eq!(p, ImageProcessor::from_json(&p.to_json()).unwrap(), "{}", case["config"]);
        let edge = case["edge"].as_u64().unwrap() as usize;
        assert_eq!(p.crop, edge, "{}", case["config"]);
        let path = Path::new(TESTS).join("golden/a/images").join(case["image"].as_str().unwrap());
        let got = p.process(load_rgb(&path, Alpha::Drop).unwrap(), Resize::Crop);
        let mean = got.iter().map(|v| f64::from(v.abs())).sum::<f64>() / got.len() as f64;
        let scale = case["mean"].as_f64().unwrap();
        assert!((mean - scale).abs() < 1e-5 * scale.max(1.0), "{}: {mean} for {scale}", case["config"]);
        for value in case["values"].as_array().unwrap() {
            let (at, want) = (value[0].as_u64().unwrap() as usize, value[1].as_f64().unwrap());
            assert!(
                (f64::from(got[at]) - want).abs() < 2e-5 * scale.max(1.0),
                "{}: {at}: {} for {want}",
                case["config"],
                got[at]
            );
        }
    }
    assert!(cases.len() >= 50, "{}", cases.len());
}

#[test]
fn what_is_not_built_is_refused_by_its_name() {
    let class = |name: &str| json!({ "image_processor_type": name });
    let mut cases = vec![
        (class("Qwen2VLImageProcessor"), "Qwen2VLImageProcessor"),
        (class("Siglip2ImageProcessorFast"), "Siglip2ImageProcessorFast"),
        (json!({ "do_resize": false }), "do_resize"),
        (json!({ "do_resize": null }), "do_resize"),
        (json!({ "do_normalize": "yes" }), "do_normalize"),
        (json!({ "do_center_crop": false }), "do_center_crop"),
        (json!({ "do_pad": true, "pad_size": { "height": 300, "width": 300 } }), "pad_size"),
        (json!({ "size": { "longest_edge": 384 } }), "size"),
        (json!({ "size": { "shortest_edge": 384, "longest_edge": 500 } }), "size"),
        (json!({ "size": { "max_height": 384, "max_width": 384 } }), "size"),
        (json!({ "size": [224, 225] }), "size"),
        (json!({ "size": null }), "size"),
        (json!({ "size": { "shortest_edge": 1_000_000 } }), "size"),
        (json!({ "crop_size": { "height": 10, "width": 20 } }), "crop_size"),
        (json!({ "resample": 0 }), "resample = 0"),
        (json!({ "resample": "nearest" }), "nearest"),
        (json!({ "rescale_factor": "1/255" }), "rescale_factor"),
        (json!({ "image_mean": null }), "image_mean"),
        (json!({ "image_mean": [0.5, 0.5] }), "image_mean"),
        (json!({ "image_std": [0.5, 0, 0.5] }), "image_std"),
        (json!([]), "no JSON object"),
    ];
    let not_built = NOT_BUILT.map(|key| (json!({ key: true }), key));
    cases.extend(not_built);
    for (config, words) in cases {
        let e = ImageProcessor::from_json(&config).unwrap_err();
        assert!(e.cause().contains(words) && e.hint_text().is_some(), "{config}: {e}");
    }
    // Switched off, they change nothing.
    for key in NOT_BUILT {
        assert_eq!(
            ImageProcessor::from_json(&json!({ key: false })).unwrap(),
            ImageProcessor::from_json(&json!({})).unwrap()
        );
    }
}

#[test]
fn a_filter_has_a_number_or_a_name() {
    for (resample, want) in [
        (json!(3), Filter::Bicubic),
        (json!("bicubic"), Filter::Bicubic),
        (json!("PILImageResampling.LANCZOS"), Filter::Lanczos),
        (json!("BILINEAR"), Filter::Bilinear),
    ] {
        assert_eq!(ImageProcessor::from_json(&json!({ "resample": resample })).unwrap().filter, want);
    }
}
