//! The ratios that guides publish, beside what was measured here.

use super::{Policy, Record};
use crate::bench::step::kept_name;
use crate::model::segment::Kept;
use crate::report::{Table, human};
use serde::Serialize;

/// A ratio that guides publish, and ours.
#[derive(Debug, Clone, Serialize)]
pub struct Claim {
    what: &'static str,
    claim: String,
    published: &'static str,
    /// Times as fast, or the share by which the first is slower or smaller; none where memory cannot be told or a
    /// configuration was not measured.
    here: Option<f64>,
    /// Configurations that were not measured, for want of which there is no figure.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    missing: Vec<String>,
    /// For people.
    #[serde(skip)]
    shown: String,
}

/// Each claim by the records that it is about: times are medians, memory is the peak of the whole process or pool.
pub fn claims(records: &[Record]) -> Vec<Claim> {
    let find = |(policy, kept): (Policy, Kept)| {
        let here = |r: &&Record| r.policy == policy.name() && r.activations == kept_name(kept);
        records.iter().find(here).ok_or_else(|| format!("{}, \"{}\"", policy.name(), kept_name(kept)))
    };
    let faster = |a: &Record, b: &Record| Some(b.median_s / a.median_s);
    let slower = |a: &Record, b: &Record| Some(a.median_s / b.median_s - 1.0);
    let smaller = |a: &Record, b: &Record| Some(1.0 - a.peak_memory_bytes? as f64 / b.peak_memory_bytes? as f64);
    let mut all = Vec::new();
    let mut claim = |claim: String,
                     published,
                     pair: [(Policy, Kept); 2],
                     of: &dyn Fn(&Record, &Record) -> Option<f64>,
                     share: bool| {
        let [a, b] = pair.map(find);
        let show = |v: f64| if share { human::percent(v) } else { format!("{v:.2} ×") };
        let (here, missing, shown) = match (a, b) {
            (Ok(a), Ok(b)) => {
                let here = of(a, b);
                (here, Vec::new(), here.map_or("unknown".to_string(), show))
            }
            (a, b) => {
                let missing: Vec<String> = [a.err(), b.err()].into_iter().flatten().collect();
                let shown = format!("not measured: {}", missing.join("; "));
                (None, missing, shown)
            }
        };
        all.push(Claim { what: "claim", claim, published, here, missing, shown });
    };
    for kept in [Kept::All, Kept::Input] {
        let of = |p| [(p, kept), (Policy::Full, kept)];
        let where_ = format!("activations = \"{}\"", kept_name(kept));
        claim(format!("projector only faster than full, {where_}"), "3 to 5 ×", of(Policy::Projector), &faster, false);
        claim(format!("LoRA faster than full, {where_}"), "1.5 to 2 ×", of(Policy::Lora), &faster, false);
        claim(format!("LoRA takes less memory than full, {where_}"), "40 to 50 %", of(Policy::Lora), &smaller, true);
    }
    for policy in [Policy::Projector, Policy::Lora, Policy::LastTwo, Policy::Full] {
        let pair = [(policy, Kept::Input), (policy, Kept::All)];
        claim(format!("{}: recompute slower", policy.name()), "20 to 30 %", pair, &slower, true);
        claim(format!("{}: recompute takes less memory", policy.name()), "40 to 50 %", pair, &smaller, true);
    }
    all
}

pub fn published(claims: &[Claim]) -> Table {
    let mut t = Table::new("beside what is published", ["", "published", "here"]);
    for c in claims {
        t.row([c.claim.clone(), c.published.to_string(), c.shown.clone()]);
    }
    t
}

#[cfg(test)]
mod tests {
    use super::super::tests::record;
    use super::*;

    #[test]
    fn claims_are_ratios_of_the_right_records() {
        // Projector 1 s and 1.25 s, LoRA 2 s and 2.5 s, last two 1 s and 1 s, full 4 s and 5 s; 100 to 400 bytes, and half of it.
        let times = [1.0, 1.25, 2.0, 2.5, 1.0, 1.0, 4.0, 5.0];
        let peaks = [100, 50, 200, 100, 100, 100, 400, 200];
        let records: Vec<Record> = (0..8).map(|i| record(i, times[i], peaks[i])).collect();
        let got: Vec<(String, f64)> = claims(&records).into_iter().map(|c| (c.claim, c.here.unwrap())).collect();
        let find = |what: &str| got.iter().find(|(c, _)| c.starts_with(what)).unwrap().1;
        assert_eq!(find("projector only faster"), 4.0);
        assert_eq!(find("LoRA faster"), 2.0);
        assert_eq!(find("LoRA takes less"), 0.5);
        assert_eq!((find("full: recompute slower"), find("full: recompute takes")), (0.25, 0.5));
        assert_eq!((find("last 2 layers: recompute slower"), find("last 2 layers: recompute takes")), (0.0, 0.0));
        assert_eq!(got.len(), 14);
    }
}
