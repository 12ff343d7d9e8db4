//! Visual tokens that are offered to the layers instead of standing among the text (`model.deliver = "cross_attention"`).

use crate::bail;
use crate::error::Result;
use crate::ops::attention::{Segment, Sequences};
use crate::spec::Sees;
use candle_core::Tensor;

/// The visual tokens of a micro-batch, and who sees them.
#[derive(Debug, Clone)]
pub struct Visual {
    /// Of the distinct pictures' pieces, `[pieces·tokens, D]`, and the newline token where one is shown.
    pub tokens: Tensor,
    /// Does a backward pass have to give their gradient?
    pub need_grad: bool,
    last: View,
    all: View,
}

/// Visual tokens in the order in which an insert reads them.
#[derive(Debug, Clone, Default)]
pub struct View {
    /// Rows of [`Visual::tokens`]; no two sequences share keys, so a token may come more than once.
    pub rows: Vec<u32>,
    /// Rows of the stream, and the keys that they see.
    pub sequences: Sequences,
}

/// A picture in the stream: from its row on, until the next picture's row or the sequence's end, it is the last one seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// The sequence.
    pub owner: usize,
    /// Its rows of the stream.
    pub rows: std::ops::Range<usize>,
    /// Rows of [`Visual::tokens`] that belong to the picture.
    pub tokens: Vec<u32>,
}

/// What a distinct picture of a batch is made of, if it is not seen at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// Pictures of the tower.
    pub pieces: usize,
    /// Its visual tokens in their order: rows of its pieces' projected features, or the newline token (`None`).
    pub tokens: Vec<Option<u32>>,
}

/// Rows of the visual tokens of each distinct picture: of the pieces' projected features, `per` a piece, or the row behind them
/// all for a newline. Without `layouts` each piece is a picture.
pub fn rows(layouts: &[Option<Layout>], pieces: usize, per: usize) -> Result<Vec<Vec<u32>>> {
    let newline = (pieces * per) as u32;
    let plain: Vec<Option<Layout>>;
    let layouts = if layouts.is_empty() {
        plain = vec![None; pieces];
        &plain
    } else {
        layouts
    };
    let (mut out, mut first) = (Vec::with_capacity(layouts.len()), 0u32);
    for layout in layouts {
        let (n, rows) = match layout {
            None => (1, (first..first + per as u32).collect::<Vec<u32>>()),
            Some(l) => (l.pieces, l.tokens.iter().map(|t| t.map_or(newline, |k| first + k)).collect()),
        };
        out.push(rows);
        first += (n * per) as u32;
    }
    if first != newline || out.iter().flatten().any(|row| *row > newline) {
        bail!("the pictures' layouts do not belong to {pieces} pictures of the tower with {per} visual tokens each")
    }
    Ok(out)
}

impl Visual {
    /// `shown`: in the order of the stream.
    pub fn new(tokens: Tensor, need_grad: bool, shown: &[Shown]) -> Self {
        let (mut last, mut all) = (Build::default(), Build::default());
        for (i, s) in shown.iter().enumerate() {
            last.push(&s.rows, std::slice::from_ref(s));
            let first = shown[..i].iter().position(|before| before.owner == s.owner).unwrap_or(i);
            all.push(&s.rows, &shown[first..=i]);
        }
        Self { tokens, need_grad, last: last.done(), all: all.done() }
    }

    /// What each row sees: the last picture before it, or all of them.
    pub fn view(&self, sees: Sees) -> &View {
        match sees {
            Sees::Last => &self.last,
            Sees::All => &self.all,
        }
    }
}

#[derive(Default)]
struct Build {
    rows: Vec<u32>,
    segments: Vec<Segment>,
}

impl Build {
    fn push(&mut self, queries: &std::ops::Range<usize>, pictures: &[Shown]) {
        let start = self.rows.len();
        pictures.iter().for_each(|p| self.rows.extend(&p.tokens));
        if !queries.is_empty() && self.rows.len() > start {
            self.segments.push(Segment::new(queries.clone(), start..self.rows.len()));
        }
    }

    fn done(self) -> View {
        View { rows: self.rows, sequences: self.segments.into() }
    }
}
