//! Samples from files: LLaVA conversations (JSON or JSON lines) and preference pairs.

use super::file::{self, shown};
use super::forms::{self, Form};
use super::raw::{Id, Paths, RawConversation, RawPreference, RawTurn, Unread};
use crate::bail;
use crate::error::{Context, Error, Result};
use crate::recipe::schema::{Alpha, Data, Resize};
use serde::de::{DeserializeOwned, Deserializer, IgnoredAny, SeqAccess, Visitor};
use std::io::{BufRead, BufReader, Read};
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
        let images = pictures(raw.image, data).with_context(named)?;
        let turns = turns(raw.system, raw.conversations).and_then(|turns| {
            let texts = turns.iter().filter(|t| t.role == Role::User).map(|t| t.text.as_str());
            count_images(texts, images.len()).map(|()| turns)
        });
        let turns = turns.with_context(named)?;
        Ok(Conversation { id, images, turns, category: raw.category, absent: raw.absent })
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
        let images = pictures(raw.image, data).with_context(named)?;
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

fn pictures(paths: Paths, data: &Data) -> Result<Vec<Picture>> {
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
        if role == Role::Assistant && !t.weight.0 {
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

/// Bytes of a JSON list, which is read as a whole, and of a line: far beyond what samples take, and what a machine can hold.
const LONGEST_LIST: u64 = 8 << 30;
const LONGEST_LINE: u64 = 64 << 20;

/// The first `limit` samples of a JSON array, or of a file with one object a line.
fn read<T: DeserializeOwned>(data: &Data, form: Form) -> Result<Vec<T>> {
    let path = shown(&data.path);
    let (file, metadata) =
        file::open(&data.path, "the data file", "check `path` of the data entry: it names a JSON or JSON lines file")?;
    let mut file = BufReader::with_capacity(1 << 16, file);
    let cannot = |e: std::io::Error| {
        Error::new(format!("cannot read the data file {path}: {e}")).hint("check `path` of the data entry")
    };
    let mut begin = file::head(&mut file).map_err(cannot)?;
    is_text(&begin, &path, form)?;
    const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";
    if begin.starts_with(BYTE_ORDER_MARK) {
        begin.drain(..BYTE_ORDER_MARK.len());
    }
    let limit = data.limit.unwrap_or(usize::MAX);
    let mut samples = if begin.trim_ascii_start().first() == Some(&b'[') {
        if metadata.len() > LONGEST_LIST {
            bail!("{path} has {} GiB, and a list is read as a whole", metadata.len() >> 30;
                "write it as JSON lines, one sample a line, or split it into several data entries")
        }
        let mut bytes = begin;
        bytes.reserve(metadata.len() as usize);
        file.read_to_end(&mut bytes).map_err(cannot)?;
        list(&bytes, &path, form)?
    } else {
        lines(begin.chain(file), limit, &path, form)?
    };
    samples.truncate(limit);
    if samples.is_empty() {
        bail!("{path} has no samples"; "check `path` and `limit` of the data entry");
    }
    Ok(samples)
}
/// Refuses what is no text in UTF-8 by its first bytes, and says what it is.
fn is_text(begin: &[u8], path: &str, form: Form) -> Result<()> {
    let wide = match begin {
        [0xff, 0xfe, 0, 0, ..] | [0, 0, 0xfe, 0xff, ..] => Some("UTF-32"),
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => Some("UTF-16"),
        // Without a mark: every other byte of English text is zero.
        [0, b'[' | b'{', ..] | [b'[' | b'{', 0, ..] => Some("UTF-16"),
        _ => None,
    };
    if let Some(encoding) = wide {
        bail!("{path} is text in {encoding}, and UTF-8 is read"; "write it in UTF-8: iconv -f {encoding} -t UTF-8 {path} > new.json")
    }
    let Some(name) = file::format(begin) else {
        if begin.contains(&0) {
            bail!("{path} is no text: it has zero bytes"; "{}", form.wanted())
        }
        return Ok(());
    };
    let hint = match name {
        n if n.ends_with("compressed") => {
            "unpack it first (gunzip, zstd -d, xz -d, bunzip2), and name the JSON file".into()
        }
        n if n.ends_with("archive") => {
            format!("unpack it first, pictures to files beside a JSON file; there {}", form.wanted())
        }
        n if n.ends_with("table")
            || n.ends_with("stream")
            || n.ends_with("database")
            || n.ends_with("array")
            || n.ends_with("pickle") =>
        {
            format!(
                "write its rows as JSON lines (pandas: to_json(\"new.jsonl\", orient=\"records\", lines=True)) and its pictures to files; {}",
                form.wanted()
            )
        }
        n if n.contains("HTML") => {
            "a download saved a web page, an error or a log-in, in the file's place: download it again".into()
        }
        n if n.contains("LFS") => "fetch what it points to: git lfs pull".into(),
        _ => form.wanted().to_string(),
    };
    Err(Error::new(format!("{path} is {name}, not JSON")).hint(hint))
}

/// A JSON array of samples.
fn list<T: DeserializeOwned>(bytes: &[u8], path: &str, form: Form) -> Result<Vec<T>> {
    parse::<Vec<T>>(bytes).map_err(|(cause, index)| {
        let sample = index.and_then(|i| nth(bytes, i));
        Error::new(format!("{path}: {cause}")).hint(form.hint(sample.as_ref()))
    })
}

/// Samples one a line, up to `limit`; empty lines do not count.
fn lines<T: DeserializeOwned>(mut text: impl BufRead, limit: usize, path: &str, form: Form) -> Result<Vec<T>> {
    let (mut samples, mut line, mut number) = (vec![], vec![], 0);
    while samples.len() < limit {
        line.clear();
        number += 1;
        let read = text.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line);
        let read = read.map_err(|e| {
            Error::new(format!("cannot read the data file {path}: {e}")).hint("check the disk, or copy the file again")
        })?;
        if read == 0 {
            break;
        }
        if read as u64 == LONGEST_LINE && line.last() != Some(&b'\n') {
            bail!("{path}, line {number} is longer than {} MiB", LONGEST_LINE >> 20; "a line holds one sample: {}", form.wanted())
        }
        if line.trim_ascii().is_empty() {
            continue;
        }
        match parse::<T>(&line) {
            Ok(sample) => samples.push(sample),
            Err((cause, _)) => {
                let cause = cause.replace(" at line 1 column ", ", column ");
                return Err(no_sample(&line, &cause, number, samples.is_empty(), text, path, form));
            }
        }
    }
    Ok(samples)
}

/// A line that is no sample: of another form, of a table or a list of captions, or of an object over several lines.
fn no_sample(
    line: &[u8],
    cause: &str,
    number: usize,
    is_first: bool,
    mut rest: impl BufRead,
    path: &str,
    form: Form,
) -> Error {
    let told = Error::new(format!("{path}, line {number}: {cause}"));
    if let Ok(sample) = serde_json::from_slice::<serde_json::Value>(line) {
        return told.hint(form.hint(Some(&sample)));
    }
    if line.trim_ascii().starts_with(b"{") {
        return told.hint(
            "each line holds one sample, a whole object {…}; objects over several lines stand in one list: [{…}, {…}]",
        );
    }
    let mut second = vec![];
    // Without one the list of captions has one line.
    let _ = rest.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut second);
    let text = [line, &second].map(|l| String::from_utf8_lossy(l).into_owned()).concat();
    match forms::of_lines(&text).filter(|_| is_first) {
        Some((name, row)) => Error::new(format!("{path} is {name}, not JSON")).hint(form.hint(Some(&row))),
        None => told.hint(form.wanted()),
    }
}

/// A value, or what is wrong and in which element of the list.
fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, (String, Option<usize>)> {
    use serde_path_to_error::Segment;
    let mut de = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut de).map_err(|e| {
        let index =
            e.path().iter().next().and_then(|s| if let Segment::Seq { index } = s { Some(*index) } else { None });
        (e.to_string(), index)
    })?;
    de.end().map_err(|e| (e.to_string(), None))?;
    Ok(value)
}

/// One element of a list.
fn nth(bytes: &[u8], index: usize) -> Option<serde_json::Value> {
    struct Nth(usize);
    impl<'de> Visitor<'de> for Nth {
        type Value = Option<serde_json::Value>;

        fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
            f.write_str("a list")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
            for _ in 0..self.0 {
                list.next_element::<IgnoredAny>()?;
            }
            let found = list.next_element()?;
            while list.next_element::<IgnoredAny>()?.is_some() {}
            Ok(found)
        }
    }
    serde_json::Deserializer::from_slice(bytes).deserialize_seq(Nth(index)).ok().flatten()
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
