//! Rotary embeddings in every spelling of a `config.json`.

use super::language::RopeScaling;
use crate::error::{Error, Result};
use crate::model::config::fields::Fields;
use crate::model::config::unsupported;

/// Base of the rotary embedding where no file names one.
const THETA: f64 = 10000.0;

/// Base and scaling of the rotary embedding, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`
/// (transformers 4; `type` instead of `rope_type` in older files).
///
/// Where both are given, `rope_scaling` takes the place of `rope_parameters` as a whole, its base included, unless it is empty
/// (`convert_rope_params_to_dict` of transformers 5). `positions`: what `max_position_embeddings` is.
pub(super) fn read(f: &Fields, positions: usize) -> Result<(f64, RopeScaling)> {
    let old = f.object("rope_scaling")?.filter(|r| !r.is_empty());
    let new = f.object("rope_parameters")?;
    let flat_theta = f.positive("rope_theta")?;
    let flat_part = f.number("partial_rotary_factor")?;
    let Some(r) = old.or(new) else { return Ok((flat_theta.unwrap_or(THETA), RopeScaling::None)) };
    let theta = r.positive("rope_theta")?.or(flat_theta).unwrap_or(THETA);
    if let Some((key, value)) = r.first_object() {
        return Err(unsupported(r.path(), key, &value.to_string(), "one set of parameters for all layers"));
    }
    // At 0 or below, angles would be infinite or run backwards.
    let need = |key| r.positive(key)?.ok_or_else(|| missing(&r, key));
    let (rope_type, old_type) = (r.text("rope_type")?, r.text("type")?);
    let scaling = match rope_type.or(old_type).unwrap_or("default") {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: need("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: need("factor")?,
            low_freq_factor: need("low_freq_factor")?,
            high_freq_factor: need("high_freq_factor")?,
            original_max_position_embeddings: r
                .positive("original_max_position_embeddings")?
                .unwrap_or(positions as f64),
        },
        other => return Err(unsupported(r.path(), "rope_type", other, "default, linear, llama3")),
    };
    // LLaMA without scaling turns all of a head, whatever stands beside it.
    let part = r.number("partial_rotary_factor")?.or(flat_part.filter(|_| scaling != RopeScaling::None));
    if let Some(p) = part.filter(|p| *p != 1.0) {
        return Err(unsupported(r.path(), "partial_rotary_factor", &p.to_string(), "1"));
    }
    Ok((theta, scaling))
}

fn missing(r: &Fields, key: &str) -> Error {
    Error::new(format!("`{}{key}` is missing", r.path()))
        .hint("this kind of scaling needs it: copy the value from the repository that the model comes from")
}
