"""Files of strangers: every hostile input of the table ends in one printable line, quickly, runs
nothing, and writes nothing outside of --out."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from strangers import room

ALL = room.cases()
# every kind of file with every threat, and every fifth case; STRANGERS_ALL=1: all of them
CASES = ALL if os.environ.get('STRANGERS_ALL') else room.some(ALL)
KEPT = ROOT / 'results' / 'strangers.json'


@pytest.fixture(scope='module')
def rows(tmp_path_factory):
    "What came of the cases, by name; half of them in either of two processes."
    folder = tmp_path_factory.mktemp('strangers')
    env = dict(os.environ, OMP_NUM_THREADS='1', NUMBA_NUM_THREADS='1')
    every = [] if CASES is ALL else ['--some']
    command = [sys.executable, ROOT / 'tests' / 'strangers' / 'room.py', *every, '--part']
    halves = [
        subprocess.Popen(
            [*command, f'{i}/2', '--out', folder / f'{i}.json'],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    said = [half.communicate()[0] for half in halves]
    files = [folder / f'{i}.json' for i in range(2)]
    assert all(file.exists() for file in files), said
    found = [room.Row(**row) for file in files for row in json.loads(file.read_text())]
    return {row.name: row for row in found}


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
def test_a_stranger(rows, case):
    row = rows[case.name]
    assert row.ends == case.want, f'{row.ends}: {row.says}'
    assert row.seconds < room.SECONDS
    assert row.megabytes < room.MEGABYTES


def test_there_are_many_of_every_kind():
    "At least 300 cases; of every threat more than a few; a sound file beside them."
    assert len(CASES) >= 300
    counts = {t: sum(case.threat == t for case in ALL) for t in (*room.THREATS, room.SOUND)}
    assert min(counts.values()) >= 10, counts


def test_the_table_is_whole():
    "results/strangers.json has every case, each with the ending it should have."
    kept = [room.Row(**row) for row in json.loads(KEPT.read_text())]
    assert {row.name: row.ends for row in kept} == {case.name: case.want for case in ALL}
    assert max(row.seconds for row in kept) < room.SECONDS
    assert max(row.megabytes for row in kept) < room.MEGABYTES


def test_the_room_sees():
    "A door that lets everything in, or breaks, is found out."
    seen = subprocess.run(
        [sys.executable, '-c', SIEVE],
        capture_output=True,
        text=True,
        cwd=ROOT / 'tests',
        env=dict(os.environ, STRANGERS='4'),
    )
    assert seen.returncode == 0, seen.stderr
    ends = json.loads(seen.stdout.splitlines()[-1])
    assert ends['nothing'] == 'SILENT'
    assert ends['breaks'] == 'TRACEBACK'
    assert ends['runs'] == 'RAN CODE'
    assert ends['writes'] == 'WROTE here/x'
    assert ends['sleeps'].startswith('TOO SLOW')
    assert ends['eats'].startswith('TOO LARGE')
    assert ends['escapes'].startswith('UNPRINTABLE')


SIEVE = """
import json
import os
import time
import warnings
from pathlib import Path

import spatialavatar0.ground.core
from strangers import room

FOUND = dict(
    nothing=lambda given: given,
    breaks=lambda given: 1 / 0,
    runs=lambda given: os.system('touch ../CANARY'),
    writes=lambda given: Path('x').write_text('x'),
    sleeps=lambda given: time.sleep(30),
    eats=lambda given: [bytearray(os.urandom(1) * 10**8) for _ in range(40)],
    escapes=lambda given: warnings.warn('a line that has an escape: \\x1b[2J'),
)
room.MEGABYTES = 300
rows = {}
for name, door in FOUND.items():
    rows[name] = room.run_case(room.Case('x', 'kind', name, lambda folder: folder, door)).ends
print(json.dumps(rows))
"""
