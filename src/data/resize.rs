//! Resampling of 8-bit RGB pictures, equal to Pillow to the bit.
//!
//! Pillow (`libImaging/Resample.c`) convolves along the rows, rounds and clips to 8 bits, then convolves along the
//! columns (or the other way round, see `columns_first`). The weights are computed in f64, normalised, and rounded to 22 fractional bits; a filter is widened by the
//! scale when the picture shrinks.

use std::ops::Range;

/// Fractional bits of the integer weights.
const BITS: u32 = 32 - 8 - 2;

/// An 8-bit RGB picture, rows from the top, three bytes a pixel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rgb {
    pub width: usize,
    pub height: usize,
    /// `height * width * 3` bytes.
    pub data: Vec<u8>,
}

impl Rgb {
    /// A picture of one colour.
    pub fn filled(width: usize, height: usize, colour: [u8; 3]) -> Self {
        Self { width, height, data: colour.repeat(width * height) }
    }

    fn row(&self, y: usize) -> &[u8] {
        &self.data[y * self.width * 3..(y + 1) * self.width * 3]
    }

    /// The pixels of some columns and rows.
    pub fn part(&self, columns: Range<usize>, rows: Range<usize>) -> Rgb {
        let (width, height) = (columns.len(), rows.len());
        let data = rows.flat_map(|y| &self.row(y)[columns.start * 3..columns.end * 3]).copied().collect();
        Rgb { width, height, data }
    }

    /// Copies `other` so that its top left corner comes to lie at (x, y); it must fit.
    pub fn paste(&mut self, other: &Rgb, x: usize, y: usize) {
        for row in 0..other.height {
            let at = ((y + row) * self.width + x) * 3;
            self.data[at..at + other.width * 3].copy_from_slice(other.row(row));
        }
    }
}

/// A resampling filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    Bilinear,
    /// Keys' cubic with a = −1/2.
    Bicubic,
    /// Three lobes.
    Lanczos,
}

impl Filter {
    fn support(self) -> f64 {
        match self {
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
            Self::Lanczos => 3.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        match self {
            Self::Bilinear => (1.0 - x.abs()).max(0.0),
            Self::Bicubic => {
                const A: f64 = -0.5;
                let x = x.abs();
                if x < 1.0 {
                    ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
                } else if x < 2.0 {
                    (((x - 5.0) * x + 8.0) * x - 4.0) * A
                } else {
                    0.0
                }
            }
            Self::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Self::Lanczos => 0.0,
        }
    }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 { 1.0 } else { (x * std::f64::consts::PI).sin() / (x * std::f64::consts::PI) }
}

/// The inputs that one output sample is made of.
struct Taps {
    start: usize,
    weights: Vec<i32>,
}

/// Taps of the outputs in `window`, when `from` samples become `to`.
fn taps(from: usize, to: usize, window: Range<usize>, filter: Filter) -> Vec<Taps> {
    if from == to {
        return window.map(|x| Taps { start: x, weights: vec![1 << BITS] }).collect();
    }
    let scale = from as f64 / to as f64;
    let stretch = scale.max(1.0);
    let support = filter.support() * stretch;
    let inverse = 1.0 / stretch;
    let one = |out: usize| {
        let centre = (out as f64 + 0.5) * scale;
        let start = (centre - support + 0.5).max(0.0) as usize;
        let end = ((centre + support + 0.5) as usize).min(from);
        let raw: Vec<f64> = (start..end).map(|x| filter.weight((x as f64 - centre + 0.5) * inverse)).collect();
        let sum: f64 = raw.iter().sum();
        let fixed = |w: &f64| {
            let w = if sum != 0.0 { w / sum } else { *w } * f64::from(1 << BITS);
            (if w < 0.0 { w - 0.5 } else { w + 0.5 }) as i32
        };
        Taps { start, weights: raw.iter().map(fixed).collect() }
    };
    window.map(one).collect()
}

/// The inputs that some outputs are made of.
fn needed(taps: &[Taps]) -> Range<usize> {
    let start = taps.iter().map(|t| t.start).min().unwrap_or(0);
    let end = taps.iter().map(|t| t.start + t.weights.len()).max().unwrap_or(0);
    start..end
}

const HALF: i32 = 1 << (BITS - 1);

fn clip(sum: i32) -> u8 {
    (sum >> BITS).clamp(0, 255) as u8
}

/// Resizes to `width` × `height`, and computes only the part of the result with columns `x` and rows `y`.
///
/// Every pixel is the one that the whole result would have there.
pub fn resize(src: &Rgb, width: usize, height: usize, x: Range<usize>, y: Range<usize>, filter: Filter) -> Rgb {
    let across = taps(src.width, width, x, filter);
    let down = taps(src.height, height, y, filter);
    // The first pass reads of the source, which may fill the memory, only what the second needs, and copies nothing.
    if columns_first(src, width, height) {
        let columns = needed(&across);
        horizontal(&vertical(src, &down, columns.clone()), &across, columns.start, 0..down.len())
    } else {
        let rows = needed(&down);
        let shifted: Vec<Taps> = down.into_iter().map(|t| Taps { start: t.start - rows.start, ..t }).collect();
        let part = horizontal(src, &across, 0, rows);
        let columns = 0..part.width;
        vertical(&part, &shifted, columns)
    }
}

/// Pillow 13 starts with the columns where the height shrinks by more than twice as many pixels as the width (found by
/// measurement; it matters because of the rounding between the passes).
fn columns_first(src: &Rgb, width: usize, height: usize) -> bool {
    height < src.height && src.height - height > 2 * src.width.saturating_sub(width)
}

/// Resamples `rows`; the taps count from column `first` of the whole picture.
fn horizontal(src: &Rgb, taps: &[Taps], first: usize, rows: Range<usize>) -> Rgb {
    let height = rows.len();
    let mut data = vec![0; taps.len() * height * 3];
    let mut outputs = data.chunks_exact_mut(3);
    for y in rows {
        let row = src.row(y);
        for (t, out) in taps.iter().zip(&mut outputs) {
            let mut sum = [HALF; 3];
            for (p, &w) in row[(t.start - first) * 3..].chunks_exact(3).zip(&t.weights) {
                sum[0] += i32::from(p[0]) * w;
                sum[1] += i32::from(p[1]) * w;
                sum[2] += i32::from(p[2]) * w;
            }
            out.copy_from_slice(&sum.map(clip));
        }
    }
    Rgb { width: taps.len(), height, data }
}

/// Resamples `columns`.
fn vertical(src: &Rgb, taps: &[Taps], columns: Range<usize>) -> Rgb {
    let row_len = columns.len() * 3;
    let mut data = vec![0; row_len * taps.len()];
    let mut sums = vec![0i32; row_len];
    for (t, out) in taps.iter().zip(data.chunks_exact_mut(row_len.max(1))) {
        sums.fill(HALF);
        for (k, &weight) in t.weights.iter().enumerate() {
            for (sum, &v) in sums.iter_mut().zip(&src.row(t.start + k)[columns.start * 3..columns.end * 3]) {
                *sum += i32::from(v) * weight;
            }
        }
        out.iter_mut().zip(&sums).for_each(|(o, &s)| *o = clip(s));
    }
    Rgb { width: columns.len(), height: taps.len(), data }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Width, height, and a texture with edges and gradients.
    fn texture(width: usize, height: usize) -> Rgb {
        let at = |i: usize| {
            let (p, c) = (i / 3, i % 3);
            let (x, y) = (p % width, p / width);
            ((x * 7 + y * 13 + c * 50) ^ (x * y / 3)) as u8
        };
        Rgb { width, height, data: (0..width * height * 3).map(at).collect() }
    }

    fn checksum(p: &Rgb) -> u64 {
        p.data.iter().fold(0u64, |h, &b| h.wrapping_mul(31).wrapping_add(u64::from(b)))
    }

    #[test]
    fn a_window_is_a_part_of_the_whole() {
        let src = texture(53, 41);
        let whole = resize(&src, 30, 64, 0..30, 0..64, Filter::Bicubic);
        let part = resize(&src, 30, 64, 5..25, 10..50, Filter::Bicubic);
        for y in 0..40 {
            assert_eq!(part.row(y), &whole.row(y + 10)[15..75]);
        }
    }

    #[test]
    fn same_size_is_a_copy() {
        let src = texture(9, 5);
        assert_eq!(resize(&src, 9, 5, 0..9, 0..5, Filter::Lanczos), src);
    }

    /// Checksums of what Pillow 13 gives for the same pictures.
    #[test]
    fn equals_pillow() {
        for (from, to, filter, sum) in pillow_checksums() {
            let got = resize(&texture(from.0, from.1), to.0, to.1, 0..to.0, 0..to.1, filter);
            assert_eq!(checksum(&got), sum, "{from:?} → {to:?}, {filter:?}");
        }
    }

    type Case = ((usize, usize), (usize, usize), Filter, u64);
    fn pillow_checksums() -> Vec<Case> {
        vec![
            ((53, 41), (30, 64), Filter::Bilinear, 0xa95f_e97c_a3b3_7f48),
            ((53, 41), (30, 64), Filter::Bicubic, 0x9386_c0bd_3668_d912),
            ((53, 41), (30, 64), Filter::Lanczos, 0x99d6_068f_dd02_b15d),
            ((97, 61), (56, 35), Filter::Bilinear, 0xc9ed_2344_af8b_e387),
            ((97, 61), (56, 35), Filter::Bicubic, 0xc62c_ba51_8d46_ffb8),
            ((97, 61), (56, 35), Filter::Lanczos, 0xb39f_16e6_91eb_168f),
            ((17, 31), (56, 102), Filter::Bilinear, 0xfa0a_ed26_f095_416f),
            ((17, 31), (56, 102), Filter::Bicubic, 0x63d0_b459_4762_61f6),
            ((17, 31), (56, 102), Filter::Lanczos, 0x94be_9eff_e9f2_a539),
            ((200, 3), (7, 9), Filter::Bilinear, 0x7033_5f18_661d_69f1),
            ((200, 3), (7, 9), Filter::Bicubic, 0xf4e1_3975_7716_c8fa),
            ((200, 3), (7, 9), Filter::Lanczos, 0x02b0_3dbb_11df_63ca),
            ((64, 64), (64, 20), Filter::Bilinear, 0xb5b1_a2a6_a16c_a923),
            ((64, 64), (64, 20), Filter::Bicubic, 0xc702_0e8e_1b32_bdc8),
            ((64, 64), (64, 20), Filter::Lanczos, 0x8942_3e52_a462_9171),
            ((1, 1), (5, 4), Filter::Bilinear, 0x5935_62b0_8234_eb80),
            ((1, 1), (5, 4), Filter::Bicubic, 0x5935_62b0_8234_eb80),
            ((1, 1), (5, 4), Filter::Lanczos, 0x5935_62b0_8234_eb80),
            ((59, 124), (56, 117), Filter::Bilinear, 0x8be8_c76c_1f3c_85d2),
            ((59, 124), (56, 117), Filter::Bicubic, 0x74e0_e42c_d585_d9ea),
            ((59, 124), (56, 117), Filter::Lanczos, 0x73f4_cd51_0fb6_ca6d),
            ((20, 90), (33, 31), Filter::Bilinear, 0xaadb_f093_3d27_9ccb),
            ((20, 90), (33, 31), Filter::Bicubic, 0xf520_6e86_0c70_efdb),
            ((20, 90), (33, 31), Filter::Lanczos, 0xd7d1_821b_3498_c4bc),
            ((40, 61), (40, 17), Filter::Bilinear, 0x3b30_7d2e_20e7_0887),
            ((40, 61), (40, 17), Filter::Bicubic, 0x4dfb_aa43_2d7c_cb78),
            ((40, 61), (40, 17), Filter::Lanczos, 0x22c5_5e47_6ae4_c12a),
        ]
    }
}
