//! Arguments that no command has, answered by what does the same: most of them are settings of a recipe, or another trainer's.

use crate::recipe::{model_key, stage_key};
use clap::CommandFactory;
use clap::error::{ContextKind, ContextValue, ErrorKind};

/// What other programs call an argument of ours, what stands for it here, and the argument that a command must have for that to be
/// true of it.
const OTHERS: [(&[&str], &str, &str); 10] = [
    (
        &["config", "recipe", "config-file", "c"],
        "the recipe is the first argument, without a flag: adfreeze {command} RECIPE.toml",
        "recipe",
    ),
    (&["output", "output-dir", "out-dir", "o", "save-dir"], "say the folder of all runs with --out FOLDER", "out"),
    (
        &["output", "output-dir", "out", "out-dir", "o", "save-dir"],
        "the run's folder is a setting of the recipe: --set output_dir=FOLDER",
        "sets",
    ),
    (
        &["resume", "resume-from-checkpoint", "checkpoint", "continue"],
        "the same command goes on from the newest checkpoint, without a flag",
        "allow_changes",
    ),
    (&["gpu", "gpus", "cuda", "num-gpus"], "say where to compute with --device cuda:0", "device"),
    (&["cpu", "no-cuda", "use-cpu"], "say where to compute with --device cpu", "device"),
    (
        &["bf16", "fp16", "half", "precision", "mixed-precision"],
        "say the type with --dtype bf16 (or f32); fp16 is not computed",
        "dtype",
    ),
    (&["fp32", "float32", "f32"], "say the type with --dtype f32", "dtype"),
    (&["stage", "only"], "say which stages to run with --stages align,sft", "stages"),
    (&["seed"], "the seed is a setting of each stage: --set stage.NAME.seed=7", "sets"),
];

/// The command of a command line by its words, e.g. `bench zoo`, and its arguments.
fn command(args: &[String]) -> (String, clap::Command) {
    let (mut words, mut at) = (Vec::new(), super::Args::command());
    for word in args.iter().skip(1) {
        if let Some(next) = at.find_subcommand(word).cloned() {
            (at, _) = (next, words.push(word.as_str()));
        }
    }
    (words.join(" "), at)
}

/// What to say instead of clap's own words, if more is known; `args` are the command line's.
pub fn told(e: &clap::Error, args: &[String]) -> Option<String> {
    if e.kind() != ErrorKind::UnknownArgument {
        return None;
    }
    let Some(ContextValue::String(flag)) = e.get(ContextKind::InvalidArg) else { return None };
    let (command, known) = command(args);
    let has = |id: &str| known.get_arguments().any(|a| a.get_id() == id);
    if !has("recipe") || !flag.starts_with('-') {
        return None;
    }
    let name = flag.trim_start_matches('-').split('=').next()?;
    let other = || {
        let name = name.replace('_', "-");
        let found = OTHERS.iter().find(|(names, _, needs)| names.contains(&name.as_str()) && has(needs));
        found.map(|(_, hint, _)| hint.replace("{command}", &command))
    };
    let value = value_of(flag, args).unwrap_or_else(|| "VALUE".into());
    let key = |key: &str| match key {
        "batch" => "batch.global".to_string(),
        "checkpoint" => "checkpoint.every_steps".to_string(),
        key => key.to_string(),
    };
    let set = || {
        if !has("sets") {
            return None;
        }
        if let Some(k) = stage_key(name) {
            let stage = stage(args).unwrap_or_else(|| "NAME".into());
            return Some(format!("it is a setting of a stage of the recipe: --set stage.{stage}.{}={value}", key(&k)));
        }
        let hint = format!("it is a setting of the recipe: --set model.{}={value}", model_key(name)?);
        Some(hint)
    };
    let hint = other().or_else(set)?;
    Some(format!("error: `adfreeze {command}` has no {}\n\nhint: {hint}", flag.split('=').next()?))
}

/// What stands behind a flag on the command line.
fn value_of(flag: &str, args: &[String]) -> Option<String> {
    let name = flag.split('=').next()?;
    let at = args.iter().position(|a| a == name || a.starts_with(&format!("{name}=")))?;
    let value = args[at].split_once('=').map(|(_, v)| v.to_string());
    value.or_else(|| args.get(at + 1).filter(|v| !v.starts_with('-')).cloned())
}

/// The last stage of the recipe on the command line that is no preference training, as the one most often meant.
fn stage(args: &[String]) -> Option<String> {
    let path = args.iter().skip(2).find(|a| a.ends_with(".toml"))?;
    let recipe = crate::recipe::load(std::path::Path::new(path), &[]).ok()?;
    let sft = |s: &&String| recipe.stage[*s].objective == crate::spec::Objective::Sft;
    recipe.stages.iter().rev().find(sft).or(recipe.stages.last()).cloned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn said(line: &str) -> Option<String> {
        let args: Vec<String> = line.split(' ').map(str::to_string).collect();
        told(&super::super::Args::try_parse_from(&args).unwrap_err(), &args)
    }

    #[test]
    fn settings_of_a_recipe_and_other_trainers_flags() {
        for (line, hint) in [
            ("adfreeze train r.toml --lr 1e-4", "--set stage.NAME.lr=1e-4"),
            ("adfreeze train r.toml --learning_rate=1e-4", "--set stage.NAME.lr=1e-4"),
            ("adfreeze train r.toml --batch-size 4", "--set stage.NAME.batch.global=4"),
            ("adfreeze check r.toml --max-seq-len 99", "--set model.max_seq_len=99"),
            ("adfreeze train --epochs 3 r.toml", "--set stage.NAME.epochs=3"),
            ("adfreeze train --config r.toml", "adfreeze train RECIPE.toml"),
            ("adfreeze bench zoo --config r.toml", "adfreeze bench zoo RECIPE.toml"),
            ("adfreeze bench zoo --output-dir x", "--out FOLDER"),
            ("adfreeze train r.toml --output-dir x", "--set output_dir=FOLDER"),
            ("adfreeze train r.toml --resume", "the same command goes on"),
            ("adfreeze train r.toml --fp16", "--dtype bf16"),
            ("adfreeze bench zoo r.toml --lr 1", "--set stage.NAME.lr=1"),
        ] {
            let text = said(line).expect(line);
            assert!(text.contains(hint) && text.contains("\n\nhint: "), "{line}: {text}");
        }
        assert_eq!(said("adfreeze train r.toml --nonsense"), None);
        assert_eq!(said("adfreeze generate --lr 3"), None);
        // What the command cannot do is not advised.
        for line in [
            "adfreeze check r.toml --stage sft",
            "adfreeze check r.toml --gpu 0",
            "adfreeze check r.toml --resume",
            "adfreeze bench step --preset tiny --seed 3",
            "adfreeze bench kernels --lr 3",
            "adfreeze bench step --preset tiny --output x",
        ] {
            assert_eq!(said(line), None, "{line}");
        }
        let text = said("adfreeze check r.toml --fp16").expect("check has --dtype");
        assert!(text.contains("`adfreeze check` has no --fp16") && text.contains("--dtype bf16"), "{text}");
    }
}
