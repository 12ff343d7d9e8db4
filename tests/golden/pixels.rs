//! Pixel values: PNG to the bit, JPEG from the reference's decoded picture.

use super::Golden;
use adfreeze::data::image::{ImageRef, Rgb};
use adfreeze::spec::{Alpha, Resize};

/// Our arithmetic after the 8-bit resize is the reference's up to rounding.
const EXACT: f64 = 1e-6;

pub fn run(g: &Golden) {
    let (all, processor) = (g.tensors("preprocess.safetensors"), g.images());
    let mut seen = 0;
    for (key, want) in all.iter().filter(|(k, _)| !k.starts_with("rgb.")) {
        let (alt, rest) = key.strip_prefix("alt_white.").map_or((Alpha::Drop, key.as_str()), |r| (Alpha::White, r));
        if rest.starts_with("alt_noexif.") {
            continue; // LLaVA's loader, which ignores EXIF; we apply it.
        }
        let (mode, image) = rest.split_once('.').unwrap();
        let resize = if mode == "pad" { Resize::Pad } else { Resize::Crop };
        let jpeg = all.get(&format!("rgb.{image}"));
        let got = match jpeg {
            Some(rgb) => {
                let (h, w, _) = rgb.dims3().unwrap();
                let bytes = rgb.flatten_all().unwrap().to_vec1::<u8>().unwrap();
                processor.process(Rgb { width: w, height: h, data: bytes }, resize)
            }
            None => {
                let (path, size) = (g.path("images").join(image), processor.crop);
                processor.load(&ImageRef { path, resize, alpha: alt, size, tiles: None }).unwrap()
            }
        };
        let error = super::flat(want).iter().zip(&got).map(|(a, b)| (a - f64::from(*b)).abs()).fold(0.0, f64::max);
        assert_eq!(want.elem_count(), got.len());
        g.case(&format!("pixels {key}"), error, EXACT);
        seen += 1;
    }
    assert!(seen >= 10, "only {seen} pictures");
}
