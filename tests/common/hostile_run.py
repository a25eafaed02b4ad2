"""Load every malicious file with little memory, and print the outcome.

    python hostile_run.py FOLDER

First the files are made in FOLDER; then the process is limited to 256 MiB more than it has, loads
each file and prints a line of JSON for it.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

import hostile_archives  # noqa: F401  fills the tables
import hostile_records  # noqa: F401
from hostile_files import DENOISERS, FOREIGN, FRAMES, chain, foreign, frame, sound, unet

from sde_diffusion.files.torch_archives import import_weights
from sde_diffusion.grids import frames
from sde_diffusion.models.denoiser import Denoiser

ROOM = 256 * 2**20  # bytes of address space
KINDS = {"denoiser": DENOISERS, "frame": FRAMES, "foreign": FOREIGN}
LOADERS = {"denoiser": Denoiser.load, "frame": frames.GaussianFrame.load, "foreign": import_weights}
SOUND = {"denoiser": [sound, unet, chain], "frame": [frame], "foreign": [foreign]}


def outcome(kind, path):
    """Load one file and return the outcome."""
    start = time.perf_counter()
    try:
        LOADERS[kind](path)
    except Exception as error:
        result = [type(error).__name__, str(error)]
    else:
        result = ["accepted", ""]
    run = (path.parent / "canary").exists() or Path("canary").exists()
    return {
        "path": str(path),
        "outcome": result,
        "seconds": time.perf_counter() - start,
        "run": run,
    }


def made(folder, make):
    folder.mkdir()
    return make(folder)


def main(folder):
    cases = [(kind, name, make) for kind, table in KINDS.items() for name, make in table.items()]
    cases += [(kind, make.__name__, make) for kind, makes in SOUND.items() for make in makes]
    paths = [made(folder / f"{k}", make) for k, (_, _, make) in enumerate(cases)]
    for kind, makes in SOUND.items():
        LOADERS[kind](made(folder / kind, makes[0]))  # late imports need memory, too
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    room = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    for (kind, name, _), path in zip(cases, paths, strict=True):
        print(json.dumps([kind, name, outcome(kind, path)]), flush=True)
    # Computation on the meta device would import torch's compiler, which takes two seconds.
    assert "sympy" not in sys.modules


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    main(Path(sys.argv[1]))
