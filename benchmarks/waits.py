"""How often one step makes the host wait for a GPU, and where: counted on a GPU that is not there.

    python benchmarks/waits.py                  this checkout; writes results/waits.json
    PYTHONPATH=OLD python benchmarks/waits.py --out old.json      another one

Counted by tests/pretend.py: numbers that are asked for, masks, copies that are waited for. gsplat
waits once in every call, which stands in a column of its own.
"""

import argparse
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

from common import machine, save

from spatialavatar0.avatar.portrait import from_frame
from spatialavatar0.pictures.people import make_person, mono_clip
from spatialavatar0.stage1.generator import from_preset
from spatialavatar0.stage1.objective import Weights
from spatialavatar0.stage1.schedule import MonoPhase
from spatialavatar0.stage1.trainer import Trainer
from spatialavatar0.stage2.loop import Refinement
from spatialavatar0.stage2.refine import RefineConfig, paper_config

ROOT = Path(__file__).resolve().parents[1]


def refinement(config, film):
    "A refinement in the middle, all its pictures seen."
    run = Refinement(from_frame(film[0], 32), film, replace(config, **GUARDS), 12, device='cuda')
    for i in range(len(film)):
        run.view(i)
    return run


def training(weights, film):
    generator = from_preset('tiny').to('cuda')
    return Trainer(generator, [MonoPhase(4, BATCH, 1e-4, weights)], [[film, film]])


GUARDS = dict(freeze=1, aspect_from=1)
BATCH = 2
FEW = Weights(ms_ssim=0.0, ssim=1.0, lpips=0.0, l2sp=1e-3, jacobian=0.0)
STEPS = dict(
    refine_paper=lambda film: refinement(paper_config(), film),
    refine_ours=lambda film: refinement(RefineConfig(), film),
    train=lambda film: training(FEW, film),
    train_jacobian=lambda film: training(replace(FEW, jacobian=0.1), film),
)


def waits(make, film):
    "(kind, place) -> waits of the third step; and gsplat's calls."
    from pretend import pretend_cuda  # out of tests/

    with pretend_cuda() as gpu:
        run = make(film)
        run.step()
        run.step()
        with gpu.watch() as seen:
            run.step()
    return seen.waits, sum(seen.gsplat.values())


def row(name, film):
    "What one kind of step waits for; a step that fails says why."
    try:
        found, calls = waits(STEPS[name], film)
    except RuntimeError as error:
        return dict(failed=str(error)[:200])
    places = Counter()
    for (kind, place), count in found.items():
        places[f'{kind}, {place}'] += count
    return dict(waits=sum(places.values()), gsplat=calls, places=dict(places.most_common()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--out', type=Path, default=ROOT / 'results' / 'waits.json')
    out = parser.parse_args().out
    sys.path.insert(0, str(ROOT / 'tests'))
    film = mono_clip(make_person(3, resolution=64), 8, 64, seed=1)
    rows = {name: row(name, film) for name in STEPS}
    for name, found in rows.items():
        print(f'{name:16}', found.get('waits', found.get('failed')), found.get('gsplat', ''))
        for place, count in found.get('places', {}).items():
            print(f'{count:20}  {place}')
    save(out, dict(machine=machine(), batch=BATCH, rows=rows))


if __name__ == '__main__':
    main()
