#!/usr/bin/env python3
"""Writes forms.json: small pictures in every layout and with every kind of metadata that changes pixels, and what Pillow makes of
them as transformers' load_image does: `rgb` = exif_transpose(image).convert("RGB"), `white` = composited on white as transformers
5.23's convert_to_rgb does with an image that has just been opened (null: the same). `error`: Pillow refuses.

    python3 tests/pictures/make.py        (Pillow 13, numpy)
"""
import io
import json
import random
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

FORMS = {}


def texture(w, h, channels=3, seed=0):
    """Slopes with an edge: colours that differ from pixel to pixel, as in a photograph."""
    y, x = np.mgrid[0:h, 0:w]
    planes = [(x * 17 + y * 9 + 40) % 256, (255 - x * 11 - y * 5) % 256, ((x + y) * 13 + 90) % 256, (x * 29 + 60) % 256]
    out = np.stack(planes[:channels], -1).astype(np.uint8)
    out[h // 2:, w // 2:] = [200, 30, 90, 140][:channels]
    return out


def jpeg(a, mode="RGB", **how):
    out = io.BytesIO()
    Image.fromarray(a if a.shape[-1] > 1 else a[..., 0], mode).save(out, "JPEG", **({"quality": 92} | how))
    return out.getvalue()


def segment(code, data):
    return bytes([0xFF, code]) + struct.pack(">H", len(data) + 2) + data


def after_soi(data, *segments):
    return data[:2] + b"".join(segments) + data[2:]


def without(data, code):
    """A JPEG without the segments of a marker."""
    out, at = data[:2], 2
    while data[at + 1] != 0xDA:
        n = struct.unpack(">H", data[at + 2:at + 4])[0] + 2
        if data[at + 1] != code:
            out += data[at:at + n]
        at += n
    return out + data[at:]


def sof(data):
    return next(i for c in (b"\xff\xc0", b"\xff\xc1", b"\xff\xc2") if (i := data.find(c)) > 0)


def tiff(value, order=">", kind=3):
    head = b"MM\0*" if order == ">" else b"II*\0"
    size = {3: struct.pack(order + "HH", value, 0), 4: struct.pack(order + "I", value)}[kind]
    return head + struct.pack(order + "IH", 8, 1) + struct.pack(order + "HHI", 0x0112, kind, 1) + size + b"\0\0\0\0"


def xmp(value, attribute=True):
    body = f'tiff:Orientation="{value}"' if attribute else "/"
    inner = "" if attribute else f"<tiff:Orientation>{value}</tiff:Orientation>"
    return f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description {body}>{inner}</rdf:Description></rdf:RDF></x:xmpmeta>'.encode()


def chunk(kind, data, crc=None):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) if crc is None else crc)


def rows(a, bits):
    """Filter byte and packed samples, row by row."""
    out = b""
    for row in a.reshape(a.shape[0], -1):
        if bits == 16:
            packed = row.astype(">u2").tobytes()
        elif bits == 8:
            packed = row.astype(np.uint8).tobytes()
        else:
            text = "".join(f"{v:0{bits}b}" for v in row)
            text += "0" * (-len(text) % 8)
            packed = bytes(int(text[i:i + 8], 2) for i in range(0, len(text), 8))
        out += b"\0" + packed
    return out


def png(a, colour, bits=8, before=(), behind=(), interlace=False, end=True, data=None, palette=None):
    """A PNG file of samples [h, w, channels]; `before` and `behind` are chunks around its pixels."""
    h, w = a.shape[:2]
    if interlace:
        steps = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
        raw = b"".join(rows(a[y::dy, x::dx], bits) for x, y, dx, dy in steps if a[y::dy, x::dx].size)
    else:
        raw = rows(a, bits)
    out = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, bits, colour, 0, 0, int(interlace)))
    if palette is not None:
        out += chunk(b"PLTE", palette)
    out += b"".join(before) + (chunk(b"IDAT", zlib.compress(raw)) if data is None else data) + b"".join(behind)
    return out + (chunk(b"IEND", b"") if end else b"")


def form(name, data):
    entry = {"file": data.hex()}
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        rgb = image.convert("RGB")
        entry |= {"size": list(rgb.size), "rgb": rgb.tobytes().hex()}
        whole = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        whole.load()
        if "A" in whole.getbands() or whole.info.get("transparency") is not None:
            over = whole.convert("RGBA")
            white = Image.alpha_composite(Image.new("RGBA", over.size, (255, 255, 255, 255)), over).convert("RGB")
            entry["white"] = white.tobytes().hex()
    except Exception as e:  # noqa: BLE001
        entry["error"] = f"{type(e).__name__}: {e}"[:120]
    assert name not in FORMS
    FORMS[name] = entry


def main():
    rgb = texture(9, 6)
    for w in (1, 2, 3, 4, 5, 6, 7, 8, 9, 17):
        for kind, name in ((2, "420"), (1, "422"), (0, "444")):
            form(f"jpeg {name} {w} wide", jpeg(texture(w, 21), subsampling=kind))
    for h in (1, 2, 3):
        form(f"jpeg 420 {h} high", jpeg(texture(19, h), subsampling=2))
    form("jpeg 420 3 wide progressive", jpeg(texture(3, 21), subsampling=2, progressive=True))
    form("jpeg 420 3 wide restarts", jpeg(texture(3, 40), subsampling=2, restart_marker_blocks=1))
    form("jpeg gray 3 wide", jpeg(texture(3, 21, 1), "L"))
    form("jpeg progressive", jpeg(texture(20, 20), subsampling=2, progressive=True))
    form("jpeg restarts", jpeg(texture(40, 20), restart_marker_blocks=1))
    form("jpeg rgb components", jpeg(rgb, keep_rgb=True))
    plain = jpeg(rgb, subsampling=0)
    adobe = lambda transform: segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([transform]))
    form("jpeg adobe transform 0, no jfif", after_soi(without(plain, 0xE0), adobe(0)))
    form("jpeg adobe transform 1, no jfif", after_soi(without(plain, 0xE0), adobe(1)))
    form("jpeg adobe transform 0 behind jfif", without(plain, 0xE0)[:2] + plain[2:20] + adobe(0) + plain[20:])
    form("jpeg without any app marker", without(plain, 0xE0))
    cmyk = jpeg(texture(9, 6, 4), "CMYK", subsampling=0)
    form("jpeg cmyk adobe", cmyk)
    form("jpeg cmyk without adobe", without(cmyk, 0xEE))
    form("jpeg ycck", after_soi(without(cmyk, 0xEE), adobe(2)))
    form("jpeg cmyk with jfif, no adobe", after_soi(without(cmyk, 0xEE), segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0")))
    for value in (0, 1, 6, 8, 9):
        form(f"jpeg exif {value}", after_soi(plain, segment(0xE1, b"Exif\0\0" + tiff(value))))
    form("jpeg exif 6 little endian", after_soi(plain, segment(0xE1, b"Exif\0\0" + tiff(6, "<"))))
    form("jpeg exif 6 as a long", after_soi(plain, segment(0xE1, b"Exif\0\0" + tiff(6, kind=4))))
    form("jpeg exif 6 behind jfif", plain[:20] + segment(0xE1, b"Exif\0\0" + tiff(6)) + plain[20:])
    form("jpeg exif twice, 6 and 3", after_soi(plain, segment(0xE1, b"Exif\0\0" + tiff(6)), segment(0xE1, b"Exif\0\0" + tiff(3))))
    form("jpeg exif cut short", after_soi(plain, segment(0xE1, b"Exif\0\0" + tiff(6)[:12])))
    ns = b"http://ns.adobe.com/xap/1.0/\0"
    form("jpeg xmp 6", after_soi(plain, segment(0xE1, ns + xmp(6))))
    form("jpeg xmp 8 as an element", after_soi(plain, segment(0xE1, ns + xmp(8, False))))
    form("jpeg exif 1 and xmp 6", after_soi(plain, segment(0xE1, b"Exif\0\0" + tiff(1)), segment(0xE1, ns + xmp(6))))
    form("jpeg exif without orientation and xmp 6", after_soi(plain, segment(0xE1, b"Exif\0\0" + b"MM\0*" + struct.pack(">IHI", 8, 0, 0)), segment(0xE1, ns + xmp(6))))
    form("jpeg icc profile", after_soi(plain, segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(200))))
    form("jpeg mpo", mpo(rgb))
    form("jpeg trailing junk", plain + random.Random(1).randbytes(50))
    form("jpeg leading junk", b"\0\0" + plain)
    form("jpeg comment", after_soi(plain, segment(0xFE, b"hello\xff\xd8\xff\xd9")))
    form("jpeg fill bytes before markers", plain[:2] + b"\xff\xff\xff" + plain[2:])
    at = sof(plain)
    form("jpeg 12 bits", plain[:at + 4] + b"\x0c" + plain[at + 5:])
    form("jpeg height 0 (DNL)", plain[:at + 5] + b"\0\0" + plain[at + 7:-2] + b"\xff\xdc\0\4\0\6" + plain[-2:])
    form("jpeg width 0", plain[:at + 7] + b"\0\0" + plain[at + 9:])
    form("jpeg lossless", plain[:at + 1] + b"\xc3" + plain[at + 2:])
    form("jpeg arithmetic", plain[:at + 1] + b"\xc9" + plain[at + 2:])
    form("jpeg extended sequential", plain[:at + 1] + b"\xc1" + plain[at + 2:])
    form("jpeg without end", plain[:-2])
    form("jpeg cut off", plain[:-40])

    G, RGB, P, GA, RGBA = 0, 2, 3, 4, 6
    gray = texture(9, 6, 1)
    deep = (texture(9, 6, 4).astype(np.uint16) * 257 + 3)
    for bits in (1, 2, 4):
        form(f"png gray {bits} bit", png(gray >> (8 - bits), G, bits))
        form(f"png gray {bits} bit, key", png(gray >> (8 - bits), G, bits, [chunk(b"tRNS", struct.pack(">H", 1))]))
    form("png gray", png(gray, G))
    form("png gray, key", png(gray, G, 8, [chunk(b"tRNS", struct.pack(">H", int(gray[0, 0, 0])))]))
    form("png gray 16 bit", png(deep[..., :1], G, 16))
    form("png gray 16 bit, dark", png(deep[..., :1] // 200, G, 16))
    form("png gray 16 bit, key", png(deep[..., :1] // 200, G, 16, [chunk(b"tRNS", struct.pack(">H", int(deep[0, 0, 0] // 200)))]))
    form("png gray and alpha", png(texture(9, 6, 2), GA))
    form("png gray and alpha 16 bit", png(deep[..., :2], GA, 16))
    form("png rgb", png(rgb, RGB))
    form("png rgb, key", png(rgb, RGB, 8, [chunk(b"tRNS", struct.pack(">HHH", *map(int, rgb[0, 0])))]))
    form("png rgb 16 bit", png(deep[..., :3], RGB, 16))
    form("png rgb 16 bit, key", png(deep[..., :3], RGB, 16, [chunk(b"tRNS", struct.pack(">HHH", *map(int, deep[0, 0, :3])))]))
    form("png rgba", png(texture(9, 6, 4), RGBA))
    form("png rgba 16 bit", png(deep, RGBA, 16))
    colours = bytes(random.Random(2).randbytes(16 * 3))
    index = gray >> 4
    form("png palette", png(index, P, 8, palette=colours))
    form("png palette 4 bit", png(index, P, 4, palette=colours))
    form("png palette 2 bit", png(index >> 2, P, 2, palette=colours[:12]))
    form("png palette 1 bit", png(index >> 3, P, 1, palette=colours[:6]))
    form("png palette, alpha for each", png(index, P, 8, [chunk(b"tRNS", bytes(range(0, 256, 16)))], palette=colours))
    form("png palette, alpha for some", png(index, P, 8, [chunk(b"tRNS", b"\0\x80\xff\x40")], palette=colours))
    form("png palette, one clear colour", png(index, P, 8, [chunk(b"tRNS", b"\xff\xff\xff\0")], palette=colours))
    form("png palette shorter than its indices", png(index, P, 8, palette=colours[:24]))
    for name, colour, a, bits in (("rgb", RGB, rgb, 8), ("gray 4 bit", G, gray >> 4, 4), ("rgba 16 bit", RGBA, deep, 16)):
        form(f"png interlaced {name}", png(a, colour, bits, interlace=True))
    form("png gamma", png(rgb, RGB, 8, [chunk(b"gAMA", struct.pack(">I", 100000))]))
    form("png srgb", png(rgb, RGB, 8, [chunk(b"sRGB", b"\0")]))
    form("png icc profile", png(rgb, RGB, 8, [chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(300)))]))
    form("png icc profile, broken", png(rgb, RGB, 8, [chunk(b"iCCP", b"x\0\0nonsense")]))
    form("png background, pixel size, text", png(rgb, RGB, 8, [chunk(b"bKGD", bytes(6)), chunk(b"pHYs", struct.pack(">IIB", 3, 1, 0)), chunk(b"tEXt", b"k\0v")]))
    form("png exif 6", png(rgb, RGB, 8, [chunk(b"eXIf", tiff(6))]))
    form("png exif 6 behind the pixels", png(rgb, RGB, 8, behind=[chunk(b"eXIf", tiff(6))]))
    form("png exif 6 with its own head", png(rgb, RGB, 8, [chunk(b"eXIf", b"Exif\0\0" + tiff(6))]))
    form("png xmp 6", png(rgb, RGB, 8, [chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(6))]))
    form("png xmp 6 compressed", png(rgb, RGB, 8, [chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp(6)))]))
    profile = lambda body: b"\nexif\n%8d\n" % len(body) + body.hex().encode() + b"\n"
    form("png exif 6 in a text", png(rgb, RGB, 8, [chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile(b"Exif\0\0" + tiff(6))))]))
    form("png animated", apng(rgb))
    form("png animated, first picture apart", png(rgb, RGB, 8, [chunk(b"acTL", struct.pack(">II", 1, 0))], [
        chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 9, 6, 0, 0, 1, 1, 0, 0)), chunk(b"fdAT", struct.pack(">I", 1) + zlib.compress(rows(255 - rgb, 8)))]))
    half = zlib.compress(rows(rgb, 8))
    form("png pixels in several chunks", png(rgb, RGB, data=chunk(b"IDAT", half[:9]) + chunk(b"IDAT", b"") + chunk(b"IDAT", half[9:])))
    form("png cut off in its pixels", png(rgb, RGB, data=chunk(b"IDAT", half)[:40], end=False))
    form("png too few pixels", png(rgb, RGB, data=chunk(b"IDAT", zlib.compress(rows(rgb, 8)[:60]))))
    form("png too many pixels", png(rgb, RGB, data=chunk(b"IDAT", zlib.compress(rows(rgb, 8) + bytes(99)))))
    form("png without end", png(rgb, RGB, end=False))
    form("png trailing junk", png(rgb, RGB) + random.Random(1).randbytes(50))
    form("png wrong checksum of a text", png(rgb, RGB, 8, [chunk(b"tEXt", b"k\0v", 1)]))
    form("png wrong checksum of its pixels", png(rgb, RGB, data=chunk(b"IDAT", half, 1)))
    form("png without palette", png(index, P, 8))
    form("png 0 wide", b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 5, 8, 2, 0, 0, 0)) + chunk(b"IDAT", half) + chunk(b"IEND", b""))
    form("png of an iPhone (CgBI)", b"\x89PNG\r\n\x1a\n" + chunk(b"CgBI", b"\x50\0\x20\2") + png(rgb, RGB)[8:])

    text = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in FORMS.items())
    (Path(__file__).parent / "forms.json").write_text("{\n" + text + "\n}\n")
    for k, v in FORMS.items():
        if "error" in v:
            print(k, "|", v["error"])
    print(len(FORMS))


def mpo(a):
    out = io.BytesIO()
    Image.fromarray(a).save(out, "MPO", save_all=True, append_images=[Image.fromarray(255 - a)], quality=92)
    return out.getvalue()


def apng(a):
    out = io.BytesIO()
    Image.fromarray(a).save(out, "PNG", save_all=True, append_images=[Image.fromarray(255 - a)])
    return out.getvalue()


if __name__ == "__main__":
    main()
