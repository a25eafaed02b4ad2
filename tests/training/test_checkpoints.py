"""A checkpoint is whole or absent, and a run that goes on from it is the uninterrupted one."""

import json
import os
from dataclasses import replace

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

from sde_diffusion.data.datasets import Points, fingerprint
from sde_diffusion.files import storage
from sde_diffusion.files.storage import BadFile
from sde_diffusion.losses.times import NormalLogSNR
from sde_diffusion.models.denoiser import Denoiser
from sde_diffusion.models.parameterizations import V
from sde_diffusion.networks import MLP
from sde_diffusion.processes import VP, RectifiedFlow
from sde_diffusion.training import (
    OtherSettings,
    Recipe,
    TrainState,
    draw,
    newest_checkpoint,
    restore,
    resume,
    save,
)


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
    other = {**vars(RECIPE), "learning_rate": 2e-3, "seed": 7}
    with pytest.raises(OtherSettings) as caught:
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


@pytest.mark.parametrize("bad", ["skip", "raise"])
def test_skipped_steps_are_part_of_the_state(tmp_path, bad):
    state = ran(2, bad="skip")
    batch = draw(POINTS, RECIPE, TIMES, 2)
    state.advance(batch._replace(eps=torch.full_like(batch.eps, torch.nan)))
    resumed = fresh(seed=99, bad=bad)  # what to do with the next one may change
    restore(resumed, save(state, tmp_path))
    assert resumed.skipped == 1
    for one in (state, resumed):
        one.advance(draw(POINTS, RECIPE, TIMES, 3))
    assert_same_bits(content(state), content(resumed))


def test_resume_passes_over_a_damaged_checkpoint_and_says_so(tmp_path):
    older, newest = save(ran(2), tmp_path), save(ran(3), tmp_path)
    assert resume(fresh(seed=99), tmp_path) == (newest, [])
    truncate(newest / "training.safetensors")
    state = fresh(seed=99)
    found, damaged = resume(state, tmp_path)
    assert found == older
    assert len(damaged) == 1
    assert str(newest) in damaged[0]
    assert_same_bits(content(state), content(ran(2)))
    flip(older / "denoiser.json")
    before = content(state)
    with pytest.raises(BadFile) as caught:
        resume(state, tmp_path)
    assert str(newest) in str(caught.value)
    assert str(older) in str(caught.value)
    assert_same_bits(content(state), before)


def test_resume_does_not_pass_over_another_run(tmp_path):
    """The checkpoint before it would be of the same other run, or worse, of a third."""
    save(ran(2), tmp_path)
    other = fresh(recipe=Recipe(**{**vars(RECIPE), "seed": 1}))
    with pytest.raises(OtherSettings, match="seed 0 -> 1"):
        resume(other, tmp_path)


@pytest.mark.parametrize("limit", [0, 300, 1000, 5000])
def test_a_full_disk_leaves_the_checkpoint_before_and_nothing_else(tmp_path, limit):
    """RLIMIT_FSIZE lets no file grow beyond the limit: the write is refused within the file."""
    resource = pytest.importorskip("resource")  # not on Windows
    older = save(ran(2), tmp_path)
    state = ran(3)
    before = content(state)
    sizes = [path.stat().st_size for path in older.iterdir()]
    assert max(sizes) > 5000
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # Python ignores SIGXFSZ
    try:
        with pytest.raises(OSError, match=rf"File too large: '{tmp_path}/.*\.safetensors'"):
            save(state, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert [path.name for path in tmp_path.iterdir()] == [older.name]
    assert_same_bits(content(state), before)
    restore(fresh(seed=99), older)
    assert newest_checkpoint(tmp_path) == older
    assert save(state, tmp_path) == newest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        ({"step": -1}, "record of a training run"),
        ({"step": 1.0}, "record of a training run"),
        ({"step": True}, "record of a training run"),
        ({"skipped": 3}, "record of a training run"),
        ({"settings": None}, "record of a training run"),
        ({"settings": {}}, "seed None -> 0"),
        ({"changes": {}}, "record of a training run"),
        ({"step": 1}, "of step 2, not the one that training.json of step 1 names"),
        ({"denoiser": "0" * 64}, "not the one that training.json of step 2 names"),
    ],
)
def test_a_record_that_makes_no_sense_is_refused_though_its_hash_is_right(tmp_path, edit, told):
    path = save(ran(2), tmp_path) / "training.safetensors"
    tensors, record = storage.read(path)
    kept = {k: v for k, v in record.items() if k not in storage.OURS}
    storage.write(path, tensors, {**kept, **edit})
    state = fresh()
    before = content(state)
    with pytest.raises(BadFile) as caught:
        restore(state, path.parent)
    assert told in str(caught.value)
    assert_same_bits(content(state), before)


@pytest.mark.parametrize("name", ["network.layers.0.weight", "optimizer.0.exp_avg"])
@pytest.mark.parametrize("how", ["shape", "absent", "extra"])
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path, name, how):
    path = save(ran(2), tmp_path) / "training.safetensors"
    tensors, record = storage.read(path)
    if how == "shape":
        tensors[name] = tensors[name].flatten()
    elif how == "absent":
        del tensors[name]
    else:
        tensors[name := name + "_2"] = torch.zeros(1)
    storage.write(path, tensors, {k: v for k, v in record.items() if k not in storage.OURS})
    state = fresh()
    before = content(state)
    with pytest.raises(BadFile, match=f"{path}: of another network: {name} is"):
        restore(state, path.parent)
    assert_same_bits(content(state), before)


def test_folders_may_be_given_as_text(tmp_path):
    state = ran(2)
    saved = save(state, str(tmp_path))
    assert newest_checkpoint(str(tmp_path)) == saved
    restore(fresh(seed=9), str(saved))
    assert resume(fresh(seed=9), str(tmp_path)) == (saved, [])


@pytest.mark.parametrize("clip", [1.0, float("inf")])
def test_settings_that_json_does_not_know_come_back(tmp_path, clip):
    recipe = Recipe(**{**vars(RECIPE), "clip": clip})
    saved = save(ran(2, recipe=recipe), tmp_path)
    restore(fresh(recipe=recipe, seed=9), saved)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    older, state = save(ran(2), tmp_path), ran(3)
    torch.nn.init.constant_(next(state.denoiser.parameters()), torch.inf)
    with pytest.raises(ValueError, match=r"layers\.0\.weight"):
        save(state, tmp_path)
    assert list(tmp_path.iterdir()) == [older]


def test_damaged_folders_of_later_steps_push_nothing_out(tmp_path):
    for name in ("checkpoint-99999998", "checkpoint-99999999"):
        (tmp_path / name).mkdir()
    (tmp_path / ".checkpoint-note").write_text("mine")
    saved = [save(ran(steps), tmp_path) for steps in (1, 2, 3)]
    assert [path.is_dir() for path in saved] == [False, True, True]
    state = fresh(seed=9)
    found, damaged = resume(state, tmp_path)
    assert found == saved[2]
    assert len(damaged) == 2
    assert (tmp_path / ".checkpoint-note").exists()


def test_other_data_are_another_run(tmp_path):
    first, second = (fingerprint(Points(POINTS.x + shift)) for shift in (0, 1))
    assert first != second
    assert first == fingerprint(POINTS)
    assert fingerprint(Points(POINTS.x[:40])) != first
    saved = save(fresh(facts={"data": first}), tmp_path)
    restore(fresh(facts={"data": first}, seed=9), saved)
    with pytest.raises(OtherSettings, match="data 50 of"):
        restore(fresh(facts={"data": second}), saved)


def test_a_function_is_the_same_law_in_another_process(tmp_path):
    state = TrainState(Denoiser(mlp(), VP(), V()), RECIPE, weight=lambda level: level.alpha)
    assert " at 0x" not in str(state.settings)
    assert "test_a_function_is_the_same_law" in state.settings["weight"]


@pytest.mark.parametrize("wrong", [lambda p: save(None, p), lambda p: restore(None, p),
                                   lambda p: save(fresh(), p, step=3)])  # fmt: skip
def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path, wrong):
    with pytest.raises((TypeError, ValueError), match=r"^(state|step)"):
        wrong(tmp_path / "new")
    assert not any(tmp_path.iterdir())


def test_a_file_is_no_folder_of_checkpoints(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file: not a folder"):
        resume(fresh(), tmp_path / "file")


# ---- the two halves ----------------------------------------------------------------------------


@pytest.mark.parametrize("half", ["denoiser", "training"])
def test_files_of_another_checkpoint_are_refused_by_name(tmp_path, half):
    """Each file is whole and has the right hash; only together they are of no run."""
    older, newest = save(ran(2), tmp_path), save(ran(4), tmp_path)
    for suffix in (".safetensors", ".json"):
        (newest / (half + suffix)).write_bytes((older / (half + suffix)).read_bytes())
    state = fresh(seed=9)
    before = content(state)
    with pytest.raises(BadFile, match=rf"{newest}/denoiser.safetensors: of step [24], not the one"):
        restore(state, newest)
    assert_same_bits(content(state), before)
    found, damaged = resume(state, tmp_path)
    assert found == older
    assert len(damaged) == 1


def test_files_of_another_run_at_the_same_step_are_refused(tmp_path):
    """The hash differs where the step does not."""
    ours, theirs = save(ran(2), tmp_path / "a"), save(ran(2, seed=5), tmp_path / "b")
    for name in ("denoiser.safetensors", "denoiser.json"):
        (ours / name).write_bytes((theirs / name).read_bytes())
    with pytest.raises(BadFile, match=r"of step 2, not the one that training\.json of"):
        restore(fresh(), ours)


def test_a_checkpoint_in_the_folder_of_another_step_is_refused(tmp_path):
    save(ran(2), tmp_path).rename(tmp_path / "checkpoint-00000007")
    with pytest.raises(BadFile, match="checkpoint-00000007: its files are of step 2"):
        resume(fresh(), tmp_path)
    (tmp_path / "checkpoint-00000007").rename(tmp_path / "best")  # a name of one's own is free
    restore(fresh(), tmp_path / "best")


@pytest.mark.parametrize(
    ("optimizer", "slot"),
    [
        (None, "exp_avg_sq"),
        (None, "step"),
        (lambda p: torch.optim.Adam(p, amsgrad=True), "max_exp_avg_sq"),
        (torch.optim.Adagrad, "sum"),
        (torch.optim.RMSprop, "square_avg"),
        (torch.optim.Adadelta, "acc_delta"),
        (torch.optim.Adafactor, "row_var"),
        (torch.optim.Adamax, "exp_inf"),
    ],
)
def test_a_negative_square_is_refused_though_its_hash_is_right(tmp_path, optimizer, slot):
    path = save(ran(2, optimizer=optimizer), tmp_path) / "training.safetensors"
    tensors, record = storage.read(path)
    record = {k: v for k, v in record.items() if k not in storage.OURS}
    name = f"optimizer.0.{slot}"
    tensors[name] = torch.full_like(tensors[name], -1e-3)
    storage.write(path, tensors, record)
    state = fresh(optimizer=optimizer)
    before = content(state)
    with pytest.raises(BadFile, match=f"{path}: damaged: {name} is negative"):
        restore(state, path.parent)
    assert_same_bits(content(state), before)


def test_a_checkpoint_without_the_hash_of_its_other_half_is_read(tmp_path):
    """Checkpoints of older versions do not name it."""
    path = save(ran(2), tmp_path) / "training.safetensors"
    tensors, record = storage.read(path)
    older = {k: v for k, v in record.items() if k not in (*storage.OURS, "denoiser", "changes")}
    storage.write(path, tensors, older)
    resumed = fresh(seed=9)
    restore(resumed, path.parent)
    assert_same_bits(content(resumed), content(ran(2)))


# ---- changes on purpose ------------------------------------------------------------------------


def advance(state, steps):
    for _ in range(steps):
        state.advance(draw(POINTS, state.recipe, TIMES, state.step))


def test_a_finished_run_is_extended_by_a_permission_that_is_recorded(tmp_path):
    """From there on it is the run whose recipe was replaced in memory, bit for bit."""
    longer = replace(RECIPE, steps=20)
    finished = ran(12)
    save(finished, tmp_path)
    state = fresh(recipe=longer, seed=9)
    with pytest.raises(OtherSettings, match=r"steps 12 -> 20; .* changed={'steps'}"):
        resume(state, tmp_path)
    checkpoint, _ = resume(state, tmp_path, changed={"steps"})
    assert checkpoint.name == "checkpoint-00000012"
    advance(state, 3)
    finished.recipe = longer
    advance(finished, 3)
    assert_same_bits(content(state), content(finished))
    extended, change = save(state, tmp_path), {"step": 12, "steps": [12, 20]}
    for name in ("training", "denoiser"):
        assert json.loads((extended / f"{name}.json").read_text())["changes"] == [change]
    again = fresh(recipe=longer)
    resume(again, tmp_path)  # needs no permission: it is the same run now
    assert again.changes == [change]
    resume(again, tmp_path, changed=["steps"])
    assert again.changes == [change]


def test_the_rate_is_lowered_by_a_permission_for_nothing_else(tmp_path):
    save(ran(3), tmp_path)
    lower = replace(RECIPE, learning_rate=1e-4)
    state = fresh(recipe=lower)
    match = r"rate 0\.001 -> 0\.0001; .*={'learning_rate', 'steps'}"
    with pytest.raises(OtherSettings, match=match):
        resume(state, tmp_path, changed={"steps"})
    resume(state, tmp_path, changed={"learning_rate"})  # the line of the optimizer repeats it
    assert state.changes[0]["learning_rate"] == [1e-3, 1e-4]
    advance(state, 1)
    assert state.optimizer.param_groups[0]["lr"] == lower.rate(3)
    for other in (replace(lower, weight_decay=0.1), replace(lower, seed=3)):
        with pytest.raises(OtherSettings, match=r"(weight_decay|seed) "):
            resume(fresh(recipe=other), tmp_path, changed={"learning_rate"})
    with pytest.raises(OtherSettings, match=r"optimizer AdamW.* -> SGD"):
        resume(fresh(recipe=lower, optimizer=torch.optim.SGD), tmp_path, changed={"learning_rate"})
    both = replace(lower, weight_decay=0.1)
    resume(fresh(recipe=both), tmp_path, changed={"learning_rate", "weight_decay"})


def test_a_permission_names_settings_and_no_run_is_cut_below_its_steps(tmp_path):
    save(ran(5), tmp_path)
    for wrong in ({"step"}, "steps", ["learning rate"]):
        with pytest.raises(ValueError, match="each entry of changed must be one of"):
            resume(fresh(), tmp_path, changed=wrong)
    shorter = fresh(recipe=replace(RECIPE, steps=4))
    with pytest.raises(OtherSettings, match="steps must be at least its 5; got 4"):
        resume(shorter, tmp_path, changed={"steps"})


def test_a_folder_without_a_checkpoint_is_no_new_run(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match=f"{folder}: no checkpoint to resume from"):
            resume(fresh(), folder)
    assert not (tmp_path / "absent").exists()


# ---- folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["checkpoint-00000001", "checkpoint-00000003", ".checkpoint-a.part"]
)
@pytest.mark.parametrize("kind", ["folder", "file", "nowhere"])
def test_a_symbolic_link_in_the_place_of_a_checkpoint_goes_and_its_target_stays(
    tmp_path, name, kind
):
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    if kind == "folder":
        other.mkdir()
    elif kind == "file":
        other.write_text("mine")
    (run / name).symlink_to(other)
    saved = [save(ran(steps), run) for steps in (2, 3)]
    assert all(path.is_dir() and not path.is_symlink() for path in saved)
    resumed = fresh(seed=9)
    assert resume(resumed, run) == (saved[1], [])
    assert_same_bits(content(resumed), content(ran(3)))
    assert other.exists() == (kind != "nowhere")


def test_where_folders_cannot_be_opened_checkpoints_are_written_all_the_same(tmp_path, monkeypatch):
    """Windows has no O_DIRECTORY, and refuses to open a folder."""
    monkeypatch.delattr(os, "O_DIRECTORY")
    usual = os.open

    def windows(path, *rest, **more):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", path)
        return usual(path, *rest, **more)

    monkeypatch.setattr(os, "open", windows)
    with monkeypatch.context() as patch:
        # Deleting a folder by descriptors is for systems that can open folders.
        patch.setattr("shutil._use_fd_functions", False)
        saved = save(ran(2), tmp_path)
    restore(fresh(seed=9), saved)


def test_a_short_run_is_extended_by_its_steps_alone(tmp_path):
    """The warm-up, a tenth of the steps by default, follows them."""
    short = replace(RECIPE, steps=20, warmup=None)
    state = fresh(recipe=short)
    advance(state, 2)
    save(state, tmp_path)
    longer = fresh(recipe=replace(RECIPE, steps=40, warmup=None))
    resume(longer, tmp_path, changed={"steps"})
    assert longer.step == 2
