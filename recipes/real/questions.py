#!/usr/bin/env python3
"""Short samples with categories from easy-VQA's long conversations.

    python questions.py EASYVQA

Reads instruct_{train,test}.json of the folder EASYVQA (LLaVA's format, one conversation of about twelve questions a picture)
and writes beside them
questions_train.json   three questions a picture: one open, one "is there …", one "is there no …", in random order
questions_test.json    one question a picture, with `category`: colour, shape, present, absent, in turn; half of the yes/no
                       answers are yes
"""
import json
import random
import re
import sys

SHAPES = {"rectangle", "circle", "triangle"}
# Category and answer of the test questions, in turn.
WANTED = [("colour", None), ("shape", None), ("present", "yes"), ("absent", "yes")]
WANTED += [("colour", None), ("shape", None), ("present", "no"), ("absent", "no")]


def category(question, answer):
    """What a question is about: the colour, the shape, or whether something is present or absent."""
    if answer not in ("yes", "no"):
        return "shape" if answer in SHAPES else "colour"
    return "absent" if {"not", "no"} & set(re.findall(r"[a-z]+", question)) else "present"


def by_category(conversation):
    turns = [t["value"].replace("<image>\n", "") for t in conversation]
    out = {"colour": [], "shape": [], "present": [], "absent": []}
    for question, answer in zip(turns[::2], turns[1::2]):
        out[category(question, answer)].append((question, answer))
    return out


def draw(rng, pairs):
    """One of `pairs`; first an answer is drawn, then a question that has it."""
    answer = rng.choice(sorted({a for _, a in pairs}))
    return rng.choice([p for p in pairs if p[1] == answer])


def sample(row, pairs, kind=None):
    turns = []
    for i, (question, answer) in enumerate(pairs):
        turns.append({"from": "human", "value": ("<image>\n" if i == 0 else "") + question})
        turns.append({"from": "gpt", "value": answer})
    out = {"id": row["id"].replace("easyvqa-", "easyvqa-q-"), "image": row["image"], "conversations": turns}
    return out | ({"category": kind} if kind else {})


def main(folder):
    rng = random.Random(0)
    train, test = [], []
    for row in json.load(open(f"{folder}/instruct_train.json")):
        found = by_category(row["conversations"])
        kinds = [rng.choice(["colour", "shape"]), "present", "absent"]
        pairs = [draw(rng, found[k]) for k in kinds if found[k]]
        rng.shuffle(pairs)
        train.append(sample(row, pairs))
    for row in json.load(open(f"{folder}/instruct_test.json")):
        kind, answer = WANTED[len(test) % len(WANTED)]
        pairs = [p for p in by_category(row["conversations"])[kind] if answer in (None, p[1])]
        if pairs:
            test.append(sample(row, [rng.choice(pairs)], kind))
    for name, rows in (("train", train), ("test", test)):
        with open(f"{folder}/questions_{name}.json", "w") as f:
            json.dump(rows, f, indent=0)
        print(f"questions_{name}.json: {len(rows)} samples")


if __name__ == "__main__":
    main(sys.argv[1])
