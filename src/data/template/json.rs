//! `tojson` as Python's `json.dumps` writes it, with the arguments that transformers passes on.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};
use std::fmt::Write;

/// How `json.dumps` is asked to write.
struct Writer<'a> {
    out: String,
    state: &'a State<'a, 'a>,
    ascii: bool,
    /// What a level is indented by; `None`: all on one line.
    indent: Option<String>,
    between: String,
    colon: String,
    sorted: bool,
}

/// `x | tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub(super) fn tojson(
    state: &State,
    x: &Value,
    ascii: Option<Value>,
    indent: Option<Value>,
    named: Kwargs,
) -> Result<Value, Error> {
    let or = |given: Option<Value>, name: &str| -> Result<Option<Value>, Error> {
        let given = match given {
            Some(v) => Some(v),
            None => named.get::<Option<Value>>(name)?,
        };
        Ok(given.filter(|v| !v.is_none() && !v.is_undefined()))
    };
    let ascii = or(ascii, "ensure_ascii")?.is_some_and(|v| v.is_true());
    let indent = or(indent, "indent")?.map(|v| match v.as_str() {
        Some(s) => s.to_string(),
        None => " ".repeat(v.as_i64().unwrap_or(0).clamp(0, 64) as usize),
    });
    let separators = or(None, "separators")?;
    let sorted = or(None, "sort_keys")?.is_some_and(|v| v.is_true());
    named.assert_all_used()?;
    let (between, colon) = match separators {
        Some(pair) => (text_at(&pair, 0)?, text_at(&pair, 1)?),
        None => (if indent.is_some() { "," } else { ", " }.to_string(), ": ".to_string()),
    };
    let mut w = Writer { out: String::new(), state, ascii, indent, between, colon, sorted };
    w.value(x, 0)?;
    Ok(Value::from(w.out))
}

fn text_at(pair: &Value, i: usize) -> Result<String, Error> {
    let item = pair.get_item_by_index(i)?;
    let wrong = || Error::new(ErrorKind::InvalidOperation, "tojson: separators are two strings");
    item.as_str().map(String::from).ok_or_else(wrong)
}

impl Writer<'_> {
    fn value(&mut self, v: &Value, depth: usize) -> Result<(), Error> {
        if depth > 100 {
            return Err(Error::new(ErrorKind::InvalidOperation, "tojson: the value is nested too deep"));
        }
        match v.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if v.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&v.to_string()),
            ValueKind::String => self.text(v.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = v.try_iter()?.collect();
                self.list('[', ']', items.len(), depth, |w, i| w.value(&items[i], depth + 1))?;
            }
            ValueKind::Map => {
                let mut entries = Vec::new();
                for key in v.try_iter()? {
                    let value = v.get_item(&key)?;
                    entries.push((key, value));
                }
                if self.sorted {
                    entries.sort_by_key(|(key, _)| key.to_string());
                }
                self.list('{', '}', entries.len(), depth, |w, i| {
                    let (key, value) = &entries[i];
                    w.text(&name(key));
                    let colon = w.colon.clone();
                    w.out.push_str(&colon);
                    w.value(value, depth + 1)
                })?;
            }
            kind => {
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    format!("tojson: {kind} is nothing that JSON has"),
                ));
            }
        }
        Ok(())
    }

    fn list(
        &mut self,
        open: char,
        close: char,
        n: usize,
        depth: usize,
        mut item: impl FnMut(&mut Self, usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        for i in 0..n {
            if i > 0 {
                let between = self.between.clone();
                self.out.push_str(&between);
            }
            self.line(depth + 1);
            let before = self.out.len();
            item(self, i)?;
            self.state.consume_fuel(1 + ((self.out.len() - before) / 64) as u64)?;
        }
        if n > 0 {
            self.line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            self.out.push_str(&indent.repeat(depth));
        }
    }

    fn text(&mut self, s: &str) {
        self.out.push('"');
        for c in s.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if (c as u32) < 0x20 || self.ascii && !c.is_ascii() && !super::marks::is_mark(c) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// A key as `json.dumps` names it.
fn name(key: &Value) -> String {
    match key.kind() {
        ValueKind::None => "null".into(),
        ValueKind::Bool => if key.is_true() { "true" } else { "false" }.into(),
        _ => key.to_string(),
    }
}
