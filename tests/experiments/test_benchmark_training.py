"""The training benchmark trains the same network in every row, and its loss by hand is ours."""

import copy
import json
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import pytest
import torch

import sde_diffusion as sd
from sde_diffusion.data.datasets import Images

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module")
def benchmark():
    from benchmarks import training

    return training


def test_it_writes_a_ratio_for_every_row(benchmark, tmp_path, capsys):
    with torch.random.fork_rng():
        config = benchmark.Config(network="mlp", batch_size=4, size=8, rounds=3, train_steps=1,
                                  out=tmp_path / "out")  # fmt: skip
        benchmark.main(config)
    record = json.loads((tmp_path / "out" / "benchmark_training.json").read_text())
    rows = {"loop by hand", "sde_diffusion"} | {
        n for n, m in benchmark.PEERS.items() if find_spec(m)
    }
    assert set(record["ratios"]) == rows
    assert all(len(each) == 3 for each in record["ratios"].values())
    assert record["median_ratio"]["loop by hand"] == 1.0
    assert "sde_diffusion" in capsys.readouterr().out


def test_every_row_trains_the_network_it_is_given(benchmark):
    """A row that did not would be fast."""
    config = benchmark.Config(network="mlp", batch_size=8, size=8)
    pixels = torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))  # fmt: skip
    images = Images(pixels, torch.zeros(64, dtype=torch.long))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = benchmark.made(config)
        for name, make in benchmark.contenders(config).items():
            trained = copy.deepcopy(network)
            assert len(list(islice(make(trained, images, config, torch.device("cpu")), 2))) == 2
            for parameter, before in zip(trained.parameters(), network.parameters(), strict=True):
                assert not torch.equal(parameter, before), name


def test_the_loss_by_hand_is_the_one_of_the_package(benchmark):
    """Both are means of |eps_hat - eps|^2 over steps, noise and images drawn alike: an untrained
    network whose output is 0 has the loss E eps^2 = 1, with standard error sqrt(2 / n)."""
    config = benchmark.Config(network="unet", batch_size=16, size=8)
    images = Images(torch.zeros(64, 1, 8, 8, dtype=torch.uint8), torch.zeros(64, dtype=torch.long))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = sd.networks.UNet(channels=(8,), blocks=1, attention=(), embedding=8, heads=1)
        made = [benchmark.by_hand, benchmark.ours]
        loops = [make(copy.deepcopy(network), images, config, torch.device("cpu")) for make in made]
        by_hand, ours = next(loops[0]), next(loops[1]).loss
    bound = 4.5 * (2 / (16 * 64)) ** 0.5
    assert abs(by_hand - 1) < bound
    assert abs(ours - 1) < bound
