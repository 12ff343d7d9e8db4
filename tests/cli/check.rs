//! `adfreeze check`, as a new user reads it.

use super::folder::{Folder, THREE_STAGES, golden};

#[test]
fn prints_what_will_happen_and_writes_nothing() {
    let f = Folder::with(THREE_STAGES);
    let said = f.ok(["check", "recipe.toml"]);
    println!("{}\n{}", said.stdout, said.stderr);
    let squeezed = said.stdout.split([' ', '─']).filter(|w| !w.is_empty()).collect::<Vec<_>>().join(" ");
    for part in [
        &format!("model.source {}", golden("model").display()),
        "stage align: parameters",
        "projector trains 2,112 ",
        "language.layers[0..3] frozen ",
        "adapter sft (lora) trains ",
        "backward stops above vision.encoder.layers.1\n",
        "backward stops above language.embed_tokens\n",
        "layers and projector keep of the largest micro-batch (",
        "stage sft: optimizer groups",
        "projector.* 4 2,112 1e-3 cosine, warm-up 2 steps 0",
        "default 42 ",
        "stage dpo: data",
        "steps 10",
        "pictures (all there) 6",
        "preference preference 8 6",
    ] {
        assert!(squeezed.contains(part), "`{part}` is not in:\n{squeezed}");
    }
    assert!(said.stderr.contains("the recipe can run: 3 stages, 30 steps, 0 warnings"), "{}", said.stderr);
    assert!(!f.path("run").exists());
    // Nor does it touch a run that is there.
    f.train(&["--stages", "align"]);
    let before = super::folder::figures(&f.path("run"));
    f.ok(["check", "recipe.toml", "--set", "stage.align.lr=2e-3"]);
    super::folder::assert_same(&before, &super::folder::figures(&f.path("run")));
}

/// What the table says beforehand is what a stage says as it begins, also of masters that an earlier stage has left.
#[test]
fn tells_of_every_stage_what_training_tells() {
    let table = |text: &str, title: String| -> Vec<String> {
        let lines = text.lines().skip_while(|l| *l != title).skip(1);
        lines.take_while(|l| !l.is_empty() && !l.starts_with("backward")).map(str::to_string).collect()
    };
    let lean = "stage.sft.optimizer={adamw={moments='8bit',stochastic_rounding=true}}";
    for more in [&[][..], &[lean]] {
        let sets = [
            "model.dtype='bf16'",
            "defaults.max_steps=2",
            "stage.sft.adapters=[]",
            "stage.sft.train=['projector.*','language.layers[1..].*']",
            "stage.dpo.from={stage='sft'}",
            "stage.dpo.train=['projector.*']",
            "stage.dpo.adapters=[{lora={rank=2,alpha=4,target=['language.layers[0].*_proj']}}]",
        ];
        let sets: Vec<&str> = sets.iter().chain(more).flat_map(|s| ["--set", s]).collect();
        let f = Folder::with(THREE_STAGES);
        let checked = f.ok([&["check", "recipe.toml"][..], &sets].concat()).stdout;
        let trained = f.train(&sets).stderr;
        for stage in ["align", "sft", "dpo"] {
            let told = table(&checked, format!("stage {stage}: parameters"));
            assert!(told.len() > 8, "{checked}");
            assert_eq!(told, table(&trained, format!("stage {stage}: parameters")), "{stage}");
        }
    }
}

/// The machine that checks need not be the one that trains.
#[test]
fn tells_of_another_machine() {
    let f = Folder::with(THREE_STAGES);
    let told = |more: &[&str]| f.ok(["check", "recipe.toml"].iter().chain(more)).stdout;
    let line = |text: &str| text.lines().find(|l| l.starts_with("the tables below hold for")).unwrap().to_string();
    let chosen = |text: &str| -> Vec<String> {
        text.lines().filter(|l| l.starts_with("activations: ")).map(str::to_string).collect()
    };
    let here = told(&[]);
    assert!(line(&here).contains("f32 (on a GPU it would be bf16) and this machine's free memory ("), "{here}");
    assert!(line(&here).ends_with("; --dtype bf16 --memory 80GiB tells of another machine"), "{here}");
    let there = told(&["--dtype", "bf16", "--memory", "80GiB"]);
    assert_eq!(line(&there), "the tables below hold for bf16 and 85.9 GB of free memory");
    assert!(
        chosen(&there).len() == 3 && chosen(&there).iter().all(|l| l.starts_with("activations: none (")),
        "{there}"
    );
    assert!(chosen(&there)[0].ends_with(" of 85.9 GB free)"), "{there}");
    // As the recipe itself says it, and half as much as in f32.
    let set = told(&["--set", "model.dtype=\"bf16\"", "--memory", "80GiB"]);
    assert_eq!(set, there);
    let total = |text: &str| text.lines().find(|l| l.contains("language.embed_tokens")).unwrap().to_string();
    assert_ne!(total(&here), total(&there));
    // What the weights take is not there for the layers.
    let small = told(&["--memory", "200kB"]);
    assert!(chosen(&small).iter().all(|l| l.starts_with("activations: recompute (")), "{small}");
    let none = told(&["--memory", "200kB", "--set", "defaults.activations=\"none\""]);
    assert!(chosen(&none).is_empty(), "{none}");
}

#[test]
fn warns_of_what_is_rarely_meant() {
    let f = Folder::with(THREE_STAGES);
    let said = f.ok([
        "check",
        "recipe.toml",
        "--set",
        "stage.align.train=['projector.*','language.*']",
        "--set",
        "defaults.lr_scheduler={constant={}}",
    ]);
    let high = "warning: stage.align: 30 pretrained tensors of group `default`, e.g. language.embed_tokens.weight, get a learning rate of 1e-3";
    assert!(said.stderr.contains(high), "{}", said.stderr);
    assert!(said.stderr.contains("warning: stage.sft: 42 new tensors"), "{}", said.stderr);
    // The projector is loaded, and DPO goes on with the adapter of SFT: nothing there is new.
    assert!(!said.stderr.contains("stage.align: 4 new") && !said.stderr.contains("stage.dpo"), "{}", said.stderr);
}

/// New is what began with random values and no stage on the way has trained, wherever that stage stands.
#[test]
fn knows_what_is_new_in_a_later_stage() {
    let stage = |name: &str, train: &str, lr: &str| {
        let data = r#"[{ path = "${GOLDEN}/data/plain.json", images = "${GOLDEN}/images", template = "plain" }]"#;
        format!("[stage.{name}]\ntrain = {train}\ndata = {data}\nlr = {lr}\n")
    };
    let tower = r#"["!vision.post_layernorm.*", "vision.*", "projector.*"]"#;
    let f = Folder::with(&format!(
        "stages = ['text', 'tower', 'again']\noutput_dir = 'run'\n\
         [model]\nprojector = {{ mlp = {{}} }}\nlanguage = {{ source = '${{GOLDEN}}/language' }}\n\
         [model.vision]\nselect_layer = -1\n[model.vision.init]\nhidden_size = 16\nintermediate_size = 32\n\
         num_hidden_layers = 2\nnum_attention_heads = 2\nimage_size = 24\npatch_size = 12\n\
         [defaults]\nbatch = {{ global = 2 }}\nmax_steps = 1\nlr_scheduler = {{ constant = {{}} }}\n{}{}{}",
        stage("text", r#"["language.layers.*"]"#, "1e-5"),
        stage("tower", tower, "1e-3"),
        stage("again", tower, "1e-5"),
    ));
    let said = f.ok(["check", "recipe.toml"]);
    let warnings: Vec<&str> = said.stderr.lines().filter(|l| l.starts_with("warning: ")).collect();
    let new = "warning: stage.tower: 41 new tensors, e.g. projector.linear_1.bias, get no warm-up";
    assert!(warnings.len() == 1 && warnings[0].starts_with(new), "{}", said.stderr);
    f.train(&[]);
}

/// As `adfreeze check recipe.toml | head -n 0`: the reader goes away before a line is written.
#[cfg(unix)]
#[test]
fn a_reader_that_goes_away_is_no_error() {
    let f = Folder::with(THREE_STAGES);
    let mut child = f.adfreeze(["check", "recipe.toml"]);
    let mut child = child.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let said = super::folder::said(child.wait_with_output().unwrap());
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    assert!(said.stderr.contains("the recipe can run") && !said.stderr.contains("error"), "{}", said.stderr);
}

#[test]
fn names_the_problems_of_all_stages_together() {
    let f = Folder::with(THREE_STAGES);
    f.write(
        "gone.jsonl",
        r#"{"id": "s", "image": "gone.png", "conversations": [{"from": "human", "value": "<image>"}]}"#,
    );
    let gone = "[{path='gone.jsonl'}]";
    let e = f.fails(
        &[
            "check",
            "recipe.toml",
            "--set",
            "stage.align.train=['nothing']",
            "--set",
            &format!("eval.captions.data={gone}"),
        ],
        &["2 problems:", "stage.align: train: ", "`nothing`", "eval.captions: ", "gone.jsonl"],
    );
    assert!(e.matches("hint: ").count() >= 3, "{e}");
}
