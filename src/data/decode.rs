//! Decoding PNG and JPEG files into 8-bit RGB, upright, as Pillow's `exif_transpose` and `convert("RGB")` do.
//!
//! 16-bit gray saturates at 255, other 16-bit modes keep the high byte, alpha is dropped (or composited on white with Pillow's
//! `alpha_composite` arithmetic). Gamma and colour profiles are left alone. PNG is equal to the bit; JPEG decoders differ from each
//! other by a few levels.

use super::budget::{Budget, Held};
use super::header::{self, Header, Jpeg, Layout};
use super::image::Rgb;
use super::narrow;
use super::orientation::{self, Orientation};
use crate::bail;
use crate::error::{Error, Result};
use crate::spec::Alpha;
use image::DynamicImage;
use image::codecs::{jpeg::JpegDecoder, png::PngDecoder};
use std::io::{BufReader, Cursor, Read, Seek};
use std::path::Path;

/// Decodes a PNG or JPEG file into 8-bit RGB, upright.
///
/// # Errors
/// A missing, corrupt or unsupported file; the error names it.
pub fn load_rgb(path: &Path, alpha: Alpha) -> Result<Rgb> {
    load_held(path, alpha, |_, _| Ok(0)).map(|(rgb, _)| rgb)
}

/// As [`load_rgb`], with the bytes that it and what comes `after` it take held in the process's budget; `after` gets width and
/// height, upright.
pub(super) fn load_held(
    path: &Path,
    alpha: Alpha,
    after: impl FnOnce(usize, usize) -> Result<u64>,
) -> Result<(Rgb, Held<'static>)> {
    let (file, metadata) = header::open(path)?;
    let told = |e: Error| header::unread(path, &e);
    let mut file = BufReader::new(file);
    // Only what a PNG's pixels need is read: its size counts before.
    let head = header::read(&mut file, false).map_err(told)?;
    let [height, width] = head.size;
    let pixels = (height * width) as u64;
    let most = 16 * pixels + BESIDE;
    if metadata.len() > most {
        let size = metadata.len() >> 20;
        return Err(told(Error::new(format!("{size} MiB are too many for {width} × {height} pixels"))));
    }
    let turned = if head.orientation == Orientation::NoTransforms { 0 } else { 3 };
    let upright = if orientation::turns(head.orientation) { (height, width) } else { (width, height) };
    let own = metadata.len() + pixels * (head.pixel_bytes() + turned);
    let held = Budget::of_process()?.take(own.saturating_add(after(upright.0, upright.1)?));
    file.rewind().map_err(|e| told(e.into()))?;
    from(&mut file, alpha).map(|rgb| (rgb, held)).map_err(told)
}

/// Bytes of metadata, thumbnails and films (motion photographs) that a picture's file may have beside its pixels.
const BESIDE: u64 = 256 << 20;

/// Decodes the bytes of a PNG or JPEG file into 8-bit RGB, upright.
///
/// # Errors
/// Corrupt or unsupported bytes, and a JPEG that ends before its end marker, as Pillow refuses it: the decoder would
/// fill what is missing with gray.
pub fn decode(bytes: &[u8], alpha: Alpha) -> Result<Rgb> {
    from(&mut Cursor::new(bytes), alpha)
}

fn from(file: &mut (impl Read + Seek), alpha: Alpha) -> Result<Rgb> {
    let Header { size: [height, width], orientation, layout } = header::read(file, true)?;
    let rgb = match layout {
        Layout::Png { bits, colour, essence } => {
            let decoded =
                DynamicImage::from_decoder(PngDecoder::new(Cursor::new(essence)).map_err(broken)?).map_err(broken)?;
            to_rgb(decoded, (bits, colour) == (16, 0), alpha)?
        }
        Layout::Jpeg(jpeg) => {
            let mut bytes = vec![];
            file.rewind()?;
            file.read_to_end(&mut bytes)?;
            if !jpeg_ends(&bytes) {
                bail!("it is cut off: no end marker (EOI) follows its picture data";
                    "copy or download the file again, or take its samples out of the data")
            }
            from_jpeg(&bytes, &jpeg, [height, width])?
        }
    };
    if (rgb.width() as usize, rgb.height() as usize) != (width, height) {
        bail!("the decoder gave {} × {} pixels where the header says {width} × {height}", rgb.width(), rgb.height())
    }
    let mut rgb = DynamicImage::ImageRgb8(rgb);
    rgb.apply_orientation(orientation);
    let rgb = rgb.into_rgb8();
    Ok(Rgb { width: rgb.width() as usize, height: rgb.height() as usize, data: rgb.into_raw() })
}

/// Decodes a JPEG with the colours that libjpeg finds in it.
fn from_jpeg(bytes: &[u8], jpeg: &Jpeg, [height, width]: [usize; 2]) -> Result<image::RgbImage> {
    let decoded = |transform, size| -> Result<image::RgbImage> {
        let decoder = JpegDecoder::new(Cursor::new(with_transform(bytes, transform, size))).map_err(broken)?;
        Ok(DynamicImage::from_decoder(decoder).map_err(broken)?.into_rgb8())
    };
    let transform = jpeg.transform();
    let halved = match &jpeg.sampling[..] {
        [[2, 1], [1, 1], [1, 1]] => Some(false),
        [[2, 2], [1, 1], [1, 1]] => Some(true),
        _ => None,
    };
    match halved {
        Some(tall) if width <= 4 && transform == 1 => {
            // Y, Cb and Cr as they are, with what the blocks hold beyond the picture.
            let whole = height.next_multiple_of(narrow::BLOCK);
            let size = [u16::try_from(whole).unwrap_or(u16::MAX), narrow::BLOCK as u16];
            let planes = decoded(0, Some(size))?;
            let plane = |i: usize| {
                narrow::repeated(&planes.as_raw().iter().skip(i).step_by(3).copied().collect::<Vec<_>>(), width, tall)
            };
            let (cb, cr) = (plane(1), plane(2));
            Ok(image::RgbImage::from_fn(width as u32, height as u32, |x, y| {
                let at = y as usize * width + x as usize;
                image::Rgb(narrow::rgb([planes.get_pixel(x, y).0[0], cb[at], cr[at]]))
            }))
        }
        _ => decoded(transform, None),
    }
}

/// The same JPEG, its application segments and comments replaced by an Adobe segment that states the colour transform; with
/// another `size`, height and width, in its frame header.
fn with_transform(bytes: &[u8], transform: u8, size: Option<[u16; 2]>) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len() + 16);
    out.extend([0xff, 0xd8, 0xff, 0xee, 0, 14]);
    out.extend(b"Adobe\0\x64\0\0\0\0");
    out.push(transform);
    let mut at = 2;
    while let Some(found) = bytes.get(at..).and_then(|rest| rest.iter().position(|&b| b == 0xff)) {
        at += found + 1;
        match bytes.get(at..at + 3) {
            Some([0xff | 0x00 | 0x01 | 0xd0..=0xd8, ..]) => {}
            Some(&[code, high, low]) if !matches!(code, 0xd9 | 0xda) => {
                let end = at + 1 + usize::from(u16::from_be_bytes([high, low]));
                if !matches!(code, 0xe0..=0xef | 0xfe) {
                    out.push(0xff);
                    let segment = out.len();
                    out.extend(bytes.get(at..end).unwrap_or(&bytes[at..]));
                    // A frame header: its code, two bytes of length, one of bits, height, width.
                    if let (0xc0..=0xc2, Some([height, width]), Some(field)) =
                        (code, size, out.get_mut(segment + 4..segment + 8))
                    {
                        field[..2].copy_from_slice(&height.to_be_bytes());
                        field[2..].copy_from_slice(&width.to_be_bytes());
                    }
                }
                at = end;
            }
            // The picture's data, and all that is behind them.
            _ => {
                out.push(0xff);
                out.extend(&bytes[at..]);
                break;
            }
        }
    }
    out
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

/// 8-bit RGB as Pillow converts it. `gray16`: Pillow's mode `I;16`, whose values saturate.
fn to_rgb(decoded: DynamicImage, gray16: bool, alpha: Alpha) -> Result<image::RgbImage> {
    let high = |v: u16| (v >> 8) as u8;
    let gray = |v: u16| if gray16 { v.min(255) as u8 } else { high(v) };
    let flat = |[r, g, b, a]: [u8; 4]| match alpha {
        Alpha::Drop => [r, g, b],
        Alpha::White => on_white([r, g, b, a]),
    };
    let (width, height) = (decoded.width(), decoded.height());
    let pixels: Vec<[u8; 3]> = match decoded {
        DynamicImage::ImageRgb8(p) => return Ok(p),
        DynamicImage::ImageLuma8(p) => p.pixels().map(|p| [p[0]; 3]).collect(),
        DynamicImage::ImageLumaA8(p) => p.pixels().map(|p| flat([p[0], p[0], p[0], p[1]])).collect(),
        DynamicImage::ImageRgba8(p) => p.pixels().map(|p| flat(p.0)).collect(),
        DynamicImage::ImageLuma16(p) => p.pixels().map(|p| [gray(p[0]); 3]).collect(),
        DynamicImage::ImageLumaA16(p) => {
            p.pixels().map(|p| flat([gray(p[0]), gray(p[0]), gray(p[0]), high(p[1])])).collect()
        }
        DynamicImage::ImageRgb16(p) => p.pixels().map(|p| p.0.map(high)).collect(),
        DynamicImage::ImageRgba16(p) => p.pixels().map(|p| flat(p.0.map(high))).collect(),
        _ => bail!("its colours are of an unknown kind"; "convert it to 8-bit RGB"),
    };
    image::RgbImage::from_raw(width, height, pixels.into_flattened())
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
#[path = "decode_tests.rs"]
mod tests;
