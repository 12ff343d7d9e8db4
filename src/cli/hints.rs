//! `generate`, `score` and, mostly, `data show` take no recipe: what the rooms below say of its keys is said of their own arguments.

use crate::error::Error;

/// Words of a recipe, and those of the commands that have arguments instead; the first that fits is taken, so longer ones stand
/// first.
const WORDS: [(&str, &str); 31] = [
    ("in `images` of the data entry", "as --images"),
    ("check `path` and `limit` of the data entry", "see that --data names the right file"),
    ("check `path` of the data entry", "see that --data names the right file"),
    (
        "check the sample's `image` and the `images` folder of its data entry",
        "check the sample's `image`, and --images, the folder that it is in",
    ),
    (
        "check the sample's `image` and the `images` folder of the data entry",
        "check the sample's `image`, and --images, the folder that it is in",
    ),
    (
        "raise model.max_seq_len, set model.truncate = true, or shorten the sample",
        "raise --max-seq-len, shorten the sample, or take it out of --data",
    ),
    (
        "set model.vision, or leave the pictures out of the data",
        "give --model a whole LLaVA folder, or leave the pictures out",
    ),
    (
        "name a tower in model.vision, use a whole LLaVA folder, or leave the pictures out",
        "give --model a whole LLaVA folder, or leave the pictures out",
    ),
    ("leave image_size out, or set model.vision", "give --model a whole LLaVA folder"),
    ("leave `before` out, or set model.vision", "give --model a whole LLaVA folder"),
    ("set model.vision.select_feature = \"patch\"", "the folder's config.json does not fit this projector"),
    ("set model.vision", "give --model a whole LLaVA folder"),
    ("; set model.image_token to a token that texts do not use", ""),
    ("choose another model.image_token", "use the tokenizer that belongs to the model"),
    (
        "set model.image_token to the token with the id",
        "the model's folder needs a tokenizer with the image token at the id",
    ),
    (
        "set model.image_token to a token that the tokenizer has and texts do not use",
        "the model's folder needs a tokenizer with an image token",
    ),
    (
        "point model.language.tokenizer to a folder, file or repository with a tokenizer.json",
        "put the model's tokenizer.json into its folder",
    ),
    ("point model.language.tokenizer to", "put the model's tokenizer.json into its folder, or take it from"),
    (
        "set model.language.source, or model.source to a whole LLaVA folder",
        "give --model a whole LLaVA folder or a language model's",
    ),
    ("set model.language.tokenizer to a folder with tokenizer.json", "put the model's tokenizer.json into its folder"),
    ("; or build one from parts: a tower under model.vision, a language model under model.language", ""),
    ("set grid_pinpoints to it on data entries with resize = \"anyres\"", "give it as --grid HxW with --resize anyres"),
    ("resize = \"anyres\"", "--resize anyres"),
    ("resize = \"pad\"", "--resize pad"),
    ("resize = \"crop\"", "--resize crop"),
    ("choose another `resize`", "choose another --resize"),
    ("set model.template", "choose with --template"),
    ("template = \"plain\"", "--template plain"),
    ("template = \"vicuna_v1\"", "--template vicuna_v1"),
    ("template = \"chat\"", "--template chat"),
    ("model.template", "--template"),
];

/// The parts of a model, as causes name them.
const PARTS: [(&str, &str); 3] =
    [("model.adapter: ", "--adapter: "), ("model.source: ", "--model: "), ("model.language: ", "--model: ")];

/// An error of a command without a recipe; `of_run` says whether a run was opened, whose parts have their own names.
pub fn of_command(e: Error, of_run: bool) -> Error {
    e.reworded(|text| reworded(text, of_run))
}

fn reworded(text: &str, of_run: bool) -> String {
    let parts = PARTS.iter().filter(|_| !of_run);
    WORDS.iter().chain(parts).fold(text.to_string(), |t, (recipe, own)| t.replace(recipe, own))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn sources(dir: &Path, out: &mut String) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                sources(&path, out);
            } else if path.to_str().is_some_and(|p| p.ends_with(".rs") && !p.ends_with("tests.rs")) {
                let text = std::fs::read_to_string(&path).unwrap();
                out.push_str(text.split("#[cfg(test)]\nmod tests {").next().unwrap());
            }
        }
    }

    /// Every hint below `src/data` and `src/model`, as `score` gives it: none speaks of a recipe's keys.
    #[test]
    fn no_hint_of_the_rooms_below_names_a_key_that_the_command_does_not_have() {
        let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let mut text = String::new();
        ["data", "model"].iter().for_each(|room| sources(&src.join(room), &mut text));
        // Comments and the character '"' would turn what is inside of literals into what is outside.
        let code = text.lines().filter(|l| !l.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
        let code = code.replace("'\"'", "").replace("\\\n", "").replace("\\\"", "\u{1}");
        let literals = code.split('"').skip(1).step_by(2).map(|l| l.replace('\u{1}', "\""));
        let words = [
            "model.max_seq",
            "model.truncate",
            "model.vision",
            "model.image_token",
            "model.language",
            "model.template",
            "data entry",
            "resize = \"",
        ];
        let (mut seen, mut wrong) = (0, Vec::new());
        // Tensors in files are called model.vision_tower.… too.
        let literals = literals.filter(|l| !l.starts_with("model.vision_"));
        for literal in literals.filter(|l| words.iter().any(|w| l.contains(w))) {
            let literal = literal.split_whitespace().collect::<Vec<_>>().join(" ");
            let said = reworded(&literal, false);
            if words.iter().any(|w| said.contains(w)) {
                wrong.push(format!("{literal}\n  → {said}"));
            }
            seen += 1;
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        assert!(seen > 8, "{seen}");
    }
}
