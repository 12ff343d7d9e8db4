//! From a file (and the files it extends, and `--set`) to a checked [`Recipe`].
//!
//! Order: the base → the file on top of it → `--set defaults.…` → `[defaults]` spread over the stages → the other
//! `--set`. Any other order would lose a setting inside a value that a stage inherits. Then variables are expanded, the
//! keys and types are checked, and last the rules that hold between values ([`super::validate`]).

use super::explain::{File, Sources, explain, section_as_list};
use super::merge::{Setting, expand_defaults, kind, merge};
use super::{limits, validate, vars};
use crate::bail;
use crate::error::{Context, Error, Result, near};
use crate::spec::Recipe;
use std::io::Read;
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// Reads, resolves and checks the recipe at `path`; `sets` are the `KEY=VALUE` of the command line.
/// Relative paths in a recipe are relative to the current folder; `${RECIPE_DIR}` is the folder of the file it is in.
/// Errors name the file and the key's whole path.
pub fn load(path: &Path, sets: &[String]) -> Result<Recipe> {
    load_with(path, sets, &|name| std::env::var(name).ok())
}

/// As [`load`], with the variables from `env`.
pub fn load_with(path: &Path, sets: &[String], env: &dyn Fn(&str) -> Option<String>) -> Result<Recipe> {
    let settings = sets.iter().map(|s| Setting::parse(s)).collect::<Result<Vec<_>>>()?;
    let mut files = Vec::new();
    read(path, &mut Vec::new(), &mut files)?;
    let table = resolve(path, &files, &settings)?;
    let table = check_names(&table).and_then(|()| substitute(table, path, env)).context(path.display())?;

    let sources = Sources { files, settings };
    let recipe: Recipe =
        serde_path_to_error::deserialize(Value::Table(table.clone())).map_err(|e| explain(&e, &table, &sources))?;
    section_as_list(&table, &recipe, &sources)?;
    limits::check(&table).and_then(|()| validate::validate(&recipe)).context(path.display())?;
    Ok(recipe)
}

/// The recipe as TOML that [`load`] reads back unchanged, with everything resolved: for the run directory.
pub fn to_toml(recipe: &Recipe) -> Result<String> {
    let fail = |e: toml::ser::Error| Error::new("the resolved recipe cannot be written as TOML").source(e);
    let mut table = Table::try_from(recipe).map_err(fail)?;
    vars::escape(&mut table)?;
    toml::to_string(&table).map_err(fail)
}

/// Reads the files from the deepest base up to `path` itself.
fn read(path: &Path, below: &mut Vec<PathBuf>, files: &mut Vec<File>) -> Result<()> {
    let real = path.canonicalize().map_err(|e| missing(path, below, &e.to_string()))?;
    if below.contains(&real) {
        bail!("{}: the recipe extends itself", path.display(); "follow the `extends` of each file and cut the circle");
    }
    let text = text(path).map_err(|e| missing(path, below, &e))?;
    below.push(real);
    let mut table: Table = match toml::from_str(&text) {
        Ok(t) => t,
        Err(e) => bail!(
            "{}: not valid TOML: {}", path.display(), short(e.to_string().trim_end());
            "a section is written [stage.sft], a value key = value; text stands in quotes"
        ),
    };
    vars::expand_recipe_dir(&mut table, &folder(path).to_string_lossy()).with_context(|| path.display())?;
    match table.remove("extends") {
        None => {}
        Some(Value::String(base)) => read(&folder(path).join(base), below, files)?,
        Some(other) => bail!(
            "{}: extends: is {}, not a path", path.display(), kind(&other);
            "name one file, relative to this one: extends = \"base/llava-1.5-7b.toml\""
        ),
    }
    files.push(File { name: path.display().to_string(), table });
    Ok(())
}

/// A recipe has a few hundred lines; what is larger is another file.
const LARGEST: u64 = 16 << 20;

/// Lines as long as a screen at most.
fn short(text: &str) -> String {
    let line = |line: &str| match line.char_indices().nth(160) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line.to_string(),
    };
    text.lines().map(line).collect::<Vec<_>>().join("\n")
}

/// The file's text, or why it is none.
fn text(path: &Path) -> Result<String, String> {
    if path.is_dir() {
        return Err("it is a folder".into());
    }
    if path.exists() && !path.is_file() {
        return Err("it is no file but a pipe or a device, which may have no end".into());
    }
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(|e| e.to_string())?;
    file.take(LARGEST + 1).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
    if bytes.len() as u64 > LARGEST {
        return Err("it is larger than 16 MiB, and so no recipe".into());
    }
    if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) {
        return Err("it is written in UTF-16: save it as UTF-8".into());
    }
    let text = String::from_utf8(bytes).map_err(|e| {
        let line = 1 + e.as_bytes()[..e.utf8_error().valid_up_to()].iter().filter(|b| **b == b'\n').count();
        format!("line {line} is not UTF-8 text")
    })?;
    // What editors on Windows put in front.
    Ok(text.strip_prefix('\u{feff}').map_or(text.clone(), str::to_string))
}

fn missing(path: &Path, below: &[PathBuf], why: &str) -> Error {
    let error = Error::new(format!("{}: the recipe cannot be read: {why}", path.display()));
    let hint = match below.last() {
        Some(child) => format!("{} extends it; `extends` is relative to that file", child.display()),
        None => "give the path of a recipe, a TOML file".to_string(),
    };
    let near = match path.is_dir() {
        // A run's folder: its own recipe goes on with it.
        true => Some(path.join("recipe.toml")).filter(|p| p.exists()),
        false if path.exists() => None,
        false => shipped(path).or_else(|| near::path(path)),
    };
    match near {
        Some(near) => error.hint(format!("did you mean {}? {hint}", near.display())),
        None => error.hint(hint),
    }
}

/// `quickstart` or `quickstart.toml` for recipes/quickstart.toml.
fn shipped(path: &Path) -> Option<PathBuf> {
    let name = path.file_name()?;
    let below = [path.with_file_name("recipes").join(name), path.to_path_buf()];
    below.iter().flat_map(|p| [p.clone(), p.with_extension("toml")]).find(|p| p.is_file())
}

fn folder(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn resolve(path: &Path, files: &[File], settings: &[Setting]) -> Result<Table> {
    let mut table = Table::new();
    for file in files {
        merge(&mut table, file.table.clone());
    }
    for s in settings.iter().filter(|s| s.is_default()) {
        s.has_effect(&table)?;
        s.apply(&mut table)?;
    }
    expand_defaults(&mut table).with_context(|| path.display())?;
    for s in settings.iter().filter(|s| !s.is_default()) {
        s.apply(&mut table)?;
    }
    Ok(table)
}

/// The stages' names, ahead of the types: a misspelt one would be reported as a stage without its keys.
fn check_names(table: &Table) -> Result<()> {
    let (Some(Value::Array(order)), Some(Value::Table(sections))) = (table.get("stages"), table.get("stage")) else {
        return Ok(());
    };
    if let Some((key, value)) = sections.iter().find(|(_, v)| !v.is_table()) {
        let listed = order.iter().filter_map(Value::as_str).map(|s| format!("`stage.{s}.{key}`"));
        bail!("stage.{key}: is {}, not a stage", kind(value);
            "a stage's name stands between: {}", listed.collect::<Vec<_>>().join(" or "));
    }
    let listed: Vec<&str> = order.iter().filter_map(Value::as_str).collect();
    let defined: Vec<&str> = sections.keys().map(String::as_str).collect();
    validate::stage_names(&listed, &defined)
}

fn substitute(mut table: Table, path: &Path, env: &dyn Fn(&str) -> Option<String>) -> Result<Table> {
    // Only what `--set` brought can still name the folder.
    vars::expand_recipe_dir(&mut table, &folder(path).to_string_lossy())?;
    vars::expand(&mut table, env)?;
    Ok(table)
}

#[cfg(test)]
mod tests;
