"""Where the paper's guards against spikes show in PSNR: near, few frames, a tracker's errors, far.

    python benchmarks/guards.py [--person 3] [--iters 3000] [--seed 0] [--out results/guards.json]

One painted person, 128 x 128 pixels, 64 texels a side. Each row is trained under three conditions
(a clip of 160 frames, eight of them, all with noise on the parameters) and measured on held-out
frames and far views, at the size it was trained on and at four times that ("near": the same
picture painted and rendered at 512). Rows in the output file are not run again.
"""

import argparse
import json
import time
from pathlib import Path

import common  # first: waiting threads shall sleep
import torch
from refine import guarded

from spatialavatar0.avatar.portrait import from_frame
from spatialavatar0.pictures.clips import Clip
from spatialavatar0.pictures.domains import mistracked
from spatialavatar0.pictures.people import make_person, mono_clip, novel_views
from spatialavatar0.stage2.loop import NotFinite, measure, refine
from spatialavatar0.stage2.refine import start_frame

ROWS = {
    'full': {},
    'no freeze': dict(freeze=0),
    'neither': dict(aspect=0.0, spread=99.0, grow=99.0),
}  # neither clamp nor aspect term
VIEWS = 'held out', 'near', 'far', 'far and near'


def stage(options):
    "Clips to learn from, by condition, and clips to be measured on."
    person = make_person(options.person)
    small, large = (mono_clip(person, 200, size, seed=options.person) for size in (128, 512))
    train = small[:160].frames
    dice = torch.Generator().manual_seed(options.seed)
    learn = dict(
        clip=Clip(train),
        few=Clip(train[::20]),
        noise=Clip([mistracked(frame, 3.0, dice) for frame in train]),
    )
    seen = small[160::4], large[160::4], novel_views(person, 128), novel_views(person, 512)
    return learn, {name: Clip(clip.frames) for name, clip in zip(VIEWS, seen)}


def trained(row, start, clip, options):
    "The avatar of a row, and a note where it did not come to its end."
    if row == 'start':
        return start, ''
    config = guarded(**ROWS[row])
    try:
        return refine(start, clip, options.iters, config=config, seed=options.seed)[0], ''
    except NotFinite as e:
        return start, str(e)


def run(condition, row, learn, tests, options):
    "One line of the table."
    clip = learn['clip']
    start = from_frame(clip[start_frame(clip)], 64)
    begun = time.perf_counter()
    avatar, note = trained(row, start, learn[condition], options)
    return dict(
        condition=condition,
        row=row,
        seconds=round(time.perf_counter() - begun, 1),
        note=note,
        **{name: measure(avatar, clip) for name, clip in tests.items()},
    )


def numbers(measured):
    return f'{measured["psnr"]:8.2f}{measured["head_psnr"]:7.2f}{measured["aspect_max"]:7.0f}'


def print_table(rows):
    print('\n' + ' ' * 20 + ''.join(f'{view:>22}' for view in VIEWS))
    print(' ' * 20 + '     PSNR  head  aspect' * len(VIEWS))
    for row in rows:
        values = ''.join(numbers(row[view]) for view in VIEWS)
        print(f'{row["condition"]:8}{row["row"]:12}{values}  {row["note"]}')


def command_line():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in dict(person=3, iters=3000, seed=0).items():
        parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--out', default='results/guards.json')
    return parser.parse_args()


def main():
    options = command_line()
    common.set_threads(1)
    out = Path(options.out)
    old = json.loads(out.read_text()) if out.exists() else {}
    settings = dict(person=options.person, iters=options.iters, seed=options.seed)
    if old and old['settings'] != settings:
        raise SystemExit(
            f'{out} holds a table with other settings, {old["settings"]}; give another --out'
        )
    rows = old.get('rows', [])
    done = {(row['condition'], row['row']) for row in rows}
    learn, tests = stage(options)
    for job in [('clip', 'start'), *((condition, row) for condition in learn for row in ROWS)]:
        if job not in done:
            rows.append(run(*job, learn, tests, options))
            common.save(out, dict(settings=settings, machine=common.machine(), rows=rows))
            print_table(rows[-1:])
    print_table(rows)


if __name__ == '__main__':
    main()
