//! One training step (forward, backward, AdamW) of the same small model on the same batch with the same loss: this
//! crate, and stock candle (composed differentiable ops, `Tensor::backward`, candle-nn's AdamW).
//!
//! `cargo bench --bench step_vs_candle [-- ROUNDS]`. Every measurement is a process of its own, so that the peak of
//! resident memory is its own; engines and tasks alternate round by round. Both engines use the allocator of the
//! binary. Memory and processor time are read from `/proc`.
//!
//! candle's worker threads wait for each other in a loop that never sleeps. On a machine with other work that inflates
//! both of candle's times many times over, so the figures of a busy machine say nothing; `RAYON_NUM_THREADS=1` before
//! the command takes the waiting out of both engines, and their processor time can then be compared.

#[path = "../tests/stock/mod.rs"]
mod stock;

use adfreeze::adapters::lora;
use adfreeze::model::backbone::{LANGUAGES, LanguageConfig, RopeScaling, TOWERS, VisionConfig};
use adfreeze::model::init::{Fresh, Place};
use adfreeze::model::language::Language;
use adfreeze::model::params::{Grads, Module};
use adfreeze::model::projector::Projector;
use adfreeze::model::segment::Kept;
use adfreeze::model::vision::Tower;
use adfreeze::model::vlm::{Batch, Mode, Vlm};
use adfreeze::ops::Weight;
use adfreeze::ops::random::{Key, normal};
use adfreeze::optim::{AdamW, Groups, Schedule};
use adfreeze::spec::{self, Activation, MlpProjector, Scheduler, SelectFeature, Warmup};
use candle_core::DType;
use candle_nn::Optimizer;
use std::collections::{BTreeMap, BTreeSet};
use std::process::{Command, ExitCode};
use std::time::Instant;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const TASKS: [(&str, &str); 3] =
    [("align", "projector"), ("lora", "projector, LoRA r = 16"), ("full", "projector, language")];
const ENGINES: [&str; 3] = ["adfreeze", "adfreeze-recompute", "candle"];
const IMAGE: u32 = 2047;
const LR: f64 = 1e-4;
const SEQUENCES: usize = 8;
const TOKENS: usize = 128;
/// Labelled tokens at the end of each sequence.
const LABELS: usize = 32;
/// Steps before the clock starts, and timed ones.
const WARM: usize = 2;
const STEPS: usize = 5;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    if let [flag, engine, task] = args.as_slice()
        && flag == "--child"
    {
        child(engine, task);
        return ExitCode::SUCCESS;
    }
    let rounds = args.first().and_then(|a| a.parse().ok()).unwrap_or(7);
    table(rounds)
}

/// A tower of 3.0 M parameters and a language model of 7.9 M; the tower's last layer but one is selected.
fn model(task: &str) -> Vlm {
    let vision = VisionConfig {
        architecture: TOWERS[0],
        hidden_size: 192,
        intermediate_size: 768,
        num_hidden_layers: 6,
        num_attention_heads: 6,
        num_channels: 3,
        image_size: 64,
        patch_size: 8,
        hidden_act: Activation::QuickGelu,
        layer_norm_eps: 1e-5,
    };
    let text = LanguageConfig {
        architecture: LANGUAGES[0],
        vocab_size: 2048,
        hidden_size: 256,
        intermediate_size: 704,
        num_hidden_layers: 8,
        num_attention_heads: 8,
        num_key_value_heads: 4,
        head_dim: 32,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        max_position_embeddings: TOKENS,
        attention_bias: false,
        mlp_bias: false,
        tie_word_embeddings: true,
        bos_token_id: Some(0),
        eos_token_ids: vec![1],
        pad_token_id: None,
    };
    let mut src = Fresh { key: Key::new(1, "bench"), place: Place::cpu() };
    let projector = spec::Projector::Mlp(MlpProjector {
        source: None,
        depth: 2,
        hidden: None,
        act: Activation::QuickGelu,
        input_norm: false,
        norm: false,
    });
    let tower = Tower::new(vision, -2, SelectFeature::Patch, &mut src).unwrap();
    let projector = Projector::new(&projector, 192, 256, true, &mut src).unwrap();
    let mut vlm = Vlm::new(Some(tower), Some(projector), Language::new(text, &mut src).unwrap(), IMAGE);
    if task == "lora" {
        let target = vec!["language.*".to_string()];
        let cfg = spec::Lora { rank: 16, alpha: 32.0, target, ..Default::default() };
        lora::attach(&mut vlm, &cfg, "sft", Key::new(2, "lora")).unwrap();
    }
    let trains = |n: &String| match task {
        "align" => n.starts_with("projector."),
        "lora" => n.starts_with("projector.") || n.contains(".lora_"),
        _ => !n.starts_with("vision."),
    };
    let names: BTreeSet<String> = vlm.params().into_keys().filter(trains).collect();
    vlm.train_only(&names);
    vlm
}

/// Each sequence shows a picture of its own: 64 visual tokens, then text, the end of it labelled.
fn batch(vlm: &Vlm) -> (Batch, Vec<f64>) {
    let per = vlm.tokens_per_image().unwrap();
    let mut b = Batch { pictures: (0..SEQUENCES as u32).collect(), ..Batch::default() };
    let word = |s: usize, t: usize| ((s * 131 + t * 37) % 2000) as u32;
    for s in 0..SEQUENCES {
        let start = b.ids.len();
        b.ids.push(0);
        b.ids.extend(vec![IMAGE; per]);
        b.ids.extend((per + 1..TOKENS).map(|t| word(s, t)));
        b.lengths.push(TOKENS);
        for t in TOKENS - LABELS..TOKENS {
            b.targets.push(((start + t - 1) as u32, b.ids[start + t]));
            b.owners.push(s);
        }
    }
    b.pixels = Some(normal(Key::new(3, "pixels"), &[SEQUENCES, 3, 64, 64], 1.0, DType::F32).unwrap());
    let coefs = vec![-1.0 / b.targets.len() as f64; b.targets.len()];
    (b, coefs)
}

/// Runs the steps and prints: milliseconds of the median step, processor milliseconds a step, peak MiB, last loss.
fn child(engine: &str, task: &str) {
    let vlm = model(task);
    let (batch, coefs) = batch(&vlm);
    let mut step: Box<dyn FnMut() -> f64> = match engine {
        "candle" => stock_step(vlm, batch, coefs),
        _ => {
            let params = vlm.trainable();
            let shapes: BTreeMap<String, Vec<usize>> =
                params.iter().map(|(n, t)| (n.clone(), t.dims().to_vec())).collect();
            let groups = Groups::resolve(&[], LR, 0.0, &shapes).unwrap();
            let schedule =
                Schedule::new(&Scheduler::Constant(Warmup { warmup_ratio: None, warmup_steps: Some(0) }), WARM + STEPS);
            let hyper = spec::AdamW::default();
            let mut optimizer = AdamW::new(hyper, groups, schedule, 1e9, Key::new(1, "noise"));
            let kept = if engine == "adfreeze" { Kept::Minimal } else { Kept::Input };
            Box::new(move || {
                let (lp, saved) = vlm.forward(&batch, Mode { record: true, kept, ..Mode::default() }).unwrap();
                let mut grads = Grads::new();
                vlm.backward(saved.unwrap(), &coefs, &mut grads).unwrap();
                optimizer.step(&Weight::plain(&params), grads.by_name()).unwrap();
                lp.logps().unwrap().iter().zip(&coefs).map(|(p, c)| p * c).sum()
            })
        }
    };
    for _ in 0..WARM {
        step();
    }
    let before = processor_ms();
    let mut times = Vec::new();
    let mut loss = 0.0;
    for _ in 0..STEPS {
        let start = Instant::now();
        loss = step();
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    let processor = (processor_ms() - before) / STEPS as f64;
    println!("{} {processor} {} {loss}", median(&mut times), peak_mib());
}

fn stock_step(mut vlm: Vlm, batch: Batch, coefs: Vec<f64>) -> Box<dyn FnMut() -> f64> {
    let stock = stock::Stock::new(&mut vlm, 5);
    let hyper = candle_nn::ParamsAdamW { lr: LR, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 };
    let mut optimizer = candle_nn::AdamW::new(stock.vars.values().cloned().collect(), hyper).unwrap();
    Box::new(move || {
        let loss = stock.loss(&batch, &coefs).unwrap();
        optimizer.backward_step(&loss).unwrap();
        stock::number(&loss)
    })
}

/// All rounds; prints the table, and fails if the engines do not compute the same.
fn table(rounds: usize) -> ExitCode {
    let mut seen: BTreeMap<(&str, &str), [Vec<f64>; 4]> = BTreeMap::new();
    for round in 0..rounds {
        for (task, _) in TASKS {
            for engine in ENGINES {
                let exe = std::env::current_exe().unwrap();
                let out = Command::new(exe).args(["--child", engine, task]).output().unwrap();
                let text = String::from_utf8_lossy(&out.stdout).into_owned();
                let values: Vec<f64> = text.split_whitespace().filter_map(|v| v.parse().ok()).collect();
                let [wall, cpu, peak, loss] = values[..] else {
                    eprintln!("{engine} {task} failed: {}", String::from_utf8_lossy(&out.stderr));
                    return ExitCode::FAILURE;
                };
                let entry = seen.entry((task, engine)).or_default();
                for (all, v) in entry.iter_mut().zip([wall, cpu, peak, loss]) {
                    all.push(v);
                }
            }
        }
        eprintln!("round {} of {rounds}", round + 1);
    }
    println!(
        "{SEQUENCES} sequences of {TOKENS} tokens, {} threads, medians of {rounds} processes",
        rayon::current_num_threads()
    );
    println!("| task | engine | step ms | processor ms | peak MiB | candle / ours: step | processor | peak |");
    println!("|---|---|---|---|---|---|---|---|");
    for (task, what) in TASKS {
        let mut row =
            |engine: &'static str| seen.remove(&(task, engine)).unwrap_or_default().map(|mut v| median(&mut v));
        let all = ENGINES.map(|e| (e, row(e)));
        let (_, candle) = all[ENGINES.len() - 1];
        for (engine, m) in all {
            if (m[3] - candle[3]).abs() > 1e-3 * candle[3].abs() {
                eprintln!("{task}: the losses differ, {} and {}", m[3], candle[3]);
                return ExitCode::FAILURE;
            }
            let ratio = |i: usize| format!("{:.2}×", candle[i] / m[i]);
            println!(
                "| {task} ({what}) | {engine} | {:.0} | {:.0} | {:.0} | {} | {} | {} |",
                m[0],
                m[1],
                m[2],
                ratio(0),
                ratio(1),
                ratio(2)
            );
        }
    }
    ExitCode::SUCCESS
}

fn median(v: &mut [f64]) -> f64 {
    v.sort_by(f64::total_cmp);
    v.get(v.len() / 2).copied().unwrap_or(f64::NAN)
}

/// User and system time of this process so far; Linux counts it in hundredths of a second.
fn processor_ms() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<f64> = stat
        .rsplit_once(") ")
        .map_or(vec![], |(_, rest)| rest.split_whitespace().map(|f| f.parse().unwrap_or(0.0)).collect());
    fields.get(11..13).map_or(f64::NAN, |t| t.iter().sum::<f64>() * 10.0)
}

/// Peak of resident memory of this process.
fn peak_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap_or_default();
    line.split_whitespace().next().and_then(|v| v.parse::<f64>().ok()).map_or(f64::NAN, |kib| kib / 1024.0)
}
