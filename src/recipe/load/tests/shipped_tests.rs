//! The recipes of the repository have the values that they are known for.

use super::*;
use crate::spec::pattern::Patterns;

#[test]
fn every_recipe_of_the_repository_parses() {
    fn collect(dir: &Path, out: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(&path, out);
            } else if path.extension().is_some_and(|e| e == "toml") {
                out.push(path);
            }
        }
    }
    let mut files = Vec::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
    collect(&root, &mut files);
    files.sort();
    let mut recipes = 0;
    for file in files {
        if file.parent().unwrap().ends_with("base") {
            // A base is half a recipe: it must be valid TOML here, the recipes that extend it check the rest.
            toml::from_str::<Table>(&std::fs::read_to_string(&file).unwrap()).unwrap();
            continue;
        }
        let recipe = load_with(&file, &[], &|name| Some(format!("/somewhere/{name}"))).map_err(|e| e.report());
        let recipe = recipe.unwrap_or_else(|e| panic!("{e}"));
        let dir = tempfile::tempdir().unwrap();
        let saved = dir.path().join("recipe.toml");
        std::fs::write(&saved, to_toml(&recipe).unwrap()).unwrap();
        assert_eq!(load(&saved, &[]).unwrap(), recipe, "{}", file.display());
        recipes += 1;
    }
    assert!(recipes > 0);
}

/// Linear layers of a LLaVA as they are called, of two layers each, that `patterns` mean.
fn meant(patterns: &[String]) -> Vec<String> {
    let mut names = vec!["language.lm_head".to_string(), "projector.linear_1".into(), "projector.linear_2".into()];
    for i in 0..2 {
        let attention = ["q", "k", "v", "o"].map(|p| format!("language.layers.{i}.self_attn.{p}_proj"));
        let mlp = ["gate", "up", "down"].map(|p| format!("language.layers.{i}.mlp.{p}_proj"));
        let tower = ["self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"];
        let tower = tower.map(|p| format!("vision.encoder.layers.{i}.{p}"));
        names.extend(attention.into_iter().chain(mlp).chain(tower));
    }
    let patterns = Patterns::new(patterns, &names).unwrap();
    names.into_iter().filter(|n| patterns.matches(n)).collect()
}

/// What LLaVA's two stages have in common (scripts/v1_5 of the authors' repository), whoever inherits it.
fn has_what_llava_sets_for_all(r: &Recipe) {
    let model = &r.model;
    let (vision, language) = (model.vision.as_ref().unwrap(), model.language.as_ref().unwrap());
    assert_eq!(vision.source.as_deref(), Some("openai/clip-vit-large-patch14-336"));
    assert_eq!((vision.select_layer, vision.select_feature), (Some(-2), Some(SelectFeature::Patch)));
    assert_eq!(language.source.as_deref(), Some("lmsys/vicuna-7b-v1.5"));
    let projector =
        MlpProjector { source: None, depth: 2, hidden: None, act: Activation::Gelu, input_norm: false, norm: false };
    assert_eq!(model.projector, Some(Projector::Mlp(projector)));
    assert_eq!((model.template, model.max_seq_len, model.truncate), (Template::VicunaV1, 2048, true));
    for stage in r.stage.values() {
        let Optimizer::Adamw(adamw) = &stage.optimizer;
        assert_eq!((adamw.betas, adamw.eps, adamw.weight_decay), ([0.9, 0.999], 1e-8, 0.0));
        assert_eq!((stage.epochs, stage.max_steps, stage.max_grad_norm), (1.0, None, 1.0));
    }
    let (align, sft) = (&r.stage["align"], &r.stage["sft"]);
    assert_eq!(align.train, ["projector.*"]);
    assert!(align.adapters.is_empty() && align.param_groups.is_empty());
    let [captions, chats] = [&align.data[..], &sft.data[..]].map(|d| match d {
        [one] => (one.template, one.resize, one.alpha),
        all => panic!("{all:?}"),
    });
    assert_eq!(captions, (Some(Template::Plain), Resize::Crop, Alpha::Drop));
    assert_eq!(chats, (None, Resize::Pad, Alpha::Drop));
    assert_eq!((align.batch.global, align.batch.group_by), (256, GroupBy::None));
    assert_eq!((sft.batch.global, sft.batch.group_by), (128, GroupBy::ModalityLength));
}

#[test]
fn llava_has_its_published_values() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/llava-1.5-7b.toml");
    let r = load_with(&file, &[], &|_| Some("/data".into())).unwrap();
    has_what_llava_sets_for_all(&r);
    let (align, sft) = (&r.stage["align"], &r.stage["sft"]);
    assert_eq!((align.lr, sft.lr), (1e-3, 2e-4));
    let warmup = Scheduler::Cosine(Warmup { warmup_ratio: Some(0.03), warmup_steps: None });
    assert_eq!((&align.lr_scheduler, &sft.lr_scheduler), (&warmup, &warmup));
    let [group] = &sft.param_groups[..] else { panic!("{:?}", sft.param_groups) };
    let slower = ParamGroup { r#match: vec!["projector.*".into()], lr: Some(2e-5), ..Default::default() };
    assert_eq!((group, &sft.train), (&slower, &slower.r#match));
    let [Adapter::Lora(lora)] = &sft.adapters[..] else { panic!("{:?}", sft.adapters) };
    assert_eq!((lora.rank, lora.alpha, lora.dropout), (128, 256.0, 0.05));
    assert!(!(lora.rslora || lora.dora || lora.freeze) && lora.lr_ratio.is_none());
    let targets = meant(&lora.target);
    assert_eq!(targets.len(), 2 * 7);
    assert!(targets.iter().all(|n| n.starts_with("language.layers.")), "{targets:?}");
    assert_eq!(r.stages, ["align", "sft", "dpo"]);
    let e = load_with(&file, &[], &|_| None).unwrap_err();
    assert!(e.cause().ends_with("stage.align.data[0].path: the environment variable `DATA` is not set"), "{e}");
}

#[test]
fn the_guide_to_frozen_backbones_has_its_values() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/frozen-backbone-guide.toml");
    let r = load_with(&file, &[], &|_| Some("/data".into())).unwrap();
    has_what_llava_sets_for_all(&r);
    assert_eq!(r.stages, ["align", "sft"]);
    let (align, sft) = (&r.stage["align"], &r.stage["sft"]);
    assert_eq!((align.lr, sft.lr), (1e-3, 2e-5));
    let warmup = Scheduler::Cosine(Warmup { warmup_ratio: None, warmup_steps: Some(500) });
    assert_eq!((&align.lr_scheduler, &sft.lr_scheduler), (&warmup, &warmup));
    assert!(sft.train.is_empty() && sft.param_groups.is_empty());
    let [Adapter::Lora(lora)] = &sft.adapters[..] else { panic!("{:?}", sft.adapters) };
    assert_eq!((lora.rank, lora.alpha, lora.dropout), (8, 16.0, 0.05));
    let attention = |i: usize| ["q", "k", "v", "o"].map(|p| format!("language.layers.{i}.self_attn.{p}_proj"));
    assert_eq!(meant(&lora.target), [attention(0), attention(1)].concat());
    // Of a 7B LLaMA, as the recipe says: 32 layers, four matrices of 4096 × 4096 each.
    assert_eq!(32 * 4 * lora.rank * (4096 + 4096), 8_388_608);
}

#[test]
fn pixel_shuffle_has_a_recipe_of_its_own() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/clip-llama-pixel-shuffle.toml");
    let r = load_with(&file, &[], &|_| Some("/data".into())).unwrap();
    let Some(Projector::PixelShuffle(p)) = &r.model.projector else { panic!("{:?}", r.model.projector) };
    assert!(p.factor == 2 && matches!(&p.then, Layers::Mlp(m) if m.depth == 2));
    assert_eq!(r.stages, ["align", "sft"]);
}

#[test]
fn resamplers_have_recipes_of_their_own() {
    let recipe = |name: &str| {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes").join(name);
        load_with(&file, &[], &|_| Some("/data".into())).unwrap()
    };
    let qformer = recipe("clip-llama-qformer.toml");
    let Some(Projector::Qformer(q)) = &qformer.model.projector else { panic!("{:?}", qformer.model.projector) };
    assert_eq!((q.queries, q.width, q.layers, q.cross_every), (32, 768, 12, 2));
    let (plain, flamingo) = (recipe("clip-llama-perceiver.toml"), recipe("clip-llama-flamingo.toml"));
    let Some(Projector::Perceiver(p)) = &plain.model.projector else { panic!("{:?}", plain.model.projector) };
    assert_eq!((p.queries, p.depth), (64, 3));
    let Some(Projector::Resampler(r)) = &flamingo.model.projector else { panic!("{:?}", flamingo.model.projector) };
    assert_eq!((r.queries, r.depth, r.heads, r.head_dim), (64, 6, 8, 64));
    assert!([&plain, &flamingo].iter().all(|r| r.stages == ["align", "sft"]));
    assert!(matches!(plain.stage["sft"].adapters[..], [Adapter::Lora(_)]));
    assert_eq!((plain.model.deliver, flamingo.model.deliver), (Deliver::Splice, Deliver::CrossAttention));
    let Adapter::CrossAttention(eyes) = &flamingo.stage["align"].adapters[0] else { panic!("no inserts") };
    assert_eq!((eyes.every, eyes.form), (4, CrossAttentionForm::Gated));
}

#[test]
fn pictures_grow_in_a_recipe_of_their_own() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/progressive-resolution.toml");
    let r = load_with(&file, &[], &|_| Some("/data".into())).unwrap();
    let sizes: Vec<Option<usize>> = r.stages.iter().map(|s| r.stage[s].image_size).collect();
    assert_eq!(sizes, [Some(224), Some(336), Some(672)]);
}

#[test]
fn tiles_have_a_recipe_of_their_own() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/clip-llama-anyres.toml");
    let r = load_with(&file, &[], &|_| Some("/data".into())).unwrap();
    let how = |stage: &str| r.stage[stage].data[0].resize;
    assert_eq!((how("align"), how("sft"), r.has_tiles()), (Resize::Crop, Resize::Anyres, true));
}
