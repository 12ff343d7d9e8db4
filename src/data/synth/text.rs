//! How scenes are put into words: captions, questions with their answers, questions about what is absent.

use super::rng::Rng;
use super::scene::{Color, Object, Place, Scene, Shape, held_out, seen_combinations};

/// What the model says when the thing asked about is not there.
pub const NONE: &str = "there is none";
/// What a picture is asked for its caption.
pub const DESCRIBE: &str = "describe the picture.";

/// What is asked; the name is the sample's `category`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Color,
    Shape,
    ColorAt,
    ShapeAt,
    Where,
    Exists,
    Count,
    CountShape,
}

impl Kind {
    pub const ALL: [Self; 8] = [
        Self::Color,
        Self::Shape,
        Self::ColorAt,
        Self::ShapeAt,
        Self::Where,
        Self::Exists,
        Self::Count,
        Self::CountShape,
    ];
    /// The kinds that bind an object to its place: the hard ones for a small language model.
    pub const RELATIONAL: [Self; 4] = [Self::ColorAt, Self::ShapeAt, Self::Where, Self::Exists];
    /// The kinds that can be asked about something absent such that an answer in the usual form names it.
    pub const ABSENT: [Self; 3] = [Self::Exists, Self::Shape, Self::ShapeAt];

    pub fn name(self) -> &'static str {
        match self {
            Self::Color => "color",
            Self::Shape => "shape",
            Self::ColorAt => "color_at",
            Self::ShapeAt => "shape_at",
            Self::Where => "where",
            Self::Exists => "exists",
            Self::Count => "count",
            Self::CountShape => "count_shape",
        }
    }
}

/// A question about what is there, and the answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    pub kind: Kind,
    pub prompt: String,
    pub answer: String,
}

/// A question about what is not there. The right answer is [`NONE`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Absence {
    pub kind: Kind,
    pub prompt: String,
    /// The answer of a model that assumes it is there: it names something that is not.
    pub rejected: String,
    /// Phrases of which none may occur in an answer.
    pub phrases: Vec<String>,
}

/// "a red cross top-left, a blue square bottom-right."
pub fn caption(scene: &Scene) -> String {
    sentence(scene.objects.iter().map(|o| format!("a {} {}", o.name(), o.place.word())))
}

/// "red cross top-left, blue square bottom-right": the attribute words alone.
pub fn attributes(scene: &Scene) -> String {
    let parts: Vec<_> = scene.objects.iter().map(|o| format!("{} {}", o.name(), o.place.word())).collect();
    parts.join(", ")
}

/// The scene as text, in any order: "top-left a red cross, bottom-right a blue square." The place stands first, always: with
/// the place now before, now after, a small language model does not learn which object it belongs to.
pub fn retell(scene: &Scene, rng: &mut Rng) -> String {
    let mut objects = scene.objects.clone();
    if rng.chance(0.5) {
        rng.shuffle(&mut objects);
    }
    let article = if rng.chance(0.5) { "a " } else { "" };
    sentence(objects.iter().map(|o| format!("{} {article}{}", o.place.word(), o.name())))
}

fn sentence(parts: impl Iterator<Item = String>) -> String {
    let mut s = parts.collect::<Vec<_>>().join(", ");
    s.push('.');
    s
}

/// A question of this kind about this scene, or `None` if the scene has no unambiguous one. It is about a held-out
/// combination wherever the scene has one.
pub fn question(kind: Kind, scene: &Scene, rng: &mut Rng) -> Option<Question> {
    let fits = |o: &Object| match kind {
        Kind::Color => scene.count(o.shape) == 1,
        Kind::Shape => scene.count_color(o.color) == 1,
        _ => true,
    };
    let mut candidates: Vec<Object> = scene.objects.iter().copied().filter(fits).collect();
    if candidates.iter().any(Object::held_out) {
        candidates.retain(Object::held_out);
    }
    let o = rng.pick(&candidates)?;
    let answer = match kind {
        Kind::Color | Kind::ColorAt => o.color.word().into(),
        Kind::Shape | Kind::ShapeAt => o.shape.word().into(),
        Kind::Where => o.place.word().into(),
        Kind::Exists => yes(o.color, o.shape, o.place),
        Kind::Count => number(scene.objects.len()).into(),
        Kind::CountShape => number(scene.count(o.shape)).into(),
    };
    Some(Question { kind, prompt: prompt(kind, o.color, o.shape, o.place), answer })
}

/// A question of this kind about something that is not in the scene, or `None` where the kind has no such question.
pub fn absence(kind: Kind, scene: &Scene, rng: &mut Rng) -> Option<Absence> {
    let shown = rng.pick(&scene.objects)?;
    let shapes = || Shape::ALL.iter().map(|s| s.word().to_string()).collect();
    let (color, shape, place, phrases) = match kind {
        Kind::Exists => {
            let mut absent = seen_combinations();
            absent.retain(|&(c, s)| !scene.has(c, s));
            if rng.chance(0.5) {
                // Half of them share a colour or a shape with what is shown.
                absent.retain(|&(c, s)| c == shown.color || s == shown.shape);
            }
            let (color, shape) = rng.pick(&absent)?;
            (color, shape, shown.place, vec!["yes".into(), format!("{} {}", color.word(), shape.word())])
        }
        Kind::Shape => {
            let absent: Vec<Color> = Color::ALL.iter().copied().filter(|&c| scene.count_color(c) == 0).collect();
            let color = rng.pick(&absent)?;
            let shapes_of: Vec<Shape> = Shape::ALL.iter().copied().filter(|&s| !held_out(color, s)).collect();
            (color, rng.pick(&shapes_of)?, shown.place, shapes())
        }
        Kind::ShapeAt => (shown.color, rng.pick(Shape::ALL)?, rng.pick(&scene.empty_places())?, shapes()),
        _ => return None,
    };
    let rejected = if kind == Kind::Exists { yes(color, shape, place) } else { shape.word().into() };
    Some(Absence { kind, prompt: prompt(kind, color, shape, place), rejected, phrases })
}

fn prompt(kind: Kind, color: Color, shape: Shape, place: Place) -> String {
    let (color, place) = (color.word(), place.word());
    match kind {
        Kind::Color => format!("what color is the {}?", shape.word()),
        Kind::Shape => format!("what shape is {color}?"),
        Kind::ColorAt => format!("what color is {place}?"),
        Kind::ShapeAt => format!("what shape is {place}?"),
        Kind::Where => format!("where is the {color} {}?", shape.word()),
        Kind::Exists => format!("is there a {color} {}?", shape.word()),
        Kind::Count => "how many shapes?".into(),
        Kind::CountShape => format!("how many {}?", shape.plural()),
    }
}

fn yes(color: Color, shape: Shape, place: Place) -> String {
    format!("yes, a {} {} {}", color.word(), shape.word(), place.word())
}

fn number(n: usize) -> &'static str {
    ["zero", "one", "two", "three", "four"].get(n).copied().unwrap_or("many")
}
