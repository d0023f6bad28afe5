"""Mutated files for every reader: only an InputError, or a result, may come out.

    python benchmarks/fuzz_readers.py [--count 10000] [--reader ply] [--seed 0]
                                      [--minutes 10] [--out results/fuzz_readers.json]

Sound files are bent by bytes (flips, cuts, splices, repeats) and JSON and text by values, each by
its own seed. What comes out wrong is kept with its seed; `--only SEED` makes that input again.
"""

import argparse
import json
import os
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / 'tests'), str(ROOT / 'tools')]
SLOW = 20  # seconds a reading may take


# ---- bends


def flip(data, dice):
    data = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 4, 16, 64))):
        data[dice.randrange(len(data))] = dice.randrange(256)
    return bytes(data)


def cut(data, dice):
    return data[: dice.randrange(len(data))]


def splice(data, dice):
    "A piece of the file over another piece."
    size = dice.randrange(1, min(len(data), 400) + 1)
    start, goal = dice.randrange(len(data)), dice.randrange(len(data))
    return data[:goal] + data[start : start + size] + data[goal + dice.choice((0, size)) :]


def number(data, dice):
    "A number of 4 or 8 bytes, replaced by an odd one."
    size = dice.choice((4, 8))
    odd = dice.choice((0, -1, 2**31 - 1, -(2**31), 0x7FC00000, 0x7F800000, dice.getrandbits(31)))
    at = dice.randrange(max(1, len(data) - size))
    return data[:at] + odd.to_bytes(size, 'little', signed=odd < 0) + data[at + size :]


def head(data, dice):
    "As flip, but within the first bytes, where a header lies."
    first = min(len(data), 400)
    return flip(data[:first], dice) + data[first:]


ODD = (None, True, -1, 0, 10**30, 1e308, float('nan'), '', 'x', '\x1b[2J', [], {}, [[]], '../../x')


def places(value, at=()):
    "All places in a JSON value."
    yield at
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, item in items:
        yield from places(item, (*at, key))


def put(value, at, new):
    "The value with something else in a place; ... takes it away."
    if not at:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(at) == 1 and new is ...:
        del copy[at[0]]
    else:
        copy[at[0]] = put(copy[at[0]], at[1:], new)
    return copy


def bent_json(data, dice):
    "JSON with one to three of its values replaced, taken away or swapped."
    value = json.loads(data)
    for _ in range(dice.choice((1, 1, 2, 3))):
        at = dice.choice([p for p in places(value) if p] or [()])
        other = dice.choice(list(places(value)))
        moved = value
        for key in other:
            moved = moved[key]
        value = put(value, at, dice.choice((dice.choice(ODD), moved, ...)))
        if not isinstance(value, (dict, list)) or not value:
            break
    return json.dumps(value).encode()


BENDS = flip, flip, cut, splice, number, head


def bent(data, dice, is_json=False):
    "A sound file, bent."
    if is_json and dice.random() < 0.7:
        return bent_json(data, dice)
    return dice.choice(BENDS)(data, dice)


# ---- readers


class Sound:
    "Sound files, each in a folder of its own, and who reads them."

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix='fuzz-'))
        self.found = {}  # name -> (path, file of it that is bent, its reader)

    def add(self, name, make, read, file=None):
        place = self.folder / name
        for part in ('in', 'here', 'out'):
            (place / part).mkdir(parents=True)
        self.found[name] = Path(make(place / 'in')), file, read


def add_ours(sound):
    "Avatars, generators, states, results: what the kit writes."
    import strangers.ours as ours

    for kind in ours.KINDS:
        sound.add(kind, ours.bent(kind), ours.READ[kind])
    report = ours.report('{"landmarks": 1.5, "fps": 25.0, "cuts": [3]}')
    numbers = ours.pipeline._tracking_numbers
    sound.add('results', ours.lines({}, dict(seed=1)), ours.table_of)
    sound.add('tracking.json', report, numbers, 'tracking.json')
    sound.add('manifest', ours.manifest(), ours.load_manifest)


def add_arrays(sound):
    "Pickles, arrays, torch files."
    import strangers.arrays as arrays
    import strangers.splats as splats

    sound.add('FLAME', arrays.flame(), arrays.load_flame)
    sound.add('pickle', arrays.flame(), arrays.read_arrays)
    sound.add('npz', splats.npz(), arrays.read_arrays)
    sound.add('torch file', arrays.FRAMES['a list'][1], arrays.read_checkpoint)


def add_folders(sound):
    "Data sets of the field."
    import strangers.folders as folders

    def whole(name):
        return folders.folder_of(name, folders.unchanged)

    for name, codes in folders.CODES.items():
        sound.add(f'{name}, codes', whole(name), folders.read, codes)
    for name, (file, _) in folders.FORMATS.items():
        if file:
            sound.add(f'{name}, JSON', whole(name), folders.read, file)
    sound.add('a picture of a clip', whole('vhap'), folders.read, 'images/00001_00.png')


def add_pictures(sound):
    "Photos and a film."
    import strangers.pictures as pictures

    for form in ('PNG', 'JPEG', 'GIF', 'TIFF', 'WEBP', 'BMP'):
        photo = pictures.file(f'x.{form.lower()}', pictures.picture(form, (80, 80)))
        sound.add(f'photo {form}', photo, pictures.load_photo)
    sound.add('film', pictures.test_film, pictures.watch)


def add_splats(sound):
    "Splat files, meshes, avatars of others."
    import strangers.splats as splats

    sound.add('ply', splats.file('x.ply', splats.ply()), splats.read_splats)
    sound.add('compressed ply', splats.sound('x.compressed.ply'), splats.read_splats)
    sound.add('splat', splats.file('x.splat', bytes(range(256))), splats.read_splats)
    sound.add('splat npz', splats.npz(), splats.read_splats)
    sound.add('glb', splats.sound('x.glb'), splats.all_tables)
    for file in ('point_cloud.ply', 'flame_param.npz'):
        name = f'GaussianAvatars, {file}'
        sound.add(name, splats.bound(), splats.read_gaussian_avatar, file)


def add_performances(sound):
    "Recordings of faces."
    import strangers.performances as performances

    sound.add('ARKit csv', performances.table(), performances.read_arkit)
    sound.add('ARKit json', performances.weights(), performances.read_arkit)


def readers():
    "Name -> (sound file or folder, file of the folder that is bent, its reader)."
    sound = Sound()
    for add in (add_ours, add_arrays, add_folders, add_pictures, add_splats, add_performances):
        add(sound)
    return sound.found


def wrong_with(name, path, read):
    "How a reading ends that should not; '' if it ends well."
    from strangers.room import wrong_with as wrong_line

    from spatialavatar0.ground.core import InputError

    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            read(path)
            ends = ''
        except InputError as error:
            ends = wrong_line(str(error))
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f'{Path(place.filename).name}:{place.lineno}'
            ends = f'{type(error).__name__} at {where}: {str(error)[:80]}'
    seconds = time.perf_counter() - start
    return ends or (f'{seconds:.1f} s' if seconds > SLOW else '')


def fuzz(name, sound, count, seed, minutes=10, only=None):
    "Count bent files for one reader: a row of the table."
    path, file, read = sound
    target = path / file if file else path
    target = target / target.name if target.is_dir() else target
    data, is_json = target.read_bytes(), target.suffix == '.json'
    bad, begun, done = [], time.perf_counter(), 0
    for i in range(count) if only is None else [only]:
        if time.perf_counter() - begun > 60 * minutes:
            break
        target.write_bytes(bent(data, random.Random(f'{name} {seed} {i}'), is_json))
        if wrong := wrong_with(name, path, read):
            bad.append(dict(seed=i, wrong=wrong))
        done += 1
    target.write_bytes(data)
    seconds = round(time.perf_counter() - begun, 1)
    return dict(reader=name, inputs=done, wrong=len(bad), seconds=seconds, first=bad[:5])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--count', type=int, default=10_000)
    parser.add_argument('--reader')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', type=int)
    parser.add_argument('--minutes', type=float, default=10, help='at most, of one reader')
    parser.add_argument('--out')
    options = parser.parse_args()
    from strangers import room

    room.prepare()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    rows = []
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)
    for name, sound in readers().items():
        if options.reader and options.reader not in name:
            continue
        rows.append(fuzz(name, sound, options.count, options.seed, options.minutes, options.only))
        print(*rows[-1].values(), flush=True)
        if options.out:
            Path(options.out).write_text(json.dumps(rows, indent=1) + '\n')
    return any(row['wrong'] for row in rows)


if __name__ == '__main__':
    sys.exit(main())
