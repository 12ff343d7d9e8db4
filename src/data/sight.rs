//! What a model sees of a picture: how large, and how many visual tokens it becomes.

use super::image::ImageRef;
use super::source::Picture;
use crate::recipe::schema::Deliver;

/// How a stage's model sees pictures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sight {
    /// Height and width of what the tower takes, in pixels.
    pub size: usize,
    /// Visual tokens of that.
    pub tokens: usize,
    /// Where they go.
    pub deliver: Deliver,
}

impl Sight {
    /// A picture as this model sees it.
    pub fn of(&self, picture: &Picture) -> ImageRef {
        let Picture { path, resize, alpha } = picture.clone();
        ImageRef { path, resize, alpha, size: self.size }
    }

    /// Image tokens that a picture takes in a text.
    pub fn image_tokens(&self, _: &ImageRef) -> usize {
        self.deliver.image_tokens(self.tokens)
    }
}
