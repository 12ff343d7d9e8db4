"""Makes the PyTorch fixtures beside this file: `python make.py` (torch, safetensors).

A LLaMA of a few hundred numbers as pytorch_model.bin, single and sharded, with the layouts that torch.save keeps: a transposed
tensor, two views of one storage, a Parameter, all float types, a buffer to ignore. `expected.safetensors` has the same values in
f32. `mm_projector.bin` is a projector as the original LLaVA code saves it.
"""
import collections, json, os, torch
from safetensors.torch import save_file

HERE = os.path.dirname(os.path.abspath(__file__))
torch.manual_seed(7)
VOCAB, D, F = 12, 8, 10


def rand(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


both = rand(2, D, D)
layer = "model.layers.0."
tensors = collections.OrderedDict([
    ("model.embed_tokens.weight", rand(VOCAB, D, dtype=torch.float16)),
    (layer + "self_attn.q_proj.weight", rand(D, D).t()),
    (layer + "self_attn.k_proj.weight", both[0]),
    (layer + "self_attn.v_proj.weight", both[1]),
    (layer + "self_attn.o_proj.weight", torch.nn.Parameter(rand(D, D))),
    (layer + "self_attn.rotary_emb.inv_freq", rand(2)),
    (layer + "mlp.gate_proj.weight", rand(F, D, dtype=torch.bfloat16)),
    (layer + "mlp.up_proj.weight", rand(F, D, dtype=torch.float64)),
    (layer + "mlp.down_proj.weight", rand(D, F, dtype=torch.bfloat16)),
    (layer + "input_layernorm.weight", rand(D)),
    (layer + "post_attention_layernorm.weight", rand(D)),
    ("model.norm.weight", rand(D)),
    ("lm_head.weight", rand(VOCAB, D)),
])
config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": D,
          "intermediate_size": F, "num_hidden_layers": 1, "num_attention_heads": 2}


def folder(name):
    path = os.path.join(HERE, name)
    os.makedirs(path, exist_ok=True)
    with open(os.path.join(path, "config.json"), "w") as f:
        json.dump(config, f, indent=1)
    return path


torch.save(tensors, os.path.join(folder("single"), "pytorch_model.bin"))
names, path, weight_map = list(tensors), folder("sharded"), {}
for i, part in enumerate([names[:6], names[6:]], 1):
    file = f"pytorch_model-0000{i}-of-00002.bin"
    torch.save({n: tensors[n] for n in part}, os.path.join(path, file))
    weight_map.update({n: file for n in part})
with open(os.path.join(path, "pytorch_model.bin.index.json"), "w") as f:
    json.dump({"metadata": {"total_size": 0}, "weight_map": weight_map}, f, indent=1)
expected = {n: t.detach().float().contiguous() for n, t in tensors.items() if "inv_freq" not in n}
projector = {f"model.mm_projector.{i}.{k}": rand(*([D, D] if k == "weight" else [D])) for i in (0, 2) for k in ("weight", "bias")}
torch.save(projector, os.path.join(HERE, "mm_projector.bin"))
expected.update(projector)
save_file(expected, os.path.join(HERE, "expected.safetensors"))
