"""One picture in, true side views out: five painted people, whose every view is known.

    python benchmarks/photo.py [--people 5] [--size 256] [--resolution 128] [--iters 200]
                               [--track] [--out results/photo.json]

Each person is seen once from the front, with the true camera and head parameters (--track: with
those the tracker finds), made into an avatar, refined, and rendered from the sides. PSNR is over
the whole picture on white; head: inside the true matte.
"""

import argparse
import json
import os
import platform
import time
from dataclasses import replace
from typing import NamedTuple

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
import torch

from spatialavatar0.avatar.portrait import from_frame
from spatialavatar0.capture.photo import front_psnr, refine_photo
from spatialavatar0.ground.core import atomic_path, set_seed
from spatialavatar0.ground.geometry import intrinsics, orbit
from spatialavatar0.pictures.clips import on_background
from spatialavatar0.pictures.metrics import psnr
from spatialavatar0.pictures.people import make_person, paint
from spatialavatar0.stage2.loop import screen_aspect
from spatialavatar0.use.animate import turn

YAWS = (0, -25, 25, -45, 45)
CENTER = (0.0, 0.0, -0.02)


class SideViews(NamedTuple):
    "An avatar against the truth."

    whole: dict  # yaw -> PSNR over the picture, dB
    head: dict  # yaw -> PSNR inside the true matte, dB
    aspect: float  # the longest of a thousand splats on the screen: ratio of its axes


def side_views(avatar, person, K, size, viewmat):
    "From every side; `viewmat` is the camera the avatar was made with, turned about the head."
    whole, head, ratios = {}, {}, []
    for yaw in YAWS:
        painted = paint(person, orbit(yaw, 0, 0.7, CENTER), K, size)
        turned = turn(viewmat, yaw, 0, CENTER)
        with torch.no_grad():
            rgb = avatar.render(turned, K, size, size, background=1.0)[0].clamp(0, 1)
            ratios.append(screen_aspect(avatar, turned, K, size, size))
        truth = on_background(painted, 1.0)
        whole[yaw] = float(psnr(rgb, truth))
        head[yaw] = float(psnr(rgb, truth, mask=painted.mask > 0.5))
    return SideViews(whole, head, float(torch.quantile(torch.cat(ratios), 0.999)))


def rounded(scores):
    return {str(yaw): round(score, 2) for yaw, score in scores.items()}


def one(seed, settings):
    "A row of the table."
    set_seed(0)
    person = make_person(seed)
    size = settings.size
    K = intrinsics(2.0 * size, size, size)
    frame = paint(person, orbit(0, 0, 0.7, CENTER), K, size)
    if settings.track:
        from spatialavatar0.capture.track import fit

        frame = replace(fit(frame.image), mask=frame.mask)
    began = time.perf_counter()
    start = from_frame(frame, settings.resolution)
    avatar, _ = refine_photo(start, frame, settings.iters)
    took = time.perf_counter() - began
    sides = side_views(avatar, person, K, size, frame.viewmat)
    return dict(
        person=seed,
        seconds=round(took, 1),
        gaussians=len(avatar),
        front_matte=round(front_psnr(avatar, frame), 2),
        aspect_999=round(sides.aspect, 2),
        whole=rounded(sides.whole),
        head=rounded(sides.head),
    )


def mean_of(rows, which):
    "Mean over people, by yaw."
    return {
        yaw: round(sum(row[which][yaw] for row in rows) / len(rows), 2) for yaw in rows[0][which]
    }


def in_columns(scores):
    return ' '.join(f'{score:6.2f}' for score in scores.values())


def save(path, settings, rows):
    machine = f'{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}'
    results = dict(
        settings=vars(settings),
        machine=machine,
        mean_whole=mean_of(rows, 'whole'),
        mean_head=mean_of(rows, 'head'),
        rows=rows,
    )
    with atomic_path(path) as tmp:
        tmp.write_text(json.dumps(results, indent=1))


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in dict(people=5, size=256, resolution=128, iters=200).items():
        parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--track', action='store_true')
    parser.add_argument('--out', default='results/photo.json')
    return parser.parse_args()


def main():
    settings = arguments()
    yaws = ' '.join(f'{yaw:>6}' for yaw in YAWS)
    print(f'person   front | whole picture at {yaws} | head only at {yaws}')
    rows = []
    for seed in range(100, 100 + settings.people):
        row = one(seed, settings)
        rows.append(row)
        numbers = f'{in_columns(row["whole"])} |              {in_columns(row["head"])}'
        print(f'{seed:6} {row["front_matte"]:7.2f} |                  {numbers}', flush=True)
        save(settings.out, settings, rows)
    means = [in_columns(mean_of(rows, which)) for which in ('whole', 'head')]
    print('mean           |                  ' + ' |              '.join(means))


if __name__ == '__main__':
    main()
