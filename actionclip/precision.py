"""Which number type the hardware multiplies natively. Asks the hardware, computes nothing."""

from pathlib import Path

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISION_NAMES = {dtype: name for name, dtype in PRECISIONS.items()}

# As the Linux kernel names the instruction sets that multiply bf16: AMX, AVX-512, and Arm's.
_CPU_BF16_FLAGS = {"amx_bf16", "avx512_bf16", "bf16"}


def automatic_dtype(device: torch.device) -> torch.dtype:
    """Choose bf16 where the device has matrix instructions for it, else fp32."""
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        has_bf16 = not _CPU_BF16_FLAGS.isdisjoint(_cpu_flags())
    else:
        has_bf16 = False
    return torch.bfloat16 if has_bf16 else torch.float32


def _cpu_flags() -> set[str]:
    """Read the first processor's features; empty where the system does not list them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(value.split())
    return set()
