"""Under which conditions each guard of Stage 2 pays: one dial at a time, new people, paired seeds.

    python benchmarks/dials.py [--people 4,5,6] [--seeds 3] [--jobs 1] [--out results/dials.json]

Each painted person is filmed for 200 frames, 128 x 128 pixels, and learned from the first 160 for
1,500 steps, with all guards of the paper (Tab. 9) and with one left out. Measured on held-out
frames as they were trained (x1), painted and drawn at two and four times the size (x2, x4), and
on twelve views from far sides. Lines in the output file are not made again.
"""

import argparse
import multiprocessing as mp
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import common  # first: waiting threads shall sleep
import torch
from refine import solid_aspects

from spatialavatar0.avatar.portrait import from_frame
from spatialavatar0.judge.dials import SETTINGS, towards_grey
from spatialavatar0.pictures.clips import Clip, split
from spatialavatar0.pictures.domains import mistracked
from spatialavatar0.pictures.people import make_person, mono_clip, novel_views
from spatialavatar0.stage2.loop import NotFinite, measure, refine
from spatialavatar0.stage2.refine import start_frame

SIZE, TEXELS, STEPS = 128, 64, 1500


@lru_cache(1)
def stage(person):
    "A clip to learn from, the avatar of one of its frames, and clips to be measured on."
    painted = make_person(person)
    films = [mono_clip(painted, 200, zoom * SIZE, seed=person) for zoom in (1, 2, 4)]
    train = split(films[0])[0]
    held_out = [split(film)[1][::step] for film, step in zip(films, (2, 5, 5))]
    tests = dict(zip(('x1', 'x2', 'x4'), held_out), far=novel_views(painted, SIZE))
    receipt = common.receipt(train, *tests.values())
    tests = {name: Clip(clip.frames) for name, clip in tests.items()}
    start = from_frame(train[start_frame(train)], TEXELS)
    return Clip(train.frames), start, tests, receipt


def with_errors(clip, noise, seed):
    "The clip as a tracker hands it out."
    if not noise:
        return clip
    rng = torch.Generator().manual_seed(seed)
    return Clip([mistracked(frame, noise, rng) for frame in clip])


def run(job):
    "A line: one person, one seed, one setting."
    setting, person, seed = job
    common.set_threads(1)
    train, start, tests, receipt = stage(person)
    begun, note = time.perf_counter(), ''
    avatar = towards_grey(start, setting.start)
    clip = with_errors(train, setting.noise, seed)
    try:
        avatar = refine(avatar, clip, config=setting.config(STEPS), seed=seed)[0]
    except NotFinite as error:  # without a guard a run may end like this: then that is the result
        note = str(error)
    return dict(
        **asdict(setting),
        person=person,
        seed=seed,
        seconds=round(time.perf_counter() - begun, 1),
        note=note,
        **{name: measure(avatar, frames) for name, frames in tests.items()},
        **solid_aspects(avatar),
        **receipt,
    )


def jobs_left(rows, options):
    "Settings, people and seeds that are not in the file."
    names = 'without', 'start', 'rate', 'noise', 'person', 'seed'
    done = {tuple(row[name] for name in names) for row in rows}
    people = map(int, options.people.split(','))
    wanted = [
        (setting, person, seed)
        for person in people
        for seed in range(options.seeds)
        for setting in SETTINGS
    ]
    return [job for job in wanted if (*asdict(job[0]).values(), *job[1:]) not in done]


def command_line():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--people', default='4,5,6')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--jobs', type=int, default=1)
    parser.add_argument('--out', default='results/dials.json')
    return parser.parse_args()


def told(row):
    "A line for the screen."
    scores = '  '.join(f'{name} {row[name]["psnr"]:.2f}' for name in ('x1', 'x2', 'x4', 'far'))
    where = f'start {row["start"]:g} rate {row["rate"]:g} noise {row["noise"]:g}'
    who = f'person {row["person"]} seed {row["seed"]}'
    return f'{who} {where} without {row["without"] or "nothing":8} {scores} {row["note"]}'


def main():
    options = command_line()
    out = Path(options.out)
    settings = dict(size=SIZE, texels=TEXELS, steps=STEPS)
    rows = common.lines_of(out, settings)
    with ProcessPoolExecutor(options.jobs, mp_context=mp.get_context('spawn')) as pool:
        runs = [pool.submit(run, job) for job in jobs_left(rows, options)]
        for done in as_completed(runs):
            rows.append(done.result())
            print(told(rows[-1]), flush=True)
            common.save(out, dict(settings=settings, machine=common.machine(), rows=rows))


if __name__ == '__main__':
    main()
