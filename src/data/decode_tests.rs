use super::*;
use serde_json::Value;

/// Every form of tests/pictures/forms.json (tests/pictures/make.py): name, file, and what Pillow makes of it.
fn forms() -> Vec<(String, Vec<u8>, Value)> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/pictures/forms.json");
    let all: serde_json::Map<String, Value> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    all.into_iter().map(|(name, v)| (name, bytes(&v["file"]), v)).collect()
}

fn bytes(hex: &Value) -> Vec<u8> {
    let digits: Vec<u8> = hex.as_str().unwrap().chars().map(|c| c.to_digit(16).unwrap() as u8).collect();
    digits.chunks_exact(2).map(|d| d[0] << 4 | d[1]).collect()
}

/// What is refused though Pillow reads it, and the words for it.
const REFUSED: [(&str, &str); 4] = [
    ("jpeg arithmetic", "arithmetic coding"),
    ("png wrong checksum of its pixels", "CRC"),
    ("png without palette", "palette"),
    ("png of an iPhone (CgBI)", "CgBI"),
];

/// What Pillow does not see: a clear colour of 2-bit gray or 16-bit RGB, which it compares with the 8-bit colours.
const UNSEEN: [&str; 2] = ["png gray 2 bit, key", "png rgb 16 bit, key"];

#[test]
fn every_form_of_a_picture_has_the_pixels_that_pillow_gives() {
    let (mut exact, mut near, mut problems) = (0, 0, vec![]);
    for (name, file, want) in forms() {
        let Some(rgb) = want.get("rgb") else { continue };
        let white = want.get("white").unwrap_or(rgb);
        for (alpha, want_rgb) in [(Alpha::Drop, rgb), (Alpha::White, white)] {
            if alpha == Alpha::White && UNSEEN.contains(&name.as_str()) {
                continue;
            }
            let got = match decode(&file, alpha) {
                Ok(got) => got,
                Err(e) => {
                    let known = REFUSED.iter().any(|(n, words)| *n == name && e.cause().contains(words));
                    if !known {
                        problems.push(format!("{name}: {e}"));
                    }
                    continue;
                }
            };
            if (got.width as u64, got.height as u64)
                != (want["size"][0].as_u64().unwrap(), want["size"][1].as_u64().unwrap())
            {
                problems.push(format!("{name}: {} × {} for {}", got.width, got.height, want["size"]));
                continue;
            }
            let want_rgb = bytes(want_rgb);
            let gaps: Vec<u8> = got.data.iter().zip(&want_rgb).map(|(a, b)| a.abs_diff(*b)).collect();
            let worst = gaps.iter().max().copied().unwrap();
            let mean = gaps.iter().map(|g| f64::from(*g)).sum::<f64>() / gaps.len() as f64;
            // JPEG decoders round differently, and smooth halved colours differently at a picture's right and lower edge.
            let halved = ["420", "422", "progressive", "restarts", "mpo"].iter().any(|kind| name.contains(kind));
            let allowed = match () {
                () if name.starts_with("png") => (0, 0.0),
                () if halved
                    && !["1 wide", "2 wide", "3 wide", "4 wide"].iter().any(|w| name.contains(&format!(" {w}"))) =>
                {
                    (32, 1.5)
                }
                () => (4, 1.0),
            };
            if worst > allowed.0 || mean > allowed.1 {
                problems.push(format!("{name} {alpha:?}: {worst} levels, {mean:.1} in the mean"));
            }
            if worst == 0 { exact += 1 } else { near += 1 }
        }
    }
    assert!(problems.is_empty(), "{exact} exact, {near} near\n{}", problems.join("\n"));
    assert!(exact >= 90 && near > 0, "{exact} {near}");
}

#[test]
fn what_pillow_refuses_is_refused_in_words() {
    let mut refused = 0;
    for (name, file, want) in forms() {
        let refused_here = REFUSED.iter().any(|(n, _)| *n == name);
        // A text's checksum changes no pixel.
        if (want.get("error").is_none() && !refused_here) || name == "png wrong checksum of a text" {
            continue;
        }
        let e = decode(&file, Alpha::Drop).err().unwrap_or_else(|| panic!("{name} is read"));
        refused += 1;
        for type_name in ["ImageError", "DecodeError", "Some(", "None", "Err(", "struct "] {
            assert!(!e.cause().contains(type_name), "{name}: {e}");
        }
    }
    assert!(refused >= 12, "{refused}");
}
