#!/usr/bin/env python3
"""The trained model in transformers and PEFT, beside what adfreeze says of it.

    adfreeze score --run RUN --data QUESTIONS.json --out SCORES.jsonl
    python compare.py WEIGHTS RUN QUESTIONS.json SCORES.jsonl

Puts CLIPVisionModel, the run's projector and LlamaForCausalLM together as LlavaForConditionalGeneration, loads the last
stage's adapter with PEFT, and prints the largest difference between its log-probabilities of the answers and those in
SCORES.jsonl. QUESTIONS.json holds one-turn conversations; their images lie beside it.
"""
import argparse
import json
from pathlib import Path

import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer, CLIPImageProcessor, CLIPVisionModel, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration,
)

IMAGE_TOKEN, PATCHES = "<filename>", 64


def build(weights, final, image_token):
    """The model of the run's folder `final`, in f32."""
    tower = CLIPVisionModel.from_pretrained(weights / "clip", dtype=torch.float32)
    language = LlamaForCausalLM.from_pretrained(weights / "smollm2", dtype=torch.float32)
    config = LlavaConfig(
        vision_config=tower.config.to_dict() | {"model_type": "clip_vision_model"},
        text_config=language.config.to_dict(), image_token_id=image_token, vision_feature_layer=-1,
        vision_feature_select_strategy="default", projector_hidden_act="gelu", tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config).float()
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    projector = load_file(final / "projector.safetensors")
    prefix = "multi_modal_projector."
    model.model.multi_modal_projector.load_state_dict({k.removeprefix(prefix): v for k, v in projector.items()})
    [adapter] = (final / "adapters").iterdir()
    return PeftModel.from_pretrained(model, adapter).eval()


def encode(tokenizer, question, answer, image_token):
    """Token ids of a conversation with the picture's places filled in, and where the answer begins."""
    messages = [
        {"role": "user", "content": question.replace("<image>", IMAGE_TOKEN)},
        {"role": "assistant", "content": answer},
    ]
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    prompt, whole = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, whole))
    at = whole.index(image_token)
    return whole[:at] + [image_token] * PATCHES + whole[at + 1:], len(prompt) + PATCHES - 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("weights", "run", "questions", "scores"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.weights / "smollm2")
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    model = build(args.weights, sorted(args.run.glob("0*"))[-1] / "final", image_token)
    processor = CLIPImageProcessor.from_pretrained(args.weights / "clip")
    worst, answers = 0.0, 0
    scores = [json.loads(line) for line in args.scores.read_text().splitlines()]
    for sample, score in zip(json.loads(args.questions.read_text()), scores, strict=True):
        question, answer = (turn["value"] for turn in sample["conversations"])
        ids, begin = encode(tokenizer, question, answer, image_token)
        picture = Image.open(args.questions.parent / sample["image"]).convert("RGB")
        with torch.no_grad():
            pixels = processor(picture, return_tensors="pt")["pixel_values"]
            logps = model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0].log_softmax(-1)
        # The template's line break after the end token is no label.
        theirs = [logps[begin - 1 + i, ids[begin + i]].item() for i in range(score["label_tokens"])]
        worst = max([worst] + [abs(a - b) for a, b in zip(theirs, score["logps"], strict=True)])
        answers += 1
    print(f"{answers} answers: log-probabilities differ by {worst:.1e} at most")


if __name__ == "__main__":
    main()
