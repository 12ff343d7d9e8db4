//! Repositories of the Hugging Face hub, through the cache that all of its tools share.
//!
//! Layout of the cache (huggingface_hub's guide "Understand caching"): `models--OWNER--NAME/refs/REVISION` holds a commit,
//! `snapshots/COMMIT/FILE` links to `blobs/`, and `.no_exist/COMMIT/FILE` notes that a file is known not to be there. With
//! these a complete snapshot is used without the network. `hf-hub` does the transfers; it knows only HF_HOME, resumes
//! without checking what it got, and does not keep a revision fixed over several files, so all of that is done here.

use super::source::{Snapshot, alternatives, describe, gaps};
use super::tensors::shard_names;
use crate::bail;
use crate::error::{Context, Error, Result};
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Repo, RepoType};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};

/// How the hub is reached.
#[derive(Clone, PartialEq, Eq)]
pub struct Hub {
    /// The folder of `models--…` folders.
    pub cache: PathBuf,
    /// Base URL, without a slash at its end.
    pub endpoint: String,
    pub token: Option<String>,
    /// Never use the network.
    pub offline: bool,
}

impl std::fmt::Debug for Hub {
    /// Never prints the token.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let token = if self.token.is_some() { "with" } else { "without" };
        write!(f, "Hub({} in {}, {token} token, offline: {})", self.endpoint, self.cache.display(), self.offline)
    }
}

impl Hub {
    /// From HF_HUB_CACHE or HF_HOME, HF_ENDPOINT, HF_TOKEN (or the token file of `hf auth login`), HF_HUB_OFFLINE.
    pub fn from_env() -> Result<Self> {
        Self::from_vars(|name| std::env::var(name).ok())
    }

    /// As [`Hub::from_env`], with the variables given by a function.
    pub fn from_vars(var: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let var = |name: &str| var(name).filter(|v| !v.is_empty());
        let user_cache =
            || var("XDG_CACHE_HOME").map(PathBuf::from).or_else(|| Some(std::env::home_dir()?.join(".cache")));
        let home = var("HF_HOME").map(PathBuf::from).or_else(|| Some(user_cache()?.join("huggingface")));
        let home = home.ok_or_else(|| Error::new("this user has no home folder").hint("set HF_HOME"))?;
        let cache = var("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from);
        let token_file = var("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
        let token = var("HF_TOKEN").or_else(|| fs::read_to_string(token_file).ok());
        let on = |v: String| ["1", "on", "yes", "true"].contains(&v.to_lowercase().as_str());
        Ok(Self {
            cache: std::path::absolute(&cache).with_context(|| cache.display().to_string())?,
            endpoint: var("HF_ENDPOINT").unwrap_or("https://huggingface.co".into()).trim_end_matches('/').into(),
            token: token.map(|t| t.trim().to_string()).filter(|t| !t.is_empty()),
            offline: var("HF_HUB_OFFLINE").is_some_and(on),
        })
    }

    fn folder(&self, repo: &str) -> PathBuf {
        self.cache.join(format!("models--{}", repo.replace('/', "--")))
    }

    fn api(&self) -> Result<Api> {
        ApiBuilder::new()
            .with_cache_dir(self.cache.clone())
            .with_endpoint(self.endpoint.clone())
            .with_token(self.token.clone())
            .with_progress(std::io::stderr().is_terminal())
            .build()
            .map_err(|e| Error::new("cannot set up the connection to the hub").source(e))
    }
}

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
                .hint(format!("HF_HUB_OFFLINE is set; needed: {}", describe(what)))
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

fn download(repo: &str, revision: &str, what: &[&str], hub: &Hub) -> Result<Snapshot> {
    let api = hub.api()?;
    let at = |revision: &str| api.repo(Repo::with_revision(repo.into(), RepoType::Model, revision.into()));
    let info = at(revision).info().map_err(|e| hub_error(e, &format!("{repo}@{revision}"), hub))?;
    if !is_commit(&info.sha) {
        bail!("{} answered with `{}` instead of a commit for {repo}", hub.endpoint, info.sha);
    }
    let (folder, remote) = (hub.folder(repo), at(&info.sha));
    let dir = folder.join("snapshots").join(&info.sha);
    let there = |name: &str| info.siblings.iter().any(|s| s.rfilename == name);
    for entry in what {
        let (optional, names) = alternatives(entry);
        let names: Vec<_> = names.collect();
        match names.iter().find(|name| there(name)) {
            Some(name) => {
                fetch(&api, &remote, &dir, name, hub)?;
                if name.ends_with(".index.json") {
                    for shard in shard_names(&dir.join(name))? {
                        fetch(&api, &remote, &dir, &shard, hub)?;
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
        write_new(&folder.join("refs").join(revision), &info.sha)?;
    }
    fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
    Ok(Snapshot { dir, revision: Some(info.sha) })
}

/// Downloads one file unless it is there, and checks its length and (for large files, whose etag it is) its SHA-256.
fn fetch(api: &Api, remote: &ApiRepo, dir: &Path, name: &str, hub: &Hub) -> Result<()> {
    const ATTEMPTS: usize = 3;
    let path = dir.join(name);
    if path.exists() {
        return Ok(());
    }
    let url = remote.url(name);
    let expected = api.metadata(&url).map_err(|e| hub_error(e, &url, hub))?;
    let mut attempt = 1;
    // What arrived before a connection broke is kept by hf-hub and continued.
    while let Err(e) = remote.download(name) {
        if attempt == ATTEMPTS || status(&e).is_some() {
            return Err(hub_error(e, &url, hub));
        }
        tracing::warn!("{url}: {e}; trying again");
        attempt += 1;
    }
    let found = fs::metadata(&path).with_context(|| path.display().to_string())?.len();
    let intact = found == expected.size() as u64 && (expected.etag().len() != 64 || sha256(&path)? == expected.etag());
    if !intact {
        // The link first: a link to nothing would be taken for damage by other tools.
        let blob = fs::canonicalize(&path);
        fs::remove_file(&path).with_context(|| path.display().to_string())?;
        if let Ok(blob) = blob {
            fs::remove_file(&blob).or_else(ignore_absent).with_context(|| blob.display().to_string())?;
        }
        bail!("{url} arrived damaged ({found} bytes, expected {})", expected.size(); "run the same command again");
    }
    Ok(())
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
    write_new(&folder.join(".no_exist").join(commit).join(name), "")
}

fn write_new(path: &Path, text: &str) -> Result<()> {
    let parent = path.parent().unwrap_or(path);
    fs::create_dir_all(parent)
        .and_then(|()| fs::write(path, text))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// The HTTP status an error is about.
fn status(e: &ApiError) -> Option<u16> {
    let ApiError::RequestError(e) = e else { return None };
    e.to_string().strip_prefix("http status: ")?.parse().ok()
}

fn hub_error(e: ApiError, what: &str, hub: &Hub) -> Error {
    let status = status(&e);
    let error = Error::new(format!("cannot get {what} from {}", hub.endpoint)).source(e);
    let token =
        if hub.token.is_some() { "the token in use may not read it" } else { "set HF_TOKEN if it is private or gated" };
    match status {
        Some(401 | 403) => {
            error.hint(format!("is the name right? {token}; gated models also need their licence accepted"))
        }
        Some(404) => error.hint(format!("no such repository, revision or file; {token}")),
        _ => error.hint("is there a network (HF_ENDPOINT names a mirror)? A local folder works as `source` as well"),
    }
}

#[cfg(test)]
mod tests;
