//! `${NAME}` in the strings of a recipe: values from the environment, and `${RECIPE_DIR}`, the folder of the file that
//! the string stands in. `$${` is a literal `${`.

use super::merge::{Step, show_path};
use crate::bail;
use crate::error::Result;
use toml::{Table, Value};

/// The folder of the recipe file, known to every recipe.
pub const RECIPE_DIR: &str = "RECIPE_DIR";

/// Puts `dir` in place of `${RECIPE_DIR}` and leaves every other variable for [`expand`].
pub fn expand_recipe_dir(table: &mut Table, dir: &str) -> Result<()> {
    let lookup = |name: &str| if name == RECIPE_DIR { Some(dir.to_string()) } else { None };
    each_string(table, &mut |_, text| replace(text, &lookup, Unknown::Keep).map(Some))
}

/// Puts the values of `lookup` (the environment) in place of the variables; one that is unset is an error that names
/// it and the key where it stands.
pub fn expand(table: &mut Table, lookup: &dyn Fn(&str) -> Option<String>) -> Result<()> {
    each_string(table, &mut |path, text| replace(text, lookup, Unknown::Refuse(path)).map(Some))
}

/// Makes every `${` literal, so that [`expand`] gives back the same strings.
pub fn escape(table: &mut Table) -> Result<()> {
    each_string(table, &mut |_, text| Ok(text.contains("${").then(|| text.replace("${", "$${"))))
}

type Change<'a> = dyn FnMut(&[Step], &str) -> Result<Option<String>> + 'a;

fn each_string(table: &mut Table, change: &mut Change) -> Result<()> {
    fn walk(value: &mut Value, path: &mut Vec<Step>, change: &mut Change) -> Result<()> {
        match value {
            Value::String(s) => {
                if let Some(new) = change(path, s)? {
                    *s = new;
                }
            }
            Value::Array(list) => {
                for (i, v) in list.iter_mut().enumerate() {
                    path.push(Step::Index(i));
                    walk(v, path, change)?;
                    path.pop();
                }
            }
            Value::Table(t) => {
                for (k, v) in t.iter_mut() {
                    path.push(Step::Key(k.clone()));
                    walk(v, path, change)?;
                    path.pop();
                }
            }
            _ => {}
        }
        Ok(())
    }
    for (k, v) in table.iter_mut() {
        walk(v, &mut vec![Step::Key(k.clone())], change)?;
    }
    Ok(())
}

enum Unknown<'a> {
    Keep,
    Refuse(&'a [Step]),
}

fn replace(text: &str, lookup: &dyn Fn(&str) -> Option<String>, unknown: Unknown) -> Result<String> {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find("${") {
        let (before, from) = rest.split_at(at);
        if before.ends_with('$') {
            // Kept escaped until the last pass.
            let keep = if matches!(unknown, Unknown::Keep) { before } else { &before[..at - 1] };
            out.push_str(keep);
            out.push_str("${");
            rest = &from[2..];
            continue;
        }
        out.push_str(before);
        let name = from[2..].split_once('}').map(|(name, _)| name);
        if let Some((name, value)) = name.and_then(|name| Some((name, lookup(name)?))) {
            out.push_str(&value);
            rest = &from[name.len() + 3..];
            continue;
        }
        match (&unknown, name) {
            (Unknown::Keep, _) => {
                out.push_str("${");
                rest = &from[2..];
            }
            (Unknown::Refuse(path), Some(name)) => bail!(
                "{}: the environment variable `{name}` is not set", show_path(path);
                "set it, e.g. `export {name}=/path/to/it`, or write the value into the recipe (a literal ${{ is written $${{)"
            ),
            (Unknown::Refuse(path), None) => bail!(
                "{}: `{text}` opens a variable and does not close it", show_path(path);
                "variables are written ${{NAME}}; a literal ${{ is written $${{"
            ),
        }
    }
    out.push_str(rest);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(text: &str) -> Table {
        toml::from_str(text).unwrap()
    }

    fn env(name: &str) -> Option<String> {
        (name == "DATA").then(|| "/data".to_string())
    }

    #[test]
    fn strings_anywhere_are_expanded() {
        let mut t = table("a = '${DATA}/x'\n[b]\nc = [{ d = 'x${DATA}${DATA}' }, 3]");
        expand(&mut t, &env).unwrap();
        assert_eq!(t, table("a = '/data/x'\n[b]\nc = [{ d = 'x/data/data' }, 3]"));
    }

    #[test]
    fn the_recipe_s_folder_first_the_environment_later() {
        let mut t = table("a = '${RECIPE_DIR}/${DATA}/$${RECIPE_DIR}/${'");
        expand_recipe_dir(&mut t, "recipes").unwrap();
        assert_eq!(t, table("a = 'recipes/${DATA}/$${RECIPE_DIR}/${'"));
    }

    #[test]
    fn escapes_are_undone_once() {
        let mut t = table("a = '$${DATA} costs 5$'");
        expand(&mut t, &env).unwrap();
        assert_eq!(t, table("a = '${DATA} costs 5$'"));
        escape(&mut t).unwrap();
        assert_eq!(t, table("a = '$${DATA} costs 5$'"));
    }

    #[test]
    fn what_cannot_be_expanded_names_its_place() {
        let e = expand(&mut table("[s]\nlist = ['ok', '${NOPE}']"), &env).unwrap_err();
        assert_eq!(e.cause(), "s.list[1]: the environment variable `NOPE` is not set");
        assert!(e.hint_text().unwrap().contains("export NOPE="));
        let e = expand(&mut table("a = 'x${DATA'"), &env).unwrap_err();
        assert!(e.cause().contains("does not close it"), "{e}");
    }
}
