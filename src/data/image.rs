//! Pictures: what stands in PNG and JPEG files to normalised pixel values, as HF's CLIP image processor gives them.

use super::decode::load_held;
pub use super::decode::{decode, load_rgb};
use super::file;
use super::processor::shortest_f64;
pub use super::resize::Rgb;
use super::resize::{Filter, resize};
use super::tiles::{Tiles, fitted};
use crate::bail;
use crate::error::{Context, Error, Result};
use crate::spec::{Alpha, Resize};
use serde_json::Value;
use std::path::{Path, PathBuf};

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
    /// Put the picture into a square of the mean colour first, whatever the data say (`LlavaImageProcessor` with `do_pad`).
    pub pad: bool,
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

    /// The grids of tiles that a folder states for its pictures, as they are written, and where.
    ///
    /// # Errors
    /// If a file is damaged.
    pub fn grids(dir: &Path) -> Result<Option<(PathBuf, Value)>> {
        let [part, file] = Self::said(dir)?;
        let Some((path, mut value)) = part.or(file) else { return Ok(None) };
        let stated = value.get_mut("image_grid_pinpoints").map(Value::take).filter(|grids| !grids.is_null());
        Ok(stated.map(|grids| (path, grids)))
    }

    /// What processor_config.json and preprocessor_config.json say of pictures.
    fn said(dir: &Path) -> Result<[Option<(PathBuf, Value)>; 2]> {
        let read = |name: &str| -> Result<Option<(PathBuf, Value)>> {
            let path = dir.join(name);
            let Some(bytes) = file::optional(&path)? else { return Ok(None) };
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
        let pads = image.resize == Resize::Pad || self.pad && image.tiles.is_none();
        let (rgb, _held) = load_held(&image.path, image.alpha, |width, height| {
            let edge = width.max(height) as u64;
            if pads && edge * edge > MAX_PIXELS {
                bail!("the image {}, padded to a square, has {edge} × {edge} pixels, more than the {MAX_PIXELS} that are allowed", image.path.display();
                    "scale the picture down, or use resize = \"crop\"")
            }
            let (across, down) = self.resized(width, height);
            // The square, and the picture after the first of the two passes of resampling.
            let square = if pads && width != height { 3 * edge * edge } else { 0 };
            Ok(square + 3 * (across.min(image.size) * height).max(width * down.min(image.size)) as u64)
        })?;
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
            Resize::Crop | Resize::Anyres if !self.pad => picture,
            _ => self.pad_to_square(picture),
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

#[cfg(test)]
#[path = "image_tests.rs"]
mod tests;
