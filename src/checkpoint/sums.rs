//! SHA-256 of the files of a folder, kept beside them in the form of `sha256sum`: what was written there, and whether it is
//! still as it was.
//!
//! A file may stand there twice: one that is to be replaced is announced with its new checksum before, so that a process
//! killed in between leaves nothing that looks damaged. The first line tells our lists from those of others.

use super::atomic;
use crate::bail;
use crate::error::{Context, Result};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Name of the list in its folder.
pub const FILE: &str = "SHA256SUMS";
const HEAD: &str = "# Written by adfreeze; check with: sha256sum -c SHA256SUMS";

/// Checksums by path relative to the folder, `/` between its parts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sums(BTreeMap<String, BTreeSet<String>>);

/// What a file is to the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fit {
    /// As it was written.
    Same,
    /// Listed, but with other bytes.
    Other,
    /// Listed, but not there.
    Missing,
    /// There, but not listed: somebody else's.
    Foreign,
    /// Neither.
    Absent,
}

impl Sums {
    /// The list of a folder; `None` if there is none of ours.
    ///
    /// # Errors
    /// The file cannot be read, or is damaged.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(FILE);
        let bytes = match fs::read(&path) {
            Err(e) if [ErrorKind::NotFound, ErrorKind::NotADirectory].contains(&e.kind()) => return Ok(None),
            read => read.with_context(|| format!("cannot read {}", path.display()))?,
        };
        let text = String::from_utf8_lossy(&bytes);
        let mut lines = text.lines();
        if lines.next() != Some(HEAD) {
            return Ok(None);
        }
        let mut sums = Self::default();
        for line in lines {
            match line.split_once("  ") {
                Some((sum, name)) if is_sum(sum) && is_inside(name) => sums.announce(name, sum),
                _ => bail!("{} is damaged: `{line}` is no line of a checksum list", path.display();
                    "copy it back from a backup; where that is not possible, choose another output_dir"),
            }
        }
        Ok(Some(sums))
    }

    /// Writes the list into its folder.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let lines = self.0.iter().flat_map(|(name, sums)| sums.iter().map(move |s| format!("{s}  {name}\n")));
        let text: String = std::iter::once(format!("{HEAD}\n")).chain(lines).collect();
        atomic::write_bytes(&dir.join(FILE), text.as_bytes())
    }

    /// The file may have this checksum too.
    pub fn announce(&mut self, name: &str, sum: &str) {
        self.0.entry(name.to_string()).or_default().insert(sum.to_string());
    }

    /// The file has this checksum and no other.
    pub fn set(&mut self, name: &str, sum: &str) {
        self.0.insert(name.to_string(), BTreeSet::from([sum.to_string()]));
    }

    /// Takes a file off the list.
    pub fn remove(&mut self, name: &str) {
        self.0.remove(name);
    }

    /// Of files that were announced with several checksums keeps the one that each has now; of files that are not there, none.
    pub fn resolve(&mut self, dir: &Path) -> Result<()> {
        for name in self.0.keys().cloned().collect::<Vec<_>>() {
            match fs::symlink_metadata(dir.join(&name)) {
                Err(_) => self.remove(&name),
                Ok(_) if self.0.get(&name).is_none_or(|sums| sums.len() < 2) => {}
                Ok(_) => {
                    let sum = sha256_file(&dir.join(&name))?;
                    if self.allows(&name, &sum) {
                        self.set(&name, &sum);
                    }
                }
            }
        }
        Ok(())
    }

    /// Is this the file's checksum, or one that was announced?
    pub fn allows(&self, name: &str, sum: &str) -> bool {
        self.0.get(name).is_some_and(|sums| sums.contains(sum))
    }

    /// The files, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// Compares a file with the list; reads all of it.
    ///
    /// # Errors
    /// It is there but cannot be read.
    pub fn fit(&self, dir: &Path, name: &str) -> Result<Fit> {
        let path = dir.join(name);
        let listed = self.0.contains_key(name);
        match fs::symlink_metadata(&path) {
            Err(e) if [ErrorKind::NotFound, ErrorKind::NotADirectory].contains(&e.kind()) => {
                return Ok(if listed { Fit::Missing } else { Fit::Absent });
            }
            Err(e) => return Err(e).with_context(|| path.display().to_string()),
            Ok(_) if !listed => return Ok(Fit::Foreign),
            Ok(_) if !path.is_file() => return Ok(Fit::Other),
            Ok(_) => {}
        }
        Ok(if self.allows(name, &sha256_file(&path)?) { Fit::Same } else { Fit::Other })
    }

    /// The first file that is not as it was written, in words; `None` if all are.
    pub fn damage(&self, dir: &Path) -> Result<Option<String>> {
        for name in self.names() {
            match self.fit(dir, name)? {
                Fit::Same => {}
                Fit::Missing | Fit::Absent => return Ok(Some(format!("{name} is missing"))),
                Fit::Other | Fit::Foreign => {
                    return Ok(Some(format!("{name} is damaged: it is not what was written (SHA-256)")));
                }
            }
        }
        Ok(None)
    }

    /// Adds every file below `dir` that is not listed, with the bytes it has now.
    pub fn complete(&mut self, dir: &Path) -> Result<()> {
        for name in files(dir)? {
            if name != FILE && !self.0.contains_key(&name) {
                let sum = sha256_file(&dir.join(&name))?;
                self.set(&name, &sum);
            }
        }
        Ok(())
    }
}

/// Files below a folder that it was not written with, or not with these bytes: replacing it would lose them.
pub fn foreign(dir: &Path) -> Result<Vec<PathBuf>> {
    if !dir.is_dir() {
        let there = fs::symlink_metadata(dir).is_ok();
        return Ok(there.then(|| dir.to_path_buf()).into_iter().collect());
    }
    let known = Sums::read(dir)?;
    let mut found = Vec::new();
    for name in files(dir)? {
        let ours = match &known {
            Some(_) if name == FILE => true,
            Some(sums) => sums.fit(dir, &name)? == Fit::Same,
            None => false,
        };
        if !ours {
            found.push(dir.join(name));
        }
    }
    Ok(found)
}

/// Every file below a folder (and every link, which is not followed), relative to it, sorted.
pub fn files(dir: &Path) -> Result<Vec<String>> {
    fn walk(dir: &Path, prefix: &str, out: &mut Vec<String>) -> Result<()> {
        for entry in fs::read_dir(dir).with_context(|| dir.display().to_string())? {
            let entry = entry.with_context(|| dir.display().to_string())?;
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            match entry.file_type().with_context(|| name.clone())?.is_dir() {
                true => walk(&entry.path(), &format!("{name}/"), out)?,
                false => out.push(name),
            }
        }
        Ok(())
    }
    let mut out = Vec::new();
    walk(dir, "", &mut out)?;
    out.sort();
    Ok(out)
}

/// A list of paths for an error, cut after six.
pub fn told(paths: &[PathBuf]) -> String {
    let shown: Vec<String> = paths.iter().take(6).map(|p| p.display().to_string()).collect();
    let more = paths.len().saturating_sub(shown.len());
    let more = if more > 0 { format!("\n  … and {more} more") } else { String::new() };
    format!("{}{more}", shown.join("\n  "))
}

fn is_sum(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Bytes of files that have been hashed, and of those that were opened for it, since the process began.
static HASHED: AtomicU64 = AtomicU64::new(0);
static OPENED: AtomicU64 = AtomicU64::new(0);

/// How far [`sha256_file`] has come since the process began, in bytes, and of how many in the files opened so far: for whoever
/// shows it.
pub fn so_far() -> (u64, u64) {
    (HASHED.load(Ordering::Relaxed), OPENED.load(Ordering::Relaxed))
}

/// SHA-256 of a file, in hex.
pub fn sha256_file(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| path.display().to_string())?;
    OPENED.fetch_add(file.metadata().map_or(0, |m| m.len()), Ordering::Relaxed);
    let (mut h, mut buf) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        let n = file.read(&mut buf).with_context(|| path.display().to_string())?;
        if n == 0 {
            return Ok(hex(&h.finalize()));
        }
        h.update(&buf[..n]);
        HASHED.fetch_add(n as u64, Ordering::Relaxed);
    }
}

/// SHA-256 of bytes, in hex.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Bytes as hex digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Is this a file below the folder? Listed files may be replaced and deleted, so a list must not lead out.
fn is_inside(name: &str) -> bool {
    !name.is_empty() && Path::new(name).components().all(|part| matches!(part, std::path::Component::Normal(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_tells_what_is_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        atomic::write_bytes(&at("sub/a"), b"one").unwrap();
        fs::write(at("b"), "two").unwrap();
        let mut sums = Sums::default();
        sums.complete(dir.path()).unwrap();
        sums.write(dir.path()).unwrap();
        let sums = Sums::read(dir.path()).unwrap().unwrap();
        assert_eq!(sums.names().collect::<Vec<_>>(), ["b", "sub/a"]);
        assert!(sums.damage(dir.path()).unwrap().is_none() && foreign(dir.path()).unwrap().is_empty());
        fs::write(at("sub/mine"), "").unwrap();
        fs::write(at("b"), "tow").unwrap();
        assert_eq!(foreign(dir.path()).unwrap(), [at("b"), at("sub/mine")]);
        let damage = |sums: &Sums| sums.damage(dir.path()).unwrap().unwrap();
        assert!(damage(&sums).starts_with("b is damaged"));
        // Announced before it was replaced.
        let mut announced = sums.clone();
        announced.announce("b", &sha256(b"tow"));
        assert_eq!(announced.fit(dir.path(), "b").unwrap(), Fit::Same);
        fs::remove_file(at("sub/a")).unwrap();
        assert_eq!(damage(&announced), "sub/a is missing");
        announced.resolve(dir.path()).unwrap();
        let mut resolved = Sums::default();
        resolved.set("b", &sha256(b"tow"));
        assert_eq!(announced, resolved);
        assert_eq!(sums.fit(dir.path(), "none").unwrap(), Fit::Absent);
    }

    #[test]
    fn lists_of_others_are_none_of_ours_and_a_damaged_one_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let sum = sha256(b"");
        assert_eq!(sum, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        let write = |text: &str| fs::write(dir.path().join(FILE), text).unwrap();
        write(&format!("{sum}  x\n"));
        assert!(Sums::read(dir.path()).unwrap().is_none());
        write(&format!("{HEAD}\n{sum}  x\n{}\n", &sum[..40]));
        let report = Sums::read(dir.path()).unwrap_err().report();
        assert!(report.contains("SHA256SUMS is damaged") && report.contains("hint: "), "{report}");
    }

    #[test]
    fn a_list_that_leads_out_of_its_folder_is_damaged() {
        let dir = tempfile::tempdir().unwrap();
        for (name, fine) in
            [("a", true), ("a/b.json", true), ("../a", false), ("a/../../b", false), ("/etc/passwd", false)]
        {
            let text = format!("{HEAD}\n{}  {name}\n", "0".repeat(64));
            fs::write(dir.path().join(FILE), text).unwrap();
            assert_eq!(Sums::read(dir.path()).is_ok(), fine, "{name}");
        }
    }
}
