"""Stage 2: quality against seconds, configurations paired by person, seed and kind of clip.

    python benchmarks/curve.py [--rows ours,fast,quick] [--kinds clean,tracked] [--people 3]
        [--seeds 3] [--size 256] [--jobs 1] [--threads 1] [--out results/curve_256.json]

Each painted person is filmed for 200 frames by one camera; the last fifth is held out, and so are
twelve views from the far sides. `tracked`: the poses of the frames to learn from have a tracker's
errors. All rows of a person begin with the same one-picture avatar; the clock runs in steps only
(CPU time of the process), not in measurements. Rows in the output file are not run again. At the
end: differences to the first row, paired, with 95 % intervals by Student's t.
"""

import argparse
import json
import multiprocessing as mp
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import common  # first: waiting threads shall sleep
import torch

from spatialavatar0.avatar.portrait import from_frame
from spatialavatar0.judge.reproduce import interval
from spatialavatar0.pictures.clips import Clip, on_background, split
from spatialavatar0.pictures.domains import mistracked
from spatialavatar0.pictures.fast_metrics import open_lpips
from spatialavatar0.pictures.people import make_person, mono_clip, novel_views
from spatialavatar0.stage2.loop import Refinement, calm, measure
from spatialavatar0.stage2.refine import RefineConfig, fast_config, quick_config, start_frame

TEXELS = {64: 32, 128: 64, 256: 128, 512: 256}  # per side of the UV grid, by pixels
MARKS = 0, 250, 500, 1000, 2500, 5000, 10_000  # steps after which a run is measured
ROWS = dict(
    ours=RefineConfig(),
    fast=fast_config(),
    quick=quick_config(),
    short=RefineConfig(iters=5_000),
    brief=RefineConfig(iters=2_500),
    exact=fast_config(windows=1, margin=None),
    l1=fast_config(huber=0.0),
    calmer=fast_config(huber=0.05),
    falling=fast_config(beta2=0.999, lr_end=0.0125),
)


def stage(person, kind, seed, size):
    "What is learned from, what is held out, far views, and the avatar to begin with."
    painted = make_person(person)
    train, test = split(mono_clip(painted, 200, size, seed=person))
    frames = train.frames
    start = from_frame(frames[start_frame(train)], TEXELS[size])
    if kind == 'tracked':
        dice = torch.Generator().manual_seed(seed)
        frames = [mistracked(frame, 3.0, dice) for frame in frames]
    return Clip(frames), Clip(test.frames), Clip(novel_views(painted, size).frames), start


def perceived(avatar, clip, lpips):
    "Mean LPIPS on white; None without its weights."
    if lpips is None:
        return None
    scores = []
    with torch.no_grad():
        for frame in clip[::2]:
            camera = frame.viewmat, frame.K, frame.width, frame.height
            rgb = avatar.render(*camera, background=1.0, **frame.pose)[0].clamp(0, 1)
            scores.append(float(lpips(rgb, on_background(frame, 1.0))))
    return sum(scores) / len(scores)


def run(job, options):
    "A row of a person: what was measured at each mark."
    name, kind, person, seed = job
    common.set_threads(options.threads)
    config = ROWS[name]
    train, test, far, start = stage(person, kind, seed, options.size)
    refinement = Refinement(start, train, config, config.iters, seed)
    lpips = open_lpips()
    marks, seconds = [], 0.0
    with calm(options.size**2):
        for step in range(config.iters + 1):
            if step in MARKS or step == config.iters:
                avatar = refinement.result()
                scores = dict(held_out=measure(avatar, test), far=measure(avatar, far))
                if step == config.iters:
                    scores['lpips'] = perceived(avatar, test, lpips)
                marks.append(dict(step=step, seconds=round(seconds, 2), **scores))
            if step < config.iters:
                begun = time.process_time()
                refinement.step()
                seconds += time.process_time() - begun
    about = dict(row=name, kind=kind, person=person, seed=seed, gaussians=len(start))
    receipt = common.receipt(train, test, far)
    return dict(about, seconds=round(seconds, 1), marks=marks, **receipt)


QUANTITIES = dict(
    psnr=lambda end: end['held_out']['psnr'],
    ssim=lambda end: end['held_out']['ssim'],
    lpips=lambda end: end.get('lpips'),
    far=lambda end: end['far']['psnr'],
    longest=lambda end: max(end['held_out']['aspect_max'], end['far']['aspect_max']),
)


def ends_of(rows, name, kind):
    "person, seed -> the last measurement, of one row and kind of clip."
    here = [r for r in rows if r['row'] == name and r['kind'] == kind]
    return {(r['person'], r['seed']): r for r in here}


def print_row(name, found, base):
    "Means of a row, and its differences to the first one."
    ends = {key: r['marks'][-1] for key, r in found.items()}
    seconds = sum(r['seconds'] for r in found.values()) / len(found)
    print(f'{name:8}{len(found):4}{seconds:8.0f} s', end='')
    for quantity, take in QUANTITIES.items():
        values = [take(end) for end in ends.values()]
        if None in values or None in [take(r['marks'][-1]) for r in base.values()]:
            continue  # LPIPS, where its weights were not there
        worst = max if quantity == 'longest' else lambda x: sum(x) / len(x)
        print(f'  {quantity} {worst(values):.4g}', end='')
        pairs = [
            take(end) - take(base[key]['marks'][-1]) for key, end in ends.items() if key in base
        ]
        if pairs and found is not base:
            print(' ({:+.3g} ± {:.2g})'.format(*interval(pairs)), end='')
    print()


def print_tables(rows, options):
    names = options.rows.split(',')
    for kind in options.kinds.split(','):
        base = ends_of(rows, names[0], kind)
        print(
            f'\n{kind}, {options.size} x {options.size}: mean, and paired difference to {names[0]}'
        )
        for name in names:
            found = base if name == names[0] else ends_of(rows, name, kind)
            if found:
                print_row(name, found, base)


def jobs_left(rows, options):
    "Row, kind, person and seed of what is not in the file."
    done = {(r['row'], r['kind'], r['person'], r['seed']) for r in rows}
    wanted = [
        (name, kind, person, seed)
        for seed in range(options.seeds)
        for person in range(1, options.people + 1)
        for kind in options.kinds.split(',')
        for name in options.rows.split(',')
    ]
    return [job for job in wanted if job not in done]


def command_line():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in dict(people=3, seeds=3, size=256, jobs=1, threads=1).items():
        parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--rows', default='ours,fast,quick')
    parser.add_argument('--kinds', default='clean,tracked')
    parser.add_argument('--out')
    return parser.parse_args()


def main():
    options = command_line()
    out = Path(options.out or f'results/curve_{options.size}.json')
    rows = json.loads(out.read_text())['rows'] if out.exists() else []
    with ProcessPoolExecutor(options.jobs, mp_context=mp.get_context('spawn')) as pool:
        for done in as_completed(
            pool.submit(run, job, options) for job in jobs_left(rows, options)
        ):
            rows.append(done.result())
            end = rows[-1]['marks'][-1]
            told = {k: rows[-1][k] for k in ('row', 'kind', 'person', 'seed', 'seconds')}
            print(json.dumps(dict(told, psnr=round(end['held_out']['psnr'], 2))), flush=True)
            rows.sort(key=lambda r: (r['row'], r['kind'], r['person'], r['seed']))
            common.save(out, dict(size=options.size, machine=common.machine(), rows=rows))
    print_tables(rows, options)


if __name__ == '__main__':
    main()
