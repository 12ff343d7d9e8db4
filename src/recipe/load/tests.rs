mod shipped_tests;

use super::*;
use crate::spec::*;

const MODEL: &str = "[model]\nlanguage = { source = 'lm' }\nvision = { source = 'tower' }\nprojector = { mlp = {} }\n";
const STAGES: &str = "[stage.align]\ntrain = ['projector.*']\ndata = [{ path = 'a.json' }]\nbatch = { global = 8 }\nlr = 1e-3\n\
     [stage.sft]\nadapters = [{ lora = { rank = 4, alpha = 8, target = ['language.*'] } }]\ndata = [{ path = 'b.json' }]\nbatch = { global = 8, micro = 4 }\nlr = 2e-4\n";

fn good() -> String {
    format!("stages = ['align', 'sft']\noutput_dir = 'runs/x'\n{MODEL}{STAGES}")
}

/// Loads `text` as `recipe.toml` in a folder that also has `files`.
fn load_text(text: &str, files: &[(&str, &str)], sets: &[&str]) -> Result<Recipe> {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files.iter().chain([&("recipe.toml", text)]) {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
    let env = |name: &str| (name == "DATA").then(|| "/data".to_string());
    let dir_name = format!("{}/", dir.path().display());
    load_with(&dir.path().join("recipe.toml"), &sets, &env).map_err(|e| {
        let short = |s: &str| s.replace(&dir_name, "");
        let shown = Error::new(short(&e.to_string()));
        match e.hint_text() {
            Some(h) => shown.hint(short(h)),
            None => shown,
        }
    })
}

/// What a user reads when `from` in the good recipe is replaced by `to`.
fn message(from: &str, to: &str) -> String {
    let text = good();
    assert!(text.contains(from), "{from}");
    load_text(&text.replacen(from, to, 1), &[], &[]).unwrap_err().report()
}

fn setting(set: &str) -> String {
    load_text(&good(), &[], &[set]).unwrap_err().report()
}

#[test]
fn a_small_recipe() {
    let r = load_text(&good(), &[], &[]).unwrap();
    assert_eq!(r.stages, ["align", "sft"]);
    assert_eq!(r.stage["align"].lr, 1e-3);
    assert_eq!(r.stage["align"].batch, Batch { global: 8, micro: None, group_by: GroupBy::None });
    assert_eq!(r.stage["sft"].optimizer, Optimizer::default());
}

#[test]
fn base_file_sets_and_defaults_in_their_order() {
    let base = format!(
        "output_dir = 'base'\n{MODEL}[defaults]\nseed = 1\nmax_grad_norm = 2.0\noptimizer = {{ adamw = {{ eps = 1e-7 }} }}\n"
    );
    let text = format!(
        "extends = 'base.toml'\nstages = ['align', 'sft']\n[model]\nprojector = {{ linear = {{}} }}\n[defaults]\nseed = 2\n{STAGES}"
    );
    let sets = [
        "stage.sft.optimizer.adamw.weight_decay=0.1",
        "defaults.seed=3",
        "stage.align.seed=4",
        "output_dir=/scratch/a=b",
    ];
    let r = load_text(&text, &[("base.toml", &base)], &sets).unwrap();
    assert_eq!(r.model.projector, Some(Projector::Linear(LinearProjector { source: None, input_norm: false })));
    assert_eq!(r.model.language.unwrap().source.unwrap(), "lm");
    assert_eq!((r.stage["align"].seed, r.stage["sft"].seed), (4, 3));
    assert_eq!(r.stage["sft"].max_grad_norm, 2.0);
    let Optimizer::Adamw(o) = &r.stage["sft"].optimizer;
    assert_eq!((o.eps, o.weight_decay), (1e-7, 0.1), "inherited, then set inside");
    assert_eq!(r.output_dir, Path::new("/scratch/a=b"));
}

#[test]
fn variables() {
    let text = good().replacen("'a.json'", "'${DATA}/a.json'", 1).replacen("'b.json'", "'${RECIPE_DIR}/$${b}.json'", 1);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("recipe.toml");
    std::fs::write(&path, text).unwrap();
    let r = load_with(&path, &["output_dir=${RECIPE_DIR}/run".into()], &|_| Some("/data".into())).unwrap();
    assert_eq!(r.stage["align"].data[0].path, Path::new("/data/a.json"));
    assert_eq!(r.stage["sft"].data[0].path, dir.path().join("${b}.json"));
    assert_eq!(r.output_dir, dir.path().join("run"));
}

#[test]
fn the_resolved_recipe_reads_back_the_same() {
    let text = good().replacen("'b.json'", "'$${b}.json'", 1);
    let init = "language = { init = { hidden_size = 8, rope_theta = 1e4, names = ['a'] }, tokenizer = 't' }";
    let text = text.replacen("language = { source = 'lm' }", init, 1);
    let r =
        load_text(&text, &[], &["stage.align.lr=0.1", "stage.sft.lr=2e-5", "stage.sft.objective={dpo={}}"]).unwrap();
    let saved = to_toml(&r).unwrap();
    assert_eq!(load_text(&saved, &[], &[]).unwrap(), r, "{saved}");
}

#[test]
fn unknown_keys_have_their_whole_path_and_the_nearest_name() {
    assert_eq!(
        message("rank = 4", "rnk = 4"),
        "recipe.toml: stage.sft.adapters[0].lora.rnk: unknown key\n\n\
         hint: did you mean `rank`? known: `name`, `rank`, `alpha`, `dropout`, `target`, `rslora`, `dora`, `lr_ratio`, `freeze`"
    );
    assert!(
        message("[model]", "[modle]").starts_with("recipe.toml: modle: unknown key\n\nhint: did you mean `model`?")
    );
    assert!(
        message("lora =", "loar =")
            .contains("stage.sft.adapters[0]: unknown value `loar`\n\nhint: did you mean `lora`?")
    );
    assert!(message("lr ", "lerning_rate ").contains("lerning_rate: unknown key\n\nhint: did you mean `lr`?"));
    assert!(message("lr ", "momentum ").contains("momentum: unknown key\n\nhint: known: "));
    assert!(message("mlp =", "mpl =").contains("model.projector: unknown value `mpl`\n\nhint: did you mean `mlp`?"));
    let e = message("lr = 1e-3", "lr = 1e-3\nactivations = 'recompute_all'");
    assert!(
        e.contains("stage.align.activations: unknown value `recompute_all`\n\nhint: did you mean `recompute`?"),
        "{e}"
    );
    assert_eq!(
        setting("stage.sft.batch.mirco=2"),
        "--set stage.sft.batch.mirco=2: stage.sft.batch.mirco: unknown key\n\n\
         hint: did you mean `micro`? known: `global`, `micro`, `group_by`"
    );
    let moved = setting("model.language.dtype='bf16'");
    assert!(moved.ends_with("model.language.dtype: unknown key\n\nhint: it is `model.dtype` now"), "{moved}");
}

#[test]
fn a_setting_is_named_when_it_is_to_blame() {
    let blamed = |sets: &[&str]| load_text(&good(), &[], sets).unwrap_err().cause().to_string();
    assert_eq!(
        blamed(&["stage.sft.adapters[0].lora.rnk=8", "stage.sft.seed=3"]),
        "--set stage.sft.adapters[0].lora.rnk=8: stage.sft.adapters[0].lora.rnk: unknown key"
    );
    assert!(blamed(&["defaults.seed=x"]).starts_with("--set defaults.seed=x: defaults.seed: is the text \"x\""));
}

#[test]
fn an_inherited_key_is_named_where_it_was_written() {
    let base = format!("{MODEL}[defaults]\nsede = 1\n");
    let text = format!("extends = 'base.toml'\nstages = ['align', 'sft']\noutput_dir = 'x'\n{STAGES}");
    let e = load_text(&text, &[("base.toml", &base)], &[]).unwrap_err();
    assert_eq!(e.cause(), "base.toml: defaults.sede: unknown key");
    assert!(e.hint_text().unwrap().starts_with("did you mean `seed`?"));
}

#[test]
fn stages_and_their_sections_must_agree() {
    let e = setting("stages=[\"align\", \"stf\"]");
    assert_eq!(e, "recipe.toml: stages: there is no [stage.stf]\n\nhint: did you mean `sft`? known: `align`, `sft`");
    let e = setting("stage.stf.lr=1");
    assert!(e.starts_with("recipe.toml: stage.stf: not listed in `stages`\n\nhint: did you mean `sft`?"), "{e}");
    assert!(setting("stages=[]").contains("stage.align: not listed"));
    assert!(setting("stages=[\"align\", \"sft\", \"sft\"]").contains("listed twice"));
    let e = message("stages = ['align', 'sft']", "stages = { align = 1 }");
    assert!(
        e.contains(
            "recipe.toml: stages: is a section of keys and values, and must be a list\n\nhint: `stages` is the list"
        ),
        "{e}"
    );
}

#[test]
fn types_and_choices() {
    assert_eq!(
        setting("stage.sft.lr=fast"),
        "--set stage.sft.lr=fast: stage.sft.lr: is the text \"fast\", and must be a number\n\nhint: e.g. lr = 1e-4"
    );
    let e = setting("stage.sft.lr_scheduler=cosine");
    assert!(e.contains("stage.sft.lr_scheduler: ") && e.contains("write { cosine = { … } }"), "{e}");
    let e = setting("model.projector.linear.input_norm=true");
    assert!(
        e.contains("model.projector: ") && e.contains("exactly one choice goes in here, found `mlp`, `linear`"),
        "{e}"
    );
    let e = message("lr = 1e-3\n", "");
    assert_eq!(
        e,
        "recipe.toml: stage.align.lr is missing\n\nhint: add `lr = …` to [stage.align], or to [defaults] for every stage"
    );
    assert!(
        message("output_dir = 'runs/x'\n", "").contains("output_dir is missing\n\nhint: add `output_dir` at the top")
    );
    assert!(message("rank = 4, ", "").contains("stage.sft.adapters[0].lora.rank is missing"));
}

/// Keys that stand a section too high or too low are sent where they belong, and a value of the wrong form is answered with its
/// form.
#[test]
fn keys_and_values_in_the_wrong_place_or_form() {
    let cases = [
        ("lr=1e-4", "--set lr=1e-4: lr: unknown key", "`lr` belongs to a stage: `stage.align.lr` or `stage.sft.lr`"),
        ("learning_rate=1e-4", "learning_rate: unknown key", "`lr` belongs to a stage: `stage.align.lr`"),
        ("batch.global=4", "batch.global=4: batch: unknown key", "`stage.sft.batch`"),
        ("sft.lr=1", "--set sft.lr=1: sft: unknown key", "a stage's section is [stage.sft]"),
        ("max_seq_len=4", "max_seq_len: unknown key", "it is `model.max_seq_len`"),
        ("stage.sft.template=plain", "stage.sft.template: unknown key", "it is `model.template`, the same for all"),
        ("stage.lr=1", "recipe.toml: stage.lr: is a number, not a stage", "`stage.align.lr` or `stage.sft.lr`"),
        ("stage.sft.batch=4", "stage.sft.batch: is 4, and must be", "batch = { global = 4, micro = 2 }"),
        (
            "stage.sft.batch=[4]",
            "stage.sft.batch: is a list, and must be a section",
            "batch = { global = 4, micro = 2 }",
        ),
        ("defaults.checkpoint=[2,3]", "defaults.checkpoint: is a list", "{ every_steps = 500, keep = 3 }"),
        ("stage.sft.batch={global=[4]}", "stage.sft.batch.global: is a list, and must be a whole number", "recipes/"),
        ("stage.sft.checkpoint=[2,3]", "stage.sft.checkpoint: is a list", "{ every_steps = 500, keep = 3 }"),
        ("stage.sft.from=[\"align\",\"continue\"]", "stage.sft.from: is a list", "{ stage = \"sft\""),
        ("stage.sft.objective={dpo=[0.1]}", "stage.sft.objective.dpo: is a list", "dpo = { beta = 0.1"),
        ("stage.sft.data=[[\"b.json\"]]", "stage.sft.data[0]: is a list", "[{ path = "),
        ("stage.sft.adapters=[{lora=[4,8]}]", "adapters[0].lora: is a list, and must be", "lora = { rank = 16"),
        ("stage.sft.adapters=[[\"lora\"]]", "adapters[0]: must be one of its choices", "[{ lora = {"),
        ("stage.sft.optimizer={adamw=[0.9]}", "optimizer.adamw: is a list", "adamw = { betas"),
        ("stage.sft.optimizer=[\"adamw\"]", "optimizer: must be one of its choices", "{ adamw = {"),
        ("stage.sft.lr_scheduler={cosine=[2]}", "cosine: is a list", "cosine = { warmup_ratio"),
        ("model.vision=[\"clip\"]", "model.vision: is a list", "vision = { source ="),
        ("model.projector={mlp=[2]}", "model.projector.mlp: is a list", "mlp = { depth = 2"),
        ("model.projector={linear=[]}", "model.projector.linear: is a list", "linear = { input_norm = true }"),
        ("model=[\"x\"]", "model: is a list", "recipes/"),
        ("eval={a=[\"loss\",[]]}", "eval.a: is a list", "recipes/"),
        ("stage.sft.batch=many", "stage.sft.batch: is the text", "batch = { global = 4, micro = 2 }"),
        ("stage.sft.checkpoint=100", "stage.sft.checkpoint: is 100", "{ every_steps = 100, keep = 3 }"),
        ("stage.sft.data=b.json", "stage.sft.data: is the text \"b.json\", and must be a list", "path = "),
        ("stage.sft.data=[\"b.json\"]", "stage.sft.data[0]: is the text", "[{ path = "),
        ("stage.sft.train=projector", "stage.sft.train: is the text", "[\"projector.*\"]"),
        ("stage.sft.adapters={lora={rank=1}}", "stage.sft.adapters: is a section", "[{ lora = {"),
        ("stage.sft.adapters[0].lora.rank=4.5", "rank: is 4.5, and must be a whole number", "recipes/"),
        ("model.vision=clip", "model.vision: is the text \"clip\"", "vision = { source ="),
        ("model.max_seq_len=\"long\"", "max_seq_len: is the text \"long\", and must be a whole number", "form"),
        ("output_dir=3", "output_dir: is 3, and must be", "output_dir = \"3\""),
        ("stage.sft.optimizer=adamw", "stage.sft.optimizer: ", "write { adamw = { … } }"),
        ("stage.sft.optimizer={}", "stage.sft.optimizer: ", "exactly one choice goes in here, found none"),
        ("stage.sft.optimizer=3", "stage.sft.optimizer: ", "{ adamw = {"),
        ("stage.sft.lr_scheduler={cosine=3}", "stage.sft.lr_scheduler", "warmup_ratio"),
        ("stage.sft.from=align", "stage.sft.from: is the text", "{ stage = \"sft\""),
        ("model.truncate=yes", "truncate: is the text \"yes\", and must be true or false", "recipes/"),
        ("stage.sft=3", "stage.sft: is a number, not a stage", "stage"),
        ("model=tiny", "model: ", "recipes/"),
    ];
    let mut wrong = Vec::new();
    for (set, cause, hint) in cases {
        let said = load_text(&good(), &[], &[set]).expect_err(set).report();
        let words = ["struct", "enum", "variant", "f64", "usize", "sequence", "map", "expected", "untagged", "tuple"];
        let right = said.split_once("\n\nhint: ").is_some_and(|(c, h)| c.contains(cause) && h.contains(hint));
        if !right || words.iter().any(|name| said.contains(name)) {
            wrong.push(format!("{set}\n{said}\n"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A recipe's path that is almost right is answered with the right one.
#[test]
fn misspelt_recipes() {
    let dir = tempfile::tempdir().unwrap();
    let at = |p: &str| dir.path().join(p);
    std::fs::create_dir_all(at("recipes")).unwrap();
    std::fs::create_dir_all(at("run")).unwrap();
    std::fs::write(at("recipes/quick.toml"), "").unwrap();
    std::fs::write(at("run/recipe.toml"), "").unwrap();
    for (wrong, right) in [
        ("recipes/qick.toml", "recipes/quick.toml"),
        ("recipes/quick", "recipes/quick.toml"),
        ("quick", "recipes/quick.toml"),
        ("quick.toml", "recipes/quick.toml"),
        ("run", "run/recipe.toml"),
    ] {
        let e = load(&at(wrong), &[]).unwrap_err();
        let hint = e.hint_text().unwrap();
        assert!(hint.starts_with(&format!("did you mean {}?", at(right).display())), "{wrong}: {hint}");
    }
    std::fs::write(at("wide.toml"), [0xff, 0xfe, b'a', 0]).unwrap();
    assert!(load(&at("wide.toml"), &[]).unwrap_err().cause().ends_with("written in UTF-16: save it as UTF-8"));
    std::fs::write(at("latin.toml"), b"a = 1\n# caf\xe9").unwrap();
    assert!(load(&at("latin.toml"), &[]).unwrap_err().cause().ends_with("line 2 is not UTF-8 text"));
}

#[test]
fn files() {
    let e = load_text("lr = ", &[], &[]).unwrap_err();
    assert!(e.cause().starts_with("recipe.toml: not valid TOML: TOML parse error at line 1"), "{e}");
    let e = load_text("extends = 'nope.toml'", &[], &[]).unwrap_err();
    assert!(e.cause().starts_with("nope.toml: the recipe cannot be read"), "{e}");
    assert!(e.hint_text().unwrap().contains("recipe.toml extends it"), "{}", e.report());
    let e = load_text("extends = 'b.toml'", &[("b.toml", "extends = 'recipe.toml'")], &[]).unwrap_err();
    assert!(e.cause().contains("extends itself"), "{e}");
    let e = load_text("extends = 3", &[], &[]).unwrap_err();
    assert_eq!(e.cause(), "recipe.toml: extends: is a number, not a path");
    let e = load(Path::new("no/such/recipe.toml"), &[]).unwrap_err();
    assert!(e.report().contains("hint: give the path of a recipe"), "{}", e.report());
}

/// Each value that breaks a rule, and the words that its message must have.
#[test]
fn rules_between_values() {
    let dpo = "stage.sft.objective={dpo={";
    let cases = [
        ("stage.sft.batch.micro=3".to_string(), "stage.sft: batch: micro = 3 does not divide global = 8", "micro = 2"),
        ("stage.sft.batch.micro=0".into(), "stage.sft: batch: global = 8, micro = 0", "at least 1"),
        ("stage.sft.lr=nan".into(), "stage.sft: lr = NaN is not a number above 0", "train"),
        ("stage.sft.lr=0.0".into(), "stage.sft: lr = 0", "train"),
        ("stage.sft.epochs=-1".into(), "stage.sft: epochs = -1", "passes"),
        ("stage.sft.max_steps=0".into(), "max_steps = 0", "epochs"),
        ("stage.sft.max_grad_norm=inf".into(), "max_grad_norm = inf", "no clipping"),
        ("stage.sft.checkpoint={keep=0}".into(), "checkpoint: keep = 0", "last one"),
        ("stage.sft.lr_scheduler={cosine={warmup_ratio=3}}".into(), "warmup_ratio = 3", "warmup_steps"),
        ("stage.sft.lr_scheduler={linear={warmup_ratio=0.1,warmup_steps=3}}".into(), "both warmup_ratio", "keep one"),
        ("stage.sft.optimizer={adamw={betas=[0.9,1.0]}}".into(), "betas has 1", "below 1"),
        ("stage.sft.optimizer={adamw={eps=0.0}}".into(), "optimizer.adamw: eps = 0", "1e-8"),
        ("stage.sft.optimizer={adamw={weight_decay=-0.1}}".into(), "weight_decay = -0.1", "0 or above"),
        ("stage.sft.param_groups=[{match=[]}]".into(), "param_groups[0]: match is empty", "patterns"),
        ("stage.sft.param_groups=[{match=['*']}]".into(), "param_groups[0]: neither lr", "different"),
        ("stage.sft.param_groups=[{match=['*'],lr=-1}]".into(), "param_groups[0]: lr = -1", "train"),
        ("stage.sft.data=[]".into(), "stage.sft: data: empty", "path"),
        ("stage.sft.data=[{path='x',limit=0}]".into(), "data[0]: limit = 0", "every sample"),
        ("stage.sft.adapters[0].lora.rank=0".into(), "adapters[0].lora: rank = 0", "rank = 16"),
        ("stage.sft.adapters[0].lora.dropout=1.0".into(), "adapters[0].lora: dropout = 1", "below 1"),
        ("stage.sft.adapters[0].lora.target=[]".into(), "target is empty", "self_attn"),
        (
            "stage.sft.adapters[0].lora.lr_ratio=0.0".into(),
            "adapters[0].lora: lr_ratio = 0 is not a number above 0",
            "learning rates of A",
        ),
        ("stage.sft.adapters[0].lora.lr_ratio=-2".into(), "lr_ratio = -2 is not a number above 0", "e.g. 16"),
        ("stage.sft.adapters[0].lora.lr_ratio=inf".into(), "lr_ratio = inf is not a number above 0", "leave it out"),
        ("stage.sft.adapters[0].lora.name=a.b".into(), "adapters[0].lora.name: `a.b` cannot be a name", "letters"),
        (
            "stage.align.adapters=[{lora={name='sft',rank=1,alpha=1,target=['*']}}]".into(),
            "`sft` is taken in stage `align`",
            "own",
        ),
        ("stage.sft.adapters=[]".into(), "stage.sft: nothing is trained", "continue"),
        ("stage.sft.adapters[0].lora.freeze=true".into(), "stage.sft: nothing is trained", "continue"),
        ("stage.sft.from={stage='algin'}".into(), "stage.sft: from: there is no stage `algin`", "`align`"),
        ("stage.align.from={stage='sft'}".into(), "stage.align: from: `sft` does not run before", "order"),
        ("stage.sft.from={stage='align',adapters='merge'}".into(), "from: `align` has no adapters", "declare"),
        (format!("{dpo}beta=0}}}}"), "objective.dpo: beta = 0", "0.1"),
        (format!("{dpo}label_smoothing=0.1}}}}"), "robust loss alone", "robust"),
        (format!("{dpo}loss='robust',label_smoothing=0.5}}}}"), "label_smoothing = 0.5", "below 0.5"),
        ("stage.align.objective={dpo={reference='base'}}".into(), "adapters off, and there are none", "start"),
        ("stage.sft.eval=['held']".into(), "stage.sft: eval[0]: there is no [eval.held]", "nothing to choose"),
        ("eval.held={metric='loss',data=[]}".into(), "eval.held: data: empty", "path"),
        ("synth.s={kind='shapes',out='x',n=0}".into(), "synth.s: n = 0", "how many"),
        ("model.max_seq_len=0".into(), "model: max_seq_len = 0", "2048"),
        ("model.image_token=\"\"".into(), "model: image_token: empty", "<image>"),
        ("model.projector={mlp={depth=0}}".into(), "model: projector: mlp: depth = 0", "depth = 2"),
        ("model.projector={bottleneck={dim=0}}".into(), "model: projector: bottleneck: dim = 0", "width"),
        ("model.projector={bottleneck={dim=8,dropout=1}}".into(), "bottleneck: dropout = 1", "below 1"),
        ("model.projector={pixel_shuffle={factor=0}}".into(), "projector: pixel_shuffle: factor = 0", "quarter"),
        (
            "model.projector={pixel_shuffle={then={mlp={hidden=0}}}}".into(),
            "projector: pixel_shuffle: then: mlp: hidden = 0",
            "leave it out",
        ),
        ("model.projector={perceiver={depth=0}}".into(), "projector: perceiver: depth = 0", "default"),
        ("model.projector={perceiver={kv_heads=3}}".into(), "kv_heads = 3 does not divide heads = 16", "Idefics2"),
        ("model.projector={perceiver={norm_eps=0}}".into(), "perceiver: norm_eps = 0", "1e-6"),
        ("model.projector={qformer={cross_every=0}}".into(), "projector: qformer: cross_every = 0", "default"),
        ("model.projector={qformer={width=20}}".into(), "qformer: heads = 12 does not divide width = 20", "768"),
        ("model.projector={qformer={dropout=1}}".into(), "qformer: dropout = 1", "below 1"),
        ("model.projector={qformer={fresh=['query_tokens']}}".into(), "`fresh` without `source`", "leave `fresh` out"),
        ("model.vision.init={hidden_size=8}".into(), "model: vision: both `source` and `init`", "keep one"),
        ("model.vision={}".into(), "model: vision: neither `source` nor `init`", "owner/name"),
        ("model.language={init={hidden_size=8}}".into(), "model: language: `init` has no tokenizer", "tokenizer ="),
        ("output_dir=".into(), "output_dir: empty", "runs/first"),
    ];
    for (set, cause, hint) in cases {
        let e = load_text(&good(), &[], &[&set]).expect_err(&set);
        assert!(e.cause().starts_with("recipe.toml: ") && e.cause().contains(cause), "{set} says: {e}");
        assert!(e.hint_text().is_some_and(|h| h.contains(hint)), "{set} hints: {}", e.report());
    }
}

#[test]
fn parts_of_a_model() {
    let e = message("projector = { mlp = {} }\n", "");
    assert!(e.starts_with("recipe.toml: model: `vision` without `projector`"), "{e}");
    let text = good().replacen("language = { source = 'lm' }\n", "", 1);
    let e = load_text(&text, &[], &[]).unwrap_err();
    assert!(e.cause().contains("model: no language model"), "{e}");
    assert!(load_text(&text, &[], &["model.source=llava"]).is_ok(), "a whole LLaVA model brings its own");
}

#[test]
fn the_adapter_that_the_model_brings_keeps_its_name() {
    let lora = |name: &str| format!("stage.sft.adapters=[{{lora={{{name}rank=1,alpha=1,target=['*']}}}}]");
    let named = good().replace("sft", "start");
    let e = load_text(&named, &[], &["model.adapter=lora"]).unwrap_err();
    assert_eq!(
        e.report(),
        "recipe.toml: stage.start: adapters[0].lora: the name `start` is taken by `model.adapter`\n\n\
         hint: give the adapter its own `name`"
    );
    let e = load_text(&good(), &[], &["model.adapter=lora", &lora("name='start',")]).unwrap_err();
    assert!(e.cause().contains("stage.sft: adapters[0].lora: the name `start` is taken by `model.adapter`"), "{e}");
    assert!(load_text(&named, &[], &[]).is_ok(), "without it the name is free");
    assert!(load_text(&named, &[], &["model.adapter=lora", &lora("name='own',").replace("sft", "start")]).is_ok());
}

#[test]
fn adapters_are_followed_through_the_stages() {
    let third = "[stage.dpo]\nfrom = { stage = 'sft', adapters = 'continue' }\nobjective = { dpo = { reference = 'base' } }\n\
         data = [{ path = 'c' }]\nbatch = { global = 2 }\nlr = 1e-6\n";
    let text = format!("{}{third}", good()).replacen("['align', 'sft']", "['align', 'sft', 'dpo']", 1);
    assert!(load_text(&text, &[], &[]).is_ok());
    let e = load_text(&text, &[], &["stage.dpo.train=['projector.*']"]).unwrap_err();
    assert!(e.cause().contains("would move with the parameters in `train`"), "{e}");
    let e = load_text(&text, &[], &["stage.dpo.from={stage='align'}"]).unwrap_err();
    assert!(e.cause().contains("stage.dpo: nothing is trained"), "{e}");
}
