"""Golden values for DoRA, rsLoRA, several adapters at once, LoRA+ and prompt tuning: PEFT on the tiny models of ../a, on the CPU.

    python make.py

writes the adapters as PEFT saves them (`dora/`, `dora_rslora/`, `rslora/`, `prompt/`; f32), and `expected.safetensors`, computed in
f64: for each case log-probabilities of the targets, logits at two of them and gradients of the mean loss (both kept in f32);
weights that a merge leaves; the losses of a few steps with PEFT's LoRA+ optimizer.
"""
import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import save_file
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

HERE = Path(__file__).parent
MODELS = HERE / "../a"
IMAGE, TOKENS, SIDE = 380, 16, 56
TEXT = [5, 40, 112, 9, 300, 77, 21, 2]
IDS = torch.tensor([[1] + [IMAGE] * TOKENS + TEXT])
# Each text token is a target.
ROWS = torch.arange(TOKENS, TOKENS + len(TEXT))
PIXELS = (((torch.arange(3 * SIDE * SIDE) * 7919) % 1000).double() / 500 - 1).reshape(1, 3, SIDE, SIDE)
TARGETS = (
    r".*language_model\.layers\.(0|1)\.(self_attn\.(q|v)_proj|mlp\.down_proj)"
    r"|.*vision_tower.*layers\.(0|1)\.(mlp\.fc1|self_attn\.k_proj)"
)
LR, RATIO, STEPS = 2e-3, 16.0, 6


def llava():
    return LlavaForConditionalGeneration.from_pretrained(MODELS / "model", dtype=torch.float32)


def perturb(model, seed):
    """B off zero, DoRA's magnitudes off the rows' lengths."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=gen, dtype=torch.float32)
            if "lora_B" in name:
                p.copy_(noise * 0.05)
            elif "lora_A" in name:
                p.copy_(noise * 0.2)
            elif "lora_magnitude_vector" in name:
                p.mul_(1 + 0.2 * noise)
            elif "prompt_encoder" in name:
                p.copy_(noise * 0.3)


def logps(logits, rows, text):
    chosen = torch.log_softmax(logits[0, rows], -1)
    return chosen[torch.arange(len(text)), torch.tensor(text)]


def short(name):
    name = name.replace(".default", "").replace(".first", "")
    return name.removesuffix(".weight") if "magnitude" in name else name


def save(case, model):
    """PEFT's folder, without the path of this machine's model and the model card."""
    model.save_pretrained(HERE / case)
    config = HERE / case / "adapter_config.json"
    words = json.loads(config.read_text()) | {"base_model_name_or_path": None}
    config.write_text(json.dumps(words, indent=2, sort_keys=True) + "\n")
    (HERE / case / "README.md").unlink(missing_ok=True)
    (HERE / case / "adapter_model.safetensors").chmod(0o644)


out = {}


def forward(model):
    return model(input_ids=IDS, pixel_values=PIXELS).logits


def record(case, model, grads=True):
    model.eval()
    model.zero_grad()
    logits = forward(model)
    lp = logps(logits, ROWS, TEXT)
    out[f"{case}.logps"] = lp.detach()
    out[f"{case}.logits"] = logits[0, ROWS[:2]].detach().float()
    if grads:
        (-lp.mean()).backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                out[f"{case}.grad.{short(name)}"] = p.grad.float()


def fresh(case, seed, **kwargs):
    torch.manual_seed(seed)
    model = get_peft_model(llava(), LoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM", **kwargs))
    perturb(model, seed)
    save(case, model)
    model = model.double()
    record(case, model)
    return model


def merged(case, model):
    model = model.merge_and_unload()
    record(f"{case}.merged", model, grads=False)
    layer = model.model.language_model.layers[0]
    out[f"{case}.merged.language.layers.0.self_attn.v_proj.weight"] = layer.self_attn.v_proj.weight.detach().clone()
    layer = model.model.vision_tower.encoder.layers[1]
    out[f"{case}.merged.vision.encoder.layers.1.self_attn.k_proj.weight"] = layer.self_attn.k_proj.weight.detach().clone()



def main():
    merged("dora", fresh("dora", 1, r=4, lora_alpha=8, use_dora=True))
    fresh("rslora", 2, r=4, lora_alpha=6, use_rslora=True)
    patterns = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"fc1": 5, "v_proj": 3}}
    fresh("dora_rslora", 3, r=3, lora_alpha=4, use_dora=True, use_rslora=True, **patterns)

    # Two adapters at once, in both orders: the later one acts on what the earlier one gives.
    for case, names in [("rslora_then_dora", ["rslora", "dora"]), ("dora_then_rslora", ["dora", "rslora"])]:
        model = PeftModel.from_pretrained(llava(), HERE / names[0], adapter_name=names[0])
        model.load_adapter(HERE / names[1], adapter_name=names[1])
        model.base_model.set_adapter(names)
        for name, p in model.named_parameters():
            p.requires_grad_("lora_" in name)
        model = model.double()
        record(case, model, grads=case == "rslora_then_dora")
        merged(case, model)

    # LoRA+: B and magnitudes learn at RATIO times A's rate.
    model = PeftModel.from_pretrained(llava(), HERE / "dora", is_trainable=True).double().eval()
    adamw = {"betas": (0.9, 0.999), "eps": 1e-8}
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=RATIO, **adamw)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = -logps(forward(model), ROWS, TEXT).mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    out["loraplus.losses"] = torch.tensor(losses, dtype=torch.float64)

    # Prompt tuning, on the language model alone.
    torch.manual_seed(4)
    language = LlamaForCausalLM.from_pretrained(MODELS / "language", dtype=torch.float32)
    model = get_peft_model(language, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    perturb(model, 4)
    save("prompt", model)
    model = model.double().eval()
    logits = model(input_ids=torch.tensor([[1] + TEXT]), attention_mask=torch.ones(1, 1 + len(TEXT))).logits
    lp = logps(logits, 3 + torch.arange(len(TEXT)), TEXT)
    (-lp.mean()).backward()
    out["prompt.logps"] = lp.detach()
    out["prompt.logits"] = logits[0, 3:5].detach().float()
    out["prompt.grad"] = model.prompt_encoder["default"].embedding.weight.grad.float()
    save_file({k: v.contiguous() for k, v in out.items()}, HERE / "expected.safetensors")
    (HERE / "expected.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()
