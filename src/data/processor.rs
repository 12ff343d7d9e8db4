//! Reading HF's picture preparation: `preprocessor_config.json`, with the defaults of the class that it names. A key that would change
//! pixels and is not built is refused by its name.

use super::image::ImageProcessor;
use super::resize::Filter;
use crate::bail;
use crate::error::{Error, Result};
use serde_json::{Value, json};

/// Mean and standard deviation that OpenAI's CLIP was trained with.
const CLIP_MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
const CLIP_STD: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];

/// What a class of transformers 5.23 does where the file is silent.
struct Defaults {
    size: usize,
    square: bool,
    crop: Option<usize>,
    mean: [f32; 3],
    std: [f32; 3],
    filter: Filter,
    /// A single number as `size` means both edges.
    number_is_square: bool,
    /// `do_pad` puts the picture into a square of the mean colour first.
    pads: bool,
}

const CLIP: Defaults = Defaults {
    size: 224,
    square: false,
    crop: Some(224),
    mean: CLIP_MEAN,
    std: CLIP_STD,
    filter: Filter::Bicubic,
    number_is_square: false,
    pads: false,
};

const SIGLIP: Defaults = Defaults { square: true, crop: None, mean: [0.5; 3], std: [0.5; 3], ..CLIP };

/// Classes that do nothing but what their keys say, and LLaVA's.
const CLASSES: [(&str, Defaults); 9] = [
    ("CLIP", CLIP),
    ("ChineseCLIP", CLIP),
    ("Bit", CLIP),
    ("Llava", Defaults { pads: true, ..CLIP }),
    ("LlavaNext", CLIP),
    ("Siglip", SIGLIP),
    ("ViT", Defaults { filter: Filter::Bilinear, number_is_square: true, ..SIGLIP }),
    ("DeiT", Defaults { size: 256, crop: Some(224), number_is_square: true, ..SIGLIP }),
    ("Blip", Defaults { size: 384, square: true, crop: None, number_is_square: true, ..CLIP }),
];

/// Keys of other classes that change pixels.
const NOT_BUILT: [&str; 24] = [
    "use_square_size",
    "offset",
    "rescale_offset",
    "do_flip_channel_order",
    "do_grayscale",
    "do_thumbnail",
    "do_align_long_axis",
    "do_crop_margin",
    "do_image_splitting",
    "do_split_image",
    "do_pan_and_scan",
    "crop_to_patches",
    "do_color_quantize",
    "do_resize_with_pad",
    "size_divisor",
    "crop_pct",
    "max_image_size",
    "max_num_patches",
    "min_pixels",
    "max_pixels",
    "keep_aspect_ratio",
    "ensure_multiple_of",
    "patch_size",
    "fill_color",
];

fn defaults(v: &Value) -> Result<Defaults> {
    let named =
        ["image_processor_type", "feature_extractor_type"].iter().find_map(|k| v.get(*k).and_then(Value::as_str));
    let Some(named) = named else { return Ok(CLIP) };
    let class = ["Fast", "Pil"].iter().fold(named, |n, end| n.strip_suffix(end).unwrap_or(n));
    let class = ["ImageProcessor", "FeatureExtractor"].iter().fold(class, |n, end| n.strip_suffix(end).unwrap_or(n));
    let names = || CLASSES.iter().map(|(name, _)| format!("{name}ImageProcessor")).collect::<Vec<_>>().join(", ");
    match CLASSES.into_iter().find(|(name, _)| *name == class) {
        Some((_, defaults)) => Ok(defaults),
        None => bail!("image_processor_type {named} is not supported";
            "supported are {}; if one of them does the same with this file's keys, write its name there", names()),
    }
}

impl ImageProcessor {
    /// CLIP's own way, at a tower's picture size.
    pub fn clip(image_size: usize) -> Self {
        Self {
            size: image_size,
            square: false,
            crop: image_size,
            mean: CLIP_MEAN,
            std: CLIP_STD,
            rescale: 1.0 / 255.0,
            filter: Filter::Bicubic,
            pad: false,
        }
    }

    /// Reads a configuration.
    ///
    /// # Errors
    /// A class, or a key of this one, that is not built.
    pub(super) fn from_json(v: &Value) -> Result<Self> {
        if !v.is_object() {
            bail!("it is no JSON object"; "copy the file again from the repository that the vision tower comes from")
        }
        let class = defaults(v)?;
        if let Some((key, value)) =
            NOT_BUILT.iter().find_map(|k| v.get(*k).filter(|v| !v.is_null() && **v != json!(false)).map(|v| (k, v)))
        {
            bail!("{key} = {value} is not supported";
                "use a vision tower without it; if the picture's pixels do not depend on it here, take the key out")
        }
        // Null is no silence: a class's own value gives way to it, and it is as false.
        let on = |key: &str, default: bool| match v.get(key) {
            None => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            Some(Value::Null) => Ok(false),
            Some(other) => Err(Error::new(format!("{key} = {other} is not supported")).hint("write true or false")),
        };
        if !on("do_resize", true)? {
            bail!("do_resize = false is not supported"; "pictures of one size are needed: set do_resize to true")
        }
        let number_is_square = on("default_to_square", class.number_is_square)?;
        let (size, square) = edge(v, "size", number_is_square)?.unwrap_or((class.size, class.square));
        let crop = if on("do_center_crop", class.crop.is_some())? {
            edge(v, "crop_size", true)?.map(|(n, _)| n).or(class.crop).unwrap_or(size)
        } else if square {
            size
        } else {
            bail!("do_center_crop = false with a shortest edge gives pictures of different sizes";
                "set do_center_crop to true, or size to {{\"height\": {size}, \"width\": {size}}}")
        };
        let do_pad = on("do_pad", false)?;
        let padded = if v.get("pad_size").is_some_and(|v| !v.is_null()) { edge(v, "pad_size", true)? } else { None };
        if do_pad && !class.pads && padded.is_some_and(|(n, _)| n != crop) {
            bail!("do_pad with a pad_size other than the pictures' is not supported"; "take do_pad out, or make pad_size {crop}")
        }
        let (mean, std) = if on("do_normalize", true)? {
            (triple(v, "image_mean", class.mean)?, triple(v, "image_std", class.std)?)
        } else {
            ([0.0; 3], [1.0; 3])
        };
        if !std.iter().all(|s| *s > 0.0) {
            bail!("image_std = {std:?} makes no picture of finite numbers: values are divided by it";
                "image_std holds three numbers above 0, e.g. {CLIP_STD:?}")
        }
        let rescale = match (on("do_rescale", true)?, v.get("rescale_factor")) {
            (false, _) => 1.0,
            (true, None) => 1.0 / 255.0,
            (true, Some(n)) => match n.as_f64() {
                Some(n) => n,
                None => bail!("rescale_factor = {n} is not supported"; "write a number, normally 1/255"),
            },
        };
        Ok(Self { size, square, crop, mean, std, rescale, filter: filter(v, class.filter)?, pad: do_pad && class.pads })
    }

    /// The processor as `preprocessor_config.json`.
    pub fn to_json(&self) -> Value {
        let both = |n: usize| json!({ "height": n, "width": n });
        let mut out = json!({
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": true,
            "do_resize": true,
            "size": if self.square { both(self.size) } else { json!({ "shortest_edge": self.size }) },
            "resample": match self.filter { Filter::Lanczos => 1, Filter::Bilinear => 2, Filter::Bicubic => 3 },
            "do_center_crop": true,
            "crop_size": both(self.crop),
            "do_rescale": true,
            "rescale_factor": self.rescale,
            "do_normalize": true,
            "image_mean": self.mean.map(shortest_f64),
            "image_std": self.std.map(shortest_f64),
        });
        if self.pad {
            out["image_processor_type"] = json!("LlavaImageProcessor");
            out["do_pad"] = json!(true);
        }
        out
    }
}

/// The shortest decimal that reads back as this f32, as f64: what stood in the configuration file.
pub(super) fn shortest_f64(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}

/// A resampling filter by Pillow's number or its name.
fn filter(v: &Value, default: Filter) -> Result<Filter> {
    let Some(value) = v.get("resample") else { return Ok(default) };
    let name = value.as_str().map(|s| s.rsplit('.').next().unwrap_or(s).to_lowercase());
    match (value.as_u64(), name.as_deref()) {
        (Some(3), _) | (_, Some("bicubic")) => Ok(Filter::Bicubic),
        (Some(2), _) | (_, Some("bilinear")) => Ok(Filter::Bilinear),
        (Some(1), _) | (_, Some("lanczos")) => Ok(Filter::Lanczos),
        _ => bail!("resample = {value} is not supported"; "use 1 (Lanczos), 2 (bilinear) or 3 (bicubic)"),
    }
}

/// Of what a processor may make; a recipe's `image_size` has the same bound.
const MAX_EDGE: usize = 8192;

/// `size`, `crop_size` or `pad_size`: a number (`both` edges or the shortest), a pair of equal ones, `{shortest_edge}`, or equal
/// `{height, width}`. The second value: are both edges meant?
fn edge(v: &Value, key: &str, both: bool) -> Result<Option<(usize, bool)>> {
    let number = |v: &Value| v.as_u64().filter(|n| *n > 0).map(|n| n as usize);
    let Some(value) = v.get(key) else { return Ok(None) };
    let found = match value {
        Value::Number(_) => number(value).map(|n| (n, both)),
        Value::Array(pair) => match &pair[..] {
            [h, w] if h == w => number(h).map(|n| (n, true)),
            _ => None,
        },
        Value::Object(keys) => {
            let at = |k: &str| keys.get(k).filter(|v| !v.is_null());
            let others =
                keys.iter().any(|(k, v)| !v.is_null() && !matches!(k.as_str(), "shortest_edge" | "height" | "width"));
            match (at("shortest_edge"), at("height"), at("width")) {
                _ if others => None,
                (Some(s), None, None) => number(s).map(|n| (n, false)),
                (None, Some(h), Some(w)) if h == w => number(h).map(|n| (n, true)),
                _ => None,
            }
        }
        _ => None,
    };
    match found {
        Some((n, _)) if n > MAX_EDGE => {
            bail!("{key} = {n}: a picture of {n} × {n} pixels takes {:.1} GB", (n as f64).powi(2) * 12.0 / 1e9;
            "at most {MAX_EDGE} pixels along an edge; towers see 224 to 1024")
        }
        Some(found) => Ok(Some(found)),
        None => bail!("{key} is not supported: {value}";
            "write {key} as a number, {{\"shortest_edge\": n}}, or equal \"height\" and \"width\""),
    }
}

/// Three finite numbers, or one for all.
fn triple(v: &Value, key: &str, default: [f32; 3]) -> Result<[f32; 3]> {
    let Some(value) = v.get(key) else { return Ok(default) };
    let one = |v: &Value| v.as_f64().map(|n| n as f32).filter(|n| n.is_finite());
    let three = match value {
        Value::Array(all) => all.iter().map(one).collect::<Option<Vec<_>>>().and_then(|n| n.try_into().ok()),
        one_for_all => one(one_for_all).map(|n| [n; 3]),
    };
    three.ok_or_else(|| {
        Error::new(format!("{key} = {value} is not supported"))
            .hint(format!("write {key} as three numbers, or one for all colours"))
    })
}

#[cfg(test)]
#[path = "processor_tests.rs"]
mod tests;
