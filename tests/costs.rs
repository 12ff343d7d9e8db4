//! What `check` says that a stage costs, held to what stands in memory after a step: weights and masters, gradients, moments, and
//! what the layers keep.

mod tiny;

use adfreeze::data::{Dataset, IGNORE, ImageRef, Item, Plan, Sample};
use adfreeze::model::init::{Fresh, Place};
use adfreeze::model::language::Language;
use adfreeze::model::params::{Grads, Module, Param};
use adfreeze::model::projector::Projector;
use adfreeze::model::segment::Kept;
use adfreeze::model::vision::Tower;
use adfreeze::model::vlm::{Load, Mode, Vlm};
use adfreeze::optim::AdamW;
use adfreeze::pipeline::components::{Row, Training, gets_master, notes, rows, table};
use adfreeze::pipeline::memory::loads;
use adfreeze::pipeline::state::State;
use adfreeze::spec::{Alpha, Resize, SelectFeature, Stage};
use candle_core::{DType, Tensor};
use std::collections::{BTreeMap, BTreeSet};
use tiny::*;

fn stage(text: &str) -> Stage {
    let common = "data = [{ path = 'x' }]\nbatch = { global = 1 }\nlr = 1e-3\nlr_scheduler = { constant = {} }\n";
    toml::from_str(&format!("{text}\n{common}")).unwrap()
}

/// Wide enough that matrices have 4096 elements and more, which 8-bit moments ask for.
fn model(dtype: DType) -> Vlm {
    let mut source = Fresh { key: key("weights"), place: Place { dtype, ..Place::cpu() } };
    let vision = adfreeze::model::backbone::VisionConfig { hidden_size: 16, intermediate_size: 24, ..clip() };
    let text = adfreeze::model::backbone::LanguageConfig {
        hidden_size: 64,
        intermediate_size: 80,
        head_dim: 16,
        num_hidden_layers: 4,
        ..llama()
    };
    let tower = Tower::new(vision, -2, SelectFeature::Patch, &mut source).unwrap();
    let projector = Projector::new(&mlp(false), 16, 64, true, &mut source).unwrap();
    Vlm::new(Some(tower), Some(projector), Language::new(text, &mut source).unwrap(), IMAGE)
}

fn optimizer(stage: &Stage, vlm: &mut Vlm) -> AdamW {
    let shapes = vlm.trainable().into_iter().map(|(n, t)| (n, t.dims().to_vec())).collect();
    AdamW::of_stage(stage, "s", 3, &shapes, &vlm.distances(), &BTreeMap::new()).unwrap()
}

fn size(t: &Tensor) -> u64 {
    (t.elem_count() * t.dtype().size_in_bytes()) as u64
}

/// Every parameter in all types in which it stands.
fn standing(vlm: &mut Vlm) -> u64 {
    let (mut all, mut seen) = (0, BTreeSet::new());
    vlm.visit_mut(&mut |p| {
        if seen.insert(p.name.clone()) {
            all += size(&p.value) + p.weight().rounded.as_ref().map_or(0, size);
        }
    });
    all
}

const LORA: &str = "adapters = [{ lora = { rank = 2, alpha = 4, target = ['language.layers[1..].*_proj'] } }]";

const STAGES: [&str; 10] = [
    "adapters = [{ prefix = { tokens = 3, before = 'picture' } }, { prefix = { name = 'text', tokens = 2 } }]",
    "train = ['projector.*']",
    LORA,
    "train = ['vision.encoder.layers[1].*']\nimage_size = 12",
    "train = ['language.layers[-2..].*']",
    "train = ['vision.encoder.layers[1].*', 'projector.*']\nrecompute = ['language.layers[0..2]']",
    "train = ['!vision.encoder.layers[-1].*', '!vision.post*', '*']",
    "train = ['!vision.post*', '*norm.weight']\noptimizer = { adamw = { moments = '8bit' } }",
    "train = ['language.*', 'projector.*']\noptimizer = { adamw = { moments = '8bit', stochastic_rounding = true } }",
    "train = ['language.norm.*']\nadapters = [{ prefix = { tokens = 3 } }, { bottleneck = { dim = 2, target = ['language.layers[-1].*'] } }]",
];

#[test]
fn what_is_told_is_what_stands_in_memory() {
    for dtype in [DType::F32, DType::BF16] {
        for text in STAGES {
            let (stage, what) = (stage(text), format!("{dtype:?}: {text}"));
            let mut state = State::new(model(dtype), None);
            state.enter(&stage, "s").unwrap();
            let mut optimizer = optimizer(&stage, &mut state.vlm);
            let batch = pack(&state.vlm, &sequences().iter().collect::<Vec<_>>());
            let [of_text, of_picture] = state.vlm.prefix_rows();
            let tokens = batch.ids.len() + batch.lengths.len() * of_text + batch.pictures.len() * of_picture;
            let load = Load { pictures: batch.pixels.as_ref().unwrap().dims()[0], tokens };
            let less = Load { pictures: 1, tokens: tokens / 2 };
            let none = BTreeSet::new();
            let training = Training { stage: &stage, optimizer: &optimizer, loads: &[less, load], masters: &none };
            let told = rows(&state, &training).unwrap();
            let sum = |of: fn(&Row) -> u64| told.iter().map(of).sum::<u64>();

            // As a stage begins.
            if dtype == DType::BF16 {
                let lean = |p: &Param| !gets_master(&stage, &p.role);
                state.vlm.drop_masters(lean).unwrap();
                if !text.contains("stochastic") {
                    state.vlm.make_masters().unwrap();
                }
            }
            assert_eq!(sum(|r| r.weight_bytes), standing(&mut state.vlm), "{what}: weights");
            let parameters: usize = state.vlm.params().values().map(Tensor::elem_count).sum();
            assert_eq!(told.iter().map(|r| r.parameters).sum::<usize>(), parameters, "{what}");

            for (kept, bytes) in [
                (Kept::All, sum(|r| r.activation_bytes.none)),
                (Kept::Minimal, sum(|r| r.activation_bytes.minimal)),
                (Kept::Input, sum(|r| r.activation_bytes.recompute)),
            ] {
                let (lp, saved) = state.vlm.forward(&batch, Mode { record: true, kept, ..Mode::default() }).unwrap();
                let saved = saved.unwrap();
                assert_eq!(saved.kept_bytes() as u64, bytes, "{what}: {kept:?}");
                let mut grads = Grads::new();
                state.vlm.backward(saved, &coefs(lp.rows()), &mut grads).unwrap();
                if kept == Kept::Input {
                    let got = grads.by_name().values().map(size).sum::<u64>();
                    assert_eq!(sum(|r| r.gradient_bytes), got, "{what}: gradients");
                    optimizer.step(&state.vlm.weights(), grads.by_name()).unwrap();
                }
            }
            let state = optimizer.state().unwrap();
            let moments = state.iter().filter(|(n, _)| !n.ends_with("step")).map(|(_, t)| size(t)).sum::<u64>();
            assert_eq!(sum(|r| r.optimizer_bytes), moments, "{what}: moments");
        }
    }
}

/// Components, states and the line below, as they are read.
#[test]
fn the_table_names_layers_by_their_pattern_and_says_where_backward_stops() {
    let read = |text: &str| {
        let stage = stage(text);
        let mut state = State::new(model(DType::F32), None);
        state.enter(&stage, "s").unwrap();
        let optimizer = optimizer(&stage, &mut state.vlm);
        let load = [Load { pictures: 2, tokens: 40 }];
        let none = BTreeSet::new();
        let training = Training { stage: &stage, optimizer: &optimizer, loads: &load, masters: &none };
        let rows = rows(&state, &training).unwrap();
        let line = notes(&state.vlm, &rows, &load, Kept::All).unwrap();
        let parts: Vec<String> = rows.iter().map(|r| format!("{} {} by {}", r.component, r.state, r.what)).collect();
        let kept: BTreeMap<String, u64> =
            rows.iter().map(|r| (format!("{} {}", r.component, r.state), r.activation_bytes.none)).collect();
        (parts, line, kept, table("x", &rows, Kept::All).render())
    };
    let (parts, line, kept, text) = read("train = ['language.layers[2].mlp.*', 'language.layers[3].*']");
    assert_eq!(
        parts,
        [
            "vision.{embeddings,pre_layrnorm} frozen by vision (no pattern)",
            "vision.encoder.layers[0..3] frozen by vision (no pattern)",
            "vision.post_layernorm frozen by vision (no pattern)",
            "projector frozen by projector (no pattern)",
            "language.embed_tokens frozen by language (no pattern)",
            "language.layers[0..2] frozen by language (no pattern)",
            "language.layers[2] frozen by language (no pattern)",
            "language.layers[2] trains by language.layers[2].mlp.*",
            "language.layers[3] trains by language.layers[3].*",
            "language.norm frozen by language (no pattern)",
            "language.lm_head frozen by language (no pattern)",
        ]
    );
    assert!(line.starts_with("backward stops above language.layers.1\nactivations = \"none\""), "{line}");
    assert!(line.contains("(40 tokens, 2 pictures): none "), "{line}");
    let kept = |name: &str| kept[name];
    assert_eq!((kept("language.layers[0..2] frozen"), kept("language.layers[2] frozen")), (0, 0));
    assert!(kept("language.layers[2] trains") > 0 && kept("language.layers[3] trains") > 0);
    assert!(text.contains("language.layers[3]") && text.lines().last().unwrap().starts_with("all "), "{text}");

    for (stage, stops) in [
        ("train = ['projector.*']", "backward stops above vision.encoder.layers.1\n"),
        ("train = ['vision.encoder.layers[1].*']", "backward stops above vision.encoder.layers.0\n"),
        ("train = ['vision.encoder.layers[0].*']", "backward stops above vision.pre_layrnorm\n"),
        ("train = ['vision.embeddings.*']", "backward goes down to all inputs\n"),
        ("train = ['language.norm.*']", "backward stops above language.layers.3\n"),
        ("train = ['language.lm_head.*']", "backward stops above language.norm\n"),
        ("train = ['language.embed_tokens.*']", "backward goes down to all inputs\n"),
        (LORA, "backward stops above language.layers.0\n"),
        ("train = ['language.layers.*']", "backward stops above language.embed_tokens\n"),
        ("adapters = [{ prefix = { tokens = 3 } }]", "backward goes down to all inputs\n"),
    ] {
        let (_, line, ..) = read(stage);
        assert!(line.starts_with(stops), "{stage}: {line}");
    }
    let (parts, ..) = read(LORA);
    assert_eq!(parts.last().unwrap(), "adapter s (lora) trains by adapter s");
}

/// Visual tokens beside the text: the two backbones have frontiers of their own.
#[test]
fn cross_attention_has_two_frontiers() {
    let stage =
        stage("train = ['projector.*']\nadapters = [{ cross_attention = { every = 3, heads = 2, head_dim = 4 } }]");
    let mut vlm = model(DType::F32);
    vlm.deliver = adfreeze::spec::Deliver::CrossAttention;
    let mut state = State::new(vlm, None);
    state.enter(&stage, "s").unwrap();
    assert_eq!(state.vlm.stops_above(), ["vision.encoder.layers.1", "language.layers.1"]);
    assert!(state.vlm.roles().values().any(|r| r.adapter.is_some()));
}

#[test]
fn soft_tokens_count_in_every_sequence() {
    let sample = |n: usize| Sample {
        id: n.to_string(),
        ids: vec![1; n],
        labels: vec![IGNORE; n],
        images: vec![],
        category: None,
        absent: vec![],
    };
    let pair = |a, b| Item::Pair(sample(a), sample(b));
    let batch = toml::from_str("global = 2\ngroup_by = 'sequential'").unwrap();
    for (items, without, with) in [
        (vec![Item::Sample(sample(5)), Item::Sample(sample(7))], 12, 12 + 2 * 3),
        (vec![pair(5, 6), pair(7, 8)], 26, 26 + 4 * 3),
    ] {
        let data = Dataset { items };
        let plan = Plan::new(&data, &batch, 1, "s", 1).unwrap();
        assert_eq!(loads(&data, &plan, 0..1, 2, [0, 0]), [Load { pictures: 0, tokens: without }]);
        assert_eq!(loads(&data, &plan, 0..1, 2, [3, 5]), [Load { pictures: 0, tokens: with }]);
    }
    // A picture that is shown twice is one to the tower, and two in the texts.
    let picture =
        |path: &str| ImageRef { path: path.into(), resize: Resize::Crop, alpha: Alpha::Drop, size: 8, tiles: None };
    let items = [vec![picture("a"), picture("b")], vec![picture("a")]].map(|images| Sample { images, ..sample(5) });
    let data = Dataset { items: items.map(Item::Sample).to_vec() };
    let plan = Plan::new(&data, &batch, 1, "s", 1).unwrap();
    assert_eq!(loads(&data, &plan, 0..1, 2, [3, 5]), [Load { pictures: 2, tokens: 2 * 5 + 2 * 3 + 3 * 5 }]);
}
