"""Ten minutes of a newcomer, as a script: clone, install, make a head, find its page, change one
argument, test, edit a cell, export, test again.

    python tools/newcomer.py               in a fresh clone and a fresh venv, as the README says
    python tools/newcomer.py --here        in a fresh clone, with the packages of this Python
    python tools/newcomer.py --json FILE   also write the seconds of every step

Steps end at the first that fails, with what it printed. The time of the install is told apart: it
is the network's.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import house
import readme

SCRIPTS = 'Scripts' if os.name == 'nt' else 'bin'
WORDS = 'Compare an answer with the truth and say what differs.'
CHANGE = """
import spatialavatar0 as sa

avatar = sa.Avatar.load('out/avatar.safetensors')
viewmat, K = sa.pictures.people.portrait_camera(avatar.head, 128)

def jaw(x):
    return avatar.render(viewmat, K, 128, 128, **avatar.head.arkit({'jawOpen': x}))[0]

change = (jaw(0) - jaw(.8)).abs().mean()
print(f'{float(change):.4f}')
assert change > 1e-3
"""


class Newcomer:
    "Somebody with a shell, and a clock."

    def __init__(self, home, here):
        self.home = Path(home)
        self.clone = self.home / 'spatialavatar0'
        self.here = here  # whether to use this Python's packages
        self.bin = Path(sys.executable).parent if here else self.clone / '.venv' / SCRIPTS
        self.seconds = {}

    def shell(self, command):
        "Run a command in the clone, and stop where it fails: what it printed."
        env = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'VIRTUAL_ENV')}
        env['PATH'] = f'{self.bin}{os.pathsep}{os.environ["PATH"]}'
        env['PYTHONPATH'] = str(self.clone)
        folder = self.clone if self.clone.exists() else self.home
        done = subprocess.run(
            command, shell=True, cwd=folder, env=env, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f'failed: {command}\n{(done.stdout + done.stderr)[-2000:]}')
        return done.stdout + done.stderr

    def step(self, name, do):
        "Do one thing, and say how long it took."
        start = time.perf_counter()
        said = do(self)
        self.seconds[name] = round(time.perf_counter() - start, 1)
        print(f'{self.seconds[name]:7.1f} s  {name}{": " + said if said else ""}', flush=True)


def clone(newcomer):
    newcomer.shell(f'git clone -q "{house.ROOT}" spatialavatar0')


def install(newcomer):
    subprocess.run([sys.executable, '-m', 'venv', newcomer.clone / '.venv'], check=True)
    newcomer.shell(readme.commands()[1].split(' && ')[0])


def demo(newcomer):
    newcomer.shell(readme.commands()[0].split(' && ')[1] + ' --out out')
    made = sorted(p.name for p in (newcomer.clone / 'out').iterdir() if p.is_file())
    if not {'head.html', 'avatar.safetensors'} <= set(made):
        raise SystemExit(f'the demo made only {made}')
    return f'{len(made)} files in out'


def has_picture(page):
    "Whether a page's outputs hold a photograph."
    outputs = [o for c in house.read(page)['cells'] for o in c.get('outputs', [])]
    return any(o.get('data', {}).get('image/jpeg') for o in outputs)


def find_page(newcomer):
    "From the README's first picture to the page that makes one."
    text = (newcomer.clone / 'README.md').read_text()
    picture = re.search(r'!\[[^\]]+\]\((nbs/images/head\S+)\)', text)[1]
    page = re.search(r'\[your own photo\]\((\S+)\)', text)[1]
    if not (newcomer.clone / picture).exists() or not has_picture(newcomer.clone / page):
        raise SystemExit(f'{picture} or the figures of {page} are missing')
    return f'{picture} -> {page}'


def change_one_argument(newcomer):
    script = newcomer.home / 'change.py'
    script.write_text(CHANGE)
    printed = newcomer.shell(f'python "{script}"').strip().splitlines()
    return f'the picture changes by {printed[-1]}'


def run_tests(newcomer, what='tests/test_pages.py tests/test_binding.py'):
    return newcomer.shell(f'pytest -q -x {what}').strip().splitlines()[-1].strip('= ')


def edit_a_cell(newcomer):
    "A docstring in a cell, exported, then as it was."
    page = newcomer.clone / 'nbs' / 'ground' / '00_core.ipynb'
    old = page.read_text()
    assert WORDS in old
    page.write_text(old.replace(WORDS, WORDS.replace('truth and', 'truth, and')))
    newcomer.shell('python tools/pages.py --export')
    module = newcomer.clone / 'spatialavatar0' / 'ground' / 'core.py'
    if 'truth, and say' not in module.read_text():
        raise SystemExit('the edit did not reach the module')
    said = run_tests(newcomer, 'tests/test_notebooks.py -k "in_step or clean or 00_core"')
    page.write_text(old)
    newcomer.shell('python tools/pages.py --export')
    if newcomer.shell('git status --porcelain').strip():
        raise SystemExit('something was left changed')
    return said


STEPS = {
    'clone': clone,
    'install': install,
    'make a head': demo,
    'find its page': find_page,
    'change one argument': change_one_argument,
    'run tests': run_tests,
    'edit a cell, export, test': edit_a_cell,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--here', action='store_true')
    parser.add_argument('--json')
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        newcomer = Newcomer(home, given.here)
        for name, do in STEPS.items():
            if name != 'install' or not given.here:
                newcomer.step(name, do)
    seconds = newcomer.seconds
    own = sum(s for name, s in seconds.items() if name != 'install')
    of_install = f', and {seconds["install"]:.0f} s of install' if 'install' in seconds else ''
    print(f'{own:7.1f} s  in all{of_install}')
    if given.json:
        facts = dict(seconds=seconds, total=round(own, 1))
        Path(given.json).write_text(json.dumps(facts, indent=1) + '\n')


if __name__ == '__main__':
    main()
