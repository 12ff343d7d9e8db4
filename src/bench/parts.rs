//! Time by part of a step. The model opens a tracing span for each part; here something listens that waits for the device at
//! both ends of each. The waits cost time, so that such a pass is not the one that a speed is told of.

use crate::error::{Error, Result};
use candle_core::Device;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;
use tracing::level_filters::LevelFilter;
use tracing::span::Id;
use tracing::{Metadata, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

/// Names of the parts' spans, in the order of a step; none lies inside another.
pub const PARTS: [&str; 9] = [
    "tower",
    "projector",
    "language",
    "head",
    "head backward",
    "language backward",
    "projector backward",
    "tower backward",
    "optimizer",
];

#[derive(Default)]
struct State {
    begun: Option<Instant>,
    seconds: BTreeMap<&'static str, f64>,
    failed: Option<candle_core::Error>,
}

/// Listens to the parts' spans.
struct Listener {
    device: Device,
    state: Arc<Mutex<State>>,
}

impl Listener {
    /// With the device at rest.
    fn with(&self, f: impl FnOnce(&mut State)) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(e) = self.device.synchronize() {
            state.failed.get_or_insert(e);
        }
        f(&mut state);
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Listener {
    fn enabled(&self, metadata: &Metadata<'_>, _: Context<'_, S>) -> bool {
        metadata.is_span() && PARTS.contains(&metadata.name())
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::DEBUG)
    }

    fn on_enter(&self, _: &Id, _: Context<'_, S>) {
        self.with(|state| state.begun = Some(Instant::now()));
    }

    fn on_exit(&self, id: &Id, ctx: Context<'_, S>) {
        self.with(|state| {
            if let (Some(begun), Some(name)) = (state.begun.take(), ctx.metadata(id).map(Metadata::name)) {
                *state.seconds.entry(name).or_default() += begun.elapsed().as_secs_f64();
            }
        });
    }
}

/// Runs `work` and tells the seconds of each part in it.
pub fn by_part(device: &Device, work: impl FnOnce() -> Result<()>) -> Result<BTreeMap<&'static str, f64>> {
    let state = Arc::new(Mutex::new(State::default()));
    let listener = Listener { device: device.clone(), state: state.clone() };
    tracing::subscriber::with_default(tracing_subscriber::registry().with(listener), work)?;
    let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
    match state.failed.take() {
        Some(e) => Err(Error::from(e).context("waiting for the device")),
        None => Ok(std::mem::take(&mut state.seconds)),
    }
}
