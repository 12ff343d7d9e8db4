//! Pictures of any resolution (LLaVA-1.6's `anyres`, Liu et al. 2024): the picture as a whole, squeezed into one square, and
//! beside it the same picture as large as a grid of squares allows, cut up into them.
//!
//! Which grid, which part of it is padding, and how many visual tokens remain is what `select_best_resolution`,
//! `get_patch_output_size`, `unpad_image` and `LlavaNextProcessor` of transformers say, in the same f64 arithmetic.

use std::ops::Range;

/// LLaVA-1.6's grids: rows and columns of squares.
pub const GRIDS: [[usize; 2]; 5] = [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]];

/// How a picture is cut up. Sizes are height and width.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tiles {
    /// The picture's own size in pixels, upright.
    pub picture: [usize; 2],
    /// Rows and columns of tiles.
    pub grid: [usize; 2],
    /// Visual tokens along an edge of a tile.
    pub side: usize,
}

impl Tiles {
    /// What the tower sees: the whole picture and the tiles.
    pub fn pieces(&self) -> usize {
        1 + self.grid[0] * self.grid[1]
    }

    /// Visual tokens: of the whole picture, of the tiles without what shows padding, and a newline after each row of those.
    pub fn tokens(&self) -> usize {
        let [rows, columns] = self.shown();
        self.side * self.side + rows.len() * (columns.len() + 1)
    }

    /// The visual tokens in their order, as numbers of the pieces' own tokens (piece by piece, row by row); `None` is a newline.
    pub fn layout(&self) -> Vec<Option<u32>> {
        let (side, [rows, columns]) = (self.side, self.shown());
        let of_tiles = |y: usize, x: usize| {
            let piece = 1 + y / side * self.grid[1] + x / side;
            Some(((piece * side + y % side) * side + x % side) as u32)
        };
        let mut out: Vec<Option<u32>> = (0..(side * side) as u32).map(Some).collect();
        for y in rows {
            out.extend(columns.clone().map(|x| of_tiles(y, x)));
            out.push(None);
        }
        out
    }

    /// Rows and columns of the tiles' tokens that show the picture.
    fn shown(&self) -> [Range<usize>; 2] {
        let [height, width] = self.grid.map(|n| (n * self.side) as f64);
        let [h, w] = self.picture.map(|n| n as f64);
        let inner = |all: f64, part: f64| {
            let cut = (all as usize).saturating_sub(whole(part)) / 2;
            cut..all as usize - cut
        };
        if w / h > width / height {
            [inner(height, h * (width / w)), 0..width as usize]
        } else {
            [0..height as usize, inner(width, w * (height / h))]
        }
    }
}

/// Python's `int(round(x, 7))`: rounded to seven decimals, half to even of the exact value.
fn whole(x: f64) -> usize {
    format!("{x:.7}").parse::<f64>().unwrap_or(x) as usize
}

/// The one of `sizes` that keeps most of a picture, and of several such the one that wastes least; the first of equals. `None`
/// if in none of them a pixel of it would be left.
pub fn best(picture: [usize; 2], sizes: &[[usize; 2]]) -> Option<[usize; 2]> {
    let (mut best, mut kept, mut wasted) = (None, 0, usize::MAX);
    for &[height, width] in sizes {
        let [h, w] = picture.map(|n| n as f64);
        let scale = (width as f64 / w).min(height as f64 / h);
        let pixels = ((w * scale) as usize * (h * scale) as usize).min(picture[0] * picture[1]);
        // What is kept never exceeds the size but by rounding.
        let waste = (width * height).saturating_sub(pixels);
        if pixels > kept || pixels == kept && pixels > 0 && waste < wasted {
            (best, kept, wasted) = (Some([height, width]), pixels, waste);
        }
    }
    best
}

/// How large a picture becomes inside `target` with its proportions kept.
pub fn fitted(picture: [usize; 2], target: [usize; 2]) -> [usize; 2] {
    let [h, w] = picture.map(|n| n as f64);
    let (across, down) = (target[1] as f64 / w, target[0] as f64 / h);
    if across < down {
        [((h * across).ceil() as usize).min(target[0]), target[1]]
    } else {
        [target[0], ((w * down).ceil() as usize).min(target[1])]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wide_picture_by_hand() {
        // 2 × 1 of tokens in a 1 × 2 grid of 4 × 4 tokens: 4 rows of 8 would be all; half as high leaves 2 of the 4 rows.
        let t = Tiles { picture: [10, 40], grid: [1, 2], side: 4 };
        assert_eq!((t.pieces(), t.shown(), t.tokens()), (3, [1..3, 0..8], 16 + 2 * 9));
        let layout = t.layout();
        assert_eq!(layout.len(), t.tokens());
        assert!(layout[..16].iter().enumerate().all(|(i, n)| *n == Some(i as u32)));
        // Row 1 of the first tile, then of the second.
        let row: Vec<Option<u32>> = (20..24).chain(36..40).map(Some).chain([None]).collect();
        assert_eq!(layout[16..25], row);
    }

    #[test]
    fn python_rounds_before_it_cuts() {
        assert_eq!([whole(2.999_999_96), whole(2.999_999_4), whole(3.0), whole(0.2)], [3, 2, 3, 0]);
    }

    #[test]
    fn the_grid_that_keeps_most_then_the_one_that_wastes_least() {
        let sizes = GRIDS.map(|g| g.map(|n| n * 336));
        assert_eq!(best([672, 672], &sizes), Some([672, 672]));
        assert_eq!(best([300, 1000], &sizes), Some([336, 1008]));
        // Small enough for all: the smallest, and of two alike the first.
        assert_eq!(best([100, 100], &sizes), Some([336, 672]));
        assert_eq!(best([1, 5000], &sizes), None);
        assert_eq!(fitted([100, 50], [336, 672]), [336, 168]);
        assert_eq!(fitted([100, 333], [336, 672]), [202, 672]);
    }
}
