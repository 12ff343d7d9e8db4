//! What is grafted onto a backbone. The backbone's own weights stay as they are.

pub mod inserts;
pub mod lora;

use crate::error::Result;
use crate::model::vlm::Vlm;
use crate::ops::random::Key;
use crate::spec::Adapter;

/// Grafts a fresh adapter as the recipe describes it.
pub fn attach(vlm: &mut Vlm, cfg: &Adapter, name: &str, key: Key) -> Result<()> {
    match cfg {
        Adapter::Lora(a) => lora::attach(vlm, a, name, key).map(drop),
        Adapter::Bottleneck(a) => inserts::attach_bottleneck(vlm, a, name, key),
        Adapter::CrossAttention(a) => inserts::attach_cross_attention(vlm, a, name, key),
        Adapter::Prefix(a) => inserts::attach_prefix(vlm, a, name, key),
    }
}
