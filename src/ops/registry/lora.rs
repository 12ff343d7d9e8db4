//! Cases of low-rank updates.

use super::super::lora;
use super::super::random::{Key, dropout};
use super::{Case, sum_type};
use crate::error::{Error, Result};
use candle_core::Tensor;

pub(super) fn cases() -> Vec<Case> {
    let shapes = [
        (7, 136, 72, 16, 0.1),
        (5, 70, 77, 8, 0.0),
        (130, 72, 40, 24, 0.1),
        (9, 33, 21, 32, 0.3),
        (33, 72, 48, 64, 0.1),
        (9, 35, 51, 64, 0.0),
        (12, 72, 40, 128, 0.1),
        (3, 71, 13, 200, 0.1),
        (6, 16, 24, 3, 0.1),
    ];
    let both = |(n, k, m, rank, p)| [true, false].map(|b_trains| lora_case(n, k, m, rank, p, b_trains));
    shapes.into_iter().flat_map(both).chain(group_cases()).collect()
}

/// y + s·(drop(x)·Aᵀ)·Bᵀ.
fn lora_case(n: usize, k: usize, m: usize, rank: usize, p: f64, b_trains: bool) -> Case {
    let member = Member { out: m, scale: 0.5, p, trains: [true, b_trains] };
    let frozen = if b_trains { "" } else { ", B frozen" };
    Case {
        op: "lora",
        label: format!("[{n}, {k}] → {rank} → {m}, dropout {p}{frozen}"),
        ..group(n, k, rank, vec![member])
    }
}

/// An update of a group.
#[derive(Debug, Clone, Copy)]
struct Member {
    out: usize,
    scale: f64,
    p: f64,
    /// A, B.
    trains: [bool; 2],
}

impl Member {
    fn mask(&self, i: usize) -> lora::Mask {
        (self.p > 0.0).then_some((Key::new(5, "lora").child(&i.to_string()), self.p))
    }
}

/// Updates that share x, as q, k and v or gate and up do.
fn group_cases() -> Vec<Case> {
    let plain =
        |outs: &[usize], p| outs.iter().map(|out| Member { out: *out, scale: 0.5, p, trains: [true; 2] }).collect();
    let mut cases = vec![
        (33, 136, 16, plain(&[72, 40, 40], 0.1)),
        (7, 72, 8, plain(&[40, 48], 0.0)),
        (5, 70, 24, plain(&[77, 33, 33], 0.1)),
        (130, 72, 64, plain(&[48, 24, 24], 0.1)),
        (1030, 40, 8, plain(&[16, 24], 0.1)),
        (9, 35, 64, plain(&[51, 21, 13], 0.3)),
        (12, 64, 128, plain(&[40, 24, 24], 0.1)),
        (9, 75, 128, plain(&[24, 21], 0.1)),
        (10, 72, 160, plain(&[40, 16, 16], 0.1)),
        (6, 16, 3, plain(&[24, 8, 8], 0.1)),
    ];
    // Neither scales nor masks nor what trains need be alike.
    let mut mixed: Vec<Member> = plain(&[32, 16, 16, 8], 0.2);
    (mixed[1].scale, mixed[2].p, mixed[3].p, mixed[3].trains) = (-1.5, 0.0, 0.0, [false, true]);
    cases.push((20, 48, 16, mixed));
    let mut few: Vec<Member> = plain(&[32, 16, 16], 0.2);
    (few[0].trains, few[2].trains) = ([true, false], [false, false]);
    cases.push((20, 48, 16, few));
    cases.into_iter().map(|(n, k, rank, members)| group(n, k, rank, members)).collect()
}

/// The outputs side by side; the inputs are x, then A, B and y of each member.
fn group(n: usize, k: usize, rank: usize, members: Vec<Member>) -> Case {
    let mut inputs = vec![vec![n, k]];
    inputs.extend(members.iter().flat_map(|m| [vec![rank, k], vec![m.out, rank], vec![n, m.out]]));
    let outs: Vec<usize> = members.iter().map(|m| m.out).collect();
    let parts = |t: &[Tensor]| t[1..].chunks_exact(3).map(|p| [0, 1, 2].map(|j| p[j].clone())).collect::<Vec<_>>();
    let (of_forward, of_backward) = (members.clone(), members.clone());
    Case {
        op: "lora group",
        label: format!("[{n}, {k}] → {rank} → {outs:?}, {}", told(&members)),
        inputs,
        forward: Box::new(move |t| {
            let own = parts(t);
            let group = handed_in(&of_forward, &own);
            let y = own.iter().map(|[.., y]| Ok(y.copy()?)).collect::<Result<Vec<_>>>()?;
            lora::up_(&y.iter().collect::<Vec<_>>(), &lora::down(&t[0], &group)?, &group)?;
            Ok(Tensor::cat(&y, 1)?)
        }),
        backward: Box::new(move |t, dy| {
            let own = parts(t);
            gradients(&of_backward, &handed_in(&of_backward, &own), &t[0], dy)
        }),
        oracle: Box::new(move |t| {
            let mut y = Vec::with_capacity(members.len());
            for (i, (m, [a, b, y0])) in members.iter().zip(parts(t)).enumerate() {
                let x = match m.mask(i) {
                    Some((key, p)) => (&t[0] * dropout(key, &t[0].ones_like()?.detach(), p)?)?,
                    None => t[0].clone(),
                };
                y.push((y0 + (x.matmul(&a.t()?)?.matmul(&b.t()?)? * m.scale)?)?);
            }
            Ok(Tensor::cat(&y, 1)?)
        }),
    }
}

/// Dropout of the members, and what differs from the first.
fn told(members: &[Member]) -> String {
    let first = members[0];
    let one = |m: &Member| {
        let scale = if m.scale == first.scale { String::new() } else { format!(" × {}", m.scale) };
        let frozen = ["A", "B"].iter().zip(m.trains).filter(|(_, t)| !t).map(|(n, _)| format!(" {n} frozen"));
        format!("{}{scale}{}", m.p, frozen.collect::<String>())
    };
    format!("dropout {}", members.iter().map(one).collect::<Vec<_>>().join(" | "))
}

fn handed_in<'a>(members: &[Member], parts: &'a [[Tensor; 3]]) -> Vec<lora::Update<'a>> {
    let both = members.iter().zip(parts).enumerate();
    both.map(|(i, (m, [a, b, _]))| lora::Update { a, b, scale: m.scale, mask: m.mask(i) }).collect()
}

/// Of x, then of A, B and y of each member.
fn gradients(members: &[Member], group: &[lora::Update], x: &Tensor, dy: &Tensor) -> Result<Vec<Option<Tensor>>> {
    let zeros = |t: &Tensor| Ok::<_, Error>(t.zeros_like()?.to_dtype(sum_type(t))?);
    let (mut dys, mut da, mut db, mut at) = (Vec::new(), Vec::new(), Vec::new(), 0);
    for (m, g) in members.iter().zip(group) {
        dys.push(dy.narrow(1, at, m.out)?.contiguous()?);
        da.push(m.trains[0].then(|| zeros(g.a)).transpose()?);
        db.push(m.trains[1].then(|| zeros(g.b)).transpose()?);
        at += m.out;
    }
    let dx = x.zeros_like()?;
    let h = lora::down(x, group)?;
    let sums: fn(&[Option<Tensor>]) -> Vec<Option<&Tensor>> = |d| d.iter().map(Option::as_ref).collect();
    let u = lora::back(&dys.iter().collect::<Vec<_>>(), &h, group, &sums(&db))?;
    lora::add_da(&sums(&da), &u, x, group)?;
    lora::add_dx_(&dx, &u, group)?;
    let mut out = vec![Some(dx)];
    for ((a, b), y) in da.into_iter().zip(db).zip(dys) {
        out.extend([a, b, Some(y)]);
    }
    Ok(out)
}
