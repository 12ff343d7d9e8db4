//! Samples in other forms than ours: told as the user's own sample in the form that is wanted.

use super::file::short;
use super::source::IMAGE_PLACEHOLDER;
use serde_json::{Map, Value, json};

/// What a file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Conversations,
    Pairs,
}

impl Form {
    /// How a sample looks.
    pub(super) fn wanted(self) -> &'static str {
        match self {
            Self::Conversations => {
                "a sample looks like {\"id\": …, \"image\": …, \"conversations\": [{\"from\": \"human\", \"value\": …}, …]}"
            }
            Self::Pairs => {
                "a pair looks like {\"id\": …, \"image\": …, \"prompt\": …, \"chosen\": …, \"rejected\": …}, the answers as text"
            }
        }
    }

    /// What to do about a sample that is not read: its own content in the form that is wanted, if it can be made out.
    pub(super) fn hint(self, sample: Option<&Value>) -> String {
        let has = |key: &str| sample.is_some_and(|s| s.get(key).is_some());
        let pair = has("chosen") && has("rejected");
        match sample.and_then(|s| self.rewritten(s)) {
            None if self == Self::Conversations && pair => "pairs are data of a stage with the objective dpo".into(),
            None if self == Self::Pairs && !pair && TALKS.iter().any(|k| has(k)) => {
                "this stage's objective, dpo, takes pairs: {\"prompt\": …, \"chosen\": …, \"rejected\": …}; conversations are data of other stages".into()
            }
            Some(example) => format!("write each sample like this: {example}"),
            None => self.wanted().to_string(),
        }
    }

    /// A sample with the same content in our form, its texts cut short; `None` if it has it already or is not understood.
    fn rewritten(self, sample: &Value) -> Option<Value> {
        let sample = sample.as_object()?;
        let inner = sample.get("text").and_then(Value::as_str).and_then(|t| serde_json::from_str::<Value>(t).ok());
        let said = inner.as_ref().and_then(Value::as_object).unwrap_or(sample);
        let mut images = first(sample, PICTURES).map(paths).unwrap_or_default();
        let mut out = Map::new();
        let body = match self {
            Self::Conversations => talk(said, &mut images).map(|turns| vec![("conversations", turns)]),
            Self::Pairs => pair(said, &mut images),
        }?;
        out.extend(sample.get("id").filter(|id| id.is_string() || id.is_number()).map(|id| ("id".into(), id.clone())));
        match &images[..] {
            [] => {}
            [one] => drop(out.insert("image".into(), json!(short(one, 80)))),
            some => drop(out.insert("image".into(), json!(some.iter().map(|p| short(p, 80)).collect::<Vec<_>>()))),
        }
        out.extend(body.into_iter().map(|(key, value)| (key.to_string(), value)));
        Some(Value::Object(out)).filter(|out| Some(out) != Some(&Value::Object(sample.clone())))
    }
}

const PICTURES: &[&str] = &[
    "image",
    "images",
    "image_path",
    "img_path",
    "image_file",
    "file_name",
    "filename",
    "img",
    "file",
    "path",
    "picture",
    "photo",
    "image_url",
    "url",
    "image_id",
];
const TALKS: &[&str] = &["conversations", "messages", "conversation", "texts", "chat", "dialogue"];
const QUESTIONS: &[&str] = &["question", "query", "prompt", "instruction", "problem", "human", "user"];
const ANSWERS: &[&str] = &[
    "answer",
    "response",
    "completion",
    "output",
    "caption",
    "captions",
    "description",
    "answers",
    "solution",
    "gpt",
    "assistant",
    "text",
    "label",
    "sentence",
];

/// Cut off here in an example.
const SHOWN: usize = 60;

/// The first of some keys with something in it.
fn first<'a>(of: &'a Map<String, Value>, keys: &[&str]) -> Option<&'a Value> {
    let empty = |v: &Value| v.is_null() || v.as_str() == Some("") || v.as_array().is_some_and(Vec::is_empty);
    keys.iter().find_map(|k| of.get(*k).filter(|v| !empty(v)))
}

/// Paths in a path, an object around one, or a list of such.
fn paths(v: &Value) -> Vec<String> {
    match v {
        Value::String(s) => vec![s.clone()],
        Value::Number(n) => vec![n.to_string()],
        Value::Array(all) => all.iter().flat_map(paths).collect(),
        Value::Object(o) => {
            ["path", "url", "image", "file_name"].iter().find_map(|k| o.get(*k)).map(paths).unwrap_or_default()
        }
        _ => vec![],
    }
}

/// A text, or the texts and picture marks of a list of parts.
fn text(v: &Value, images: &mut Vec<String>) -> Option<String> {
    match v {
        Value::String(s) => Some(s.clone()),
        Value::Number(n) => Some(n.to_string()),
        Value::Array(parts) => {
            let one = |p: &Value| text(p, images);
            parts.iter().map(one).collect::<Option<Vec<_>>>().map(|p| p.concat())
        }
        Value::Object(part) => match part.get("type").and_then(Value::as_str) {
            Some("image" | "image_url" | "input_image") => {
                images.extend(first(part, &["image", "image_url", "path", "url"]).map(paths).unwrap_or_default());
                Some(format!("{IMAGE_PLACEHOLDER}\n"))
            }
            _ => text(first(part, &["text", "content", "value"])?, images),
        },
        _ => None,
    }
}

/// Puts marks for the pictures that have none before a text.
fn marked(text: &str, images: &[String], marks: &mut usize) -> String {
    *marks += text.matches(IMAGE_PLACEHOLDER).count();
    let missing = images.len().saturating_sub(*marks);
    *marks += missing;
    let text = short(text, SHOWN);
    match (missing, text.as_str()) {
        (0, _) => text,
        (n, "") => vec![IMAGE_PLACEHOLDER; n].join("\n"),
        (n, _) => format!("{}\n{text}", vec![IMAGE_PLACEHOLDER; n].join("\n")),
    }
}

/// Question and answer, or turns, of a sample in any of the usual forms.
fn said(sample: &Map<String, Value>, images: &mut Vec<String>) -> Option<Vec<(&'static str, String)>> {
    let role = |name: &str| match name {
        "human" | "user" | "question" => Some("human"),
        "gpt" | "assistant" | "model" | "answer" | "bot" => Some("gpt"),
        "system" => Some("system"),
        _ => None,
    };
    let mut turns = vec![];
    if let Some(list) = first(sample, TALKS).and_then(Value::as_array) {
        for turn in list {
            let turn = turn.as_object()?;
            match first(turn, &["from", "role"]).and_then(Value::as_str) {
                Some(name) => turns.push((role(name)?, text(first(turn, &["value", "content", "text"])?, images)?)),
                None => {
                    for (name, value) in turn {
                        if let (Some(role), Some(value)) = (role(name), value.as_str()) {
                            turns.push((role, value.to_string()));
                        }
                    }
                }
            }
        }
        return Some(turns).filter(|t| !t.is_empty());
    }
    let answer = match first(sample, ANSWERS)? {
        Value::Array(several) => text(several.first()?, images)?,
        one => text(one, images)?,
    };
    let mut question = first(sample, QUESTIONS).map_or(Some(String::new()), |q| text(q, images))?;
    if let Some(more) = first(sample, &["input"]).and_then(Value::as_str) {
        question = [question.as_str(), more].join("\n").trim().to_string();
    }
    if question.is_empty() && images.is_empty() {
        return None;
    }
    Some(vec![("human", question), ("gpt", answer)])
}

fn talk(sample: &Map<String, Value>, images: &mut Vec<String>) -> Option<Value> {
    let mut turns = said(sample, images)?;
    if let Some(system) = first(sample, &["system"]).and_then(Value::as_str).filter(|_| turns[0].0 != "system") {
        turns.insert(0, ("system", system.to_string()));
    }
    // All marks that there are count before one is added.
    let mut marks = turns.iter().map(|(_, t)| t.matches(IMAGE_PLACEHOLDER).count()).sum();
    let turn = |(from, value): (&str, String)| {
        let value = if from == "human" { with_marks(&value, images, &mut marks) } else { short(&value, SHOWN) };
        json!({ "from": from, "value": value })
    };
    Some(turns.into_iter().map(turn).collect())
}

/// As [`marked`], of a text whose own marks are counted already.
fn with_marks(text: &str, images: &[String], marks: &mut usize) -> String {
    *marks -= text.matches(IMAGE_PLACEHOLDER).count();
    marked(text, images, marks)
}

fn pair(sample: &Map<String, Value>, images: &mut Vec<String>) -> Option<Vec<(&'static str, Value)>> {
    let mut answer = |key: &str| -> Option<(Option<String>, String)> {
        match sample.get(key)? {
            Value::Array(turns) => {
                let last = turns.last()?.as_object()?;
                let asked = turns.iter().rev().nth(1).and_then(Value::as_object);
                let asked = asked.and_then(|t| text(first(t, &["content", "value"])?, images));
                Some((asked, text(first(last, &["content", "value"])?, images)?))
            }
            other => Some((None, text(other, images)?)),
        }
    };
    let ((asked, chosen), (_, rejected)) = (answer("chosen")?, answer("rejected")?);
    let last = |v: &Value| v.as_array().and_then(|t| t.last()).cloned();
    let prompt = match first(sample, QUESTIONS).or_else(|| first(sample, TALKS)) {
        Some(list) if list.is_array() => text(first(last(list)?.as_object()?, &["content", "value"])?, images)?,
        Some(one) => text(one, images)?,
        None => asked?,
    };
    let prompt = marked(&prompt, images, &mut 0);
    let text = |t: &str| json!(short(t, SHOWN));
    Some(vec![("prompt", json!(prompt)), ("chosen", text(&chosen)), ("rejected", text(&rejected))])
}

/// The first sample of a table or of a list of captions: columns with a first line of names (CSV, TSV), or a picture's name and
/// what is said of it, a line each. `None` if the text is neither.
pub(super) fn of_lines(text: &str) -> Option<(&'static str, Value)> {
    let mut lines = text.lines().filter(|l| !l.trim().is_empty());
    let (head, second) = (lines.next()?, lines.next());
    let separator = ['\t', ',', ';', '|'].into_iter().find(|s| head.contains(*s));
    let cells = |line: &str| separator.map_or_else(|| vec![line.trim().to_string()], |s| cells(line, s));
    let names = cells(head);
    let known = |name: &String| {
        let name = name.to_lowercase();
        [PICTURES, QUESTIONS, ANSWERS, &["chosen", "rejected", "id"]].iter().any(|k| k.contains(&name.as_str()))
    };
    if names.len() > 1
        && names.iter().any(known)
        && let Some(second) = second
    {
        let row = names.iter().map(|n| n.to_lowercase()).zip(cells(second).into_iter().map(Value::String));
        return Some((
            if separator == Some('\t') { "a table (TSV)" } else { "a table (CSV)" },
            Value::Object(row.collect()),
        ));
    }
    let endings = [".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"];
    let lower = head.to_ascii_lowercase();
    let end = endings.iter().filter_map(|e| lower.find(e).map(|at| at + e.len())).min()?;
    // COCO's and Flickr's number of the caption: `a.jpg#0`.
    let caption = head[end..].trim_start_matches(|c: char| c == '#' || c.is_ascii_digit());
    let caption = caption.trim_matches(|c: char| c.is_whitespace() || "\",;:|".contains(c));
    let picture = head[..end].trim_matches(|c: char| c.is_whitespace() || c == '"');
    let caption = if caption.is_empty() { "…" } else { caption };
    Some(("a list of captions", json!({ "image": picture, "caption": caption })))
}

/// The cells of a line of a table; a cell in quotes may hold the separator, and two quotes for one.
fn cells(line: &str, separator: char) -> Vec<String> {
    let mut out = vec![String::new()];
    let mut quoted = false;
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        let last = out.len() - 1;
        match c {
            '"' if quoted && chars.peek() == Some(&'"') => out[last].extend(chars.next()),
            '"' => quoted = !quoted,
            c if c == separator && !quoted => out.push(String::new()),
            c => out[last].push(c),
        }
    }
    out.into_iter().map(|c| c.trim().to_string()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hint(form: Form, sample: Value) -> String {
        form.hint(Some(&sample)).trim_start_matches("write each sample like this: ").to_string()
    }

    #[test]
    fn every_usual_form_of_a_question_is_shown_in_ours() {
        let want = r#"{"image":"a.png","conversations":[{"from":"human","value":"<image>\nWhat?"},{"from":"gpt","value":"A cat."}]}"#;
        let url = json!({ "url": "a.png" });
        for sample in [
            json!({ "query": "<image>\nWhat?", "response": "A cat.", "images": ["a.png"] }),
            json!({ "image": { "bytes": "xxxx", "path": "a.png" }, "question": "What?", "answer": "A cat." }),
            json!({ "image_path": "a.png", "instruction": "What?", "input": "", "output": "A cat." }),
            json!({ "images": ["a.png"], "texts": [{ "user": "What?", "assistant": "A cat.", "source": "x" }] }),
            json!({ "messages": [{ "role": "user", "content": [{ "type": "image", "image": "a.png" }, { "type": "text", "text": "What?" }] },
                { "role": "assistant", "content": [{ "type": "text", "text": "A cat." }] }] }),
            json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url", "image_url": url }, { "type": "text", "text": "What?" }] },
                { "role": "assistant", "content": "A cat." }] }),
            json!({ "images": ["a.png"], "messages": [{ "role": "user", "content": [{ "type": "image" }, { "type": "text", "text": "What?" }] },
                { "role": "assistant", "content": "A cat." }] }),
        ] {
            assert_eq!(hint(Form::Conversations, sample.clone()), want, "{sample}");
        }
        let caption = json!({ "id": 3, "file_name": "a.png", "caption": "A cat." });
        let want = r#"{"id":3,"image":"a.png","conversations":[{"from":"human","value":"<image>"},{"from":"gpt","value":"A cat."}]}"#;
        assert_eq!(hint(Form::Conversations, caption), want);
        assert!(hint(Form::Conversations, json!({ "x": 1 })).starts_with("a sample looks like"));
    }

    #[test]
    fn every_usual_form_of_a_pair_is_shown_in_ours() {
        let want = r#"{"image":"a.png","prompt":"<image>\nWhat?","chosen":"A cat.","rejected":"A dog."}"#;
        let turn = |role: &str, text: &str| json!({ "role": role, "content": text });
        for sample in [
            json!({ "image": "a.png", "question": "What?", "chosen": "A cat.", "rejected": "A dog." }),
            json!({ "image": "a.png", "text": r#"{"question": "What?", "chosen": "A cat.", "rejected": "A dog."}"# }),
            json!({ "images": ["a.png"], "prompt": [turn("user", "What?")], "chosen": [turn("assistant", "A cat.")], "rejected": [turn("assistant", "A dog.")] }),
            json!({ "images": ["a.png"], "chosen": [turn("user", "What?"), turn("assistant", "A cat.")], "rejected": [turn("user", "What?"), turn("assistant", "A dog.")] }),
            json!({ "images": ["a.png"], "conversations": [{ "from": "human", "value": "<image>\nWhat?" }], "chosen": { "from": "gpt", "value": "A cat." }, "rejected": { "from": "gpt", "value": "A dog." } }),
        ] {
            assert_eq!(hint(Form::Pairs, sample.clone()), want, "{sample}");
        }
        assert!(
            hint(Form::Pairs, json!({ "prompt": "q", "completion": "a", "label": true }))
                .starts_with("a pair looks like")
        );
    }

    #[test]
    fn tables_and_lists_of_captions() {
        let (name, row) = of_lines("image,question,answer\na.png,\"What, and \"\"why\"\"?\",A cat.\n").unwrap();
        assert_eq!((name, row["question"].as_str()), ("a table (CSV)", Some("What, and \"why\"?")));
        for line in [
            "a.png\tA cat, asleep.",
            "a.png: A cat, asleep.",
            "a.png#0 A cat, asleep.",
            "a.png | A cat, asleep.",
            "\"a.png\",\"A cat, asleep.\"",
        ] {
            let (name, row) = of_lines(line).unwrap();
            assert_eq!(
                (name, row),
                ("a list of captions", json!({ "image": "a.png", "caption": "A cat, asleep." })),
                "{line}"
            );
        }
        assert!(of_lines("hello there\nworld").is_none());
    }
}
