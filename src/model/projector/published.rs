//! What a published connector's `config.json` says and no shape of a tensor shows: heads, activations, ε. A recipe that says
//! otherwise would load the weights and compute something else with them.

use crate::bail;
use crate::error::Result;
use crate::model::config::ACTIVATIONS;
use crate::spec::{Activation, PerceiverProjector, Projector, QformerProjector};
use serde_json::Value;

/// Is the recipe's projector the one that `config` describes? A `config` of any other model says nothing of it. Keys that it
/// lacks have transformers' defaults.
pub fn check(projector: &Projector, config: &Value) -> Result<()> {
    let kind = config["model_type"].as_str().unwrap_or_default();
    match (projector, kind) {
        (Projector::Perceiver(p), "idefics2") => perceiver(p, &config["perceiver_config"], &config["text_config"]),
        (Projector::Qformer(p), "blip-2") => qformer(p, &config["qformer_config"]),
        (Projector::Qformer(p), "blip_2_qformer") => qformer(p, config),
        _ => Ok(()),
    }
}

fn perceiver(p: &PerceiverProjector, own: &Value, text: &Value) -> Result<()> {
    equal("heads", p.heads, count(own, "resampler_n_heads", 16))?;
    equal("kv_heads", p.kv_heads, count(own, "num_key_value_heads", 4))?;
    equal("act", p.act, act(own, "silu")?)?;
    equal("act", p.act, act(text, "silu")?)?;
    // Where the widths differ, transformers takes both of them from the language model.
    let foreign = count(own, "hidden_size", 4096) != count(text, "hidden_size", 4096);
    let eps = if foreign { number(text, "rms_norm_eps", 1e-5) } else { number(own, "rms_norm_eps", 1e-6) };
    equal("norm_eps", p.norm_eps, eps)
}

fn qformer(p: &QformerProjector, own: &Value) -> Result<()> {
    equal("heads", p.heads, count(own, "num_attention_heads", 12))?;
    equal("act", p.act, act(own, "gelu")?)?;
    match number(own, "layer_norm_eps", 1e-12) {
        1e-12 => Ok(()),
        other => bail!("its config.json has layer_norm_eps = {other:e}"; "only BERT's 1e-12 is supported"),
    }
}

fn count(config: &Value, key: &str, default: usize) -> usize {
    config[key].as_u64().map_or(default, |n| n as usize)
}

fn number(config: &Value, key: &str, default: f64) -> f64 {
    config[key].as_f64().unwrap_or(default)
}

fn act(config: &Value, default: &str) -> Result<Activation> {
    let name = config["hidden_act"].as_str().unwrap_or(default);
    match ACTIVATIONS.iter().find(|(n, _)| *n == name) {
        Some((_, act)) => Ok(*act),
        None => {
            bail!("its config.json has the activation `{name}`"; "there are {}", ACTIVATIONS.map(|(n, _)| n).join(", "))
        }
    }
}

fn equal<T: PartialEq + std::fmt::Debug>(key: &str, recipe: T, published: T) -> Result<()> {
    if recipe != published {
        bail!("{key} = {recipe:?}, but the config.json beside the weights says {published:?}"; "set {key} to what it says")
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn projector(value: Value) -> Projector {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn the_defaults_are_the_published_ones() {
        let (perceiver, qformer) = (projector(json!({"perceiver": {}})), projector(json!({"qformer": {}})));
        check(&perceiver, &json!({"model_type": "idefics2"})).unwrap();
        check(&qformer, &json!({"model_type": "blip-2"})).unwrap();
        check(&qformer, &json!({"model_type": "blip_2_qformer"})).unwrap();
        // Nothing is said of a projector of ours.
        check(&qformer, &json!({"num_attention_heads": 3})).unwrap();
    }

    #[test]
    fn what_no_shape_shows_is_compared() {
        let says = |p: &Value, config: Value| check(&projector(p.clone()), &config).unwrap_err().report();
        let p = json!({"perceiver": {}});
        let idefics2 =
            |own: Value, text: Value| json!({"model_type": "idefics2", "perceiver_config": own, "text_config": text});
        let same = "but the config.json beside the weights says";
        let e = says(&p, idefics2(json!({"resampler_n_heads": 8}), json!({})));
        assert_eq!(e, format!("heads = 16, {same} 8\n\nhint: set heads to what it says"));
        assert!(says(&p, idefics2(json!({"num_key_value_heads": 2}), json!({}))).contains("kv_heads = 4"));
        assert!(says(&p, idefics2(json!({}), json!({"hidden_act": "gelu"}))).contains("act = Silu"));
        assert!(says(&p, idefics2(json!({"hidden_act": "gelu"}), json!({}))).contains("act = Silu"));
        assert!(says(&p, idefics2(json!({"rms_norm_eps": 1e-5}), json!({}))).contains("norm_eps = 1e-6"));
        assert!(says(&p, idefics2(json!({}), json!({"hidden_size": 8}))).contains("norm_eps = 1e-6"));
        let q = json!({"qformer": {}});
        let alone = |key: &str, value: Value| json!({"model_type": "blip_2_qformer", key: value});
        assert!(says(&q, alone("num_attention_heads", json!(6))).contains(&format!("heads = 12, {same} 6")));
        assert!(says(&q, alone("hidden_act", json!("relu"))).contains("act = Gelu"));
        assert!(says(&q, alone("hidden_act", json!("tanh"))).contains("the activation `tanh`"));
        assert!(says(&q, alone("layer_norm_eps", json!(1e-5))).contains("layer_norm_eps = 1e-5"));
        let inside = json!({"model_type": "blip-2", "qformer_config": {"num_attention_heads": 6}});
        assert!(says(&q, inside).contains("heads = 12"));
    }
}
