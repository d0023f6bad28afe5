"""Seconds to tell whether a clip of 2,000 frames at 512 x 512 is still the same: first, and after.

python benchmarks/fingerprint.py             prints a table, writes results/fingerprint.json
python benchmarks/fingerprint.py --frames 200
"""

import argparse
import json
import platform
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from spatialavatar0.ground.core import Timer
from spatialavatar0.pictures.clips import read_vhap, write_vhap
from spatialavatar0.pictures.people import make_person, mono_clip

ROOT = Path(__file__).resolve().parents[1]


def copied(folder, frames):
    "A clip of so many frames: eight painted ones, again and again, each file with other bytes."
    painted = mono_clip(make_person(0), 8, 512)
    write_vhap([replace(frame, time=i) for i, frame in enumerate(painted)], folder)
    path = folder / 'transforms.json'
    top = json.loads(path.read_text())
    first = top['frames']
    top['frames'] = []
    for i in range(frames):
        entry = dict(first[i % 8], timestep_index=i, timestep_index_original=i)
        for name in ('file_path', 'fg_mask_path', 'flame_param_path'):
            source = folder / entry[name]
            goal = source.with_name(f'n{i:05d}{source.suffix}')
            goal.write_bytes(source.read_bytes() + i.to_bytes(4, 'little'))
            entry[name] = str(goal.relative_to(folder))
        top['frames'].append(entry)
    path.write_text(json.dumps(top))


def measure(frames):
    "Seconds of reading the folder, and of its fingerprint three times."
    folder = Path(tempfile.mkdtemp())
    try:
        copied(folder, frames)
        size = sum(path.stat().st_size for path in folder.rglob('n*'))
        time.sleep(2.1)  # younger files are not remembered
        with Timer() as reading:
            clip = read_vhap(folder)
        row = dict(frames=frames, megabytes=round(size / 1e6, 1), read=reading.wall)
        for name in ('first', 'after', 'again'):
            with Timer() as timer:
                found = clip.fingerprint()
            row[name] = timer.wall
            assert found == clip.fingerprint()
    finally:
        shutil.rmtree(folder)
    return row


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--frames', type=int, default=2000)
    row = measure(parser.parse_args().frames)
    print(f'{row["frames"]} frames, {row["megabytes"]} MB')
    for name in ('read', 'first', 'after', 'again'):
        print(f'{name:6} {row[name]:6.2f} s')
    row |= dict(machine=platform.machine(), python=platform.python_version())
    (ROOT / 'results' / 'fingerprint.json').write_text(json.dumps(row, indent=1) + '\n')


if __name__ == '__main__':
    main()
