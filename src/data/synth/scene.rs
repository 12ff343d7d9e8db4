//! What a picture shows: one to three coloured shapes in the four places of a 2 × 2 grid.

use super::rng::Rng;

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($variant:ident = $word:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum $name { $($variant),* }
        impl $name {
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];
            /// The word for it.
            pub fn word(self) -> &'static str {
                match self { $(Self::$variant => $word),* }
            }
        }
    };
}

words!(
    /// The corners of the RGB cube that are not grey.
    Color { Red = "red", Green = "green", Blue = "blue", Yellow = "yellow", Purple = "purple", Cyan = "cyan" }
);
words!(
    Shape { Circle = "circle", Square = "square", Triangle = "triangle", Cross = "cross" }
);
words!(
    /// In reading order. One word each, so that a small language model has less to bind.
    Place { TopLeft = "top-left", TopRight = "top-right", BottomLeft = "bottom-left", BottomRight = "bottom-right" }
);

impl Shape {
    pub fn plural(self) -> &'static str {
        match self {
            Self::Circle => "circles",
            Self::Square => "squares",
            Self::Triangle => "triangles",
            Self::Cross => "crosses",
        }
    }
}

/// Combinations that no training sample shows, names or asks about.
pub const HELD_OUT: [(Color, Shape); 3] =
    [(Color::Red, Shape::Triangle), (Color::Blue, Shape::Circle), (Color::Yellow, Shape::Cross)];

/// True for a combination that training never sees.
pub fn held_out(color: Color, shape: Shape) -> bool {
    HELD_OUT.contains(&(color, shape))
}

/// The combinations of training, in a fixed order.
pub fn seen_combinations() -> Vec<(Color, Shape)> {
    let all = Color::ALL.iter().flat_map(|&c| Shape::ALL.iter().map(move |&s| (c, s)));
    all.filter(|&(c, s)| !held_out(c, s)).collect()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Object {
    pub color: Color,
    pub shape: Shape,
    pub place: Place,
}

impl Object {
    /// "red circle".
    pub fn name(&self) -> String {
        format!("{} {}", self.color.word(), self.shape.word())
    }
    pub fn held_out(&self) -> bool {
        held_out(self.color, self.shape)
    }
}

/// One to three objects in different places, in reading order; no two alike in both colour and shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scene {
    pub objects: Vec<Object>,
}

impl Scene {
    /// Draws a scene from the combinations of training; with `unseen`, exactly one object is a held-out combination.
    ///
    /// A second object shares the first one's shape more often than chance would have it, so that counting shapes is
    /// worth asking.
    pub fn draw(rng: &mut Rng, unseen: bool) -> Self {
        let mut places = Place::ALL.to_vec();
        rng.shuffle(&mut places);
        places.truncate(1 + rng.below(3));
        let mut pool = seen_combinations();
        rng.shuffle(&mut pool);
        if unseen {
            pool.insert(0, HELD_OUT[rng.below(HELD_OUT.len())]);
        }
        if rng.chance(0.3)
            && let Some(twin) = (1..pool.len()).find(|&i| pool[i].1 == pool[0].1)
        {
            pool.swap(1, twin);
        }
        let mut objects: Vec<Object> =
            pool.into_iter().zip(places).map(|((color, shape), place)| Object { color, shape, place }).collect();
        objects.sort_by_key(|o| o.place);
        Self { objects }
    }

    /// Is there an object of this colour and shape?
    pub fn has(&self, color: Color, shape: Shape) -> bool {
        self.objects.iter().any(|o| (o.color, o.shape) == (color, shape))
    }

    /// Objects of this shape.
    pub fn count(&self, shape: Shape) -> usize {
        self.objects.iter().filter(|o| o.shape == shape).count()
    }

    /// Objects of this colour.
    pub fn count_color(&self, color: Color) -> usize {
        self.objects.iter().filter(|o| o.color == color).count()
    }

    /// Places where nothing is.
    pub fn empty_places(&self) -> Vec<Place> {
        Place::ALL.iter().copied().filter(|p| self.objects.iter().all(|o| o.place != *p)).collect()
    }
}
