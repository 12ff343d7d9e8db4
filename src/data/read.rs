//! From the bytes of a data file to samples; whatever else a file holds is named, with what to do about it.

use super::file::{self, shown};
use super::forms::{self, Form};
use crate::bail;
use crate::error::words::plain;
use crate::error::{Error, Result};
use crate::spec::Data;
use serde::de::{DeserializeOwned, Deserializer, IgnoredAny, SeqAccess, Visitor};
use std::io::{BufRead, BufReader, Read};

/// Bytes of a JSON list, which is read as a whole, and of a line: far beyond what samples take, and what a machine can hold.
const LONGEST_LIST: u64 = 8 << 30;
const LONGEST_LINE: u64 = 64 << 20;

/// The first `limit` samples of a JSON array, or of a file with one object a line.
pub(super) fn read<T: DeserializeOwned>(data: &Data, form: Form) -> Result<Vec<T>> {
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
                let cause = cause.replace("(line 1, column ", "(column ");
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
        let told = plain(&e.inner().to_string());
        // Behind a dot, what was begun but has no name yet.
        match e.path().to_string().trim_end_matches(".?") {
            "." | "" | "?" => (told, index),
            key => (format!("{key}: {told}"), index),
        }
    })?;
    de.end().map_err(|e| (plain(&e.to_string()), None))?;
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
