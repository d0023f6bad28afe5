"""Ranges, pins and lock agree; the lower ends of the ranges were tried, and worked; what .ci/run
asks of the package is there."""

import importlib
import json
import re
import subprocess
import sys

import lock
import lowers
import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.version import Version

CI = (ROOT / '.ci' / 'run').read_text()


def test_ranges_pins_and_lock_agree():
    assert lock.disagreements() == []


def test_every_locked_archive_has_a_hash():
    text = lock.LOCK.read_text()
    assert set(lock.pins(text)) == set(lock.hashes(text))
    assert len(lock.pins(text)) > 150  # down to the last dependency
    lines = text.splitlines()[1:]
    assert len(lines) == sum(1 + len(found) for found in lock.hashes(text).values())


WRONG = {
    'numpy 1.0 in the lock': (
        'LOCK',
        r'numpy==\S+',
        'numpy==1.0',
        'numpy>=1.26 in settings.ini, 1.0',
    ),
    'no hash': ('LOCK', r'(numpy==\S+) \\\n.*\n', r'\1\n', 'numpy has no hash'),
    'not in the lock': ('LOCK', r'lmdb==\S+ \\\n.*\n', '', 'lmdb is in settings.ini and not in'),
    'numpy 1.0 pinned': ('PINS', r'numpy==\S+', 'numpy==1.0', '1.0 in the constraints'),
    'another pin': ('PINS', r'viser==\S+', 'viser==1.0.1', 'viser==1.0.1 in the constraints, 1'),
}


@pytest.mark.parametrize('name', WRONG)
def test_a_disagreement_is_said(tmp_path, monkeypatch, name):
    which, old, new, said = WRONG[name]
    text, count = re.subn(old, new, getattr(lock, which).read_text())
    assert count
    (tmp_path / 'versions.txt').write_text(text)
    monkeypatch.setattr(lock, which, tmp_path / 'versions.txt')
    assert any(said in line for line in lock.disagreements())


def test_the_command_says_so():
    done = subprocess.run(
        [sys.executable, ROOT / 'tools' / 'lock.py', '--check'], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert 'ranges, pins, lock agree' in done.stdout


def test_ci_installs_by_hash():
    assert 'pip install -q --require-hashes -r .ci/lock.txt' in CI


def test_what_ci_imports_is_there():
    "An import that fails in .ci/run would leave tests out."
    found = re.findall(r'^from (spatialavatar0\S+) import (.+)$', CI, re.M)
    assert len(found) >= 3
    for module, names in found:
        for name in names.split(', '):
            assert hasattr(importlib.import_module(module), name)


# ---- the lower ends


def test_every_range_has_a_lower_end():
    "What a user installs; the extra lab is a program, not a library of ours."
    for requirements in lock.ranges(*lowers.EXTRAS).values():
        for requirement in requirements:
            assert lowers.lowest(requirement), (
                f'{requirement} promises every version there ever was'
            )


def test_lowest():
    assert lowers.lowest(Requirement('torch>=2.6')) == 'torch==2.6'
    assert lowers.lowest(Requirement('imageio[ffmpeg]>=2.34,<3')) == 'imageio==2.34'
    assert lowers.lowest(Requirement('tqdm')) is None


def test_the_lower_ends_were_tried_and_work():
    "A range that changed since then wants `python tools/lowers.py` again."
    tried = json.loads(lowers.RESULT.read_text())
    assert tried['passed'], tried['tests']
    assert tried['ranges'] == lowers.promised(), 'run `python tools/lowers.py`'
    for name, requirements in lock.ranges(*lowers.EXTRAS).items():
        ends = [Version(lowers.lowest(r).partition('==')[2]) for r in requirements]
        assert Version(tried['versions'][name]) == max(ends), name
    assert int(re.match(r'(\d+) passed', tried['tests'])[1]) > 100
