"""Golden values for pictures in tiles: transformers' LLaVA-NeXT on the CPU.

    python make.py

writes `model/`, a random model whose tower sees 12 px (4 x 4 patches), with its processor; `images/`, one for each case;
`values.safetensors`: for each picture its pixel values, the packed visual tokens, and the log-probabilities of what follows
the picture in `ids`; `counts.json`: the visual tokens that the processor expects.
"""
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

torch.manual_seed(3)
here = Path(__file__).parent
PINPOINTS = [[12, 24], [24, 12], [24, 24], [36, 12], [12, 36]]
# The vocabulary is that of ../a, whose tokenizer fits.
VOCABULARY, IMAGE, WORDS = 384, 380, [5, 9, 2, 117, 230, 4]
# Width and height.
SIZES = {
    "portrait": (20, 47), "landscape": (50, 21), "small": (7, 5), "exact": (24, 24), "strip": (90, 11),
    "tower": (6, 80), "odd": (31, 29), "wide": (36, 12),
}

config = LlavaNextConfig(
    vision_config=CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=12, patch_size=3
    ),
    text_config=LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512,
    ),
    image_token_index=IMAGE,
    image_grid_pinpoints=PINPOINTS,
)
model = LlavaNextForConditionalGeneration(config).eval()
with torch.no_grad():
    for p in model.parameters():
        p.add_(0.2 * torch.randn_like(p))
model.save_pretrained(here / "model")
processor = LlavaNextImageProcessorPil(
    size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12}, image_grid_pinpoints=PINPOINTS
)
processor.save_pretrained(here / "model")
counter = SimpleNamespace(image_processor=processor, patch_size=3, num_additional_image_tokens=1)
counter._get_unpadded_features = lambda *a: LlavaNextProcessor._get_unpadded_features(counter, *a)

rng = np.random.default_rng(5)
(here / "images").mkdir(exist_ok=True)
out, counts = {}, {}
for name, (w, h) in SIZES.items():
    rough = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    fine = rng.integers(-20, 21, (h, w, 3))
    picture = np.clip(np.asarray(rough.resize((w, h), Image.BICUBIC)).astype(int) + fine, 0, 255).astype(np.uint8)
    Image.fromarray(picture).save(here / "images" / f"{name}.png")
    batch = processor(Image.fromarray(picture), return_tensors="pt")
    # One less, as `replace_image_token` does: the class token is not among the features.
    n = LlavaNextProcessor._get_number_of_features(counter, h, w, 12, 12) - 1
    ids = torch.tensor([[3] + [IMAGE] * n + WORDS])
    with torch.no_grad():
        packed = model.model.get_image_features(batch["pixel_values"], batch["image_sizes"]).pooler_output[0]
        logits = model(
            input_ids=ids, pixel_values=batch["pixel_values"], image_sizes=batch["image_sizes"]
        ).logits[0].log_softmax(-1)
    assert packed.shape == (n, 16), (packed.shape, n)
    counts[name] = n
    out[f"{name}.pixels"] = batch["pixel_values"][0].to(torch.float32).contiguous()
    out[f"{name}.tokens"] = packed.contiguous()
    out[f"{name}.logps"] = torch.stack([logits[n + i, word] for i, word in enumerate(WORDS)])
save_file(out, here / "values.safetensors")
(here / "counts.json").write_text(json.dumps({"words": WORDS, "tokens": counts}, indent=1) + "\n")
