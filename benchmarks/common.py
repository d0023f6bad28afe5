"""What the benchmarks share: head-like scenes, honest clocks, a description of the machine, a safe write.

Import it before torch and numba: it asks waiting threads to sleep instead of spinning.
Times are the CPU time of the measuring thread, the best of several after a warm-up. On a busy machine wall time also counts the
neighbours. With more than one thread use `wall_ms`: the other threads' work is not on this thread's clock.
"""

import os

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
import json
import math
import platform
import re
import time
from pathlib import Path

import numba as nb
import numpy as np
import torch
import torch.nn.functional as F
from spatialavatar0.ground.core import atomic_path
from spatialavatar0.ground.geometry import intrinsics, mat_to_quat

SIZES = dict(
    S=(2_000, 128), M=(10_000, 256), L=(50_000, 512), XL=(100_000, 512)
)  # Gaussians, pixels per side


def cpu_name() -> str:
    "The processor's name, as far as the system tells."
    try:
        found = re.search(r'model name\s*:\s*(.+)', Path('/proc/cpuinfo').read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def machine() -> dict:  # what a reader needs to judge the numbers
    "Processor, cores, threads in use and versions."
    return dict(
        cpu=cpu_name(),
        cores=os.cpu_count(),
        system=f'{platform.system()} {platform.machine()}',
        python=platform.python_version(),
        torch=torch.__version__,
        numba=nb.__version__,
        numpy=np.__version__,
        threads=dict(torch=torch.get_num_threads(), numba=nb.get_num_threads()),
        load=round(os.getloadavg()[0], 2) if hasattr(os, 'getloadavg') else None,
    )


def set_threads(
    n: int,  # for torch and for numba; at most the cores of the machine
) -> int:  # the same number
    "Let torch and numba use n threads each."
    most = nb.config.NUMBA_NUM_THREADS
    if not 1 <= n <= most:
        raise SystemExit(f'threads should be from 1 to {most} here; got {n}')
    torch.set_num_threads(n)
    nb.set_num_threads(n)
    return n


def _best(f, repeats, clock):
    f()  # compile, allocate, fill the caches
    times = []
    for _ in range(repeats):
        start = clock()
        f()
        times.append(clock() - start)
    return 1e3 * min(times)


def thread_ms(
    f,  # called without arguments
    repeats: int = 7,  # timed calls, after one warm-up
) -> float:  # milliseconds of CPU time of this thread
    "CPU time of one call, the best of several."
    return _best(f, repeats, time.thread_time)


def wall_ms(
    f,  # called without arguments
    repeats: int = 7,  # timed calls, after one warm-up
) -> float:  # milliseconds on the wall clock
    "Wall time of one call, the best of several."
    return _best(f, repeats, time.perf_counter)


def save(
    path,  # a .json file; its folder is made if missing
    data: dict,  # numbers, strings, lists, dicts
):
    "Write JSON so that a crash leaves the old file."
    with atomic_path(path) as tmp:
        tmp.write_text(json.dumps(data, indent=1) + '\n')


def shell(
    n: int,  # points
    axes=(0.85, 1.0, 0.9),  # half axes of the ellipsoid
) -> tuple:  # points (n,3), normals (n,3), mean distance of neighbours
    "Points spread evenly over an ellipsoid about as wide, tall and deep as a head."
    i, axes = torch.arange(n) + 0.5, torch.tensor(axes)
    y, turn = 1 - 2 * i / n, i * math.pi * (1 + 5**0.5)
    ball = torch.stack([(1 - y * y).sqrt() * turn.cos(), y, (1 - y * y).sqrt() * turn.sin()], -1)
    a, b, c = axes.tolist()
    p = 1.6075
    area = (
        4 * math.pi * (((a * b) ** p + (a * c) ** p + (b * c) ** p) / 3) ** (1 / p)
    )  # Thomsen's formula
    return ball * axes, F.normalize(ball / axes, dim=-1), math.sqrt(area / n)


def scene(
    name_or_n='M',  # S, M, L, XL, or a number of Gaussians
    size: int = None,  # pixels per side; None: the named scene's, 256 for a number
    seed: int = 0,
) -> dict:  # means quats scales opacities colors viewmat K (float32 tensors), width height
    "A head-like shell of flat Gaussians, 95% of the picture high, in random order."
    n, own = SIZES[name_or_n] if name_or_n in SIZES else (int(name_or_n), 256)
    size = size or own
    g = torch.Generator().manual_seed(seed)

    def randn(*s):
        return torch.randn(s, generator=g)

    points, normals, step = shell(n)
    side = F.normalize(torch.linalg.cross(normals, randn(n, 3)), dim=-1)
    quats = mat_to_quat(torch.stack([side, torch.linalg.cross(normals, side), normals], -1))
    scales = step * (0.3 * randn(n, 3)).exp() * torch.tensor([1.0, 1.0, 0.3])
    opacities = 0.7 + 0.29 * torch.rand(n, generator=g)
    colors = (0.5 + 0.3 * F.normalize(points, dim=-1) + 0.2 * randn(n, 3)).clamp(0, 1)
    viewmat = torch.eye(4)
    viewmat[2, 3] = 4.0
    order = torch.randperm(n, generator=g)  # neighbours in space are not neighbours in memory
    splats = dict(
        means=points + 0.25 * step * randn(n, 3),
        quats=quats,
        scales=scales,
        opacities=opacities,
        colors=colors,
    )
    return dict(
        {k: v[order] for k, v in splats.items()},
        viewmat=viewmat,
        K=intrinsics(0.474 * 4 * size, size, size),
        width=size,
        height=size,
    )
