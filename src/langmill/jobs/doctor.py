"""What this machine can do, measured where it can be, and which extras are installed."""

from __future__ import annotations

import platform
import re
import shutil
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import torch

from langmill import __version__
from langmill.common.files import free_bytes
from langmill.common.machine import available_bytes, cores, memory_bytes
from langmill.common.metrics import Report
from langmill.common.progress import track
from langmill.infer.native_build import not_built

COMPILERS = ("g++", "clang++", "cl")


def run(*, quiet: bool = False) -> Report:
    """Look at Python, torch, processor, memory, disk, accelerators and extras; about two seconds of measuring."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with track("measuring matrix products", unit="products", quiet=quiet) as progress:
        rates = matmul_flops((torch.float32, torch.bfloat16), device, progress.advance)
    compiler = next((name for name in COMPILERS if shutil.which(name)), None)
    slow = not_built()
    extras = installed_extras()
    lines = [
        ("langmill", __version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"),
        ("processor", f"{cores()} logical processors, {torch.get_num_threads()} threads used"),
        ("memory", f"{memory_bytes() / 2**30:.1f} GiB, {available_bytes() / 2**30:.1f} GiB free now"),
        ("disk", f"{free_bytes(Path()) / 2**30:.1f} GiB free here"),
        ("accelerators", ", ".join(accelerators()) or "none: training and generation run on the processor"),
        ("matrix products", _rates(rates, device)),
        (
            "torch.compile",
            f"works with {compiler}" if compiler else "off: install a C++ compiler (g++ or clang++)",
        ),
        (
            "fast decoding",
            f"off, torch writes instead: {slow}" if slow else "the C++ pass is built and runs here",
        ),
    ]
    width = max(len(name) for name, _ in lines)
    text = [f"{name:{width}}  {value}" for name, value in lines]
    text += ["", "extras", *(f"  {line}" for line in _extra_lines(extras))]
    return Report(
        counts={
            "processors": cores(),
            "threads": torch.get_num_threads(),
            "accelerators": len(accelerators()),
        },
        figures={
            "memory_bytes": memory_bytes(),
            "available_bytes": available_bytes(),
            "disk_free_bytes": free_bytes(Path()),
            **{f"matmul_gflops_{name}": round(rate / 1e9, 1) for name, rate in rates.items()},
        },
        text="\n".join(text),
        extra={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "compiler": compiler,
            "fast_decoding": slow is None,
            "devices": accelerators(),
            "extras": {name: not missing for name, missing in extras.items()},
        },
    )


def matmul_flops(
    dtypes: Sequence[torch.dtype], device: str, tick: Callable[[], None] = lambda: None, seconds: float = 1.0
) -> dict[str, float]:
    """Best rate of square matrix products in FLOP/s for each type, taken in turns so that all meet the same machine.

    The matrices are 1024 wide on a processor and 8192 on a GPU. `tick` is called after each product.
    """
    n = 8192 if device == "cuda" else 1024
    pairs = {
        t: (torch.randn(n, n, dtype=t, device=device), torch.randn(n, n, dtype=t, device=device))
        for t in dtypes
    }
    best = dict.fromkeys(dtypes, float("inf"))
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        for dtype, (a, b) in pairs.items():
            before = time.perf_counter()
            torch.mm(a, b)
            if device == "cuda":
                torch.cuda.synchronize()
            best[dtype] = min(best[dtype], time.perf_counter() - before)
            tick()
    return {str(dtype).removeprefix("torch."): 2.0 * n**3 / taken for dtype, taken in best.items()}


def accelerators() -> list[str]:
    """Names of the GPUs that torch can use, with their memory."""
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(f"cuda:{index} {properties.name} ({properties.total_memory / 2**30:.0f} GiB)")
    return [*found, "mps"] if torch.backends.mps.is_available() else found


def installed_extras() -> dict[str, list[str]]:
    """Each extra of the installed package and which of its packages are missing; empty when run from source."""
    try:
        requirements = metadata.requires("langmill") or []
    except metadata.PackageNotFoundError:
        return {}
    missing: dict[str, list[str]] = {}
    for requirement in requirements:
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", requirement)
        name = re.match(r"[\w.-]+", requirement)
        if extra is None or name is None or extra[1] in ("all", "test"):
            continue
        absent = missing.setdefault(extra[1], [])
        try:
            metadata.version(name[0])
        except metadata.PackageNotFoundError:
            absent.append(name[0])
    return missing


def _extra_lines(extras: dict[str, list[str]]) -> list[str]:
    if not extras:
        return [
            "unknown: Langmill runs from its source; install it with  pip install -c constraints.txt -e ."
        ]
    return [
        f'{name:11} missing {", ".join(missing)}: pip install "langmill[{name}]"'
        if missing
        else f"{name:11} installed"
        for name, missing in extras.items()
    ]


def _rates(rates: dict[str, float], device: str) -> str:
    shown = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in rates.items())
    fast = max(rates, key=lambda name: rates[name])
    return f"{shown} on {device}: {fast} is the fast type here"
