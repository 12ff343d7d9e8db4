use super::*;
use safetensors::SafeTensors;
use serde_json::json;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/a");

/// The golden folder: the committed one, or the one that ADFREEZE_GOLDEN names.
fn golden() -> PathBuf {
    std::env::var_os("ADFREEZE_GOLDEN").map_or_else(|| GOLDEN.into(), PathBuf::from)
}

fn f32s(t: &SafeTensors, name: &str) -> Option<Vec<f32>> {
    let t = t.tensor(name).ok()?;
    Some(t.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect())
}

fn load(p: &ImageProcessor, path: &Path, resize: Resize, alpha: Alpha) -> Result<Vec<f32>> {
    p.load(&ImageRef { path: path.into(), resize, alpha, size: p.crop, tiles: None })
}

#[track_caller]
fn same(name: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{name}");
    let worst = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst <= 1e-6, "{name}: {worst}");
}

#[test]
fn pixel_values_equal_the_reference() {
    let dir = golden();
    let processor = ImageProcessor::from_dir(&dir.join("model")).unwrap();
    let bytes = std::fs::read(dir.join("preprocess.safetensors")).unwrap();
    let want = SafeTensors::deserialize(&bytes).unwrap();
    let mut cases = 0;
    for name in ["exact0", "exact1", "landscape", "portrait", "tiny", "gray", "rgba", "palette"] {
        let name = format!("{name}.png");
        let path = dir.join("images").join(&name);
        let modes = [
            ("clip", Resize::Crop, Alpha::Drop),
            ("pad", Resize::Pad, Alpha::Drop),
            ("alt_white.clip", Resize::Crop, Alpha::White),
        ];
        for (mode, resize, alpha) in modes {
            let key = format!("{mode}.{name}");
            let Some(want) = f32s(&want, &key) else { continue };
            same(&key, &load(&processor, &path, resize, alpha).unwrap(), &want);
            cases += 1;
        }
    }
    assert!(cases >= 12, "{cases}");
}

#[test]
fn jpeg_pixel_values_equal_the_reference_from_its_decoded_bytes_and_nearly_from_the_file() {
    let dir = golden();
    let processor = ImageProcessor::from_dir(&dir.join("model")).unwrap();
    let bytes = std::fs::read(dir.join("preprocess.safetensors")).unwrap();
    let want = SafeTensors::deserialize(&bytes).unwrap();
    for name in ["photo420.jpg", "exif6.jpg"] {
        let t = want.tensor(&format!("rgb.{name}")).unwrap();
        let decoded = Rgb { width: t.shape()[1], height: t.shape()[0], data: t.data().to_vec() };
        let ours = load_rgb(&dir.join("images").join(name), Alpha::Drop).unwrap();
        assert_eq!((ours.width, ours.height), (decoded.width, decoded.height), "{name}");
        let levels = ours.data.iter().zip(&decoded.data).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        assert!(levels <= 5, "{name}: {levels} levels");
        for (mode, resize) in [("clip", Resize::Crop), ("pad", Resize::Pad)] {
            let key = format!("{mode}.{name}");
            if let Some(want) = f32s(&want, &key) {
                same(&key, &processor.process(decoded.clone(), resize), &want);
            }
        }
    }
}

fn processor(size: usize, crop: usize) -> ImageProcessor {
    let json = json!({ "size": size, "crop_size": crop });
    ImageProcessor::from_json(&json).unwrap()
}

#[test]
fn a_picture_smaller_than_the_crop_lies_in_the_middle_of_black() {
    let p = processor(4, 7);
    let out = p.process(Rgb::filled(4, 4, [255; 3]), Resize::Crop);
    let black = (0.0 - p.mean[0]) / p.std[0];
    let column: Vec<bool> = (0..7).map(|y| out[y * 7 + 3] > black).collect();
    assert_eq!(column, [false, false, true, true, true, true, false]);
}

#[test]
fn reads_old_and_new_configurations() {
    let old = ImageProcessor::from_json(&json!({ "size": 336, "crop_size": 336, "resample": 3 })).unwrap();
    let new = json!({ "size": { "shortest_edge": 336 }, "crop_size": { "height": 336, "width": 336 } });
    assert_eq!(old, ImageProcessor::from_json(&new).unwrap());
    assert_eq!(old, ImageProcessor::from_json(&old.to_json()).unwrap());
    let square = ImageProcessor::from_json(&json!({ "size": { "height": 8, "width": 8 } })).unwrap();
    assert!(square.square && square.resized(100, 3) == (8, 8));
    let bad = ImageProcessor::from_json(&json!({ "size": { "height": 8, "width": 9 } })).unwrap_err();
    assert!(bad.cause().contains("size is not supported"), "{bad}");
    let bad = ImageProcessor::from_json(&json!({ "resample": 0 })).unwrap_err();
    assert!(bad.cause().contains("resample = 0"), "{bad}");
}

#[test]
fn another_size_keeps_the_proportion_of_resize_and_crop() {
    let plain = processor(8, 8).at(12);
    assert_eq!((plain.size, plain.crop), (12, 12));
    let larger = processor(10, 8).at(12);
    assert_eq!((larger.size, larger.crop), (15, 12));
    assert_eq!(processor(10, 8).at(8), processor(10, 8));
}

#[test]
fn bad_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let p = processor(8, 8);
    let missing = dir.path().join("none.png");
    let e = load(&p, &missing, Resize::Crop, Alpha::Drop).unwrap_err();
    assert!(e.cause().contains("none.png") && e.hint_text().unwrap().contains("images"), "{e}");
    let whole = std::fs::read(Path::new(GOLDEN).join("images/landscape.png")).unwrap();
    for (name, bytes) in
        [("cut.png", &whole[..whole.len() / 2]), ("text.png", b"hello there" as &[u8]), ("empty.jpg", b"")]
    {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let e = load(&p, &path, Resize::Crop, Alpha::Drop).unwrap_err();
        assert!(e.cause().contains(name) && e.hint_text().is_some(), "{e}");
    }
}

/// Its square would take gigabytes.
#[test]
fn a_long_strip_is_not_padded() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("strip.png");
    let gray = png::ColorType::Grayscale;
    std::fs::write(&path, png_file(40_000, 1, gray, png::BitDepth::Eight, Extra::default(), &[7; 40_000])).unwrap();
    let p = processor(8, 8);
    assert_eq!(load(&p, &path, Resize::Crop, Alpha::Drop).unwrap().len(), 3 * 8 * 8);
    let e = load(&p, &path, Resize::Pad, Alpha::Drop).unwrap_err();
    assert!(e.cause().contains("strip.png") && e.cause().contains("40000 × 40000"), "{e}");
}

/// A PNG file of the given colour type and bit depth.
fn png_file(
    width: u32,
    height: u32,
    color: png::ColorType,
    depth: png::BitDepth,
    extra: Extra,
    data: &[u8],
) -> Vec<u8> {
    let mut out = Vec::new();
    let mut encoder = png::Encoder::new(&mut out, width, height);
    encoder.set_color(color);
    encoder.set_depth(depth);
    if let Some(p) = extra.palette {
        encoder.set_palette(p.to_vec());
    }
    if let Some(t) = extra.trns {
        encoder.set_trns(t.to_vec());
    }
    let mut writer = encoder.write_header().unwrap();
    if let Some(e) = extra.exif {
        writer.write_chunk(png::chunk::eXIf, e).unwrap();
    }
    writer.write_image_data(data).unwrap();
    writer.finish().unwrap();
    out
}

#[derive(Default)]
struct Extra<'a> {
    palette: Option<&'a [u8]>,
    trns: Option<&'a [u8]>,
    exif: Option<&'a [u8]>,
}

/// Every PNG mode; the expected bytes are what Pillow 13 gives.
#[test]
fn converts_every_png_mode_as_pillow() {
    use png::{BitDepth as D, ColorType as C};
    let none = Extra::default;
    let rgb = |file: &[u8], alpha| decode(file, alpha).unwrap().data;
    let bits = png_file(2, 1, C::Grayscale, D::One, none(), &[0b0100_0000]);
    assert_eq!(rgb(&bits, Alpha::Drop), [0, 0, 0, 255, 255, 255]);
    let two = png_file(2, 1, C::Grayscale, D::Two, none(), &[0b0110_0000]);
    assert_eq!(rgb(&two, Alpha::Drop), [85, 85, 85, 170, 170, 170]);
    let gray_alpha = png_file(1, 1, C::GrayscaleAlpha, D::Eight, none(), &[100, 128]);
    assert_eq!(rgb(&gray_alpha, Alpha::Drop), [100; 3]);
    assert_eq!(rgb(&gray_alpha, Alpha::White), [177; 3]);
    let gray16 = png_file(2, 1, C::Grayscale, D::Sixteen, none(), &[0, 200, 1, 44]);
    assert_eq!(rgb(&gray16, Alpha::Drop), [200, 200, 200, 255, 255, 255]);
    let gray16_alpha = png_file(1, 1, C::GrayscaleAlpha, D::Sixteen, none(), &[77, 200, 255, 255]);
    assert_eq!(rgb(&gray16_alpha, Alpha::Drop), [77; 3]);
    let rgb16 = png_file(1, 1, C::Rgb, D::Sixteen, none(), &[1, 255, 2, 255, 3, 0]);
    assert_eq!(rgb(&rgb16, Alpha::Drop), [1, 2, 3]);
    let rgba16 = png_file(1, 1, C::Rgba, D::Sixteen, none(), &[1, 255, 2, 255, 3, 0, 0, 9]);
    assert_eq!(rgb(&rgba16, Alpha::Drop), [1, 2, 3]);
    assert_eq!(rgb(&rgba16, Alpha::White), [255; 3]);
    let extra = Extra { palette: Some(&[9, 8, 7, 60, 50, 40]), trns: Some(&[255, 0]), exif: None };
    let palette = png_file(2, 1, C::Indexed, D::Four, extra, &[0x01]);
    assert_eq!(rgb(&palette, Alpha::Drop), [9, 8, 7, 60, 50, 40]);
    assert_eq!(rgb(&palette, Alpha::White), [9, 8, 7, 255, 255, 255]);
    let keyed = Extra { trns: Some(&[0, 1, 0, 2, 0, 3]), ..none() };
    let keyed = png_file(2, 1, C::Rgb, D::Eight, keyed, &[1, 2, 3, 4, 5, 6]);
    assert_eq!(rgb(&keyed, Alpha::Drop), [1, 2, 3, 4, 5, 6]);
    assert_eq!(rgb(&keyed, Alpha::White), [255, 255, 255, 4, 5, 6]);
}

/// Orientations 1..8 of the picture `1 2 / 3 4 / 5 6` (gray levels), from a PNG eXIf chunk.
#[test]
fn applies_every_orientation() {
    let upright: [(usize, [u8; 6]); 8] = [
        (2, [1, 2, 3, 4, 5, 6]),
        (2, [2, 1, 4, 3, 6, 5]),
        (2, [6, 5, 4, 3, 2, 1]),
        (2, [5, 6, 3, 4, 1, 2]),
        (3, [1, 3, 5, 2, 4, 6]),
        (3, [5, 3, 1, 6, 4, 2]),
        (3, [6, 4, 2, 5, 3, 1]),
        (3, [2, 4, 6, 1, 3, 5]),
    ];
    for (value, (width, want)) in (1u8..).zip(upright) {
        let exif = [b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0" as &[u8], &[value], &[0; 6]].concat();
        let extra = Extra { exif: Some(&exif), ..Extra::default() };
        let file = png_file(2, 3, png::ColorType::Grayscale, png::BitDepth::Eight, extra, &[1, 2, 3, 4, 5, 6]);
        let got = decode(&file, Alpha::Drop).unwrap();
        assert_eq!(got.width, width, "orientation {value}");
        let gray: Vec<u8> = got.data.iter().step_by(3).copied().collect();
        assert_eq!(gray, want, "orientation {value}");
    }
}

/// Pictures that Pillow wrote, with its own reading of one pixel on the left and one on the right.
#[test]
fn reads_every_kind_of_jpeg_nearly_as_pillow() {
    let cases: [(&str, [[u8; 3]; 2]); 5] = [
        ("cmyk", [[49, 190, 216], [159, 152, 49]]),
        ("ycck", [[32, 225, 41], [54, 6, 0]]),
        ("gray", [[200; 3], [10; 3]]),
        ("progressive", [[199, 40, 11], [10, 20, 179]]),
        ("rgb", [[200, 40, 10], [10, 20, 180]]),
    ];
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/pictures");
    for (name, want) in cases {
        let picture = load_rgb(&dir.join(format!("{name}.jpg")), Alpha::Drop).unwrap();
        for (x, want) in [2, 13].into_iter().zip(want) {
            let at = (2 * picture.width + x) * 3;
            let got = &picture.data[at..at + 3];
            assert!(got.iter().zip(want).all(|(a, b)| a.abs_diff(b) <= 3), "{name}: {got:?} for {want:?}");
        }
    }
}

/// Pillow refuses each of these too ("image file is truncated").
#[test]
fn a_jpeg_that_is_cut_off_anywhere_is_refused_and_one_with_more_behind_it_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let pictures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/pictures");
    let own = ["cmyk", "gray", "progressive", "rgb", "ycck"].map(|n| pictures.join(n).with_extension("jpg"));
    let golden = ["exif6.jpg", "photo420.jpg"].map(|n| Path::new(GOLDEN).join("images").join(n));
    for path in own.iter().chain(&golden) {
        let whole = std::fs::read(path).unwrap();
        let picture = decode(&whole, Alpha::Drop).unwrap();
        // Whatever may follow: filling, a second picture (MPO), half a marker.
        for more in [b"\0\0\0" as &[u8], b"\xff", &whole, &whole[..whole.len() / 2]] {
            let longer = [&whole, more].concat();
            assert!(decode(&longer, Alpha::Drop).unwrap().data == picture.data, "{}", path.display());
        }
        for length in 0..whole.len() {
            assert!(decode(&whole[..length], Alpha::Drop).is_err(), "{}, {length} bytes", path.display());
        }
        let cut = dir.path().join("cut.jpg");
        std::fs::write(&cut, &whole[..whole.len() - 1]).unwrap();
        let e = load_rgb(&cut, Alpha::Drop).unwrap_err();
        assert!(e.cause().contains("cut.jpg: it is cut off") && e.hint_text().unwrap().contains("again"), "{e}");
    }
}
