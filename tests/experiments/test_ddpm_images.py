"""The CMU sheet's program: command lines, schedule, loss, strips, figures, refusals."""

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import ddpm_images as program
import pytest
import torch
from cmu_program import (
    FEW,
    MORE,
    TRAIN,
    VISUALIZE,
    T,
    parsed,
    rows,
    run,
    words,
)  # fmt: skip
from cmu_program import config_fixture as config_fixture
from cmu_program import place_fixture as place_fixture
from cmu_program import trained_fixture as trained_fixture
from common import samplers
from PIL import Image
from torch.testing import assert_close

import sde_diffusion as sd
from sde_diffusion import data, training

# ---- flags ------------------------------------------------------------------------------------


def test_the_sheets_command_lines_mean_what_the_sheet_says():
    sheet = {
        "time_steps": 50, "train_steps": 10000, "image_size": 32, "batch_size": 32,
        "learning_rate": 1e-3, "unet_dim": 16, "save_folder": Path("path_to_save_folder"),
        "data_path": Path("data/train"), "fid": False, "load_path": None, "visualize": False,
    }  # fmt: skip
    assert asdict(parsed(*words(TRAIN))).items() >= sheet.items()
    model = Path(__file__)
    drawn = {**sheet, "load_path": model, "visualize": True}
    line = words(VISUALIZE, path_to_saved_model=str(model))
    assert asdict(parsed(*line)).items() >= drawn.items()
    hyphens = [w.replace("_", "-") if w.startswith("--") else w for w in line]
    assert parsed(*hyphens) == parsed(*line)


@pytest.mark.parametrize(
    ("flags", "fid", "visualize"),
    [
        ("", False, False),
        ("--fid", True, False),
        ("--fid False", False, False),
        ("--fid True", True, False),
        ("--save_and_sample_every 1000 --train_steps 10000 --fid False", False, False),
        ("--fid --visualize", True, True),
        ("--visualize False --fid", True, False),
        ("--fid=True --visualize True", True, True),
    ],
)
def test_a_switch_may_be_bare_or_say_true_or_false(flags, fid, visualize):
    config = parsed(*flags.split())
    assert (config.fid, config.visualize) == (fid, visualize)


REFUSALS = {
    "--unet_dim 12": "--unet_dim must be a multiple of 8; got 12",
    "--unet_dim 0": "--unet_dim",
    "--fid maybe": "True, False or nothing",
    "--fid False False": "True, False or nothing",
    "--time_steps 1": "--time_steps must be at least 2",
    "--time_steps 0": "--time_steps",
    "--train_steps -1": "--train_steps",
    "--image_size 3": "--image_size",
    "--batch_size 0": "--batch_size",
    "--learning_rate 0": "--learning_rate",
    "--learning_rate nan": "--learning_rate",
    "--save_and_sample_every 0": "--save_and_sample_every",
    "--sampler ddpm++": "--sampler must be a known name; got ddpm++",
    "--steps 3": "--steps has no effect with --sampler clamped",
    "--sampler ode --steps 3": "--steps has no effect with --sampler ode",
    "--sampler ddim --steps 60": "--steps must be at most 50",
    "--features efficientnet": "--features has no effect without --fid",
    "--fid_samples 100": "--fid_samples has no effect without --fid",
    "--fid --features inception": "--inception_weights",
    "--fid": "needs 65 images in each half of the data; got 10",
    "--data_class lion": "there are: cat, dog, wild",
    "--data_path nowhere": "nowhere: no such folder",
    "--load_path model.pt": "experiments/import_weights.py",
    "--load_path nowhere": "--load_path must be a path that exists; got nowhere",
    "--load_path nowhere.safetensors": "must be a path that exists; got nowhere.safetensors",
    "--load_path model.safetensors --visualize --dtype bf16": "--dtype has no effect",
    "--sampler CLAMPED --steps 3": "--steps has no effect with --sampler clamped",
    "--load_path data": "--load_path data: neither a checkpoint nor",
    "--load_path model.safetensors --visualize --fid": "--fid has no effect",
    "--resume --overwrite": "not both",
    "--datapath x": "--datapath",
}


@pytest.mark.parametrize("flags", REFUSALS)
def test_a_bad_flag_is_one_line_and_exit_2_and_nothing_is_written(
    place, tmp_path, monkeypatch, flags
):
    monkeypatch.chdir(place)
    for name in ("model.pt", "model.safetensors"):
        (place / name).touch()
    done = run(*flags.split(), "--tracker", "none", "--save_folder", tmp_path / "out")
    assert done.code == 2
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1, done.err
    assert REFUSALS[flags] in done.err
    assert not (tmp_path / "out").exists()


def test_a_model_of_other_flags_is_refused_by_the_flag(trained, place, monkeypatch):
    monkeypatch.chdir(place)
    for change, message in (
        ({"6": "7"}, "--time_steps 6, not of --time_steps 7"),
        ({"8": "16"}, "--unet_dim 8; got 16"),
    ):
        few = {before: change.get(after, after) for before, after in FEW.items()}
        flags = words(VISUALIZE, **few, path_to_saved_model="path_to_save_folder")
        done = run(*flags)
        assert done.code == 2
        assert message in done.err


# ---- the sheet's mathematics ------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 6, 50, 300])
def test_the_schedule_is_the_sheets_equation_16(config, steps):
    """Both sides are cosines and logarithms in float64: a few rounding errors each."""
    t, s = torch.arange(steps + 1, dtype=torch.float64), 0.008
    f = torch.cos((t / steps + s) / (1 + s) * math.pi / 2) ** 2
    abar = f / f[0]
    alpha = (abar[1:] / abar[:-1]).clip(0.001, 1)
    chain = program.Config(time_steps=steps).process
    ddpm = sd.DDPM(program.sd.exact.Gaussian(chain))
    assert_close(ddpm.alphas, alpha, rtol=1e-11, atol=1e-13)


def test_the_first_loss_is_the_l1_norm_of_the_noise(trained, config):
    """A new U-Net's last layer is 0, so it says eps = 0, whatever it is asked at."""
    images = program.loaded_images(config)
    batch = training.draw(images, config.recipe, config.times, 0)
    assert set((batch.t * T).round(decimals=12).tolist()) <= set(range(1, T + 1))
    first = float(rows(trained.folder / "metrics.csv")[0]["loss"])
    assert first == pytest.approx(float(batch.eps.abs().mean()), rel=1e-6)


def test_a_run_is_trained_by_the_sheets_settings(trained):
    record = json.loads((trained.folder / "checkpoint-00000006" / "training.json").read_text())
    settings = record["settings"]
    assert settings["penalty"] == "L1()"
    assert settings["times"] == f"DiscreteTimes(num_steps={T})"
    assert settings["ema"] == "EMA(decay=0.995)"
    assert (settings["decay"], settings["warmup"], settings["weight_decay"]) == ("constant", 0, 0.0)
    rates = {float(row["learning_rate"]) for row in rows(trained.folder / "metrics.csv")}
    assert rates == {1e-3}
    denoiser = sd.Denoiser.load(trained.folder / "ddpm_images.safetensors")
    assert denoiser.parameterization == sd.Eps()
    assert denoiser.network.config["channels"][0] == 8


def test_strips_stand_at_the_sheets_percentages_and_the_second_starts_where_the_first_ends(config):
    config = program.replace(config, time_steps=50)
    torch.manual_seed(0)
    denoiser = program.new(config)
    x0 = torch.rand(3, 3, 8, 8) * 2 - 1
    forward = program.forward_strip(config, denoiser, x0)
    assert list(forward) == [0, 25, 50, 75, 99]
    assert torch.equal(forward[0], x0)
    abar = sd.DDPM(denoiser).alphas_bar
    eps = config.process.prior(x0.shape, seeds=range(3))
    for percent, i in ((25, 12), (50, 25), (75, 37), (99, 49)):
        typed = abar[i - 1].sqrt() * x0 + (1 - abar[i - 1]).sqrt() * eps
        assert_close(forward[percent], typed.float(), rtol=1e-5, atol=1e-6)
    backward = program.backward_strip(config, denoiser, forward[99])
    assert list(backward) == [99, 75, 50, 25, 0]
    assert torch.equal(backward[99], forward[99])
    # Algorithm 2 ends at the clamped x0 itself: its last variance is 0.
    assert backward[0].abs().max() <= 1
    assert backward[25].abs().max() > 1


def test_the_first_step_back_is_the_sheets_algorithm_2(config):
    """eps = 0 for a new network: its mean is typed here, and the rest must be the noise of i."""
    config = program.replace(config, time_steps=50)
    denoiser, i = program.new(config), 49
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ddpm = sd.DDPM(denoiser)
    chain = ddpm.p_chain(x, i, variance="posterior", clamp=1.0, seeds=list(range(64)))
    a, at, before = ddpm.alphas[i - 1], ddpm.alphas_bar[i - 1], ddpm.alphas_bar[i - 2]
    held = (x / at.sqrt()).clamp(-1, 1)
    mean = a.sqrt() * (1 - before) / (1 - at) * x + before.sqrt() * (1 - a) / (1 - at) * held
    z = (next(chain) - mean) / ((1 - before) / (1 - at) * (1 - a)).sqrt()
    n = z.numel()
    assert z.mean().abs() < 4.5 / n**0.5
    assert (z.var() - 1).abs() < 4.5 * (2 / n) ** 0.5


# ---- what is written --------------------------------------------------------------------------


def test_the_sheets_first_line_trains_and_writes_what_it_asks_for(trained):
    assert trained.code == 0, trained.err
    assert {path.name for path in trained.folder.iterdir()} == {
        "checkpoint-00000003", "checkpoint-00000006", "config.json", "ddpm_images.json",
        "ddpm_images.safetensors", "loss.png", "metrics.csv", "sample-00003.png",
        "sample-00006.png",
    }  # fmt: skip
    assert len(rows(trained.folder / "metrics.csv")) == 6
    assert "6 steps, loss " in trained.out
    with Image.open(trained.folder / "sample-00006.png") as grid:
        assert grid.size[0] > 3 * 8


def test_afhqs_cats_are_what_is_learnt_unless_another_class_is_asked_for(config):
    whole = data.image_folder(config.data_path, 8)
    assert whole.labels.unique().tolist() == [0, 1, 2]
    assert program.loaded_images(config).labels.unique().tolist() == [0]
    wild = program.replace(config, data_class="wild")
    assert program.loaded_images(wild).labels.unique().tolist() == [2]


def test_the_sheets_second_line_draws_and_trains_nothing(trained, place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    given = {"path_to_saved_model": str(trained.folder), "path_to_save_folder": str(tmp_path)}
    done = run(*words(VISUALIZE, **FEW, **given))
    assert done.code == 0, done.err
    drawn = {"forward.png", "backward.png", "config.json"}
    assert {path.name for path in tmp_path.iterdir()} == drawn


def test_strips_in_a_runs_own_folder_leave_its_record_alone(trained, tmp_path, config):
    shutil.copytree(trained.folder, tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_bytes()
    config = program.replace(config, save_folder=tmp_path / "run")
    program.visualize(config, program.new(config), program.loaded_images(config))
    assert (tmp_path / "run" / "backward.png").exists()
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_a_run_a_checkpoint_and_a_file_lead_to_the_same_weights(trained, tmp_path):
    run, name = trained.folder, "ddpm_images.safetensors"
    checkpoint = run / "checkpoint-00000006"
    places = (run, checkpoint, checkpoint / "denoiser.safetensors", run / name)
    assert len({program.weights_in(place).read_bytes() for place in places}) == 1
    unfinished = shutil.copytree(run, tmp_path / "run", ignore=lambda *_: {name})
    assert program.weights_in(unfinished).parent.name == "checkpoint-00000006"


def test_a_second_run_in_a_folder_is_refused_without_resume_or_overwrite(
    trained, place, monkeypatch
):
    monkeypatch.chdir(place)
    done = run(*words(TRAIN, **FEW), *MORE.split())
    assert done.code == 2
    assert "--save_folder path_to_save_folder holds a run: give --resume, --overwrite" in done.err


def test_training_may_start_from_weights(trained, place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    few = {**FEW, "10000": "1", "path_to_save_folder": str(tmp_path / "out")}
    done = run(*words(TRAIN, **few), *MORE.split(), "--load_path", trained.folder)
    assert done.code == 0, done.err
    again, first = (
        float(rows(folder / "metrics.csv")[0]["loss"])
        for folder in (tmp_path / "out", trained.folder)
    )
    assert again < first  # the same batch and noise, after six steps


LEFT = {
    "between two steps": (3, ("sample-00006.png", "checkpoint-00000006", "loss.png")),
    "between a checkpoint and its samples": (6, ("sample-00006.png", "loss.png")),
}


@pytest.mark.parametrize("when", LEFT)
def test_a_run_that_was_killed_ends_with_the_files_of_one_that_was_not(
    trained, place, tmp_path, monkeypatch, when
):
    """The folder as a kill leaves it: without what came later, and with a row cut short."""
    monkeypatch.chdir(place)
    step, gone = LEFT[when]
    out = tmp_path / "out"
    shutil.copytree(trained.folder, out)
    for name in (*gone, "ddpm_images.safetensors", "ddpm_images.json"):
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if step == 3:
        table = (out / "metrics.csv").read_bytes()
        (out / "metrics.csv").write_bytes(table[:-5])
    flags = words(TRAIN, **FEW, path_to_save_folder=str(out))
    done = run(*flags, *MORE.split(), "--resume")
    assert done.code == 0, done.err
    assert f"resuming at step {step}" in done.out
    same = ("metrics.csv", "sample-00003.png", "sample-00006.png", "loss.png",
            "ddpm_images.safetensors", "checkpoint-00000006/training.safetensors")  # fmt: skip
    assert rows(out / "metrics.csv") == rows(trained.folder / "metrics.csv")
    differ = [n for n in same if (out / n).read_bytes() != (trained.folder / n).read_bytes()]
    assert not differ


QUICK = ("clamped", "ancestral", "adams", "multistep")


@pytest.mark.parametrize(
    "word",
    [
        pytest.param(word, marks=[] if word in QUICK else pytest.mark.slow)
        for word in ("clamped", *samplers.SHORT)
    ],
)
def test_every_sampler_draws_by_its_name_and_goes_the_way_back(trained, config, word):
    config = program.replace(config, sampler=word)
    program.check(config)
    denoiser = sd.Denoiser.load(trained.folder / "ddpm_images.safetensors")
    made = program.drawn(config, denoiser, 3)
    assert made.shape == (3, 3, 8, 8)
    assert made.isfinite().all()
    assert torch.equal(program.drawn(config, denoiser, 2).isfinite(), made[:2].isfinite())
    states = program.backward_strip(config, denoiser, torch.randn(2, 3, 8, 8))
    assert list(states) == [99, 75, 50, 25, 0]
    assert torch.stack(list(states.values())).isfinite().all()


def test_sample_k_depends_on_the_seed_and_k_alone(trained, config):
    """Up to the rounding of a network in batches of other sizes, over T steps of gain below 30."""
    denoiser = sd.Denoiser.load(trained.folder / "ddpm_images.safetensors")
    many = program.drawn(config, denoiser, program.AT_ONCE + 2)
    few = program.drawn(config, denoiser, 2)
    assert_close(many[:2], few, rtol=0, atol=1e-4)
    other = program.drawn(program.replace(config, seed=1), denoiser, 2)
    assert (other - few).abs().mean() > 0.1
