//! What serde says about a value, in a user's words: no name of a type of ours or of Rust's.

/// A message of serde, serde_json or toml in words; one that is not known is given back as it is.
pub fn plain(message: &str) -> String {
    let (text, place) = split_place(message);
    let said = translate(text).unwrap_or_else(|| text.to_string());
    match place {
        Some((line, column)) => format!("{said} (line {line}, column {column})"),
        None => said,
    }
}

/// `… at line 3 column 7` → the text before it, and the place.
fn split_place(message: &str) -> (&str, Option<(&str, &str)>) {
    let place = message.rsplit_once(" at line ").and_then(|(text, place)| {
        let (line, column) = place.split_once(" column ")?;
        let numbers = [line, column].iter().all(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()));
        // Line 0 is said of a value that was in memory already.
        numbers.then_some((text, (line != "0").then_some((line, column))))
    });
    place.unwrap_or((message, None))
}

fn translate(text: &str) -> Option<String> {
    if let Some(rest) = text.strip_prefix("invalid type: ").or(text.strip_prefix("invalid value: ")) {
        let (is, must) = rest.rsplit_once(", expected ")?;
        if must == "string only" {
            return Some("must be one of its choices, by its name or as a section with its settings".into());
        }
        return Some(format!("is {}, and must be {}", found(is), wanted(must)));
    }
    if let Some(rest) = text.strip_prefix("invalid length ") {
        let (n, must) = rest.split_once(", expected ").unwrap_or((rest, ""));
        let must = if must.is_empty() { String::new() } else { format!(", and must be {}", wanted(must)) };
        return Some(format!("has {n} value{}{must}", if n == "1" { "" } else { "s" }));
    }
    if let Some(field) = quoted(text, "missing field ") {
        return Some(format!("`{field}` is missing"));
    }
    if let Some(field) = quoted(text, "duplicate field ") {
        return Some(format!("`{field}` is there twice"));
    }
    for (start, what) in [("unknown field ", "unknown key"), ("unknown variant ", "unknown value")] {
        if let Some(name) = quoted(text, start) {
            let known: Vec<String> = text.split('`').skip(3).step_by(2).map(|k| format!("`{k}`")).collect();
            let known = if known.is_empty() { String::new() } else { format!("; known: {}", known.join(", ")) };
            return Some(format!("{what} `{name}`{known}"));
        }
    }
    if text.starts_with("data did not match any variant of untagged enum") {
        return Some("has a form that is not known".into());
    }
    if let Some(what) = text.strip_prefix("EOF while parsing ") {
        let what = match what {
            "a value" => "where a value should stand",
            "an object" => "in the middle of an object { … }",
            "a list" => "in the middle of a list [ … ]",
            "a string" => "in the middle of a text",
            other => return Some(format!("ends in the middle of {other}")),
        };
        return Some(format!("ends {what}"));
    }
    Some(
        match text {
            "expected value" => "no value stands where one should (text needs quotes)",
            "expected ident" => "no value stands where one should (true, false and null are the only bare words)",
            "trailing characters" => "something stands behind the end of the value",
            "trailing comma" => "a comma stands in front of a closing bracket",
            "expected `,` or `}`" => "a comma or a closing brace is missing",
            "expected `,` or `]`" => "a comma or a closing bracket is missing",
            "expected `:`" => "a colon is missing behind a key",
            "key must be a string" => "a key must be text in quotes",
            "invalid escape" => "a backslash stands in front of a character that it cannot escape",
            "invalid number" => "a number is not written as one",
            "number out of range" => "a number is too large",
            "recursion limit exceeded" => "values are nested too deeply",
            "lone leading surrogate in hex escape" | "unexpected end of hex escape" => "a \\u escape is not whole",
            "invalid unicode code point" => "the text is not UTF-8",
            _ if text.starts_with("control character") => {
                "a control character, such as a line break, stands inside a text"
            }
            _ => return None,
        }
        .into(),
    )
}

/// `start`, then a name in backticks.
fn quoted<'a>(text: &'a str, start: &str) -> Option<&'a str> {
    text.strip_prefix(start)?.strip_prefix('`')?.split('`').next()
}

/// What serde found: `string "fast"`, `integer `3``, `map`, ….
fn found(is: &str) -> String {
    let value = |start: &str| is.strip_prefix(start).map(|v| v.trim_matches('`').to_string());
    if let Some(text) = is.strip_prefix("string ") {
        return format!("the text {text}");
    }
    for start in ["integer ", "floating point ", "boolean ", "character "] {
        if let Some(v) = value(start) {
            return v;
        }
    }
    match is {
        "map" => "a section of keys and values".into(),
        "sequence" | "tuple" => "a list".into(),
        "null" | "unit value" | "Option value" => "empty".into(),
        "unit variant" | "newtype variant" | "tuple variant" | "struct variant" => "a choice in another form".into(),
        "byte array" => "binary data".into(),
        other => other.to_string(),
    }
}

/// What serde wanted, most often the name of a type.
fn wanted(must: &str) -> String {
    let name = must.trim_matches('`');
    match name {
        "f32" | "f64" | "floating point number" => "a number".into(),
        "u8" | "u16" | "u32" | "u64" | "u128" | "usize" => "a whole number, 0 or more".into(),
        "i8" | "i16" | "i32" | "i64" | "i128" | "isize" => "a whole number".into(),
        "a nonzero u32" | "a nonzero u64" | "a nonzero usize" => "a whole number, 1 or more".into(),
        "a string" | "string" | "str" | "a borrowed string" => "text".into(),
        "path string" | "a path string" => "a path".into(),
        "a boolean" | "bool" => "true or false".into(),
        "a sequence" | "sequence" | "an array" => "a list".into(),
        "a map" | "map" => "a section of keys and values".into(),
        "option" => "a value, or nothing".into(),
        "unit" | "null" => "empty".into(),
        "string or map" | "string or table" | "enum" => "one of its choices".into(),
        "table" => "a section of keys and values".into(),
        "any valid TOML value" | "any valid JSON value" => "a value".into(),
        "map with a single key" => "exactly one choice".into(),
        _ => {
            let n = |start: &str| name.strip_prefix(start).filter(|n| n.bytes().all(|b| b.is_ascii_digit()));
            if let Some(n) = n("an array of length ").or(n("a tuple of size ")) {
                return format!("a list of {n} values");
            }
            if name.starts_with("struct ") || name.starts_with("map with ") || name.starts_with("struct variant ") {
                return "a section of keys and values".into();
            }
            if name.starts_with("tuple struct ") || name.starts_with("tuple variant ") || name.starts_with("tuple ") {
                return "a list of values".into();
            }
            if ["enum ", "variant ", "unit variant ", "newtype variant "].iter().any(|s| name.starts_with(s)) {
                return "one of its choices".into();
            }
            must.to_string()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::plain;

    /// Real messages of the crates, and what they become.
    #[test]
    fn messages_are_in_a_user_s_words() {
        #[derive(Debug, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        #[allow(dead_code, reason = "only read into")]
        struct Thing {
            n: usize,
            list: Option<Vec<f64>>,
            pair: Option<[usize; 2]>,
            inner: Option<Box<Thing>>,
            on: Option<bool>,
            path: Option<std::path::PathBuf>,
            choice: Option<Choice>,
            either: Option<Either>,
        }
        #[derive(Debug, serde::Deserialize)]
        #[allow(dead_code, reason = "only read into")]
        enum Choice {
            One,
            Two { x: f64 },
        }
        #[derive(Debug, serde::Deserialize)]
        #[serde(untagged)]
        #[allow(dead_code, reason = "only read into")]
        enum Either {
            Text(String),
            Number(u64),
        }
        let json = |text: &str| plain(&serde_json::from_str::<Thing>(text).unwrap_err().to_string());
        let toml = |text: &str| plain(toml::from_str::<Thing>(text).unwrap_err().message());
        assert_eq!(
            json(r#"{"n": "x"}"#),
            "is the text \"x\", and must be a whole number, 0 or more (line 1, column 9)"
        );
        assert_eq!(toml("n = -1"), "is -1, and must be a whole number, 0 or more");
        assert_eq!(toml("n = 1.5"), "is 1.5, and must be a whole number, 0 or more");
        assert_eq!(toml("n = 1\nlist = { a = 1 }"), "is a section of keys and values, and must be a list");
        assert_eq!(toml("n = 1\nlist = ['a']"), "is the text \"a\", and must be a number");
        assert_eq!(toml("n = 1\npair = [1]"), "has 1 value, and must be a list of 2 values");
        assert_eq!(toml("n = 1\ninner = 4"), "is 4, and must be a section of keys and values");
        assert_eq!(toml("n = 1\non = 'yes'"), "is the text \"yes\", and must be true or false");
        assert_eq!(toml("n = 1\npath = 3"), "is 3, and must be a path");
        assert_eq!(toml("n = 1\neither = [3]"), "has a form that is not known");
        assert_eq!(json("{}"), "`n` is missing (line 1, column 2)");
        assert_eq!(json(r#"{"m": 1}"#).split(';').next(), Some("unknown key `m`"));
        assert_eq!(
            json(r#"{"n": 1, "choice": "Three"}"#),
            "unknown value `Three`; known: `One`, `Two` (line 1, column 26)"
        );
        assert_eq!(json(r#"{"n": 1"#), "ends in the middle of an object { … } (line 1, column 7)");
        assert_eq!(json("{'n': 1}"), "a key must be text in quotes (line 1, column 2)");
        assert_eq!(json("hello"), "no value stands where one should (text needs quotes) (line 1, column 1)");
        assert_eq!(json(r#"{"n": 1, }"#), "a comma stands in front of a closing bracket (line 1, column 10)");
        for text in ["n = 1\nchoice = { Two = 3 }", "n = 1\nchoice = 3", "n = 1\nchoice = 'Two'", "n = 1\neither = [3]"]
        {
            let said = toml(text);
            for name in ["struct", "enum", "usize", "f64", "variant", "sequence", "Thing", "Either", "Choice"] {
                assert!(!said.contains(name), "{text}: {said}");
            }
        }
    }
}
