//! Draws a scene: flat shapes with soft edges over a tinted background, with jitter and noise.
//!
//! Each shape is the set where a signed distance (in pixels, negative inside) is below zero; the edge pixel's
//! coverage is ½ − distance, clamped to 0..1. Only +, −, ×, ÷, √ are used, so every machine draws the same bytes.

use super::rng::Rng;
use super::scene::{Color, Place, Scene, Shape};

/// Pixels along one edge of a picture.
pub const PIXELS: usize = 48;

/// Jittered geometry of one object, in pixels.
struct Pose {
    center: [f32; 2],
    /// Half the extent.
    size: f32,
    /// Cosine and sine of a small turn.
    turn: [f32; 2],
}

/// RGB bytes, row by row: `[PIXELS, PIXELS, 3]`.
pub fn render(scene: &Scene, rng: &mut Rng) -> Vec<u8> {
    let mut canvas = background(rng);
    for object in &scene.objects {
        let pose = pose(object.place, rng);
        let ink = ink(object.color, rng);
        paint(&mut canvas, |x, y| distance(object.shape, &pose, x, y), ink);
    }
    let mut noise = [0u8; 4];
    let mut bytes = Vec::with_capacity(canvas.len());
    for (i, v) in canvas.iter().enumerate() {
        if i % 4 == 0 {
            noise = rng.bits().to_le_bytes();
        }
        let n = (f32::from(noise[i % 4]) - 127.5) * (8.0 / 127.5);
        bytes.push((v + n + 0.5).clamp(0.0, 255.0) as u8);
    }
    bytes
}

/// A grey of any middle lightness, slightly tinted, slightly lighter towards one side.
fn background(rng: &mut Rng) -> Vec<f32> {
    let grey = rng.range(60.0, 190.0);
    let tint: [f32; 3] = std::array::from_fn(|_| rng.range(-15.0, 15.0));
    let slope = [rng.range(-0.4, 0.4), rng.range(-0.4, 0.4)];
    let half = PIXELS as f32 / 2.0;
    let mut canvas = Vec::with_capacity(PIXELS * PIXELS * 3);
    for y in 0..PIXELS {
        for x in 0..PIXELS {
            let light = grey + slope[0] * (x as f32 - half) + slope[1] * (y as f32 - half);
            canvas.extend(tint.iter().map(|t| light + t));
        }
    }
    canvas
}

fn pose(place: Place, rng: &mut Rng) -> Pose {
    let cell = PIXELS as f32 / 2.0;
    let (column, row) = match place {
        Place::TopLeft => (0.5, 0.5),
        Place::TopRight => (1.5, 0.5),
        Place::BottomLeft => (0.5, 1.5),
        Place::BottomRight => (1.5, 1.5),
    };
    let size = rng.range(6.5, 9.5);
    let center = [cell * column + rng.range(-2.0, 2.0), cell * row + rng.range(-2.0, 2.0)];
    // The rational circle: t = tan(angle / 2), here up to 12 degrees.
    let t = rng.range(-0.105, 0.105);
    let d = 1.0 + t * t;
    Pose { center, size, turn: [(1.0 - t * t) / d, 2.0 * t / d] }
}

fn ink(color: Color, rng: &mut Rng) -> [f32; 3] {
    let base: [f32; 3] = match color {
        Color::Red => [215.0, 35.0, 35.0],
        Color::Green => [35.0, 175.0, 45.0],
        Color::Blue => [40.0, 60.0, 220.0],
        Color::Yellow => [230.0, 215.0, 40.0],
        Color::Purple => [165.0, 45.0, 190.0],
        Color::Cyan => [40.0, 205.0, 215.0],
    };
    base.map(|v| v + rng.range(-25.0, 25.0))
}

/// Signed distance of a point from the shape's edge. Beyond a corner it is an underestimate, which rounds no corner.
fn distance(shape: Shape, pose: &Pose, x: f32, y: f32) -> f32 {
    let (dx, dy) = (x - pose.center[0], y - pose.center[1]);
    let [c, s] = pose.turn;
    let (u, v) = (c * dx + s * dy, c * dy - s * dx);
    let r = pose.size;
    let bar = |half_width: f32, half_height: f32| (u.abs() - half_width).max(v.abs() - half_height);
    match shape {
        Shape::Circle => (u * u + v * v).sqrt() - r,
        Shape::Square => bar(0.88 * r, 0.88 * r),
        Shape::Cross => bar(0.34 * r, r).min(bar(r, 0.34 * r)),
        // Base at v = 0.8 r, tip at v = −r, base 2 r wide: side normals (1.8, ∓1) / |…|.
        Shape::Triangle => {
            let n = (1.8f32 * 1.8 + 1.0).sqrt();
            (v - 0.8 * r).max((1.8 * u.abs() - (v + r)) / n)
        }
    }
}

fn paint(canvas: &mut [f32], distance: impl Fn(f32, f32) -> f32, ink: [f32; 3]) {
    for (i, pixel) in canvas.chunks_exact_mut(3).enumerate() {
        let (x, y) = ((i % PIXELS) as f32 + 0.5, (i / PIXELS) as f32 + 0.5);
        let cover = (0.5 - distance(x, y)).clamp(0.0, 1.0);
        for (v, ink) in pixel.iter_mut().zip(ink) {
            *v += cover * (ink - *v);
        }
    }
}
