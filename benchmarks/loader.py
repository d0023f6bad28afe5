"""How long a training step waits for its pictures: from memory, from a cold disk, drawn ahead.

    python benchmarks/loader.py [--steps 40] [--preset laptop] [--out results/loader.json]

The same steps, in turns, by trainers of the same seed. Before each step of a cold arm the system is
told to forget the file of prepared pictures, so that every picture comes from the disk, as in a
data set that is larger than memory.
"""

import argparse
import mmap
import os
import random
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import common  # first: waiting threads shall sleep
import torch

from spatialavatar0.pictures.domains import mono, people
from spatialavatar0.stage1.generator import from_preset
from spatialavatar0.stage1.schedule import laptop_schedule
from spatialavatar0.stage1.trainer import Shelf, Trainer

ARMS = {  # cold disk?, batches drawn ahead
    'memory': (None, 0),
    'warm disk': (False, 2),
    'cold disk': (True, 0),
    'cold disk, 2 ahead': (True, 2),
}


def forget(shelf):
    "Let the system drop what it holds of a shelf's file."
    shelf.records._mmap.madvise(mmap.MADV_DONTNEED)
    with open(shelf.records.filename, 'rb') as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def trainers_of(preset, steps, crowd, folder):
    "A trainer per arm; all would take the same steps."
    made = {}
    for number, (arm, (cold, ahead)) in enumerate(ARMS.items()):
        generator = from_preset(preset, seed=0)
        own = None if cold is None else folder / str(number)  # pages that others map stay
        shelf = Shelf(crowd, generator, own)
        phases = laptop_schedule(steps, 0, 4)
        made[arm] = Trainer(generator, phases, [shelf], seed=0, ahead=ahead)
    return made


def reading(shelf, looks=100):
    "Megabytes a second of reading alone: warm and cold, one after another and by four threads."
    rng = random.Random(0)
    people = [rng.randrange(len(shelf)) for _ in range(looks)]
    places = [(person, rng.randrange(shelf.counts[person])) for person in people]
    found = {}
    with ThreadPoolExecutor(4) as pool:
        for name, read in dict(serial=map, four=pool.map).items():
            for cold in (False, True):
                if cold:
                    forget(shelf)
                begun = time.perf_counter()
                list(read(lambda place: shelf.look(*place), places))
                seconds = time.perf_counter() - begun
                rate = looks * shelf.records.itemsize / seconds / 1e6
                found[f'{"cold" if cold else "warm"}, {name}'] = round(rate)
    return found


def measure(given, folder):
    "Median milliseconds of a step of each arm; bytes of a look; what reading alone reaches."
    crowd = people(mono(from_preset(given.preset).config.image_size, instants=16), given.people)
    trainers = trainers_of(given.preset, given.steps + 5, crowd, folder)
    times = {arm: [] for arm in trainers}
    for step in range(given.steps + 5):
        for arm, trainer in trainers.items():
            if ARMS[arm][0]:
                forget(trainer.shelves[0])
            begun = time.perf_counter()
            trainer.step()
            if step >= 5:
                times[arm].append(1e3 * (time.perf_counter() - begun))
    shelf = trainers['cold disk'].shelves[0]
    medians = {arm: statistics.median(rows) for arm, rows in times.items()}
    return medians, shelf.records.itemsize, reading(shelf)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--steps', type=int, default=40)
    parser.add_argument('--people', type=int, default=24)
    parser.add_argument('--preset', default='laptop')
    parser.add_argument('--out', default='results/loader.json')
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir='.') as folder:
        found, record, read = measure(given, Path(folder) / 'looks')
    for arm, ms in found.items():
        print(f'{arm:20} {ms:8.1f} ms a step, {ms / found["memory"]:.3f} of memory')
    for how, rate in read.items():
        print(f'reading alone, {how:12} {rate:6} MB a second')
    settings = dict(vars(given), batch=4, look_kilobytes=round(record / 1e3))
    rows = {arm: round(ms, 1) for arm, ms in found.items()}
    common.save(
        given.out, dict(machine=common.machine(), settings=settings, step_ms=rows, read=read)
    )


if __name__ == '__main__':
    main()
