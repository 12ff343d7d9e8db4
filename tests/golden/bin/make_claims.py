"""claims.bin: one tensor whose strides ask for 266 GB, in an archive whose directory claims that its storage has them.

    python make_claims.py   (PyTorch; writes beside this file)
"""

import io
import pathlib
import struct
import zipfile

import torch

saved = io.BytesIO()
torch.save({"mm_projector.0.bias": torch.arange(32.0)}, saved)
made = io.BytesIO()
with zipfile.ZipFile(saved) as old, zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as new:
    for entry in old.infolist():
        body = old.read(entry)
        if entry.filename.endswith("data.pkl"):
            stride = body.index(b"K\x01\x85", body.index(b"K\x20\x85"))
            body = body[:stride] + b"J\xff\xff\xff\x7f\x85" + body[stride + 3 :]
        new.writestr(zipfile.ZipInfo(entry.filename), body)
file = made.getvalue()
end = file.rindex(b"PK\x05\x06")
size, begin = struct.unpack("<II", file[end + 12 : end + 20])
directory, at = b"", begin
while at < begin + size:
    name, extra, comment = struct.unpack("<HHH", file[at + 28 : at + 34])
    head, more = bytearray(file[at : at + 46 + name]), file[at + 46 + name : at + 46 + name + extra]
    if head[46:].endswith(b"data/0"):
        head[24:28] = b"\xff" * 4
        more += struct.pack("<HHQ", 1, 8, 1 << 40)
    head[30:32] = struct.pack("<H", len(more))
    directory += bytes(head) + more
    at += 46 + name + extra + comment
tail = bytearray(file[end:])
tail[12:16] = struct.pack("<I", len(directory))
pathlib.Path(__file__).with_name("claims.bin").write_bytes(file[:begin] + directory + bytes(tail))
