"""One picture in, true side views out: five painted people, whose every view is known.

    python benchmarks/photo.py [--people 5] [--size 256] [--resolution 128] [--iters 300] [--track] [--out results/photo.json]

Each person is seen once from the front, with the true camera and head parameters (--track: with those the tracker finds), made
into an avatar, refined, and rendered from the sides. PSNR is over the whole picture on white; head: inside the true matte.
"""

import argparse
import json
import os
import platform
import time

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


def side_views(avatar, person, K, size, shift):
    """PSNR of an avatar against the truth, by yaw: whole picture and head only; `shift` is the
    camera the avatar was made with, turned about the head's own axis."""
    whole = {}
    head = {}
    ratios = []
    for yaw in YAWS:
        truth = paint(person, orbit(yaw, 0, 0.7, CENTER), K, size)
        V = turn(shift, yaw, 0, CENTER)
        with torch.no_grad():
            rgb = avatar.render(V, K, size, size, background=1.0)[0].clamp(0, 1)
            ratios.append(screen_aspect(avatar, V, K, size, size))
        y = on_background(truth, 1.0)
        whole[yaw] = float(psnr(rgb, y))
        head[yaw] = float(psnr(rgb, y, mask=truth.mask > 0.5))
    return whole, head, float(torch.quantile(torch.cat(ratios), 0.999))


def one(seed, a):
    "A row of the table."
    set_seed(0)
    person = make_person(seed)
    K = intrinsics(2.0 * a.size, a.size, a.size)
    V = orbit(0, 0, 0.7, CENTER)
    frame = paint(person, V, K, a.size)
    if a.track:
        from dataclasses import replace

        from spatialavatar0.capture.track import fit

        found = fit(frame.image)
        frame = replace(found, mask=frame.mask)
    t = time.perf_counter()
    start = from_frame(frame, a.resolution)
    avatar, _ = refine_photo(start, frame, a.iters)
    t = time.perf_counter() - t
    whole, head, aspect = side_views(avatar, person, K, a.size, frame.viewmat)
    return dict(
        person=seed,
        seconds=round(t, 1),
        gaussians=len(avatar),
        front_matte=round(front_psnr(avatar, frame), 2),
        aspect_999=round(aspect, 2),
        whole={str(k): round(v, 2) for k, v in whole.items()},
        head={str(k): round(v, 2) for k, v in head.items()},
    )


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in dict(people=5, size=256, resolution=128, iters=300).items():
        p.add_argument(f'--{name}', type=int, default=default)
    p.add_argument('--track', action='store_true')
    p.add_argument('--out', default='results/photo.json')
    a = p.parse_args()
    rows = []
    print(
        'person   front | whole picture at '
        + ' '.join(f'{y:>6}' for y in YAWS)
        + ' | head only at '
        + ' '.join(f'{y:>6}' for y in YAWS)
    )
    for seed in range(100, 100 + a.people):
        r = one(seed, a)
        rows.append(r)
        print(
            f'{seed:6} {r["front_matte"]:7.2f} |                  '
            + ' '.join(f'{v:6.2f}' for v in r['whole'].values())
            + ' |              '
            + ' '.join(f'{v:6.2f}' for v in r['head'].values()),
            flush=True,
        )

        def mean(k):
            return {y: round(sum(r[k][y] for r in rows) / len(rows), 2) for y in rows[0][k]}

        with atomic_path(a.out) as tmp:
            tmp.write_text(
                json.dumps(
                    dict(
                        settings=vars(a),
                        machine=(
                            f'{platform.machine()}, {os.cpu_count()} cores, torch '
                            f'{torch.__version__}'
                        ),
                        mean_whole=mean('whole'),
                        mean_head=mean('head'),
                        rows=rows,
                    ),
                    indent=1,
                )
            )
    print(
        'mean           |                  '
        + ' '.join(f'{v:6.2f}' for v in mean('whole').values())
        + ' |              '
        + ' '.join(f'{v:6.2f}' for v in mean('head').values())
    )


if __name__ == '__main__':
    main()
