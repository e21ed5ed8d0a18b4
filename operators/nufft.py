"""Fourier transforms between an image grid and points anywhere in k-space (NUFFT): finufft on CPU, cufinufft on GPU."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invdiff.errors import UsageError

TOLERANCE = {torch.complex64: 1e-6, torch.complex128: 1e-13}
UPSAMPLING = 1.75  # on CPU: as exact as 2, whose power-of-two grids are up to four times as slow
MOST_PLANS = 8  # kept per transform on a GPU: one per kind, precision, number of planes and stream


class Nufft:
    """``y_j = sum_p x_p exp(-2 pi i k_j . p)`` over the pixels p of a plane, and its adjoint.

    p runs from ``-(n // 2)`` along each axis. Both directions spread with one kernel, so that they are adjoint to the
    rounding, more closely than they are exact: about 1e-13 in double, 1e-5 in single precision, where the positions of
    the samples are rounded.

    On the CPU each plane is one transform by one thread (a spread by several threads adds up in random order), and
    planes share ``torch.get_num_threads()`` threads: the bits of a plane depend on nothing else. On a GPU all planes go
    together, from and to torch's memory on torch's current stream; the order of its sums is not fixed.

    Args:
        points: float64 ``(samples, 2)`` in cycles per pixel, (row, column).
        shape: (H, W).
        device: where the planes are.

    Raises:
        UsageError: the library is not installed.

    Source: A. H. Barnett et al., SIAM J. Sci. Comput. 41 (2019) C479-C504; Y. Shih et al., cuFINUFFT, PDSEC 2021.
    """

    def __init__(self, points: Tensor, shape: tuple[int, int], device: torch.device | str = "cpu"):
        self.points, self.shape, self.device = (2 * torch.pi) * points.cpu(), shape, torch.device(device)
        self._library = _library("cufinufft" if self.device.type == "cuda" else "finufft")
        self._idle: dict[tuple, list] = {}

    def direct(self, planes: Tensor) -> Tensor:
        """Complex ``(..., H, W)`` to ``(..., samples)``."""
        return self._run(2, planes, planes.shape[:-2], self.shape, (len(self.points),))

    def adjoint(self, samples: Tensor) -> Tensor:
        """Complex ``(..., samples)`` to ``(..., H, W)``: the adjoint of :meth:`direct`."""
        return self._run(1, samples, samples.shape[:-1], (len(self.points),), self.shape)

    def _run(self, kind: int, x: Tensor, batch: tuple[int, ...], inner: tuple[int, ...], outer: tuple[int, ...]):
        out = torch.empty(*batch, *outer, dtype=x.dtype, device=x.device)
        if out.numel():
            run = self._on_gpu if x.is_cuda else self._on_cpu
            run(kind, x.detach().resolve_conj().reshape(-1, *inner).contiguous(), out.view(-1, *outer))
        return out

    def _on_cpu(self, kind: int, x: Tensor, out: Tensor) -> None:
        key = (kind, x.dtype)
        pairs = list(zip(x.numpy(), out.numpy(), strict=True))

        def transform(pair: tuple[np.ndarray, np.ndarray]) -> None:
            make = lambda: self._plan(kind, 1, x.dtype, nthreads=1, upsampfac=UPSAMPLING, showwarn=0)  # noqa: E731
            self._with_plan(key, make, *pair)

        threads = min(torch.get_num_threads(), len(pairs))
        if threads == 1:
            for pair in pairs:
                transform(pair)
            return
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(transform, pairs))

    def _on_gpu(self, kind: int, x: Tensor, out: Tensor) -> None:
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream().cuda_stream
            options = {"gpu_stream": stream, "gpu_device_id": torch.cuda.current_device()}
            key = (kind, x.dtype, len(x), stream)
            if key not in self._idle and len(self._idle) >= MOST_PLANS:
                self._idle.pop(next(iter(self._idle)))
            self._with_plan(key, lambda: self._plan(kind, len(x), x.dtype, **options), x, out)

    def _with_plan(self, key: tuple, make: Callable[[], Any], x, out) -> None:
        """Run a plan that nobody else runs: an idle one, or a new one."""
        idle = self._idle.setdefault(key, [])
        try:
            plan = idle.pop()
        except IndexError:
            plan = make()
        plan.execute(x, out=out)
        idle.append(plan)

    def _plan(self, kind: int, planes: int, dtype: torch.dtype, **options: Any) -> Any:
        name, sign = str(dtype).removeprefix("torch."), -1 if kind == 2 else 1
        plan = self._library.Plan(kind, self.shape, planes, TOLERANCE[dtype], sign, name, **options)
        rows, columns = self.points.to(self.device, dtype.to_real()).T.contiguous()
        plan.setpts(*((rows, columns) if self.device.type == "cuda" else (rows.numpy(), columns.numpy())))
        return plan

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a NUFFT plan cannot be pickled: pickle the operator, which makes it again")


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except (ImportError, OSError) as error:  # OSError: a shared library that is missing or damaged
        extra = "noncartesian" if name == "finufft" else "noncartesian-cuda"
        line = str(error).partition("\n")[0][:80]
        reason = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be loaded ({line})"
        raise UsageError(f"non-Cartesian MRI needs {name}, which {reason}: pip install invdiff[{extra}]") from None
