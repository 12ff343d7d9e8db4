//! What a picture's file says of it before its pixels: size, orientation, and how they are written. Segments and chunks that change
//! no pixel (texts, colour profiles, thumbnails) are skipped, however large they are.

use super::file;
use super::image::MAX_PIXELS;
use super::orientation::{self, Orientation};
use crate::bail;
use crate::error::{Error, Result};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

/// The head of a PNG or JPEG file.
pub(super) struct Header {
    /// Height and width in pixels, as they are stored.
    pub size: [usize; 2],
    pub orientation: Orientation,
    pub layout: Layout,
}

pub(super) enum Layout {
    /// Bits a sample, colour type; and the chunks that make up the picture, as a PNG file of its own.
    Png {
        bits: u8,
        colour: u8,
        essence: Vec<u8>,
    },
    Jpeg(Jpeg),
}

/// A JPEG's colours.
#[derive(Default)]
pub(super) struct Jpeg {
    /// Horizontal and vertical sampling factor of each component.
    pub sampling: Vec<[u8; 2]>,
    /// Names of the components.
    names: Vec<u8>,
    /// The colour transform that an Adobe segment states.
    adobe: Option<u8>,
    jfif: bool,
    progressive: bool,
}

impl Jpeg {
    /// The colours as libjpeg finds them, as an Adobe segment says them: 0 as they are (RGB or CMYK), 1 YCbCr, 2 YCCK.
    pub fn transform(&self) -> u8 {
        match (self.names.len(), self.adobe) {
            (4, None | Some(0)) => 0,
            (4, Some(_)) => 2,
            (3, Some(0)) if !self.jfif => 0,
            (3, None) if !self.jfif && self.names == *b"RGB" => 0,
            _ => 1,
        }
    }
}

impl Header {
    /// Bytes that a pixel takes until it is RGB, that included.
    pub fn pixel_bytes(&self) -> u64 {
        match &self.layout {
            // These are decoded in place.
            Layout::Png { bits: 8, colour: 2, .. } => 3,
            Layout::Png { bits, colour, .. } => {
                let channels = [2, 1, 4, 4, 2, 1, 4][usize::from(*colour).min(6)];
                channels * u64::from(bits.div_ceil(8)) + 3
            }
            // All coefficients are kept until the last scan.
            Layout::Jpeg(j) if j.progressive => 3 + 2 * j.sampling.len() as u64,
            Layout::Jpeg(j) => 3 + u64::from(j.sampling.len() == 1),
        }
    }
}

/// Height and width in pixels of a PNG or JPEG file, as they are once its EXIF orientation is applied.
///
/// # Errors
/// A missing file, or one whose header says no size; the error names it.
pub fn upright_size(path: &Path) -> Result<[usize; 2]> {
    let (file, _) = open(path)?;
    let header = read(&mut BufReader::new(file), false).map_err(|e| unread(path, &e))?;
    let [height, width] = header.size;
    Ok(if orientation::turns(header.orientation) { [width, height] } else { [height, width] })
}

/// Opens a picture's file.
pub(super) fn open(path: &Path) -> Result<(File, std::fs::Metadata)> {
    file::open(path, "the image", "check the sample's `image` and the `images` folder of its data entry")
}

/// An error of a picture's content, with the file's name and a hint.
pub(super) fn unread(path: &Path, e: &Error) -> Error {
    let hint = e.hint_text().unwrap_or("replace the file, or take its samples out of the data").to_string();
    Error::new(format!("cannot decode the image {}: {e}", file::shown(path))).hint(hint)
}

/// Reads the head of a picture, from its beginning; with `essence`, also what a PNG's decoder needs.
///
/// # Errors
/// If it is neither PNG nor JPEG, is damaged, has too many pixels, or its pixels are written in a way that is not read.
pub(super) fn read(file: &mut (impl Read + Seek), essence: bool) -> Result<Header> {
    let mut head = vec![];
    file.take(file::HEAD as u64).read_to_end(&mut head)?;
    file.rewind()?;
    let header = match (head.starts_with(b"\x89PNG\r\n\x1a\n"), head.starts_with(b"\xff\xd8\xff")) {
        (true, _) => png(file, essence)?,
        (_, true) => jpeg(file)?,
        _ => return Err(other(&head)),
    };
    let [height, width] = header.size;
    if height == 0 || width == 0 {
        bail!("it has no pixels ({width} × {height})"; "replace the file, or take its samples out of the data")
    }
    if height as u64 * width as u64 > MAX_PIXELS {
        bail!("{width} × {height} pixels, from 1 to {MAX_PIXELS} are allowed"; "scale the picture down")
    }
    Ok(header)
}

/// What a file is that is no picture of ours.
fn other(head: &[u8]) -> Error {
    match file::format(head) {
        Some(name) if name.contains("HTML") => Error::new("it is an HTML page, not a picture")
            .hint("a download saved a web page, an error or a log-in, in the picture's place: download it again"),
        Some(name) if name.contains("LFS") => {
            Error::new(format!("it is {name}")).hint("fetch what it points to: git lfs pull")
        }
        Some(name)
            if name.ends_with("picture")
                || name.ends_with("film (MP4)")
                || name.ends_with("icon")
                || name.ends_with("PDF") =>
        {
            Error::new(format!("it is {name}")).hint("convert it to PNG or JPEG")
        }
        Some(name) => Error::new(format!("it is {name}, not a picture")).hint("put a PNG or JPEG file in its place"),
        None if head.is_empty() => {
            Error::new("the file is empty").hint("copy or download it again, or take its samples out of the data")
        }
        None => Error::new("neither PNG nor JPEG").hint("convert it to PNG or JPEG, or replace it if it is damaged"),
    }
}

fn cut(e: std::io::Error) -> Error {
    Error::new(format!("it is cut off: {e}"))
}

/// Texts that may hold EXIF data or XMP are read up to this many bytes, packed or not.
const LONGEST_TEXT: u64 = 1 << 20;

/// A PNG's last chunk.
const END: &[u8; 12] = b"\0\0\0\0IEND\xae\x42\x60\x82";

fn png(file: &mut (impl Read + Seek), essence: bool) -> Result<Header> {
    let mut kept = vec![0; 8];
    file.read_exact(&mut kept).map_err(cut)?;
    let end = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(8))?;
    let (mut head, mut seen_pixels): (Option<[u8; 13]>, bool) = (None, false);
    let (mut exif, mut xmp): (Option<Vec<u8>>, Option<Vec<u8>>) = (None, None);
    let mut at = 8;
    loop {
        // Pillow asks for no end mark either; whether the pixels are all there is the decoder's to say.
        let mut start = [0; 8];
        if end - at < 8 {
            kept.extend(END);
            break;
        }
        file.read_exact(&mut start).map_err(cut)?;
        let length = u64::from(u32::from_be_bytes([start[0], start[1], start[2], start[3]]));
        let [.., a, b, c, d] = start;
        let kind = [a, b, c, d];
        // Behind the pixels that does not matter, as for Pillow.
        if !kind.iter().all(u8::is_ascii_alphanumeric) {
            if !seen_pixels {
                bail!("it is damaged {at} bytes in: no chunk of a PNG begins there")
            }
            kept.extend(END);
            break;
        }
        seen_pixels |= kind == *b"IDAT";
        if kind == *b"CgBI" {
            bail!("it is written in Apple's own way for iPhones (CgBI)"; "convert it to a usual PNG")
        }
        let (whole, mut read) = (at + 12 + length, at + 8);
        let is_text = matches!(&kind, b"eXIf" | b"iTXt" | b"zTXt" | b"tEXt");
        if essence && matches!(&kind, b"IHDR" | b"PLTE" | b"tRNS" | b"IDAT" | b"IEND") {
            kept.extend(start);
            read += file.by_ref().take(length + 4).read_to_end(&mut kept)? as u64;
        } else if (kind == *b"IHDR" || is_text) && length <= LONGEST_TEXT {
            let mut body = vec![];
            read += file.by_ref().take(length).read_to_end(&mut body)? as u64;
            match &kind {
                b"IHDR" => head = body.try_into().ok(),
                b"eXIf" => exif = exif.or(Some(body)),
                kind => text(*kind, &body, &mut exif, &mut xmp),
            }
        }
        if kind == *b"IHDR" && essence {
            head = kept.get(16..29).and_then(|h| h.try_into().ok());
        }
        if kind == *b"IEND" || whole > end {
            break;
        }
        // Within what is buffered, if it can be.
        file.seek_relative((whole - read) as i64)?;
        at = whole;
    }
    let Some([w0, w1, w2, w3, h0, h1, h2, h3, bits, colour, ..]) = head else { bail!("it has no header (IHDR)") };
    let number = |b: [u8; 4]| u32::from_be_bytes(b) as usize;
    Ok(Header {
        size: [number([h0, h1, h2, h3]), number([w0, w1, w2, w3])],
        orientation: orientation::of(exif.as_deref(), xmp.as_deref()),
        layout: Layout::Png { bits, colour, essence: kept },
    })
}

/// Takes EXIF data or XMP out of a text chunk, where ImageMagick and Adobe put them.
fn text(kind: [u8; 4], body: &[u8], exif: &mut Option<Vec<u8>>, xmp: &mut Option<Vec<u8>>) {
    let Some(end) = body.iter().position(|&b| b == 0) else { return };
    let (key, rest) = (&body[..end], &body[end + 1..]);
    if !matches!(key, b"XML:com.adobe.xmp" | b"Raw profile type exif") {
        return;
    }
    let unpacked = |packed: &[u8]| {
        let mut out = vec![];
        // What is broken ends where it breaks.
        let _ = flate2::read::ZlibDecoder::new(packed).take(LONGEST_TEXT).read_to_end(&mut out);
        out
    };
    let text = match (&kind, rest) {
        (b"tEXt", text) => text.to_vec(),
        (b"zTXt", [0, packed @ ..]) => unpacked(packed),
        (b"iTXt", [packed, 0, tail @ ..]) => {
            // Language and translated key, each with a zero behind it.
            let Some(text) = tail.splitn(3, |&b| b == 0).nth(2) else { return };
            if *packed == 1 { unpacked(text) } else { text.to_vec() }
        }
        _ => return,
    };
    if key.starts_with(b"XML") {
        *xmp = Some(text);
    } else if exif.is_none() {
        // A line with the kind, one with the length, then hexadecimal digits.
        let digits = text.splitn(4, |&b| b == b'\n').nth(3).unwrap_or(&[]);
        let digits: Vec<u8> = digits.iter().filter_map(|b| (*b as char).to_digit(16)).map(|d| d as u8).collect();
        *exif = Some(digits.chunks_exact(2).map(|d| d[0] << 4 | d[1]).collect());
    }
}

/// Bytes between the segments of a JPEG that are passed over.
const MOST_BETWEEN: usize = 1 << 20;

/// The next byte between segments, of which there have been so many.
fn byte(file: &mut impl Read, between: &mut usize) -> Result<u8> {
    *between += 1;
    if *between > MOST_BETWEEN {
        bail!("it is damaged: no picture data come in {} MiB of other bytes", MOST_BETWEEN >> 20)
    }
    let mut byte = [0];
    file.read_exact(&mut byte).map_err(cut)?;
    Ok(byte[0])
}

/// Walks the segments up to the picture's data.
fn jpeg(file: &mut (impl Read + Seek)) -> Result<Header> {
    let (mut jpeg, mut size) = (Jpeg::default(), None);
    let (mut exif, mut xmp): (Option<Vec<u8>>, Option<Vec<u8>>) = (None, None);
    file.seek_relative(2)?;
    let mut between = 0;
    loop {
        while byte(file, &mut between)? != 0xff {}
        let mut code = 0xff;
        while code == 0xff {
            code = byte(file, &mut between)?;
        }
        // Data, TEM, restart markers and a second start stand alone.
        if matches!(code, 0x00 | 0x01 | 0xd0..=0xd8) {
            continue;
        }
        let mut length = [0u8; 2];
        file.read_exact(&mut length).map_err(cut)?;
        let length = usize::from(u16::from_be_bytes(length)).saturating_sub(2);
        let wanted = matches!(code, 0xc0..=0xcf | 0xe0 | 0xe1 | 0xee) && !matches!(code, 0xc4 | 0xc8 | 0xcc);
        if matches!(code, 0xd9 | 0xda) {
            break;
        }
        if !wanted {
            file.seek_relative(length as i64)?;
            continue;
        }
        let mut segment = vec![0; length];
        file.read_exact(&mut segment).map_err(cut)?;
        match code {
            0xe0 => jpeg.jfif |= segment.starts_with(b"JFIF\0"),
            0xe1 => {
                const XMP: &[u8] = b"http://ns.adobe.com/xap/1.0/\0";
                if let Some(packet) = segment.strip_prefix(XMP) {
                    xmp = Some(packet.to_vec());
                } else if segment.starts_with(b"Exif\0") && exif.is_none() {
                    exif = Some(segment);
                }
            }
            0xee => jpeg.adobe = segment.strip_prefix(b"Adobe").and_then(|a| a.get(6)).copied().or(jpeg.adobe),
            code => size = Some(frame(code, &segment, &mut jpeg)?),
        }
    }
    let Some(size) = size else { bail!("its picture data begin without a header of their own") };
    let orientation = orientation::of(exif.as_deref(), xmp.as_deref());
    Ok(Header { size, orientation, layout: Layout::Jpeg(jpeg) })
}

/// Reads the header of a frame: height and width.
fn frame(code: u8, frame: &[u8], jpeg: &mut Jpeg) -> Result<[usize; 2]> {
    const HINT: &str = "save it again as a usual JPEG (baseline or progressive, Huffman-coded, 8 bits), or as PNG";
    let way = match code {
        0xc0..=0xc2 => None,
        0xc3 => Some("without loss"),
        0xc9..=0xcb | 0xcd..=0xcf => Some("with arithmetic coding"),
        _ => Some("in a hierarchy of pictures"),
    };
    if let Some(way) = way {
        bail!("it is a JPEG coded {way}"; "{HINT}")
    }
    let &[bits, h0, h1, w0, w1, count, ref components @ ..] = frame else { bail!("it is cut off in its header") };
    if bits != 8 {
        bail!("it is a JPEG of {bits} bits a colour"; "{HINT}")
    }
    jpeg.progressive = code == 0xc2;
    let size = [[h0, h1], [w0, w1]].map(|b| usize::from(u16::from_be_bytes(b)));
    if size[0] == 0 {
        bail!("it is a JPEG whose height stands behind its pixels (DNL)"; "{HINT}")
    }
    for c in components.chunks_exact(3).take(usize::from(count)) {
        jpeg.names.push(c[0]);
        jpeg.sampling.push([c[1] >> 4, c[1] & 15]);
    }
    if !matches!(jpeg.names.len(), 1 | 3 | 4) || jpeg.names.len() != usize::from(count) {
        bail!("it is a JPEG of {count} colours"; "{HINT}")
    }
    Ok(size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::image::load_rgb;
    use crate::spec::Alpha;

    #[test]
    fn the_header_says_what_the_decoder_gives() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
        let mut seen = 0;
        for dir in ["golden/a/images", "golden/anyres/images", "pictures"] {
            for entry in std::fs::read_dir(root.join(dir)).unwrap() {
                let path = entry.unwrap().path();
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
        let nothing = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR\0\0\0\0\0\0\0\0\x08\x02\0\0\0\0\0\0\0";
        let files: [(&str, &[u8]); 6] = [
            ("nothing.png", nothing),
            ("cut.jpg", &whole[..30]),
            ("cut.png", b"\x89PNG\r\n"),
            ("short.png", b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR\0\0"),
            ("text.png", b"hello"),
            ("data.jpg", b"\xff\xd8\xff\xda\0\x02"),
        ];
        for (name, bytes) in files {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            let e = upright_size(&path).unwrap_err();
            assert!(e.cause().contains(name) && e.hint_text().is_some(), "{e}");
            assert!(name != "nothing.png" || e.cause().contains("it has no pixels (0 × 0)"), "{e}");
        }
        // Sparse files of many gigabytes: what they hold is looked at as far as it can be a picture.
        let chunk = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR\0\0\0\x08\0\0\0\x08\x08\x02\0\0\0\0\0\0\0";
        for (name, begin) in [("sparse.jpg", &whole[..30]), ("sparse.png", &chunk[..])] {
            let path = dir.path().join(name);
            std::fs::write(&path, begin).unwrap();
            File::options().write(true).open(&path).unwrap().set_len(40 << 30).unwrap();
            let begun = std::time::Instant::now();
            let e = upright_size(&path).unwrap_err();
            assert!(e.cause().contains(name) && e.cause().contains("it is damaged"), "{e}");
            assert!(load_rgb(&path, Alpha::Drop).unwrap_err().cause().contains("it is damaged"));
            assert!(begun.elapsed().as_secs() < 10, "{:?}", begun.elapsed());
        }
        assert!(upright_size(&dir.path().join("none.png")).unwrap_err().cause().contains("none.png"));
    }
}
