//! The rooms of `src/` and the direction in which they may use each other (see the map in `src/lib.rs`): an upper room
//! uses lower ones, never the other way round, and sideways only where [`SIDEWAYS`] says so.

use std::path::{Path, PathBuf};

/// From the top down. Rooms of one layer do not know each other.
const LAYERS: [&[&str]; 6] = [
    &["cli"],
    &["bench"],
    &["pipeline"],
    &["recipe", "train", "report", "checkpoint"],
    &["adapters", "model", "data", "optim"],
    &["ops"],
];

/// Who may use a room of the same layer: an adapter is grafted onto a model; a stage leaves checkpoints.
const SIDEWAYS: [(&str, &str); 2] = [("adapters", "model"), ("train", "checkpoint")];

/// What every room may use: errors, and the words that a user writes a recipe in.
const COMMON: [&[&str]; 4] = [&["error"], &["bail"], &["recipe", "schema"], &["recipe", "pattern"]];

fn layer(room: &str) -> Option<usize> {
    LAYERS.iter().position(|rooms| rooms.contains(&room))
}

fn allowed(room: &str, path: &[&str]) -> bool {
    let target = path[0];
    room == target
        || COMMON.iter().any(|c| path.starts_with(c))
        || SIDEWAYS.contains(&(room, target))
        || matches!((layer(room), layer(target)), (Some(from), Some(to)) if from < to)
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

/// What a file of `room` must not do.
fn violations(room: &str, file: &Path, text: &str) -> Vec<String> {
    let bad = uses(text).into_iter().filter(|(_, path)| !allowed(room, path));
    bad.map(|(line, path)| format!("{}:{line}: `{room}` uses `crate::{}`", file.display(), path.join("::"))).collect()
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

#[test]
fn rooms_use_each_other_in_one_direction() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    let mut rooms = Vec::new();
    for file in sources(&src) {
        let inside = file.strip_prefix(&src).unwrap().to_path_buf();
        let room =
            inside.components().next().unwrap().as_os_str().to_str().unwrap().trim_end_matches(".rs").to_string();
        if matches!(room.as_str(), "lib" | "main") {
            continue;
        }
        let known = room == "error" || layer(&room).is_some();
        assert!(
            known,
            "src/{} is a new room: give it a place in LAYERS and in the map of src/lib.rs",
            inside.display()
        );
        found.extend(violations(&room, &inside, &std::fs::read_to_string(&file).unwrap()));
        rooms.push(room);
    }
    assert!(
        LAYERS.iter().flat_map(|l| l.iter()).all(|r| rooms.iter().any(|seen| seen == r)),
        "a room of LAYERS is empty"
    );
    assert!(found.is_empty(), "against the direction of the rooms:\n  {}", found.join("\n  "));
}

#[test]
fn a_use_against_the_direction_is_found() {
    let file = Path::new("x.rs");
    let found = |room: &str, text: &str| violations(room, file, text);
    assert_eq!(found("model", "use crate::train::step;"), ["x.rs:1: `model` uses `crate::train::step`"]);
    assert_eq!(found("data", "\nfn f(v: &crate::model::vlm::Vlm) {}").len(), 1);
    assert_eq!(found("ops", "use crate::recipe::validate;").len(), 1);
    assert_eq!(found("ops", "use crate::{model, error};").len(), 1, "one `use` a room");
    assert_eq!(found("checkpoint", "use crate::train::step;").len(), 1);
    let fine = "use crate::recipe::schema::Stage;\nuse crate::ops::matmul;\n// crate::cli\n$crate::error::Error\n\
                #[cfg(test)]\nmod tests {\n    use crate::cli;";
    assert!(found("model", fine).is_empty(), "{:?}", found("model", fine));
    assert!(found("adapters", "use crate::model::vlm::Vlm;").is_empty());
}

/// DESIGN.md, "One more projector": outside of the schema, a kind is spelt out where it is built, and nowhere else.
#[test]
fn a_kind_of_projector_has_one_place_outside_its_file_and_the_schema() {
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
