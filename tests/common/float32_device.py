"""A device without float64, such as Apple's MPS, played on the CPU.

Tensors on it claim the device "meta" and hold their values in `inner`. Within `Float32Device` a
float64 tensor there is an error, and so are a cast that comes with a move, which that device would
make itself, and an operation on tensors of both devices.
"""

import torch
from torch.utils import _pytree as tree
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")
MIXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::copy_"}  # real ones allow it


class There(torch.Tensor):
    """A tensor on the device."""

    @staticmethod
    def __new__(cls, inner):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=DEVICE, **layout
        )
        made.inner = inner
        return made

    def item(self):
        return self.inner.item()

    def tolist(self):
        return self.inner.tolist()

    def __float__(self):
        return float(self.inner)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        with Float32Device():
            return func(*args, **(kwargs or {}))


class Float32Device(TorchDispatchMode):
    """The device's rules, as a context."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func._schema.name
        given = [v for v in tree.tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
        theirs = [v for v in given if isinstance(v, There)]
        there = bool(theirs)
        if kwargs.get("device") is not None:
            there = torch.device(kwargs["device"]).type == DEVICE.type
            kwargs["device"] = "cpu"
            moved = [v for v in given if isinstance(v, There) != there]
            if moved and kwargs.get("dtype", moved[0].dtype) != moved[0].dtype:
                raise TypeError(
                    f"{name} casts {moved[0].dtype} to {kwargs['dtype']} as it moves it"
                )
        elif there and name not in MIXED:
            ours = [v for v in given if not isinstance(v, There) and v.ndim]
            if ours:
                raise RuntimeError(f"{name} mixes devices")
        args_in, kwargs_in = tree.tree_map(
            lambda v: v.inner if isinstance(v, There) else v, (args, kwargs)
        )
        out = func(*args_in, **kwargs_in)
        if not there or out is None:
            return out
        if func._schema.is_mutable:
            return kwargs.get("out", args[0])
        return tree.tree_map(
            lambda v: on_device(v, name) if isinstance(v, torch.Tensor) else v, out
        )


def on_device(value, name):
    if value.dtype == torch.float64:
        raise TypeError(f"{name} makes float64, which this device does not have")
    return There(value)
