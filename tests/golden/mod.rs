//! What the cases of `tests/parity.rs` share: a golden folder, its tolerances, its model.

pub mod dpo_losses;
pub mod forward;
pub mod gradients;
pub mod merge;
pub mod pixels;
pub mod tokens;
pub mod training;

use adfreeze::adapters::lora;
use adfreeze::checkpoint::{peft, safetensors};
use adfreeze::data::image::ImageProcessor;
use adfreeze::data::source;
use adfreeze::data::{Item, Pixels, Sample, Sight, TextEncoder, TextSettings, load_pixels};
use adfreeze::model::container::WholeConfig;
use adfreeze::model::init::{FromWeights, Place};
use adfreeze::model::language::Language;
use adfreeze::model::projector::Projector;
use adfreeze::model::vision::Tower;
use adfreeze::model::vlm::{Batch, Vlm};
use adfreeze::model::weights::Weights;
use adfreeze::spec::{self, Deliver, MlpProjector, Template};
use adfreeze::train::collate::collate;
use candle_core::{DType, Tensor};
use serde_json::Value;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

/// One folder of reference values.
pub struct Golden {
    pub dir: PathBuf,
    pub json: Value,
    pub key_map: Vec<Value>,
    /// The cases that were off.
    pub off: RefCell<Vec<String>>,
}

/// Committed folders, and the one that the environment names.
pub fn folders() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut all: Vec<PathBuf> = std::fs::read_dir(root).unwrap().map(|e| e.unwrap().path()).collect();
    all.retain(|p| p.join("golden.json").exists());
    all.sort();
    if let Some(extra) = std::env::var_os("ADFREEZE_GOLDEN") {
        let extra = PathBuf::from(extra);
        assert!(extra.join("golden.json").exists(), "ADFREEZE_GOLDEN={} holds no golden.json", extra.display());
        all.push(extra);
    }
    all
}

pub fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))).unwrap()
}

pub fn flat(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Largest absolute difference; shapes must agree up to leading ones.
pub fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.elem_count(), b.elem_count(), "{:?} and {:?}", a.dims(), b.dims());
    flat(a).iter().zip(flat(b)).map(|(x, y)| if x.is_nan() { f64::INFINITY } else { (x - y).abs() }).fold(0.0, f64::max)
}

impl Golden {
    pub fn open(dir: &Path) -> Self {
        let key_map = json(&dir.join("key_map.json")).as_array().unwrap().clone();
        Self { dir: dir.to_path_buf(), json: json(&dir.join("golden.json")), key_map, off: RefCell::default() }
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.dir.join(file)
    }

    pub fn tensors(&self, file: &str) -> BTreeMap<String, Tensor> {
        safetensors::load(&self.path(file)).unwrap()
    }

    /// The suggested tolerance at a path of keys.
    pub fn tolerance(&self, keys: &[&str]) -> f64 {
        let mut v = &self.json["suggested"];
        for k in keys {
            v = &v[k];
        }
        v.as_f64().unwrap_or_else(|| panic!("{}: no tolerance {keys:?}", self.dir.display()))
    }

    /// Prints the case, and notes it if `error` is above `tolerance`.
    pub fn case(&self, name: &str, error: f64, tolerance: f64) {
        let folder = self.dir.file_name().unwrap().to_string_lossy().into_owned();
        let line = format!("parity {folder}: {name}: error {error:.2e}, tolerance {tolerance:.0e}\n");
        // Not `println!`, which the test harness keeps back; in one piece, because tests run beside each other.
        std::io::stdout().write_all(line.as_bytes()).unwrap();
        if error.is_nan() || error > tolerance {
            self.off.borrow_mut().push(format!("{folder}: {name}: {error:e} is above {tolerance:e}"));
        }
    }

    /// The whole model in a folder (`model`, `model_hub_naming`).
    pub fn model(&self, folder: &str) -> Vlm {
        let (config, mut weights) = Weights::whole(&self.path(folder)).unwrap();
        let mut src = FromWeights { weights: &mut weights, place: &Place::cpu() };
        let projector = self.projector_config(&config);
        let tower = Tower::new(config.vision.clone(), config.select_layer, config.select_feature, &mut src).unwrap();
        let (d_in, d_out) = (config.vision.hidden_size, config.text.hidden_size);
        let projector = Projector::new(&projector, d_in, d_out, config.projector_bias, &mut src).unwrap();
        let language = Language::new(config.text.clone(), &mut src).unwrap();
        weights.finish().unwrap();
        Vlm::new(Some(tower), Some(projector), language, config.image_token_index)
    }

    /// The same model from its three parts.
    pub fn parts(&self, vision: &str) -> Vlm {
        let config = WholeConfig::from_dir(&self.path("model")).unwrap();
        let (v, mut weights) = Weights::vision(&self.path(vision)).unwrap();
        let mut src = FromWeights { weights: &mut weights, place: &Place::cpu() };
        let tower = Tower::new(v, config.select_layer, config.select_feature, &mut src).unwrap();
        weights.finish().unwrap();
        let mut weights = Weights::projector(&self.path("projector_init.safetensors")).unwrap();
        let mut src = FromWeights { weights: &mut weights, place: &Place::cpu() };
        let cfg = self.projector_config(&config);
        let (d_in, d_out) = (config.vision.hidden_size, config.text.hidden_size);
        let projector = Projector::new(&cfg, d_in, d_out, config.projector_bias, &mut src).unwrap();
        weights.finish().unwrap();
        let (text, mut weights) = Weights::language(&self.path("language")).unwrap();
        let mut src = FromWeights { weights: &mut weights, place: &Place::cpu() };
        let language = Language::new(text, &mut src).unwrap();
        weights.finish().unwrap();
        Vlm::new(Some(tower), Some(projector), language, config.image_token_index)
    }

    fn projector_config(&self, config: &WholeConfig) -> spec::Projector {
        let (act, hidden) = (config.projector_act, None);
        spec::Projector::Mlp(MlpProjector { source: None, depth: 2, hidden, act, input_norm: false, norm: false })
    }

    /// The model with the fixture's adapter.
    pub fn with_lora(&self) -> Vlm {
        let mut vlm = self.model("model");
        let adapter = peft::LoraAdapter::load(&self.path("lora_init"), "start").unwrap();
        lora::attach_loaded(&mut vlm, &adapter).unwrap();
        vlm.plan();
        vlm
    }

    pub fn encoder(&self) -> TextEncoder {
        let config = WholeConfig::from_dir(&self.path("model")).unwrap();
        let settings = TextSettings {
            image_token: "<image>".into(),
            image_token_id: Some(config.image_token_index),
            vocab_size: config.text.vocab_size,
            sight: Some(Sight {
                size: self.images().crop,
                tokens: self.json["settings"]["n_image_tokens"].as_u64().unwrap() as usize,
                side: None,
                deliver: Deliver::Splice,
            }),
            bos: config.text.bos_token_id,
            eos: config.text.eos_token_ids.clone(),
            system: Some(self.json["settings"]["system"].as_str().unwrap().to_string()),
            date: None,
            max_seq_len: 4096,
            truncate: false,
        };
        TextEncoder::load(&self.path("model"), settings).unwrap()
    }

    pub fn images(&self) -> ImageProcessor {
        ImageProcessor::from_dir(&self.path("model")).unwrap()
    }

    fn data(&self, file: &str) -> spec::Data {
        toml::from_str(&format!("path = {:?}\nimages = {:?}", self.path(file), self.path("images"))).unwrap()
    }

    /// Items of `data/plain.json`, `data/sft.json` or `data/dpo.jsonl`, in the file's order.
    pub fn items(&self, file: &str, template: Template) -> Vec<Item> {
        let (data, encoder) = (self.data(file), self.encoder());
        if file.contains("dpo") {
            let pairs = source::preferences(&data).unwrap();
            let encode = |p| encoder.preference(p, template).map(|(c, r)| Item::Pair(c, r)).unwrap();
            return pairs.iter().map(encode).collect();
        }
        let all = source::conversations(&data).unwrap();
        all.iter().map(|c| Item::Sample(encoder.conversation(c, template).unwrap())).collect()
    }

    pub fn pixels(&self, items: &[Item]) -> Pixels {
        load_pixels(items, Some(&self.images())).unwrap()
    }

    /// The samples of the fixture's forward batch, packed, with the pixels that we computed ourselves.
    pub fn batch(&self, key: &str, file: &str, template: Template) -> (Vec<Sample>, Batch) {
        let items = self.items(file, template);
        let pixels = self.pixels(&items);
        let samples: Vec<Sample> = self.json["forward_batch"][key]
            .as_array()
            .unwrap()
            .iter()
            .map(|id| items.iter().flat_map(Item::samples).find(|s| s.id == id.as_str().unwrap()).unwrap().clone())
            .collect();
        let batch = collate(&samples.iter().collect::<Vec<_>>(), &pixels).unwrap();
        (samples, batch)
    }

    /// Canonical name of a tensor as the fixture calls it (its file name, or PEFT's name of a LoRA matrix).
    pub fn canonical(&self, name: &str) -> String {
        if let Some((module, matrix)) = name.split_once(".lora_") {
            let module = module.replace("base_model.model.model.language_model.", "language.");
            return format!("{module}.lora_{}.start.weight", matrix.strip_suffix(".weight").unwrap());
        }
        let entry = |k: &Value| k["transformers5_file"] == name || k["module"] == name;
        let known = self.key_map.iter().find(|k| entry(k)).unwrap_or_else(|| panic!("no key {name}"));
        let hub = known["hub_file"].as_str().unwrap();
        let pairs = [
            ("vision_tower.vision_model.", "vision."),
            ("multi_modal_projector.", "projector."),
            ("language_model.model.", "language."),
            ("language_model.", "language."),
        ];
        let (from, to) = pairs.iter().find(|(from, _)| hub.starts_with(from)).unwrap();
        hub.replacen(from, to, 1)
    }
}
