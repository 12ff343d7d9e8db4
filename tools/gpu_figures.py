#!/usr/bin/env python3
"""Reads what tools/gpu.sh measures. Python's standard library alone.

    gpu_figures.py quickstart RUN      are a quickstart's figures those of the README?
    gpu_figures.py table [FILE]        records of `adfreeze bench … --json` as a Markdown table
    gpu_figures.py goals FILE          what is aimed at on one H100 or H200, and what was reached; never an error
    gpu_figures.py sizes FILE WORK     arguments that make benches/peers/llava.py do the same work as our last record of it
    gpu_figures.py peers FILE [any]    both engines side by side; exit code 1 if a work is missing, is not the same for both, or
                                       is slower than the peer's. `any`: at any speed, as in a rehearsal
"""

import json
import sys

# Stage, set, figure, the README's value, and how far another rounding may lead. The README gives three: f32, f32 with other
# sums, and bf16.
QUICKSTART = [
    ("align", "captions", "loss", 0.233, 0.005),
    ("align", "seen", "exact_match", 0.381, 0.10),
    ("sft", "seen", "exact_match", 0.955, 0.03),
    ("sft", "seen", "exact_match/blank", 0.135, 0.10),
    ("sft", "seen", "exact_match/shuffled", 0.326, 0.10),
    ("sft", "unseen", "exact_match", 0.701, 0.10),
    ("sft", "hallucination", "hallucination", 0.988, 0.05),
    ("dpo", "seen", "exact_match", 0.920, 0.05),
    ("dpo", "unseen", "exact_match", 0.658, 0.10),
    ("dpo", "hallucination", "hallucination", 0.219, 0.10),
    ("dpo", "preference", "preference", 0.816, 0.10),
]
WORKS = ("align", "sft", "dpo")
OURS, PEER = "adfreeze", "pytorch+peft"
# How much faster than the peer a work must be, and should be.
GATE, GOAL = 1.0, 1.3


def quickstart(run):
    with open(f"{run}/results.json") as f:
        results = json.load(f)
    good = True
    print("| stage | set | figure | README | within | here | |\n|---|---|---|---|---|---|---|")
    for stage, name, figure, expected, room in QUICKSTART:
        found = results.get(stage, {}).get(name, {}).get("values", {}).get(figure)
        holds = isinstance(found, (int, float)) and abs(found - expected) <= room
        good &= holds
        here = f"{found:.3f}" if isinstance(found, (int, float)) else "missing"
        print(f"| {stage} | {name} | {figure} | {expected:.3f} | ± {room} | {here} | {'ok' if holds else 'NOT SO'} |")
    return good


def records(lines):
    """JSON objects; a last line that was cut off is no record."""
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [r for r in found if isinstance(r, dict)]


def read(path):
    with open(path) as f:
        return records(f)


def short(value):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def flat(record):
    """Numbers and words; parts by the name of the whole and theirs. Lists and long texts stay in the file."""
    found = {}
    for key, value in record.items():
        if isinstance(value, dict):
            found |= {f"{key}.{k}": v for k, v in value.items() if isinstance(v, (int, float))}
        elif isinstance(value, (int, float)) or isinstance(value, str) and len(value) <= 100:
            found[key] = value
    return found


def table(path=None):
    """Records with the same keys stand in one table, what all of them share above it; a single one is a line."""
    groups = {}
    for r in map(flat, read(path) if path else records(sys.stdin)):
        groups.setdefault(tuple(r), []).append(r)
    for keys, rows in groups.items():
        same = {k: rows[0][k] for k in keys if all(r[k] == rows[0][k] for r in rows)}
        shown = [k for k in keys if k not in same]
        if same:
            print("- " + ", ".join(f"{k} {short(v)}" for k, v in same.items()))
        if shown:
            print("\n| " + " | ".join(shown) + " |\n|" + "---|" * len(shown))
            for r in rows:
                print("| " + " | ".join(short(r[k]).replace("|", "/") for k in shown) + " |")
            print()
    return True


def of(everything, work, engine):
    """Our own records name no engine."""
    return [r for r in everything if r.get("work") == work and r.get("engine", OURS) == engine]


def sizes(path, work):
    ours = of(read(path), work, OURS)
    if not ours:
        sys.exit(f"{path} has no record of {work} by {OURS} to go by")
    r = ours[-1]
    sequences = r["samples"] * (2 if work == "dpo" else 1)
    print(f"--micro {r['samples']} --seq {r['tokens'] // sequences} --labels {r['label_tokens'] // sequences}")
    return True


# What is aimed at: the data sheet's bf16 rate and the share of it that SFT should reach, align's samples a second, the share of
# a copy's bandwidth for what only moves bytes, and attention's rates (heads of 128, causal, 2,048 tokens).
SHEET, SFT_SHARE, ALIGN, COPY_SHARE = 990e12, 0.55, 25.0, 0.85
ATTENTION = {"forward": 235e12, "backward": 190e12}


def goals(path):
    rows = []
    for r in read(path):
        what = r.get("what", "")
        if r.get("work") == "sft":
            rows.append(("SFT, share of 990 TFLOP/s", SFT_SHARE, r["flops_per_s"] / SHEET))
        elif r.get("work") == "align":
            rows.append(("align, samples/s", ALIGN, r["samples_per_s"]))
        elif what.startswith("attention, causal, ") and what.split(", ")[-1] in ATTENTION:
            rows.append((f"{what}, TFLOP/s", ATTENTION[what.split(", ")[-1]] / 1e12, r["flops"] / r["median_s"] / 1e12))
        elif "share_of_floor" in r and not r.get("flops"):
            rows.append((f"{what} {r['shape']}, share of copy bandwidth", COPY_SHARE, r["share_of_floor"]))
    print("| goal | aim | here | |\n|---|---|---|---|")
    for name, aim, found in rows:
        print(f"| {name} | {aim:.3g} | {found:.3g} | {'reached' if found >= aim else 'not reached'} |")
    return True


def peers(path, speed=""):
    """Times of a step of the same samples, by its median. Of our two runs the slower counts."""
    gate = 0.0 if speed == "any" else GATE
    everything, good = read(path), True
    print(f"| work | ours, first and again | peer | ratio | peak memory: ours | peer | gate: no slower | goal: {GOAL}× |")
    print("|---|---|---|---|---|---|---|---|")
    for work in WORKS:
        ours, theirs = of(everything, work, OURS), of(everything, work, PEER)
        if len(ours) < 2 or not theirs:
            print(f"| {work} | {len(ours)} of 2 runs | {len(theirs)} of 1 | | | | NOT SHOWN | |")
            good = False
            continue
        first, again, theirs = *ours[-2:], theirs[-1]
        differ = [k for k in ("samples", "tokens", "label_tokens", "trained", "dtype") if not first[k] == again[k] == theirs[k]]
        ratio = theirs["median_s"] / max(first["median_s"], again["median_s"])
        holds = ratio >= gate and not differ
        good &= holds
        times = [f"{1e3 * r['median_s']:.1f}" for r in (first, again, theirs)]
        memory = [f"{(r['peak_memory_bytes'] or 0) / 2**30:.2f} GiB" for r in (first, theirs)]
        reached = "not asked" if not gate else "reached" if holds and ratio >= GOAL else "not reached"
        verdict = "ok" if ratio >= GATE else "FAILED"
        if differ:
            verdict = f"FAILED: not the same {', '.join(differ)}"
        elif not gate:
            verdict = "not asked"
        print(f"| {work} | {times[0]}, {times[1]} ms | {times[2]} ms | {ratio:.2f}× | {memory[0]} | {memory[1]} | {verdict} | {reached} |")
    return good


def main():
    commands = {"quickstart": quickstart, "table": table, "sizes": sizes, "peers": peers, "goals": goals}
    command = commands.get(sys.argv[1] if len(sys.argv) > 1 else "")
    if command is None:
        sys.exit(__doc__)
    sys.exit(0 if command(*sys.argv[2:]) else 1)


if __name__ == "__main__":
    main()
