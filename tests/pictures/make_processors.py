#!/usr/bin/env python3
"""Writes processors.json: what transformers 5.23's image processors make of pictures, by preprocessor_config.json.

    python3 tests/pictures/make_processors.py        (transformers 5.23 without torchvision: the Pillow backends)
"""
import json
import tempfile
from pathlib import Path

import numpy as np
import transformers as T
from PIL import Image

HERE = Path(__file__).parent
IMAGES = HERE.parent / "golden/a/images"
SIZE = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
SQUARE = {"size": {"height": 32, "width": 32}}
CONFIGS = [
    {"image_processor_type": "CLIPImageProcessor", **SIZE},
    {"image_processor_type": "CLIPImageProcessorFast", **SIZE, "resample": 2},
    {"image_processor_type": "CLIPImageProcessor", "size": 32, "crop_size": 32},
    {"image_processor_type": "CLIPImageProcessor", "size": 32, "crop_size": [32, 32], "default_to_square": True},
    {"image_processor_type": "CLIPImageProcessor", **SIZE, "image_mean": 0.5, "image_std": 0.25},
    {"image_processor_type": "CLIPImageProcessor", **SIZE, "do_normalize": False},
    {"image_processor_type": "CLIPImageProcessor", **SIZE, "do_rescale": False, "image_mean": [120.0, 110, 100], "image_std": 60},
    {"image_processor_type": "CLIPImageProcessor", **SIZE, "rescale_factor": 0.01},
    {"image_processor_type": "CLIPImageProcessor", **SIZE, "resample": None, "do_pad": None, "pad_size": None},
    {"image_processor_type": "CLIPImageProcessor", **SQUARE, "do_center_crop": None, "crop_size": None},
    {"image_processor_type": "CLIPImageProcessor", **SIZE, "do_normalize": None},
    {"image_processor_type": "CLIPImageProcessor", **SIZE, "do_rescale": None},
    {"image_processor_type": "CLIPImageProcessor", **SIZE, "do_pad": True},
    {"image_processor_type": "CLIPImageProcessor", **SIZE, "do_pad": True, "pad_size": {"height": 32, "width": 32}},
    {"image_processor_type": "CLIPImageProcessor", **SQUARE, "do_center_crop": False},
    {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "resample": 1},
    {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 230}},
    {"image_processor_type": "LlavaImageProcessor", **SIZE},
    {"image_processor_type": "LlavaImageProcessor", **SIZE, "do_pad": True},
    {"image_processor_type": "LlavaImageProcessorFast", **SIZE, "do_pad": True, "image_mean": [0.5, 0.25, 0.75]},
    {"image_processor_type": "SiglipImageProcessor", **SQUARE},
    {"image_processor_type": "SiglipImageProcessor"},
    {"image_processor_type": "SiglipImageProcessor", **SQUARE, "do_center_crop": None},
    {"image_processor_type": "ViTImageProcessor", **SQUARE},
    {"image_processor_type": "ViTImageProcessor", "size": 32},
    {"feature_extractor_type": "ViTFeatureExtractor", "size": 32},
    {"image_processor_type": "DeiTImageProcessor", "size": {"height": 36, "width": 36}, "crop_size": 32},
    {"image_processor_type": "BitImageProcessor", **SIZE},
    {"image_processor_type": "BlipImageProcessor", **SQUARE},
]


def processor(config):
    name = config.get("image_processor_type") or config["feature_extractor_type"].replace("FeatureExtractor", "ImageProcessor")
    return getattr(T, name.removesuffix("Fast") + "Pil")(**{k: v for k, v in config.items() if not k.endswith("_type")})


def main():
    out = []
    for config in CONFIGS:
        for image in ("landscape.png", "portrait.png"):
            try:
                got = processor(config)(Image.open(IMAGES / image).convert("RGB"), return_tensors="np")["pixel_values"][0]
            except ValueError as e:
                print("transformers refuses:", config, e)
                continue
            flat = got.reshape(-1).astype(np.float64)
            pick = np.linspace(0, len(flat) - 1, 40).astype(int)
            out.append({"config": config, "image": image, "edge": got.shape[-1], "mean": round(float(np.abs(flat).mean()), 6),
                        "values": [[int(i), round(float(flat[i]), 5)] for i in pick]})
            assert got.shape[0] == 3 and got.shape[1] == got.shape[2]
    (HERE / "processors.json").write_text("[\n" + ",\n".join(map(json.dumps, out)) + "\n]\n")
    print(len(out))


if __name__ == "__main__":
    main()
