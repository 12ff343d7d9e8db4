"""Golden values for pixel shuffle: Idefics3's connector of transformers on the CPU.

    python make.py

writes `pixel_shuffle.safetensors`: for two grids and factors the features of two pictures, the weight of the connector's
linear layer and its output. InternVL's pixel shuffle of transformers, which takes one over the factor and refuses what is no
exact fraction, must give the same order.
"""
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLModel

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
save_file(out, Path(__file__).parent / "pixel_shuffle.safetensors")
