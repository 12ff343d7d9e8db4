"""Golden values for projectors: what transformers computes on the CPU, in f32, with random weights.

    python make.py

writes
`pixel_shuffle.safetensors`: for two grids and factors the features of two pictures, the weight of Idefics3's connector and its
    output. InternVL's pixel shuffle, which takes one over the factor and refuses what is no exact fraction, must give the
    same order.
`perceiver.safetensors`: Idefics2's connector under the names of its checkpoints; `x`, features of two pictures, `y`, what it
    makes of them, `dy`, and of sum(y * dy) the gradients `dx` and `grad.NAME`.
`qformer.safetensors`: the same of BLIP-2's query tokens, Q-Former and language projection.
`blip2_qformer/`: that Q-Former alone, as `save_pretrained` writes it.
It prints the number of parameters at the published sizes.
"""
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2QFormerConfig, Blip2QFormerModel, Idefics2Config
from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLModel

HERE = Path(__file__).parent

torch.manual_seed(7)
WIDTH, LANGUAGE = 6, 5

out = {}
for side, factor in [(4, 2), (6, 3)]:
    config = SimpleNamespace(
        scale_factor=factor,
        vision_config=SimpleNamespace(hidden_size=WIDTH),
        text_config=SimpleNamespace(hidden_size=LANGUAGE),
    )
    connector = Idefics3Connector(config)
    x = torch.randn(2, side * side, WIDTH)
    with torch.no_grad():
        y = connector(x)
        shuffled = connector.pixel_shuffle(x, factor)
        if factor == 2:
            other = InternVLModel.pixel_shuffle(None, x.view(2, side, side, WIDTH), 1 / factor)
            assert torch.equal(shuffled, other.reshape(shuffled.shape))
    case = f"{side}x{side}.{factor}"
    out[f"{case}.x"] = x.reshape(-1, WIDTH).contiguous()
    out[f"{case}.weight"] = connector.modality_projection.proj.weight.detach().contiguous()
    out[f"{case}.y"] = y.reshape(-1, LANGUAGE).contiguous()
save_file(out, HERE / "pixel_shuffle.safetensors")


def perturb(parameters):
    """Moves every parameter off its initial value; matrices keep the size of their products."""
    with torch.no_grad():
        for p in parameters.values():
            std = p.shape[-1] ** -0.5 if p.dim() > 1 else 0.2
            p.add_(torch.randn_like(p) * std)


def save(name, parameters, x, run):
    """Weights, input, output and the gradients of sum(y * dy)."""
    perturb(parameters)
    x.requires_grad_()
    y = run(x)
    dy = torch.randn_like(y)
    (y * dy).sum().backward()
    rows = lambda t: t.detach().reshape(-1, t.shape[-1]).contiguous()
    out = {"x": rows(x), "y": rows(y), "dy": rows(dy), "dx": rows(x.grad)}
    for key, p in parameters.items():
        out[key] = p.detach().contiguous()
        out[f"grad.{key}"] = p.grad.contiguous()
    save_file(out, HERE / f"{name}.safetensors")


def count(module):
    return sum(p.numel() for p in module.parameters())


def idefics2(vision, text, perceiver):
    config = Idefics2Config(
        vision_config={"hidden_size": vision, "num_attention_heads": 1},
        text_config={"model_type": "mistral", **text},
        perceiver_config=perceiver,
    )
    return Idefics2Connector(config).eval()


connector = idefics2(
    6,
    {"hidden_size": 8, "intermediate_size": 10, "num_attention_heads": 1, "num_key_value_heads": 1, "hidden_act": "silu"},
    {
        "hidden_size": 8,
        "resampler_n_latents": 3,
        "resampler_depth": 2,
        "resampler_n_heads": 4,
        "resampler_head_dim": 3,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
    },
)
parameters = {f"model.connector.{name}": p for name, p in connector.named_parameters()}
save("perceiver", parameters, torch.randn(2, 16, 6), lambda x: connector(x, torch.ones(x.shape[:2], dtype=torch.bool)))

tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
config = Blip2Config(
    vision_config={**tiny, "hidden_size": 7, "num_attention_heads": 1, "image_size": 4, "patch_size": 2},
    text_config={"model_type": "opt", "hidden_size": 5, "word_embed_proj_dim": 5, "ffn_dim": 8, "num_hidden_layers": 1,
                 "num_attention_heads": 1, "vocab_size": 8},
    qformer_config={
        "hidden_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 20,
        "encoder_hidden_size": 7,
    },
    num_query_tokens=4,
)
blip2 = Blip2ForConditionalGeneration(config).eval()
assert {"query_tokens", "qformer.layernorm.weight", "language_projection.bias"} <= blip2.state_dict().keys()
of = ("query_tokens", "qformer.", "language_projection.")
parameters = {name: p for name, p in blip2.named_parameters() if name.startswith(of)}


def qformer(x):
    queries = blip2.query_tokens.expand(x.shape[0], -1, -1)
    return blip2.language_projection(blip2.qformer(query_embeds=queries, encoder_hidden_states=x).last_hidden_state)


save("qformer", parameters, torch.randn(2, 16, 7), qformer)
blip2.qformer.save_pretrained(HERE / "blip2_qformer")

with torch.device("meta"):
    print("Blip2QFormerModel:", count(Blip2QFormerModel(Blip2QFormerConfig())))
    text = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 1, "num_attention_heads": 32}
    print("Idefics2Connector of the 8B model:", count(idefics2(1152, text, {"hidden_size": 4096})))
