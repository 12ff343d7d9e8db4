//! Built-in data: rendered pictures of coloured shapes and what can be said about them, made without any download.
//!
//! [`shapes`] writes, for `n` training pictures (48 × 48 RGB PNG) and up to 512 held-out ones of each kind:
//!
//! | file | what |
//! |---|---|
//! | `images/{train,val_seen,val_unseen}/NNNNN.png` | one to three of 6 colours × 4 shapes in a 2 × 2 grid |
//! | `captions_{train,val}.json` | LLaVA conversations: one caption a picture |
//! | `attributes_{train,val}.json` | the attribute words alone, for training a tower |
//! | `questions_{train,val_seen,val_unseen}.json` | questions about what is there; validation: one each, with `category` |
//! | `preferences_{train,val}.jsonl` | about what is absent: chosen says that there is none, rejected names it |
//! | `presence_{train,val}.jsonl` | the counterweight: chosen answers, rejected denies what is there |
//! | `absent_val.json` | questions about what is absent; `absent`: the phrases that affirm it |
//! | `text_{train,val}.json` | scenes told as text, with questions; drawn independently of any picture |
//! | `tokenizer/` | the closed vocabulary in Hugging Face form |
//! | `manifest.json` | every file with its size and checksum |
//!
//! Three combinations (red triangle, blue circle, yellow cross) occur in `val_unseen` only, once in each picture.
//! The same `n` and seed give the same bytes; a picture or sample does not depend on how many others there are.

mod raster;
mod records;
mod rng;
mod scene;
mod text;
mod tokenizer;

pub use raster::PIXELS;
pub use tokenizer::MAX_VOCAB;

use crate::bail;
use crate::error::{Context, Error, Result};
use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{ExtendedColorType, ImageEncoder};
use rayon::prelude::*;
use records::Pictures;
use rng::{Rng, Stream};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Most training pictures.
const MAX: usize = 100_000;
/// Most held-out pictures of each kind.
const MAX_HELD_OUT: usize = 512;
/// Text-only documents for each training picture.
const TEXT_PER_PICTURE: usize = 4;

/// Which pictures a file is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Split {
    Train,
    ValSeen,
    ValUnseen,
}

impl Split {
    const ALL: [Self; 3] = [Self::Train, Self::ValSeen, Self::ValUnseen];

    fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::ValSeen => "val_seen",
            Self::ValUnseen => "val_unseen",
        }
    }

    /// Path of picture `i`, relative to the JSON files.
    fn image(self, i: usize) -> String {
        format!("{}/{}", self.folder(), picture(i))
    }

    /// Of its pictures, relative to the JSON files.
    fn folder(self) -> String {
        format!("images/{}", self.name())
    }
}

/// Name of picture `i` in the folder of its split.
fn picture(i: usize) -> String {
    format!("{i:05}.png")
}

/// What [`shapes`] wrote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    pub kind: String,
    pub n: usize,
    pub seed: u64,
    /// By path relative to the output folder; all pictures of a split are one entry.
    pub files: BTreeMap<String, FileEntry>,
}

/// One file, or one folder of pictures.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Samples, pictures, or words.
    pub records: usize,
    pub bytes: u64,
    /// Of the bytes; for a folder, of its pictures' bytes one after the other.
    pub sha256: String,
}

impl FileEntry {
    fn new<'a>(records: usize, parts: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let (mut bytes, mut hash) = (0, Sha256::new());
        for part in parts {
            bytes += part.len() as u64;
            hash.update(part);
        }
        let sha256 = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
        Self { records, bytes, sha256 }
    }
}

/// Written first without files, which says whose the folder is, and last with all of them.
const MANIFEST: &str = "manifest.json";

/// Does `out` hold what [`shapes`] writes for these settings, every file of the right size?
pub fn is_complete(out: &Path, n: usize, seed: u64) -> Result<bool> {
    let path = out.join(MANIFEST);
    if !path.exists() {
        return Ok(false);
    }
    let found: Manifest = serde_json::from_slice(&std::fs::read(&path)?).with_context(|| path.display().to_string())?;
    let whole = |name: &String, entry: &FileEntry| {
        let file = out.join(name);
        file.is_dir() || file.metadata().is_ok_and(|m| m.len() == entry.bytes)
    };
    let all = !found.files.is_empty() && found.files.iter().all(|(name, entry)| whole(name, entry));
    Ok(found.n == n && found.seed == seed && all)
}

/// What an earlier [`shapes`] says that it wrote into `out`.
fn written(out: &Path) -> Result<Option<Manifest>> {
    let path = out.join(MANIFEST);
    match fs::read(&path) {
        Err(e) if [ErrorKind::NotFound, ErrorKind::NotADirectory].contains(&e.kind()) => Ok(None),
        read => {
            let manifest = serde_json::from_slice(&read.with_context(|| path.display())?);
            Ok(manifest.ok().filter(|m: &Manifest| m.kind == KIND && m.n <= MAX))
        }
    }
}

/// Held-out pictures of each kind beside `n` training pictures.
fn held_out_beside(n: usize) -> usize {
    (n / 8).clamp(1, MAX_HELD_OUT)
}

/// What [`shapes`] writes for `n` training pictures, the manifest aside.
fn names(n: usize) -> BTreeSet<String> {
    let pictures = [(Split::Train, n), (Split::ValSeen, held_out_beside(n)), (Split::ValUnseen, held_out_beside(n))];
    let pictures = pictures.into_iter().flat_map(|(split, n)| (0..n).map(move |i| split.image(i)));
    DOCUMENTS.iter().map(ToString::to_string).chain(pictures).collect()
}

/// Files of `names` in `out` that are not as [`shapes`] left them: somebody else's, or changed since. In a folder that was begun
/// but not finished, all that it was begun with are ours.
fn of_others(out: &Path, written: Option<&Manifest>, new: &BTreeSet<String>) -> Vec<PathBuf> {
    let there = |p: &PathBuf| fs::symlink_metadata(p).is_ok_and(|m| m.len() > 0 || !m.is_file());
    let Some(manifest) = written else {
        return std::iter::once(MANIFEST)
            .chain(new.iter().map(String::as_str))
            .map(|n| out.join(n))
            .filter(there)
            .collect();
    };
    let same = |name: &String, entry: &FileEntry| {
        let file = out.join(name);
        let split = Split::ALL.into_iter().find(|split| *name == split.folder());
        let files: Vec<PathBuf> = match split {
            Some(_) => (0..entry.records).map(|i| file.join(picture(i))).collect(),
            None => vec![file],
        };
        let read: Vec<Option<Vec<u8>>> = files.iter().map(|f| fs::read(f).ok()).collect();
        if let Some(all) = read.iter().map(Option::as_deref).collect::<Option<Vec<_>>>() {
            return FileEntry::new(entry.records, all) == *entry;
        }
        // Some are gone; the sum is of all, so that those that are left are held to what would be drawn.
        let left = read.iter().enumerate().filter_map(|(i, bytes)| Some((i, bytes.as_ref()?)));
        split.filter(|_| read.iter().any(Option::is_some)).is_none_or(|split| {
            let pictures = Pictures::draw(manifest.seed, split, entry.records);
            left.par_bridge().all(|(i, bytes)| pictures.png(i).is_ok_and(|drawn| drawn == *bytes))
        })
    };
    let changed = manifest.files.iter().filter(|(name, entry)| !same(name, entry)).map(|(name, _)| name);
    let known = names(manifest.n);
    changed.chain(new.difference(&known)).map(|name| out.join(name)).filter(there).collect()
}

/// Writes the built-in pictures and their texts for `n` training pictures into `out`, replacing what it wrote there before.
///
/// Errors: `n` is 0 or above 100 000; `out` holds files of these names that were not written here (the error names them); a file
/// cannot be written (likewise).
pub fn shapes(out: &Path, n: usize, seed: u64) -> Result<Manifest> {
    if n == 0 || n > MAX {
        bail!("cannot make {n} training pictures"; "choose a number from 1 to {MAX}");
    }
    let (held_out, new, written) = (held_out_beside(n), names(n), written(out)?);
    let others = of_others(out, written.as_ref(), &new);
    if !others.is_empty() {
        let shown: Vec<String> = others.iter().take(6).map(|p| p.display().to_string()).collect();
        let more = if others.len() > shown.len() {
            format!("\n  … and {} more", others.len() - shown.len())
        } else {
            String::new()
        };
        bail!("{} holds files that adfreeze did not write, or that have changed since, where the data would be written:\n  {}{more}",
            out.display(), shown.join("\n  ");
            "choose another folder, or move these files away; none of them was touched")
    }
    // Pictures of ours beyond the new number would be nobody's.
    for name in written.iter().flat_map(|m| names(m.n)).filter(|name| !new.contains(name)) {
        let path = out.join(name);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != ErrorKind::NotFound => {
                return Err(e).with_context(|| format!("cannot remove {}", path.display()));
            }
            _ => {}
        }
    }
    let begun = Manifest { kind: KIND.into(), n, seed, files: BTreeMap::new() };
    write(&out.join(MANIFEST), &pretty(&serde_json::to_value(&begun)?)?)?;
    let train = Pictures::draw(seed, Split::Train, n);
    let seen = Pictures::draw(seed, Split::ValSeen, held_out);
    let unseen = Pictures::draw(seed, Split::ValUnseen, held_out);
    let mut writer = Writer { out, files: BTreeMap::new() };
    for pictures in [&train, &seen, &unseen] {
        writer.pictures(pictures)?;
    }
    writer.json("captions_train.json", &train.captions())?;
    writer.json("captions_val.json", &seen.captions())?;
    writer.json("attributes_train.json", &train.attributes())?;
    writer.json("attributes_val.json", &seen.attributes())?;
    writer.json("questions_train.json", &train.conversations())?;
    writer.json("questions_val_seen.json", &seen.questions())?;
    writer.json("questions_val_unseen.json", &unseen.questions())?;
    writer.jsonl("preferences_train.jsonl", &train.preferences())?;
    writer.jsonl("preferences_val.jsonl", &seen.preferences())?;
    writer.jsonl("presence_train.jsonl", &train.presence())?;
    writer.jsonl("presence_val.jsonl", &seen.presence())?;
    writer.json("absent_val.json", &seen.absent())?;
    writer.json("text_train.json", &records::text_only(seed, Split::Train, TEXT_PER_PICTURE * n))?;
    writer.json("text_val.json", &records::text_only(seed, Split::ValSeen, held_out))?;
    let words = tokenizer::vocabulary().len();
    writer.document("tokenizer/tokenizer.json", words, &tokenizer::tokenizer_json())?;
    writer.document("tokenizer/tokenizer_config.json", 1, &tokenizer::tokenizer_config())?;
    let manifest = Manifest { kind: KIND.into(), n, seed, files: writer.files };
    write(&out.join(MANIFEST), &pretty(&serde_json::to_value(&manifest)?)?)?;
    Ok(manifest)
}

const KIND: &str = "shapes";

/// What [`shapes`] writes beside pictures and manifest.
const DOCUMENTS: [&str; 16] = [
    "captions_train.json",
    "captions_val.json",
    "attributes_train.json",
    "attributes_val.json",
    "questions_train.json",
    "questions_val_seen.json",
    "questions_val_unseen.json",
    "preferences_train.jsonl",
    "preferences_val.jsonl",
    "presence_train.jsonl",
    "presence_val.jsonl",
    "absent_val.json",
    "text_train.json",
    "text_val.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
];

impl Pictures {
    /// The file of picture `i`.
    fn png(&self, i: usize) -> Result<Vec<u8>> {
        let mut rng = Rng::new(self.seed, Stream::Pixels, self.split as u32, i);
        png(&raster::render(&self.scenes[i], &mut rng))
    }
}

/// Writes files below `out` and keeps account of them.
struct Writer<'a> {
    out: &'a Path,
    files: BTreeMap<String, FileEntry>,
}

impl Writer<'_> {
    fn pictures(&mut self, pictures: &Pictures) -> Result<()> {
        let draw = |i: usize| {
            let path = self.out.join(pictures.split.image(i));
            let bytes = pictures.png(i).with_context(|| path.display())?;
            write(&path, &bytes)?;
            Ok(bytes)
        };
        let pngs = (0..pictures.scenes.len()).into_par_iter().map(draw).collect::<Result<Vec<_>>>()?;
        let entry = FileEntry::new(pngs.len(), pngs.iter().map(Vec::as_slice));
        self.files.insert(pictures.split.folder(), entry);
        Ok(())
    }

    /// A JSON list, one sample a line.
    fn json(&mut self, name: &str, records: &[Value]) -> Result<()> {
        let lines: Vec<String> = records.iter().map(Value::to_string).collect();
        self.file(name, records.len(), format!("[\n{}\n]\n", lines.join(",\n")).as_bytes())
    }

    fn jsonl(&mut self, name: &str, records: &[Value]) -> Result<()> {
        let lines: String = records.iter().map(|r| format!("{r}\n")).collect();
        self.file(name, records.len(), lines.as_bytes())
    }

    fn document(&mut self, name: &str, records: usize, value: &Value) -> Result<()> {
        self.file(name, records, &pretty(value)?)
    }

    fn file(&mut self, name: &str, records: usize, bytes: &[u8]) -> Result<()> {
        write(&self.out.join(name), bytes)?;
        self.files.insert(name.into(), FileEntry::new(records, [bytes]));
        Ok(())
    }
}

fn pretty(value: &Value) -> Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec_pretty(value)?;
    bytes.push(b'\n');
    Ok(bytes)
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let made = path.parent().map_or(Ok(()), fs::create_dir_all);
    made.and_then(|()| fs::write(path, bytes)).map_err(|e| {
        Error::new(format!("cannot write {}", path.display()))
            .source(e)
            .hint("check that the output folder can be written to and that the disk has room")
    })
}

fn png(rgb: &[u8]) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let size = PIXELS as u32;
    PngEncoder::new_with_quality(&mut bytes, CompressionType::Fast, FilterType::Sub)
        .write_image(rgb, size, size, ExtendedColorType::Rgb8)
        .map_err(|e| Error::new("cannot encode a picture").source(e))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests;
