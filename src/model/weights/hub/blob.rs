//! One file of a repository into the cache: downloaded by one process at a time, continued where it broke off, checked
//! before it gets its name.

use super::http::{Client, Failure, RETRIES, header, shown};
use super::settings::Hub;
use super::{ignore_absent, sha256};
use crate::bail;
use crate::error::{Context, Error, Result};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{IsTerminal, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use ureq::http::StatusCode;
use ureq::http::header::{CONTENT_LENGTH, CONTENT_RANGE};

/// An attempt that brings fewer bytes counts as one without progress.
const PROGRESS: u64 = 64 << 10;

/// Brings `name` of a commit into its snapshot unless it is there.
pub(super) fn fetch(client: &Client, hub: &Hub, repo: &str, commit: &str, name: &str) -> Result<()> {
    let folder = hub.folder(repo);
    let path = folder.join("snapshots").join(commit).join(name);
    if path.exists() {
        return Ok(());
    }
    let url = client.file(repo, commit, name);
    let expected = client.metadata(&url).map_err(|e| e.error(&format!("{repo}/{name}"), hub))?;
    let blob = folder.join("blobs").join(&expected.etag);
    let _alone = lock(&hub.lock(repo, &expected.etag), &format!("{repo}/{name}"))?;
    if !blob.exists() {
        let download = Download { client, hub, url, what: format!("{repo}/{name}"), etag: expected.etag };
        download.run(expected.size, &blob)?;
    }
    link(&blob, &path).with_context(|| format!("cannot write {}", path.display()))
}

/// Waits until no other process downloads the same; nobody else does while the file that is returned is open. `None`
/// where the file system knows no locks: then the work may be done twice, with the same bytes.
fn lock(path: &Path, what: &str) -> Result<Option<File>> {
    make_folder(path)?;
    let open = OpenOptions::new().create(true).truncate(false).write(true).open(path);
    let file = open.map_err(|e| unwritable(path, e))?;
    let mut said: Option<Instant> = None;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(Some(file)),
            Err(TryLockError::Error(e)) => {
                tracing::warn!("{}: {e}; going on without a lock", path.display());
                return Ok(None);
            }
            Err(TryLockError::WouldBlock) => {}
        }
        if said.is_none_or(|at| at.elapsed() > Duration::from_secs(60)) {
            tracing::warn!("another process is downloading {what}; waiting for it ({})", path.display());
            said = Some(Instant::now());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

struct Download<'a> {
    client: &'a Client<'a>,
    hub: &'a Hub,
    url: String,
    /// For messages.
    what: String,
    etag: String,
}

impl Download<'_> {
    /// Receives the file beside `blob`, checks it, and gives it its name.
    fn run(&self, size: Option<u64>, blob: &Path) -> Result<()> {
        make_folder(blob)?;
        // The name under which huggingface_hub leaves (and left) a part.
        let part = PathBuf::from(format!("{}.incomplete", blob.display()));
        loop {
            let open = OpenOptions::new().create(true).truncate(false).write(true).open(&part);
            let mut file = open.map_err(|e| unwritable(&part, e))?;
            let found = file.metadata().with_context(|| part.display().to_string())?.len();
            let size = self.receive(&mut file, &part, found, size)?;
            file.sync_all().map_err(|e| unwritable(&part, e))?;
            drop(file);
            let Some(damage) = self.damage(&part, size)? else { break };
            fs::remove_file(&part).or_else(ignore_absent).with_context(|| part.display().to_string())?;
            if found == 0 {
                bail!("{} arrived damaged ({damage})", shown(&self.url); "run the same command again");
            }
            tracing::warn!("{}: what an earlier download left does not fit ({damage}); starting afresh", self.what);
        }
        match fs::rename(&part, blob) {
            // Another process was faster, where locks do not hold.
            Err(_) if blob.exists() => Ok(()),
            renamed => renamed.map_err(|e| unwritable(blob, e)),
        }
    }

    /// Appends to the first `at` bytes until all are there, with new attempts as long as they bring something. Returns
    /// the size that the hub told.
    fn receive(&self, file: &mut File, part: &Path, mut at: u64, mut size: Option<u64>) -> Result<Option<u64>> {
        if size.is_some_and(|size| at > size) {
            at = 0;
        }
        let bar = bar(&self.what);
        let (mut best, mut idle) = (at, 0);
        while size.is_none_or(|size| at < size) {
            let failure = match self.attempt(file, part, &mut at, &mut size, &bar)? {
                Ok(()) if size.is_none_or(|size| at >= size) => break,
                Ok(()) => Failure::passing("the connection was closed"),
                Err(failure) => failure,
            };
            idle = if at >= best + PROGRESS { 1 } else { idle + 1 };
            best = best.max(at);
            if let Err(failure) = self.client.pause(&self.url, idle, failure) {
                let arrived = size.map_or_else(|| format!("{at} bytes"), |size| format!("{at} of {size} bytes"));
                let mut error = failure.error(&self.what, self.hub);
                if idle > RETRIES {
                    error = error.context(format!("gave up with {arrived} after {RETRIES} new attempts"));
                }
                return Err(error);
            }
        }
        // What an earlier process left may be longer.
        file.set_len(at).map_err(|e| unwritable(part, e))?;
        bar.finish_and_clear();
        Ok(size)
    }

    /// Writes what one request brings to its place in the file; `Err` inside is of the network, outside of this disk.
    fn attempt(
        &self,
        file: &mut File,
        part: &Path,
        at: &mut u64,
        size: &mut Option<u64>,
        bar: &ProgressBar,
    ) -> Result<Result<(), Failure>> {
        let response = match self.client.download(&self.url, *at) {
            Ok(response) => response,
            Err(failure) if failure.is_beyond_the_end() && *at > 0 => {
                *at = 0;
                return Ok(Err(Failure::passing("what is here is no part of it")));
            }
            Err(failure) => return Ok(Err(failure)),
        };
        let headers = response.headers();
        let (begin, total) = if response.status() == StatusCode::PARTIAL_CONTENT {
            let range = header(headers, CONTENT_RANGE.as_str()).unwrap_or_default();
            (first_byte(&range), range.rsplit('/').next().and_then(|n| n.parse().ok()))
        } else {
            // The range was ignored.
            (Some(0), header(headers, CONTENT_LENGTH.as_str()).and_then(|n| n.parse().ok()))
        };
        match begin {
            Some(begin) if begin <= *at => *at = begin,
            _ => return Ok(Err(Failure::last(format!("bytes from {at} on were asked for, others were sent")))),
        }
        *size = size.or(total);
        bar.set_length(size.unwrap_or(0));
        let mut body = response.into_body().into_reader();
        // Not appended: two processes write the same bytes to the same places, should locks not hold.
        file.seek(SeekFrom::Start(*at)).map_err(|e| unwritable(part, e))?;
        let mut buffer = vec![0; 1 << 18];
        while size.is_none_or(|size| *at <= size) {
            match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => {
                    file.write_all(&buffer[..n]).map_err(|e| unwritable(part, e))?;
                    *at += n as u64;
                    bar.set_position(*at);
                }
                Err(e) => return Ok(Err(self.client.broken(e))),
            }
        }
        Ok(Ok(()))
    }

    /// What is wrong with the received file, by its length and, for large files, whose ETag it is, its SHA-256.
    fn damage(&self, part: &Path, size: Option<u64>) -> Result<Option<String>> {
        let found = fs::metadata(part).with_context(|| part.display().to_string())?.len();
        if size.is_some_and(|size| size != found) {
            return Ok(size.map(|size| format!("{found} bytes, expected {size}")));
        }
        if self.etag.len() != 64 {
            return Ok(None);
        }
        let sum = sha256(part)?;
        Ok((sum != self.etag).then(|| format!("{found} bytes, SHA-256 {sum}, expected {}", self.etag)))
    }
}

/// `A` of `bytes A-B/N`.
fn first_byte(range: &str) -> Option<u64> {
    range.strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok()
}

fn bar(what: &str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
    let bar =
        ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10)).with_message(what.to_string());
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// `path`, in a snapshot, stands for `blob`.
fn link(blob: &Path, path: &Path) -> std::io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    #[cfg(unix)]
    {
        let up = path.ancestors().skip(1).take_while(|p| blob.parent().and_then(Path::parent) != Some(p)).count();
        let mut target: PathBuf = std::iter::repeat_n("..", up).collect();
        target.extend([Path::new("blobs"), Path::new(blob.file_name().unwrap_or_default())]);
        // One that leads nowhere.
        if !path.exists() {
            fs::remove_file(path).or_else(ignore_absent)?;
        }
        match std::os::unix::fs::symlink(target, path) {
            // Another process made it.
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
            made => made,
        }
    }
    #[cfg(not(unix))]
    fs::copy(blob, path).map(drop)
}

fn make_folder(path: &Path) -> Result<()> {
    let parent = path.parent().unwrap_or(path);
    fs::create_dir_all(parent).map_err(|e| unwritable(parent, e))
}

fn unwritable(path: &Path, e: std::io::Error) -> Error {
    Error::new(format!("cannot write {}", path.display()))
        .source(e)
        .hint("HF_HUB_CACHE (or HF_HOME) names another folder for what is downloaded; is there room on this disk?")
}
