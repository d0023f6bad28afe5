"""What the benchmarks share: head-like scenes, clocks, a description of the machine, a safe write.

Import it before torch and numba: it asks waiting threads to sleep instead of spinning.
Times are the CPU time of the measuring thread, the best of several after a warm-up. On a busy
machine wall time also counts other programs. With more than one thread use `wall_ms`: the other
threads' work is not on this thread's clock.
"""

import os

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
import json
import math
import platform
import re
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numba as nb
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spatialavatar0.ground.content import hash_of
from spatialavatar0.ground.core import atomic_path
from spatialavatar0.ground.geometry import intrinsics, mat_to_quat

# Gaussians, pixels per side
SIZES = dict(
    S=(2_000, 128),
    M=(10_000, 256),
    L=(50_000, 512),
    XL=(100_000, 512),
)


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


def _best(call, repeats, clock):
    call()  # compile, allocate, fill the caches
    times = []
    for _ in range(repeats):
        start = clock()
        call()
        times.append(clock() - start)
    return 1e3 * min(times)


def thread_ms(
    call,  # without arguments
    repeats: int = 7,  # timed calls, after one warm-up
) -> float:  # milliseconds of CPU time of this thread
    "CPU time of one call, the best of several."
    return _best(call, repeats, time.thread_time)


def wall_ms(
    call,  # without arguments
    repeats: int = 7,  # timed calls, after one warm-up
) -> float:  # milliseconds on the wall clock
    "Wall time of one call, the best of several."
    return _best(call, repeats, time.perf_counter)


def save(
    path,  # a .json file; its folder is made if missing
    data: dict,  # numbers, strings, lists, dicts
):
    "Write JSON so that a crash leaves the old file."
    with atomic_path(path) as tmp:
        tmp.write_text(json.dumps(data, indent=1) + '\n')


def lines_of(
    path,  # a .json file of settings and rows, which need not exist
    settings: dict,  # of this run
) -> list:  # of rows
    "What an earlier run of the same settings wrote; another's file is refused."
    if not Path(path).exists():
        return []
    old = json.loads(Path(path).read_text())
    if old['settings'] != settings:
        raise SystemExit(
            f'{path} holds lines of other settings, {old["settings"]}; give another --out'
        )
    return old['rows']


def even_directions(
    n: int,  # points
) -> Tensor:  # (n,3)
    "Unit vectors spread evenly over all directions."
    i = torch.arange(n) + 0.5
    y = 1 - 2 * i / n
    turn = i * math.pi * (1 + 5**0.5)
    ring = (1 - y * y).sqrt()
    return torch.stack([ring * turn.cos(), y, ring * turn.sin()], -1)


def ellipsoid_area(
    axes,  # three half axes
) -> float:
    "Thomsen's formula."
    p = 1.6075
    first, second, third = [axis**p for axis in axes]
    return 4 * math.pi * ((first * second + first * third + second * third) / 3) ** (1 / p)


def shell(
    n: int,  # points
    axes=(0.85, 1.0, 0.9),  # half axes of the ellipsoid
) -> tuple:  # points (n,3), normals (n,3), mean distance of neighbours
    "Points spread evenly over an ellipsoid about as wide, tall and deep as a head."
    ball = even_directions(n)
    spacing = math.sqrt(ellipsoid_area(axes) / n)
    axes = torch.tensor(axes)
    return ball * axes, F.normalize(ball / axes, dim=-1), spacing


@dataclass
class Scene:
    "What a renderer is asked to draw."

    means: Tensor
    quats: Tensor
    scales: Tensor
    opacities: Tensor
    colors: Tensor
    viewmat: Tensor
    K: Tensor
    width: int
    height: int

    def gaussians(self):
        "The first five arguments of `rasterize`."
        return [self.means, self.quats, self.scales, self.opacities, self.colors]

    def camera(self):
        "The next four, for one camera."
        return self.viewmat[None], self.K[None], self.width, self.height

    def to(self, device):
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


def scene(
    name_or_n='M',  # S, M, L, XL, or a number of Gaussians
    size: int = None,  # pixels per side; None: the named scene's, 256 for a number
    seed: int = 0,
) -> Scene:  # float32
    "A head-like shell of flat Gaussians, 95% of the picture high, in random order."
    n, own_size = SIZES[name_or_n] if name_or_n in SIZES else (int(name_or_n), 256)
    size = size or own_size
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    points, normals, step = shell(n)
    side = F.normalize(torch.linalg.cross(normals, normal(n, 3)), dim=-1)
    axes = torch.stack([side, torch.linalg.cross(normals, side), normals], -1)
    scales = step * (0.3 * normal(n, 3)).exp() * torch.tensor([1.0, 1.0, 0.3])
    opacities = 0.7 + 0.29 * torch.rand(n, generator=generator)
    colors = 0.5 + 0.3 * F.normalize(points, dim=-1) + 0.2 * normal(n, 3)
    order = torch.randperm(n, generator=generator)  # neighbours in space are not so in memory
    means = points + 0.25 * step * normal(n, 3)
    splats = means, mat_to_quat(axes), scales, opacities, colors.clamp(0, 1)
    viewmat = torch.eye(4)
    viewmat[2, 3] = 4.0
    K = intrinsics(0.474 * 4 * size, size, size)
    return Scene(*[x[order] for x in splats], viewmat, K, size, size)


def commit() -> str:  # seven hex digits; with a + where files differ from it
    "Which version of the kit is measured."
    git = ['git', '-C', str(Path(__file__).parent)]
    try:
        name = subprocess.run([*git, 'rev-parse', '--short=7', 'HEAD'], capture_output=True)
        changed = subprocess.run([*git, 'diff', '--quiet', 'HEAD', '--', ':(top)spatialavatar0'])
    except OSError:
        return 'unknown'
    return name.stdout.decode().strip() + '+' * bool(changed.returncode)


COMMIT = commit()  # when a benchmark begins, not when it saves


def receipt(
    *clips,  # what was learned from, and measured on
) -> dict:
    "Where a line of results comes from: version, pictures, processor."
    pictures = hash_of([clip.fingerprint() for clip in clips])[:16]
    return dict(commit=COMMIT, clips=pictures, device=cpu_name())
