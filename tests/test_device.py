"""Every operator and every solver on another device than the CPU, by a pretended one: equal values, no hidden waits."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from operator_registry import LIBRARY, NAMES, Case, case
from pretended import Pretended, back, put

EVERY = pytest.mark.parametrize("name", [*NAMES, *LIBRARY])


class Plan:
    """cufinufft's plan, by finufft."""

    def __init__(self, kind, shape, planes, tolerance, sign, dtype, gpu_stream, gpu_device_id):
        from finufft import Plan as OnCPU

        self.own = OnCPU(kind, shape, planes, tolerance, sign, dtype)

    def setpts(self, rows, columns):
        self.own.setpts(back(rows).numpy(), back(columns).numpy())

    def execute(self, x, out):
        assert x.is_cuda and out.is_cuda
        back(out).copy_(torch.from_numpy(self.own.execute(back(x).numpy())).reshape(out.shape))


@pytest.fixture
def gpu(monkeypatch):
    """The pretended device, and of torch.cuda what the package asks for."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=2**34))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setitem(sys.modules, "cufinufft", SimpleNamespace(Plan=Plan))
    with Pretended() as device:
        yield device


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())

@EVERY
def test_an_operator_is_the_same(gpu, name):
    c = case(name)
    there = Case(c.op.to("cuda"), c.slices)
    for (f, v), (g, _) in zip(c.maps(torch.float32), there.maps(torch.float32, "cuda"), strict=True):
        w = put(v)
        found = g(w)
        gpu.clear()
        found = g(w)
        print(name, getattr(f, "__qualname__", f), dict(gpu.where))
        assert found.is_cuda and found.dtype == v.dtype and relative(back(found), f(v)) < 1e-5
    assert there.op.norm == pytest.approx(c.op.norm, rel=1e-3)
    assert there.op.mean_square == pytest.approx(c.op.mean_square, rel=1e-5)
