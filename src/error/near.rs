//! What a misspelt name was probably meant to be.

use std::path::{Path, PathBuf};

/// Likeness (Jaro–Winkler, 0 to 1) from which on two names that differ in more letters are still taken for one.
const ALIKE: f64 = 0.8;

/// Of a folder with more entries than this only so many are compared.
const ENTRIES: usize = 10_000;

/// The index of the name that `word` was probably meant to be: one that is at most a third of the word's letters away, else
/// one that begins and goes on alike.
pub fn nearest(word: &str, known: &[&str]) -> Option<usize> {
    let distance = |name: &str| strsim::damerau_levenshtein(word, name);
    let likeness = |name: &str| strsim::jaro_winkler(word, name);
    let near = (0..known.len()).min_by_key(|i| distance(known[*i]));
    let alike = (0..known.len()).max_by(|a, b| likeness(known[*a]).total_cmp(&likeness(known[*b])));
    near.filter(|i| distance(known[*i]) <= (word.chars().count() / 3).max(1))
        .or(alike.filter(|i| likeness(known[*i]) >= ALIKE))
}

/// `did you mean …? known: …`.
pub fn suggestion(word: &str, known: &[&str]) -> String {
    told(nearest(word, known).map(|i| known[i]), known)
}

/// What [`suggestion`] says where the nearest name has been found already.
pub fn told(near: Option<&str>, known: &[&str]) -> String {
    let names: Vec<String> = known.iter().map(|k| format!("`{k}`")).collect();
    match (near, names.len()) {
        (_, 0) => "there is nothing to choose from".into(),
        (Some(near), 1) => format!("did you mean `{near}`?"),
        (Some(near), _) => format!("did you mean `{near}`? known: {}", names.join(", ")),
        (None, _) => format!("known: {}", names.join(", ")),
    }
}

/// The file or folder that a path which does not exist was probably meant to be: its parts that exist, and in place of the first
/// that does not the entry there whose name is nearest, with the rest behind it as far as that exists.
pub fn path(wanted: &Path) -> Option<PathBuf> {
    let mut at = PathBuf::new();
    let mut replaced = false;
    for part in wanted.components() {
        let next = at.join(part);
        if next.exists() {
            at = next;
            continue;
        }
        let word = part.as_os_str().to_str()?;
        let here = if at.as_os_str().is_empty() { Path::new(".") } else { &at };
        let entries =
            std::fs::read_dir(here).ok()?.take(ENTRIES).filter_map(|e| e.ok()?.file_name().into_string().ok());
        let mut entries: Vec<String> = entries.collect();
        // The order of a folder is nobody's.
        entries.sort();
        let names: Vec<&str> = entries.iter().map(String::as_str).collect();
        let found = names.iter().position(|n| same_but_its_end(n, word)).or_else(|| nearest(word, &names))?;
        at = at.join(&entries[found]);
        replaced = true;
    }
    replaced.then_some(at)
}

/// `hint`, with `did you mean …?` in front where a name like that of `wanted` is there.
pub fn path_hint(wanted: &Path, hint: &str) -> String {
    match path(wanted) {
        Some(near) => format!("did you mean {}? {hint}", near.display()),
        None => hint.to_string(),
    }
}

/// `data.json` for `data.jsonl` or `data`.
fn same_but_its_end(a: &str, b: &str) -> bool {
    let stem = |n: &str| Path::new(n).file_stem().map(|s| s.to_ascii_lowercase());
    stem(a) == stem(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_path_is_found_part_by_part() {
        let dir = tempfile::tempdir().unwrap();
        let at = |p: &str| dir.path().join(p);
        std::fs::create_dir_all(at("recipes/quickstart")).unwrap();
        std::fs::write(at("recipes/quickstart.toml"), "").unwrap();
        std::fs::write(at("recipes/quickstart/model.json"), "").unwrap();
        for (wrong, right) in [
            ("recipes/quikstart.toml", Some("recipes/quickstart.toml")),
            ("recipe/quickstart.toml", Some("recipes/quickstart.toml")),
            ("recipes/quickstart.tml", Some("recipes/quickstart")),
            ("recipes/quickstart/model.jsonl", Some("recipes/quickstart/model.json")),
            ("recepies/quikstart/model.json", Some("recipes/quickstart/model.json")),
            ("recipes/else.toml", None),
            ("recipes/quickstart.toml", None),
        ] {
            assert_eq!(path(&at(wrong)), right.map(&at), "{wrong}");
        }
    }
}
