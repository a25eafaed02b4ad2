"""Malicious files of the right format: records, descriptions, tensors.

All have the right hashes, as an attacker can compute them.
"""

import json
import math

import torch
from hostile_files import (
    DENOISERS,
    FRAMES,
    case,
    chain,
    frame,
    part_case,
    record_case,
    record_of,
    sound,
    tensors_case,
    text_case,
    unet,
    with_,
    without,
)

from sde_diffusion.files import storage

# ---- records ------------------------------------------------------------------------------------

for _name, _text in {
    "empty": b"", "a brace": b"{", "null": b"null", "a list": b"[1, 2]", "a string": b'"format"',
    "an object": b"{}", "zeros": b"\0" * 100, "latin-1": b'{"command": "\xe9"}',
    "utf-16": '{"format": 2}'.encode("utf-16"), "nested deeply": b"[" * 100_000,
    "nested in objects": b'{"a":' * 100_000, "nested 900 deep": b"[" * 900 + b"]" * 900,
    "a long integer": b'{"format": ' + b"1" * 100_000 + b"}",
    "a long fraction": b'{"format": 0.' + b"1" * 1_000_000 + b"}",
    "a picture": b"\x89PNG\r\n\x1a\n" + b"\0" * 100,
    "1e999": b'{"format": 1e999}', "NaN": b'{"format": NaN}', "-Infinity": b'{"format": -Infinity}',
    "many brackets": b"[" + b"[]," * 1_300_000 + b"[]]",
    "too long": b" " * (5 * 2**20) + b"{}",
    "with a BOM": lambda whole: b"\xef\xbb\xbf" + whole,
    "with a comment": lambda whole: b"// mine\n" + whole,
    "with more after it": lambda whole: whole + b"{}",
    "with a last comma": lambda whole: whole.rstrip()[:-1] + b",}",
    "half": lambda whole: whole[: len(whole) // 2],
    "a name twice": lambda whole: whole.replace(b'"format": 2', b'"format": 2, "format": 2'),
    "a part twice": lambda whole: whole.replace(
        b'"noise_input"', b'"process": {"class": "VE"}, "noise_input"'
    ),
    "another number": lambda whole: whole.replace(b"20.0", b"21.0"),
    "another command": lambda whole: whole.replace(b"as typed", b"as typod"),
}.items():  # fmt: skip
    text_case(f"record: {_name}", _text)


for _name, _change in {
    "no format": without("format"), "format 1": with_(format=1), "format 3": with_(format=3),
    "format 10^30": with_(format=10**30), "format true": with_(format=True),
    "format 2.0": with_(format=2.0), "format '2'": with_(format="2"),
    "format null": with_(format=None),
    "format 0": with_(format=0), "format -2": with_(format=-2),
    "no denoiser": without("denoiser"), "denoiser null": with_(denoiser=None),
    "denoiser a list": with_(denoiser=[]), "denoiser empty": with_(denoiser={}),
    "denoiser a string": with_(denoiser="\x1b[31m"),
    "denoisre": lambda record: record.update(denoisre=record.pop("denoiser")),
    "a part more": lambda record: record["denoiser"].update(code={"class": "os.system"}),
    "a part less": lambda record: record["denoiser"].pop("noise_input") and None,
    "a part misspelt": lambda record: record["denoiser"].update(
        proces=record["denoiser"].pop("process")
    ),
    "a part a list": lambda record: record["denoiser"].update(process=["VP"]),
    "a part a string": lambda record: record["denoiser"].update(network="MLP"),
    "a part null": lambda record: record["denoiser"].update(noise_input=None),
}.items():  # fmt: skip
    record_case(f"record: {_name}", _change)


@case(DENOISERS, "record: hash of nothing")
def _(folder):
    path = sound(folder)
    record = record_of(path) | {"sha256": None}
    record["record_sha256"] = storage.record_hash(record)
    path.with_suffix(".json").write_text(json.dumps(record))
    return path


# ---- descriptions -------------------------------------------------------------------------------

CLASSES = ["Denoiser", "os", "os.system", "system", "__import__", "__class__", "__init__", "_", "",
           "Process", "VariancePreserving", "LinearRate", "Level", "Prediction", "Parameterization",
           "Pair", "nn", "torch.nn.Linear", "Fourier", "Dropout", "mlp", "MLP ", "MlP", "\x1b[2J",
           "a\nb", "\ud800", 7, None, True, ["VP"], {}, "x" * 100_000]  # fmt: skip
for _part in ("network", "process", "parameterization", "noise_input"):
    for _class in CLASSES:
        if _part == "network" or _class not in ("mlp", "MLP ", "MlP", "Fourier"):
            part_case(f"class {_class!r:.20}", _part, **{"class": _class})
    part_case("no class", _part, **{"class": ...})
    part_case("clas", _part, **{"class": ...}, clas="VP")
    part_case("an argument more", _part, beta_middle=3.0)
    part_case("a dunder argument", _part, __class__="x")
    part_case("self", _part, self=1)


HUGE, MANY = 10**9, 10**30
NETWORK = {
    "width true": {"width": True}, "width '8'": {"width": "8"}, "width 8.0": {"width": 8.0},
    "width null": {"width": None}, "width -8": {"width": -8}, "width 0": {"width": 0},
    "width 9": {"width": 9}, "width 10^9": {"width": HUGE}, "width 10^30": {"width": MANY},
    "depth 2": {"depth": 2}, "depth 10^9": {"depth": HUGE}, "depth 10^30": {"depth": MANY},
    "depth -1": {"depth": -1}, "shape 2": {"shape": 2}, "shape 'ab'": {"shape": "ab"},
    "shape [[2]]": {"shape": [[2]]}, "shape [true, 2]": {"shape": [True, 2]},
    "shape [2.0]": {"shape": [2.0]}, "shape {}": {"shape": {"2": 2}}, "shape []": {"shape": []},
    "shape of 10^5 sides": {"shape": [2] * 100_000},
    "shape of long sides": {"shape": [2**62] * 400},
    "fourier 10^9": {"fourier": HUGE}, "cond 10^9": {"cond": HUGE},
    "cond -1": {"cond": -1}, "dropout 2": {"dropout": 2.0}, "dropout -1": {"dropout": -1.0},
    "wdith": {"width": ..., "wdith": 8}, "no width": {"width": ...}, "no shape": {"shape": ...},
    "no arguments": {"width": ..., "shape": ..., "depth": ..., "fourier": ..., "cond": ...},
    "as large as it may be": {"shape": [2**16, 256], "width": 2**16, "depth": 1000,
                              "fourier": 2**16},
    "only a class": {"class": "UNet", "width": ..., "shape": ..., "depth": ..., "fourier": ...},
    "Fourier of 10^9": {"class": "Fourier", "width": HUGE, "max_frequency": 50.0, "shape": ...,
                        "depth": ..., "fourier": ..., "cond": ..., "dropout": ...},
}  # fmt: skip
for _name, _changed in NETWORK.items():
    part_case(_name, "network", **_changed)
for _name, _changed in {
    "blocks 10^9": {"blocks": HUGE}, "blocks true": {"blocks": True}, "blocks -1": {"blocks": -1},
    "chanels": {"channels": ..., "chanels": [8]}, "channels 8": {"channels": 8},
    "channels [true]": {"channels": [True]}, "channels [10^9]": {"channels": [8 * HUGE]},
    "channels [-8]": {"channels": [-8]}, "channels of 10^5": {"channels": [8] * 100_000},
    "channels of 2,000": {"channels": [8] * 2000}, "channels []": {"channels": []},
    "attention [-1]": {"attention": [-1]}, "attention [10^9]": {"attention": [HUGE]},
    "attention [false]": {"attention": [False]}, "attention '0'": {"attention": "0"},
    "patch 10^9": {"patch": HUGE}, "patch 0": {"patch": 0}, "embedding 10^9": {"embedding": HUGE},
    "embedding 7": {"embedding": 7}, "heads 0": {"heads": 0}, "heads 10^30": {"heads": MANY},
    "in_channels 10^9": {"in_channels": HUGE}, "no heads": {"heads": ...},
    "as large as it may be": {"channels": [2**16] * 10, "blocks": 32, "attention": [*range(10)],
                              "patch": 1, "embedding": 2**16, "cond": 2**16},
}.items():  # fmt: skip
    part_case(f"unet: {_name}", "network", base=unet, **_changed)

for _name, _changed in {
    "beta_min '0.1'": {"beta_min": "0.1"}, "beta_min -1": {"beta_min": -1.0},
    "beta_min true": {"beta_min": True}, "beta_min null": {"beta_min": None},
    "beta_max [20]": {"beta_max": [20.0]}, "beta_max 10^400": {"beta_max": 10**400},
    "beta_max 1e308": {"beta_max": 1e308}, "beta_max nan": {"beta_max": math.nan},
    "beta_max inf": {"beta_max": math.inf}, "beta_max 'nan'": {"beta_max": "nan"},
    "no beta_max": {"beta_max": ...}, "beta_mx": {"beta_max": ..., "beta_mx": 20.0},
    "Discrete without betas": {"class": "Discrete", "beta_min": ..., "beta_max": ...},
}.items():  # fmt: skip
    part_case(_name, "process", **_changed)
for _name, _betas in {
    "none": [], "2": [2.0], "0": [0.0, 0.1], "nan": [math.nan], "strings": ["a"], "an object": {},
    "true": [True], "nested": [[0.1]], "a number": 0.1, "10^5 entries of 2": [2.0] * 100_000,
    "10^6 entries": [0.1] * 1_000_000, "null": None, "a number of entries": HUGE,
}.items():  # fmt: skip
    part_case(f"betas: {_name}", "process", base=chain, betas=_betas)
for _name, _changed in {
    "sigma_max 1e308": {"class": "EDM", "sigma_max": 1e308},
    "1e-300 to 1e300": {"class": "VE", "sigma_min": 1e-300, "sigma_max": 1e300},
    "rate 0": {"class": "OU", "rate": 0.0}, "s -1": {"class": "Cosine", "s": -1.0},
}.items():  # fmt: skip
    part_case(_name, "process", beta_min=..., beta_max=..., **_changed)
INDEX = {"class": "TimestepIndex"}
part_case("sigma_data 1e308", "parameterization", **{"class": "Preconditioned"}, sigma_data=1e308)
part_case("sigma_data 0", "parameterization", **{"class": "Preconditioned"}, sigma_data=0.0)
part_case("num_steps 10^30", "noise_input", **INDEX, num_steps=MANY, counts_from=0)
part_case("num_steps 10.0", "noise_input", **INDEX, num_steps=10.0, counts_from=0)
part_case("counts_from true", "noise_input", **INDEX, num_steps=10, counts_from=True)


# ---- tensors ------------------------------------------------------------------------------------


def other(name, make):
    """Change one of the tensors."""
    return lambda tensors: {**tensors, name: make(tensors[name])}


def filled(value):
    def make(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return make


FIRST = "layers.0.weight"
for _name, _change in {
    "one less": lambda tensors: {k: v for k, v in tensors.items() if k != FIRST},
    "one more": lambda tensors: {**tensors, "more": torch.zeros(2)},
    "none": lambda tensors: {"x": torch.zeros(0)},
    "another name": lambda tensors: {k.replace("weight", "weigth"): v for k, v in tensors.items()},
    "another shape": other(FIRST, lambda t: t[:-1]),
    "transposed": other(FIRST, lambda t: t.T.contiguous()),
    "flattened": other(FIRST, torch.flatten),
    "one of float64": other(FIRST, torch.Tensor.double),
    "one of float16": other(FIRST, torch.Tensor.half),
    "one of int32": other(FIRST, torch.Tensor.int),
    "all of int64": lambda tensors: {k: v.long() for k, v in tensors.items()},
    "all of bool": lambda tensors: {k: v.bool() for k, v in tensors.items()},
    "all of complex": lambda tensors: {k: v.to(torch.complex64) for k, v in tensors.items()},
    "nan": other(FIRST, filled(math.nan)), "inf": other(FIRST, filled(math.inf)),
    "-inf": other("layers.2.bias", filled(-math.inf)),
}.items():  # fmt: skip
    tensors_case(DENOISERS, f"tensors: {_name}", _change)
tensors_case(
    DENOISERS, "tensors: nan in bf16",
    lambda tensors: {k: filled(math.nan)(v.bfloat16()) for k, v in tensors.items()},
)  # fmt: skip

for _name, _change in {
    "no mean": lambda tensors: {k: v for k, v in tensors.items() if k != "mean"},
    "one more": lambda tensors: {**tensors, "code": torch.zeros(1)},
    "mean nan": other("mean", filled(math.nan)),
    "variances inf": other("variances", filled(math.inf)),
    "variances 0": other("variances", filled(0.0)),
    "variances -1": other("variances", filled(-1.0)),
    "variances of 3": other("variances", lambda t: torch.ones(3)),
    "mean of 2": other("mean", lambda t: t[:2]),
    "mean of integers": other("mean", torch.Tensor.int),
    "axes flat": other("axes", torch.flatten),
    "axes wide": other("axes", lambda t: t.T.contiguous()),
    "axes of none": other("axes", lambda t: t[:, :0].contiguous()),
    "axes not orthonormal": other("axes", lambda t: 2 * t),
}.items():  # fmt: skip
    tensors_case(FRAMES, f"tensors: {_name}", _change, base=frame)
for _name, _rest in {
    "'1'": "1", "true": True, "null": None, "-1": -1.0, "0": 0.0, "nan": math.nan,
    "10^400": 10**400, "a list": [1.0],
}.items():  # fmt: skip
    record_case(f"rest {_name}", with_(rest=_rest), FRAMES, frame)
record_case("no rest", without("rest"), FRAMES, frame)
record_case("a denoiser", lambda record: record, FRAMES, sound)
text_case("nested deeply", b"[" * 100_000, FRAMES, frame)
