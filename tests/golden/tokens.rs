//! Token ids and labels of every template.

use super::Golden;
use adfreeze::data::{Item, Sample};
use adfreeze::spec::Template;
use serde_json::Value;

pub fn run(g: &Golden) {
    let want = super::json(&g.path("tokens.json"));
    // The fixture's own chat template writes what `vicuna_v1` does, and its answers begin at the same place.
    for (what, key, file, template) in [
        ("plain", "plain", "data/plain.json", Template::Plain),
        ("vicuna_v1", "vicuna_v1", "data/sft.json", Template::VicunaV1),
        ("chat", "vicuna_v1", "data/sft.json", Template::Chat),
    ] {
        let items = g.items(file, template);
        let rows = want[key].as_array().unwrap();
        assert_eq!(rows.len(), items.len());
        for (row, item) in rows.iter().zip(&items) {
            let Item::Sample(s) = item else { panic!("{file} holds a pair") };
            check(g, what, row, "", s);
        }
    }
    for (row, item) in want["dpo"].as_array().unwrap().iter().zip(g.items("data/dpo.jsonl", Template::VicunaV1)) {
        let Item::Pair(chosen, rejected) = &item else { panic!("dpo.jsonl holds a conversation") };
        check(g, "dpo chosen", row, "chosen_", chosen);
        check(g, "dpo rejected", row, "rejected_", rejected);
    }
}

fn check(g: &Golden, what: &str, row: &Value, prefix: &str, s: &Sample) {
    let ids = |k: &str| -> Vec<i64> {
        row[format!("{prefix}{k}")].as_array().unwrap().iter().map(|x| x.as_i64().unwrap()).collect()
    };
    assert_eq!(row["id"].as_str().unwrap(), s.id);
    let wrong = |a: Vec<i64>, b: Vec<i64>| a.iter().zip(&b).filter(|(x, y)| x != y).count() + a.len().abs_diff(b.len());
    let n = wrong(ids("input_ids"), s.ids.iter().map(|x| i64::from(*x)).collect())
        + wrong(ids("labels"), s.labels.iter().map(|x| i64::from(*x)).collect());
    g.case(&format!("tokens and labels, {what} {}", s.id), n as f64, 0.0);
}
