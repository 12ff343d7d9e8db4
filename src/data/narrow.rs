//! JPEGs of up to four pixels' width with halved colours: libjpeg repeats colours that are at most two samples wide, while the
//! decoder smooths all. Its smoothing is undone: every sample follows from the smoothed ones, to a level or so.

/// Undoes the smoothing of one colour plane and repeats its samples: rows of `width` ≤ 4, halved in width, and in height if `tall`.
pub(super) fn repeated(plane: &[u8], width: usize, tall: bool) -> Vec<u8> {
    let columns: Vec<Vec<i32>> = {
        let rows: Vec<&[u8]> = plane.chunks_exact(width).collect();
        let left: Vec<i32> = rows.iter().map(|r| i32::from(r[0])).collect();
        let right = |r: &&[u8]| second(i32::from(r[0]), r.get(1..).unwrap_or(&[]));
        if width > 2 { vec![left, rows.iter().map(right).collect()] } else { vec![left] }
    };
    let columns: Vec<Vec<i32>> = if tall { columns.iter().map(|c| unsmoothed(c)).collect() } else { columns };
    let height = plane.len() / width;
    let at = |y: usize, x: usize| columns[x / 2][if tall { y / 2 } else { y }].clamp(0, 255) as u8;
    (0..height).flat_map(|y| (0..width).map(move |x| (y, x))).map(|(y, x)| at(y, x)).collect()
}

/// Whole numbers x with (3·x + near + 2) / 4 = `smooth`, rounded down: the first and the last.
fn third(smooth: i32, near: i32) -> (i32, i32) {
    let low = 4 * smooth - 2 - near;
    (low.div_euclid(3) + i32::from(low.rem_euclid(3) != 0), (low + 3).div_euclid(3))
}

/// Whole numbers x with (3·own + x + 2) / 4 = `smooth`, rounded down.
fn quarter(smooth: i32, own: i32) -> (i32, i32) {
    let low = 4 * smooth - 2 - 3 * own;
    (low, low + 3)
}

/// The middle of what two ranges have in common, or of the narrower one where rounding left them nothing.
fn middle(a: (i32, i32), b: (i32, i32)) -> i32 {
    let both = (a.0.max(b.0), a.1.min(b.1));
    let (low, high) = if both.0 <= both.1 { both } else { a };
    (low + high).div_euclid(2)
}

/// The second sample of a row from the pixels behind its first.
fn second(first: i32, pixels: &[u8]) -> i32 {
    match pixels {
        [one, two, ..] => middle(third(i32::from(*two), first), quarter(i32::from(*one), first)),
        _ => first,
    }
}

/// The samples of a column of twice as many smoothed ones: 3/4 of its own and 1/4 of the nearer neighbour, the first as it is.
fn unsmoothed(column: &[i32]) -> Vec<i32> {
    let mut out: Vec<i32> = vec![];
    for y in (0..column.len()).step_by(2) {
        let next = match out.last() {
            None => column[0],
            Some(&before) => middle(third(column[y], before), quarter(column[y - 1], before)),
        };
        out.push(next);
    }
    out
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

    /// The decoder's smoothing, of a plane of `columns` ≤ 2 samples in width.
    fn smoothed(samples: &[Vec<i32>], width: usize, height: usize, tall: bool) -> Vec<u8> {
        let rows: Vec<Vec<i32>> = (0..height)
            .map(|y| {
                let (own, near) = match (tall, y % 2) {
                    (false, _) => (&samples[y], &samples[y]),
                    (true, 0) => (&samples[y / 2], &samples[(y / 2).saturating_sub(1)]),
                    (true, _) => (&samples[y / 2], &samples[(y / 2 + 1).min(samples.len() - 1)]),
                };
                own.iter().zip(near).map(|(o, n)| (3 * o + n + 2) >> 2).collect()
            })
            .collect();
        let across = |r: &Vec<i32>| {
            let next = |i: usize| r[(i + 1).min(r.len() - 1)];
            let wide = [r[0], (3 * r[0] + next(0) + 2) >> 2, (3 * next(0) + r[0] + 2) >> 2, next(0)];
            wide[..width].iter().map(|v| *v as u8).collect::<Vec<_>>()
        };
        rows.iter().flat_map(across).collect()
    }

    #[test]
    fn samples_come_back_from_their_smoothing_to_two_levels() {
        let (mut worst, mut seed) = (0, 7u32);
        let mut draw = || {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 24) as i32
        };
        for (width, tall) in [(1usize, false), (2, true), (3, false), (3, true), (4, true)] {
            let (height, columns) = (60, width.div_ceil(2));
            let samples: Vec<Vec<i32>> =
                (0..if tall { 30 } else { 60 }).map(|_| (0..columns).map(|_| draw()).collect()).collect();
            let back = repeated(&smoothed(&samples, width, height, tall), width, tall);
            for (y, row) in back.chunks_exact(width).enumerate() {
                for (x, got) in row.iter().enumerate() {
                    worst = worst.max((i32::from(*got) - samples[if tall { y / 2 } else { y }][x / 2]).abs());
                }
            }
        }
        assert!(worst <= 2, "{worst}");
    }

    #[test]
    fn colours_of_the_corners() {
        assert_eq!(rgb([255, 128, 128]), [255; 3]);
        assert_eq!(rgb([76, 85, 255]), [254, 0, 0]);
        assert_eq!(rgb([29, 255, 107]), [0, 0, 254]);
    }
}
