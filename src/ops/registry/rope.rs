//! Cases of rotary position embedding.

use super::super::{rope, tensor};
use super::{Case, sum_type};
use crate::error::{Error, Result};
use candle_core::{DType, Device, Tensor};

pub(super) fn cases() -> Vec<Case> {
    [(1, 1, 1, 2), (7, 3, 1, 6), (19, 4, 2, 64)].map(|(n, h, kv, hd)| rope_case(n, h, kv, hd)).into()
}

fn rope_case(n: usize, heads: usize, kv_heads: usize, head_dim: usize) -> Case {
    let angles = move |dtype: DType, device: &Device| -> Result<(Tensor, Tensor)> {
        let half = head_dim / 2;
        let a: Vec<f64> = (0..n * half).map(|i| (i / half) as f64 / 10f64.powi((i % half) as i32 % 5)).collect();
        let a = tensor(a, (n, half))?;
        let there = |t: Tensor| t.to_dtype(dtype)?.to_device(device);
        Ok((there(a.cos()?)?, there(a.sin()?)?))
    };
    let widths = [heads * head_dim, kv_heads * head_dim];
    let turned = move |t: &[Tensor], back: bool| -> Result<[Tensor; 2]> {
        let (cos, sin) = angles(sum_type(&t[0]), t[0].device())?;
        let (q, k) = (t[0].copy()?, t[1].copy()?);
        if back {
            rope::rotate_back_(&q, &k, &cos, &sin)?
        } else {
            rope::rotate_(&q, &k, &cos, &sin)?
        }
        Ok([q, k])
    };
    Case {
        op: "rope",
        label: format!("[{n}, ({heads} + {kv_heads})·{head_dim}]"),
        inputs: widths.map(|w| vec![n, w]).to_vec(),
        forward: Box::new(move |t| Ok(Tensor::cat(&turned(t, false)?, 1)?)),
        backward: Box::new(move |_, dy| {
            let part = |at: usize, w: usize| Ok::<_, Error>(dy.narrow(1, at, w)?.contiguous()?);
            Ok(turned(&[part(0, widths[0])?, part(widths[0], widths[1])?], true)?.map(Some).to_vec())
        }),
        oracle: Box::new(move |t| {
            let (cos, sin) = angles(t[0].dtype(), t[0].device())?;
            let turn = |x: &Tensor, h: usize| -> Result<Tensor> {
                let x = x.reshape((n, h, head_dim))?.transpose(0, 1)?.contiguous()?.unsqueeze(0)?;
                let y = candle_nn::rotary_emb::rope_slow(&x, &cos, &sin)?;
                Ok(y.squeeze(0)?.transpose(0, 1)?.reshape((n, h * head_dim))?)
            };
            Ok(Tensor::cat(&[turn(&t[0], heads)?, turn(&t[1], kv_heads)?], 1)?)
        }),
    }
}
