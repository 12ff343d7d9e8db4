//! Tensors by name in one safetensors file, with string metadata; the same tensors always give the same bytes.
//!
//! Format: <https://github.com/huggingface/safetensors#format>: u64 length of the header, the header (JSON), the data. As in
//! the reference writer, wider types come first (so all data is aligned), then by name.

use super::atomic;
use crate::bail;
use crate::error::{Context, Result};
use crate::model::weights::Tensors;
use crate::ops::launch::host;
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

/// Saves `tensors` at `path`, atomically.
pub fn save(path: &Path, tensors: &BTreeMap<String, Tensor>, metadata: &BTreeMap<String, String>) -> Result<()> {
    let tensors: Vec<(&str, &Tensor)> = tensors.iter().map(|(name, t)| (name.as_str(), t)).collect();
    save_list(path, tensors, metadata)
}

/// As [`save`]; returns the file's SHA-256, in hex.
pub fn save_summed(
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    metadata: &BTreeMap<String, String>,
) -> Result<String> {
    let file = Layout::new(tensors.iter().map(|(name, t)| (name.as_str(), t)).collect(), metadata)?;
    atomic::write_summed(path, |out| file.write(out))
}

/// The bytes that [`save`] writes.
pub fn to_bytes(tensors: &BTreeMap<String, Tensor>, metadata: &BTreeMap<String, String>) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    Layout::new(tensors.iter().map(|(name, t)| (name.as_str(), t)).collect(), metadata)?.write(&mut bytes)?;
    Ok(bytes)
}

/// As [`save`], for tensors named on the way. Names must differ.
pub(super) fn save_list(path: &Path, tensors: Vec<(&str, &Tensor)>, metadata: &BTreeMap<String, String>) -> Result<()> {
    let file = Layout::new(tensors, metadata)?;
    atomic::write(path, |out| file.write(out))
}

/// A file before it is written.
struct Layout<'a> {
    header: Vec<u8>,
    tensors: Vec<(&'a str, &'a Tensor)>,
}

impl<'a> Layout<'a> {
    fn new(mut tensors: Vec<(&'a str, &'a Tensor)>, metadata: &BTreeMap<String, String>) -> Result<Self> {
        tensors.sort_by_key(|(name, t)| (Reverse(safetensors::Dtype::from(t.dtype())), *name));
        let mut header = serde_json::Map::new();
        if !metadata.is_empty() {
            header.insert("__metadata__".into(), serde_json::to_value(metadata)?);
        }
        let mut end = 0;
        for (name, tensor) in &tensors {
            let start = end;
            end += tensor.elem_count() * tensor.dtype().size_in_bytes();
            let entry = serde_json::json!({
                "dtype": safetensors::Dtype::from(tensor.dtype()), "shape": tensor.dims(), "data_offsets": [start, end],
            });
            if header.insert((*name).into(), entry).is_some() {
                bail!("two tensors are called `{name}`");
            }
        }
        let mut header = serde_json::to_vec(&header)?;
        header.resize(header.len().next_multiple_of(8), b' ');
        Ok(Self { header, tensors })
    }

    fn write(&self, out: &mut dyn Write) -> Result<()> {
        out.write_all(&(self.header.len() as u64).to_le_bytes())?;
        out.write_all(&self.header)?;
        for (name, tensor) in &self.tensors {
            write_data(out, tensor).with_context(|| format!("tensor `{name}`"))?;
        }
        Ok(())
    }
}

/// Loads a whole file, as it was stored, on the CPU.
pub fn load(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    let tensors = Tensors::open_file(path)?;
    tensors.names().map(|name| Ok((name.to_string(), tensors.load(name, &Device::Cpu)?))).collect()
}

/// The string metadata of a file.
pub fn metadata(path: &Path) -> Result<BTreeMap<String, String>> {
    Ok(Tensors::open_file(path)?.metadata().clone())
}

/// The elements in row-major order, little-endian.
fn write_data(out: &mut dyn Write, tensor: &Tensor) -> Result<()> {
    let flat = host(tensor)?.flatten_all()?;
    let bytes: Vec<u8> = match tensor.dtype() {
        DType::U8 => flat.to_vec1()?,
        DType::U32 => flat.to_vec1::<u32>()?.into_iter().flat_map(u32::to_le_bytes).collect(),
        DType::I64 => flat.to_vec1::<i64>()?.into_iter().flat_map(i64::to_le_bytes).collect(),
        DType::BF16 => flat.to_vec1::<bf16>()?.into_iter().flat_map(bf16::to_le_bytes).collect(),
        DType::F16 => flat.to_vec1::<f16>()?.into_iter().flat_map(f16::to_le_bytes).collect(),
        DType::F32 => flat.to_vec1::<f32>()?.into_iter().flat_map(f32::to_le_bytes).collect(),
        DType::F64 => flat.to_vec1::<f64>()?.into_iter().flat_map(f64::to_le_bytes).collect(),
        other => bail!("{other:?} is not saved"),
    };
    Ok(out.write_all(&bytes)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensors() -> BTreeMap<String, Tensor> {
        let x = Tensor::arange(0f64, 6.0, &Device::Cpu).unwrap().reshape((2, 3)).unwrap();
        let types = [DType::U8, DType::U32, DType::I64, DType::BF16, DType::F16, DType::F32, DType::F64];
        let mut all: BTreeMap<_, _> =
            types.iter().map(|d| (format!("t.{}", d.as_str()), x.to_dtype(*d).unwrap())).collect();
        all.insert("transposed".into(), x.t().unwrap());
        all.insert("scalar".into(), Tensor::new(2.5f32, &Device::Cpu).unwrap());
        all
    }

    #[test]
    fn saves_and_loads_every_type_to_the_bit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let info = BTreeMap::from([("step".to_string(), "7".to_string()), ("format".into(), "pt".into())]);
        save(&path, &tensors(), &info).unwrap();
        assert_eq!(metadata(&path).unwrap(), info);
        let bytes = std::fs::read(&path).unwrap();
        safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let loaded = load(&path).unwrap();
        assert_eq!(loaded.keys().collect::<Vec<_>>(), tensors().keys().collect::<Vec<_>>());
        for (name, want) in tensors() {
            let got = &loaded[&name];
            assert_eq!((got.dtype(), got.dims()), (want.dtype(), want.dims()), "{name}");
            let list = |t: &Tensor| t.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
            assert_eq!(list(got), list(&want), "{name}");
        }
        save(&path, &tensors(), &info).unwrap();
        assert_eq!(bytes, std::fs::read(&path).unwrap());
    }

    #[test]
    fn the_reference_writer_gives_the_same_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        save(&path, &tensors(), &BTreeMap::new()).unwrap();
        let reference = safetensors::serialize(tensors().iter().map(|(n, t)| (n.as_str(), t)), None).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), reference);
    }

    #[test]
    fn a_truncated_file_says_how_many_bytes_are_missing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        save(&path, &tensors(), &BTreeMap::new()).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let report = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            load(&path).unwrap_err().report()
        };
        let short = report(&bytes[..bytes.len() - 9]);
        let want = format!("x.safetensors is damaged: expected {} bytes, found {}", bytes.len(), bytes.len() - 9);
        assert!(short.contains(&want) && short.contains("hint: the file is damaged or incomplete"), "{short}");
        assert!(report(&bytes[..40]).contains("is damaged: expected"));
        assert!(report(b"").contains("(0 bytes) is not a valid safetensors file"));
        assert!(report(&[0xff; 64]).contains("(64 bytes) is not a valid safetensors file"));
        assert!(report(b"version https://git-lfs.github.com/spec/v1\n").contains("git lfs pull"));
    }
}
