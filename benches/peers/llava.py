"""The steps of `adfreeze bench step` in PyTorch, transformers and PEFT: LLaVA with random weights, no download.

    python llava.py --work align,sft,dpo                      # LLaVA-1.5-7B on a GPU
    python llava.py --device cpu --preset tiny --work sft     # seconds on a CPU

align   tower and language model frozen, the projector trains
sft     PEFT LoRA on the seven linear layers of every language layer, and the projector
dpo     the LoRA alone; chosen and rejected in one concatenated batch, each with its picture, as TRL runs it; reference
        log-probabilities given; sigmoid loss

One JSON object a work goes to stdout; keys that `adfreeze bench step --json` has too mean the same. All else goes to stderr.

What was chosen for the peer, each the faster of what its users can have without writing kernels:
- Weights are made on the device in bf16. What trains has f32 values under autocast, as transformers' Trainer and PEFT do it
  with bf16 = true (and as adfreeze does); PEFT's casts of a layer's input to f32, which autocast would undo, are switched off.
  `--adapters bf16` trains bf16 values without autocast.
- Attention is flash_attention_2 where that package is installed, else torch's scaled_dot_product_attention. All sequences of
  a batch are equally long, so there is no padding and no mask.
- The head sees the labelled positions only (`logits_to_keep`), which Trainer does not do.
- A step is one batch of `--micro` samples, clipping and fused AdamW included. If it does not fit in the GPU's memory, it is
  split into more and more passes whose gradients are summed; only if single samples do not fit, layers are recomputed
  (gradient checkpointing). What was needed is in the record (`passes`, `checkpointing`).
- torch.compile only if asked (`--compile`).
"""

import argparse
import contextlib
import json
import statistics
import sys
import time

import peft
import torch
import torch.nn.functional as F
import transformers
from peft.helpers import disable_input_dtype_casting
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.utils import is_flash_attn_2_available

# The shapes of `adfreeze bench step`. Of each work: samples a step, tokens of a sequence, labelled ones at its end.
PRESETS = {
    "llava-1.5-7b": dict(
        vision=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                    image_size=336, patch_size=14),
        text=dict(vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                  num_attention_heads=32, num_key_value_heads=32),
        select_layer=-2, image_token=32000, rank=128, dropout=0.05,
        align=(16, 620, 43), sft=(8, 2048, 736), dpo=(4, 2048, 736)),
    "smollm2-135m-dinov2-s": dict(
        vision=dict(hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6,
                    image_size=112, patch_size=14, hidden_act="gelu"),
        text=dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                  num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True),
        select_layer=-1, image_token=4, rank=16, dropout=0.0,
        align=(8, 88, 23), sft=(8, 104, 20), dpo=(4, 104, 20)),
    "tiny": dict(
        vision=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
                    image_size=16, patch_size=4),
        text=dict(vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=2),
        select_layer=-2, image_token=95, rank=4, dropout=0.1,
        align=(4, 22, 5), sft=(2, 32, 8), dpo=(2, 32, 8)),
}
LR = {"align": 1e-3, "sft": 2e-4, "dpo": 5e-7}
BETA = 0.1
CLIP = 1.0


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--preset", choices=PRESETS, default="llava-1.5-7b")
    p.add_argument("--work", default="align,sft,dpo", help="separated by commas")
    p.add_argument("--device", default="cuda:0")
    p.add_argument("--dtype", choices=["bf16", "f32"], help="of frozen weights and activations; bf16 on a GPU, f32 on a CPU")
    p.add_argument("--adapters", choices=["f32", "bf16"], default="f32", help="the type of what trains")
    p.add_argument("--micro", type=int, help="samples a step; for dpo pairs")
    p.add_argument("--seq", type=int, help="tokens of a sequence, those of its picture included")
    p.add_argument("--labels", type=int, help="labelled tokens at the end of each sequence")
    p.add_argument("--rank", type=int, help="of LoRA; alpha is twice that")
    p.add_argument("--lr", type=float, help="a larger one than the recipe's shows on few steps that the loss falls")
    p.add_argument("--warmup", type=int, default=3, help="steps before the clock starts")
    p.add_argument("--steps", type=int, default=10, help="timed steps")
    p.add_argument("--checkpointing", action="store_true", help="recompute layers in any case")
    p.add_argument("--compile", action="store_true", help="torch.compile")
    args = p.parse_args()
    args.device = torch.device(args.device)
    args.dtype = args.dtype or ("f32" if args.device.type == "cpu" else "bf16")
    if (args.dtype, args.adapters) == ("f32", "bf16"):
        p.error("--adapters bf16 goes with --dtype bf16")
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    works = args.work.split(",")
    if unknown := set(works) - set(LR):
        p.error(f"no work is called {', '.join(sorted(unknown))}; there are {', '.join(LR)}")
    for work in works:
        print(json.dumps(Step(args, work).measured()), flush=True)


def say(text):
    print(text, file=sys.stderr, flush=True)


class Step:
    """One work: model, batch and optimizer."""

    def __init__(self, args, work):
        self.args, self.work, self.preset = args, work, PRESETS[args.preset]
        self.device = args.device
        flash = args.device.type == "cuda" and args.dtype == "bf16" and is_flash_attn_2_available()
        self.attention = "flash_attention_2" if flash else "sdpa"
        micro, seq, labels = self.preset[work]
        self.micro, self.seq, self.labels = args.micro or micro, args.seq or seq, args.labels or labels
        self.rank = args.rank or self.preset["rank"]
        torch.manual_seed(7)
        self.model = self.build()
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=args.lr or LR[work], betas=(0.9, 0.999), weight_decay=0.0, fused=True)
        self.batch = self.samples()
        self.reference = None

    def build(self):
        """The model in its type on its device; what the work trains requires a gradient, in `--adapters`' type."""
        p = self.preset
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**p["vision"]),
            text_config=LlamaConfig(max_position_embeddings=4096, rms_norm_eps=1e-5, **p["text"]),
            image_token_index=p["image_token"],
            tie_word_embeddings=p["text"].get("tie_word_embeddings", False), vision_feature_layer=p["select_layer"],
            vision_feature_select_strategy="default", projector_hidden_act="gelu")
        dtype = {"bf16": torch.bfloat16, "f32": torch.float32}[self.args.dtype]
        with self.device:
            model = LlavaForConditionalGeneration._from_config(
                config, dtype=dtype, attn_implementation=self.attention)
        model.requires_grad_(False)
        model.config.use_cache = False
        wide = self.args.adapters == "f32"
        if self.work != "align":
            layers = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
            lora = peft.LoraConfig(r=self.rank, lora_alpha=2 * self.rank, lora_dropout=p["dropout"], target_modules=layers)
            model = peft.get_peft_model(model, lora, autocast_adapter_dtype=wide)
        if self.work != "dpo":
            projector = next(m for n, m in model.named_modules() if n.endswith("multi_modal_projector"))
            projector.to(torch.float32 if wide else dtype).requires_grad_(True)
        return model.train()

    def samples(self):
        """Token ids [n, seq]: a picture's tokens behind the first, then text; pixels [n, 3, S, S]. For dpo the chosen answers
        come first, then the rejected ones behind the same prompts and pictures."""
        v, t, image = self.preset["vision"], self.preset["text"], self.preset["image_token"]
        picture = (v["image_size"] // v["patch_size"]) ** 2
        if self.seq < 1 + picture + self.labels:
            sys.exit(f"--seq {self.seq} is too short for {picture} tokens of a picture and {self.labels} labels")
        rng = torch.Generator().manual_seed(11)
        words = lambda *shape: torch.randint(5, min(t["vocab_size"], 32000) - 1, shape, generator=rng)
        text = words(self.micro, self.seq)
        text[:, 0] = 1
        text[:, 1:1 + picture] = image
        pixels = torch.randn(self.micro, 3, v["image_size"], v["image_size"], generator=rng)
        if self.work == "dpo":
            rejected = text.clone()
            rejected[:, -self.labels:] = words(self.micro, self.labels)
            text, pixels = torch.cat([text, rejected]), torch.cat([pixels, pixels])
        pixels = pixels.to(self.device, next(self.model.parameters()).dtype)
        return text.to(self.device), pixels

    def rows(self, part, passes):
        """The rows of one of a step's passes; a pair stays together."""
        n = self.micro // passes
        chosen = list(range(part * n, (part + 1) * n))
        return chosen + [self.micro + i for i in chosen] if self.work == "dpo" else chosen

    def forward(self, rows):
        """Log-probabilities [rows, labels] of the labelled tokens."""
        ids, pixels = (x[rows] for x in self.batch)
        keep = torch.arange(self.seq - self.labels - 1, self.seq - 1, device=self.device)
        cast = self.args.dtype == "bf16" and self.args.adapters == "f32"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=cast):
            logits = self.model(input_ids=ids, pixel_values=pixels, logits_to_keep=keep, use_cache=False).logits
        labels = ids[:, -self.labels:]
        return -F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)

    def loss(self, rows):
        logps = self.forward(rows)
        if self.work != "dpo":
            return -logps.mean()
        chosen, rejected = (logps.sum(1) - self.reference[rows]).chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()

    @torch.no_grad()
    def refer(self, passes):
        """The policy's log-probabilities at the start, without dropout; no part of a step."""
        self.model.eval()
        self.reference = torch.zeros(2 * self.micro, device=self.device)
        for part in range(passes):
            rows = self.rows(part, passes)
            self.reference[rows] = self.forward(rows).sum(1)
        self.model.train()

    def run(self, passes):
        """One step; returns its loss, still on the device."""
        total = 0.0
        for part in range(passes):
            loss = self.loss(self.rows(part, passes)) / passes
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(self.trained.values(), CLIP)
        self.optimizer.step()
        if any(p.grad is None for p in self.trained.values()):
            sys.exit("a parameter that trains got no gradient")
        if any(p.grad is not None for p in self.model.parameters() if not p.requires_grad):
            sys.exit("a frozen parameter got a gradient")
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def fit(self):
        """Passes of a step and whether layers are recomputed: the first way that fits in memory. Its first step is made."""
        splits = [n for n in range(1, self.micro + 1) if self.micro % n == 0]
        tries = [(n, False) for n in splits if not self.args.checkpointing] + [(n, True) for n in splits]
        for passes, recompute in tries:
            if recompute:
                self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            try:
                if self.work == "dpo":
                    self.refer(passes)
                self.run(passes)
                return passes, recompute
            except torch.OutOfMemoryError:
                say(f"{self.work}: {passes} pass(es){', recomputing layers,' if recompute else ''} do not fit in memory")
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        sys.exit(f"{self.work}: one sample does not fit in memory")

    def measured(self):
        """The record of this work."""
        if self.args.compile:
            self.model = torch.compile(self.model)
        cuda = self.device.type == "cuda"
        wait = torch.cuda.synchronize if cuda else lambda: None
        name = torch.cuda.get_device_name(self.device) if cuda else "cpu"
        say(f"{self.work}: attention {self.attention}, {len(self.trained)} tensors train")
        adapted = self.args.adapters == "f32" and self.work != "align"
        with disable_input_dtype_casting(self.model) if adapted else contextlib.nullcontext():
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            passes, recompute = self.fit()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            times, losses = [], []
            for step in range(self.args.warmup + self.args.steps):
                wait()
                begun = time.perf_counter()
                losses.append(self.run(passes))
                wait()
                if step >= self.args.warmup:
                    times.append(time.perf_counter() - begun)
        losses = [round(x.item(), 6) for x in losses]
        if not all(abs(x) < float("inf") for x in losses):
            sys.exit(f"{self.work}: a loss is not a number: {losses}")
        median, rows = statistics.median(times), len(self.batch[0])
        return dict(
            what="step", work=self.work, engine="pytorch+peft", preset=self.args.preset, dtype=self.args.dtype, device=name,
            median_s=median, min_s=min(times), runs=len(times), samples=self.micro, tokens=rows * self.seq,
            label_tokens=rows * self.labels, tokens_per_s=rows * self.seq / median, samples_per_s=self.micro / median,
            trained=sum(p.numel() for p in self.trained.values()), losses=losses, passes=passes, checkpointing=recompute,
            adapters=self.args.adapters, attention=self.attention, compiled=self.args.compile,
            peak_memory_bytes=torch.cuda.max_memory_allocated() if cuda else resident_peak(),
            versions=f"torch {torch.__version__}, CUDA {torch.version.cuda}, transformers {transformers.__version__}, "
                     f"peft {peft.__version__}")


def resident_peak():
    """Of this process so far, as Linux tells it."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main()
