//! Pictures: PNG and JPEG files to normalised pixel values, as Pillow and HF's CLIP image processor give them.
//!
//! Colours are those of Pillow's `convert("RGB")`: 16-bit gray saturates at 255, other 16-bit modes keep the high byte,
//! alpha is dropped (or composited on white with Pillow's `alpha_composite` arithmetic). The EXIF orientation is applied.
//! PNG is equal to the bit; JPEG decoders differ from each other by a few levels.

pub use super::resize::Rgb;
use super::resize::{Filter, resize};
use super::tiles::{Tiles, fitted};
use crate::bail;
use crate::error::{Context, Error, Result};
use crate::recipe::schema::{Alpha, Resize};
use image::codecs::{jpeg::JpegDecoder, png::PngDecoder};
use image::{DynamicImage, ImageDecoder, ImageFormat};
use serde_json::{Value, json};
use std::io::Cursor;
use std::path::{Path, PathBuf};

/// Mean and standard deviation that OpenAI's CLIP was trained with.
const CLIP_MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
const CLIP_STD: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];

/// Pillow refuses larger pictures as decompression bombs.
pub(super) const MAX_PIXELS: u64 = 178_956_970;

/// A picture of a sample and how it is prepared.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ImageRef {
    pub path: PathBuf,
    pub resize: Resize,
    pub alpha: Alpha,
    /// Height and width of what the tower sees at once, in pixels.
    pub size: usize,
    /// How it is cut up; `None`: the tower sees it at once.
    pub tiles: Option<Tiles>,
}

impl ImageRef {
    /// Pictures of the tower that it becomes.
    pub fn pieces(&self) -> usize {
        self.tiles.map_or(1, |t| t.pieces())
    }

    /// Numbers that it becomes, `[3, size, size]` a piece.
    pub fn numbers(&self) -> usize {
        self.pieces() * 3 * self.size * self.size
    }
}

/// HF's `CLIPImageProcessor`: resize, centre crop, rescale, normalise.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageProcessor {
    /// Pixels of the shortest edge after resizing; of both edges if `square`.
    pub size: usize,
    /// Resize both edges to `size`, whatever the picture's proportions (HF: `size` with `height` and `width`).
    pub square: bool,
    /// Pixels along one edge of the result.
    pub crop: usize,
    pub mean: [f32; 3],
    pub std: [f32; 3],
    /// Factor on the 8-bit values, normally 1/255.
    pub rescale: f64,
    pub filter: Filter,
}

impl ImageProcessor {
    /// Reads the `image_processor` part of `processor_config.json`, or `preprocessor_config.json`, of an HF folder: in this order,
    /// as transformers 5 does.
    ///
    /// # Errors
    /// If there is no such file, or it asks for something that this processor does not do.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let [part, file] = Self::said(dir)?;
        let Some((path, value)) = part.or(file) else {
            bail!("{} has no preprocessor_config.json", dir.display();
                "copy the file from the repository that the vision tower comes from")
        };
        Self::from_json(&value).with_context(|| path.display())
    }

    /// What to say of a folder whose two files do not ask for the same.
    pub fn remark(dir: &Path) -> Option<String> {
        let [Some((used, one)), Some((other, two))] = Self::said(dir).ok()? else { return None };
        let same = matches!((Self::from_json(&one), Self::from_json(&two)), (Ok(a), Ok(b)) if a == b);
        (!same).then(|| {
            format!(
                "{} and {} ask for different pictures: the `image_processor` of the former is used, as transformers 5 does",
                used.display(),
                other.display()
            )
        })
    }

    /// What processor_config.json and preprocessor_config.json say of pictures.
    fn said(dir: &Path) -> Result<[Option<(PathBuf, Value)>; 2]> {
        let read = |name: &str| -> Result<Option<(PathBuf, Value)>> {
            let path = dir.join(name);
            if !path.is_file() {
                return Ok(None);
            }
            let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            let damaged = |e: serde_json::Error| {
                Error::new(format!("{} is damaged", path.display()))
                    .source(e)
                    .hint("get the file again from where the vision tower comes from")
            };
            let value = serde_json::from_slice(&bytes).map_err(damaged)?;
            Ok(Some((path, value)))
        };
        let whole = read("processor_config.json")?;
        let part = whole.and_then(|(path, mut value)| Some((path, value.get_mut("image_processor")?.take())));
        Ok([part.filter(|(_, v)| !v.is_null()), read("preprocessor_config.json")?])
    }

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
        }
    }

    fn from_json(v: &Value) -> Result<Self> {
        let on = |key: &str| v.get(key).and_then(Value::as_bool).unwrap_or(true);
        if !on("do_resize") {
            bail!("do_resize = false is not supported"; "pictures of one size are needed: set do_resize to true")
        }
        let (size, square) = edge(v, "size", 224)?;
        let crop = if on("do_center_crop") { edge(v, "crop_size", size)?.0 } else { size };
        if !on("do_center_crop") && !square {
            bail!("do_center_crop = false with a shortest edge gives pictures of different sizes";
                "set do_center_crop to true, or size to {{\"height\": {size}, \"width\": {size}}}")
        }
        let (mean, std) = if on("do_normalize") {
            (triple(v, "image_mean", CLIP_MEAN)?, triple(v, "image_std", CLIP_STD)?)
        } else {
            ([0.0; 3], [1.0; 3])
        };
        if !std.iter().all(|s| *s > 0.0 && s.is_finite()) || !mean.iter().all(|m| m.is_finite()) {
            bail!("image_mean = {mean:?} and image_std = {std:?} make no picture of finite numbers";
                "image_std holds three numbers above 0, e.g. {CLIP_STD:?}")
        }
        let rescale = match on("do_rescale") {
            true => v.get("rescale_factor").and_then(Value::as_f64).unwrap_or(1.0 / 255.0),
            false => 1.0,
        };
        let filter = match v.get("resample").and_then(Value::as_u64) {
            None | Some(3) => Filter::Bicubic,
            Some(2) => Filter::Bilinear,
            Some(1) => Filter::Lanczos,
            Some(n) => bail!("resample = {n} is not supported"; "use 1 (Lanczos), 2 (bilinear) or 3 (bicubic)"),
        };
        Ok(Self { size, square, crop, mean, std, rescale, filter })
    }

    /// The processor as `preprocessor_config.json`.
    pub fn to_json(&self) -> Value {
        let both = |n: usize| json!({ "height": n, "width": n });
        json!({
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
        })
    }

    /// The same processor for results of `edge` pixels; a shortest edge that is larger than what is cut out stays so in proportion.
    pub fn at(&self, edge: usize) -> Self {
        let size = (self.size as f64 * edge as f64 / self.crop as f64).round() as usize;
        Self { size: if self.size == self.crop { edge } else { size.max(1) }, crop: edge, ..self.clone() }
    }

    /// Reads a picture: [`ImageRef::numbers`], channels first, normalised.
    ///
    /// # Errors
    /// A missing, corrupt or unsupported file; the error names it.
    pub fn load(&self, image: &ImageRef) -> Result<Vec<f32>> {
        let rgb = load_rgb(&image.path, image.alpha)?;
        let edge = rgb.width.max(rgb.height) as u64;
        if image.resize == Resize::Pad && edge * edge > MAX_PIXELS {
            bail!("the image {}, padded to a square, has {edge} × {edge} pixels, more than the {MAX_PIXELS} that are allowed", image.path.display();
                "scale the picture down, or use resize = \"crop\"")
        }
        let processor = self.at(image.size);
        match &image.tiles {
            None => Ok(processor.process(rgb, image.resize)),
            Some(t) if t.picture == [rgb.height, rgb.width] => Ok(processor.cut_up(&rgb, t.grid)),
            Some(t) => bail!("the image {} has {} × {} pixels, but its header said {} × {}", image.path.display(),
                rgb.width, rgb.height, t.picture[1], t.picture[0]; "the file has changed since the data were read: start again"),
        }
    }

    /// The picture squeezed into a square, then the tiles of a grid of rows and columns, row by row: the picture as large as they
    /// allow, with black around it (HF's `LlavaNextImageProcessor`).
    pub fn cut_up(&self, picture: &Rgb, grid: [usize; 2]) -> Vec<f32> {
        let whole = Self { square: true, ..self.clone() };
        let mut out = self.normalise(&whole.resize_and_crop(picture));
        let target = grid.map(|n| n * self.crop);
        let [h, w] = fitted([picture.height, picture.width], target);
        let mut canvas = Rgb::filled(target[1], target[0], [0; 3]);
        let inner = resize(picture, w, h, 0..w, 0..h, self.filter);
        canvas.paste(&inner, (target[1] - w) / 2, (target[0] - h) / 2);
        for (row, column) in (0..grid[0]).flat_map(|r| (0..grid[1]).map(move |c| (r, c))) {
            let (x, y) = (column * self.crop, row * self.crop);
            let tile = canvas.part(x..x + self.crop, y..y + self.crop);
            out.extend(self.normalise(&self.resize_and_crop(&tile)));
        }
        out
    }

    /// What [`Self::load`] does after decoding.
    pub fn process(&self, picture: Rgb, resize: Resize) -> Vec<f32> {
        let picture = match resize {
            // A tile is a square already.
            Resize::Crop | Resize::Anyres => picture,
            Resize::Pad => self.pad_to_square(picture),
        };
        self.normalise(&self.resize_and_crop(&picture))
    }

    /// A square of the mean colour with the picture in its middle (LLaVA-1.5's `expand2square`).
    fn pad_to_square(&self, picture: Rgb) -> Rgb {
        let (w, h) = (picture.width, picture.height);
        if w == h {
            return picture;
        }
        let edge = w.max(h);
        // In f64 as Python does: the f32 mean would move a product that lies just below an integer.
        let colour = self.mean.map(|m| (shortest_f64(m) * 255.0) as u8);
        let mut square = Rgb::filled(edge, edge, colour);
        square.paste(&picture, (edge - w) / 2, (edge - h) / 2);
        square
    }

    /// Resizes and cuts the centre; what lies outside the picture is black, as in HF's `center_crop`.
    fn resize_and_crop(&self, picture: &Rgb) -> Rgb {
        let (w, h) = self.resized(picture.width, picture.height);
        let cut = |n: usize| {
            let start = n.saturating_sub(self.crop) / 2;
            start..start + n.min(self.crop)
        };
        let part = resize(picture, w, h, cut(w), cut(h), self.filter);
        if part.width == self.crop && part.height == self.crop {
            return part;
        }
        let mut whole = Rgb::filled(self.crop, self.crop, [0; 3]);
        whole.paste(&part, (self.crop - part.width).div_ceil(2), (self.crop - part.height).div_ceil(2));
        whole
    }

    /// Width and height after resizing.
    fn resized(&self, w: usize, h: usize) -> (usize, usize) {
        if self.square {
            return (self.size, self.size);
        }
        let long = |long: usize, short: usize| (self.size as f64 * long as f64 / short as f64) as usize;
        if w <= h { (self.size, long(h, w)) } else { (long(w, h), self.size) }
    }

    fn normalise(&self, picture: &Rgb) -> Vec<f32> {
        let plane = picture.width * picture.height;
        let mut out = Vec::with_capacity(plane * 3);
        for c in 0..3 {
            let table: Vec<f32> =
                (0..=255u8).map(|v| ((f64::from(v) * self.rescale) as f32 - self.mean[c]) / self.std[c]).collect();
            out.extend(picture.data.iter().skip(c).step_by(3).map(|&v| table[usize::from(v)]));
        }
        out
    }
}

/// The shortest decimal that reads back as this f32, as f64: what stood in the configuration file.
fn shortest_f64(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}

/// Of what a processor may make; a recipe's `image_size` has the same bound.
const MAX_EDGE: usize = 8192;

/// `size` or `crop_size`: a number, `{shortest_edge}`, or equal `{height, width}` (then the second value is true).
fn edge(v: &Value, key: &str, default: usize) -> Result<(usize, bool)> {
    let number = |v: &Value| v.as_u64().map(|n| n as usize).filter(|&n| n > 0);
    let found = match v.get(key) {
        None | Some(Value::Null) => Some((default, false)),
        Some(v @ Value::Number(_)) => number(v).map(|n| (n, false)),
        Some(v) => match (v.get("shortest_edge"), v.get("height"), v.get("width")) {
            (Some(s), None, None) => number(s).map(|n| (n, false)),
            (None, Some(h), Some(w)) if h == w => number(h).map(|n| (n, true)),
            _ => None,
        },
    };
    if let Some((n, _)) = found.filter(|(n, _)| *n > MAX_EDGE) {
        bail!("{key} = {n}: a picture of {n} × {n} pixels takes {:.1} GB", (n as f64).powi(2) * 12.0 / 1e9;
            "at most {MAX_EDGE} pixels along an edge; towers see 224 to 1024")
    }
    found.ok_or_else(|| {
        Error::new(format!("{key} is not supported: {}", v[key]))
            .hint(format!("write {key} as a number, {{\"shortest_edge\": n}}, or equal \"height\" and \"width\""))
    })
}

fn triple(v: &Value, key: &str, default: [f32; 3]) -> Result<[f32; 3]> {
    match v.get(key) {
        None => Ok(default),
        Some(v) => serde_json::from_value(v.clone()).with_context(|| format!("{key} must hold three numbers")),
    }
}

/// Decodes a PNG or JPEG file into 8-bit RGB, upright.
///
/// # Errors
/// A missing, corrupt or unsupported file; the error names it.
pub fn load_rgb(path: &Path, alpha: Alpha) -> Result<Rgb> {
    let name = path.display();
    let bytes = std::fs::read(path).map_err(|e| {
        Error::new(format!("cannot read the image {name}: {e}"))
            .hint("check the sample's `image` and the `images` folder of its data entry")
    })?;
    decode(&bytes, alpha).map_err(|e| {
        let hint = e.hint_text().unwrap_or("replace the file, or take its samples out of the data").to_string();
        Error::new(format!("cannot decode the image {name}: {e}")).hint(hint)
    })
}

/// Decodes the bytes of a PNG or JPEG file into 8-bit RGB, upright.
///
/// # Errors
/// Corrupt or unsupported bytes, and a JPEG that ends before its end marker, as Pillow refuses it: the decoder would
/// fill what is missing with gray.
pub fn decode(bytes: &[u8], alpha: Alpha) -> Result<Rgb> {
    match image::guess_format(bytes) {
        Ok(ImageFormat::Png) => upright(PngDecoder::new(Cursor::new(bytes)).map_err(broken)?, bytes, alpha),
        Ok(ImageFormat::Jpeg) if !jpeg_ends(bytes) => {
            bail!("it is cut off: no end marker (EOI) follows its picture data";
                "copy or download the file again, or take its samples out of the data")
        }
        Ok(ImageFormat::Jpeg) => upright(JpegDecoder::new(Cursor::new(bytes)).map_err(broken)?, bytes, alpha),
        Ok(other) => {
            bail!("the format is {other:?}"; "convert it to PNG or JPEG")
        }
        Err(_) => bail!("neither PNG nor JPEG"; "convert it to PNG or JPEG, or replace it if it is damaged"),
    }
}

/// Whether a JPEG's end marker comes after its last scan; what follows the marker does not matter.
fn jpeg_ends(bytes: &[u8]) -> bool {
    const SOS: u8 = 0xda;
    const EOI: u8 = 0xd9;
    let (mut at, mut scanned) = (2, false);
    // Markers are FF and a code; FF 00 is a byte of data, FF FF is filling, and data may stand between any two.
    while let Some(found) = bytes.get(at..).and_then(|rest| rest.iter().position(|&b| b == 0xff)) {
        at += found + 1;
        match bytes.get(at) {
            None => return false,
            Some(&EOI) if scanned => return true,
            Some(0xff) => {}
            // These stand alone: data, TEM, restart markers, a start or an end without a picture.
            Some(0x00 | 0x01 | 0xd0..=0xd9) => at += 1,
            Some(&code) => {
                let Some(&[high, low]) = bytes.get(at + 1..at + 3) else { return false };
                scanned |= code == SOS;
                at += 1 + usize::from(u16::from_be_bytes([high, low]));
            }
        }
    }
    false
}

fn broken(e: image::ImageError) -> Error {
    Error::new(e.to_string())
}

fn upright<D: ImageDecoder>(mut decoder: D, bytes: &[u8], alpha: Alpha) -> Result<Rgb> {
    let (w, h) = decoder.dimensions();
    if u64::from(w) * u64::from(h) > MAX_PIXELS {
        bail!("{w} × {h} pixels are more than the {MAX_PIXELS} that are allowed"; "scale the picture down")
    }
    let orientation = decoder.orientation().map_err(broken)?;
    let decoded = DynamicImage::from_decoder(decoder).map_err(broken)?;
    let mut rgb = DynamicImage::ImageRgb8(to_rgb(&decoded, is_gray16_png(bytes), alpha)?);
    rgb.apply_orientation(orientation);
    let rgb = rgb.into_rgb8();
    Ok(Rgb { width: rgb.width() as usize, height: rgb.height() as usize, data: rgb.into_raw() })
}

/// Whether IHDR says 16-bit gray without an alpha channel (transparency may still come from tRNS).
fn is_gray16_png(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x89PNG") && bytes.get(24..26) == Some(&[16, 0])
}

/// 8-bit RGB as Pillow converts it. `gray16`: Pillow's mode `I;16`, whose values saturate.
fn to_rgb(decoded: &DynamicImage, gray16: bool, alpha: Alpha) -> Result<image::RgbImage> {
    let high = |v: u16| (v >> 8) as u8;
    let gray = |v: u16| if gray16 { v.min(255) as u8 } else { high(v) };
    let pixels: Vec<[u8; 4]> = match decoded {
        DynamicImage::ImageLuma8(p) => p.pixels().map(|p| [p[0], p[0], p[0], 255]).collect(),
        DynamicImage::ImageLumaA8(p) => p.pixels().map(|p| [p[0], p[0], p[0], p[1]]).collect(),
        DynamicImage::ImageRgb8(p) => return Ok(p.clone()),
        DynamicImage::ImageRgba8(p) => p.pixels().map(|p| p.0).collect(),
        DynamicImage::ImageLuma16(p) => p.pixels().map(|p| [gray(p[0]); 3]).map(|[r, g, b]| [r, g, b, 255]).collect(),
        DynamicImage::ImageLumaA16(p) => p.pixels().map(|p| [gray(p[0]), gray(p[0]), gray(p[0]), high(p[1])]).collect(),
        DynamicImage::ImageRgb16(p) => p.pixels().map(|p| [high(p[0]), high(p[1]), high(p[2]), 255]).collect(),
        DynamicImage::ImageRgba16(p) => p.pixels().map(|p| p.0.map(high)).collect(),
        other => bail!("the colour type {:?} is not supported", other.color(); "convert it to 8-bit RGB"),
    };
    let flat = match alpha {
        Alpha::Drop => pixels.iter().flat_map(|p| [p[0], p[1], p[2]]).collect(),
        Alpha::White => pixels.iter().flat_map(|&p| on_white(p)).collect(),
    };
    image::RgbImage::from_raw(decoded.width(), decoded.height(), flat)
        .ok_or_else(|| Error::new("the decoder gave fewer pixels than the header promised"))
}

/// Pillow's `alpha_composite` over opaque white, in its integer arithmetic.
fn on_white([r, g, b, a]: [u8; 4]) -> [u8; 3] {
    let (over, under) = (u32::from(a) << 7, (255 - u32::from(a)) << 7);
    [r, g, b].map(|v| {
        let sum = u32::from(v) * over + 255 * under + (0x80 << 7);
        ((((sum >> 8) + sum) >> 8) >> 7) as u8
    })
}

#[cfg(test)]
#[path = "image_tests.rs"]
mod tests;
