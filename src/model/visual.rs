//! Visual tokens that are offered to the layers instead of standing among the text (`model.deliver = "cross_attention"`).

use crate::ops::attention::{Segment, Sequences};
use crate::recipe::schema::Sees;
use candle_core::Tensor;

/// The visual tokens of a micro-batch, and who sees them.
#[derive(Debug, Clone)]
pub struct Visual {
    /// Of the distinct pictures, `[I·tokens, D]`.
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
    pub tokens: std::ops::Range<u32>,
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
        pictures.iter().for_each(|p| self.rows.extend(p.tokens.clone()));
        if !queries.is_empty() && self.rows.len() > start {
            self.segments.push(Segment::new(queries.clone(), start..self.rows.len()));
        }
    }

    fn done(self) -> View {
        View { rows: self.rows, sequences: self.segments.into() }
    }
}
