"""Loads with PEFT what adfreeze has written, and compares what the models say.

    ADFREEZE_PEFT_OUT=DIR cargo test --test peft -- --ignored written_for_peft
    python verify.py DIR
"""
import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from make import IDS, MODELS, PIXELS, ROWS, TEXT, llava, logps

out = Path(sys.argv[1])
off = 0.0
for case, want in json.loads((out / "told.json").read_text()).items():
    if case == "prompt":
        base = LlamaForCausalLM.from_pretrained(MODELS / "language", dtype=torch.float32)
        inputs = {"input_ids": torch.tensor([[1] + TEXT]), "attention_mask": torch.ones(1, 1 + len(TEXT))}
        rows = 4 + torch.arange(len(TEXT))
    else:
        base, inputs, rows = llava(), {"input_ids": IDS, "pixel_values": PIXELS}, ROWS
    model = PeftModel.from_pretrained(base, out / case).double().eval()
    with torch.no_grad():
        got = logps(model(**inputs).logits, rows, TEXT)
        plain = None if case == "prompt" else logps(model.unload()(**inputs).logits, rows, TEXT)
    gap = (got - torch.tensor(want, dtype=torch.float64)).abs().max().item()
    moved = float("nan") if plain is None else (got - plain).abs().max().item()
    print(f"{case}: largest difference of a log-probability {gap:.2e} (the adapter moves them by up to {moved:.2f})")
    off = max(off, gap)
sys.exit(off > 1e-5)
