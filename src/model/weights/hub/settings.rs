//! Settings from the variables that all tools of the Hugging Face hub share (huggingface_hub's `constants.py`).

use crate::error::{Context, Error, Result};
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

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
    /// For how long a question (which commit, how many bytes) may stay without an answer.
    pub etag_timeout: Duration,
    /// For how long a download may stay without a byte.
    pub download_timeout: Duration,
    /// The pause before the first new attempt; each further one is twice as long, up to eight times this.
    pub pause: Duration,
}

impl std::fmt::Debug for Hub {
    /// Never prints the token.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let token = if self.token.is_some() { "with" } else { "without" };
        write!(f, "Hub({} in {}, {token} token, offline: {})", self.endpoint, self.cache.display(), self.offline)
    }
}

impl Hub {
    /// From the environment. Where files are: HF_HUB_CACHE (older: HUGGINGFACE_HUB_CACHE), HF_HOME, XDG_CACHE_HOME. Who
    /// asks: HF_TOKEN (older: HUGGING_FACE_HUB_TOKEN), or the file of `hf auth login` (HF_TOKEN_PATH), unless
    /// HF_HUB_DISABLE_IMPLICIT_TOKEN. How: HF_ENDPOINT, HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE, HF_HUB_ETAG_TIMEOUT and
    /// HF_HUB_DOWNLOAD_TIMEOUT in seconds.
    pub fn from_env() -> Result<Self> {
        Self::from_vars(|name| std::env::var(name).ok())
    }

    /// As [`Hub::from_env`], with the variables given by a function.
    pub fn from_vars(var: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let var = |name: &str| var(name).filter(|v| !v.is_empty());
        let path = |text: String| expand(&text, var);
        let user_cache = || var("XDG_CACHE_HOME").map(path).or_else(|| Some(std::env::home_dir()?.join(".cache")));
        let home = var("HF_HOME").map(path).or_else(|| Some(user_cache()?.join("huggingface")));
        let home = home.ok_or_else(|| Error::new("this user has no home folder").hint("set HF_HOME"))?;
        let cache = var("HF_HUB_CACHE").or_else(|| var("HUGGINGFACE_HUB_CACHE"));
        let cache = cache.map_or_else(|| home.join("hub"), path);
        let on =
            |name: &str| var(name).is_some_and(|v| ["1", "on", "yes", "true"].contains(&v.to_lowercase().as_str()));
        // As for huggingface_hub, an explicit HF_HUB_OFFLINE=0 outweighs the older name.
        let offline = if var("HF_HUB_OFFLINE").is_some() { "HF_HUB_OFFLINE" } else { "TRANSFORMERS_OFFLINE" };
        let token_file = var("HF_TOKEN_PATH").map_or_else(|| home.join("token"), path);
        let token = var("HF_TOKEN")
            .or_else(|| var("HUGGING_FACE_HUB_TOKEN"))
            .or_else(|| fs::read_to_string(token_file).ok())
            .map(|t| t.trim().to_string())
            .filter(|t| !t.is_empty() && !on("HF_HUB_DISABLE_IMPLICIT_TOKEN"));
        if token.as_ref().is_some_and(|t| !t.bytes().all(|b| b.is_ascii_graphic())) {
            return Err(Error::new("the token of the hub has blanks or other signs that no token has")
                .hint("look at HF_TOKEN, or at the file of `hf auth login`"));
        }
        let endpoint = var("HF_ENDPOINT").unwrap_or("https://huggingface.co".into());
        if !["http://", "https://"].iter().any(|scheme| endpoint.starts_with(scheme)) {
            return Err(Error::new(format!("HF_ENDPOINT = {endpoint} is not the address of a hub"))
                .hint("it begins with https:// (or http://), as https://huggingface.co does"));
        }
        let seconds = |name: &str| match var(name) {
            None => Ok(10.0),
            Some(v) => match v.trim().parse::<f64>() {
                // huggingface_hub reads 0 as its default, too.
                Ok(0.0) => Ok(10.0),
                Ok(s) if s > 0.0 && s <= 1e6 => Ok(s),
                _ => Err(Error::new(format!("{name} = {v} is not a time")).hint("give it in seconds, as 10")),
            },
        };
        Ok(Self {
            cache: std::path::absolute(&cache).with_context(|| cache.display().to_string())?,
            endpoint: endpoint.trim_end_matches('/').into(),
            token,
            offline: on(offline),
            etag_timeout: Duration::from_secs_f64(seconds("HF_HUB_ETAG_TIMEOUT")?),
            download_timeout: Duration::from_secs_f64(seconds("HF_HUB_DOWNLOAD_TIMEOUT")?),
            pause: Duration::from_secs(1),
        })
    }

    /// Of a model's repository in the cache.
    pub(super) fn folder(&self, repo: &str) -> PathBuf {
        self.cache.join(folder_name(repo))
    }

    /// The file whose lock says that a blob is being downloaded; huggingface_hub locks the same one.
    pub(super) fn lock(&self, repo: &str, etag: &str) -> PathBuf {
        self.cache.join(".locks").join(folder_name(repo)).join(format!("{etag}.lock"))
    }
}

fn folder_name(repo: &str) -> String {
    format!("models--{}", repo.replace('/', "--"))
}

/// `~` and `$NAME` or `${NAME}` in a path; a name that is not set stays as it is written.
fn expand(text: &str, var: impl Fn(&str) -> Option<String>) -> PathBuf {
    let mut path = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        path.push_str(before);
        let braced = after.strip_prefix('{').and_then(|a| a.split_once('}'));
        let end = after.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(after.len());
        let (name, next) = braced.unwrap_or_else(|| after.split_at(end));
        match var(name) {
            Some(value) => path.push_str(&value),
            None => path.push_str(&rest[before.len()..rest.len() - next.len()]),
        }
        rest = next;
    }
    path.push_str(rest);
    let below = path.strip_prefix('~').filter(|p| p.is_empty() || p.starts_with('/'));
    match (below, var("HOME").map(PathBuf::from).or_else(std::env::home_dir)) {
        (Some(below), Some(home)) => home.join(below.trim_start_matches('/')),
        _ => path.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(vars: &[(&str, &str)]) -> Result<Hub> {
        Hub::from_vars(|n| vars.iter().find(|(k, _)| *k == n).map(|(_, v)| v.to_string()))
    }

    #[test]
    fn the_variables_of_the_ecosystem_are_honoured() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().to_str().unwrap();
        fs::write(dir.path().join("token"), "from_file\n").unwrap();
        let plain = hub(&[("HF_HOME", home), ("HF_TOKEN", "")]).unwrap();
        assert_eq!((plain.cache, plain.token.as_deref()), (dir.path().join("hub"), Some("from_file")));
        assert_eq!((plain.endpoint.as_str(), plain.offline), ("https://huggingface.co", false));
        assert_eq!((plain.etag_timeout.as_secs(), plain.download_timeout.as_secs()), (10, 10));
        let set = [("HF_HOME", home), ("HF_HUB_CACHE", "/c"), ("HF_TOKEN", "t"), ("HF_HUB_OFFLINE", "TRUE")];
        let set = hub(&set).unwrap();
        assert_eq!((set.cache, set.token.as_deref(), set.offline), (PathBuf::from("/c"), Some("t"), true));
        assert_eq!(hub(&[("XDG_CACHE_HOME", "/x")]).unwrap().cache, PathBuf::from("/x/huggingface/hub"));
    }

    #[test]
    fn older_names_and_what_outweighs_them() {
        let old =
            hub(&[("HUGGINGFACE_HUB_CACHE", "/old"), ("HUGGING_FACE_HUB_TOKEN", "o"), ("TRANSFORMERS_OFFLINE", "1")]);
        let old = old.unwrap();
        assert_eq!((old.cache, old.token.as_deref(), old.offline), (PathBuf::from("/old"), Some("o"), true));
        let both = hub(&[
            ("HF_HUB_OFFLINE", "0"),
            ("TRANSFORMERS_OFFLINE", "1"),
            ("HF_HUB_CACHE", "/n"),
            ("HUGGINGFACE_HUB_CACHE", "/o"),
        ]);
        let both = both.unwrap();
        assert_eq!((both.offline, both.cache), (false, PathBuf::from("/n")));
        let none = hub(&[("HF_TOKEN", "t"), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]).unwrap();
        assert_eq!(none.token, None);
        let times = hub(&[("HF_HUB_ETAG_TIMEOUT", "3"), ("HF_HUB_DOWNLOAD_TIMEOUT", "0")]).unwrap();
        assert_eq!((times.etag_timeout.as_secs(), times.download_timeout.as_secs()), (3, 10));
    }

    #[test]
    fn paths_are_expanded_as_a_shell_would() {
        let vars = [("HOME", "/home/me"), ("SCRATCH", "/scratch"), ("ME", "me")];
        let at = |text: &str| expand(text, |n| vars.iter().find(|(k, _)| *k == n).map(|(_, v)| v.to_string()));
        let same = |text: &str, path: &str| assert_eq!(at(text), PathBuf::from(path), "{text}");
        same("~/hf", "/home/me/hf");
        same("~", "/home/me");
        same("a~/b", "a~/b");
        same("~other/b", "~other/b");
        same("$SCRATCH/${ME}s/$NONE/${NONE}/$/x", "/scratch/mes/$NONE/${NONE}/$/x");
        let home = [("HOME", "/home/me"), ("HF_HOME", "~/hf")];
        assert_eq!(hub(&home).unwrap().cache, PathBuf::from("/home/me/hf/hub"));
    }

    #[test]
    fn values_that_make_no_sense_are_told() {
        for (name, value) in
            [("HF_HUB_DOWNLOAD_TIMEOUT", "soon"), ("HF_HUB_ETAG_TIMEOUT", "-1"), ("HF_ENDPOINT", "hub.local")]
        {
            let report = hub(&[(name, value)]).unwrap_err().report();
            assert!(report.contains(name) && report.contains(value) && report.contains("hint: "), "{report}");
        }
        assert!(!hub(&[("HF_TOKEN", "hf_a b")]).unwrap_err().report().contains("hf_a"));
    }
}
