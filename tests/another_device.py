"""A device that is no CPU, on any machine: its tensors hold their numbers on the CPU. Where two devices meet in an
operation, that is an error, as on a GPU; test_gpu.py shows the rest, where there is one."""

import contextlib
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

AWAY = torch.device("meta")  # of those that autograd knows everywhere the one that has no numbers of its own
COPIES = "aten::_to_copy", "aten::copy_"


class Away(torch.Tensor):
    """A tensor of the device AWAY; `held`: the CPU's that has its numbers"""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(), dtype=held.dtype,
                                                   storage_offset=held.storage_offset(), device=AWAY)

    def __init__(self, held):
        self.held = held

    def __reduce_ex__(self, protocol):
        return self.held.__reduce_ex__(protocol)

    def tolist(self):
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return called(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """Within, what makes a tensor on AWAY makes an Away."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return called(func, args, kwargs or {})


def called(func, args, kwargs):
    """func of tensors that are all AWAY or all here, but for single numbers, which torch takes from a CPU too"""
    name, leaves = func._schema.name, tree_leaves((args, kwargs))
    away = [x for x in leaves if isinstance(x, Away)]
    here = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, Away) and x.dim()]
    if away and here and name not in COPIES:
        raise RuntimeError(f"{name}: two devices, {[tuple(x.shape) for x in here]} on the CPU")
    device = kwargs.get("device")
    to = device == AWAY if device is not None else isinstance(args[0], Away) if name == "aten::copy_" else bool(away)
    if device == AWAY:
        kwargs = kwargs | {"device": torch.device("cpu")}
    args, kwargs = tree_map_only(Away, lambda x: x.held, (args, kwargs))
    with _disable_current_modes():
        out = func(*args, **kwargs)
        if name == "aten::_to_copy" and out is args[0]:
            out = out.clone()
    changed = {id(x.held): x for x in away}  # in place
    return tree_map_only(torch.Tensor, lambda x: changed[id(x)] if id(x) in changed else Away(x) if to else x, out)


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu" if device == AWAY else device)


@contextlib.contextmanager
def another_device():
    """Within, AWAY is a device that a model can be on."""
    autocast, swap = torch.is_autocast_enabled, torch.__future__.set_swap_module_params_on_conversion
    with (contextlib.ExitStack() as after, patch.object(torch, "Generator", Generator),
          patch.object(torch, "is_autocast_enabled", lambda device: device != AWAY.type and autocast(device)),
          patch.object(torch, "inference_mode", lambda mode=True: torch.set_grad_enabled(not mode)), Elsewhere()):
        after.callback(swap, torch.__future__.get_swap_module_params_on_conversion())
        swap(True)  # or tied weights would be two when a model moves
        yield AWAY
