"""The rungs of the rasterizer, the forms of SSIM, and whether they keep their promises.

    python benchmarks/raster.py [--quick] [--sizes S,M,L,XL] [--threads 1,2] [--rounds 7]
                                [--rungs dense,torch,per_pixel,per_tile,cpu]
                                [--out results/raster.json]

S: 2,000 Gaussians on 128 x 128 pixels, M: 10,000 on 256 x 256, L: 50,000 on 512 x 512, XL: 100,000
on 512 x 512. Everything of one size is measured side by side: each round times every rung once,
forward, and forward and backward to all inputs (red, green, blue, depth and alpha), with one thread
and with two; the best round counts. One thread: the CPU time of that thread, which a busy machine
does not change much; two: wall time, so let the machine rest. Wall and CPU time of all are in
the JSON file. `dense` keeps every pair of Gaussian and pixel, and is measured on S only.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numba as nb
import numpy as np
import torch
import torch.nn.functional as F
from common import SIZES, machine, save, scene, set_threads

from spatialavatar0.avatar.portrait import from_frame
from spatialavatar0.pictures.fast_metrics import ssim
from spatialavatar0.pictures.metrics import SSIM_WINDOW, ssim_map
from spatialavatar0.pictures.people import make_person, mono_clip
from spatialavatar0.splats import renderers
from spatialavatar0.splats.kernels import project_splats
from spatialavatar0.splats.renderers import rasterize

HERE = Path(__file__).resolve()
FORWARD, BOTH = 'forward', 'forward+backward'


def cpu_ms(found, size, rung):
    "CPU milliseconds forward and backward, one thread."
    return found['raster'][size][rung][BOTH, 1]['cpu_ms']


def wall_ms(found, size, rung, threads):
    "Wall milliseconds forward and backward."
    return found['raster'][size][rung][BOTH, threads]['wall_ms']


def gain(found, size, slow, fast):
    return cpu_ms(found, size, slow) / cpu_ms(found, size, fast)


def speedup(found, size):
    return wall_ms(found, size, 'cpu', 1) / wall_ms(found, size, 'cpu', 2)


@dataclass(frozen=True)
class Gate:
    "A promise: `measure`, called with what was found, is at least (>=) or at most (<=) `limit`."

    name: str
    measure: Callable
    sign: str
    limit: float
    unit: str

    def is_kept(self, value):
        return bool(value >= self.limit if self.sign == '>=' else value <= self.limit)


# fmt: off
GATES = (
    Gate('cpu faster than torch, M',
         lambda found: gain(found, 'M', 'torch', 'cpu'), '>=', 25.0, 'x'),
    Gate('cpu faster than per_pixel, M',
         lambda found: gain(found, 'M', 'per_pixel', 'cpu'), '>=', 3.0, 'x'),
    Gate('cpu faster than per_tile, L',
         lambda found: gain(found, 'L', 'per_tile', 'cpu'), '>=', 1.3, 'x'),
    Gate('fused SSIM faster than torch, 512',
         lambda found: found['ssim']['512']['gain'], '>=', 5.0, 'x'),
    Gate('cpu forward and backward, M',
         lambda found: cpu_ms(found, 'M', 'cpu'), '<=', 20.0, 'ms'),
    Gate('cpu forward and backward, L',
         lambda found: cpu_ms(found, 'L', 'cpu'), '<=', 95.0, 'ms'),
    Gate('two threads faster than one, L',
         lambda found: speedup(found, 'L'), '>=', 1.5, 'x'),
    Gate('first picture of a process, kernels cached',
         lambda found: found['start']['warm_s'], '<=', 1.0, 's'),
    Gate('peak memory, L',
         lambda found: found['memory']['L']['peak_MB'], '<=', 500.0, 'MB'),
)
# fmt: on


# --- clocks


def clock(call, threads):
    """One call: wall milliseconds, and CPU milliseconds (of this thread if there is one, else of
    all)."""
    is_single = threads == 1 and nb.threading_layer() == 'omp'
    cpu = time.thread_time if is_single else time.process_time
    wall_start, cpu_start = time.perf_counter(), cpu()
    call()
    return 1e3 * (time.perf_counter() - wall_start), 1e3 * (cpu() - cpu_start)


def side_by_side(jobs, rounds):
    """Best wall and CPU time of each job, (name, threads) -> function; all take turns, the slowest
    only twice."""
    best = {}
    for turn in range(rounds + 1):  # turn 0 warms up
        for key, call in jobs.items():
            if turn > 2 and best[key][0] > 1500:
                continue
            set_threads(key[-1])
            times = clock(call, key[-1])
            best[key] = times if turn < 2 else tuple(map(min, times, best[key]))
    return {
        key: dict(wall_ms=round(wall, 3), cpu_ms=round(cpu, 3)) for key, (wall, cpu) in best.items()
    }


# --- the ladder


def renderer(rung, name):
    "Two functions to time: forward, and forward and backward under fixed weights."
    picture = scene(name)
    white = torch.ones(1, 3)
    leaves = [*picture.gaussians(), white]
    generator = torch.Generator().manual_seed(1)
    shape = 1, picture.height, picture.width
    weights = [torch.randn(*shape, channels, generator=generator) for channels in (4, 1)]

    def draw():
        options = dict(backgrounds=white, render_mode='RGB+D', backend=rung)
        return rasterize(*leaves[:5], *picture.camera(), **options)[:2]

    def forward():
        with torch.no_grad():
            return draw()

    def both():
        return torch.autograd.grad(draw(), leaves, weights)

    for x in leaves:
        x.requires_grad_()
    return forward, both


def ladder_of(name, rungs, threads, rounds):
    "rung -> (pass, threads) -> times, for one size."
    jobs = {}
    for rung in rungs:
        for part, call in zip((FORWARD, BOTH), renderer(rung, name)):
            for count in threads if rung != 'dense' else threads[:1]:
                jobs[rung, part, count] = call
    times = side_by_side(jobs, rounds)
    return {rung: {key[1:]: t for key, t in times.items() if key[0] == rung} for rung in rungs}


def ladder(sizes, rungs, threads, rounds):
    "size -> rung -> (pass, threads) -> times; prints the table of each size once it is there."
    found = {}
    for name in sizes:
        here = [rung for rung in rungs if rung != 'dense' or name == 'S']
        found[name] = ladder_of(name, here, threads, rounds)
        show_ladder(name, found[name], threads)
    return found


def heading(count):
    return 'one thread, CPU time' if count == 1 else f'{count} threads, wall time'


def passes(times, count):
    "Forward and both, as text."
    if (BOTH, count) not in times:
        return '-'
    clock_name = 'cpu_ms' if count == 1 else 'wall_ms'
    return ' / '.join(f'{times[part, count][clock_name]:.1f}' for part in (FORWARD, BOTH))


def show_ladder(name, rungs, threads):
    count, size = SIZES[name]
    fastest = list(rungs)[-1]
    print(f'\n{name}: {count:,} Gaussians, {size} x {size}, ', end='')
    print('milliseconds forward / forward+backward')
    headings = ''.join(f'{heading(t):>26}' for t in threads)
    print(f'{"":12}{headings}{"":6}times {fastest}')
    one = BOTH, threads[0]
    for rung, times in rungs.items():
        cells = ''.join(f'{passes(times, t):>26}' for t in threads)
        ratio = times[one]['cpu_ms'] / rungs[fastest][one]['cpu_ms']
        print(f'{rung:12}{cells}{ratio:10.1f}', flush=True)


# --- the kernels of rungs 4 and 5 alone, on a painted head


def packed_head(size):
    "Packed splats of a one-picture avatar, as the camera of that picture sees it."
    frame = mono_clip(make_person(3), 8, size, seed=1)[2]
    avatar = from_frame(frame, size // 2)
    world = avatar.world(**frame.pose)
    camera = frame.viewmat[None], frame.K[None], size, size
    screen = [column[0].numpy() for column in project_splats(*world[:4], *camera)]
    means2d, depths, white, reach, extents = screen
    order = renderers.order_by_depth(depths, reach)
    values = renderers._padded(world.colors.detach().numpy())
    columns = means2d, white, world.opacities.detach().numpy(), reach, extents
    return renderers.pack_splats(order, *columns, values, 0)


def kernel_jobs(splats, size):
    "(rung, part of the work) -> function, all for one thread."
    most, plain = np.float32(0.999), np.zeros(3, np.float32)
    generator = np.random.default_rng(0)
    arriving = [
        generator.normal(size=shape).astype(np.float32) for shape in ((size, size, 4), (size, size))
    ]
    tiles = renderers.exact_lists(splats, size, size)
    rows = renderers.row_lists(splats, size, size)
    canvas = renderers._new_canvas(size, size, 4)
    image, T = np.empty((size, size, 3), np.float32), np.empty((size, size), np.float32)
    sums = np.zeros((1, len(splats), 12), np.float32)
    entries = np.zeros((len(rows.ids), 12), np.float32)
    of_rows = 1, splats, rows[:], most, 0, None
    of_tiles = 1, size, size, splats, *tiles, most, 0
    three = np.ascontiguousarray(arriving[0][..., :3]), arriving[1]
    left = *arriving, *canvas[1:], False, sums

    def unblend_rows():
        renderers.blend_rows_backward(*of_rows, (image, T), three, entries)
        renderers.add_entries(1, rows.ids, entries, 0, 3, sums[0])

    return {
        ('per_tile', 'lists'): lambda: renderers.exact_lists(splats, size, size),
        ('cpu', 'lists'): lambda: renderers.row_lists(splats, size, size),
        ('per_tile', 'blend'): lambda: renderers.blend_tiles(*of_tiles, *canvas),
        ('cpu', 'blend'): lambda: renderers.blend_rows(*of_rows, plain, image, T),
        ('per_tile', 'unblend'): lambda: renderers.blend_tiles_backward(*of_tiles, *left),
        ('cpu', 'unblend'): unblend_rows,
    }


def kernels_alone(sizes, rounds):
    "CPU milliseconds of each part by both rungs, which take turns."
    found = {}
    for size in sizes:
        splats = packed_head(size)
        jobs = {(*key, 1): job for key, job in kernel_jobs(splats, size).items()}
        times = {key[:2]: t['cpu_ms'] for key, t in side_by_side(jobs, rounds).items()}
        found[str(size)] = here = dict(gaussians=len(splats))
        print(f'\nkernels alone, a painted head of {len(splats):,} Gaussians, {size} x {size}, ms')
        for part in ('lists', 'blend', 'unblend'):
            slow, fast = times['per_tile', part], times['cpu', part]
            here[part] = dict(per_tile=slow, cpu=fast)
            print(f'{part:10} per_tile {slow:7.2f}   cpu {fast:7.2f}   {slow / fast:5.2f} x')
        both = [
            sum(times[rung, part] for part in ('blend', 'unblend')) for rung in ('per_tile', 'cpu')
        ]
        here['gain'] = round(both[0] / both[1], 2)
        print(f'blend + unblend: {here["gain"]:.2f} x', flush=True)
    return found


# --- SSIM: what the fused kernel is compared with

WINDOW = torch.tensor(SSIM_WINDOW, dtype=torch.float32)
COLUMN, ROW = WINDOW.view(1, 1, 11, 1), WINDOW.view(1, 1, 1, 11)


def planes_grouped(planes):
    n = len(planes)
    rows = F.conv2d(planes[None], COLUMN.expand(n, 1, 11, 1), padding=(5, 0), groups=n)
    return F.conv2d(rows, ROW.expand(n, 1, 1, 11), padding=(0, 5), groups=n)[0]


def planes_batched(planes):
    rows = F.conv2d(planes[:, None], COLUMN, padding=(5, 0))
    return F.conv2d(rows, ROW, padding=(0, 5))[:, 0]


def planes_square(planes):
    n = len(planes)
    window = torch.outer(WINDOW, WINDOW).expand(n, 1, 11, 11)
    return F.conv2d(planes[None], window, padding=5, groups=n)[0]


def planes_shifted(planes):
    height, width = planes.shape[1:]
    planes = F.pad(planes, (5, 5, 5, 5))
    planes = sum(w * planes[:, k : k + height] for k, w in enumerate(WINDOW.tolist()))
    return sum(w * planes[:, :, k : k + width] for k, w in enumerate(WINDOW.tolist()))


def band(n):
    "(n,n) matrix that blurs n pixels."
    i = torch.arange(n)
    shift = i - i[:, None] + 5
    return torch.where((shift >= 0) & (shift < 11), WINDOW[shift.clamp(0, 10)], 0.0)


def planes_matrix(planes):
    return band(planes.shape[1]) @ planes @ band(planes.shape[2])


def with_blur(blur):
    "SSIM in PyTorch with one way of blurring."

    def similarity_of(a, b):
        planes = torch.cat([a, b, a * a, b * b, a * b])
        mean_a, mean_b, aa, bb, ab = blur(planes).split(len(a))
        c1, c2 = 0.01**2, 0.03**2
        above = (2 * mean_a * mean_b + c1) * (2 * (ab - mean_a * mean_b) + c2)
        squares = mean_a * mean_a, mean_b * mean_b
        spread = aa - squares[0] + bb - squares[1] + c2
        return (above / ((squares[0] + squares[1] + c1) * spread)).mean()

    return similarity_of


FORMS = {
    'the readable one of page 30': lambda a, b: ssim_map(a, b).mean(),
    'rows and columns, planes as groups': with_blur(planes_grouped),
    'rows and columns, planes as a batch': with_blur(planes_batched),
    '11 x 11 window': with_blur(planes_square),
    'rows and columns, eleven shifts': with_blur(planes_shifted),
    'band matrices': with_blur(planes_matrix),
}


def ssim_jobs(size):
    "Forward and backward of every form, each checked against the fused one."
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.rand(size, size, 3, generator=generator) for _ in range(2)]
    planes = [x.permute(2, 0, 1).contiguous() for x in pictures]
    pictures[0].requires_grad_()
    planes[0].requires_grad_()
    truth = ssim(*pictures).item()
    jobs = {('fused', 1): lambda: torch.autograd.grad(ssim(*pictures), pictures[0])}
    for name, form in FORMS.items():
        assert abs(form(*planes).item() - truth) < 1e-5, f'{name} is not SSIM'
        jobs[name, 1] = lambda form=form: torch.autograd.grad(form(*planes), planes[0])
    return jobs


def similarity(sizes, rounds):
    """Forward and backward of SSIM at some picture sizes, one thread: the forms in PyTorch against
    the fused kernel."""
    found = {}
    for size in sizes:
        times = side_by_side(ssim_jobs(size), rounds)
        ms = {name: t['cpu_ms'] for (name, _), t in times.items()}
        best = min(FORMS, key=ms.get)
        found[str(size)] = dict(ms=ms, best_torch=best, gain=round(ms[best] / ms['fused'], 2))
        print(f'\nSSIM of {size} x {size} x 3, forward+backward, one thread, ms of CPU time')
        for name, value in ms.items():
            ratio = f'{value / ms["fused"]:8.1f} x' * (name != 'fused')
            print(f'{name:38}{value:8.2f}{ratio}', flush=True)
    return found


# --- fresh processes: memory and the first picture


def child(what, name, env=()):
    "Run this file in a new process of one thread; the numbers it prints."
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'NUMBA_NUM_THREADS': '1', **dict(env)}
    call = [sys.executable, str(HERE), '--child', what, name]
    done = subprocess.run(call, env=env, check=True, capture_output=True, text=True)
    return [float(number) for number in done.stdout.split()]


def first_picture(name):
    "Seconds of the first rasterize, forward and backward, and of the second."
    _, both = renderer('cpu', name)
    times = []
    for _ in range(2):
        start = time.perf_counter()
        both()
        times.append(time.perf_counter() - start)
    print(*times)


def memory_MB(peak):
    """Megabytes of this process, now or at its peak. (On Linux ru_maxrss would also count the
    parent, of whom a new process is a copy for a moment.)"""
    status = Path('/proc/self/status')
    if status.exists():
        line = status.read_text().split('VmHWM:' if peak else 'VmRSS:')[1]
        return int(line.split()[0]) / 1024
    import resource

    unit = 2**20 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def peak_memory(name):
    """Megabytes above those after the imports: with compiled kernels, and at most during three
    pictures with gradients."""
    start = memory_MB(False)
    _, small = renderer('cpu', 'S')
    small()
    ready = memory_MB(False)
    _, both = renderer('cpu', name)
    for _ in range(3):
        both()
    print(ready - start, memory_MB(True) - start)


def starts(cold):
    "Seconds to the first picture of a new process: kernels in the cache, and compiled anew."
    child('first', 'S')
    found = dict(warm_s=round(min(child('first', 'S')[0] for _ in range(3)), 3))
    if cold:
        with tempfile.TemporaryDirectory() as cache:
            found['cold_s'] = round(child('first', 'S', {'NUMBA_CACHE_DIR': cache})[0], 2)
    times = ', '.join(f'{name[:-2]} {seconds:.2f} s' for name, seconds in found.items())
    print(f'\nfirst picture of a new process, forward and backward: {times}', flush=True)
    return found


def memories(sizes):
    "Megabytes of kernels, and at the peak, for each size."
    found = {}
    for name in sizes:
        kernels, peak = child('memory', name)
        found[name] = dict(kernels_MB=round(kernels, 1), peak_MB=round(peak, 1))
    parts = [
        f'{name} {MB["peak_MB"]:.0f} MB ({MB["kernels_MB"]:.0f} of them kernels)'
        for name, MB in found.items()
    ]
    print(f'peak memory above that of the imports: {", ".join(parts)}', flush=True)
    return found


# --- gates


def gates(found):
    """Every promise: what was measured, and whether it is kept; a promise whose part was not run is
    left out."""
    rows, busy = [], found['machine'].get('load') or 0
    for gate in GATES:
        try:
            value = gate.measure(found)
        except KeyError:
            continue
        promise = f'{gate.sign} {gate.limit:g} {gate.unit}'
        ok = gate.is_kept(value)
        row = dict(gate=gate.name, measured=round(value, 3), promise=promise, ok=ok)
        if 'threads' in gate.name and busy > 0.5:
            row['note'] = f'the machine was not idle: load {busy}'
        rows.append(row)
    print('\nGates')
    for row in rows:
        result = 'ok' if row['ok'] else 'MISSED'
        print(f'{row["gate"]:46}{row["measured"]:10.2f}   {row["promise"]:12}{result}', end='')
        print(f'   {row.get("note", "")}')
    return rows


def as_text(key):
    "A key of several parts as one string, for JSON."
    if not isinstance(key, tuple):
        return key
    parts = [f'{p} thread{"s" * (p > 1)}' if isinstance(p, int) else p for p in key]
    return ', '.join(parts)


def plain(found):
    "Nested dicts with keys of one string."
    if not isinstance(found, dict):
        return found
    return {as_text(key): plain(value) for key, value in found.items()}


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--quick', action='store_true', help='S and M, three rounds, no cold start')
    parser.add_argument('--sizes')
    parser.add_argument('--rungs', default=','.join(renderers._BACKENDS))
    parser.add_argument('--threads', default='1,2')
    parser.add_argument('--rounds', type=int)
    parser.add_argument('--out', default='results/raster.json')
    parser.add_argument('--child', nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    given = arguments()
    if given.child:
        what, name = given.child
        return dict(first=first_picture, memory=peak_memory)[what](name)
    torch.set_flush_denormal(True)
    rounds = given.rounds or (3 if given.quick else 7)
    sizes = (given.sizes or ('S,M' if given.quick else 'S,M,L,XL')).split(',')
    most = nb.config.NUMBA_NUM_THREADS
    threads = [count for count in map(int, given.threads.split(',')) if count <= most]
    found = dict(machine=machine(), rounds=rounds)
    found['raster'] = ladder(sizes, given.rungs.split(','), threads, rounds)
    found['kernels'] = kernels_alone((256,) if given.quick else (256, 512), rounds)
    found['ssim'] = similarity((256,) if given.quick else (256, 512), rounds)
    found['start'] = starts(not given.quick)
    if sys.platform != 'win32':
        found['memory'] = memories([name for name in sizes if name in ('M', 'L', 'XL')])
    found['gates'] = gates(found)
    found['load_after'] = round(os.getloadavg()[0], 2) if hasattr(os, 'getloadavg') else None
    save(given.out, plain(found))
    print(f'\nwritten to {given.out}')


if __name__ == '__main__':
    main()
