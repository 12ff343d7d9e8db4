//! The layout of a micro-batch: soft tokens in front of each sequence, then its text (with soft tokens in front of its pictures); visual tokens in it or beside it.

use super::{Batch, Prefix, Vlm};
use crate::bail;
use crate::error::Result;
use crate::model::visual::{self, Shown};
use crate::spec::{Deliver, PrefixPlace};

/// The rows that the language model computes on.
pub(super) struct Stream {
    /// Token ids; those of rows that hold no token's embedding mean nothing.
    pub(super) ids: Vec<u32>,
    pub(super) lengths: Vec<usize>,
    pub(super) targets: Vec<(u32, u32)>,
    /// Rows that visual tokens take the place of, and the rows of the projected features (or the newline's, behind them) that
    /// belong there.
    pub(super) spliced: Vec<u32>,
    pub(super) features: Vec<u32>,
    /// The newline's row, if a picture in tiles is shown.
    pub(super) newline: Option<u32>,
    /// Pictures that stand beside the stream.
    pub(super) shown: Vec<Shown>,
    /// Rows of each prefix's tokens: all of the first sequence's (or picture's), then the next one's.
    pub(super) prefixes: Vec<Vec<u32>>,
}

/// Rows of each shown picture's visual tokens, and the newline's row.
type PictureRows = (Vec<Vec<u32>>, Option<u32>);

impl Vlm {
    /// Lays out the rows of a batch: prefixes in front of each sequence and picture, the text, visual tokens in it or beside it.
    pub(super) fn stream(&self, batch: &Batch, adapters_off: bool) -> Result<Stream> {
        let (pictures, newline) = self.picture_rows(batch)?;
        let prefixes: &[Prefix] = if adapters_off { &[] } else { &self.prefixes };
        let mut soft = Vec::with_capacity(prefixes.len());
        for p in prefixes {
            soft.push((p.before, p.embeddings.value.dim(0)?));
        }
        let mut out = Stream {
            ids: Vec::with_capacity(batch.ids.len()),
            lengths: Vec::with_capacity(batch.lengths.len()),
            targets: Vec::new(),
            spliced: Vec::new(),
            features: pictures.iter().flatten().copied().collect(),
            newline,
            shown: Vec::new(),
            prefixes: vec![Vec::new(); prefixes.len()],
        };
        let mut moved = Vec::with_capacity(batch.ids.len());
        let mut ids = batch.ids.iter();
        // Image tokens of each picture in its order, and how many of the present one's are still to come.
        let mut runs = pictures.iter().map(|rows| self.deliver.image_tokens(rows.len()));
        let mut left = 0;
        for (owner, n) in batch.lengths.iter().enumerate() {
            let start = out.ids.len();
            out.put(&soft, PrefixPlace::Text);
            for id in ids.by_ref().take(*n) {
                if Some(*id) == self.image_token_id {
                    if left == 0 {
                        left = runs.next().unwrap_or(0);
                        out.put(&soft, PrefixPlace::Picture);
                    }
                    left = left.saturating_sub(1);
                    self.place(&mut out, owner);
                }
                moved.push(out.ids.len() as u32);
                out.ids.push(*id);
            }
            let end = out.ids.len();
            out.lengths.push(end - start);
            if let Some(last) = out.shown.last_mut().filter(|last| last.owner == owner) {
                last.rows.end = end;
            }
        }
        out.targets = batch.targets.iter().map(|(row, id)| (moved[*row as usize], *id)).collect();
        let images = if self.deliver == Deliver::Splice { out.spliced.len() } else { out.shown.len() };
        let wanted: usize = pictures.iter().map(|rows| self.deliver.image_tokens(rows.len())).sum();
        if images != wanted {
            bail!("{images} image tokens for {} pictures that take {wanted}", pictures.len();
                "a text holds the image token itself, or the sample's tokens were cut inside a picture")
        }
        for (shown, rows) in out.shown.iter_mut().zip(pictures) {
            shown.tokens = rows;
        }
        Ok(out)
    }

    /// Which rows of the visual tokens each picture shows, in the order of the batch.
    fn picture_rows(&self, batch: &Batch) -> Result<PictureRows> {
        let pieces = batch.pixels.as_ref().map_or(Ok(0), |p| p.dim(0))?;
        let per = self.visual_tokens_per_image()?;
        let tiled = batch.layouts.iter().any(Option::is_some);
        if tiled && self.newline.is_none() {
            bail!("a picture is in tiles, but the model has no newline token to end their rows";
                "it was made without resize = \"anyres\": choose another `resize`")
        }
        let distinct = visual::rows(&batch.layouts, pieces, per)?;
        let of = |p: &u32| distinct.get(*p as usize).cloned();
        let Some(rows) = batch.pictures.iter().map(of).collect() else {
            bail!("a text shows a picture that is not in its batch")
        };
        Ok((rows, tiled.then_some((pieces * per) as u32)))
    }

    /// Notes an image token in the next row.
    fn place(&self, out: &mut Stream, owner: usize) {
        let row = out.ids.len();
        if self.deliver == Deliver::Splice {
            return out.spliced.push(row as u32);
        }
        if let Some(last) = out.shown.last_mut().filter(|last| last.owner == owner) {
            last.rows.end = row;
        }
        out.shown.push(Shown { owner, rows: row..row, tokens: Vec::new() });
    }
}

impl Stream {
    /// Appends the rows of the soft tokens (their place, how many) that stand `here`.
    fn put(&mut self, soft: &[(PrefixPlace, usize)], here: PrefixPlace) {
        for (rows, (_, n)) in self.prefixes.iter_mut().zip(soft).filter(|(_, (place, _))| *place == here) {
            rows.extend((0..*n).map(|i| (self.ids.len() + i) as u32));
            self.ids.extend(std::iter::repeat_n(0, *n));
        }
    }
}
