//! Samples from files: LLaVA conversations (JSON or JSON lines) and preference pairs.

use super::file;
use super::forms::Form;
use super::raw::{Id, Paths, RawConversation, RawPreference, RawTurn, Unread};
use super::read::read;
use crate::bail;
use crate::error::{Context, Result};
use crate::spec::{Alpha, Data, Resize};
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
    pub system: Option<String>,
    pub prompt: String,
    pub chosen: String,
    pub rejected: String,
}

impl Preference {
    /// The pair as two conversations of one question and answer each: chosen, rejected.
    pub fn conversations(&self) -> (Conversation, Conversation) {
        let with = |answer: &str| Conversation {
            id: self.id.clone(),
            images: self.images.clone(),
            turns: (self.system.iter().map(|s| Turn { role: Role::System, text: s.clone() }))
                .chain([
                    Turn { role: Role::User, text: self.prompt.clone() },
                    Turn { role: Role::Assistant, text: answer.into() },
                ])
                .collect(),
            category: None,
            absent: vec![],
        };
        (with(&self.chosen), with(&self.rejected))
    }
}

/// Reads LLaVA conversations: `[{id?, image?, conversations: [{from, value}], system?, category?, absent?}]`, or one such object a
/// line; `messages` of `role` and `content` are the same.
///
/// A first turn of the assistant is dropped. A missing id becomes `path:index`.
///
/// # Errors
/// An unreadable file, a missing key, an unknown speaker, turns that do not alternate, images that do not match the
/// `<image>` marks, or a key with something to be learned that is not read; the error names file and sample.
pub fn conversations(data: &Data) -> Result<Vec<Conversation>> {
    let raw: Vec<RawConversation> = read(data, Form::Conversations)?;
    let convert = |(i, raw): (usize, RawConversation)| {
        let id = sample_id(&raw.id, data, i);
        let named = || format!("{}: sample {id}", data.path.display());
        all_read(&raw).with_context(named)?;
        let images = pictures(raw.image, raw.images, data).with_context(named)?;
        let turns = turns(raw.system, raw.conversations).and_then(|turns| {
            let texts = turns.iter().filter(|t| t.role == Role::User).map(|t| t.text.as_str());
            count_images(texts, images.len()).map(|()| turns)
        });
        let turns = turns.with_context(named)?;
        Ok(Conversation { id, images, turns, category: raw.category, absent: raw.absent.unwrap_or_default() })
    };
    raw.into_iter().enumerate().map(convert).collect()
}

/// Reads preference pairs: `{id?, image?, system?, prompt, chosen, rejected}`, as JSON array or one object a line.
///
/// # Errors
/// As [`conversations`].
pub fn preferences(data: &Data) -> Result<Vec<Preference>> {
    let raw: Vec<RawPreference> = read(data, Form::Pairs)?;
    let convert = |(i, raw): (usize, RawPreference)| {
        let id = sample_id(&raw.id, data, i);
        let named = || format!("{}: sample {id}", data.path.display());
        all_read(&raw).with_context(named)?;
        let images = pictures(raw.image, raw.images, data).with_context(named)?;
        count_images(std::iter::once(raw.prompt.as_str()), images.len()).with_context(named)?;
        let system = raw.system.filter(|s| !s.is_empty());
        Ok(Preference { id, images, system, prompt: raw.prompt, chosen: raw.chosen, rejected: raw.rejected })
    };
    raw.into_iter().enumerate().map(convert).collect()
}

fn sample_id(id: &Option<Id>, data: &Data, index: usize) -> String {
    id.as_ref().map_or_else(|| format!("{}:{index}", data.path.display()), |id| id.0.clone())
}

/// Nothing that a sample says is left out in silence.
fn all_read(sample: &impl Unread) -> Result<()> {
    match sample.unread() {
        None => Ok(()),
        Some((key, hint)) => bail!("`{key}` is not read"; "{hint}"),
    }
}

fn pictures(image: Paths, images: Paths, data: &Data) -> Result<Vec<Picture>> {
    let Some(paths) = image.or(images) else {
        bail!("`image` and `images` name different pictures"; "write all of them into one of the two")
    };
    let root = data.images.as_deref().or_else(|| data.path.parent()).unwrap_or(Path::new(""));
    let with = |path: String| {
        if path.starts_with("http://") || path.starts_with("https://") {
            bail!("the image {} is an address, not a file", file::short(&path, 100);
                "download the pictures first, and name the files")
        }
        if path.starts_with("data:") {
            bail!("the image {} is the picture itself, not a file", file::short(&path, 40);
                "write each picture to a file of its own, and name that")
        }
        Ok(Picture::new(root.join(path), data))
    };
    paths.0.into_iter().map(with).collect()
}

fn turns(system: Option<String>, raw: Vec<RawTurn>) -> Result<Vec<Turn>> {
    let mut out: Vec<Turn> = Vec::with_capacity(raw.len() + 1);
    out.extend(system.filter(|s| !s.is_empty()).map(|text| Turn { role: Role::System, text }));
    let (mut dropped, mut before): (bool, Option<String>) = (false, None);
    for (i, t) in raw.into_iter().enumerate() {
        let role = match t.from.as_str() {
            "human" | "user" => Role::User,
            "gpt" | "assistant" => Role::Assistant,
            "system" => Role::System,
            other => {
                bail!("turn {i} is from {:?}", file::short(other, 40); "speakers are \"human\", \"gpt\" and \"system\"")
            }
        };
        if role == Role::Assistant && !t.is_learned() {
            bail!("turn {i} is an answer that is not to be learned (its weight, train or loss says so)";
                "take the key out to learn every answer, or split the conversation before it")
        }
        let last = out.last().map(|t| t.role);
        match (role, last) {
            (Role::Assistant, None | Some(Role::System)) if !dropped => {
                (dropped, before) = (true, Some(t.from));
                continue;
            }
            (Role::System, Some(Role::System)) => {
                bail!("turn {i} is a system turn beside `system`"; "write the instruction once")
            }
            (Role::System, None) | (Role::User, None | Some(Role::System | Role::Assistant)) => {}
            (Role::Assistant, Some(Role::User)) => {}
            _ => {
                let after = before.map_or(String::new(), |b| format!(" after {b}"));
                bail!("turn {i} is out of order: {}{after}", t.from;
                    "a system turn may come first; then human and gpt take turns: join texts of one speaker that follow each other")
            }
        }
        before = Some(t.from);
        out.push(Turn { role, text: t.value });
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
