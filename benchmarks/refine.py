"""Stage 2 measured: the paper's guards one by one, the remedy, and what adaptive densification does instead.

    python benchmarks/refine.py [--people 3] [--seeds 3] [--size 128] [--resolution 64] [--iters 10000] [--rows full,remedy] [--jobs 2] [--out results/refine_128.json]
    python benchmarks/refine.py --speed [--size 256 --resolution 128] [--out results/refine_speed.json]

Each painted person is filmed for 200 frames by one camera; the last fifth is held out, and so are twelve views from the far sides.
Rows of a person start from the same one-picture avatar (row start), but for the grey start and those named "generator": these start
from what the shipped network makes of four frames (row D of the paper is "generator full"). Rows that are in the output file already
are not run again, so an interrupted table goes on where it was.
"""

import argparse
import json
import math
import multiprocessing as mp
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import common  # first: waiting threads shall sleep
import torch

from spatialavatar0.avatar.avatar import new_avatar, open_splats
from spatialavatar0.avatar.portrait import from_frame
from spatialavatar0.pictures.clips import Clip, split, write_vhap
from spatialavatar0.pictures.formats import load_clip
from spatialavatar0.pictures.metrics import ssim
from spatialavatar0.pictures.people import make_person, mono_clip, novel_views
from spatialavatar0.splats.renderers import rasterize
from spatialavatar0.stage1.generator import from_pretrained
from spatialavatar0.stage2.loop import NotFinite, Refinement, calm, measure, refine
from spatialavatar0.stage2.refine import RefineConfig, paper_config, start_frame

NONE = dict(spread=99.0, grow=99.0)
ROWS = {
    'full': paper_config(),
    'remedy': RefineConfig(),
    'no freeze': paper_config(freeze=0),
    'no clamp': paper_config(**NONE),
    'no aspect': paper_config(aspect=0.0),
    'neither': paper_config(aspect=0.0, **NONE),
    'grey start': paper_config(),
    'densification': None,
    'generator start': None,
    'generator full': paper_config(),
    'generator remedy': RefineConfig(),
}


def stage(person, a):
    "Train, held-out and far views of a person, held in memory, and the one-picture avatar."
    p = make_person(person)
    train, test = split(mono_clip(p, 200, a.size, seed=person))
    train, test, novel = [Clip(c.frames) for c in (train, test, novel_views(p, a.size))]
    return train, test, novel, from_frame(train[start_frame(train)], a.resolution)


def grown(start, train, a, seed):
    from spatialavatar0.stage2.densify import densify

    return densify(start, train, a.iters, seed=seed)


def generated(train, resolution):
    "What the shipped network makes of four frames of a clip, evenly apart."
    g = from_pretrained('toy')
    if g.config.resolution != resolution:
        raise SystemExit(
            f'the shipped network makes avatars of {g.config.resolution} x {g.config.resolution} '
            f'texels; the rows that start from it need --resolution {g.config.resolution}'
        )
    return g([train[i * len(train) // 4] for i in range(4)])


def run(row, person, seed, a):
    "One line of the table."
    common.set_threads(1)
    train, test, novel, avatar = stage(person, a)
    t = time.perf_counter()
    note = ''
    if row == 'grey start':
        avatar = new_avatar(avatar.head, a.resolution, avatar.shape)
    if row.startswith('generator'):
        avatar = generated(train, a.resolution)
    try:
        if row == 'densification':
            avatar, _ = grown(avatar, train, a, seed)
        elif ROWS.get(row):
            avatar, _ = refine(avatar, train, a.iters, config=ROWS[row], seed=seed)
    except NotFinite as e:
        note = str(e)  # without the clamp a run may end like this: then that is the result
    seconds = time.perf_counter() - t
    scales = avatar.splats['log_scales']
    solid = (scales.amax(-1) - scales.amin(-1)).exp().sort().values
    space = dict(
        aspect3d_max=float(solid[-1]), aspect3d_999=float(solid[int(0.999 * (len(solid) - 1))])
    )
    return dict(
        row=row,
        person=person,
        seed=seed,
        gaussians=len(scales),
        seconds=round(seconds, 1),
        held_out=measure(avatar, test),
        far=measure(avatar, novel),
        note=note,
        **space,
    )


def mean(values):
    return sum(values) / len(values)


def table(rows):
    "Means over people and seeds; worst aspect ratios."
    print(
        f'\n{"":15} runs   held out: PSNR   head    SSIM   far: PSNR   head   screen aspect: max  '
        ' 99.9%   3D max   Gaussians   seconds'
    )
    for name in ('start', *ROWS):
        r = [x for x in rows if x['row'] == name]
        if not r:
            continue

        def m(part, key):
            return mean([x[part][key] for x in r])

        worst = max(max(x[p]['aspect_max'] for p in ('held_out', 'far')) for x in r)
        tail = mean([max(x[p]['aspect_999'] for p in ('held_out', 'far')) for x in r])
        print(
            f'{name:16}{len(r):4}{m("held_out", "psnr"):17.2f}{m("held_out", "head_psnr"):7.2f}{m("held_out", "ssim"):8.4f}{m("far", "psnr"):12.2f}{m("far", "head_psnr"):7.2f}'
            f'{worst:21.1f}{tail:8.1f}{max(x["aspect3d_max"] for x in r):9.1f}{mean([x["gaussians"] for x in r]):12.0f}{mean([x["seconds"] for x in r]):10.0f}'
        )


def kernels(r, i):
    "Calls of the rasterizer and of SSIM, forward and backward, on picture i."
    v = r.view(i)
    b = torch.rand(3)
    world = [x.detach().requires_grad_() for x in open_splats(r.splats(), v.mesh)]
    target = v.on(b)
    picture = target.clone().requires_grad_()
    return (
        lambda: (
            rasterize(*world, v.viewmat[None], v.K[None], v.width, v.height, backgrounds=b[None])[0]
            .sum()
            .backward()
        ),
        lambda: ssim(picture, target).backward(),
    )


def ms(f):
    t = time.perf_counter()
    f()
    return 1e3 * (time.perf_counter() - t)


def film(folder, size):
    """Write a painted clip as a folder, in a process of its own: a painter's memory is not a
    refinement's."""
    write_vhap(mono_clip(make_person(3), 200, size), folder)


def speed(a, steps=100):
    """Milliseconds per step and what they are spent on, with the threads given: medians over steps,
    each followed by its kernels alone."""
    with tempfile.TemporaryDirectory() as folder:
        with ProcessPoolExecutor(1, mp_context=mp.get_context('spawn')) as pool:
            pool.submit(film, folder, a.size).result()
        train = load_clip(folder, split='train')
        start = from_frame(train[start_frame(train)], a.resolution)
        r = Refinement(start, train, RefineConfig(freeze=0, aspect_from=0), a.iters)
        for i in range(len(train)):
            r.view(i)
    with calm(a.size**2):
        for _ in range(5):
            r.step()
        step, raster, similar = (
            torch.tensor(
                [[ms(f) for f in (r.step, *kernels(r, i % len(train)))] for i in range(steps)]
            )
            .median(0)
            .values.tolist()
        )
    out = dict(
        size=a.size,
        gaussians=len(start),
        step_ms=round(step, 2),
        raster_ms=round(raster, 2),
        ssim_ms=round(similar, 2),
        other_ms=round(step - raster - similar, 2),
        minutes_10k=round(step / 6, 2),
        memory_mb=round(peak_mb()),
        machine=common.machine(),
    )
    print(json.dumps({k: v for k, v in out.items() if k != 'machine'}))
    return out


def peak_mb():
    "Largest resident memory of this process so far, megabytes."
    import re

    try:
        return int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1]) / 1e3
    except OSError:
        return math.nan


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in dict(
        people=3, seeds=3, size=128, resolution=64, iters=10_000, jobs=1, threads=2
    ).items():
        p.add_argument(f'--{name}', type=int, default=default)
    p.add_argument('--rows', default='start,' + ','.join(ROWS))
    p.add_argument('--speed', action='store_true')
    p.add_argument('--out')
    a = p.parse_args()
    out = Path(a.out or f'results/refine_{"speed" if a.speed else a.size}.json')
    old = json.loads(out.read_text()) if out.exists() else {}
    if a.speed:
        common.set_threads(a.threads)
        return common.save(out, dict(old, **{f'{a.size}': speed(a)}))
    settings = dict(size=a.size, resolution=a.resolution, iters=a.iters)
    if old and old['settings'] != settings:
        raise SystemExit(
            f'{out} holds a table with other settings, {old["settings"]}; give another --out'
        )
    rows = old.get('rows', [])
    done = {(r['row'], r['person'], r['seed']) for r in rows}
    jobs = [
        (r, person, s)
        for s in range(a.seeds)
        for r in a.rows.split(',')
        for person in range(1, a.people + 1)
        if (r, person, s) not in done and (not r.endswith('start') or r == 'grey start' or s == 0)
    ]
    with ProcessPoolExecutor(a.jobs, mp_context=mp.get_context('spawn')) as pool:
        for f in as_completed([pool.submit(run, *j, a) for j in jobs]):
            rows.append(f.result())
            r = rows[-1]
            print(
                (
                    f'{r["row"]:16} person {r["person"]} seed {r["seed"]}: held out '
                    f'{r["held_out"]["psnr"]:.2f}, far {r["far"]["psnr"]:.2f}, aspect {r["far"]["aspect_max"]:.1f}, {r["seconds"]:.0f} s {r["note"]}'
                ),
                flush=True,
            )
            common.save(
                out,
                dict(
                    settings=settings,
                    machine=common.machine(),
                    rows=sorted(rows, key=lambda r: (r['row'], r['person'], r['seed'])),
                ),
            )
    table(rows)


if __name__ == '__main__':
    main()
