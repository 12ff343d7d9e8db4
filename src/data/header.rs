//! The size of a picture from its file's header, without decoding it.

use super::image::MAX_PIXELS;
use crate::bail;
use crate::error::{Context, Error, Result};
use image::ImageDecoder;
use image::codecs::png::PngDecoder;
use image::metadata::Orientation;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

/// Height and width in pixels of a PNG or JPEG file, as they are once its EXIF orientation is applied.
///
/// # Errors
/// A missing file, or one whose header says no size; the error names it.
pub fn upright_size(path: &Path) -> Result<[usize; 2]> {
    let name = path.display();
    let file = File::open(path).map_err(|e| {
        Error::new(format!("cannot read the image {name}: {e}"))
            .hint("check the sample's `image` and the `images` folder of its data entry")
    })?;
    let mut file = BufReader::new(file);
    let head = file.fill_buf().with_context(|| name.to_string())?;
    let found = match (head.starts_with(b"\x89PNG"), head.starts_with(b"\xff\xd8")) {
        (true, _) => png(file),
        (_, true) => jpeg(file),
        _ => {
            bail!("cannot decode the image {name}: neither PNG nor JPEG"; "convert it to PNG or JPEG, or replace it if it is damaged")
        }
    };
    let ([height, width], turned) = found.map_err(|e| {
        Error::new(format!("cannot decode the image {name}: {e}"))
            .hint("replace the file, or take its samples out of the data")
    })?;
    if height == 0 || width == 0 || height as u64 * width as u64 > MAX_PIXELS {
        bail!("cannot decode the image {name}: {width} × {height} pixels, from 1 to {MAX_PIXELS} are allowed"; "scale the picture down")
    }
    Ok(if turned { [width, height] } else { [height, width] })
}

/// Height and width, and whether they change places.
type Found = ([usize; 2], bool);

fn png(file: BufReader<File>) -> Result<Found> {
    let broken = |e: image::ImageError| Error::new(e.to_string());
    let mut decoder = PngDecoder::new(file).map_err(broken)?;
    let (width, height) = decoder.dimensions();
    Ok(([height as usize, width as usize], decoder.orientation().map(turns).map_err(broken)?))
}

fn turns(o: Orientation) -> bool {
    matches!(
        o,
        Orientation::Rotate90 | Orientation::Rotate270 | Orientation::Rotate90FlipH | Orientation::Rotate270FlipH
    )
}

/// Walks the segments up to the frame header; an EXIF segment stands before it.
fn jpeg(mut file: BufReader<File>) -> Result<Found> {
    const EXIF: &[u8] = b"Exif\0\0";
    let cut = |e: std::io::Error| Error::new(format!("its header is cut off: {e}"));
    let mut turned = false;
    file.seek_relative(2).map_err(cut)?;
    loop {
        let mut code = [0u8];
        while code != [0xff] {
            file.read_exact(&mut code).map_err(cut)?;
        }
        while code == [0xff] {
            file.read_exact(&mut code).map_err(cut)?;
        }
        let [code] = code;
        // Data, TEM, restart markers and a second start stand alone.
        if matches!(code, 0x00 | 0x01 | 0xd0..=0xd8) {
            continue;
        }
        let mut length = [0u8; 2];
        file.read_exact(&mut length).map_err(cut)?;
        let length = usize::from(u16::from_be_bytes(length)).saturating_sub(2);
        match code {
            0xd9 | 0xda => bail!("its picture data begin without a header of their own"),
            // Start of a frame, of any kind but the tables' (DHT, JPG, DAC).
            0xc0..=0xcf if !matches!(code, 0xc4 | 0xc8 | 0xcc) => {
                let mut frame = [0u8; 5];
                file.read_exact(&mut frame).map_err(cut)?;
                let number = |at: usize| usize::from(u16::from_be_bytes([frame[at], frame[at + 1]]));
                return Ok(([number(1), number(3)], turned));
            }
            0xe1 => {
                let mut segment = vec![0; length];
                file.read_exact(&mut segment).map_err(cut)?;
                if let Some(exif) = segment.strip_prefix(EXIF) {
                    turned = Orientation::from_exif_chunk(exif).is_some_and(turns);
                }
            }
            _ => file.seek_relative(length as i64).map_err(cut)?,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::image::load_rgb;
    use crate::recipe::schema::Alpha;

    #[test]
    fn the_header_says_what_the_decoder_gives() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
        let mut seen = 0;
        for dir in ["golden/a/images", "golden/anyres/images", "pictures"] {
            for entry in std::fs::read_dir(root.join(dir)).unwrap() {
                let path = entry.unwrap().path();
                // CMYK cannot be decoded.
                if let Ok(rgb) = load_rgb(&path, Alpha::Drop) {
                    assert_eq!(upright_size(&path).unwrap(), [rgb.height, rgb.width], "{}", path.display());
                    seen += 1;
                }
            }
        }
        assert!(seen >= 16, "{seen}");
    }

    #[test]
    fn broken_headers_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let whole = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/pictures/rgb.jpg")).unwrap();
        let files: [(&str, &[u8]); 4] = [
            ("cut.jpg", &whole[..30]),
            ("cut.png", b"\x89PNG\r\n"),
            ("text.png", b"hello"),
            ("data.jpg", b"\xff\xd8\xff\xda\0\x02"),
        ];
        for (name, bytes) in files {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            let e = upright_size(&path).unwrap_err();
            assert!(e.cause().contains(name) && e.hint_text().is_some(), "{e}");
        }
        assert!(upright_size(&dir.path().join("none.png")).unwrap_err().cause().contains("none.png"));
    }
}
