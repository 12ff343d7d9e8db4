//! Which way up a picture is, as Pillow's `exif_transpose` finds it: the tag of the EXIF data, and if they have none that of the XMP.

pub(super) use image::metadata::Orientation;

/// From a picture's EXIF data (a TIFF structure, with or without `Exif\0\0` before it) and XMP packet.
pub(super) fn of(exif: Option<&[u8]>, xmp: Option<&[u8]>) -> Orientation {
    let tag = exif.and_then(of_exif).or_else(|| xmp.and_then(of_xmp));
    tag.and_then(|t| u8::try_from(t).ok()).and_then(Orientation::from_exif).unwrap_or(Orientation::NoTransforms)
}

/// Do height and width change places?
pub(super) fn turns(o: Orientation) -> bool {
    use Orientation::{Rotate90, Rotate90FlipH, Rotate270, Rotate270FlipH};
    matches!(o, Rotate90 | Rotate270 | Rotate90FlipH | Rotate270FlipH)
}

/// Tag 0x0112 of the first directory.
fn of_exif(exif: &[u8]) -> Option<u32> {
    const TAG: u32 = 0x0112;
    let tiff = exif.strip_prefix(b"Exif\0\0").unwrap_or(exif);
    let big = match tiff.get(..4)? {
        b"MM\0*" => true,
        b"II*\0" => false,
        _ => return None,
    };
    let number = |at: usize, bytes: usize| {
        let raw = tiff.get(at..at.checked_add(bytes)?)?;
        let digit = |n: u32, b: &u8| n << 8 | u32::from(*b);
        Some(if big { raw.iter().fold(0, digit) } else { raw.iter().rev().fold(0, digit) })
    };
    let directory = number(4, 4)? as usize;
    let entry = |i: u32| directory + 2 + 12 * i as usize;
    let found = (0..number(directory, 2)?).map(entry).find(|at| number(*at, 2) == Some(TAG))?;
    let bytes = match number(found + 2, 2)? {
        1 | 7 => 1,
        3 => 2,
        4 => 4,
        _ => return None,
    };
    number(found + 8, bytes)
}

/// `tiff:Orientation`, as an attribute or an element.
fn of_xmp(xmp: &[u8]) -> Option<u32> {
    const NAME: &[u8] = b"tiff:Orientation";
    xmp.windows(NAME.len() + 3).find_map(|w| {
        let digit = match w.strip_prefix(NAME)? {
            [b'=', b'"', digit] | [b'>', digit, _] => *digit,
            _ => return None,
        };
        digit.is_ascii_digit().then(|| u32::from(digit - b'0'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nonsense_leaves_a_picture_as_it_is() {
        let tiff = |tail: &[u8]| [b"MM\0*" as &[u8], tail].concat();
        for exif in [tiff(b""), tiff(b"\xff\xff\xff\xff"), tiff(b"\0\0\0\x08\xff\xff"), b"hello".to_vec(), vec![]] {
            assert_eq!(of(Some(&exif), None), Orientation::NoTransforms);
        }
        assert_eq!(of(None, Some(b"tiff:Orientation=\"x\"")), Orientation::NoTransforms);
        assert_eq!(of(None, Some(b"a tiff:Orientation>3<")), Orientation::Rotate180);
    }
}
