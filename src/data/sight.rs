//! What a model sees of a picture: how large, and how many visual tokens it becomes.

use super::header::upright_size;
use super::image::{ImageRef, MAX_PIXELS};
use super::source::Picture;
use super::tiles::{self, GRIDS, Tiles};
use crate::bail;
use crate::error::Result;
use crate::spec::{Deliver, Resize};

/// How a stage's model sees pictures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sight {
    /// Height and width of what the tower takes, in pixels.
    pub size: usize,
    /// Visual tokens of that.
    pub tokens: usize,
    /// Of them along an edge, where they stand as the picture's square.
    pub side: Option<usize>,
    /// Where they go.
    pub deliver: Deliver,
}

impl Sight {
    /// A picture as this model sees it.
    ///
    /// # Errors
    /// If it is to be cut into tiles and cannot be: its header cannot be read, no grid fits, or the visual tokens form no square.
    pub fn of(&self, picture: &Picture) -> Result<ImageRef> {
        let Picture { path, resize, alpha, .. } = picture.clone();
        let tiles = if resize == Resize::Anyres { Some(self.tiles(picture)?) } else { None };
        Ok(ImageRef { path, resize, alpha, size: self.size, tiles })
    }

    /// Image tokens that a picture takes in a text.
    pub fn image_tokens(&self, image: &ImageRef) -> usize {
        self.deliver.image_tokens(image.tiles.map_or(self.tokens, |t| t.tokens()))
    }

    fn tiles(&self, picture: &Picture) -> Result<Tiles> {
        let (size, path) = (self.size, picture.path.display());
        let Some(side) = self.side else {
            bail!("resize = \"anyres\": the model's visual tokens do not stand as a square of the picture's patches";
                "use a projector that keeps the patches' places (linear, mlp, bottleneck, pixel_shuffle) with \
                 select_feature = \"patch\", or another `resize`")
        };
        let sizes = match &picture.grid_pinpoints {
            Some(sizes) => sizes.to_vec(),
            None => GRIDS.map(|g| g.map(|n| n * size)).to_vec(),
        };
        if let Some([h, w]) = sizes.iter().find(|s| s.iter().any(|n| *n == 0 || n % size != 0)) {
            bail!("grid_pinpoints: [{h}, {w}] is no multiple of the {size} px that the tower sees at once";
                "give heights and widths that are, or leave grid_pinpoints out for LLaVA-1.6's")
        }
        if let Some([h, w]) = sizes.iter().find(|[h, w]| *h as u64 * *w as u64 > MAX_PIXELS) {
            bail!("grid_pinpoints: [{h}, {w}] are more than the {MAX_PIXELS} pixels that are allowed"; "give smaller ones")
        }
        let own = upright_size(&picture.path)?;
        let Some(best) = tiles::best(own, &sizes) else {
            bail!("the image {path} of {} × {} pixels is too narrow to be cut into tiles", own[1], own[0];
                "take its samples out of the data, or use resize = \"pad\"")
        };
        Ok(Tiles { picture: own, grid: best.map(|n| n / size), side })
    }
}
