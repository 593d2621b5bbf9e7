"""How many operators of torch a GPU would run for a piece of work, counted on the meta device: no
number is computed, and what would make the host wait for one fails there."""

from collections import Counter

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# no kernel: they only describe memory, or take it
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "alias", "lift_fresh"}


def is_view(func):
    results = func._schema.returns
    return any(r.alias_info is not None and not r.alias_info.is_write for r in results)


def on_cpu(tree):
    return any(isinstance(t, Tensor) and t.device.type == "cpu" for t in tree_leaves(tree))


class Launches(TorchDispatchMode):
    """``counts``: calls of each operator that starts a kernel on the device; ``from_host``: copies
    to it."""

    def __init__(self):
        super().__init__()
        self.counts, self.from_host = Counter(), 0

    @property
    def total(self):
        return sum(self.counts.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if not on_cpu(out) and on_cpu(args):
            self.from_host += 1
        elif not on_cpu(out) and not is_view(func) and name not in FREE:
            self.counts[name] += 1
        return out


def on_meta(model):
    """The same NativeModel without its numbers, as if it lay on a new GPU."""
    decoder = model.decoder
    for module in decoder.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                setattr(module, name, value.to("meta"))
    for layer in (*decoder.linears(), decoder.head):
        layer.product.weight = layer.product.weight.to("meta")
    return model
