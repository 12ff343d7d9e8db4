//! The rooms of `src/` use each other as the map in `src/lib.rs` says: from the top down, and no other way.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// One row of the map: a room and those that it uses.
type Row = (String, BTreeSet<String>);

/// The map of `src/lib.rs`, from the top down.
fn map(lib: &str) -> Vec<Row> {
    let words = |cell: &str| -> BTreeSet<String> {
        cell.split(',').map(|w| w.trim().to_string()).filter(|w| !w.is_empty()).collect()
    };
    let row = |line: &str| -> Option<Row> {
        let cells: Vec<&str> = line.strip_prefix("//! | [`")?.split('|').collect();
        let name = cells[0].split('`').next().unwrap().trim_start_matches("mod@").to_string();
        Some((name, words(cells[2])))
    };
    lib.lines().filter_map(row).collect()
}

/// What is wrong with a map by itself: a room that uses one above it or one that there is not.
fn climbs(map: &[Row]) -> Vec<String> {
    let below = |i: usize, name: &String| map[i + 1..].iter().any(|(n, _)| n == name);
    let bad = map.iter().enumerate().flat_map(|(i, (room, uses))| {
        uses.iter()
            .filter(move |u| !below(i, u))
            .map(move |u| format!("`{room}` is to use `{u}`, which is not below it"))
    });
    bad.collect()
}

/// Every `crate::a::b…` in a source text, with its line; comments and the unit tests at a file's end are left out.
fn uses(text: &str) -> Vec<(usize, Vec<&str>)> {
    let end = text.find("#[cfg(test)]\nmod tests {").unwrap_or(text.len());
    let code = text[..end].lines().enumerate().filter(|(_, l)| !l.trim_start().starts_with("//"));
    let mut found = Vec::new();
    for (i, line) in code {
        for (at, start) in line.match_indices("crate::") {
            let word = |c: char| c.is_alphanumeric() || c == '_';
            if line[..at].ends_with(word) {
                continue; // part of a longer name
            }
            let rest = &line[at + start.len()..];
            let path = &rest[..rest.find(|c: char| !word(c) && c != ':').unwrap_or(rest.len())];
            found.push((i + 1, path.split("::").collect()));
        }
    }
    found
}

/// All sources below `dir` but files of tests alone.
fn sources(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(sources(&path));
        } else if path.extension().is_some_and(|e| e == "rs")
            && !path.file_stem().unwrap().to_str().unwrap().ends_with("tests")
        {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// What each room uses of the others, and the first place where it does. `error` and its macro `bail!` are everyone's.
fn imports(files: &[(PathBuf, String)]) -> BTreeMap<String, BTreeMap<String, String>> {
    let mut found: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
    for (file, text) in files {
        let room = file.components().next().unwrap().as_os_str().to_str().unwrap().trim_end_matches(".rs");
        if matches!(room, "lib" | "main") {
            continue;
        }
        let seen = found.entry(room.to_string()).or_default();
        for (line, path) in uses(text) {
            if path[0] != room && !matches!(path[0], "error" | "bail") {
                seen.entry(path[0].to_string())
                    .or_insert_with(|| format!("{}:{line}: crate::{}", file.display(), path.join("::")));
            }
        }
    }
    found
}

/// Where the map and the imports differ.
fn differences(map: &[Row], found: &BTreeMap<String, BTreeMap<String, String>>) -> Vec<String> {
    let mut bad = Vec::new();
    for (room, seen) in found {
        match map.iter().find(|(name, _)| name == room) {
            None => bad.push(format!("`{room}` has no row")),
            Some((_, uses)) => {
                bad.extend(
                    seen.iter()
                        .filter(|(u, _)| !uses.contains(*u))
                        .map(|(u, at)| format!("`{room}` uses `{u}` ({at})")),
                );
                bad.extend(uses.iter().filter(|u| !seen.contains_key(*u)).map(|u| format!("`{room}` uses no `{u}`")));
            }
        }
    }
    bad.extend(map.iter().filter(|(n, _)| !found.contains_key(n)).map(|(n, _)| format!("there is no room `{n}`")));
    bad
}

#[test]
fn the_map_equals_the_imports() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let read = |file: PathBuf| {
        let text = std::fs::read_to_string(&file).unwrap();
        (file.strip_prefix(&src).unwrap().to_path_buf(), text)
    };
    let files: Vec<_> = sources(&src).into_iter().map(read).collect();
    let map = map(&std::fs::read_to_string(src.join("lib.rs")).unwrap());
    assert_eq!(climbs(&map), Vec::<String>::new());
    let bad = differences(&map, &imports(&files));
    assert!(bad.is_empty(), "the map of src/lib.rs and the imports differ:\n  {}", bad.join("\n  "));
}

#[test]
fn a_map_that_is_not_true_is_found() {
    let lib = "//! | [`mod@a`] | top | b, c |\n//! | [`b`] | mid | c |\n//! | [`c`] | low | |";
    let with = |a: &str, c: &str| {
        let files = [("a/x.rs", a), ("b.rs", "use crate::c::{d, e};"), ("c/mod.rs", c)];
        differences(&map(lib), &imports(&files.map(|(f, t)| (f.into(), t.to_string()))))
    };
    let both = "use crate::b;\nfn f(_: crate::c::D) {}";
    assert!(with(both, "// crate::a\n$crate::error::E\n#[cfg(test)]\nmod tests {\n    use crate::a;").is_empty());
    assert_eq!(with("use crate::b;", ""), ["`a` uses no `c`"]);
    assert_eq!(with(both, "\nuse crate::{a, b};"), ["`c` uses `` (c/mod.rs:2: crate::)"], "one `use` a room");
    assert_eq!(with(both, "use crate::a::x;"), ["`c` uses `a` (c/mod.rs:1: crate::a::x)"]);
    assert_eq!(climbs(&map("//! | [`c`] | low | b |\n//! | [`b`] | mid | |")).len(), 0);
    assert_eq!(climbs(&map("//! | [`c`] | low | |\n//! | [`b`] | mid | c |")).len(), 1);
    assert_eq!(differences(&map("//! | [`z`] | | |"), &BTreeMap::new()), ["there is no room `z`"]);
}

/// DESIGN.md, "One more projector": outside of the spec, a kind is spelt out where it is built, and nowhere else.
#[test]
fn a_kind_of_projector_has_one_place_outside_its_file_and_the_spec() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for kind in ["Bottleneck", "PixelShuffle"] {
        let spelt = |file: &PathBuf| std::fs::read_to_string(file).unwrap().contains(&format!("Projector::{kind}("));
        let files: Vec<PathBuf> = sources(&src).into_iter().filter(spelt).collect();
        assert_eq!(files, [src.join("model/projector/mod.rs")], "{kind}");
    }
}

/// Golden files are in every clone for good: 1 MiB each, 6 MiB in all.
#[test]
fn golden_files_are_small() {
    fn sizes(dir: &Path, out: &mut Vec<(u64, PathBuf)>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                sizes(&entry.path(), out);
            } else {
                out.push((entry.metadata().unwrap().len(), entry.path()));
            }
        }
    }
    let mut files = Vec::new();
    sizes(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden"), &mut files);
    let large: Vec<_> = files.iter().filter(|(n, _)| *n > 1 << 20).collect();
    assert!(large.is_empty(), "{large:?}");
    let all: u64 = files.iter().map(|(n, _)| n).sum();
    assert!(files.len() > 50 && all < 6 << 20, "{} files, {all} bytes", files.len());
}
