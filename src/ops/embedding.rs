//! Rows by index: token embeddings, splicing visual features into a sequence, picking labelled rows.

use super::{Real, data, dims2, dispatch, tensor, update};
use crate::bail;
use crate::error::Result;
use candle_core::Tensor;

/// Rows of `table` `[V, D]` in the order of `ids` → `[ids, D]`.
pub fn gather(table: &Tensor, ids: &[u32]) -> Result<Tensor> {
    let (v, d) = dims2(table, "gather")?;
    if let Some(id) = ids.iter().find(|i| **i as usize >= v) {
        bail!("gather: index {id} is outside the table of {v} rows")
    }
    dispatch!(table, "gather", T => {
        let table = data::<T>(table)?;
        let mut out = Vec::with_capacity(ids.len() * d);
        for id in ids {
            out.extend_from_slice(&table[*id as usize * d..(*id as usize + 1) * d]);
        }
        tensor(out, (ids.len(), d))
    })
}

/// `table[ids[i]] += rows[i]` in place, in order: backward of [`gather`], deterministic.
pub fn scatter_add_(table: &Tensor, ids: &[u32], rows: &Tensor) -> Result<()> {
    place(table, ids, rows, |t, r| *t += r, |t, r| *t += r)
}

/// `table[ids[i]] = rows[i]` in place.
pub fn scatter_(table: &Tensor, ids: &[u32], rows: &Tensor) -> Result<()> {
    place(table, ids, rows, |t, r| *t = r, |t, r| *t = r)
}

fn place(
    table: &Tensor,
    ids: &[u32],
    rows: &Tensor,
    single: impl Fn(&mut f32, f32),
    double: impl Fn(&mut f64, f64),
) -> Result<()> {
    fn run<T: Real>(table: &Tensor, ids: &[u32], rows: &Tensor, d: usize, f: impl Fn(&mut T, T)) -> Result<()> {
        let rows = data::<T>(rows)?;
        update::<T>(table, |table| {
            for (id, row) in ids.iter().zip(rows.chunks_exact(d)) {
                for (t, r) in table[*id as usize * d..(*id as usize + 1) * d].iter_mut().zip(row) {
                    f(t, *r);
                }
            }
        })
    }
    let ((v, d), (n, width)) = (dims2(table, "scatter")?, dims2(rows, "scatter")?);
    if n != ids.len() || width != d || ids.iter().any(|i| *i as usize >= v) {
        bail!("scatter: {} indices, rows {:?}, table {:?}", ids.len(), rows.dims(), table.dims())
    }
    match table.dtype() {
        candle_core::DType::F32 => run::<f32>(table, ids, rows, d, single),
        _ => run::<f64>(table, ids, rows, d, double),
    }
}
