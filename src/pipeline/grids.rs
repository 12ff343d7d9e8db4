//! The grids of tiles that a LLaVA-NeXT folder states (`image_grid_pinpoints`).

use crate::bail;
use crate::data::{GRIDS, ImageProcessor};
use crate::error::{Error, Result};
use crate::model::weights::source::read_text;
use serde_json::Value;
use std::path::Path;

/// Heights and widths of pictures in tiles, in pixels.
type Grids = Vec<[usize; 2]>;

/// The grids of a folder's `config.json`, if it states some; `size` is the edge of a tile.
///
/// # Errors
/// No such list, or others in the file of the picture preparation: transformers cuts pictures up by that and puts their features
/// together by config.json, and fails where the two differ.
pub(super) fn of(dir: &Path, size: usize) -> Result<Option<Grids>> {
    let path = dir.join("config.json");
    let mut json: Value = serde_json::from_str(&read_text(&path)?)?;
    let own = json.get_mut("image_grid_pinpoints").map(Value::take).filter(|own| !own.is_null());
    let own = own.map(|own| list(&path, own)).transpose()?;
    if let Some((file, theirs)) = ImageProcessor::grids(dir)? {
        let theirs = list(&file, theirs)?;
        if theirs != own.clone().unwrap_or_else(|| usual(size)) {
            let here = own.as_ref().map_or_else(|| "none, which means LLaVA-1.6's".to_string(), |own| text(own));
            bail!("{}: image_grid_pinpoints is {}, but {} says {here}", file.display(), text(&theirs), path.display();
                "write the grids that the model was trained with into both files, in the same order")
        }
    }
    Ok(own)
}

/// What to say of a folder with other grids than those of data entries that state none.
pub(super) fn warning(dir: &Path, own: &[[usize; 2]], size: usize) -> Option<String> {
    let sorted = |mut grids: Grids| {
        grids.sort();
        grids
    };
    (sorted(own.to_vec()) != sorted(usual(size))).then(|| {
        format!(
            "{}: image_grid_pinpoints is {}, other than LLaVA-1.6's at {size} px: set grid_pinpoints to it on data entries with resize = \"anyres\"",
            dir.join("config.json").display(),
            text(own)
        )
    })
}

/// LLaVA-1.6's.
fn usual(size: usize) -> Grids {
    GRIDS.map(|g| g.map(|n| n * size)).to_vec()
}

fn text(grids: &[[usize; 2]]) -> String {
    format!("{grids:?}").replace(' ', "")
}

fn list(path: &Path, stated: Value) -> Result<Grids> {
    let cause = format!("{}: image_grid_pinpoints is {stated}", path.display());
    let wrong =
        Error::new(cause).hint("a list of heights and widths in pixels up to 16384, e.g. [[336, 672], [672, 336]]");
    match serde_json::from_value::<Grids>(stated) {
        Err(e) => Err(wrong.source(e)),
        Ok(grids) if !grids.iter().flatten().all(|n| (1..=1 << 14).contains(n)) => Err(wrong),
        Ok(grids) => Ok(grids),
    }
}
