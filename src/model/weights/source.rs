//! From what a recipe names (a folder, a file, `owner/name[@revision]`) to files on this disk.

use super::hub::{self, Hub};
use super::tensors::shard_names;
use crate::bail;
use crate::error::{Context, Result, near};
use std::path::{Path, PathBuf};

/// A folder of a model and its weights, single or sharded, safetensors before PyTorch.
pub const MODEL: &[&str] = &[
    "config.json",
    "model.safetensors|model.safetensors.index.json|pytorch_model.bin|pytorch_model.bin.index.json",
    "?generation_config.json",
];
/// A tokenizer; its template may be in a file of its own.
pub const TOKENIZER: &[&str] = &[
    "tokenizer.json",
    "?tokenizer_config.json",
    "?special_tokens_map.json",
    "?added_tokens.json",
    "?generation_config.json",
    "?chat_template.jinja",
    "?chat_template.json",
];
/// As [`TOKENIZER`], where there may be none.
pub const OPTIONAL_TOKENIZER: &[&str] = &[
    "?tokenizer.json",
    "?tokenizer_config.json",
    "?special_tokens_map.json",
    "?added_tokens.json",
    "?generation_config.json",
    "?chat_template.jinja",
    "?chat_template.json",
];
/// How pictures are prepared.
pub const IMAGE_PROCESSOR: &[&str] = &["?preprocessor_config.json", "?processor_config.json"];
/// A projector alone or in a whole model, and what its configuration says of it.
pub const PROJECTOR: &[&str] = &[
    "projector.safetensors|mm_projector.bin|non_lora_trainables.bin|model.safetensors|model.safetensors.index.json|pytorch_model.bin|pytorch_model.bin.index.json",
    "?config.json",
];
/// A PEFT adapter, and what the original LLaVA code trains beside it.
pub const ADAPTER: &[&str] =
    &["adapter_config.json", "adapter_model.safetensors|adapter_model.bin", "?non_lora_trainables.bin"];

/// Where the files of a source are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The folder; the file itself if the source names a file.
    pub dir: PathBuf,
    /// The commit, for sources from the hub.
    pub revision: Option<String>,
}

/// Finds `source` on this disk, in the Hugging Face cache, or on the hub, in this order, with the settings of the
/// environment (see [`Hub::from_env`]).
///
/// Each entry of `what` is a file name, or several split by `|` of which the first that exists is taken; a leading `?` marks
/// it as optional. An index brings the shards it names. What is in the cache is not looked up again on the hub: name
/// another `@revision` to get one.
pub fn resolve(source: &str, what: &[&str]) -> Result<Snapshot> {
    resolve_with(source, what, &Hub::from_env()?)
}

/// As [`resolve`], with explicit settings.
pub fn resolve_with(source: &str, what: &[&str], hub: &Hub) -> Result<Snapshot> {
    let path = Path::new(source);
    if path.is_file() {
        return Ok(Snapshot { dir: path.into(), revision: None });
    }
    if path.is_dir() {
        let gaps = gaps(path, what)?;
        if let Some(missing) = gaps.iter().find(|g| !g.optional) {
            bail!("{source} has no {}", missing.name; "it must hold: {}", describe(what));
        }
        return Ok(Snapshot { dir: path.into(), revision: None });
    }
    match repository(source) {
        Some((repo, revision)) => hub::resolve(repo, revision, what, hub),
        None => {
            let hint = "give a path, or a repository as owner/name or owner/name@revision";
            bail!("there is no folder or file {source}"; "{}", near::path_hint(path, hint))
        }
    }
}

/// `owner/name` and revision of a source on the hub; `None` if it is, or can only be, a path.
pub fn on_hub(source: &str) -> Option<(&str, &str)> {
    if Path::new(source).exists() { None } else { repository(source) }
}

/// `owner/name` and revision, if `source` has that form.
fn repository(source: &str) -> Option<(&str, &str)> {
    let (repo, revision) = source.split_once('@').unwrap_or((source, "main"));
    let (owner, name) = repo.split_once('/')?;
    let fits = |s: &str| {
        s.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
            && s.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    let safe = |part: &str| !part.is_empty() && part != "." && part != "..";
    (fits(owner) && fits(name) && revision.split('/').all(safe)).then_some((repo, revision))
}

/// Something asked for that a folder does not hold.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Gap {
    /// What is missing: a file, or the alternatives.
    pub name: String,
    pub optional: bool,
}

/// One entry of `what`: whether it is optional, and its alternatives.
pub(super) fn alternatives(entry: &str) -> (bool, impl Iterator<Item = &str>) {
    let (optional, names) = entry.strip_prefix('?').map_or((false, entry), |names| (true, names));
    (optional, names.split('|'))
}

/// Largest file of settings (config.json, an index of shards) that is read, in bytes; those of the largest models have about 10 MB.
const MAX_TEXT: u64 = 256 << 20;

/// An error unless `path` is a file: reading a pipe or a device may never end.
pub fn must_be_file(path: &Path) -> Result<std::fs::Metadata> {
    let data = std::fs::metadata(path).with_context(|| format!("cannot open {}", path.display()))?;
    if !data.is_file() {
        let kind = if data.is_dir() { "a folder" } else { "a pipe or a device" };
        bail!("{} is {kind}, not a file", path.display(); "copy the file from where the model comes from");
    }
    Ok(data)
}

/// The text of a file of settings.
pub fn read_text(path: &Path) -> Result<String> {
    let bytes = must_be_file(path)?.len();
    if bytes > MAX_TEXT {
        bail!("{} has {bytes} bytes, more than the {MAX_TEXT} that a file of settings may have", path.display();
            "copy the file from where the model comes from");
    }
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// What of `what` is not in `dir`, shards included.
pub(super) fn gaps(dir: &Path, what: &[&str]) -> Result<Vec<Gap>> {
    let mut gaps = Vec::new();
    for entry in what {
        let (optional, mut names) = alternatives(entry);
        match names.find(|name| dir.join(name).exists()) {
            None => gaps.push(Gap { name: entry.trim_start_matches('?').replace('|', " or "), optional }),
            Some(index) if index.ends_with(".index.json") => {
                let shards = shard_names(&dir.join(index))?;
                let missing = shards.into_iter().filter(|name| !dir.join(name).exists());
                gaps.extend(missing.map(|name| Gap { name, optional }));
            }
            Some(_) => {}
        }
    }
    Ok(gaps)
}

/// The required part of `what`, for a message.
pub(super) fn describe(what: &[&str]) -> String {
    let required: Vec<_> = what.iter().filter(|w| !w.starts_with('?')).map(|w| w.replace('|', " or ")).collect();
    required.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repositories_and_paths() {
        assert_eq!(
            repository("openai/clip-vit-large-patch14-336"),
            Some(("openai/clip-vit-large-patch14-336", "main"))
        );
        assert_eq!(repository("a/b@refs/pr/3"), Some(("a/b", "refs/pr/3")));
        for source in ["./a/b", "/a/b", "a", "a/b/c", "a/b@../../x", "a/..", "../b", "a/b@"] {
            assert_eq!(repository(source), None, "{source}");
        }
    }

    #[test]
    fn a_folder_that_lacks_files_says_which() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().to_str().unwrap();
        let hub = Hub { offline: true, ..Hub::from_vars(|_| None).unwrap() };
        let report = || resolve_with(source, MODEL, &hub).unwrap_err().report();
        assert!(report().contains(&format!("{source} has no config.json")));
        std::fs::write(dir.path().join("config.json"), "{}").unwrap();
        assert!(report().contains("has no model.safetensors or model.safetensors.index.json or pytorch_model.bin"));
        let index = r#"{ "weight_map": { "a": "one.safetensors", "b": "two.safetensors" } }"#;
        std::fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
        std::fs::write(dir.path().join("one.safetensors"), "").unwrap();
        assert!(report().contains("has no two.safetensors"));
        std::fs::write(dir.path().join("two.safetensors"), "").unwrap();
        assert_eq!(resolve_with(source, MODEL, &hub).unwrap().dir, dir.path());
        let file = dir.path().join("config.json");
        assert_eq!(resolve_with(file.to_str().unwrap(), PROJECTOR, &hub).unwrap().dir, file);
        let nothing = resolve_with("./no/such", MODEL, &hub).unwrap_err().report();
        assert!(nothing.contains("no folder or file ./no/such\n\nhint: give a path, or a repository"), "{nothing}");
    }
}
