//! Pictures to patches: the im2col of a convolution whose stride equals its kernel, and back.

use super::launch::{Arg, Grid, Path, empty, launch, narrow, path, widen};
use super::{data, dispatch, tensor};
use crate::bail;
use crate::error::Result;
use candle_core::Tensor;

/// `[B, C, S, S]` → `[B·(S/p)², C·p·p]`: one row a patch, in the order of a `[D, C, p, p]` kernel.
pub fn unfold(pixels: &Tensor, patch: usize) -> Result<Tensor> {
    let &[b, c, h, w] = pixels.dims() else { bail!("patches: expected [B, C, H, W], found {:?}", pixels.dims()) };
    if patch == 0 || h % patch != 0 || w % patch != 0 {
        bail!("patches: {h}×{w} pixels are no multiple of the patch size {patch}")
    }
    let (gh, gw) = (h / patch, w / patch);
    match path("patches", pixels)? {
        Path::Kernel => return kernel(pixels, patch, (b * gh * gw, c * patch * patch)),
        Path::Widened => return narrow(&unfold(&widen(pixels)?, patch)?),
        Path::Reference => {}
    }
    dispatch!(pixels, "patches", T => {
        let px = data::<T>(pixels)?;
        let mut out = Vec::with_capacity(px.len());
        for image in px.chunks_exact((c * h * w).max(1)) {
            for (y, x) in (0..gh).flat_map(|y| (0..gw).map(move |x| (y, x))) {
                for channel in image.chunks_exact(h * w) {
                    for row in 0..patch {
                        let at = (y * patch + row) * w + x * patch;
                        out.extend_from_slice(&channel[at..at + patch]);
                    }
                }
            }
        }
        tensor(out, (b * gh * gw, c * patch * patch))
    })
}

fn kernel(pixels: &Tensor, p: usize, shape: (usize, usize)) -> Result<Tensor> {
    let (out, (n, d)) = (empty(pixels, pixels.dtype(), shape)?, shape);
    let mut args = vec![Arg::In(pixels), Arg::Out(&out), Arg::len(n)?];
    for size in pixels.dims().iter().skip(1).chain([&p]) {
        args.push(Arg::len(*size)?);
    }
    launch("elementwise", "unfold", pixels.dtype(), Grid::rows(n, d, 1), &args)?;
    Ok(out)
}
