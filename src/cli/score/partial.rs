//! What `score` has done so far: `NAME.partial` beside its result, written line by line, so that neither a kill nor a power cut
//! costs more than the last samples, and the same command goes on from there.
//!
//! A line is that of the result and, behind it, a mark: which tokens, pictures and setting the scores are of. Lines go on as far
//! as their marks are those of the samples.

use crate::bail;
use crate::checkpoint::atomic::{self, storage_error};
use crate::data::Item;
use crate::error::{Context, Result};
use sha2::{Digest, Sha256};
use std::fs::{File, TryLockError, metadata};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, UNIX_EPOCH};

/// What a power cut may cost; a kill costs nothing that was written.
const SYNC_EVERY: Duration = Duration::from_secs(10);

/// Where a mark begins in a line, and how long it is.
const MARK: &str = ",\"of\":\"";
const MARK_DIGITS: usize = 16;

/// The file, open and locked.
pub struct Partial {
    path: PathBuf,
    file: File,
    /// What the marks say beside the sample: whatever else decides on the scores' bits, but the weights.
    setting: String,
    synced: Instant,
}

impl Partial {
    /// Beside `out`; none where `out` is no file but a pipe or a device.
    ///
    /// # Errors
    /// Another process scores into it; something else stands there.
    pub fn open(out: &Path, setting: String) -> Result<Option<Self>> {
        let Some(mut path) = atomic::file_of(out)? else { return Ok(None) };
        path.as_mut_os_string().push(".partial");
        atomic::free_for(&path, "unfinished scores", |line| split(line.trim_end()).is_some())?;
        let refused = |e| storage_error(&path, e);
        let file = File::options().read(true).append(true).create(true).open(&path).map_err(refused)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => bail!("{} is being written by another process", path.display();
                "wait until it is done, or give another --out"),
            // Not every file system has locks.
            Err(TryLockError::Error(_)) => {}
        }
        Ok(Some(Self { path, file, setting, synced: Instant::now() }))
    }

    /// Its lines, as the result has them, as far as they are of these items.
    pub fn kept(&mut self, items: &[Item]) -> Result<Vec<String>> {
        let read = |e| crate::error::Error::from(e).context(self.path.display());
        self.file.seek(SeekFrom::Start(0)).map_err(read)?;
        let (mut kept, mut file, mut line) = (Vec::new(), BufReader::new(&self.file), Vec::new());
        for item in items {
            line.clear();
            file.read_until(b'\n', &mut line).map_err(read)?;
            let text = line.strip_suffix(b"\n").and_then(|line| std::str::from_utf8(line).ok());
            match text.and_then(split) {
                Some((scores, mark)) if mark == self.mark(item) => kept.push(scores),
                _ => break,
            }
        }
        Ok(kept)
    }

    /// Holds these lines and no others.
    pub fn restart(&mut self, items: &[Item], lines: &[String]) -> Result<()> {
        self.file.set_len(0).map_err(|e| storage_error(&self.path, e))?;
        self.add(items, lines)
    }

    /// More lines, one an item.
    pub fn add(&mut self, items: &[Item], lines: &[String]) -> Result<()> {
        let mut text = String::new();
        for (item, line) in items.iter().zip(lines) {
            let open = line.strip_suffix('}').unwrap_or(line);
            text += &format!("{open}{MARK}{}\"}}\n", self.mark(item));
        }
        self.file.write_all(text.as_bytes()).map_err(|e| storage_error(&self.path, e))?;
        if self.synced.elapsed() > SYNC_EVERY { self.sync() } else { Ok(()) }
    }

    /// All of it is on the disk.
    pub fn sync(&mut self) -> Result<()> {
        self.synced = Instant::now();
        self.file.sync_data().map_err(|e| storage_error(&self.path, e))
    }

    /// Its lines become the result; the file goes.
    pub fn finish(mut self, out: &Path) -> Result<()> {
        self.file.seek(SeekFrom::Start(0)).with_context(|| self.path.display().to_string())?;
        atomic::write_out(out, |result| {
            for line in BufReader::new(&self.file).lines() {
                let line = line.with_context(|| self.path.display().to_string())?;
                let scores = split(&line).map_or(line.clone(), |(scores, _)| scores);
                result.write_all(scores.as_bytes())?;
                result.write_all(b"\n")?;
            }
            Ok(())
        })?;
        self.discard()
    }

    /// It goes: nothing in it is worth to be kept.
    pub fn discard(self) -> Result<()> {
        std::fs::remove_file(&self.path).map_err(|e| storage_error(&self.path, e))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    fn mark(&self, item: &Item) -> String {
        let mut h = Sha256::new();
        h.update(&self.setting);
        for s in item.samples() {
            h.update(format!("{:?}{:?}{:?}", s.id, s.ids, s.labels));
        }
        for i in item.images() {
            let state = metadata(&i.path).and_then(|m| Ok((m.len(), m.modified()?)));
            let state = state.ok().map(|(size, time)| (size, time.duration_since(UNIX_EPOCH).ok()));
            h.update(format!("{i:?}{state:?}"));
        }
        crate::checkpoint::sums::hex(&h.finalize())[..MARK_DIGITS].to_string()
    }
}

/// A line without its mark, and the mark.
fn split(line: &str) -> Option<(String, &str)> {
    let (scores, rest) = line.rsplit_once(MARK)?;
    let mark = rest.strip_suffix("\"}")?;
    let scores = format!("{scores}}}");
    (mark.len() == MARK_DIGITS && super::is_line(&scores)).then_some((scores, mark))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Sample;

    fn items(labels: &[i32]) -> Vec<Item> {
        let sample = |(i, l): (usize, &i32)| Sample {
            id: format!("s{i}"),
            ids: vec![1, 2],
            labels: vec![-100, *l],
            images: Vec::new(),
            category: None,
            absent: Vec::new(),
        };
        labels.iter().enumerate().map(sample).map(Item::Sample).collect()
    }

    fn line(i: usize) -> String {
        format!(r#"{{"id":"s{i}","loss":0.5,"label_tokens":1,"logps":[-0.5]}}"#)
    }

    #[test]
    fn lines_go_on_as_far_as_they_are_of_the_same_samples() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out.jsonl");
        let open = |setting: &str| Partial::open(&out, setting.into()).unwrap().unwrap();
        let (all, lines) = (items(&[5, 6, 7]), (0..3).map(line).collect::<Vec<_>>());
        let mut first = open("a");
        assert!(first.kept(&all).unwrap().is_empty());
        first.add(&all[..2], &lines[..2]).unwrap();
        let report = Partial::open(&out, "a".into()).err().unwrap().report();
        assert!(report.contains("out.jsonl.partial is being written by another process"), "{report}");
        drop(first);
        assert_eq!(open("a").kept(&all).unwrap(), lines[..2]);
        assert_eq!(open("a").kept(&items(&[5, 8, 7])).unwrap(), lines[..1], "another answer");
        assert!(open("b").kept(&all).unwrap().is_empty(), "another setting");
        // Cut in the middle of a line, as a power cut may.
        let path = open("a").path().to_path_buf();
        let text = std::fs::read(&path).unwrap();
        std::fs::write(&path, &text[..text.len() - 9]).unwrap();
        let mut again = open("a");
        assert_eq!(again.kept(&all).unwrap(), lines[..1]);
        again.restart(&all[..1], &lines[..1]).unwrap();
        again.add(&all[1..], &lines[1..]).unwrap();
        again.finish(&out).unwrap();
        assert_eq!(std::fs::read_to_string(&out).unwrap(), lines.join("\n") + "\n");
        assert!(!path.exists());
        std::fs::write(&path, "mine").unwrap();
        let report = Partial::open(&out, "a".into()).err().unwrap().report();
        assert!(report.contains("it holds no unfinished scores"), "{report}");
    }
}
