//! Samples from files: LLaVA conversations (JSON or JSON lines) and preference pairs.

use crate::bail;
use crate::error::{Context, Error, Result};
use crate::recipe::schema::{Alpha, Data, Resize};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How data files write the place of a picture, whatever the model's own image token is.
pub const IMAGE_PLACEHOLDER: &str = "<image>";

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    System,
    User,
    Assistant,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    pub role: Role,
    pub text: String,
}

/// A picture as the data name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    pub path: PathBuf,
    pub resize: Resize,
    pub alpha: Alpha,
    /// Heights and widths that tiles may fill; `None`: LLaVA-1.6's.
    pub grid_pinpoints: Option<Arc<[[usize; 2]]>>,
}

impl Picture {
    /// A file, prepared as a data entry says.
    pub fn new(path: PathBuf, how: &Data) -> Self {
        let grid_pinpoints = how.grid_pinpoints.as_deref().map(Arc::from);
        Self { path, resize: how.resize, alpha: how.alpha, grid_pinpoints }
    }
}

/// A conversation: an optional system turn, then user and assistant in turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conversation {
    pub id: String,
    /// In the order of the `<image>` marks of the user's turns, as many as there are marks.
    pub images: Vec<Picture>,
    pub turns: Vec<Turn>,
    /// Evaluation figures are also given by category.
    pub category: Option<String>,
    /// Phrases that a truthful answer does not contain.
    pub absent: Vec<String>,
}

/// Two answers to one prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Preference {
    pub id: String,
    pub images: Vec<Picture>,
    pub prompt: String,
    pub chosen: String,
    pub rejected: String,
}

impl Preference {
    /// The pair as two conversations of one turn each: chosen, rejected.
    pub fn conversations(&self) -> (Conversation, Conversation) {
        let with = |answer: &str| Conversation {
            id: self.id.clone(),
            images: self.images.clone(),
            turns: vec![
                Turn { role: Role::User, text: self.prompt.clone() },
                Turn { role: Role::Assistant, text: answer.into() },
            ],
            category: None,
            absent: vec![],
        };
        (with(&self.chosen), with(&self.rejected))
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Id {
    Text(String),
    Number(serde_json::Number),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(PathBuf),
    Many(Vec<PathBuf>),
}

impl OneOrMany {
    fn list(v: Option<Self>) -> Vec<PathBuf> {
        match v {
            None => vec![],
            Some(Self::One(p)) => vec![p],
            Some(Self::Many(p)) => p,
        }
    }
}

#[derive(Deserialize)]
struct RawTurn {
    from: String,
    value: String,
}

/// Other keys (`model`, `source`, …) are allowed: published files are full of them.
#[derive(Deserialize)]
struct RawConversation {
    id: Option<Id>,
    #[serde(alias = "images")]
    image: Option<OneOrMany>,
    conversations: Vec<RawTurn>,
    category: Option<String>,
    #[serde(default)]
    absent: Vec<String>,
}

#[derive(Deserialize)]
struct RawPreference {
    id: Option<Id>,
    #[serde(alias = "images")]
    image: Option<OneOrMany>,
    prompt: String,
    chosen: String,
    rejected: String,
}

/// Reads LLaVA conversations: `[{id?, image?, conversations: [{from, value}], category?, absent?}]`, or one such object a line.
///
/// A first turn of the assistant is dropped. A missing id becomes `path:index`.
///
/// # Errors
/// An unreadable file, a missing key, an unknown speaker, turns that do not alternate, or images that do not match the
/// `<image>` marks; the error names file and sample.
pub fn conversations(data: &Data) -> Result<Vec<Conversation>> {
    let hint =
        "a sample looks like {\"id\": …, \"image\": …, \"conversations\": [{\"from\": \"human\", \"value\": …}, …]}";
    let raw: Vec<RawConversation> = read(data, hint)?;
    let convert = |(i, raw): (usize, RawConversation)| {
        let id = sample_id(raw.id, data, i);
        let images = pictures(raw.image, data);
        let turns = turns(raw.conversations).and_then(|turns| {
            let texts = turns.iter().filter(|t| t.role == Role::User).map(|t| t.text.as_str());
            count_images(texts, images.len()).map(|()| turns)
        });
        let turns = turns.with_context(|| format!("{}: sample {id}", data.path.display()))?;
        Ok(Conversation { id, images, turns, category: raw.category, absent: raw.absent })
    };
    raw.into_iter().enumerate().map(convert).collect()
}

/// Reads preference pairs: `{id?, image?, prompt, chosen, rejected}`, as JSON array or one object a line.
///
/// # Errors
/// As [`conversations`].
pub fn preferences(data: &Data) -> Result<Vec<Preference>> {
    let hint = "a pair looks like {\"id\": …, \"image\": …, \"prompt\": …, \"chosen\": …, \"rejected\": …}, the answers as text";
    let raw: Vec<RawPreference> = read(data, hint)?;
    let convert = |(i, raw): (usize, RawPreference)| {
        let id = sample_id(raw.id, data, i);
        let images = pictures(raw.image, data);
        count_images(std::iter::once(raw.prompt.as_str()), images.len())
            .with_context(|| format!("{}: sample {id}", data.path.display()))?;
        Ok(Preference { id, images, prompt: raw.prompt, chosen: raw.chosen, rejected: raw.rejected })
    };
    raw.into_iter().enumerate().map(convert).collect()
}

fn sample_id(id: Option<Id>, data: &Data, index: usize) -> String {
    match id {
        Some(Id::Text(s)) => s,
        Some(Id::Number(n)) => n.to_string(),
        None => format!("{}:{index}", data.path.display()),
    }
}

fn pictures(paths: Option<OneOrMany>, data: &Data) -> Vec<Picture> {
    let root = data.images.as_deref().or_else(|| data.path.parent()).unwrap_or(Path::new(""));
    let with = |p: PathBuf| Picture::new(root.join(p), data);
    OneOrMany::list(paths).into_iter().map(with).collect()
}

fn turns(raw: Vec<RawTurn>) -> Result<Vec<Turn>> {
    let mut out: Vec<Turn> = Vec::with_capacity(raw.len());
    let (mut dropped, mut before) = (false, String::new());
    for (i, t) in raw.into_iter().enumerate() {
        let role = match t.from.as_str() {
            "human" | "user" => Role::User,
            "gpt" | "assistant" => Role::Assistant,
            "system" => Role::System,
            other => bail!("turn {i} is from {other:?}"; "speakers are \"human\", \"gpt\" and \"system\""),
        };
        let last = out.last().map(|t| t.role);
        match (role, last) {
            (Role::Assistant, None | Some(Role::System)) if !dropped => {
                (dropped, before) = (true, t.from);
                continue;
            }
            (Role::System, None) | (Role::User, None | Some(Role::System | Role::Assistant)) => {}
            (Role::Assistant, Some(Role::User)) => {}
            _ => bail!("turn {i} is out of order: {} after {before}", t.from;
                "a system turn may come first; then human and gpt take turns"),
        }
        out.push(Turn { role, text: t.value });
        before = t.from;
    }
    Ok(out)
}

fn count_images<'a>(user_texts: impl Iterator<Item = &'a str>, images: usize) -> Result<()> {
    let marks: usize = user_texts.map(|t| t.matches(IMAGE_PLACEHOLDER).count()).sum();
    if marks != images {
        bail!("{images} image(s), but {marks} {IMAGE_PLACEHOLDER} mark(s) in the human text";
            "write one {IMAGE_PLACEHOLDER} for each image, where the human shows it");
    }
    Ok(())
}

/// The first `limit` samples of a JSON array, or of a file with one object a line.
fn read<T: DeserializeOwned>(data: &Data, hint: &str) -> Result<Vec<T>> {
    let path = data.path.display();
    let bytes = std::fs::read(&data.path).map_err(|e| {
        Error::new(format!("cannot read the data file {path}: {e}")).hint("check `path` of the data entry")
    })?;
    let limit = data.limit.unwrap_or(usize::MAX);
    let is_array = bytes.iter().find(|b| !b.is_ascii_whitespace()) == Some(&b'[');
    let mut samples = if is_array {
        parse::<Vec<T>>(&bytes).map_err(|e| Error::new(format!("{path}: {e}")).hint(hint))?
    } else {
        let lines = bytes.split(|&b| b == b'\n').enumerate();
        let filled = lines.filter(|(_, line)| !line.trim_ascii().is_empty()).take(limit);
        let one = |(i, line): (usize, &[u8])| {
            parse::<T>(line).map_err(|e| Error::new(format!("{path}, line {}: {e}", i + 1)).hint(hint))
        };
        filled.map(one).collect::<Result<Vec<T>>>()?
    };
    samples.truncate(limit);
    if samples.is_empty() {
        bail!("{path} has no samples"; "check `path` and `limit` of the data entry");
    }
    Ok(samples)
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    let mut de = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut de).map_err(|e| e.to_string())?;
    de.end().map_err(|e| e.to_string())?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, text: &str) -> (tempfile::TempDir, Data) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        let data = Data { resize: Resize::Pad, ..Data::new(path) };
        (dir, data)
    }

    #[test]
    fn reads_json_and_json_lines_alike() {
        let one = r#"{"id": 7, "image": "a.png", "extra": 1, "conversations":
            [{"from": "gpt", "value": "dropped"}, {"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]}"#;
        let two = r#"{"image": null, "category": "c", "absent": ["x"], "conversations":
            [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}"#;
        let (dir, json) = entry("d.json", &format!("\n [{one},\n{two}]"));
        let (_keep, lines) = entry("d.jsonl", &format!("{}\n\n{}\n", one.replace('\n', ""), two.replace('\n', "")));
        let a = conversations(&json).unwrap();
        let b = conversations(&lines).unwrap();
        assert_eq!(a.len(), 2);
        assert_eq!(a[0].id, "7");
        assert_eq!(a[0].turns.len(), 2);
        assert_eq!(a[0].turns, b[0].turns);
        let picture =
            Picture { path: dir.path().join("a.png"), resize: Resize::Pad, alpha: Alpha::Drop, grid_pinpoints: None };
        assert_eq!(a[0].images, [picture]);
        assert_eq!(a[1].id, format!("{}:1", json.path.display()));
        assert_eq!((a[1].category.as_deref(), &a[1].absent[..]), (Some("c"), &["x".to_string()][..]));
        let limited = conversations(&Data { limit: Some(1), ..lines }).unwrap();
        assert_eq!(limited.len(), 1);
    }

    #[track_caller]
    fn fails(text: &str, parts: &[&str]) {
        let (_dir, data) = entry("d.json", text);
        let e = conversations(&data).unwrap_err();
        for part in parts {
            assert!(e.cause().contains(part), "{e}");
        }
        assert!(e.hint_text().is_some(), "{e}");
    }

    #[test]
    fn names_what_is_wrong() {
        fails("[]", &["no samples"]);
        fails("{", &["line 1", "d.json"]);
        fails(r#"[{"id": "s"}]"#, &["[0]", "conversations"]);
        let talk = |turns: &str| format!(r#"[{{"id": "s", "image": "a.png", "conversations": [{turns}]}}]"#);
        fails(&talk(r#"{"from": "human", "value": "q"}"#), &["sample s", "1 image(s), but 0"]);
        fails(&talk(r#"{"from": "dog", "value": "q"}"#), &["sample s", "dog"]);
        fails(&talk(r#"{"from": "human", "value": "<image>"}, {"from": "human", "value": "q"}"#), &["turn 1"]);
    }

    #[test]
    fn reads_preferences() {
        let (_dir, data) =
            entry("d.jsonl", "{\"id\": \"p\", \"prompt\": \"q\", \"chosen\": \"a\", \"rejected\": \"b\"}\n");
        let pairs = preferences(&data).unwrap();
        let (chosen, rejected) = pairs[0].conversations();
        assert_eq!((chosen.turns[1].text.as_str(), rejected.turns[1].text.as_str()), ("a", "b"));
        let (_dir, data) = entry("d.jsonl", "{\"id\": \"p\", \"prompt\": \"q\", \"chosen\": \"a\"}\n");
        let e = preferences(&data).unwrap_err();
        assert!(e.cause().contains("line 1") && e.cause().contains("rejected"), "{e}");
    }
}
