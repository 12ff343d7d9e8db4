//! The sequences of a batch, and their tables for the kernels: every layer reads the same ones, so they are uploaded once.

use super::super::launch::upload;
use super::Segment;
use crate::error::Result;
use candle_core::{Device, Tensor};
use std::ops::{Deref, Range};
use std::sync::OnceLock;

/// Queries of a block of the forward kernel, rows of a block of the backward ones.
const FORWARD: usize = 128;
const BACKWARD: usize = 64;

/// Sequences that are packed into the rows of Q, K and V.
#[derive(Debug, Clone, Default)]
pub struct Sequences {
    list: Vec<Segment>,
    tables: OnceLock<Tables>,
    #[cfg(any(test, feature = "flash-attn"))]
    ends: OnceLock<Option<[Tensor; 2]>>,
}

impl From<Vec<Segment>> for Sequences {
    fn from(list: Vec<Segment>) -> Self {
        Self { list, ..Self::default() }
    }
}

impl Deref for Sequences {
    type Target = [Segment];
    fn deref(&self) -> &[Segment] {
        &self.list
    }
}

impl Sequences {
    /// The tables on a device, which is the same in all layers; made at the first call.
    pub(super) fn tables(&self, device: &Device) -> Result<Tables> {
        match self.tables.get() {
            Some(t) if t.segments.device().same_device(device) => Ok(t.clone()),
            _ => {
                let made = Tables::new(&self.list, device)?;
                // Those of another device stay.
                drop(self.tables.set(made.clone()));
                Ok(made)
            }
        }
    }
}

#[cfg(any(test, feature = "flash-attn"))]
impl Sequences {
    /// u32 `[S + 1]` each: where the sequences' rows of Q and of K end, behind a 0; made at the first call. None if a sequence skips
    /// keys, or if they leave a gap in the `rows` of the two, which are as many in every layer.
    pub(super) fn ends(&self, rows: [usize; 2], device: &Device) -> Result<Option<[Tensor; 2]>> {
        if let Some(ends) = self.ends.get() {
            return Ok(ends.clone());
        }
        let skips = self.list.iter().any(|s| s.skip.is_some());
        let ends = match (ends(&self.list, |s| &s.q, rows[0]), ends(&self.list, |s| &s.k, rows[1])) {
            (Some(q), Some(k)) if !skips => Some([upload(device, &q, q.len())?, upload(device, &k, k.len())?]),
            _ => None,
        };
        Ok(self.ends.get_or_init(|| ends).clone())
    }
}

/// Where each segment's rows end, behind a 0, if together they are all `rows` from the first on.
#[cfg(any(test, feature = "flash-attn"))]
fn ends(list: &[Segment], of: impl Fn(&Segment) -> &Range<usize>, rows: usize) -> Option<Vec<u32>> {
    let mut ends = vec![0];
    let mut at = 0;
    for range in list.iter().map(of) {
        if range.start != at {
            return None;
        }
        at = range.end;
        ends.push(u32::try_from(at).ok()?);
    }
    (at == rows && rows > 0).then_some(ends)
}

/// What `kernels/attention.cuh` reads of the sequences.
#[derive(Debug, Clone)]
pub(super) struct Tables {
    /// u32 `[S, 8]`: rows of queries and of keys (begin, length), and a range of keys that queries skip from one on.
    pub segments: Tensor,
    /// Blocks of queries of the forward kernel.
    pub forward: Tiles,
    /// Blocks of queries and of keys of the backward ones.
    pub queries: Tiles,
    pub keys: Tiles,
}

/// Every block of rows of every segment, those of a segment that see most keys first.
#[derive(Debug, Clone)]
pub(super) struct Tiles {
    /// u32 `[W, 2]`: segment and block in it.
    pub table: Tensor,
    /// W.
    pub count: usize,
}

impl Tables {
    fn new(list: &[Segment], device: &Device) -> Result<Self> {
        let row = |s: &Segment| {
            let (from, keys) = s.skip.as_ref().map_or((0, 0..0), |skip| (skip.from, skip.keys.clone()));
            [s.q.start, s.q.len(), s.k.start, s.k.len(), from, keys.start, keys.end, 0].map(|x| x as u32)
        };
        let rows: Vec<u32> = list.iter().flat_map(row).collect();
        let tiles = |rows: fn(&Segment) -> &Range<usize>, size| Tiles::new(list, device, rows, size);
        Ok(Self {
            segments: upload(device, &rows, (list.len(), 8))?,
            forward: tiles(|s| &s.q, FORWARD)?,
            queries: tiles(|s| &s.q, BACKWARD)?,
            keys: tiles(|s| &s.k, BACKWARD)?,
        })
    }
}

impl Tiles {
    fn new(list: &[Segment], device: &Device, rows: fn(&Segment) -> &Range<usize>, size: usize) -> Result<Self> {
        let mut tiles: Vec<u32> = Vec::new();
        for (i, s) in list.iter().enumerate().filter(|(_, s)| !s.k.is_empty()) {
            for block in (0..rows(s).len().div_ceil(size)).rev() {
                tiles.extend([i as u32, block as u32]);
            }
        }
        let count = tiles.len() / 2;
        Ok(Self { table: upload(device, &tiles, (count, 2))?, count })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sequences_without_gaps_have_ends() {
        let ends = |list: &[Range<usize>], rows| {
            let list: Vec<Segment> = list.iter().map(|r| Segment::new(r.clone(), r.clone())).collect();
            let ends = Sequences::from(list).ends([rows, rows], &Device::Cpu).unwrap();
            ends.map(|e| e.map(|t| t.to_vec1::<u32>().unwrap()))
        };
        assert_eq!(ends(&[0..3, 3..4], 4), Some([vec![0, 3, 4], vec![0, 3, 4]]));
        assert_eq!(ends(&[0..3, 3..4], 5), None);
        assert_eq!(ends(&[0..3, 4..5], 5), None);
        assert_eq!(ends(&[], 0), None);
        let skips = Sequences::from(vec![Segment::two_answers(0, 2, 1, 1)]);
        assert!(skips.ends([4, 4], &Device::Cpu).unwrap().is_none());
    }
}
