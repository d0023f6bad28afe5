"""The rungs of the rasterizer, the forms of SSIM, and whether they keep their promises.

    python benchmarks/raster.py [--quick] [--sizes S,M,L,XL] [--rungs dense,torch,per_pixel,cpu] [--threads 1,2] [--rounds 7] [--out results/raster.json]

S: 2,000 Gaussians on 128 x 128 pixels, M: 10,000 on 256 x 256, L: 50,000 on 512 x 512, XL: 100,000 on 512 x 512.
Everything of one size is measured side by side: each round times every rung once, forward, and forward and backward to all inputs
(red, green, blue, depth and alpha), with one thread and with two; the best round counts. One thread: the CPU time of that thread, which
a busy machine does not change much; two: wall time, so let the machine rest. Wall and CPU time of everything are in the JSON file.
`dense` keeps every pair of Gaussian and pixel, and is measured on S only.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numba as nb
import torch
import torch.nn.functional as F
from common import SIZES, machine, save, scene, set_threads

from spatialavatar0.pictures.metrics import SSIM_WINDOW, ssim, ssim_map
from spatialavatar0.splats import renderers as render
from spatialavatar0.splats.renderers import rasterize

HERE = Path(__file__).resolve()
GATES = (  # name, what is measured, the promise
    ('cpu faster than torch, M', lambda r: ratio(r, 'M', 'torch', 'cpu'), '>=', 25.0, 'x'),
    ('cpu faster than per_pixel, M', lambda r: ratio(r, 'M', 'per_pixel', 'cpu'), '>=', 3.0, 'x'),
    ('fused SSIM faster than torch, 512', lambda r: r['ssim']['512']['gain'], '>=', 5.0, 'x'),
    (
        'cpu forward and backward, M',
        lambda r: r['raster']['M']['cpu'][BOTH, 1]['cpu_ms'],
        '<=',
        20.0,
        'ms',
    ),
    (
        'cpu forward and backward, L',
        lambda r: r['raster']['L']['cpu'][BOTH, 1]['cpu_ms'],
        '<=',
        95.0,
        'ms',
    ),
    ('two threads faster than one, L', lambda r: speedup(r, 'L'), '>=', 1.5, 'x'),
    ('first picture of a process, kernels cached', lambda r: r['start']['warm_s'], '<=', 1.0, 's'),
    ('peak memory, L', lambda r: r['memory']['L']['peak_MB'], '<=', 500.0, 'MB'),
)
FORWARD, BOTH = 'forward', 'forward+backward'


def ratio(r, size, slow, fast):
    return r['raster'][size][slow][BOTH, 1]['cpu_ms'] / r['raster'][size][fast][BOTH, 1]['cpu_ms']


def speedup(r, size):
    return (
        r['raster'][size]['cpu'][BOTH, 1]['wall_ms'] / r['raster'][size]['cpu'][BOTH, 2]['wall_ms']
    )


# --- clocks


def clock(f, threads):
    """One call: wall milliseconds, and CPU milliseconds (of this thread if there is one, else of
    all)."""
    cpu = time.thread_time if threads == 1 and nb.threading_layer() == 'omp' else time.process_time
    start = time.perf_counter(), cpu()
    f()
    return 1e3 * (time.perf_counter() - start[0]), 1e3 * (cpu() - start[1])


def side_by_side(jobs, rounds):
    """Best wall and CPU time of each job, (name, threads) -> function; all take turns, the slowest
    only twice."""
    best = {}
    for r in range(rounds + 1):  # round 0 warms up
        for key, f in jobs.items():
            if r > 2 and best[key][0] > 1500:
                continue
            set_threads(key[-1])
            t = clock(f, key[-1])
            best[key] = t if r < 2 else tuple(map(min, t, best[key]))
    return {k: dict(wall_ms=round(w, 3), cpu_ms=round(c, 3)) for k, (w, c) in best.items()}


# --- the ladder


def renderer(rung, name):
    "Two functions to time: forward, and forward and backward under fixed weights."
    s = scene(name)
    white = torch.ones(1, 3)
    x = [s[k] for k in ('means', 'quats', 'scales', 'opacities', 'colors')] + [white]

    def draw():
        return rasterize(
            *x[:5],
            s['viewmat'][None],
            s['K'][None],
            s['width'],
            s['height'],
            backgrounds=white,
            render_mode='RGB+D',
            backend=rung,
        )[:2]

    def forward():
        with torch.no_grad():
            return draw()

    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(*[1, s['height'], s['width']], d, generator=g) for d in (4, 1)]

    def both():
        return torch.autograd.grad(draw(), x, weights)

    for t in x:
        t.requires_grad_()
    return forward, both


def ladder(sizes, rungs, threads, rounds):
    """size -> rung -> (pass, threads) -> times; prints the table of each size as soon as it is
    there."""
    found = {}
    for name in sizes:
        here = [r for r in rungs if r != 'dense' or name == 'S']
        pairs = {r: renderer(r, name) for r in here}
        times = side_by_side(
            {
                (r, p, n): pairs[r][i]
                for r in here
                for i, p in enumerate((FORWARD, BOTH))
                for n in (threads if r != 'dense' else threads[:1])
            },
            rounds,
        )
        found[name] = {r: {k[1:]: t for k, t in times.items() if k[0] == r} for r in here}
        show_ladder(name, found[name], threads)
    return found


def show_ladder(name, rungs, threads):
    n, size = SIZES[name]
    last = list(rungs)[-1]
    print(f'\n{name}: {n:,} Gaussians, {size} x {size}, milliseconds forward / forward+backward')
    print(f'{"":12}' + ''.join(f'{heading(t):>26}' for t in threads) + f'{"":6}times {last}')
    for r, t in rungs.items():
        cells = [
            ' / '.join(f'{t[p, k]["cpu_ms" if k == 1 else "wall_ms"]:.1f}' for p in (FORWARD, BOTH))
            if (BOTH, k) in t
            else '-'
            for k in threads
        ]
        print(
            f'{r:12}'
            + ''.join(f'{c:>26}' for c in cells)
            + f'{t[BOTH, threads[0]]["cpu_ms"] / rungs[last][BOTH, threads[0]]["cpu_ms"]:10.1f}',
            flush=True,
        )


def heading(n):
    return 'one thread, CPU time' if n == 1 else f'{n} threads, wall time'


# --- SSIM: what the fused kernel is compared with

WINDOW = torch.tensor(SSIM_WINDOW, dtype=torch.float32)


def planes_grouped(x):
    n = len(x)
    return F.conv2d(
        F.conv2d(x[None], WINDOW.view(1, 1, 11, 1).expand(n, 1, 11, 1), padding=(5, 0), groups=n),
        WINDOW.view(1, 1, 1, 11).expand(n, 1, 1, 11),
        padding=(0, 5),
        groups=n,
    )[0]


def planes_batched(x):
    return F.conv2d(
        F.conv2d(x[:, None], WINDOW.view(1, 1, 11, 1), padding=(5, 0)),
        WINDOW.view(1, 1, 1, 11),
        padding=(0, 5),
    )[:, 0]


def planes_square(x):
    n = len(x)
    return F.conv2d(x[None], torch.outer(WINDOW, WINDOW).expand(n, 1, 11, 11), padding=5, groups=n)[
        0
    ]


def planes_shifted(x):
    H, W = x.shape[1:]
    x = F.pad(x, (5, 5, 5, 5))
    x = sum(w * x[:, k : k + H] for k, w in enumerate(WINDOW.tolist()))
    return sum(w * x[:, :, k : k + W] for k, w in enumerate(WINDOW.tolist()))


def band(n):
    i = torch.arange(n)
    d = i - i[:, None] + 5
    return torch.where((d >= 0) & (d < 11), WINDOW[d.clamp(0, 10)], 0.0)


def planes_matrix(x):
    return band(x.shape[1]) @ x @ band(x.shape[2])


def with_blur(blur):
    "SSIM in PyTorch with one way of blurring."

    def f(a, b):
        ma, mb, aa, bb, ab = blur(torch.cat([a, b, a * a, b * b, a * b])).split(len(a))
        c1, c2 = 0.01**2, 0.03**2
        return (
            (2 * ma * mb + c1)
            * (2 * (ab - ma * mb) + c2)
            / ((ma * ma + mb * mb + c1) * (aa - ma * ma + bb - mb * mb + c2))
        ).mean()

    return f


FORMS = {
    'the readable one of page 30': lambda a, b: ssim_map(a, b).mean(),
    'rows and columns, planes as groups': with_blur(planes_grouped),
    'rows and columns, planes as a batch': with_blur(planes_batched),
    '11 x 11 window': with_blur(planes_square),
    'rows and columns, eleven shifts': with_blur(planes_shifted),
    'band matrices': with_blur(planes_matrix),
}


def similarity(pixels, rounds):
    """Forward and backward of SSIM at some picture sizes, one thread: the forms in PyTorch against
    the fused kernel."""
    found = {}
    for n in pixels:
        g = torch.Generator().manual_seed(0)
        a, b = [torch.rand(n, n, 3, generator=g) for _ in 'ab']
        p, q = [x.permute(2, 0, 1).contiguous() for x in (a, b)]
        a.requires_grad_()
        p.requires_grad_()
        truth = ssim(a, b).item()
        jobs = {('fused', 1): lambda: torch.autograd.grad(ssim(a, b), a)}
        for name, f in FORMS.items():
            assert abs(f(p, q).item() - truth) < 1e-5, f'{name} is not SSIM'
            jobs[name, 1] = lambda f=f: torch.autograd.grad(f(p, q), p)
        ms = {k: t['cpu_ms'] for (k, _), t in side_by_side(jobs, rounds).items()}
        best = min(FORMS, key=ms.get)
        found[str(n)] = dict(ms=ms, best_torch=best, gain=round(ms[best] / ms['fused'], 2))
        print(f'\nSSIM of {n} x {n} x 3, forward+backward, one thread, ms of CPU time')
        print(
            '\n'.join(
                f'{k:38}{v:8.2f}' + f'{v / ms["fused"]:8.1f} x' * (k != 'fused')
                for k, v in ms.items()
            ),
            flush=True,
        )
    return found


# --- fresh processes: memory and the first picture


def child(what, name, env=()):
    "Run this file in a new process of one thread; the numbers it prints."
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'NUMBA_NUM_THREADS': '1', **dict(env)}
    out = subprocess.run(
        [sys.executable, str(HERE), '--child', what, name],
        env=env,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [float(v) for v in out.split()]


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
        return int(status.read_text().split('VmHWM:' if peak else 'VmRSS:')[1].split()[0]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == 'darwin' else 1024
    )


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
        with tempfile.TemporaryDirectory() as d:
            found['cold_s'] = round(child('first', 'S', {'NUMBA_CACHE_DIR': d})[0], 2)
    print(
        '\nfirst picture of a new process, forward and backward: '
        + ', '.join(f'{k[:-2]} {v:.2f} s' for k, v in found.items()),
        flush=True,
    )
    return found


def memories(sizes):
    found = {
        n: dict(zip(('kernels_MB', 'peak_MB'), [round(v, 1) for v in child('memory', n)]))
        for n in sizes
    }
    print(
        'peak memory above that of the imports: '
        + ', '.join(
            f'{n} {m["peak_MB"]:.0f} MB ({m["kernels_MB"]:.0f} of them kernels)'
            for n, m in found.items()
        ),
        flush=True,
    )
    return found


# --- gates


def gates(found):
    """Every promise: what was measured, and whether it is kept; a promise whose part was not run is
    left out."""
    rows, busy = [], found['machine'].get('load') or 0
    for name, measure, sign, target, unit in GATES:
        try:
            value = measure(found)
        except KeyError:
            continue
        row = dict(
            gate=name,
            measured=round(value, 3),
            promise=f'{sign} {target:g} {unit}',
            ok=bool(value >= target if sign == '>=' else value <= target),
        )
        if 'threads' in name and busy > 0.5:
            row['note'] = f'the machine was not idle: load {busy}'
        rows.append(row)
    print('\nGates')
    print(
        '\n'.join(
            (
                f'{r["gate"]:46}{r["measured"]:10.2f}   '
                f'{r["promise"]:12}{"ok" if r["ok"] else "MISSED"}   {r.get("note", "")}'
            )
            for r in rows
        )
    )
    return rows


def plain(x):
    "Keys of several parts as one string, for JSON."
    if isinstance(x, dict):
        return {
            ', '.join(f'{v} thread{"s" * (v > 1)}' if isinstance(v, int) else v for v in k)
            if isinstance(k, tuple)
            else k: plain(v)
            for k, v in x.items()
        }
    return x


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--quick', action='store_true', help='S and M, three rounds, no cold start')
    p.add_argument('--sizes')
    p.add_argument('--rungs', default=','.join(render._BACKENDS))
    p.add_argument('--threads', default='1,2')
    p.add_argument('--rounds', type=int)
    p.add_argument('--out', default='results/raster.json')
    p.add_argument('--child', nargs=2, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.child:
        return dict(first=first_picture, memory=peak_memory)[a.child[0]](a.child[1])
    torch.set_flush_denormal(True)
    rounds = a.rounds or (3 if a.quick else 7)
    sizes = (a.sizes or ('S,M' if a.quick else 'S,M,L,XL')).split(',')
    threads = [n for n in map(int, a.threads.split(',')) if n <= nb.config.NUMBA_NUM_THREADS]
    found = dict(machine=machine(), rounds=rounds)
    found['raster'] = ladder(sizes, a.rungs.split(','), threads, rounds)
    found['ssim'] = similarity((256, 512) if not a.quick else (256,), rounds)
    found['start'] = starts(not a.quick)
    if sys.platform != 'win32':
        found['memory'] = memories([n for n in sizes if n in ('M', 'L', 'XL')])
    found['gates'] = gates(found)
    found['load_after'] = round(os.getloadavg()[0], 2) if hasattr(os, 'getloadavg') else None
    save(a.out, plain(found))
    print(f'\nwritten to {a.out}')


if __name__ == '__main__':
    main()
