"""Stage 2 measured: the paper's guards one by one, the remedy, and adaptive densification.

    python benchmarks/refine.py [--people 3] [--seeds 3] [--size 128] [--resolution 64]
        [--iters 10000] [--rows full,remedy] [--jobs 2] [--out results/refine_128.json]
    python benchmarks/refine.py --speed [--size 256] [--resolution 128] [--whole]
        [--out results/refine_speed.json]

Each painted person is filmed for 200 frames by one camera; the last fifth is held out, and so are
twelve views from the far sides. Rows of a person start from the same one-picture avatar (row
start), but for the grey start and those named "generator": these start from what the shipped
network makes of four frames (row D of the paper is "generator full"). Rows that are in the output
file already are not run again, so an interrupted table goes on where it was.

--speed: milliseconds of a step, from a hundred; with --whole the minutes of all --iters steps,
every one of them made.
"""

import argparse
import json
import math
import multiprocessing as mp
import re
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import common  # first: waiting threads shall sleep
import torch

from spatialavatar0.avatar.avatar import new_avatar, open_splats
from spatialavatar0.avatar.portrait import from_frame
from spatialavatar0.ground.core import progress
from spatialavatar0.pictures.clips import Clip, split, write_vhap
from spatialavatar0.pictures.formats import load_clip
from spatialavatar0.pictures.people import make_person, mono_clip, novel_views
from spatialavatar0.splats.renderers import rasterize
from spatialavatar0.stage1.generator import from_pretrained
from spatialavatar0.stage2.densify import densify
from spatialavatar0.stage2.loop import (
    NotFinite,
    Refinement,
    calm,
    fast_photo_loss,
    measure,
    refine,
)
from spatialavatar0.stage2.refine import RefineConfig, paper_config, start_frame


def guarded(**changes):
    "The paper's guards and our bounds: a clamp around each start, colours from black to white."
    return RefineConfig(**{**dict(keep=0.0), **changes})


NONE = dict(spread=99.0, grow=99.0)
ROWS = {
    'full': guarded(),
    'remedy': RefineConfig(),
    'no freeze': guarded(freeze=0),
    'no clamp': guarded(**NONE),
    'no aspect': guarded(aspect=0.0),
    'neither': guarded(aspect=0.0, **NONE),
    'grey start': guarded(),
    'densification': None,
    'generator start': None,
    'generator full': guarded(),
    'generator remedy': RefineConfig(),
    'printed': paper_config(),
    'matte behind': paper_config(matte_behind=True),
}


def stage(person, options):
    "Train, held-out and far views of a person, held in memory, and the one-picture avatar."
    painted = make_person(person)
    train, test = split(mono_clip(painted, 200, options.size, seed=person))
    novel = novel_views(painted, options.size)
    train, test, novel = [Clip(c.frames) for c in (train, test, novel)]
    return train, test, novel, from_frame(train[start_frame(train)], options.resolution)


def generated(train, resolution):
    "What the shipped network makes of four frames of a clip, evenly apart."
    network = from_pretrained('toy')
    texels = network.config.resolution
    if texels != resolution:
        raise SystemExit(
            f'the shipped network makes avatars of {texels} x {texels} texels; the rows that start '
            f'from it need --resolution {texels}'
        )
    return network([train[i * len(train) // 4] for i in range(4)])


def start_of(row, avatar, train, options):
    "The avatar a row starts from."
    if row == 'grey start':
        return new_avatar(avatar.head, options.resolution, avatar.shape)
    if row.startswith('generator'):
        return generated(train, options.resolution)
    return avatar


def trained(row, avatar, train, seed, options):
    "The avatar a row ends with, and a note where it did not come to its end."
    try:
        if row == 'densification':
            return densify(avatar, train, options.iters, seed=seed)[0], ''
        if ROWS.get(row):
            return refine(avatar, train, options.iters, config=ROWS[row], seed=seed)[0], ''
    except NotFinite as e:
        return avatar, str(e)  # without the clamp a run may end like this: then that is the result
    return avatar, ''


def solid_aspects(avatar):
    "Ratio of the longest to the shortest axis in space: the largest, and 99.9 % of all."
    scales = avatar.splats['log_scales']
    ratios = (scales.amax(-1) - scales.amin(-1)).exp().sort().values
    place = int(0.999 * (len(ratios) - 1))
    return dict(aspect3d_max=float(ratios[-1]), aspect3d_999=float(ratios[place]))


def run(row, person, seed, options):
    "One line of the table."
    common.set_threads(1)
    train, test, novel, avatar = stage(person, options)
    begun = time.perf_counter()
    avatar = start_of(row, avatar, train, options)
    avatar, note = trained(row, avatar, train, seed, options)
    seconds = time.perf_counter() - begun
    return dict(
        row=row,
        person=person,
        seed=seed,
        gaussians=len(avatar),
        seconds=round(seconds, 1),
        held_out=measure(avatar, test),
        far=measure(avatar, novel),
        note=note,
        **solid_aspects(avatar),
        **common.receipt(train, test, novel),
    )


def mean(values):
    return sum(values) / len(values)


def table_row(name, rows):
    "Means over people and seeds; worst aspect ratios."
    held_out, far = [[row[part] for row in rows] for part in ('held_out', 'far')]
    pairs = list(zip(held_out, far))
    psnr, head, similar = [mean([m[k] for m in held_out]) for k in ('psnr', 'head_psnr', 'ssim')]
    far_psnr, far_head = [mean([m[k] for m in far]) for k in ('psnr', 'head_psnr')]
    worst = max(max(m['aspect_max'] for m in pair) for pair in pairs)
    tail = mean([max(m['aspect_999'] for m in pair) for pair in pairs])
    solid = max(row['aspect3d_max'] for row in rows)
    count, seconds = [mean([row[k] for row in rows]) for k in ('gaussians', 'seconds')]
    return (
        f'{name:16}{len(rows):4}{psnr:17.2f}{head:7.2f}{similar:8.4f}{far_psnr:12.2f}'
        f'{far_head:7.2f}{worst:21.1f}{tail:8.1f}{solid:9.1f}{count:12.0f}{seconds:10.0f}'
    )


def print_table(rows):
    print(
        f'\n{"":15} runs   held out: PSNR   head    SSIM   far: PSNR   head   screen aspect: max  '
        ' 99.9%   3D max   Gaussians   seconds'
    )
    for name in ('start', *ROWS):
        if found := [row for row in rows if row['row'] == name]:
            print(table_row(name, found))


def kernels(refinement, i):
    "Calls of the rasterizer and of the photometric terms, forward and backward, on picture i."
    view = refinement.view(i)
    background = torch.rand(3)
    opened = open_splats(refinement.splats(), view.mesh)
    world = [x.detach().requires_grad_() for x in opened]
    camera = view.viewmat[None], view.K[None], view.width, view.height
    target = view.on(background)
    picture = target.clone().requires_grad_()

    def render():
        image, _, _ = rasterize(*world, *camera, backgrounds=background[None])
        image.sum().backward()

    return render, lambda: fast_photo_loss(picture, target, refinement.cfg).backward()


def milliseconds(call):
    begun = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begun)


def film(folder, size):
    """Write a painted clip as a folder, in a process of its own: a painter's memory is not a
    refinement's."""
    write_vhap(mono_clip(make_person(3), 200, size), folder)


def filmed_refinement(options):
    "A refinement on a clip from disk, all its pictures looked at once."
    with tempfile.TemporaryDirectory() as folder:
        with ProcessPoolExecutor(1, mp_context=mp.get_context('spawn')) as pool:
            pool.submit(film, folder, options.size).result()
        train = load_clip(folder, split='train')
        start = from_frame(train[start_frame(train)], options.resolution)
        config = RefineConfig(freeze=0, aspect_from=0)
        refinement = Refinement(start, train, config, options.iters)
        for i in range(len(train)):
            refinement.view(i)
    return refinement


def speed(options, steps=100):
    """Milliseconds per step and what they are spent on, with the threads given: medians over steps,
    each followed by its kernels alone."""
    refinement = filmed_refinement(options)
    frames = len(refinement.clip)
    with calm(options.size**2):
        for _ in range(5):
            refinement.step()
        times = [
            [milliseconds(call) for call in (refinement.step, *kernels(refinement, i % frames))]
            for i in range(steps)
        ]
    step, raster, photometric = torch.tensor(times).median(0).values.tolist()
    out = dict(
        size=options.size,
        gaussians=len(refinement.avatar),
        step_ms=round(step, 2),
        raster_ms=round(raster, 2),
        loss_ms=round(photometric, 2),
        other_ms=round(step - raster - photometric, 2),
        minutes_10k=round(step / 6, 2),
        memory_mb=round(peak_mb()),
        machine=common.machine(),
    )
    print(json.dumps({k: v for k, v in out.items() if k != 'machine'}))
    return out


def whole(options):
    "Minutes on the wall of all steps, really made."
    refinement = filmed_refinement(options)
    begun = time.perf_counter()
    with calm(options.size**2):
        for _ in progress(options.iters, 'refine'):
            refinement.step()
    out = dict(
        size=options.size,
        gaussians=len(refinement.avatar),
        steps=refinement.step_number,
        minutes=round((time.perf_counter() - begun) / 60, 2),
        memory_mb=round(peak_mb()),
        machine=common.machine(),
    )
    print(json.dumps({k: v for k, v in out.items() if k != 'machine'}))
    return out


def peak_mb():
    "Largest resident memory of this process so far, megabytes."
    try:
        status = Path('/proc/self/status').read_text()
    except OSError:
        return math.nan
    return int(re.search(r'VmHWM:\s+(\d+)', status)[1]) / 1e3


def command_line():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = dict(people=3, seeds=3, size=128, resolution=64, iters=10_000, jobs=1, threads=2)
    for name, default in numbers.items():
        parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--rows', default='start,' + ','.join(ROWS))
    parser.add_argument('--speed', action='store_true')
    parser.add_argument('--whole', action='store_true')
    parser.add_argument('--out')
    return parser.parse_args()


def is_needed(row, seed):
    "A start that is not trained is the same for every seed."
    return row == 'grey start' or not row.endswith('start') or seed == 0


def jobs_left(rows, options):
    "Row, person and seed of what is not in the table yet."
    done = {(r['row'], r['person'], r['seed']) for r in rows}
    wanted = [
        (row, person, seed)
        for seed in range(options.seeds)
        for row in options.rows.split(',')
        for person in range(1, options.people + 1)
        if is_needed(row, seed)
    ]
    return [job for job in wanted if job not in done]


def print_result(r):
    print(
        f'{r["row"]:16} person {r["person"]} seed {r["seed"]}: '
        f'held out {r["held_out"]["psnr"]:.2f}, far {r["far"]["psnr"]:.2f}, '
        f'aspect {r["far"]["aspect_max"]:.1f}, {r["seconds"]:.0f} s {r["note"]}',
        flush=True,
    )


def fill_table(out, old, options):
    "Run what is missing, and save the table after every run."
    settings = dict(size=options.size, resolution=options.resolution, iters=options.iters)
    if old and old['settings'] != settings:
        raise SystemExit(
            f'{out} holds a table with other settings, {old["settings"]}; give another --out'
        )
    rows = old.get('rows', [])
    with ProcessPoolExecutor(options.jobs, mp_context=mp.get_context('spawn')) as pool:
        runs = [pool.submit(run, *job, options) for job in jobs_left(rows, options)]
        for done in as_completed(runs):
            rows.append(done.result())
            print_result(rows[-1])
            ordered = sorted(rows, key=lambda r: (r['row'], r['person'], r['seed']))
            common.save(out, dict(settings=settings, machine=common.machine(), rows=ordered))
    print_table(rows)


def main():
    options = command_line()
    out = Path(options.out or f'results/refine_{"speed" if options.speed else options.size}.json')
    old = json.loads(out.read_text()) if out.exists() else {}
    if options.speed:
        common.set_threads(options.threads)
        measured, name = (whole, ' whole') if options.whole else (speed, '')
        common.save(out, {**old, f'{options.size}{name}': measured(options)})
    else:
        fill_table(out, old, options)


if __name__ == '__main__':
    main()
