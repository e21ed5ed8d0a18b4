"""A pretended GPU: tensors that say they are on ``cuda:0`` and whose values lie on the CPU, on a machine without one.

Inside :class:`Pretended` the device "cuda" exists. What a GPU refuses is refused: an operation on tensors of both
devices (a number without axes from the CPU may join in, as with CUDA) and ``numpy``. What makes the host wait for the
device is counted: ``reads`` are values or sizes that it needs back (``item``, ``bool``, ``cpu``, boolean indices),
``uploads`` are copies to the device. Stricter than CUDA: indices must be on the device of what they index.

Kernels are those of the CPU. Not covered: kernels that exist on one device only, half precision, streams, memory.
"""

from collections import Counter

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA, STAND_IN = torch.device("cuda", 0), torch.device("meta")  # what Python sees, and what torch's own code sees
# Whose result has a size that depends on values, or that look at an error code on the host.
WAITS = {"nonzero", "masked_select", "unique_consecutive", "_unique2", "bincount", "equal", "repeat_interleave"}
WAITS |= {"_linalg_eigh", "_linalg_svd", "linalg_eig", "linalg_inv_ex"}
COPIES = {"_to_copy", "copy_"}
LAZY = {"_conj": torch.ops.aten._conj_physical.default, "_neg_view": torch.ops.aten.neg.default}  # else lost below


class Remote(torch.Tensor):
    """A tensor on the pretended device; ``held`` has its values."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.size(), held.stride(), held.storage_offset(), dtype=held.dtype, device=STAND_IN
        )

    def __init__(self, held):
        self.held = held

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} of a tensor of the pretended device outside of it")


class Pretended:
    """A context in which "cuda" is a device.

    Attributes:
        counts: of "reads" and "uploads" since :meth:`clear`.
        where: the same by operation.
    """

    def __init__(self):
        self.where = Counter()
        self._modes = _Values(self.where), _Names(self.where)

    @property
    def reads(self):
        return sum(n for (what, _), n in self.where.items() if what == "read")

    @property
    def uploads(self):
        return sum(n for (what, _), n in self.where.items() if what == "upload")

    def clear(self):
        self.where.clear()

    def __enter__(self):
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self._modes):
            mode.__exit__(*error)


def put(t):
    """A copy of a tensor of the CPU on the pretended device, not counted."""
    return Remote(t.detach().clone())


def back(t):
    """The values of a tensor of either device on the CPU, not counted."""
    return t.held if isinstance(t, Remote) else t.detach()


class _Names(TorchFunctionMode):
    """Gives torch's own code the stand-in for the device "cuda"."""

    def __init__(self, where):
        super().__init__()
        self.where = where

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        if any(type(a) in (str, torch.device) for a in args):
            args = [*map(_stand_in, args)]
        there = kwargs | {"device": _stand_in(kwargs["device"])} if "device" in kwargs else kwargs
        if func in (torch.tensor, torch.as_tensor) and there.get("device") == STAND_IN:
            made = func(*args, **(there | {"device": None if isinstance(args[0], Remote) else "cpu"}))
            return made.to(STAND_IN)
        if func is torch.Tensor.tolist and isinstance(args[0], Remote):
            self.where["read", "tolist"] += 1
            return back(args[0]).tolist()
        return func(*args, **there)


def _stand_in(a):
    if type(a) is torch.device:
        return STAND_IN if a.type == "cuda" else a
    return STAND_IN if type(a) is str and a.startswith("cuda") else a


def _tensors(a):
    """Those of the arguments of an operation, which nests lists once at most."""
    found = []
    for v in a:
        if isinstance(v, torch.Tensor):
            found.append(v)
        elif type(v) in (list, tuple):
            found += [t for t in v if isinstance(t, torch.Tensor)]
    return found


def _held(a):
    """An argument with the values of its tensors."""
    if isinstance(a, Remote):
        return a.held
    return type(a)(map(_held, a)) if type(a) in (list, tuple) else a


def _remote(a, known):
    """A result on the pretended device; ``known`` are the tensors that it may be, by the identity of their values."""
    if isinstance(a, torch.Tensor):
        return known[id(a)] if id(a) in known else Remote(a)
    return type(a)(_remote(t, known) for t in a) if type(a) in (list, tuple) else a


class _Values(TorchDispatchMode):
    """Runs every operation on the values, where all of them are on one device."""

    _should_skip_dynamo = classmethod(lambda cls: False)  # nothing is compiled here, and to forbid it takes time

    def __init__(self, where):
        super().__init__()
        self.where = where

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func.overloadpacket.__name__
        tensors = _tensors(args) + _tensors(kwargs.values())
        remote = {id(t.held): t for t in tensors if isinstance(t, Remote)}
        to = kwargs.get("device")
        if not remote and to != STAND_IN:
            return func(*args, **kwargs)
        plain = [t for t in tensors if not isinstance(t, Remote)]
        if name in COPIES and self._crosses(name, args, to):
            pass
        elif plain and (any(t.ndim for t in plain) or (args[0] is plain[0] and name.endswith("_"))):
            raise RuntimeError(f"{func}: expected all tensors on one device, found {CUDA} and cpu")
        if name == "_local_scalar_dense" or name in WAITS or name in ("index", "index_put", "index_put_"):
            self._wait(name, tensors)
        there = to == STAND_IN or (to is None and not (name == "copy_" and plain and args[0] is plain[0]))
        if to is not None:
            kwargs["device"] = torch.device("cpu")
        out = LAZY.get(name, func)(*map(_held, args), **{k: _held(v) for k, v in kwargs.items()})
        return _remote(out, remote) if there else out

    def _crosses(self, name, args, to):
        """Whether a copy goes from one device to the other; counts it."""
        if name == "copy_":
            target, source = (isinstance(t, Remote) for t in args[:2])
        else:
            source = isinstance(args[0], Remote)
            target = source if to is None else to == STAND_IN
        if source != target:
            self.where["upload" if target else "read", name] += 1
        return source != target

    def _wait(self, name, tensors):
        if name.startswith("index") and not any(t.dtype == torch.bool for t in tensors[1:]):
            return
        self.where["read", name] += 1
