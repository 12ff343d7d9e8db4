//! Arguments that no command has, answered by what does the same: most of them are settings of a recipe, or another trainer's.

use crate::recipe::{model_key, stage_key};
use clap::error::{ContextKind, ContextValue, ErrorKind};

/// What other programs call an argument of ours, and what stands for it here.
const OTHERS: [(&[&str], &str); 9] = [
    (&["config", "recipe", "config-file", "c"], "the recipe is the first argument: adfreeze train RECIPE.toml"),
    (
        &["output", "output-dir", "out", "out-dir", "o", "save-dir"],
        "the run's folder is a setting of the recipe: --set output_dir=FOLDER",
    ),
    (
        &["resume", "resume-from-checkpoint", "checkpoint", "continue"],
        "the same command goes on from the newest checkpoint, without a flag",
    ),
    (&["gpu", "gpus", "cuda", "num-gpus"], "say where to compute with --device cuda:0"),
    (&["cpu", "no-cuda", "use-cpu"], "say where to compute with --device cpu"),
    (
        &["bf16", "fp16", "half", "precision", "mixed-precision"],
        "say the type with --dtype bf16 (or f32); fp16 is not computed",
    ),
    (&["fp32", "float32", "f32"], "say the type with --dtype f32"),
    (&["stage", "only"], "say which stages to run with --stages align,sft"),
    (&["seed"], "the seed is a setting of each stage: --set stage.NAME.seed=7"),
];

/// Commands that take a recipe and `--set`.
const WITH_RECIPE: [&str; 4] = ["train", "check", "zoo", "bench"];

/// What to say instead of clap's own words, if more is known; `args` are the command line's.
pub fn told(e: &clap::Error, args: &[String]) -> Option<String> {
    if e.kind() != ErrorKind::UnknownArgument {
        return None;
    }
    let Some(ContextValue::String(flag)) = e.get(ContextKind::InvalidArg) else { return None };
    let command = args.iter().skip(1).find(|a| !a.starts_with('-'))?;
    if !WITH_RECIPE.contains(&command.as_str()) || !flag.starts_with('-') {
        return None;
    }
    let name = flag.trim_start_matches('-').split('=').next()?;
    let other = || {
        let name = name.replace('_', "-");
        OTHERS.iter().find(|(names, _)| names.contains(&name.as_str())).map(|(_, hint)| hint.to_string())
    };
    let value = value_of(flag, args).unwrap_or_else(|| "VALUE".into());
    let key = |key: &str| match key {
        "batch" => "batch.global".to_string(),
        "checkpoint" => "checkpoint.every_steps".to_string(),
        key => key.to_string(),
    };
    let set = || {
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
    }
}
