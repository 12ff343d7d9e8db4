//! Where in a pass numbers break: a pass that has given something that is no number runs again and is watched.

use crate::error::Result;
use crate::ops::adamw::sum_of_squares;
use candle_core::Tensor;
use std::cell::RefCell;

thread_local! {
    /// While a pass is watched, the first module whose output was not finite.
    static FIRST: RefCell<Option<Option<String>>> = const { RefCell::new(None) };
}

/// Runs `pass`, whatever it returns, and names the first module whose output holds NaN or infinite values.
pub fn first_broken<T>(pass: impl FnOnce() -> T) -> Option<String> {
    FIRST.set(Some(None));
    pass();
    FIRST.take().flatten()
}

/// Shows a module's output to a watch, if there is one.
pub fn see(module: &str, output: &Tensor) -> Result<()> {
    if FIRST.with_borrow(|f| matches!(f, Some(None))) && !sum_of_squares(output)?.is_finite() {
        FIRST.set(Some(Some(module.to_string())));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn names_the_first_and_only_while_watched() {
        let [good, bad] = [1.0f32, f32::INFINITY].map(|x| Tensor::from_vec(vec![x, 2.0], 2, &Device::Cpu).unwrap());
        let pass = |second: &Tensor| {
            see("a", &good).unwrap();
            see("b", second).unwrap();
            see("c", &bad).unwrap();
        };
        pass(&bad);
        assert_eq!(first_broken(|| pass(&bad)).as_deref(), Some("b"));
        assert_eq!(first_broken(|| pass(&good)).as_deref(), Some("c"));
        assert_eq!(first_broken(|| see("a", &good).unwrap()), None);
    }
}
