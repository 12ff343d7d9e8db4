"""Writes adapter/: one module of ../a/lora_init as PEFT folder with adapter_model.bin, in the layout of torch.save.

Needs no PyTorch: the classes that a pickle of tensors names are stood in for.
"""

import collections
import json
import pathlib
import pickle
import shutil
import struct
import sys
import types
import zipfile

HERE = pathlib.Path(__file__).parent
SOURCE = HERE / "../a/lora_init"
MODULE = ".layers.0.self_attn.q_proj."


def stand_in(module, name):
    made = types.new_class(name) if name[0].isupper() else (lambda *a: None)
    made.__module__, made.__qualname__, made.__name__ = module, name, name
    sys.modules.setdefault(module, types.ModuleType(module))
    setattr(sys.modules[module], name, made)
    return made


rebuild = stand_in("torch._utils", "_rebuild_tensor_v2")
storage_type = stand_in("torch", "FloatStorage")


class Storage:
    def __init__(self, key, numel):
        self.key, self.numel = key, numel


class Tensor:
    def __init__(self, storage, shape):
        self.storage, self.shape = storage, shape

    def __reduce__(self):
        stride = (self.shape[1], 1)
        return rebuild, (self.storage, 0, tuple(self.shape), stride, False, collections.OrderedDict())


class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        if isinstance(obj, Storage):
            return "storage", storage_type, obj.key, "cpu", obj.numel
        return None


def main():
    raw = (SOURCE / "adapter_model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    tensors, blobs = collections.OrderedDict(), []
    for name in sorted(n for n in header if MODULE in n):
        start, end = header[name]["data_offsets"]
        assert header[name]["dtype"] == "F32"
        tensors[name] = Tensor(Storage(str(len(blobs)), (end - start) // 4), header[name]["shape"])
        blobs.append(raw[8 + length + start : 8 + length + end])
    out = HERE / "adapter"
    out.mkdir(exist_ok=True)
    shutil.copy(SOURCE / "adapter_config.json", out)
    with zipfile.ZipFile(out / "adapter_model.bin", "w") as z:
        def add(name, data):
            z.writestr(zipfile.ZipInfo(f"adapter_model/{name}"), data)

        with z.open(zipfile.ZipInfo("adapter_model/data.pkl"), "w") as f:
            Pickler(f, protocol=2).dump(tensors)
        add("byteorder", "little")
        for i, blob in enumerate(blobs):
            add(f"data/{i}", blob)
        add("version", "3\n")


main()
