//! Reads the fields of a JSON object by name and type; every error names the full key.

use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::collections::BTreeSet;

/// One JSON object and the path that leads to it, e.g. `text_config.`.
pub struct Fields<'a> {
    map: &'a Map<String, Value>,
    path: String,
    read: RefCell<BTreeSet<&'static str>>,
}

impl<'a> Fields<'a> {
    /// The object itself; anything else is an error.
    pub fn new(value: &'a Value, path: &str) -> Result<Self> {
        match value {
            Value::Object(map) => Ok(Self { map, path: path.into(), read: RefCell::default() }),
            other => Err(Error::new(format!("`{}` is not an object but {other}", path.trim_end_matches('.')))),
        }
    }

    /// Is there nothing in it?
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// The first entry that is an object.
    pub fn first_object(&self) -> Option<(&'a str, &'a Value)> {
        self.map.iter().find(|(_, v)| v.is_object()).map(|(k, v)| (k.as_str(), v))
    }

    /// The value under `key`; `null` counts as absent.
    pub fn get(&self, key: &'static str) -> Option<&'a Value> {
        self.read.borrow_mut().insert(key);
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// Whether `key` is there at all; for token ids `null` ("none") differs from a field left out (the default).
    pub fn has(&self, key: &'static str) -> bool {
        self.map.contains_key(key)
    }

    /// The first of `architectures`.
    pub fn class(&self) -> Option<&'a str> {
        self.get("architectures")?.get(0)?.as_str()
    }

    /// The object under `key`.
    pub fn object(&self, key: &'static str) -> Result<Option<Fields<'a>>> {
        self.get(key).map(|v| Fields::new(v, &format!("{}{key}.", self.path))).transpose()
    }

    fn typed<T>(&self, key: &'static str, kind: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let read_one = |v| read(v).ok_or_else(|| Error::new(format!("`{}{key}` must be {kind}, not {v}", self.path)));
        self.get(key).map(read_one).transpose()
    }

    pub fn count(&self, key: &'static str) -> Result<Option<usize>> {
        // So that no product of a few of them overflows.
        if let Some(n) = self.get(key).and_then(Value::as_u64).filter(|n| *n > i32::MAX as u64) {
            return Err(Error::new(format!("`{}{key}` is {n}, more than any model has", self.path)));
        }
        self.typed(key, "a positive whole number", |v| v.as_u64().filter(|n| *n > 0).map(|n| n as usize))
    }

    /// A number that is not below 0.
    pub fn not_negative(&self, key: &'static str) -> Result<Option<f64>> {
        self.typed(key, "a number from 0 on", |v| v.as_f64().filter(|x| *x >= 0.0))
    }

    /// A number above 0.
    pub fn positive(&self, key: &'static str) -> Result<Option<f64>> {
        self.typed(key, "a number above 0", |v| v.as_f64().filter(|x| *x > 0.0))
    }

    /// A number of layers.
    pub fn layers(&self, key: &'static str) -> Result<Option<usize>> {
        match self.count(key)? {
            Some(n) if n > 1000 => {
                Err(Error::new(format!("`{}{key}` is {n}, more layers than any model has", self.path)))
            }
            n => Ok(n),
        }
    }

    pub fn number(&self, key: &'static str) -> Result<Option<f64>> {
        self.typed(key, "a number", |v| v.as_f64())
    }

    pub fn flag(&self, key: &'static str) -> Result<Option<bool>> {
        self.typed(key, "true or false", |v| v.as_bool())
    }

    pub fn text(&self, key: &'static str) -> Result<Option<&'a str>> {
        self.typed(key, "a string", |v| v.as_str())
    }

    pub fn integer(&self, key: &'static str) -> Result<Option<i64>> {
        self.typed(key, "a whole number", |v| v.as_i64())
    }

    /// A token id; some files write −1 for "none".
    pub fn token(&self, key: &'static str) -> Result<Option<u32>> {
        let id = self.typed(key, "a token id", |v| match v.as_i64()? {
            ..0 => Some(None),
            id => u32::try_from(id).ok().map(Some),
        });
        id.map(Option::flatten)
    }

    /// One token id or a list of them.
    pub fn tokens(&self, key: &'static str) -> Result<Option<Vec<u32>>> {
        let id = |v: &Value| v.as_i64().and_then(|i| u32::try_from(i).ok());
        self.typed(key, "a token id or a list of them", |v| match v {
            Value::Array(list) => list.iter().map(id).collect(),
            v if v.as_i64() == Some(-1) => Some(vec![]),
            v => Some(vec![id(v)?]),
        })
    }

    /// Pixels along one edge: a number or two equal ones.
    pub fn edge(&self, key: &'static str) -> Result<Option<usize>> {
        const MOST: u64 = 8192;
        let count = |v: &Value| v.as_u64().filter(|n| (1..=MOST).contains(n)).map(|n| n as usize);
        self.typed(key, "one number of pixels up to 8192 (only square pictures are supported)", |v| match v {
            Value::Array(list) => match list.as_slice() {
                [h, w] if h == w => count(h),
                _ => None,
            },
            v => count(v),
        })
    }

    /// The path of this object, ending in a dot unless it is the root.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// An error for each key that nobody asked for; used where the user wrote the object by hand.
    pub fn deny_unknown(&self) -> Result<()> {
        let read = self.read.borrow();
        let Some(key) = self.map.keys().find(|k| !read.contains(k.as_str())) else { return Ok(()) };
        let near = read.iter().max_by(|a, b| strsim::jaro(a, key).total_cmp(&strsim::jaro(b, key)));
        let error = Error::new(format!("unknown key `{}{key}`", self.path));
        Err(match near {
            Some(near) => error.hint(format!("did you mean `{near}`?")),
            None => error,
        })
    }
}
