"""Ten minutes of a newcomer, as a script: clone, install, make a head, find its page, change one argument, test, edit a cell, export, test again.

    python tools/newcomer.py               in a fresh clone and a fresh virtual environment, as the README says
    python tools/newcomer.py --here        in a fresh clone, with the packages of this Python (no install)
    python tools/newcomer.py --json FILE   also write the seconds of every step

Steps end at the first that fails, with what it printed. Install time is the network's and is told apart.
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

ROOT = Path(__file__).resolve().parents[1]


class Newcomer:
    "Somebody with a shell, and a clock."

    def __init__(self, home, here):
        self.home = Path(home)
        self.at = Path(home) / 'spatialavatar0'
        self.seconds = {}
        self.bin = (
            Path(sys.executable).parent
            if here
            else self.at / '.venv' / ('Scripts' if os.name == 'nt' else 'bin')
        )
        self.here = here

    def shell(self, command):
        env = {
            **{k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'VIRTUAL_ENV')},
            'PATH': f'{self.bin}{os.pathsep}{os.environ["PATH"]}',
            'PYTHONPATH': str(self.at),
        }
        done = subprocess.run(
            command,
            shell=True,
            cwd=self.at if self.at.exists() else self.home,
            env=env,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f'failed: {command}\n{(done.stdout + done.stderr)[-2000:]}')
        return done.stdout + done.stderr

    def step(self, name, do):
        start = time.perf_counter()
        said = do()
        self.seconds[name] = round(time.perf_counter() - start, 1)
        print(f'{self.seconds[name]:7.1f} s  {name}{": " + said if said else ""}', flush=True)


def commands():
    return subprocess.run(
        [sys.executable, ROOT / 'tools' / 'readme.py', '--commands'],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()


def clone(n):
    n.shell(f'git clone -q "{ROOT}" spatialavatar0')
    return ''


def install(n):
    subprocess.run([sys.executable, '-m', 'venv', n.at / '.venv'], check=True)
    n.shell(commands()[1].split(' && ')[0])
    return ''


def demo(n, *more):
    n.shell(commands()[0].split(' && ')[1] + ''.join(f' {m}' for m in more))
    made = sorted(p.name for p in (n.at / 'out').iterdir() if p.is_file())
    if not {'head.html', 'avatar.safetensors'} <= set(made):
        raise SystemExit(f'the demo made only {made}')
    return f'{len(made)} files in out'


def page_of_the_picture(n):
    "From the README's first picture to the page that makes one."
    text = (n.at / 'README.md').read_text()
    picture = re.search(r'!\[[^\]]+\]\((nbs/images/head\S+)\)', text)[1]
    page = re.search(r'\[20 your own photo\]\((\S+)\)', text)[1]
    cells = json.loads((n.at / page).read_text())['cells']
    if not (n.at / picture).exists() or not any(
        o.get('data', {}).get('image/jpeg') for c in cells for o in c.get('outputs', [])
    ):
        raise SystemExit(f'{picture} or the figures of {page} are missing')
    return f'{picture} -> {page}'


CHANGE = """
from spatialavatar0.avatar.avatar import load_avatar
from spatialavatar0.pictures.people import portrait_camera
a = load_avatar('out/avatar.safetensors'); view,K = portrait_camera(a.head, 128)
shut,wide = (a.render(view, K, 128, 128, **a.head.arkit({'jawOpen': x}))[0] for x in (0.,.8))
print(f'{float((shut-wide).abs().mean()):.4f}'); assert (shut-wide).abs().mean()>1e-3
"""


def one_argument(n):
    (n.home / 'change.py').write_text(CHANGE)
    return (
        'the picture changes by '
        + n.shell(f'python "{n.home / "change.py"}"').strip().splitlines()[-1]
    )


def tests(n, what='tests/test_pages.py tests/test_binding.py'):
    return n.shell(f'pytest -q -x {what}').strip().splitlines()[-1].strip('= ')


def edit(n):
    "A constant in a cell, exported, then as it was."
    page = n.at / 'nbs' / '00_core.ipynb'
    old = page.read_text()
    word = 'Compare an answer with the truth and say what differs.'
    assert word in old
    page.write_text(old.replace(word, 'Compare an answer with the truth, and say what differs.'))
    n.shell('nbdev_export')
    if 'truth, and say' not in (n.at / 'spatialavatar0' / 'core.py').read_text():
        raise SystemExit('the edit did not reach the module')
    said = tests(n, 'tests/test_notebooks.py -k "in_step or clean or 00_core"')
    page.write_text(old)
    n.shell('nbdev_export')
    if n.shell('git status --porcelain').strip():
        raise SystemExit('something was left changed')
    return said


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--here', action='store_true')
    p.add_argument('--json')
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as home:
        n = Newcomer(home, a.here)
        n.step('clone', lambda: clone(n))
        if not a.here:
            n.step('install', lambda: install(n))
        n.step('make a head', lambda: demo(n, '--out out'))
        n.step('find its page', lambda: page_of_the_picture(n))
        n.step('change one argument', lambda: one_argument(n))
        n.step('run tests', lambda: tests(n))
        n.step('edit a cell, export, test', lambda: edit(n))
    own = sum(v for k, v in n.seconds.items() if k != 'install')
    print(
        f'{own:7.1f} s  in all'
        + (f', and {n.seconds["install"]:.0f} s of install' if 'install' in n.seconds else '')
    )
    if a.json:
        Path(a.json).write_text(
            json.dumps(dict(seconds=n.seconds, total=round(own, 1)), indent=1) + '\n'
        )


if __name__ == '__main__':
    main()
