"""Versions: what settings.ini allows, what CI installs, and that the two agree.

    python tools/lock.py           resolve the extras all and dev, and write .ci/lock.txt
    python tools/lock.py --check   without a network: say where ranges, pins and lock disagree

.ci/constraints.txt is kept by hand: the versions we chose to test with. The lock is made from it:
every package that pip would install, down to the last dependency, with the sha256 of its archive.
`pip install --require-hashes -r .ci/lock.txt` accepts no other byte. It is for Linux and the Python
it was made with; elsewhere the ranges of settings.ini hold.
"""

import configparser
import json
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / '.ci' / 'lock.txt'
PINS = ROOT / '.ci' / 'constraints.txt'
USER = 'track', 'metrics', 'viewer', 'train', 'lab', 'data', 'cluster'


def ranges(*extras):
    "Requirements of settings.ini by their normal names: the core's, and those of these extras."
    parser = configparser.ConfigParser(delimiters=['='], interpolation=None)
    parser.read(ROOT / 'settings.ini', encoding='utf-8')
    keys = ['requirements', *(f'{extra}_requirements' for extra in extras)]
    found = {}
    for requirement in map(Requirement, ' '.join(parser['DEFAULT'][key] for key in keys).split()):
        found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def pins(text):
    "Versions by name, of a lock or of constraints."
    found = re.findall(r'^([\w.-]+)(?:\[[\w,]+\])?==([\w.+!]+)', text, re.M)
    return {canonicalize_name(name): version for name, version in found}


def hashes(text):
    "Fingerprints by name, of a lock."
    blocks = re.findall(r'^([\w.-]+)==\S+((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$', text, re.M)
    return {canonicalize_name(name): re.findall('[0-9a-f]{64}', block) for name, block in blocks}


def report(requirements, *options):
    "What pip would install in an empty environment, without installing it."
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'report.json')
        words = ['--dry-run', '--ignore-installed', '--quiet', '--report', str(path), *options]
        command = [sys.executable, '-m', 'pip', 'install', *words, *requirements]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        return json.loads(path.read_text(encoding='utf-8'))['install']


def lock_line(item):
    "A package of pip's report, with the fingerprint of its archive."
    name, version = item['metadata']['name'], item['metadata']['version']
    sha256 = item['download_info']['archive_info']['hashes']['sha256']
    return f'{canonicalize_name(name)}=={version} \\\n    --hash=sha256:{sha256}'


def make_lock():
    "The lock's text."
    requirements = [str(r) for rs in ranges(*USER, 'dev').values() for r in rs]
    found = report(requirements, '--constraint', str(PINS))
    where = f'Python {platform.python_version()}, {platform.system()} {platform.machine()}'
    head = f'# Made by `python tools/lock.py`; not to be edited. {where}; {len(found)} packages.\n'
    return head + '\n'.join(sorted(map(lock_line, found))) + '\n'


def disagreements():
    "Where ranges, pins and lock do not agree, one line each."
    lock, chosen = pins(LOCK.read_text()), pins(PINS.read_text())
    hashed = hashes(LOCK.read_text())
    said = [f'{name} has no hash in the lock' for name in lock if name not in hashed]
    for name, requirements in ranges(*USER, 'dev').items():
        for requirement in requirements:
            for where, versions in (('lock', lock), ('constraints', chosen)):
                version = versions.get(name)
                if version and not requirement.specifier.contains(version, prereleases=True):
                    said.append(f'{requirement} in settings.ini, {version} in the {where}')
        if name not in lock:
            said.append(f'{name} is in settings.ini and not in the lock')
    for name, version in chosen.items():
        if lock.get(name) != version:
            said.append(f'{name}=={version} in the constraints, {lock.get(name)} in the lock')
    return said


if __name__ == '__main__':
    if '--check' not in sys.argv:
        LOCK.write_text(make_lock(), encoding='utf-8')
    said = disagreements()
    print('\n'.join(said) or f'{len(pins(LOCK.read_text()))} packages; ranges, pins, lock agree')
    sys.exit(bool(said))
