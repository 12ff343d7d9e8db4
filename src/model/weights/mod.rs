pub struct Weights;
impl Weights {
    pub fn take(
        &mut self,
        _n: &str,
        _s: &[usize],
        _d: candle_core::DType,
        _v: &candle_core::Device,
    ) -> crate::error::Result<candle_core::Tensor> {
        crate::bail!("x")
    }
}
