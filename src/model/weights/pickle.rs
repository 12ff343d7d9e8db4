//! PyTorch files: names, shapes and strides through candle's reader, which runs no code of theirs; data by the strides, which
//! may pick a slice, a transpose or a repetition out of a storage.

use crate::bail;
use crate::error::{Error, Result};
use candle_core::pickle::{PthTensors, TensorInfo};
use candle_core::{Device, Tensor};
use std::fs::File;
use std::io::{BufReader, Read, copy, sink};
use std::path::Path;

/// Keys under which training programs keep a model's tensors where they are not at the top of the file.
const INSIDE: [&str; 3] = ["state_dict", "model_state_dict", "model"];

/// Opens a file: its tensors are at the top, or under one of [`INSIDE`].
pub(super) fn open(path: &Path) -> candle_core::Result<PthTensors> {
    let top = PthTensors::new(path, None)?;
    if !top.tensor_infos().is_empty() {
        return Ok(top);
    }
    let inside = INSIDE.iter().filter_map(|key| PthTensors::new(path, Some(key)).ok());
    Ok(inside.into_iter().find(|t| !t.tensor_infos().is_empty()).unwrap_or(top))
}

/// The tensor, contiguous, on the CPU.
///
/// # Errors
/// If the storage is shorter than shape and strides say, or damaged.
pub(super) fn load(path: &Path, info: &TensorInfo) -> Result<Tensor> {
    let (dims, strides, size) = (info.layout.dims(), info.layout.stride(), info.dtype.size_in_bytes());
    let (start, bytes) = extent(info).ok_or_else(|| Error::new("shape and strides overflow"))?;
    let mut zip = zip::ZipArchive::new(BufReader::new(File::open(path)?)).map_err(|e| Error::new(e.to_string()))?;
    let mut entry = zip.by_name(&info.path).map_err(|e| Error::new(e.to_string()))?;
    let there = entry.size();
    if start.checked_add(bytes).is_none_or(|end| end > there) {
        bail!(
            "its storage has {there} bytes, shape and strides ask for bytes {start} to {}",
            start.saturating_add(bytes)
        )
    }
    copy(&mut entry.by_ref().take(start), &mut sink())?;
    // Room for what is there, not for what the directory of the file claims.
    let mut storage = Vec::with_capacity(bytes.min(std::fs::metadata(path)?.len()) as usize);
    entry.by_ref().take(bytes).read_to_end(&mut storage)?;
    if storage.len() as u64 != bytes {
        bail!("its storage ends after {} of {bytes} bytes", storage.len())
    }
    // Reading on to the end checks the entry's checksum; only where that is all that is left to do.
    if start + bytes == there {
        copy(&mut entry, &mut sink())?;
    }
    let data =
        if info.layout.shape().is_contiguous(strides) { storage } else { gather(&storage, dims, strides, size)? };
    Ok(Tensor::from_raw_buffer(&data, info.dtype, dims, &Device::Cpu)?)
}

/// First byte and number of bytes of the part of the storage that the tensor lies in. (candle counts the start in bytes.)
fn extent(info: &TensorInfo) -> Option<(u64, u64)> {
    let (dims, strides) = (info.layout.dims(), info.layout.stride());
    let start = info.layout.start_offset() as u64;
    if dims.contains(&0) {
        return Some((start, 0));
    }
    let steps = dims.iter().zip(strides).map(|(d, s)| (*d as u64 - 1).checked_mul(*s as u64));
    let last = steps.sum::<Option<u64>>().filter(|last| *last < u64::MAX / 16)?;
    Some((start, (last + 1).checked_mul(info.dtype.size_in_bytes() as u64)?))
}

/// The elements in the order of the shape.
fn gather(storage: &[u8], dims: &[usize], strides: &[usize], size: usize) -> Result<Vec<u8>> {
    let elements = dims.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
    let bytes = elements.and_then(|n| n.checked_mul(size));
    let mut out: Vec<u8> = Vec::new();
    let Some((elements, bytes)) = elements.zip(bytes).filter(|(_, bytes)| out.try_reserve_exact(*bytes).is_ok()) else {
        bail!("a tensor of the shape {dims:?} has no room in memory")
    };
    let mut index = vec![0; dims.len()];
    for _ in 0..elements {
        let at = size * index.iter().zip(strides).map(|(i, s)| i * s).sum::<usize>();
        let Some(element) = storage.get(at..at + size) else { bail!("byte {at} of its storage is not there") };
        out.extend(element);
        for (i, d) in index.iter_mut().zip(dims).rev() {
            *i += 1;
            if *i < *d {
                break;
            }
            *i = 0;
        }
    }
    debug_assert_eq!(out.len(), bytes);
    Ok(out)
}
