"""Random numbers are functions of their addresses, and leave the global generators alone."""

import random
import runpy

import numpy as np
import pytest
import torch

from sde_diffusion.noise import sources
from sde_diffusion.noise.sources import Generated, Purpose, Seeded, stream

# As users have it: beartype would refuse first, and draws from `random` to pick what it checks.
PLAIN = runpy.run_path(sources.__file__)


def global_states():
    theirs = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), repr(theirs), random.getstate()


def draws(seeds, like, calls=3, purpose=Purpose.PATH):
    source = Seeded(seeds, purpose)
    return torch.stack([source(1.0, 0.5, like) for _ in range(calls)], dim=1)


@pytest.mark.parametrize("shape", [(), (3,), (1, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_row_depends_on_its_seed_only(shape, dtype):
    seeds = [7 * k for k in range(64)]
    like = torch.empty(64, *shape, dtype=dtype)
    whole = draws(seeds, like)
    assert whole.dtype == dtype
    for size in (16, 1):
        parts = [draws(seeds[k : k + size], like[:size]) for k in range(0, 64, size)]
        assert torch.equal(whole, torch.cat(parts))


def test_a_row_does_not_depend_on_its_place_in_the_batch():
    like = torch.empty(3, 4)
    assert torch.equal(draws([5, 6, 7], like).flip(0), draws([7, 6, 5], like))


def test_calls_seeds_and_purposes_are_all_different_numbers():
    like = torch.empty(8, 4)
    path, prior = draws(range(8), like), draws(range(8), like, purpose=Purpose.PRIOR)
    rows = torch.cat([path.flatten(0, 1), prior.flatten(0, 1)])
    assert len(rows.unique(dim=0)) == len(rows) == 8 * 3 * 2
    assert len(rows.unique()) == rows.numel()  # one shared number in 192 would be chance 2^-9


def test_streams_of_two_purposes_seeds_or_calls_are_uncorrelated():
    """The mean of n products of independent standard normals has standard error 1 / sqrt(n)."""
    n = 2**16
    like = torch.empty(2, n, dtype=torch.float64)
    path, prior = Seeded([3, 4]), Seeded([3, 4], Purpose.PRIOR)
    first, second, start = path(1.0, 0.5, like), path(0.5, 0.0, like), prior(1.0, 1.0, like)
    for a, b in [(first, second), (first, start), (second, start), (first, first.flip(0))]:
        assert ((a * b).mean(1).abs() < 4.5 / n**0.5).all()


def test_seeded_noise_is_standard_normal():
    """Moments of n draws: mean 0 (se 1/sqrt n), square 1 (se sqrt(2/n)), fourth 3 (sqrt(96/n))."""
    n = 2**16
    for dtype in (torch.float32, torch.float64):
        z = Seeded([11])(1.0, 0.0, torch.empty(1, n, dtype=dtype)).double()
        for power, mean, variance in [(1, 0, 1), (2, 1, 2), (4, 3, 96)]:
            assert abs((z**power).mean() - mean) < 4.5 * (variance / n) ** 0.5


@pytest.mark.parametrize("seeds", [[], [1], [1, 2, 3]])
def test_a_wrong_number_of_seeds_is_refused(seeds):
    with pytest.raises(ValueError, match=f"one seed per sample; got {len(seeds)} for a batch of 2"):
        Seeded(seeds)(1.0, 0.0, torch.empty(2, 3))


def test_no_seeds_for_no_samples():
    assert Seeded([])(1.0, 0.0, torch.empty(0, 3)).shape == (0, 3)


def test_a_negative_seed_is_refused_by_name():
    with pytest.raises(ValueError, match="each seed must be at least 0; got -1"):
        Seeded([0, -1])


@pytest.mark.parametrize("seed", [1.5, "1"])
def test_a_seed_that_is_no_integer_is_refused(seed):
    """int(1.5) would silently share the stream of seed 1."""
    with pytest.raises((TypeError, ValueError), match=r"^each seed must be"):
        PLAIN["Seeded"]([seed])


def test_every_part_of_an_address_selects_another_stream():
    addresses = [(0, Purpose.BATCH, 0, 0), (1, Purpose.BATCH, 0, 0), (0, Purpose.BATCH, 1, 0)]
    addresses += [(0, Purpose.BATCH, 0, 1), (2**40, Purpose.BATCH, 2**40, 2**40)]
    addresses += [(0, purpose, 0, 0) for purpose in Purpose if purpose != Purpose.BATCH]
    numbers = {tuple(stream(*address).integers(2**63, size=8)) for address in addresses}
    assert len(numbers) == len(addresses)
    assert numbers == {tuple(stream(*address).integers(2**63, size=8)) for address in addresses}


def test_generated_noise_is_reproduced_by_its_generator():
    like = torch.empty(4, 3, dtype=torch.float64)
    first, second = (Generated(torch.Generator().manual_seed(5)) for _ in range(2))
    for _ in range(2):
        assert torch.equal(first(1.0, 0.5, like), second(1.0, 0.5, like))
    assert first.entropy() == second.entropy()
    other = Generated(torch.Generator().manual_seed(6))
    assert not torch.equal(other(1.0, 0.5, like), first(1.0, 0.5, like))


def test_without_a_generator_every_source_is_fresh():
    like = torch.empty(4, 3)
    assert not torch.equal(Generated()(1.0, 0.5, like), Generated()(1.0, 0.5, like))


def test_noise_leaves_the_global_generators_alone():
    before, like = global_states(), torch.empty(2, 3)
    PLAIN["Seeded"]([1, 2])(1.0, 0.5, like)
    PLAIN["Generated"]()(1.0, 0.5, like)
    PLAIN["Generated"](torch.Generator().manual_seed(0)).entropy()
    assert global_states() == before


def test_global_seeding_does_not_reach_the_noise():
    like, results = torch.empty(2, 3), []
    for seed in (0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            results.append((Seeded([1, 2])(1.0, 0.5, like), Generated()(1.0, 0.5, like)))
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.equal(results[0][1], results[1][1])
