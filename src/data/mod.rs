//! Samples, images, templates, batches, the loader: from files on disk to what a step needs.

pub mod budget;
pub mod dataset;
mod decode;
pub mod encode;
mod file;
mod forms;
mod header;
pub mod image;
pub mod loader;
mod narrow;
mod orientation;
pub mod pixels;
mod processor;
mod raw;
mod read;
pub mod resize;
pub mod sampler;
pub mod sight;
pub mod source;
pub mod synth;
pub mod template;
pub mod tiles;
mod tokenizer;

pub use budget::Budget;
pub use dataset::{Dataset, Item, Stats};
pub use encode::{IGNORE, Sample, TextEncoder, TextSettings};
pub use image::{ImageProcessor, ImageRef};
pub use loader::{Loader, LoaderOptions, StepData};
pub use pixels::{Pixels, load_pixels};
pub use sampler::Plan;
pub use sight::Sight;
pub use source::Picture;
pub use tiles::GRIDS;
