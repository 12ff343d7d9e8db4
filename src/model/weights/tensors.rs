//! The tensors of a folder or file by name: safetensors (memory-mapped) and PyTorch pickles, whole or sharded.
//!
//! Opening reads names, shapes and types only; data is read when a tensor is loaded.

use super::pickle;
use super::progress;
use super::source::{must_be_file, read_text};
use crate::bail;
use crate::error::words::plain;
use crate::error::{Context, Error, Result};
use candle_core::pickle::PthTensors;
use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;
use safetensors::SafeTensors;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// What a folder of weights may be called, in order of preference.
pub const WEIGHT_FILES: [&str; 4] =
    ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"];

/// Tensors by the names their files give them.
pub struct Tensors {
    /// The index that named the files.
    index: Option<PathBuf>,
    files: Vec<(PathBuf, Store)>,
    entries: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
}

enum Store {
    Safetensors(Mmap),
    Pickle(Box<PthTensors>),
}

struct Entry {
    info: Info,
    /// Index into `files`.
    file: usize,
    /// Bytes in a safetensors file; empty for pickles, which are read by name.
    bytes: Range<usize>,
}

/// What is known of a tensor before it is loaded.
#[derive(Debug, Clone, PartialEq)]
pub struct Info {
    pub shape: Vec<usize>,
    /// `None`: a type that cannot be computed with (e.g. bool).
    pub dtype: Option<DType>,
}

impl Info {
    fn bytes(&self) -> usize {
        let size = self.dtype.map_or(0, |t| t.size_in_bytes());
        self.shape.iter().fold(size, |bytes, n| bytes.saturating_mul(*n))
    }
}

impl Tensors {
    /// Opens the weights in `dir`: the first of [`WEIGHT_FILES`] that is there.
    pub fn open(dir: &Path) -> Result<Self> {
        let Some(name) = WEIGHT_FILES.iter().find(|name| dir.join(name).exists()) else {
            bail!("no weights in {}", dir.display(); "expected one of {}", WEIGHT_FILES.join(", "));
        };
        let path = dir.join(name);
        if !name.ends_with(".index.json") {
            return Self::open_file(&path);
        }
        let tensors = Self::open_files(&shards(&path)?)?;
        Ok(Self { index: Some(path), ..tensors })
    }

    /// Opens one `.safetensors`, `.bin`, `.pt` or `.pth` file.
    pub fn open_file(path: &Path) -> Result<Self> {
        Self::open_files(&[path.to_path_buf()])
    }

    fn open_files(paths: &[PathBuf]) -> Result<Self> {
        let mut tensors = Self { index: None, files: Vec::new(), entries: BTreeMap::new(), metadata: BTreeMap::new() };
        for path in paths {
            must_be_file(path).map_err(|e| e.or_hint("it must be there, and you must be allowed to read it"))?;
            match path.extension().and_then(|e| e.to_str()) {
                Some("safetensors") => tensors.add_safetensors(path)?,
                Some("bin" | "pt" | "pth") => tensors.add_pickle(path)?,
                _ => bail!("{} is no weight file", path.display(); "expected .safetensors, .bin, .pt or .pth"),
            }
        }
        Ok(tensors)
    }

    fn add_safetensors(&mut self, path: &Path) -> Result<()> {
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        // SAFETY: the map is read-only. Files are replaced by renaming (our own writer and the hub cache do so), which
        // leaves an open map intact; a file that another program cuts short in place is outside our control.
        let map = unsafe { Mmap::map(&file) }.with_context(|| format!("cannot map {}", path.display()))?;
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|e| damaged(path, &map, e))?;
        let file = self.files.len();
        let infos: BTreeMap<_, _> = metadata.tensors().into_iter().collect();
        for (name, info) in infos {
            let (start, end) = info.data_offsets;
            let entry = Entry {
                info: Info { shape: info.shape.clone(), dtype: DType::try_from(info.dtype).ok() },
                file,
                bytes: header + 8 + start..header + 8 + end,
            };
            self.add(name, entry, path)?;
        }
        self.metadata.extend(metadata.metadata().clone().unwrap_or_default());
        self.files.push((path.to_path_buf(), Store::Safetensors(map)));
        Ok(())
    }

    fn add_pickle(&mut self, path: &Path) -> Result<()> {
        let bytes = std::fs::metadata(path).with_context(|| format!("cannot open {}", path.display()))?.len();
        let pickle = pickle::open(path).map_err(|e| {
            Error::from(e)
                .context(format!("{} ({bytes} bytes) cannot be read as a PyTorch file", path.display()))
                .hint(format!("{AGAIN}; PyTorch before 1.6 wrote another format: save it again with a newer one"))
        })?;
        if pickle.tensor_infos().is_empty() {
            bail!("{} holds no tensors by name", path.display();
                "what is read is a dictionary of tensors, e.g. torch.save(model.state_dict(), path)")
        }
        let infos: BTreeMap<_, _> = pickle.tensor_infos().iter().collect();
        for (name, info) in infos {
            let info = Info { shape: info.layout.dims().to_vec(), dtype: Some(info.dtype) };
            self.add(name.clone(), Entry { info, file: self.files.len(), bytes: 0..0 }, path)?;
        }
        self.files.push((path.to_path_buf(), Store::Pickle(Box::new(pickle))));
        Ok(())
    }

    fn add(&mut self, name: String, entry: Entry, path: &Path) -> Result<()> {
        if let Some(old) = self.entries.get(&name) {
            let other = self.files.get(old.file).map_or(path, |(p, _)| p);
            bail!("tensor `{name}` is both in {} and in {}", other.display(), path.display();
                "shards of two downloads may be mixed: copy or download all of them again");
        }
        progress::found(entry.info.bytes());
        self.entries.insert(name, entry);
        Ok(())
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Shape and type of a tensor.
    pub fn info(&self, name: &str) -> Option<&Info> {
        self.entries.get(name).map(|e| &e.info)
    }

    /// The file that holds a tensor.
    pub fn file(&self, name: &str) -> Option<&Path> {
        self.entries.get(name).and_then(|e| self.files.get(e.file)).map(|(path, _)| path.as_path())
    }

    /// All files, in the order in which they were opened, the index of sharded ones first.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.index.iter().chain(self.files.iter().map(|(path, _)| path)).map(PathBuf::as_path)
    }

    /// The strings a safetensors file carries beside its tensors.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Loads a tensor as it is stored.
    pub fn load(&self, name: &str, device: &Device) -> Result<Tensor> {
        let found = self.entries.get(name).and_then(|e| Some((e, self.files.get(e.file)?)));
        let Some((entry, (path, store))) = found else { bail!("there is no tensor `{name}`") };
        let loaded = match (store, entry.info.dtype) {
            (Store::Safetensors(_), None) => bail!("`{name}` in {} is of a type that is not supported", path.display();
                "there are F64, F32, F16 and BF16: convert the weights, or copy them again if they should be of one of these"),
            (Store::Safetensors(map), Some(dtype)) => {
                let bytes = map.get(entry.bytes.clone()).unwrap_or_default();
                Tensor::from_raw_buffer(bytes, dtype, &entry.info.shape, device).map_err(Error::from)
            }
            (Store::Pickle(pickle), _) => match pickle.tensor_infos().get(name) {
                Some(info) => pickle::load(path, info).and_then(|t| Ok(t.to_device(device)?)),
                None => bail!("there is no tensor `{name}` in {}", path.display()),
            },
        };
        progress::loaded(entry.info.bytes());
        loaded.map_err(|e| e.context(format!("cannot load `{name}` from {}", path.display())).hint(AGAIN))
    }

    /// Do two tensors hold the same numbers?
    pub fn same(&self, a: &str, b: &str) -> Result<bool> {
        let of = |name: &str| self.entries.get(name).and_then(|e| Some((e, self.files.get(e.file)?)));
        let (Some((a_entry, (_, a_store))), Some((b_entry, (_, b_store)))) = (of(a), of(b)) else { return Ok(false) };
        if a_entry.info.shape != b_entry.info.shape {
            return Ok(false);
        }
        // As they are mapped, without room for copies.
        if let (Store::Safetensors(x), Store::Safetensors(y)) = (a_store, b_store)
            && a_entry.info.dtype == b_entry.info.dtype
        {
            return Ok(x.get(a_entry.bytes.clone()) == y.get(b_entry.bytes.clone()));
        }
        let load = |name: &str| Ok::<_, Error>(self.load(name, &Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?);
        Ok(load(a)?.to_vec1::<f32>()? == load(b)?.to_vec1::<f32>()?)
    }
}

const AGAIN: &str = "the file is damaged or incomplete: copy or download it again";

/// The files that an index names, sorted; each must be there.
fn shards(index: &Path) -> Result<Vec<PathBuf>> {
    let dir = index.parent().unwrap_or(Path::new("."));
    let files = shard_names(index)?;
    let paths: Vec<PathBuf> = files.iter().map(|f| dir.join(f)).collect();
    if let Some(missing) = paths.iter().find(|p| !p.exists()) {
        bail!("{} names {}, which is missing", index.display(), missing.display(); "copy or download all shards");
    }
    Ok(paths)
}

/// The names of the files in the `weight_map` of an index, sorted.
pub(super) fn shard_names(index: &Path) -> Result<BTreeSet<String>> {
    let text = read_text(index)?;
    let damaged = |e: serde_json::Error| Error::new(format!("{} is damaged", index.display())).source(e).hint(AGAIN);
    let json: serde_json::Value = serde_json::from_str(&text).map_err(damaged)?;
    let files = json.get("weight_map").and_then(|m| m.as_object()).map(|map| {
        map.values().map(|f| f.as_str().filter(|f| is_plain_name(f)).map(String::from)).collect::<Option<BTreeSet<_>>>()
    });
    match files.flatten().filter(|f| !f.is_empty()) {
        Some(files) => Ok(files),
        None => bail!("{} has no `weight_map` from tensors to files beside it", index.display(); "{AGAIN}"),
    }
}

/// A file in the same folder, never a path out of it.
fn is_plain_name(file: &str) -> bool {
    !file.is_empty() && Path::new(file).file_name().is_some_and(|name| name == file)
}

/// Says how a safetensors file is damaged: how many bytes were expected, and how many are there.
fn damaged(path: &Path, bytes: &[u8], cause: safetensors::SafeTensorError) -> Error {
    let path = path.display();
    if bytes.starts_with(b"version https://git-lfs") {
        return Error::new(format!("{path} is a Git LFS pointer, not the file itself"))
            .hint("run `git lfs pull` there");
    }
    let found = bytes.len();
    let expected = expected_len(bytes).filter(|expected| *expected != found as u128);
    let no_file = || Error::new(format!("{path} ({found} bytes) is not a valid safetensors file"));
    match (expected, cause) {
        (Some(n), _) => Error::new(format!("{path} is damaged: expected {n} bytes, found {found}")),
        (None, safetensors::SafeTensorError::InvalidHeaderDeserialization(e)) => {
            no_file().source(Error::new(format!("its header {}", plain(&e.to_string()))))
        }
        (None, cause) => no_file().source(cause),
    }
    .hint(AGAIN)
}

/// Length of the file according to its own header (u64 length, JSON, data), as far as it can be read.
fn expected_len(bytes: &[u8]) -> Option<u128> {
    let header = u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?);
    let data = 8 + u128::from(header);
    // A header length that makes no sense says nothing about the file.
    if header > 100_000_000 {
        return None;
    }
    let Some(json) = bytes.get(8..8 + header as usize) else { return Some(data) };
    let json: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(json).ok()?;
    let end = |v: &serde_json::Value| v.get("data_offsets")?.get(1)?.as_u64();
    Some(data + u128::from(json.values().filter_map(end).max()?))
}
