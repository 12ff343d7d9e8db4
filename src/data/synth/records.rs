//! The samples of every file: LLaVA conversations and preference pairs about drawn scenes, as JSON values.

use super::Split;
use super::rng::{Rng, Stream};
use super::scene::Scene;
use super::text::{self, DESCRIBE, Kind, NONE, Question};
use serde_json::{Value, json};

/// Seed, split and the scenes of the split's pictures, in the order of the files.
pub struct Pictures {
    pub seed: u64,
    pub split: Split,
    pub scenes: Vec<Scene>,
}

impl Pictures {
    pub fn draw(seed: u64, split: Split, n: usize) -> Self {
        let scene = |i| Scene::draw(&mut Rng::new(seed, Stream::Scene, split as u32, i), split == Split::ValUnseen);
        Self { seed, split, scenes: (0..n).map(scene).collect() }
    }

    fn each(&self, stream: Stream, record: impl Fn(usize, &Scene, &mut Rng) -> Option<Value>) -> Vec<Value> {
        let rng = |i| Rng::new(self.seed, stream, self.split as u32, i);
        self.scenes.iter().enumerate().filter_map(|(i, scene)| record(i, scene, &mut rng(i))).collect()
    }

    fn id(&self, what: &str, i: usize) -> String {
        format!("{}-{what}-{i:05}", self.split.name())
    }

    fn conversation(&self, what: &str, i: usize, turns: &[(String, String)]) -> Value {
        let image = self.split.image(i);
        json!({ "id": self.id(what, i), "image": image, "conversations": turns_json("<image>\n", turns) })
    }

    /// One caption a picture.
    pub fn captions(&self) -> Vec<Value> {
        self.each(Stream::Questions, |i, scene, _| {
            Some(self.conversation("caption", i, &[(DESCRIBE.into(), text::caption(scene))]))
        })
    }

    /// One list of attribute words a picture.
    pub fn attributes(&self) -> Vec<Value> {
        self.each(Stream::Questions, |i, scene, _| {
            Some(self.conversation("attributes", i, &[(DESCRIBE.into(), text::attributes(scene))]))
        })
    }

    /// Training: one conversation a picture, about what is there: one question in a quarter of them, else four.
    pub fn conversations(&self) -> Vec<Value> {
        self.each(Stream::Questions, |i, scene, rng| {
            let mut kinds = Kind::ALL;
            rng.shuffle(&mut kinds);
            let turns = if rng.chance(0.25) { 1 } else { 4 };
            let asked: Vec<_> =
                kinds.iter().filter_map(|&k| text::question(k, scene, rng)).take(turns).map(turn).collect();
            Some(self.conversation("questions", i, &asked))
        })
    }

    /// Validation: one question a picture, every kind equally often as far as the scenes allow, `category` its kind.
    pub fn questions(&self) -> Vec<Value> {
        self.each(Stream::Questions, |i, scene, rng| {
            let q = first_possible(i, &Kind::ALL, |k| text::question(k, scene, rng))?;
            let category = q.kind.name();
            Some(with(self.conversation("question", i, &[turn(q)]), "category", json!(category)))
        })
    }

    /// Pairs about what is absent: the rejected answer names it.
    pub fn preferences(&self) -> Vec<Value> {
        self.each(Stream::Preferences, |i, scene, rng| {
            let a = first_possible(i, &Kind::ABSENT, |k| text::absence(k, scene, rng))?;
            Some(self.pair("absent", i, &a.prompt, NONE, &a.rejected))
        })
    }

    /// The counterweight: the same kinds of questions about what is there; the rejected answer denies it.
    pub fn presence(&self) -> Vec<Value> {
        self.each(Stream::Presence, |i, scene, rng| {
            let q = first_possible(i, &Kind::ABSENT, |k| text::question(k, scene, rng))?;
            Some(self.pair("present", i, &q.prompt, &q.answer, NONE))
        })
    }

    /// Questions about what is absent; an answer with one of the `absent` phrases in it affirms it.
    pub fn absent(&self) -> Vec<Value> {
        self.each(Stream::Absent, |i, scene, rng| {
            let a = first_possible(i, &Kind::ABSENT, |k| text::absence(k, scene, rng))?;
            let sample = self.conversation("absent", i, &[(a.prompt, NONE.into())]);
            Some(with(with(sample, "category", json!(a.kind.name())), "absent", json!(a.phrases)))
        })
    }

    fn pair(&self, what: &str, i: usize, prompt: &str, chosen: &str, rejected: &str) -> Value {
        json!({ "id": self.id(what, i), "image": self.split.image(i), "prompt": format!("<image>\n{prompt}"),
                "chosen": chosen, "rejected": rejected })
    }
}

/// Conversations without a picture: the scene is told in the first human turn, where a picture would stand.
///
/// Training: one to eight questions, half of them relational and a fifth about what is absent, or a request for the
/// caption. Validation: one question each, with its `category`.
pub fn text_only(seed: u64, split: Split, n: usize) -> Vec<Value> {
    let document = |i: usize| {
        let mut rng = Rng::new(seed, Stream::Text, split as u32, i);
        let scene = Scene::draw(&mut rng, false);
        let told = format!("{} ", text::retell(&scene, &mut rng));
        let (turns, category) = if split == Split::Train {
            (text_turns(&scene, &mut rng), None)
        } else if i % 10 == 9 {
            let a = first_possible(i / 10, &Kind::ABSENT, |k| text::absence(k, &scene, &mut rng))?;
            (vec![(a.prompt, NONE.to_string())], Some("absent"))
        } else {
            let q = first_possible(i, &Kind::ALL, |k| text::question(k, &scene, &mut rng))?;
            let category = q.kind.name();
            (vec![turn(q)], Some(category))
        };
        let id = format!("{}-text-{i:05}", split.name());
        let sample = json!({ "id": id, "conversations": turns_json(&told, &turns) });
        Some(match category {
            Some(c) => with(sample, "category", json!(c)),
            None => sample,
        })
    };
    (0..n).filter_map(document).collect()
}

fn text_turns(scene: &Scene, rng: &mut Rng) -> Vec<(String, String)> {
    if rng.chance(0.15) {
        return vec![(DESCRIBE.into(), text::caption(scene))];
    }
    let turns = 1 + rng.below(8);
    let mut asked = Vec::with_capacity(turns);
    while asked.len() < turns {
        let kinds: &[Kind] = if rng.chance(0.5) { &Kind::RELATIONAL } else { &Kind::ALL };
        if rng.chance(0.2) {
            let absence = rng.pick(&Kind::ABSENT).and_then(|k| text::absence(k, scene, rng));
            asked.extend(absence.map(|a| (a.prompt, NONE.to_string())));
        } else {
            let question = rng.pick(kinds).and_then(|k| text::question(k, scene, rng));
            asked.extend(question.map(turn));
        }
    }
    asked
}

fn turn(q: Question) -> (String, String) {
    (q.prompt, q.answer)
}

/// The first kind, counted from the `i`-th on, that this scene has a question of.
fn first_possible<T>(i: usize, kinds: &[Kind], mut ask: impl FnMut(Kind) -> Option<T>) -> Option<T> {
    (0..kinds.len()).find_map(|j| ask(kinds[(i + j) % kinds.len()]))
}

/// LLaVA's turns, with `opening` in front of the first.
fn turns_json(opening: &str, turns: &[(String, String)]) -> Value {
    let mut out = Vec::with_capacity(2 * turns.len());
    for (i, (human, gpt)) in turns.iter().enumerate() {
        let opening = if i == 0 { opening } else { "" };
        out.push(json!({ "from": "human", "value": format!("{opening}{human}") }));
        out.push(json!({ "from": "gpt", "value": gpt }));
    }
    Value::Array(out)
}

fn with(mut record: Value, key: &str, value: Value) -> Value {
    record[key] = value;
    record
}
