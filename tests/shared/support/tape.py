"""A CUDA graph's semantics on a CPU: the operators of one run are recorded and replayed on the same
memory, while Python stands still. What would make the host wait for a GPU, or what a graph cannot
hold, fails while it is recorded."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "bincount",
    "is_nonzero", "item", "equal", "allclose", "lift_fresh", "_pin_memory",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class WouldWait(Exception):
    """The host would wait for the device, or copy to it, within the step."""


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def memory(tree):
    return {t.untyped_storage().data_ptr() for t in tensors(tree)}


def writes(func):
    return any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)


def refuse(func, args):
    name = func._schema.name.removeprefix("aten::")
    by_tensor = name == "repeat_interleave" and "Tensor" in func._schema.overload_name
    if name in WAITS or by_tensor:
        raise WouldWait(name)
    masks = [t for t in tensors(args[1]) if t.dtype == torch.bool] if name in INDEXING else []
    if masks:
        raise WouldWait(f"{name} by a mask: its number of rows is asked of the device")


class Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        refuse(func, args)
        out = func(*args, **(kwargs or {}))
        # Whether a result is a view is asked of its memory: reshape may copy or not.
        view = not writes(func) and bool(memory(out) & memory((args, kwargs)))
        if not view:
            self.calls.append((func, args, kwargs or {}, out))
        return out


class Tape:
    """``record`` of a GraphRunner: a StepGraph. ``made`` counts tapes, ``replays`` their replays."""

    made = replays = 0

    def __init__(self, step):
        Tape.made += 1
        with torch.inference_mode(), Recording() as recording:
            step()
        self.calls = recording.calls
        self.fresh = [t for func, _, _, out in self.calls if not writes(func) for t in tensors(out)]

    def replay(self):
        Tape.replays += 1
        with torch.inference_mode():
            for t in self.fresh:  # nothing may be read that this replay did not write
                if t.is_floating_point():
                    t.fill_(float("nan"))
                else:
                    t.fill_(True if t.dtype == torch.bool else -(2**30))
            for func, args, kwargs, out in self.calls:
                got = func(*args, **kwargs)
                if not writes(func):
                    for mine, new in zip(tensors(out), tensors(got), strict=True):
                        mine.copy_(new)
