"""ICC profiles written by hand: Adobe RGB, Display P3, linear grey."""

import struct

# ICC.1:2022: a header of 128 bytes, a table of tags, their data.


def icc_of(space, tags, *, pcs="XYZ ", device="mntr", name=b"test"):
    head = b"\0\0\0\0lcms" + struct.pack(">I", 0x02400000) + f"{device}{space}{pcs}".encode()
    head = head.ljust(36, b"\0") + b"acsp"
    head = head.ljust(68, b"\0") + struct.pack(">III", 0xF6D6, 0x10000, 0xD32D)
    title = b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name + bytes(1 + 4 + 4 + 2 + 1 + 67)
    tags = {"desc": title, **tags}
    table, data = struct.pack(">I", len(tags)), b""
    begin = 128 + 4 + 12 * len(tags)
    for tag, content in tags.items():
        table += tag.encode() + struct.pack(">II", begin + len(data), len(content))
        data += content.ljust(-len(content) % 4 + len(content), b"\0")
    profile = head.ljust(128, b"\0") + table + data
    return struct.pack(">I", len(profile)) + profile[4:]


def xyz(*values):
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def gamma(value):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


def srgb_curve():
    levels = [(n / 1023 + 0.055) / 1.055 for n in range(1024)]
    light = [n / 1023 / 12.92 if n / 1023 <= 0.04045 else level**2.4 for n, level in enumerate(levels)]
    return b"curv\0\0\0\0" + struct.pack(">I1024H", 1024, *(round(value * 65535) for value in light))


WHITE = xyz(0.9642, 1.0, 0.8249)


def rgb_profile(red, green, blue, curve, name):
    tags = {"wtpt": WHITE, "rXYZ": xyz(*red), "gXYZ": xyz(*green), "bXYZ": xyz(*blue)}
    return icc_of("RGB ", tags | {"rTRC": curve, "gTRC": curve, "bTRC": curve}, name=name)


ADOBE_RGB = rgb_profile(
    (0.60974, 0.31111, 0.01947),
    (0.20528, 0.62567, 0.06087),
    (0.14919, 0.06322, 0.74457),
    gamma(2.19921875),
    b"Adobe RGB (1998)",
)
DISPLAY_P3 = rgb_profile(
    (0.51512, 0.2412, -0.00105),
    (0.29198, 0.69225, 0.04189),
    (0.1571, 0.06657, 0.78407),
    srgb_curve(),
    b"Display P3",
)
LINEAR_GREY = icc_of("GRAY", {"wtpt": WHITE, "kTRC": gamma(1.0)})
