"""Where the seconds of each command go on a processor, and one training step in two ways.

    python benchmarks/waits_cpu.py [--threads 2] [--only step,demo,photo,film,evaluate]
                                   [--frames 72] [--rounds 5] [--out results/waits_cpu.json]

step: the generator's step at batch 4. alone: one thread does it all; split: each operation is
split between the threads, the way of before; hands: the threads share the batch (page 55). They
alternate, best of all rounds. demo: the portrait that comes with scikit-image; photo: a painted
person's picture; film: a painted person who moves, as a film of --frames pictures; evaluate: a
painted clip, warp and network, by all judges that are here.

Every stage twice: seconds on the wall, and of the processor in all threads. On a machine that has
other work only the second can be compared. With --only the rest of the file stays as it is.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import common  # first: waiting threads shall sleep
import numba as nb
import torch
from PIL import Image

import spatialavatar0.capture.film as capture_film
from spatialavatar0 import pipeline
from spatialavatar0.ground.core import set_seed, to_uint8
from spatialavatar0.head.head import open_head
from spatialavatar0.pictures.clips import write_vhap
from spatialavatar0.pictures.domains import mono, people
from spatialavatar0.pictures.people import make_person, mono_clip
from spatialavatar0.stage1.generator import from_preset
from spatialavatar0.stage1.schedule import LAPTOP, laptop_schedule
from spatialavatar0.stage1.trainer import Shelf, Trainer
from spatialavatar0.use.animate import write_film

STAGES = dict(  # functions by the names under which they are called; none calls another
    track_photos='find the face, fit the head',
    film_faces='find faces',
    _track_faces='fit the head',
    _write_clip='mattes, and the clip on the disk',
    from_photos='warp the photo',
    front_psnr='compare with the photo',
    refine_photo='refine',
    write_ply='splat file',
    write_page='page',
    contact_sheet='draw the sheet',
    write_sheet='write the sheet',
    write_films='two films',
    judge_turns='judge turned views',
    parts_of_folder='read the clip',
    _avatar_to_judge='make the avatar',
    _judged='judge',
)


def now():
    return time.perf_counter(), time.process_time()


def since(before):
    return [b - a for a, b in zip(before, now())]


@contextmanager
def stamped():
    "Seconds of the stages while the block runs: name -> [wall, processor]."
    took = defaultdict(lambda: [0.0, 0.0])
    home = {name: pipeline if hasattr(pipeline, name) else capture_film for name in STAGES}
    before = {name: getattr(home[name], name) for name in STAGES}

    def stamp(name):
        def run(*words, **named):
            start = now()
            try:
                return before[name](*words, **named)
            finally:
                took[STAGES[name]] = [a + b for a, b in zip(took[STAGES[name]], since(start))]

        return run

    for name in STAGES:
        setattr(home[name], name, stamp(name))
    try:
        yield took
    finally:
        for name, function in before.items():
            setattr(home[name], name, function)


def command(call):
    "Rows of one command: stage -> wall, processor and share of all that the processor did."
    with stamped() as took:
        start = now()
        call()
        whole = since(start)
    left = [whole[i] - sum(pair[i] for pair in took.values()) for i in (0, 1)]
    rows = {**took, 'all else': left, 'all': whole}
    return {
        name: dict(wall_s=round(wall, 2), cpu_s=round(cpu, 2), share=round(cpu / whole[1], 3))
        for name, (wall, cpu) in rows.items()
    }


def quiet(_):
    pass


def demo(given, work):
    import skimage.data

    photo = skimage.data.astronaut()
    return command(lambda: pipeline.build_avatar(photo, work / 'demo', say=quiet))


def photo(given, work):
    frame = mono_clip(make_person(8), 8, 512, seed=5, background=0.6)[0]
    path = work / 'photo.png'
    Image.fromarray(to_uint8(frame.image)).save(path)
    return command(lambda: pipeline.build_avatar(path, work / 'photo', say=quiet))


def film(given, work):
    clip = mono_clip(make_person(8), given.frames, 320, seed=5, yaw=25.0, background=0.6)
    path = write_film([to_uint8(frame.image) for frame in clip], work / 'film.mp4')
    return command(lambda: pipeline.track_clip(path, work / 'film', say=quiet))


def evaluate(given, work):
    write_vhap(mono_clip(make_person(4), 12, 256), work / 'anna', open_head())

    def both():
        for who in ('warp', 'network'):
            results = work / 'results.jsonl'
            pipeline.evaluate_avatar(who, work / 'anna', 'last:4', results, say=quiet)

    return command(both)


# ---- one training step


def one_step(trainer, batch, hands, threads):
    "Milliseconds of one step: wall, processor."
    common.set_threads(threads)
    trainer.hands = hands
    start = now()
    trainer.backward(batch, LAPTOP)
    torch.nn.utils.clip_grad_norm_(trainer.params, 5.0)
    trainer.opt.step()
    return [1e3 * seconds for seconds in since(start)]


def step(given, work):
    "The step in three ways, alternated."
    n = given.threads
    ways = dict(alone=(1, 1), split=(1, n), hands=(n, n))
    generator = from_preset('laptop')
    data = [Shelf(people(mono(), 12), generator)]
    trainer = Trainer(generator, laptop_schedule(1000, 0, 4, LAPTOP), data)
    trainer.run(4, show=False)
    batch, best = trainer.draw(), {}
    for _ in range(3 * given.rounds):
        for name, how in ways.items():
            ms = one_step(trainer, batch, *how)
            best[name] = [min(pair) for pair in zip(ms, best.get(name, ms))]
    common.set_threads(n)
    return {name: dict(wall_ms=round(a, 1), cpu_ms=round(b, 1)) for name, (a, b) in best.items()}


WHAT = dict(step=step, demo=demo, photo=photo, film=film, evaluate=evaluate)


def tell(name, rows):
    "A table of one command."
    columns = list(next(iter(rows.values())))
    print(f'\n{name:30}' + ''.join(f'{column:>10}' for column in columns))
    for stage, row in rows.items():
        print(f'  {stage:28}' + ''.join(f'{value:>10}' for value in row.values()), flush=True)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument('--threads', type=int, default=min(2, nb.config.NUMBA_NUM_THREADS))
    parser.add_argument('--only', default=','.join(WHAT))
    parser.add_argument('--frames', type=int, default=72)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--out', type=Path, default=Path('results/waits_cpu.json'))
    given = parser.parse_args()
    common.set_threads(given.threads)
    torch.set_flush_denormal(True)
    out = json.loads(given.out.read_text())['commands'] if given.out.exists() else {}
    for name in given.only.split(','):
        set_seed(0)
        with tempfile.TemporaryDirectory() as work:
            out[name] = WHAT[name](given, Path(work))
        tell(name, out[name])
        ordered = {name: out[name] for name in WHAT if name in out}
        common.save(given.out, dict(machine=common.machine(), commands=ordered))


if __name__ == '__main__':
    main()
