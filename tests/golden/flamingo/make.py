"""Golden values for Flamingo's parts: what OpenFlamingo's own code computes on the CPU, in f32, with random weights.

    pip install torch einops einops-exts safetensors && pip install --no-deps open-flamingo==2.0.1
    python make.py

writes
`resampler.safetensors`: a PerceiverResampler under the names of OpenFlamingo's checkpoints; `x`, features of two pictures, `y`,
    what it makes of them, `dy`, and of sum(y * dy) the gradients `dx` and `grad.NAME`.
`block.safetensors`: a GatedCrossAttentionBlock on two texts of seven tokens with two pictures each, whose places `places` tells
    (rows of a text); `x`, the texts' rows, `media`, the pictures' visual tokens, and `y`, `dx`, `dmedia`, `grad.NAME` of a text that
    sees the last picture before it; `all.…`, the same where it sees all of them.
It prints the number of parameters of both at the published sizes.
"""
import importlib.util
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent

# The package's own __init__ wants all of its models' libraries.
package = Path(importlib.util.find_spec("open_flamingo").origin).parent
spec = importlib.util.spec_from_file_location("helpers", package / "src/helpers.py")
helpers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(helpers)

torch.manual_seed(11)


def perturb(module):
    """Moves every parameter off its initial value; matrices keep the size of their products."""
    with torch.no_grad():
        for p in module.parameters():
            std = p.shape[-1] ** -0.5 if p.dim() > 1 else 0.3
            p.add_(torch.randn_like(p) * std)


def rows(t):
    return t.detach().reshape(-1, t.shape[-1]).clone().contiguous()


def parameters(module, prefix):
    return {f"{prefix}{name}": p for name, p in module.named_parameters()}


def count(module):
    return sum(p.numel() for p in module.parameters())


resampler = helpers.PerceiverResampler(dim=6, depth=2, dim_head=3, heads=4, num_latents=3, ff_mult=2)
perturb(resampler)
x = torch.randn(2, 1, 1, 16, 6, requires_grad=True)
y = resampler(x)
dy = torch.randn_like(y)
(y * dy).sum().backward()
out = {"x": rows(x), "y": rows(y), "dy": rows(dy), "dx": rows(x.grad)}
for name, p in parameters(resampler, "perceiver.").items():
    out[name] = p.detach().contiguous()
    out[f"grad.{name}"] = p.grad.contiguous()
save_file(out, HERE / "resampler.safetensors")

places = torch.zeros(2, 7, dtype=torch.bool)
places[0, [1, 4]] = True
places[1, [0, 3]] = True
D, TOKENS = 8, 3
out = {"places": places.nonzero()[:, 1].reshape(2, 2).float()}
block = helpers.GatedCrossAttentionBlock(dim=D, dim_visual=D, dim_head=3, heads=2, ff_mult=2)
perturb(block)
text, media = torch.randn(2, 7, D), torch.randn(2, 2, TOKENS, D)
dy = torch.randn_like(text)
out |= {"x": rows(text), "media": rows(media), "dy": rows(dy)}
out |= {name: p.detach().contiguous() for name, p in parameters(block, "").items()}
for case, last in [("", True), ("all.", False)]:
    block.attn.only_attend_immediate_media = last
    block.zero_grad()
    x, m = text.clone().requires_grad_(), media.clone().requires_grad_()
    y = block(x, m, places)
    # Where all are seen, its softmax over nothing gives a row before the first picture the mean of all: that row is left out.
    seen = (places.cumsum(-1) > 0).unsqueeze(-1) | torch.tensor(last)
    (y * dy * seen).sum().backward()
    out |= {f"{case}y": rows(y * seen), f"{case}dx": rows(x.grad), f"{case}dmedia": rows(m.grad)}
    for name, p in parameters(block, "").items():
        out[f"{case}grad.{name}"] = p.grad.clone().contiguous()
save_file(out, HERE / "block.safetensors")

print("PerceiverResampler(dim=1024):", count(helpers.PerceiverResampler(dim=1024)))
print("GatedCrossAttentionBlock(dim=4096, dim_visual=4096):", count(helpers.GatedCrossAttentionBlock(dim=4096, dim_visual=4096)))
