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
}

impl From<Vec<Segment>> for Sequences {
    fn from(list: Vec<Segment>) -> Self {
        Self { list, tables: OnceLock::new() }
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
                Ok(self.tables.get_or_init(|| made.clone()).clone())
            }
        }
    }
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
