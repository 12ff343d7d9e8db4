//! What a chat template sees: the variables, functions, filters and bounds of transformers 5.23
//! (`utils/chat_template_utils.py`).

use super::{json, marks, python};
use crate::error::{Error, Result};
use jiff::civil::{Date, Time};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::ValueKind;
use minijinja::{Environment, Error as JinjaError, ErrorKind, Value};
use minijinja_contrib::{filters, globals};

/// Name of the template in its environment.
pub(super) const NAME: &str = "chat_template";

/// The filter that stands in for `{% generation %}`.
const GENERATION: &str = "__generation__";

/// The template, compiled, with all that it may call.
pub(super) fn environment(source: &str, date: Date) -> Result<Environment<'static>> {
    let mut env = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(|e| wrong(&e))?;
    env.set_syntax(syntax);
    env.set_unknown_method_callback(python::method);
    env.remove_global("debug");
    env.add_function("cycler", globals::cycler);
    env.add_function("joiner", globals::joiner);
    env.add_function("raise_exception", |message: Value| -> Result<String, JinjaError> {
        Err(JinjaError::new(ErrorKind::InvalidOperation, message.to_string()))
    });
    let midnight = date.to_datetime(Time::midnight());
    env.add_function("strftime_now", move |format: &str| -> Result<String, JinjaError> {
        jiff::fmt::strtime::format(without_zone(format), midnight)
            .map_err(|e| JinjaError::new(ErrorKind::InvalidOperation, format!("strftime_now({format:?}): {e}")))
    });
    env.add_filter("tojson", json::tojson);
    env.add_filter("filesizeformat", filters::filesizeformat);
    env.add_filter("striptags", filters::striptags);
    env.add_filter("truncate", filters::truncate);
    env.add_filter("wordcount", |text: &str| text.split_whitespace().count());
    env.add_filter("center", |state: &mut minijinja::State, text: &Value, width: Option<usize>| {
        python::method(state, text, "center", &[Value::from(width.unwrap_or(80))])
    });
    // As Python's `iter` and `len` have it: nothing is neither, a text is both.
    env.add_test("iterable", |v: &Value| !matches!(v.kind(), ValueKind::None | ValueKind::Bool | ValueKind::Number));
    env.add_test("sequence", |v: &Value| {
        matches!(v.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map | ValueKind::Iterable)
    });
    env.add_filter(GENERATION, |text: &str| marks::generation(text));
    env.add_template_owned(NAME, with_generation_marks(source)).map_err(|e| wrong(&e))?;
    Ok(env)
}

/// A format without `%z` and `%Z`: Python's `datetime.now()` knows no time zone, and writes nothing for them.
fn without_zone(format: &str) -> String {
    let mut out = String::with_capacity(format.len());
    let mut chars = format.chars().peekable();
    while let Some(c) = chars.next() {
        match (c, chars.peek()) {
            ('%', Some('z' | 'Z')) => _ = chars.next(),
            ('%', Some(_)) => out.extend([Some(c), chars.next()].into_iter().flatten()),
            _ => out.push(c),
        }
    }
    out
}

/// What went wrong in the template, and where.
pub(super) fn wrong(e: &JinjaError) -> Error {
    let cause = e.detail().map_or_else(|| e.kind().to_string(), ToString::to_string);
    let line = e.line().map_or_else(String::new, |l| format!(", line {l}"));
    let error = |cause: &str| Error::new(format!("the chat template cannot be used{line}: {cause}"));
    if e.kind() == ErrorKind::OutOfFuel {
        return error("it does not come to an end, or writes without bound")
            .hint("correct the loop in chat_template.jinja of the tokenizer, or use another template (`vicuna_v1`)");
    }
    error(&cause).hint("use another template (`vicuna_v1`), or correct chat_template.jinja of the tokenizer")
}

/// HF's `{% generation %}` blocks, as blocks that mark their text.
fn with_generation_marks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        // What stands in a comment is no block.
        if let Some(comment) = rest[..open].find("{#") {
            let end = rest[comment..].find("#}").map_or(rest.len(), |end| comment + end + 2);
            out.push_str(&rest[..end]);
            rest = &rest[end..];
            continue;
        }
        let Some(len) = rest[open + 2..].find("%}") else { break };
        let tag = &rest[open + 2..open + 2 + len];
        let word = tag.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let replacement = match word {
            "generation" => tag.replace("generation", &format!("filter {GENERATION}")),
            "endgeneration" => tag.replace("endgeneration", "endfilter"),
            _ => tag.to_string(),
        };
        out.push_str(&rest[..open + 2]);
        out.push_str(&replacement);
        out.push_str("%}");
        rest = &rest[open + len + 4..];
    }
    out.push_str(rest);
    out
}

/// Does the template mark answers itself?
pub(super) fn has_generation(source: &str) -> bool {
    with_generation_marks(source).contains(GENERATION)
}
