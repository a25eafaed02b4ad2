"""Completeness of PNG files: decoders fill rows that a whole stream lacks with black."""

import struct
import zlib
from typing import BinaryIO

__all__ = ["check_rows"]

SIGNATURE = b"\x89PNG\r\n\x1a\n"

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by the type of colour

# Adam7: first column and row of each pass, and the steps between its columns and rows.
PASSES = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
          (0, 1, 1, 2)]  # fmt: skip


def check_rows(file: BinaryIO) -> None:
    """Refuse a PNG file whose data hold fewer rows than its header states.

    Decompresses the data, 1 MiB at a time, up to the size that the header needs.

    Raises:
        ValueError: with the bytes found and needed.
    """
    if file.read(8) != SIGNATURE:
        raise ValueError("not a PNG file")
    needed, found, inflate = 0, 0, zlib.decompressobj()
    while len(head := file.read(8)) == 8:
        size, kind = struct.unpack(">I4s", head)
        data = file.read(size)
        file.read(4)  # the CRC, which decoders check
        if kind == b"IHDR":
            needed = size_of(data)
        while kind == b"IDAT" and data and found < needed:
            found += len(inflate.decompress(data, 2**20))
            data = inflate.unconsumed_tail
    if found < needed:
        raise ValueError(f"rows are missing: {found:,} of {needed:,} bytes of pixels")


def size_of(header: bytes) -> int:
    """Return the bytes of all rows of an image, each with its byte for the filter."""
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    bits = depth * CHANNELS[colour]
    needed = 0
    for x, y, across, down in PASSES if interlaced else [(0, 0, 1, 1)]:
        columns, rows = -((x - width) // across), -((y - height) // down)
        if columns > 0 and rows > 0:
            needed += rows * (1 + -(-columns * bits // 8))
    return needed
