"""Golden values for pictures of other sizes than a tower was made for: transformers' CLIP on the CPU.

    python make.py

writes `model/`, a random tower of 12 px and 4 x 4 patches, and `features.safetensors`: for pictures of 18 px, of 9 px and of
12 px their pixel values and the hidden states before the last layer, without the class token, as
`interpolate_pos_encoding=True` gives them.
"""
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

torch.manual_seed(11)
here = Path(__file__).parent
config = CLIPVisionConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=12, patch_size=3
)
model = CLIPVisionModel(config).eval()
with torch.no_grad():
    for p in model.parameters():
        p.add_(0.2 * torch.randn_like(p))
model.save_pretrained(here / "model")

out = {}
for size in (18, 9, 12):
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        y = model(pixels, output_hidden_states=True, interpolate_pos_encoding=True)
    out[f"{size}.pixels"] = pixels
    out[f"{size}.features"] = y.hidden_states[-2][:, 1:].reshape(-1, config.hidden_size).contiguous()
save_file(out, here / "features.safetensors")
