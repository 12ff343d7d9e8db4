//! Repositories of the Hugging Face hub, through the cache that all of its tools share.
//!
//! Layout of the cache (huggingface_hub's guide "Understand caching"): `models--OWNER--NAME/refs/REVISION` holds a commit,
//! `snapshots/COMMIT/FILE` links to `blobs/`, and `.no_exist/COMMIT/FILE` notes that a file is known not to be there. With
//! these a complete snapshot is used without the network. The crate `hf-hub` (0.5) sends the token on to the host that a
//! redirect names, waits for ever on a connection that stalls, and does not check what it got; so requests are made here.

mod blob;
mod http;
mod settings;

pub use settings::Hub;

use super::source::{Snapshot, alternatives, describe, gaps};
use super::tensors::shard_names;
use crate::bail;
use crate::error::{Context, Error, Result};
use http::Client;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// The snapshot of `repo` at `revision` with the files `what` (see [`super::source::resolve`]).
pub(super) fn resolve(repo: &str, revision: &str, what: &[&str], hub: &Hub) -> Result<Snapshot> {
    let folder = hub.folder(repo);
    let cached = cached_commit(&folder, revision).map(|commit| (folder.join("snapshots").join(&commit), commit));
    let mut usable = None;
    if let Some((dir, commit)) = cached {
        let known_absent = |name: &str| folder.join(".no_exist").join(&commit).join(name).exists();
        let mut gaps = gaps(&dir, what)?;
        gaps.retain(|g| !(g.optional && known_absent(&g.name)));
        let complete = gaps.is_empty();
        if gaps.iter().all(|g| g.optional) {
            usable = Some(Snapshot { dir, revision: Some(commit) });
        }
        if let (true, Some(snapshot)) = (complete, &usable) {
            return Ok(snapshot.clone());
        }
    }
    if hub.offline {
        return usable.ok_or_else(|| {
            Error::new(format!("{repo}@{revision} is not complete in the cache {}", hub.cache.display()))
                .hint(format!("HF_HUB_OFFLINE is set (or TRANSFORMERS_OFFLINE); needed: {}", describe(what)))
        });
    }
    match (download(repo, revision, what, hub), usable) {
        (Err(e), Some(snapshot)) => {
            tracing::warn!("{e}; using the cached {repo}@{revision}");
            Ok(snapshot)
        }
        (result, _) => result,
    }
}

/// The commit that `revision` meant when it was last asked for; a commit stands for itself.
fn cached_commit(folder: &Path, revision: &str) -> Option<String> {
    let commit = match fs::read_to_string(folder.join("refs").join(revision)) {
        Ok(commit) => commit.trim().to_string(),
        Err(_) => revision.to_string(),
    };
    (is_commit(&commit) && folder.join("snapshots").join(&commit).is_dir()).then_some(commit)
}

fn is_commit(s: &str) -> bool {
    s.len() == 40 && s.bytes().all(|b| b.is_ascii_hexdigit())
}

/// What the hub says about a revision.
#[derive(Deserialize)]
struct Revision {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

fn download(repo: &str, revision: &str, what: &[&str], hub: &Hub) -> Result<Snapshot> {
    let client = Client::new(hub);
    let text = client.revision(repo, revision).map_err(|e| e.error(&format!("{repo}@{revision}"), hub))?;
    let info: Revision = serde_json::from_str(&text).map_err(|e| {
        Error::new(format!("{} does not answer as a hub does about {repo}", http::shown(&hub.endpoint)))
            .source(e)
            .hint("is HF_ENDPOINT right, and does this network want a login in a browser?")
    })?;
    if !is_commit(&info.sha) {
        bail!("{} answered with `{}` instead of a commit for {repo}", http::shown(&hub.endpoint), info.sha;
            "is HF_ENDPOINT right?");
    }
    let folder = hub.folder(repo);
    let dir = folder.join("snapshots").join(&info.sha);
    let there = |name: &str| info.siblings.iter().any(|s| s.rfilename == name);
    for entry in what {
        let (optional, names) = alternatives(entry);
        let names: Vec<_> = names.collect();
        match names.iter().find(|name| there(name)) {
            Some(name) => {
                blob::fetch(&client, hub, repo, &info.sha, name)?;
                if name.ends_with(".index.json") {
                    for shard in shard_names(&dir.join(name))? {
                        blob::fetch(&client, hub, repo, &info.sha, &shard)?;
                    }
                }
            }
            None if optional => names.iter().try_for_each(|name| note_absent(&folder, &info.sha, name))?,
            None => {
                bail!("{repo}@{revision} has no {}", names.join(" or ");
                    "it holds: {}", info.siblings.iter().map(|s| s.rfilename.as_str()).collect::<Vec<_>>().join(", "))
            }
        }
    }
    if revision != info.sha {
        write_whole(&folder.join("refs").join(revision), &info.sha)?;
    }
    fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
    Ok(Snapshot { dir, revision: Some(info.sha) })
}

fn ignore_absent(e: std::io::Error) -> std::io::Result<()> {
    if e.kind() == std::io::ErrorKind::NotFound { Ok(()) } else { Err(e) }
}

/// Lower-case hex SHA-256 of a file.
fn sha256(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| path.display().to_string())?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect()),
            n => hash.update(&buffer[..n]),
        }
    }
}

fn note_absent(folder: &Path, commit: &str, name: &str) -> Result<()> {
    write_whole(&folder.join(".no_exist").join(commit).join(name), "")
}

/// Tells the files that one process writes apart.
static WRITTEN: AtomicU64 = AtomicU64::new(0);

/// Writes a small file so that other processes see all of it or nothing.
fn write_whole(path: &Path, text: &str) -> Result<()> {
    let parent = path.parent().unwrap_or(path);
    let write = || {
        fs::create_dir_all(parent)?;
        if fs::read_to_string(path).is_ok_and(|found| found == text) {
            return Ok(());
        }
        // Of this thread alone, and readable by whom the user lets read.
        let (name, process) = (path.file_name().unwrap_or_default().display(), std::process::id());
        let new = parent.join(format!(".{name}.{process}.{}", WRITTEN.fetch_add(1, Ordering::Relaxed)));
        fs::write(&new, text)?;
        fs::rename(&new, path)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod network_tests;
#[cfg(test)]
mod tests;
