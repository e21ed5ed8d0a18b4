"""In which numbers a network multiplies, and what the processor can."""

from functools import cache

import torch

PRECISIONS = {
    "auto": "bfloat16 where the processor multiplies it itself, else float32",
    "float32": "24 bits",
    "bfloat16": "8 bits, by autocast: convolutions and matrix products; weights, sums and noise levels stay in float32",
}


def has_bfloat16(device: torch.device) -> bool:
    """Whether the processor multiplies bfloat16 itself; one that does not is slower with it than with float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = _cpu_flags()
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


@cache
def _cpu_flags() -> set[str]:
    """What the kernel says the processor can; empty where it does not say."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="ignore") as file:
            lines = [line for line in file if line.lower().startswith(("flags", "features"))]
    except OSError:
        return set()
    return set(lines[0].split()) if lines else set()
