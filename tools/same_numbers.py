"""Do two checkouts compute the same numbers? For changes that should move code and nothing else.

    python tools/same_numbers.py measure [--out numbers.json]   hashes of this checkout's results
    python tools/same_numbers.py compare OLD NEW                run it in both, name what differs

Hashed, to the bit: the demo (metrics and avatar), the shipped networks on painted people with
one to four portraits, 200 steps of Stage 2, a short training run of Stage 1, and every file that
`export` writes. Names are looked up by what a module offers, so modules may have moved between
the two checkouts.
"""

import argparse
import hashlib
import importlib
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path

EXPORTS = 'head.ply', 'head.compressed.ply', 'head.splat', 'head.npz', 'head.glb', 'head.html'
TIMES = 'seconds', 'wall', 'time', 'fps', 'it_s'


def find(name):
    "The public object of that name, from whichever module of the package lists it."
    import spatialavatar0

    found = pkgutil.walk_packages(spatialavatar0.__path__, 'spatialavatar0.')
    for module in sorted(m.name for m in found):
        if '_modidx' in module:
            continue
        loaded = importlib.import_module(module)
        if name in getattr(loaded, '__all__', ()):
            return getattr(loaded, name)
    raise SystemExit(f'no module offers {name}')


def of_bytes(data):
    return hashlib.sha256(data).hexdigest()[:16]


def of_tensors(tensors):
    "One hash of a dict of tensors."
    parts = [f'{k}{tuple(v.shape)}{v.dtype}'.encode() + v.numpy().tobytes() for k, v in tensors]
    return of_bytes(b''.join(parts))


def command(*words, folder):
    "Run a command of the kit, and stop where it fails."
    program = 'import sys; from spatialavatar0.cli import main; sys.exit(main())'
    call = [sys.executable, '-c', program, *map(str, words)]
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f'{words[0]} failed:\n{done.stdout}{done.stderr}')


def without_times(value):
    "Metrics without the entries that no two runs share."
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not any(t in k for t in TIMES)}
        return {k: without_times(v) for k, v in kept.items()}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def demo_and_exports(folder):
    "The demo's numbers and avatar, and each export of it."
    command('demo', '--preset', 'tiny', '--out', folder / 'demo', folder=folder)
    metrics = json.loads((folder / 'demo' / 'metrics.json').read_text())
    found = {'demo metrics': without_times(metrics)}
    avatar = folder / 'demo' / 'avatar.safetensors'
    found['demo avatar'] = of_bytes(avatar.read_bytes())
    for name in EXPORTS:
        command('export', avatar, folder / name, folder=folder)
        found[f'export {name}'] = of_bytes((folder / name).read_bytes())
    return found


def network(size=128):
    "What the shipped networks make of painted people."
    import torch

    found = {}
    make_person, mono_clip, from_pretrained = map(
        find, ('make_person', 'mono_clip', 'from_pretrained')
    )
    clips = [mono_clip(make_person(seed), 8, size, seed=seed) for seed in (901, 902)]
    for name in ('toy', 'toy_mono'):
        generator = from_pretrained(name)
        for K in (1, 2, 3, 4):
            with torch.no_grad():
                avatars = [generator([clip[2 * i] for i in range(K)]) for clip in clips]
            splats = [pair for a in avatars for pair in sorted(a.splats.items())]
            found[f'{name} K={K}'] = of_tensors(splats)
    return found


def stage2(steps=200, size=96, resolution=48):
    "Stage 2 from a warped frame: as the paper has it, and as we do. The guards begin at step 50."
    from_frame, refine, config = map(find, ('from_frame', 'refine', 'RefineConfig'))
    make_person, mono_clip = map(find, ('make_person', 'mono_clip'))
    clip = mono_clip(make_person(3), 12, size, seed=3)
    found = {}
    for name, changes in (('paper', dict(keep=0)), ('ours', {})):
        options = config(iters=steps, freeze=50, aspect_from=50, **changes)
        avatar, _ = refine(from_frame(clip[0], resolution), clip, config=options)
        found[f'stage 2, {name}'] = of_tensors(sorted(avatar.splats.items()))
    return found


def stage1(folder):
    "A short training run of the tiny preset."
    size = ('--preset', 'tiny', '--steps', 12, '--people', 3, '--subjects', 1, '--batch', 2)
    command('train', *size, '--out', folder / 'train', folder=folder)
    return {'stage 1': of_bytes((folder / 'train' / 'generator.safetensors').read_bytes())}


def measure(out):
    "All hashes of the package that Python finds."
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        found = {**network(), **stage2(), **stage1(folder), **demo_and_exports(folder)}
    Path(out).write_text(json.dumps(found, indent=1) + '\n')


def measured(checkout):
    "The hashes of one checkout, in processes of its own."
    with tempfile.TemporaryDirectory() as made:
        out = Path(made) / 'numbers.json'
        env = {**os.environ, 'PYTHONPATH': str(Path(checkout).resolve())}
        # a kernel that was just compiled and the same one from numba's cache may differ in the last
        # bit: the first run fills a cache of its own, the second counts
        env['NUMBA_CACHE_DIR'] = str(Path(made) / 'numba')
        call = [sys.executable, Path(__file__).resolve(), 'measure', '--out', out]
        for _ in range(2):
            subprocess.run(call, env=env, cwd=made, check=True)
        return json.loads(out.read_text())


def compare(old, new):
    "Measure both checkouts and print what differs; ends with 1 if anything does."
    before, after = measured(old), measured(new)
    for name in dict.fromkeys([*before, *after]):
        is_same = before.get(name) == after.get(name)
        print(f'{"same" if is_same else "DIFFERENT":10} {name}')
    raise SystemExit(int(before != after))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest='what', required=True)
    commands.add_parser('measure').add_argument('--out', default='numbers.json')
    pair = commands.add_parser('compare')
    pair.add_argument('old')
    pair.add_argument('new')
    given = parser.parse_args()
    measure(given.out) if given.what == 'measure' else compare(given.old, given.new)


if __name__ == '__main__':
    main()
