"""What the top-level documents say is so: their Python runs, and what they name is there."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import sde_diffusion as sd

ROOT = Path(__file__).parent.parent
OFFLINE = "import socket; socket.socket.connect = None\n"  # a connection is an error
COMMANDS = {
    "run": "python -m venv .venv && .venv/bin/pip install -e . "
    "&& .venv/bin/python experiments/mnist_vp.py --sampler ode",
    "test": "python -m venv .venv && .venv/bin/pip install -e '.[test]' "
    "&& .venv/bin/python -m pytest",
}


def text(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_the_python_of_a_document_runs_as_written_and_offline(document, tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```$", text(document), re.MULTILINE | re.DOTALL)
    script = tmp_path / "blocks.py"
    script.write_text(OFFLINE + "\n".join(blocks), encoding="utf-8")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert blocks
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_the_two_commands_stand_alone_under_the_markers_that_ci_looks_for(name):
    block = rf"^<!-- ci: {name} -->\n```sh\n(.*?)\n```$"
    assert re.findall(block, text("README.md"), re.MULTILINE) == [COMMANDS[name]]


def test_the_two_commands_are_there_for_powershell_too():
    """The same commands with the separators, the quotes and the folder of Windows."""
    block = re.search(r"^```powershell\n(.*?)\n```$", text("README.md"), re.MULTILINE | re.DOTALL)
    assert block is not None
    changes = {" && ": "; ", ".venv/bin/": ".venv\\Scripts\\", "'": '"'}
    for line, command in zip(block[1].splitlines(), COMMANDS.values(), strict=True):
        for old, new in changes.items():
            command = command.replace(old, new)
        assert line == command


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/promises.md"]
)
def test_every_file_that_a_document_names_is_there(document):
    linked = re.findall(r"\]\((?!https?://)([^)#]+)\)", text(document))
    named = re.findall(r"\b(?:tests|experiments|sde_diffusion|docs)/[\w/]+\.py\b", text(document))
    missing = [path for path in linked + named if not (ROOT / path).exists()]
    assert not missing


def test_one_version():
    declared = tomllib.loads(text("pyproject.toml"))["project"]["version"]
    cited = re.search(r"^version: (\S+)$", text("CITATION.cff"), re.MULTILINE)
    assert cited is not None
    assert declared == sd.__version__ == cited[1]
