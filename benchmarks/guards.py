"""Where the paper's guards against spikes show in PSNR: from near, with few frames, with a tracker's errors, from the far sides.

    python benchmarks/guards.py [--person 3] [--iters 3000] [--seed 0] [--out results/guards.json]

One painted person, 128 x 128 pixels, 64 texels a side. Each row is trained under three conditions (a clip of 160 frames, eight of
them, all with noise on the parameters) and measured on held-out frames and far views, at the size it was trained on and at four
times that ("near": the same picture painted and rendered at 512). Rows in the output file are not run again.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import common  # first: waiting threads shall sleep
import torch

from spatialavatar0.avatar.portrait import from_frame
from spatialavatar0.pictures.clips import Clip
from spatialavatar0.pictures.domains import TRACKING
from spatialavatar0.pictures.people import make_person, mono_clip, novel_views
from spatialavatar0.stage2.loop import NotFinite, measure, refine
from spatialavatar0.stage2.refine import paper_config, start_frame

ROWS = {
    'full': {},
    'no freeze': dict(freeze=0),
    'neither': dict(aspect=0.0, spread=99.0, grow=99.0),
}  # neither clamp nor aspect term
VIEWS = 'held out', 'near', 'far', 'far and near'


def noisy(frame, g):
    "The frame with a bad tracker's errors in its parameters."
    return replace(
        frame,
        params={
            k: v if k == 'shape' else v + 3 * TRACKING[k] * torch.randn(v.shape, generator=g)
            for k, v in frame.params.items()
        },
    )


def stage(a):
    "Clips to learn from, by condition, and clips to be measured on."
    p = make_person(a.person)
    small, large = (mono_clip(p, 200, s, seed=a.person) for s in (128, 512))
    train = small[:160].frames
    g = torch.Generator().manual_seed(a.seed)
    learn = dict(clip=Clip(train), few=Clip(train[::20]), noise=Clip([noisy(f, g) for f in train]))
    return learn, dict(
        zip(
            VIEWS,
            (
                Clip(c.frames)
                for c in (small[160::4], large[160::4], novel_views(p, 128), novel_views(p, 512))
            ),
        )
    )


def run(condition, row, learn, tests, a):
    "One line of the table."
    clip = learn[condition]
    start = from_frame(learn['clip'][start_frame(learn['clip'])], 64)
    t = time.perf_counter()
    note = ''
    try:
        start, _ = (
            refine(start, clip, a.iters, config=paper_config(**ROWS[row]), seed=a.seed)
            if row != 'start'
            else (start, None)
        )
    except NotFinite as e:
        note = str(e)
    return dict(
        condition=condition,
        row=row,
        seconds=round(time.perf_counter() - t, 1),
        note=note,
        **{k: measure(start, c) for k, c in tests.items()},
    )


def table(rows):
    print(
        f'\n{"":20}'
        + ''.join(f'{v:>22}' for v in VIEWS)
        + '\n'
        + ' ' * 20
        + '     PSNR  head  aspect' * len(VIEWS)
    )
    for r in rows:
        print(
            f'{r["condition"]:8}{r["row"]:12}'
            + ''.join(
                f'{r[v]["psnr"]:8.2f}{r[v]["head_psnr"]:7.2f}{r[v]["aspect_max"]:7.0f}'
                for v in VIEWS
            )
            + f'  {r["note"]}'
        )


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in dict(person=3, iters=3000, seed=0).items():
        p.add_argument(f'--{name}', type=int, default=default)
    p.add_argument('--out', default='results/guards.json')
    a = p.parse_args()
    common.set_threads(1)
    out = Path(a.out)
    old = json.loads(out.read_text()) if out.exists() else {}
    settings = dict(person=a.person, iters=a.iters, seed=a.seed)
    if old and old['settings'] != settings:
        raise SystemExit(
            f'{out} holds a table with other settings, {old["settings"]}; give another --out'
        )
    rows = old.get('rows', [])
    done = {(r['condition'], r['row']) for r in rows}
    learn, tests = stage(a)
    for c, r in (('clip', 'start'), *((c, r) for c in learn for r in ROWS)):
        if (c, r) in done:
            continue
        rows.append(run(c, r, learn, tests, a))
        common.save(out, dict(settings=settings, machine=common.machine(), rows=rows))
        table(rows[-1:])
    table(rows)


if __name__ == '__main__':
    main()
