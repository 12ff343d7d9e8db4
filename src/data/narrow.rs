//! JPEGs of up to four pixels' width with halved colours: libjpeg repeats colours that are at most two samples wide, while the
//! decoder smooths all and gives no samples. Its smoothing is undone: nearly every sample follows from the smoothed ones.

/// Columns to which a narrow picture is widened before it is decoded: as many as its blocks have, so that more of the smoothed
/// samples are seen.
pub(super) const BLOCK: usize = 8;

/// Undoes the smoothing of one colour plane, rows of [`BLOCK`] pixels, and repeats its samples: rows of `width` ≤ 4, halved in
/// width, and in height if `tall`.
pub(super) fn repeated(plane: &[u8], width: usize, tall: bool) -> Vec<u8> {
    let rows: Vec<Vec<u8>> = plane.chunks_exact(BLOCK).map(samples).collect();
    let columns: Vec<Vec<u8>> = (0..width.div_ceil(2))
        .map(|x| rows.iter().map(|r| r[x]).collect())
        .map(|column: Vec<u8>| if tall { samples(&column) } else { column })
        .collect();
    let at = |y: usize, x: usize| columns[x / 2][if tall { y / 2 } else { y }];
    (0..rows.len()).flat_map(|y| (0..width).map(move |x| (y, x))).map(|(y, x)| at(y, x)).collect()
}

/// The samples behind twice as many smoothed ones. The first is as it was; each other is 3/4 of its own and 1/4 of the nearer
/// neighbour, rounded, which leaves two or three values to a sample. Those are taken that fit all best (a shortest path).
fn samples(smooth: &[u8]) -> Vec<u8> {
    let Some((&first, behind)) = smooth.split_first() else { return vec![] };
    let mut costs = [NONE; 256];
    costs[usize::from(first)] = 0;
    let mut from: Vec<[u8; 256]> = vec![];
    for pair in behind.chunks_exact(2) {
        let (ends, begins) = (i32::from(pair[0]), i32::from(pair[1]));
        let (mut next, mut back) = ([NONE; 256], [0; 256]);
        for before in (0..=255u8).filter(|&b| costs[usize::from(b)] != NONE) {
            // Where (3·x + before + 2) / 4 is `begins`, and one further, where the decoder rounded otherwise.
            let low = (4 * begins - 2 - i32::from(before)).div_euclid(3);
            for x in (low.max(0)..=(low + 3).clamp(0, 255)).chain((low > 255).then_some(255)) {
                let off = (mix(i32::from(before), x) - ends).abs() + (mix(x, i32::from(before)) - begins).abs();
                let cost = costs[usize::from(before)].saturating_add(off.unsigned_abs());
                if cost < next[x as usize] {
                    (next[x as usize], back[x as usize]) = (cost, before);
                }
            }
        }
        costs = next;
        from.push(back);
    }
    let mut last = (0..=255u8).min_by_key(|&x| costs[usize::from(x)]).unwrap_or(first);
    let mut out = vec![last];
    for back in from.iter().rev() {
        last = back[usize::from(last)];
        out.push(last);
    }
    out.reverse();
    out
}

/// The cost of a value that is out of the question.
const NONE: u32 = u32::MAX;

/// The decoder's smoothing of a sample with its neighbour.
fn mix(own: i32, near: i32) -> i32 {
    (3 * own + near + 2) >> 2
}

/// libjpeg's colours of Y, Cb and Cr.
pub(super) fn rgb([y, cb, cr]: [u8; 3]) -> [u8; 3] {
    // Fixed point with 16 fractional bits, as jdcolor.c has it.
    const fn fix(x: f64) -> i32 {
        (x * 65536.0 + 0.5) as i32
    }
    const HALF: i32 = 1 << 15;
    let (y, cb, cr) = (i32::from(y), i32::from(cb) - 128, i32::from(cr) - 128);
    let red = (fix(1.402) * cr + HALF) >> 16;
    let green = (-fix(0.344_14) * cb - fix(0.714_14) * cr + HALF) >> 16;
    let blue = (fix(1.772) * cb + HALF) >> 16;
    [y + red, y + green, y + blue].map(|v| v.clamp(0, 255) as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The decoder's smoothing, of a plane of four samples in width.
    fn smoothed(samples: &[[i32; 4]], height: usize, tall: bool) -> Vec<u8> {
        let row = |y: usize| -> [i32; 4] {
            let (own, near) = match (tall, y % 2) {
                (false, _) => (y, y),
                (true, 0) => (y / 2, (y / 2).saturating_sub(1)),
                (true, _) => (y / 2, (y / 2 + 1).min(samples.len() - 1)),
            };
            [0, 1, 2, 3].map(|x| mix(samples[own][x], samples[near][x]))
        };
        let across = |r: [i32; 4]| {
            (0..BLOCK)
                .map(move |x| mix(r[x / 2], r[if x % 2 == 0 { (x / 2).saturating_sub(1) } else { (x / 2 + 1).min(3) }]))
        };
        (0..height).flat_map(|y| across(row(y))).map(|v| v as u8).collect()
    }

    #[test]
    fn samples_come_back_from_their_smoothing_to_a_level() {
        let mut seed = 7u32;
        let mut draw = || {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 24) as i32
        };
        for (width, tall) in [(1usize, false), (2, true), (3, false), (3, true), (4, true)] {
            let drawn: Vec<[i32; 4]> = (0..if tall { 40 } else { 80 }).map(|_| [(); 4].map(|()| draw())).collect();
            let back = repeated(&smoothed(&drawn, 80, tall), width, tall);
            assert_eq!(back.len(), 80 * width);
            let off: Vec<i32> = back
                .chunks_exact(width)
                .enumerate()
                .flat_map(|(y, row)| row.iter().enumerate().map(move |(x, got)| (y, x, i32::from(*got))))
                .map(|(y, x, got)| (got - drawn[if tall { y / 2 } else { y }][x / 2]).abs())
                .collect();
            let (worst, mean) = (off.iter().max(), off.iter().sum::<i32>() as f32 / off.len() as f32);
            assert!(worst <= Some(&2) && mean < 0.3, "{width} {tall}: {worst:?} {mean}");
        }
    }

    #[test]
    fn extremes_and_impossible_planes_give_samples() {
        assert_eq!(samples(&[255, 191, 64, 0]), [255, 0]);
        assert_eq!(samples(&[0, 0, 255, 255]).len(), 2);
        assert_eq!(samples(&[255, 0, 0, 255, 255]).len(), 3);
        assert_eq!(samples(&[]), [0u8; 0]);
    }

    #[test]
    fn colours_of_the_corners() {
        assert_eq!(rgb([255, 128, 128]), [255; 3]);
        assert_eq!(rgb([76, 85, 255]), [254, 0, 0]);
        assert_eq!(rgb([29, 255, 107]), [0, 0, 254]);
    }
}
