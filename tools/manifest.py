"""Write the size and sha256 of every file that travels in the package into data_manifest.yaml: run
it after rebuilding one."""

import hashlib
import re
from pathlib import Path

from spatialavatar0.ground.assets import is_confined, load_manifest
from spatialavatar0.ground.core import InputError

ROOT = Path(__file__).resolve().parents[1]


def refresh(text):
    """The manifest's text with the numbers of the package's own files brought up to date; the rest
    is left as it is."""
    entries = re.split(r'(?m)^(?=- id: )', text)
    for i, entry in enumerate(entries):
        found = re.search(r'- package: (\S+)', entry)
        if not found:
            continue
        if not is_confined(found[1]):
            raise InputError(f'{found[1]!r} is no path inside the package')
        path = ROOT / 'spatialavatar0' / found[1]
        if not path.exists():
            print(f'{found[1]} is not built yet')
            continue
        data = path.read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        entry = re.sub(r'(?m)^  bytes: .*$', f'  bytes: {len(data)}', entry)
        entries[i] = re.sub(r'(?m)^  sha256: .*$', f'  sha256: {sha256}', entry)
    return ''.join(entries)


if __name__ == '__main__':
    path = ROOT / 'data_manifest.yaml'
    before = path.read_text(encoding='utf-8')
    after = refresh(before)
    path.write_text(after, encoding='utf-8')
    load_manifest(path)  # strict: it says what does not fit
    print('nothing changed' if after == before else f'{path.name} changed')
