"""The fault x check matrix: each fault that samplers have had is caught, and by which checks."""

import pytest
import torch
from benchmarks import faults

import sde_diffusion as sd

# Which checks must catch which fault, and why the others cannot. "-": a right sampler passes it.
#   posterior for beta: another sampler, equally right in the limit; only its law at finite N, or a
#       comparison step by step, tells the two apart.
#   noise in the last step: it vanishes with that step, so order and limit are untouched.
#   noise one level off: an error of second order in each step at even steps (orders and limit are
#       untouched), of first order where neighbouring steps differ.
#   stride off by one: a fixed error in every step, so nothing is approached.
#   step ratio inverted: each step gets the term of the one before: complete in the end, of any
#       order and on any grid; single steps between unequal ones are not.
#   time step rounded: a floor below what 256 steps of a second-order solver show, but no step can
#       be shorter than 1/1000: the local order is gone.
#   x0 clipped: no affine map, so there is no law; step by step it is plain where |x0| > 1.
EVERY = {"law", "identities"}
EXPECTED = {
    "g² doubled": EVERY | {"order", "local order", "limit"},
    "posterior variance for beta": EVERY,
    "beta for posterior variance": EVERY,
    "noise in the last step": EVERY,
    "noise one level off": EVERY | {"local order"},
    "stride off by one": EVERY | {"order", "local order", "limit"},
    "drift not corrected for noise": EVERY | {"order", "local order", "limit"},
    "step ratio inverted": EVERY | {"local order"},
    "time step rounded": EVERY | {"local order"},
    "x0 clipped, eps kept": {"refused", "identities"},
}
BY_NAME = {fault.name: fault for fault in faults.FAULTS}


def test_every_fault_has_its_row():
    assert BY_NAME.keys() == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_a_fault_is_caught_by_just_these_checks(name):
    found = faults.caught(BY_NAME[name])
    assert {check for check, caught in found.items() if caught} == EXPECTED[name]


RIGHT = {(repr(f.right), repr(f.process)): f for f in faults.FAULTS}  # some faults share one


@pytest.mark.parametrize("fault", RIGHT.values(), ids=[right for right, _ in RIGHT])
def test_the_right_sampler_beside_it_passes_every_check(fault):
    """So what is caught is the fault. A right sampler has the law of itself: it is left out."""
    right = faults.Fault(fault.name, fault.right, fault.right, fault.process)
    assert not any(faults.caught(right).values())


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_the_same_through_an_adapter(name):
    """As somebody else's f(eps_fn, x), which draws by torch."""
    found = faults.caught(BY_NAME[name], faults.through_function)
    assert {check for check, caught in found.items() if caught} == EXPECTED[name]


@pytest.mark.parametrize("name", ["step ratio inverted", "x0 clipped, eps kept"])
def test_the_hardest_two_through_an_adapter(name):
    fault = BY_NAME[name]
    data = sd.exact.Gaussian(fault.process, torch.tensor([0.7], dtype=torch.float64), 0.25)

    def family(steps_or_times):
        return faults.through_function(fault.wrong, steps_or_times)

    if "refused" in EXPECTED[name]:
        with pytest.raises(sd.verify.NotAffine, match="not affine on Gaussian, first in call"):
            sd.verify.law(family(20), data)
    else:
        short = sd.verify.local_order(family, data, spans=(0.01, 0.005, 0.0025), declared=2)
        assert not short.holds
        assert short.of_one_step[1.0] > 1.8 > 1.2 > short.of_one_step[2.0]
    same = sd.verify.identities(family(20), fault.right, data, steps=20)
    assert not same.holds


def test_the_matrix_is_a_table():
    found = {name: dict.fromkeys(faults.CHECKS, name.startswith("g")) for name in EXPECTED}
    lines = faults.markdown(found).splitlines()
    assert len(lines) == 2 + len(EXPECTED)
    assert [line.count("**caught**") for line in lines[2:4]] == [len(faults.CHECKS), 0]
    assert {line.count("|") for line in lines} == {len(faults.CHECKS) + 2}
