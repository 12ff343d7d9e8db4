"""Golden values for the optimizer, computed by torch on the CPU.

    python make.py > adamw.json

Three tensors in two groups, six steps, warm-up then cosine, decay on matrices only, a global-norm clip that bites in
some steps and not in others, and one step in which a tensor has no gradient.
"""
import json
import math

import torch

torch.set_num_threads(1)


def run(dtype):
    gen = torch.Generator().manual_seed(7)

    def rand(*shape, scale=1.0):
        return (torch.randn(*shape, generator=gen, dtype=torch.float32) * scale).to(dtype)

    shapes = {"a.weight": (3, 4), "b.bias": (5,), "b.weight": (5, 3)}
    params = {n: rand(*s).requires_grad_() for n, s in shapes.items()}
    groups = [
        {"params": [params["b.weight"]], "lr": 2e-2, "weight_decay": 0.1},
        {"params": [params["b.bias"]], "lr": 2e-2, "weight_decay": 0.0},
        {"params": [params["a.weight"]], "lr": 5e-3, "weight_decay": 0.01},
    ]
    opt = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-6)
    total, warmup = 6, 2

    def factor(s):
        if s < warmup:
            return s / warmup
        return max(0.0, 0.5 * (1 + math.cos(math.pi * (s - warmup) / (total - warmup))))

    sched = torch.optim.lr_scheduler.LambdaLR(opt, factor)
    out = {"total_steps": total, "warmup_steps": warmup, "betas": [0.9, 0.95], "eps": 1e-6, "max_grad_norm": 1.0,
           "start": {n: p.detach().flatten().tolist() for n, p in params.items()},
           "shapes": {n: list(s) for n, s in shapes.items()}, "steps": []}
    for s in range(total):
        scale = [0.1, 0.5, 0.02, 1.0, 0.3, 0.05][s]
        grads = {n: rand(*shape, scale=scale) for n, shape in shapes.items()}
        if s == 2:
            del grads["b.bias"]
        for n, p in params.items():
            p.grad = grads[n].clone() if n in grads else None
        norm = torch.nn.utils.clip_grad_norm_(list(params.values()), 1.0)
        lrs = [g["lr"] for g in opt.param_groups]
        opt.step()
        sched.step()
        out["steps"].append({
            "grads": {n: g.flatten().tolist() for n, g in grads.items()}, "grad_norm": norm.item(),
            "lr": {"b": lrs[0], "default": lrs[2]},
            "params": {n: p.detach().flatten().tolist() for n, p in params.items()}})
    return out


print(json.dumps({"torch": torch.__version__, "f32": run(torch.float32), "f64": run(torch.float64)}))
