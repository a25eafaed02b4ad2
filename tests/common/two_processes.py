"""What each of two processes does in test_processes_of_training: run by it, not collected.

Argument: a folder. The main process leaves what it found there.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training_runs import IMAGES, POINTS, RECIPE, TIMES, Learned, fresh, mlp_dropout, unet_dropout

from sde_diffusion import training

CASES = {"mlp": (mlp_dropout, POINTS), "unet": (unet_dropout, IMAGES)}
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Sharded:
    """Accelerate's engine, but for FSDP, which accelerate offers on GPUs alone."""

    is_fsdp2 = True

    def __init__(self, engine):
        self.engine = engine

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def prepare(self, network, optimizer):
        fully_shard(network, mesh=init_device_mesh("cpu", (2,)))
        group = optimizer.param_groups[0]
        settings = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "fused")}
        return network, type(optimizer)(network.parameters(), **settings)

    def no_sync(self, model):
        return nullcontext()

    def clip_grad_norm_(self, parameters, max_norm):
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)


def content(state):
    """Weights, average and gradients, whole; a call of all processes where they are sharded."""
    named = dict(state.denoiser.named_parameters())
    parts = {f"weight.{name}": value for name, value in named.items()}
    parts |= {f"grad.{name}": value.grad for name, value in named.items()}
    parts |= {f"mean.{name}": value for name, value in state.average.items()}
    return {
        name: training.engine.full(value.detach()).clone(memory_format=torch.contiguous_format)
        for name, value in parts.items()
    }


def main(folder):
    engine = training.launched("cpu")
    assert engine.num_processes == 2
    found = {}
    for case, (network, data) in CASES.items():
        for dtype in DTYPES:
            for parts in (1, 2):
                state = fresh(network, dtype=DTYPES[dtype], engine=engine)
                losses = [metrics.loss for metrics, _ in zip(
                    training.train(state, data, parts), range(3), strict=False)]  # fmt: skip
                found |= {f"{case}.{dtype}.{parts}.{k}": v for k, v in content(state).items()}
                found[f"{case}.{dtype}.{parts}.losses"] = torch.tensor(losses).double()
    training.save(state, folder / "ddp")

    state = fresh(mlp_dropout, dtype=torch.float64, engine=engine, process=Learned())
    for _ in zip(training.train(state, POINTS, 2), range(3), strict=False):
        pass
    found |= {f"learned.{k}": v for k, v in content(state).items()}
    checkpoint = training.save(state, folder / "learned")
    again = fresh(mlp_dropout, dtype=torch.float64, engine=engine, process=Learned(), seed=5)
    training.restore(again, checkpoint)
    next(training.train(again, POINTS))
    found |= {f"relearned.{k}": v for k, v in content(again).items()}

    for case, (network, data) in CASES.items():
        state = fresh(network, dtype=torch.float64, engine=Sharded(engine))
        shards = [tuple(p.to_local().shape) for p in state.denoiser.network.parameters()]
        assert shards != [tuple(p.shape) for p in state.denoiser.network.parameters()]
        for _ in zip(training.train(state, data), range(3), strict=False):
            pass
        found |= {f"fsdp.{case}.{k}": v for k, v in content(state).items()}
        checkpoint = training.save(state, folder / f"fsdp-{case}")
        again = fresh(network, dtype=torch.float64, engine=Sharded(engine), seed=5)
        training.restore(again, checkpoint)
        next(training.train(again, data))
        found |= {f"again.{case}.{k}": v for k, v in content(again).items()}

    mine = next(training.batches.stretches(RECIPE, 2, engine.process_index, 1))
    drawn = training.draw(POINTS, RECIPE, TIMES, 3, mine)
    save_file({"eps": drawn.eps, "x0": drawn.x0, "t": drawn.t},
              folder / f"drawn{engine.process_index}.safetensors")  # fmt: skip
    if engine.is_main_process:
        save_file(found, folder / "found.safetensors")
    engine.wait_for_everyone()
    engine.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
