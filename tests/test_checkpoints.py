"""A checkpoint is whole or absent, and a run that goes on from it is the uninterrupted one."""

from dataclasses import asdict

import pytest
import torch
from training_runs import (
    POINTS,
    RECIPE,
    RUNS,
    TIMES,
    assert_same_bits,
    content,
    fresh,
    mlp,
    ran,
    unet,
)

from sde_diffusion.denoiser import Denoiser
from sde_diffusion.networks import MLP
from sde_diffusion.prediction import V
from sde_diffusion.processes import VP, RectifiedFlow
from sde_diffusion.storage import BadFile
from sde_diffusion.times import NormalLogSNR
from sde_diffusion.training import Recipe, TrainState, draw, newest_checkpoint, restore, save


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("cut", [0, 5])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, run, cut):
    network, data = RUNS[run]
    stopped = ran(cut, network=network, data=data)
    checkpoint = save(stopped, tmp_path)
    resumed = fresh(network, seed=99)
    restore(resumed, checkpoint)
    assert_same_bits(content(resumed), content(stopped))
    for _ in range(4):
        resumed.advance(draw(data, RECIPE, TIMES, resumed.step))
    assert_same_bits(content(resumed), content(ran(cut + 4, network=network, data=data)))


def test_saving_changes_nothing(tmp_path):
    state = ran(3)
    before = content(state)
    save(state, tmp_path)
    assert_same_bits(content(state), before)
    state.advance(draw(POINTS, RECIPE, TIMES, 3))
    assert_same_bits(content(state), content(ran(4)))


def test_a_checkpoint_holds_the_averaged_denoiser(tmp_path):
    state = ran(5)
    checkpoint = save(state, tmp_path, command="as typed")
    loaded = Denoiser.load(checkpoint / "denoiser.safetensors")
    assert_same_bits(loaded.network.state_dict(), state.averaged.network.state_dict())
    assert loaded.process == VP()
    different = zip(loaded.network.parameters(), state.denoiser.network.parameters(), strict=True)
    assert all(not torch.equal(a, b) for a, b in different)
    assert "as typed" in (checkpoint / "denoiser.json").read_text()


def test_only_the_last_two_checkpoints_are_kept(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "absent") is None
    state = fresh()
    for _ in range(4):
        state.advance(draw(POINTS, RECIPE, TIMES, state.step))
        assert newest_checkpoint(tmp_path) != (saved := save(state, tmp_path))
        assert newest_checkpoint(tmp_path) == saved
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint-00000003", "checkpoint-00000004"]


def test_other_files_beside_the_checkpoints_are_left_alone(tmp_path):
    for name in ("checkpoint-best", "samples", "checkpoint-00000001.old"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-notes.txt").write_text("mine")
    assert newest_checkpoint(tmp_path) is None
    for steps in (1, 2, 3):
        save(ran(steps), tmp_path)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-00000003"
    assert (tmp_path / "checkpoint-best").is_dir()
    assert len(list(tmp_path.iterdir())) == 6


def test_what_a_broken_save_left_is_ignored_and_cleared(tmp_path):
    whole = save(ran(1), tmp_path)
    leftover = tmp_path / ".checkpoint-00000002.part"
    leftover.mkdir()
    (leftover / "denoiser.safetensors.part").write_bytes(b"half")
    assert newest_checkpoint(tmp_path) == whole
    saved = save(ran(2), tmp_path)
    assert newest_checkpoint(tmp_path) == saved
    assert not leftover.exists()
    assert len(list(saved.iterdir())) == 4


def test_the_same_step_can_be_saved_again(tmp_path):
    state = ran(2)
    assert save(state, tmp_path) == save(state, tmp_path)
    resumed = fresh(seed=99)
    restore(resumed, newest_checkpoint(tmp_path))
    assert_same_bits(content(resumed), content(state))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [flip, truncate, remove])
@pytest.mark.parametrize("file", ["training", "denoiser"])
@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_a_damaged_checkpoint_is_refused_by_name_and_changes_nothing(
    tmp_path, damage, file, suffix
):
    older, newest = save(ran(2), tmp_path), save(ran(3), tmp_path)
    damage(newest / (file + suffix))
    state = fresh(seed=99)
    before = content(state)
    with pytest.raises(BadFile) as caught:
        restore(state, newest_checkpoint(tmp_path))
    assert str(newest / file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert_same_bits(content(state), before)
    restore(state, older)
    assert_same_bits(content(state), content(ran(2)))


def test_a_checkpoint_of_another_recipe_is_refused_by_its_differences(tmp_path):
    checkpoint = save(ran(2), tmp_path)
    other = {**asdict(RECIPE), "learning_rate": 2e-3, "seed": 7}
    with pytest.raises(BadFile) as caught:
        restore(fresh(recipe=Recipe(**other)), checkpoint)
    message = str(caught.value)
    assert "learning_rate 0.001 -> 0.002" in message
    assert "seed 0 -> 7" in message
    assert "batch_size" not in message
    assert str(checkpoint / "training.safetensors") in message


@pytest.mark.parametrize("other", [lambda: MLP(width=8, depth=2), lambda: MLP(width=16), unet])
def test_a_checkpoint_of_another_network_is_refused(tmp_path, other):
    checkpoint = save(ran(2), tmp_path)
    with pytest.raises(BadFile, match=str(checkpoint)) as caught:
        restore(fresh(other), checkpoint)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_process_is_refused(tmp_path):
    """The weights would fit, and go on training for another problem."""
    checkpoint = save(ran(2), tmp_path)
    with pytest.raises(BadFile, match=r"process.*VP.*RectifiedFlow"):
        restore(fresh(process=RectifiedFlow()), checkpoint)


def test_an_absent_checkpoint_is_refused_by_name(tmp_path):
    with pytest.raises(BadFile, match="checkpoint-00000007"):
        restore(fresh(), tmp_path / "checkpoint-00000007")


def test_a_resume_with_another_law_of_times_is_refused_by_name(tmp_path):
    checkpoint = save(fresh(), tmp_path)
    other = TrainState(Denoiser(mlp(), VP(), V()), RECIPE, NormalLogSNR(VP()))
    with pytest.raises(BadFile, match=r"times UniformTimes.* -> NormalLogSNR"):
        restore(other, checkpoint)
