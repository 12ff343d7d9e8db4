//! LLaVA-NeXT (HF `LlavaNextForConditionalGeneration`): a LLaVA whose pictures are cut into tiles.

use super::{Container, WholeConfig, llava};
use crate::error::Result;
use crate::model::config::fields::Fields;
use serde_json::{Value, json};

/// LLaVA-NeXT. Beside a LLaVA's tensors it has `image_newline` (`model.image_newline`).
pub static CONTAINER: Container = Container {
    model_type: "llava_next",
    classes: &["Llava"],
    read,
    write,
    processor: |config, image_token| {
        let mut processor = (llava::CONTAINER.processor)(config, image_token);
        processor["processor_class"] = json!("LlavaNextProcessor");
        processor
    },
    prefixes: llava::PREFIXES,
};

fn read(f: &Fields) -> Result<WholeConfig> {
    Ok(WholeConfig { container: &CONTAINER, newline: true, ..(llava::CONTAINER.read)(f)? })
}

fn write(config: &WholeConfig) -> Value {
    let mut json = (llava::CONTAINER.write)(config);
    json["architectures"] = json!(["LlavaNextForConditionalGeneration"]);
    json["model_type"] = json!(CONTAINER.model_type);
    json
}
