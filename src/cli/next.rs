//! What to do when a run is finished: where its results lie, and how to ask the model.

use crate::data::source::{self, IMAGE_PLACEHOLDER, Role};
use crate::spec::{Data, Metric, Objective, Recipe, Template};
use std::path::Path;

/// A data file larger than this is not read once more only for an example.
const LARGEST: u64 = 64 << 20;

/// Lines for a user: files of the run, and a `generate` line with a picture and a question of the run's own data.
///
/// `program` is how this binary was called.
pub fn told(recipe: &Recipe, program: &str) -> Vec<String> {
    let dir = &recipe.output_dir;
    let left = |(n, s): (usize, &String)| dir.join(format!("{:02}-{s}", n + 1)).join("final");
    let Some((n, last)) = recipe.stages.iter().enumerate().rfind(|at| left(*at).exists()) else { return Vec::new() };
    let mut rows = vec![("loss, lr and gradient norm of every step", dir.join("metrics.jsonl"))];
    if dir.join("results.json").exists() {
        rows.insert(0, ("held-out figures after every stage", dir.join("results.json")));
    }
    rows.push(("what was trained, for PEFT and transformers", left((n, last))));
    let rows = rows.iter().map(|(what, path)| format!("  {what:<44}{}", path.display()));
    let mut lines: Vec<String> = rows.collect();
    let ask = ask(recipe, last).map(|(image, prompt)| {
        let image = image.map(|i| format!(" --image {}", quoted(&i))).unwrap_or_default();
        let template = template(recipe, last);
        // A caption begins with nothing.
        let prompt = if template == Some(Template::Plain) { String::new() } else { prompt };
        let template = match template {
            Some(t) if t != recipe.model.template || t == Template::Plain => format!(" --template {}", word(t)),
            _ => String::new(),
        };
        let run = quoted(&dir.display().to_string());
        format!("  {program} generate --run {run}{template}{image} --prompt {}", quoted(&prompt))
    });
    if let Some(line) = ask {
        lines.push("next, ask it about a picture, of yours or of its data:".into());
        lines.push(line);
    }
    lines
}

/// A picture and a question: of an evaluation's data, which the model has not seen, else of the stage's own.
fn ask(recipe: &Recipe, stage: &str) -> Option<(Option<String>, String)> {
    let stage = &recipe.stage[stage];
    let held = stage.eval.iter().filter_map(|name| recipe.eval.get(name));
    let mut held: Vec<_> = held.collect();
    // Questions with one right answer show most.
    held.sort_by_key(|e| e.metric != Metric::ExactMatch);
    let held = held.into_iter().flat_map(|e| e.data.iter().map(move |d| (d, e.metric == Metric::Preference)));
    let pairs = matches!(stage.objective, Objective::Dpo(_));
    let own = stage.data.iter().map(|d| (d, pairs));
    let mut all = held.chain(own).filter_map(|(data, pairs)| first(data, pairs));
    let with_picture = all.find(|(image, _)| image.is_some());
    with_picture.or_else(|| stage.data.iter().find_map(|d| first(d, pairs)))
}

/// The first sample with a picture, else the first.
fn first(data: &Data, pairs: bool) -> Option<(Option<String>, String)> {
    if std::fs::metadata(&data.path).ok()?.len() > LARGEST {
        return None;
    }
    let shown = |images: &[source::Picture], text: &str| {
        let image = images.first().filter(|_| images.len() == 1).map(|i| i.path.display().to_string());
        (image, text.replace(IMAGE_PLACEHOLDER, "").trim().to_string())
    };
    let all: Vec<_> = if pairs {
        source::preferences(data).ok()?.iter().map(|p| shown(&p.images, &p.prompt)).collect()
    } else {
        let question = |c: &source::Conversation| {
            let turn = c.turns.iter().find(|t| t.role == Role::User)?;
            Some(shown(&c.images, &turn.text))
        };
        source::conversations(data).ok()?.iter().filter_map(question).collect()
    };
    all.iter().find(|(image, _)| image.is_some()).or(all.first()).cloned()
}

/// The template that all data of the stage was written in, if it is one.
fn template(recipe: &Recipe, stage: &str) -> Option<Template> {
    let mut all = recipe.stage[stage].data.iter().map(|d| d.template.unwrap_or(recipe.model.template));
    let first = all.next()?;
    all.all(|t| t == first).then_some(first)
}

/// As `--template` names it.
fn word(template: Template) -> &'static str {
    match template {
        Template::Plain => "plain",
        Template::VicunaV1 => "vicuna_v1",
        Template::Chat => "chat",
    }
}

/// As a shell reads it as one word.
pub fn quoted(text: &str) -> String {
    let safe = |c: char| c.is_ascii_alphanumeric() || "/._-+,:=@%".contains(c);
    if !text.is_empty() && text.chars().all(safe) {
        return text.to_string();
    }
    if !text.contains(['"', '$', '`', '\\', '!', '\n']) {
        return format!("\"{text}\"");
    }
    format!("'{}'", text.replace('\'', "'\\''"))
}

/// How this program was called, for a line to be copied.
pub fn program() -> String {
    let name = std::env::args().next().filter(|a| !a.is_empty());
    let name = name.unwrap_or_else(|| "adfreeze".into());
    // A path that the shell found by itself needs none.
    let bare = Path::new(&name).file_name().is_some_and(|f| Path::new(&name) == Path::new(f));
    if bare { name } else { quoted(&name) }
}

#[cfg(test)]
mod tests {
    use super::quoted;

    #[test]
    fn a_shell_reads_one_word() {
        for text in ["runs/a.png", "What is it?", "", "it's $5", "a \"b\" `c`", "line\nbreak"] {
            let out =
                std::process::Command::new("sh").args(["-c", &format!("printf %s {}", quoted(text))]).output().unwrap();
            assert_eq!(String::from_utf8(out.stdout).unwrap(), text);
        }
        assert_eq!((quoted("runs/a.png"), quoted("What?")), ("runs/a.png".to_string(), "\"What?\"".to_string()));
    }
}
