//! Pictures are decoded ahead of the step that needs them.
//!
//! One thread, the feeder, walks the steps in order and hands out decoding work to a few workers; it alone owns the cache of
//! decoded pictures. The queue of steps ahead is bounded, and so is the cache. The consumer gets the steps in order, whatever
//! order the workers finish in. Dropping the loader ends all threads.

use super::dataset::{Dataset, Item};
use super::image::{ImageProcessor, ImageRef};
use super::pixels::Pixels;
use crate::bail;
use crate::error::{Error, Result};
use crossbeam_channel::{Receiver, Sender, bounded};
use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

/// What one step needs.
#[derive(Debug, Clone)]
pub struct StepData {
    pub step: usize,
    /// Indices of the step's items in the data set.
    pub indices: Vec<usize>,
    /// The pixels of every distinct picture of `items`.
    pub pixels: Pixels,
}

/// How far ahead, with how many threads, and how much is kept.
#[derive(Debug, Clone, Copy)]
pub struct LoaderOptions {
    pub threads: usize,
    /// Steps that may be under way or ready before the one that is asked for.
    pub ahead: usize,
    /// Bytes of decoded pictures that are kept for later epochs.
    pub cache_bytes: usize,
}

impl Default for LoaderOptions {
    fn default() -> Self {
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(8);
        Self { threads, ahead: 2, cache_bytes: 1 << 30 }
    }
}

/// The result of one decoding, set once by a worker.
type Slot = Arc<OnceLock<Result<Arc<Vec<f32>>, Arc<Error>>>>;

struct Job {
    image: ImageRef,
    slot: Slot,
}

/// A step whose pictures may still be under way.
struct Pending {
    step: usize,
    items: Vec<usize>,
    slots: BTreeMap<ImageRef, Slot>,
}

/// An iterator over the steps' data.
pub struct Loader {
    dataset: Arc<Dataset>,
    /// Taken at drop, so that the feeder sees that nobody listens.
    pending: Option<Receiver<Pending>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Loader {
    /// Starts to load `batches`: step number and the indices of its items, as from [`super::sampler::Plan::step`].
    /// A model without a vision tower has no `processor`; a picture is then an error of its step.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn new<B>(
        dataset: Arc<Dataset>,
        processor: Option<Arc<ImageProcessor>>,
        batches: B,
        options: LoaderOptions,
    ) -> Result<Self>
    where
        B: IntoIterator<Item = (usize, Vec<usize>)>,
        B::IntoIter: Send + 'static,
    {
        let threads = options.threads.max(1);
        let (job_tx, job_rx) = bounded::<Job>(threads * 2);
        // The consumer holds one step and the feeder works on another.
        let (pending_tx, pending_rx) = bounded(options.ahead.saturating_sub(1));
        let stop = Arc::new(AtomicBool::new(false));
        let mut loader =
            Self { dataset: dataset.clone(), pending: Some(pending_rx), stop: stop.clone(), threads: vec![] };
        for _ in 0..threads {
            let (jobs, processor, stop) = (job_rx.clone(), processor.clone(), stop.clone());
            loader.spawn(move || work(&jobs, processor.as_deref(), &stop))?;
        }
        let batches = batches.into_iter();
        let cache = Cache::new(options.cache_bytes);
        loader.spawn(move || feed(&dataset, batches, cache, &job_tx, &pending_tx))?;
        Ok(loader)
    }

    fn spawn(&mut self, run: impl FnOnce() + Send + 'static) -> Result<()> {
        let thread = std::thread::Builder::new().name("loader".into()).spawn(run);
        let hint = "the system refuses more threads: raise its limit (ulimit -u)";
        self.threads.push(thread.map_err(|e| Error::new(format!("cannot start a loader thread: {e}")).hint(hint))?);
        Ok(())
    }

    /// Stops and joins all threads. Steps must not end early in silence because one of them panicked.
    fn end(&mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        self.pending = None;
        let ends: Vec<_> = self.threads.drain(..).map(JoinHandle::join).collect();
        match ends.into_iter().find_map(std::result::Result::err) {
            Some(panic) => Err(Error::new(format!("a loader thread failed: {}", panic_text(&*panic)))),
            None => Ok(()),
        }
    }

    /// Waits for the pictures of a step.
    fn finish(&self, pending: Pending) -> Result<StepData> {
        let mut items = pending.items.iter().map(|&i| &self.dataset.items[i]);
        let mut pixels = Pixels::new();
        for (image, slot) in pending.slots {
            match slot.wait() {
                Ok(p) => pixels.insert(image, p.clone()),
                Err(e) => {
                    let owner = items.find(|i| i.images().contains(&image)).map_or("?", Item::id);
                    let again = Error::new(format!("sample {owner}: {e}"));
                    return Err(match e.hint_text() {
                        Some(hint) => again.hint(hint),
                        None => again,
                    });
                }
            };
        }
        Ok(StepData { step: pending.step, indices: pending.items, pixels })
    }
}

impl Iterator for Loader {
    type Item = Result<StepData>;

    fn next(&mut self) -> Option<Self::Item> {
        match self.pending.as_ref()?.recv() {
            Ok(pending) => Some(self.finish(pending)),
            Err(_) => self.end().err().map(Err),
        }
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        // Nobody is left to hear of an error.
        let _ = self.end();
    }
}

/// Walks the steps until they end or the consumer has gone.
fn feed(
    dataset: &Dataset,
    batches: impl Iterator<Item = (usize, Vec<usize>)>,
    mut cache: Cache,
    jobs: &Sender<Job>,
    pending: &Sender<Pending>,
) {
    for (step, items) in batches {
        let mut slots = BTreeMap::new();
        for image in items.iter().flat_map(|&i| dataset.items[i].images()) {
            if slots.contains_key(image) {
                continue;
            }
            let (slot, new) = cache.slot(image);
            if new && jobs.send(Job { image: image.clone(), slot: slot.clone() }).is_err() {
                return;
            }
            slots.insert(image.clone(), slot);
        }
        if pending.send(Pending { step, items, slots }).is_err() {
            return;
        }
    }
}

fn work(jobs: &Receiver<Job>, processor: Option<&ImageProcessor>, stop: &AtomicBool) {
    for Job { image, slot } in jobs {
        if stop.load(Ordering::Relaxed) {
            continue;
        }
        let load = || match processor {
            Some(processor) => processor.load(&image),
            None => bail!("the model has no vision tower for {}", image.path.display();
                "set model.vision, or leave the pictures out of the data"),
        };
        // A decoder that panics must not leave the consumer waiting.
        let result = catch_unwind(AssertUnwindSafe(load)).unwrap_or_else(|panic| Err(panicked(&image, &*panic)));
        // The slot is this job's alone, so it cannot be full.
        let _ = slot.set(result.map(Arc::new).map_err(Arc::new));
    }
}

fn panicked(image: &ImageRef, panic: &(dyn Any + Send)) -> Error {
    Error::new(format!("the decoder failed on the image {}: {}", image.path.display(), panic_text(panic)))
        .hint("replace the file, or take its samples out of the data")
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("panic")
}

/// The pictures used last.
struct Cache {
    /// Bytes that they may take, and do.
    capacity: usize,
    held: usize,
    clock: u64,
    slots: BTreeMap<ImageRef, (Slot, u64)>,
    /// Pictures by the time of their last use.
    uses: BTreeMap<u64, ImageRef>,
}

impl Cache {
    fn new(capacity: usize) -> Self {
        Self { capacity, held: 0, clock: 0, slots: BTreeMap::new(), uses: BTreeMap::new() }
    }

    /// The slot of a picture, and whether it is new and has to be filled.
    fn slot(&mut self, image: &ImageRef) -> (Slot, bool) {
        self.clock += 1;
        if let Some((slot, used)) = self.slots.get_mut(image) {
            self.uses.remove(used);
            *used = self.clock;
            self.uses.insert(self.clock, image.clone());
            return (slot.clone(), false);
        }
        let (slot, bytes) = (Slot::default(), bytes(image));
        if bytes <= self.capacity {
            while self.held + bytes > self.capacity
                && let Some((_, oldest)) = self.uses.pop_first()
            {
                self.slots.remove(&oldest);
                self.held -= self::bytes(&oldest);
            }
            self.held += bytes;
            self.slots.insert(image.clone(), (slot.clone(), self.clock));
            self.uses.insert(self.clock, image.clone());
        }
        (slot, true)
    }
}

/// Bytes of a picture once it is decoded.
fn bytes(image: &ImageRef) -> usize {
    image.numbers() * size_of::<f32>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::encode::Sample;
    use crate::spec::{Alpha, Resize};
    use std::path::{Path, PathBuf};
    use std::sync::mpsc;
    use std::time::Duration;

    fn golden(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/a").join(name)
    }

    fn processor() -> Arc<ImageProcessor> {
        Arc::new(ImageProcessor::from_dir(&golden("model")).unwrap())
    }

    fn image(path: PathBuf) -> ImageRef {
        ImageRef { path, resize: Resize::Crop, alpha: Alpha::Drop, size: 56, tiles: None }
    }

    /// One item an image; then one without.
    fn dataset(paths: &[PathBuf]) -> Arc<Dataset> {
        let item = |(i, images)| {
            let (ids, labels) = (vec![1], vec![1]);
            Item::Sample(Sample { id: format!("s{i}"), ids, labels, images, category: None, absent: vec![] })
        };
        let images = paths.iter().map(|p| vec![image(p.clone())]).chain([vec![]]);
        Arc::new(Dataset { items: images.enumerate().map(item).collect() })
    }

    fn pictures() -> Vec<PathBuf> {
        ["exact0", "landscape", "portrait", "gray"].map(|n| golden(&format!("images/{n}.png"))).to_vec()
    }

    fn options(cache: usize) -> LoaderOptions {
        LoaderOptions { threads: 3, ahead: 2, cache_bytes: cache * 3 * 56 * 56 * 4 }
    }

    #[test]
    fn yields_steps_in_order_with_their_pictures() {
        let (ds, p) = (dataset(&pictures()), processor());
        for cache in [0, 1, 100] {
            let batches = (5..40).map(|s| (s, vec![s % 4, (s + 1) % 4, 4, s % 4]));
            let mut steps = 5;
            for data in Loader::new(ds.clone(), Some(p.clone()), batches, options(cache)).unwrap() {
                let data = data.unwrap();
                assert_eq!((data.step, data.indices.len(), data.pixels.len()), (steps, 4, 2));
                assert_eq!(data.indices[1], (steps + 1) % 4);
                for (image, pixels) in &data.pixels {
                    assert_eq!(**pixels, p.load(image).unwrap());
                }
                steps += 1;
            }
            assert_eq!(steps, 40);
        }
    }

    #[test]
    fn a_missing_picture_names_sample_and_file_and_later_steps_still_come() {
        let mut paths = pictures();
        paths[1] = PathBuf::from("nowhere/x.png");
        let batches = (0..4).map(|s| (s, vec![s]));
        let results: Vec<_> = Loader::new(dataset(&paths), Some(processor()), batches, options(9)).unwrap().collect();
        let e = results[1].as_ref().unwrap_err();
        assert!(e.cause().contains("sample s1") && e.cause().contains("nowhere/x.png"), "{e}");
        assert!(e.hint_text().is_some());
        assert!(results[2].is_ok() && results.len() == 4);
    }

    #[test]
    fn a_picture_without_a_vision_tower_is_an_error() {
        let batches = [(0, vec![4]), (1, vec![0])];
        let results: Vec<_> = Loader::new(dataset(&pictures()), None, batches, options(9)).unwrap().collect();
        assert!(results[0].is_ok());
        assert!(results[1].as_ref().unwrap_err().cause().contains("sample s0: the model has no vision tower"));
    }

    #[test]
    fn dropping_ends_all_threads_at_once() {
        let (done, ended) = mpsc::channel();
        std::thread::spawn(move || {
            for taken in [0, 1, 3] {
                let batches = (0..).map(|s| (s, vec![s % 4]));
                let mut loader = Loader::new(dataset(&pictures()), Some(processor()), batches, options(1)).unwrap();
                for _ in 0..taken {
                    loader.next().unwrap().unwrap();
                }
                drop(loader);
            }
            done.send(()).unwrap();
        });
        ended.recv_timeout(Duration::from_secs(60)).expect("a loader thread did not end");
    }

    #[test]
    fn a_panic_of_the_feeder_is_an_error_and_not_an_end() {
        let batches = (0..3).map(|s| (s, vec![s * 4]));
        let mut loader = Loader::new(dataset(&pictures()), Some(processor()), batches, options(1)).unwrap();
        assert!(loader.next().unwrap().is_ok() && loader.next().unwrap().is_ok());
        let e = loader.next().unwrap().unwrap_err();
        assert!(e.cause().contains("loader thread failed"), "{e}");
        assert!(loader.next().is_none());
    }

    #[test]
    fn keeps_the_pictures_used_last() {
        let [a, b, c] = ["a", "b", "c"].map(|n| image(n.into()));
        let mut cache = Cache::new(2 * bytes(&a));
        let new: Vec<bool> = [&a, &b, &a, &c, &a, &b, &c].map(|i| cache.slot(i).1).to_vec();
        assert_eq!(new, [true, true, false, true, false, true, true]);
        assert_eq!((cache.slots.len(), cache.held), (2, 2 * bytes(&a)));
        // A larger one takes the place of both, and one that is larger than all is not kept.
        let large = |size| ImageRef { size, ..a.clone() };
        assert!(cache.slot(&large(79)).1 && cache.slots.len() == 1 && cache.held == bytes(&large(79)));
        assert!(cache.slot(&large(80)).1 && cache.slots.len() == 1);
        assert!(cache.slot(&a).1 && cache.held == bytes(&a));
    }
}
