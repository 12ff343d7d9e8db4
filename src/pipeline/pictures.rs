//! Pictures are decoded before step 1, so that a broken one is found before anything trains, and all of them at once. None is
//! kept in memory; which ones were whole is remembered, by path, size and time, in the user's cache.

use crate::bail;
use crate::checkpoint::atomic::write_bytes;
use crate::data::{Dataset, ImageProcessor, ImageRef, Plan};
use crate::error::{Context, Error, Result};
use crate::report::Reporter;
use crate::report::human::thousands;
use crate::spec::{Alpha, Resize, Stage};
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

/// Of more pictures than this only so many, evenly spread, are decoded: an hour of large photographs on one core.
pub const MOST: usize = 100_000;

/// Broken pictures that are named.
const NAMED: usize = 20;

/// What decides whether a picture can be decoded.
type Way = (PathBuf, Resize, Alpha);

/// The pictures of some stages and evaluations, each once whatever they see of it, with a sample that shows it.
#[derive(Default)]
pub struct Pictures(BTreeMap<String, BTreeMap<Way, (ImageRef, String)>>);

/// How many pictures were decoded (or had been, and have not changed since), of how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Looked {
    pub at: usize,
    pub of: usize,
}

impl Pictures {
    /// Notes what the items `shown` of a stage or an evaluation show; `owner` is what it is called, e.g. `eval.seen`.
    pub fn add(&mut self, owner: &str, data: &Dataset, shown: impl IntoIterator<Item = usize>) {
        let own = self.0.entry(owner.to_string()).or_default();
        for item in shown.into_iter().filter_map(|i| data.items.get(i)) {
            for i in item.images() {
                let way = (i.path.clone(), i.resize, i.alpha);
                own.entry(way).or_insert_with(|| (i.clone(), item.id().to_string()));
            }
        }
    }

    /// Notes all of a data set.
    pub fn add_all(&mut self, owner: &str, data: &Dataset) {
        self.add(owner, data, 0..data.items.len());
    }

    /// Decodes the pictures of some owners.
    ///
    /// # Errors
    /// All broken ones together, the first of them by name, each with the sample that shows it and its owner.
    pub fn prove(
        &self,
        owners: &BTreeSet<String>,
        images: Option<&ImageProcessor>,
        reporter: &Reporter,
    ) -> Result<Looked> {
        let mut seen = BTreeSet::new();
        let mut all = Vec::new();
        for (owner, own) in self.0.iter().filter(|(owner, _)| owners.contains(*owner)) {
            all.extend(
                own.iter().filter(|(way, _)| seen.insert(*way)).map(|(_, (i, id))| (i, owner.as_str(), id.as_str())),
            );
        }
        let of = all.len();
        // Rounded so that they are spread over all of them.
        let some: Vec<_> = (0..of.min(MOST)).map(|k| all[k * of / of.min(MOST)]).collect();
        if some.len() < of {
            let [at, of] = [some.len(), of].map(|n| thousands(n as u64));
            reporter.info(&format!("looking at {at} of {of} pictures, evenly spread, whether they can be decoded"));
        }
        decode(&some, images, reporter)?;
        Ok(Looked { at: some.len(), of })
    }
}

/// Items that a stage's steps will show: all of them in an epoch or more.
pub fn shown(data: &Dataset, stage: &Stage, name: &str, steps: usize) -> Result<Vec<usize>> {
    if steps.saturating_mul(stage.batch.global) >= data.items.len() {
        return Ok((0..data.items.len()).collect());
    }
    let plan = Plan::new(data, &stage.batch, stage.seed, name, steps)?;
    Ok((0..steps).flat_map(|s| plan.step(s)).collect())
}

/// Pictures that are decoded between two looks at what is to be remembered.
const PART: usize = 2_000;

/// Decodes pictures, each with its owner and sample, and keeps none.
fn decode(pictures: &[(&ImageRef, &str, &str)], images: Option<&ImageProcessor>, reporter: &Reporter) -> Result<()> {
    let Some(images) = images else {
        if let Some((first, owner, id)) = pictures.first() {
            bail!("{owner}: sample {id} shows {}, but the model has no vision tower", first.path.display();
                "set model.vision, or leave the pictures out of the data")
        }
        return Ok(());
    };
    let mut known = Known::open();
    let progress = reporter.progress("looking at pictures", pictures.len());
    let mut broken = Vec::new();
    for part in pictures.chunks(PART) {
        let look = |(i, owner, id): &(&ImageRef, &str, &str)| {
            let mark = mark(i);
            let look = || match mark.is_some_and(|m| known.marks.contains(&m)) {
                true => Ok(None),
                false => images.load(i).map(|_| mark).with_context(|| format!("{owner}: sample {id}")),
            };
            let result = look();
            progress.inc(1);
            result
        };
        let results: Vec<Result<Option<Mark>>> = part.par_iter().map(look).collect();
        for result in results {
            match result {
                Ok(mark) => known.new.extend(mark),
                Err(e) => broken.push(e),
            }
        }
        known.keep();
    }
    together(broken)
}

/// One error out of several, each with its own hint.
pub fn together(mut problems: Vec<Error>) -> Result<()> {
    let n = problems.len();
    if n < 2 {
        return problems.pop().map_or(Ok(()), Err);
    }
    let lines = problems.iter().take(NAMED).map(|e| format!("\n\n{}", e.report().replace("\n\nhint: ", "\nhint: ")));
    let mut text = format!("{n} problems:{}", lines.collect::<String>());
    if n > NAMED {
        text += &format!("\n\nand {} more", n - NAMED);
    }
    Err(Error::new(text).hint("mend them all, then check again"))
}

/// A picture file as it was when it was decoded.
type Mark = [u8; 16];

/// Names the file's state; none if it may still be being written, or its time is not known.
fn mark(image: &ImageRef) -> Option<Mark> {
    let path = std::path::absolute(&image.path).ok()?;
    let about = std::fs::metadata(&path).ok()?;
    let time = about.modified().ok()?;
    // Two changes may fall into one tick of a file system's clock.
    if time.elapsed().ok()? < Duration::from_secs(2) {
        return None;
    }
    let mut h = Sha256::new();
    let (version, size) = (env!("ADFREEZE_VERSION"), about.len());
    let time = time.duration_since(UNIX_EPOCH).ok()?.as_nanos();
    h.update(format!("{version}\0{}\0{size}\0{time}\0{:?}\0{:?}", path.display(), image.resize, image.alpha));
    h.finalize().get(..16)?.try_into().ok()
}

/// Pictures that were whole when they were last looked at. A cache: what goes wrong with it costs time and nothing else.
struct Known {
    path: Option<PathBuf>,
    marks: BTreeSet<Mark>,
    /// To be written.
    new: Vec<Mark>,
}

/// Above so many bytes the file is begun anew: four million pictures.
const LARGEST: usize = 64 << 20;

impl Known {
    fn open() -> Self {
        let path = cache().map(|dir| dir.join("pictures"));
        Self { marks: path.as_deref().map(read).unwrap_or_default(), path, new: Vec::new() }
    }

    /// Writes what is new beside what other processes have written meanwhile.
    fn keep(&mut self) {
        let Some(path) = self.path.as_deref().filter(|_| !self.new.is_empty()) else { return };
        self.marks.extend(read(path));
        self.marks.extend(self.new.drain(..));
        let bytes: Vec<u8> = self.marks.iter().flatten().copied().collect();
        if let Err(e) = write_bytes(path, &bytes) {
            tracing::debug!("{e}");
            self.path = None;
        }
    }
}

fn read(path: &Path) -> BTreeSet<Mark> {
    let bytes = std::fs::read(path).ok().filter(|b| b.len() <= LARGEST).unwrap_or_default();
    bytes.chunks_exact(16).filter_map(|m| m.try_into().ok()).collect()
}

/// `$XDG_CACHE_HOME/adfreeze`, or that below `~/.cache`; none where neither is known.
fn cache() -> Option<PathBuf> {
    let folder = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    Some(folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")))?.join("adfreeze"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Item;
    use crate::data::Sample;

    fn image(path: &Path) -> ImageRef {
        ImageRef { path: path.into(), resize: Resize::Crop, alpha: Alpha::Drop, size: 28, tiles: None }
    }

    #[test]
    fn broken_pictures_are_named_together_and_once() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/a");
        let images = ImageProcessor::from_dir(&golden.join("model")).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let item = |name: String| {
            std::fs::write(dir.path().join(&name), "no picture").unwrap();
            let images = vec![image(&dir.path().join(&name)), image(&golden.join("images/exact0.png"))];
            Item::Sample(Sample { id: name, ids: vec![], labels: vec![], images, category: None, absent: vec![] })
        };
        let data = Dataset { items: (0..25).map(|i| item(format!("b{i:02}.png"))).collect() };
        let mut pictures = Pictures::default();
        pictures.add("stage.a", &data, [3, 3, 4]);
        pictures.add_all("eval.b", &data);
        let prove = |owners: &[&str]| {
            let owners = owners.iter().map(|o| o.to_string()).collect();
            pictures.prove(&owners, Some(&images), &Reporter::silent())
        };
        let e = prove(&["stage.a"]).unwrap_err();
        for part in ["2 problems", "stage.a: sample b03.png", "stage.a: sample b04.png"] {
            assert!(e.cause().contains(part), "{e}");
        }
        let e = prove(&["stage.a", "eval.b"]).unwrap_err();
        assert!(e.cause().contains("25 problems") && e.cause().contains("and 5 more"), "{e}");
        assert_eq!(prove(&[]).unwrap(), Looked { at: 0, of: 0 });
    }

    #[test]
    fn a_mark_is_that_of_a_path_a_size_and_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str, bytes: &[u8], old: bool| {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            if old {
                let time = UNIX_EPOCH + Duration::from_secs(1_000_000);
                std::fs::File::options().append(true).open(&path).unwrap().set_modified(time).unwrap();
            }
            image(&path)
        };
        // Written just now, it may still change within the tick of the clock.
        assert_eq!(mark(&at("a", b"1", false)), None);
        let first = mark(&at("a", b"1", true)).unwrap();
        assert_eq!(mark(&at("a", b"2", true)), Some(first));
        assert_ne!(mark(&at("a", b"22", true)), Some(first));
        assert_ne!(mark(&at("b", b"1", true)), Some(first));
        assert_ne!(mark(&ImageRef { alpha: Alpha::White, ..at("a", b"1", true) }), Some(first));
    }
}
