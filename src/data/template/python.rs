//! Methods of Python's `str`, `list` and `dict` that chat templates call.

use minijinja::value::{ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat;

/// Longest text that padding makes.
const PADDED: usize = 1 << 16;

/// A method that minijinja does not know itself.
pub(super) fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let own = match (value.as_str(), value.kind()) {
        (Some(s), _) => text(s, name, args)?,
        (None, ValueKind::Seq) => list(value, name, args)?,
        (None, ValueKind::Map) if name == "copy" => {
            let () = from_args(args)?;
            Some(value.clone())
        }
        _ => None,
    };
    own.map_or_else(|| pycompat::unknown_method_callback(state, value, name, args), Ok)
}

fn text(s: &str, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let one = || from_args::<(&str,)>(args).map(|(a,)| a);
    Ok(Some(match name {
        "format" if widest(s) > PADDED => {
            let cause =
                format!("a width of more than {PADDED} characters in {:?}", s.chars().take(60).collect::<String>());
            return Err(Error::new(ErrorKind::InvalidOperation, cause));
        }
        "removeprefix" => Value::from(s.strip_prefix(one()?).unwrap_or(s)),
        "removesuffix" => Value::from(s.strip_suffix(one()?).unwrap_or(s)),
        "partition" => {
            let sep = one()?;
            let (a, b) = s.split_once(sep).map_or((s, None), |(a, b)| (a, Some(b)));
            list_of(&[a, b.map_or("", |_| sep), b.unwrap_or("")])
        }
        "rpartition" => {
            let sep = one()?;
            let (a, b) = s.rsplit_once(sep).map_or((None, s), |(a, b)| (Some(a), b));
            list_of(&[a.unwrap_or(""), a.map_or("", |_| sep), b])
        }
        "rsplit" => {
            let (sep, most): (Option<&str>, Option<i64>) = from_args(args)?;
            let most = most.and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX - 1);
            let mut parts: Vec<&str> = match sep {
                Some(sep) => s.rsplitn(most + 1, sep).collect(),
                None => words_from_behind(s, most),
            };
            parts.reverse();
            list_of(&parts)
        }
        "index" | "rindex" => {
            let what = one()?;
            let at = if name == "index" { s.find(what) } else { s.rfind(what) };
            let missing = || Error::new(ErrorKind::InvalidOperation, "substring not found");
            Value::from(s[..at.ok_or_else(missing)?].chars().count())
        }
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let (sign, digits) = s.split_at(usize::from(s.starts_with(['+', '-'])));
            Value::from(format!("{sign}{}{digits}", "0".repeat(missing(s, width))))
        }
        "ljust" | "rjust" | "center" => {
            let (width, fill): (usize, Option<&str>) = from_args(args)?;
            let (pad, fill) = (missing(s, width), fill.unwrap_or(" "));
            let left = match name {
                "ljust" => 0,
                "rjust" => pad,
                _ => pad / 2 + (pad & width & 1),
            };
            Value::from(format!("{}{s}{}", fill.repeat(left), fill.repeat(pad - left)))
        }
        "casefold" => Value::from(s.to_lowercase()),
        "swapcase" => {
            let swap = |c: char| -> String {
                if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() }
            };
            Value::from(s.chars().map(swap).collect::<String>())
        }
        "isdecimal" => Value::from(!s.is_empty() && s.chars().all(|c| c.is_ascii_digit())),
        _ => return Ok(None),
    }))
}

/// The largest width or precision that a format asks for.
fn widest(format: &str) -> usize {
    let fields = format.split('{').skip(1).filter_map(|field| field.split('}').next()?.split_once(':'));
    let numbers = fields.flat_map(|(_, spec)| spec.split(|c: char| !c.is_ascii_digit()));
    numbers.filter(|n| !n.is_empty()).map(|n| n.parse().unwrap_or(usize::MAX)).max().unwrap_or(0)
}

fn list_of(texts: &[&str]) -> Value {
    texts.iter().map(|t| Value::from(*t)).collect()
}

/// What is missing to `width` characters.
fn missing(s: &str, width: usize) -> usize {
    width.min(PADDED).saturating_sub(s.chars().count())
}

/// `s.rsplit(None, most)`, the last word first.
fn words_from_behind(s: &str, most: usize) -> Vec<&str> {
    let (mut out, mut rest) = (Vec::new(), s.trim());
    while !rest.is_empty() {
        let at = rest.rfind(char::is_whitespace).filter(|_| out.len() < most);
        let Some(at) = at else {
            out.push(rest);
            break;
        };
        let word = rest[at..].trim_start();
        out.push(word);
        rest = rest[..at].trim_end();
    }
    out
}

fn list(value: &Value, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    match name {
        "index" => {
            let (what,): (&Value,) = from_args(args)?;
            let missing = || Error::new(ErrorKind::InvalidOperation, "it is not in the list");
            let at = value.try_iter()?.position(|v| v == *what).ok_or_else(missing)?;
            Ok(Some(Value::from(at)))
        }
        "copy" => {
            let () = from_args(args)?;
            Ok(Some(value.clone()))
        }
        _ => Ok(None),
    }
}
