"""A PNG file has all the rows that its header states, or is refused."""

import io
import struct
import zlib
from itertools import pairwise

import pytest
import torch
from PIL import Image

from sde_diffusion.data.image_files import DataNotFound, image_folder
from sde_diffusion.files.png import check_rows

# The pass of each pixel of an 8x8 tile, from the PNG specification, section 8.2.
ADAM7 = """
1 6 4 6 2 6 4 6
7 7 7 7 7 7 7 7
5 6 5 6 5 6 5 6
7 7 7 7 7 7 7 7
3 6 4 6 3 6 4 6
7 7 7 7 7 7 7 7
5 6 5 6 5 6 5 6
7 7 7 7 7 7 7 7
"""
TILE = [line.split() for line in ADAM7.split("\n") if line]
KINDS = [(0, 1, 1), (0, 2, 1), (0, 16, 1), (2, 8, 3), (2, 16, 3), (3, 4, 1), (4, 8, 2), (6, 8, 4)]


def chunk(kind, data):
    check = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)


def picture(width, height, raw, depth=8, colour=2, interlaced=0, parts=1):
    """A PNG file with all its checksums and its end, whatever its rows are."""
    data = zlib.compress(raw)
    cuts = [len(data) * k // parts for k in range(parts + 1)]
    body = b"".join(chunk(b"IDAT", data[a:b]) for a, b in pairwise(cuts))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    palette = chunk(b"PLTE", bytes(3 * 2**depth)) if colour == 3 else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + palette + body + chunk(b"IEND", b"")


def size(width, height, bits, interlaced):
    """Bytes of the rows of all passes, by counting pixels one by one."""
    rows = {}
    for y in range(height):
        for x in range(width):
            key = (TILE[y % 8][x % 8], y) if interlaced else ("", y)
            rows[key] = rows.get(key, 0) + bits
    return sum(1 + -(-each // 8) for each in rows.values())


@pytest.mark.parametrize("interlaced", [0, 1])
@pytest.mark.parametrize(("colour", "depth", "channels"), KINDS)
def test_the_size_of_all_rows_is_exact_for_any_picture(colour, depth, channels, interlaced):
    """A picture of exactly this size is read by Pillow; with a byte less it is refused here."""
    for width, height in ((1, 1), (1, 9), (3, 2), (5, 5), (8, 8), (9, 4), (17, 11)):
        whole = bytes(size(width, height, depth * channels, interlaced))
        file = picture(width, height, whole, depth, colour, interlaced, parts=3)
        check_rows(io.BytesIO(file))
        with Image.open(io.BytesIO(file)) as image:
            image.load()
        short = picture(width, height, whole[:-1], depth, colour, interlaced)
        with pytest.raises(ValueError, match="rows are missing"):
            check_rows(io.BytesIO(short))


@pytest.mark.parametrize("rows", [1, 4, 7])
def test_a_picture_with_rows_missing_in_a_complete_stream_is_refused_by_name(tmp_path, rows):
    """Pillow reads them as black, without an error."""
    white = b"\0" + b"\xff" * 24
    (tmp_path / "a.png").write_bytes(picture(8, 8, white * rows))
    with pytest.raises(
        DataNotFound, match=rf"a\.png cannot be read: rows are missing: {25 * rows} of 200"
    ):
        image_folder(tmp_path, 8)
    (tmp_path / "a.png").write_bytes(picture(8, 8, white * 8))
    assert torch.equal(image_folder(tmp_path, 8).pixels, torch.full((1, 3, 8, 8), 255).byte())


def test_no_more_is_unpacked_than_the_header_needs():
    """A stream of 64 MiB of zeros in a picture of 8x8 takes the time and memory of 1 MiB."""
    check_rows(io.BytesIO(picture(8, 8, bytes(2**26))))
