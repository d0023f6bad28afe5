"""Pictures that stand for pages: the cover at the top of each, the map of them and the facts in the README.

    python tools/covers.py            write nbs/images/pages/*.jpg and nbs/images/facts.svg
    python tools/covers.py --check    exit 1 if a file is not what it should be

A page's cover is the first picture of its cell marked `#| cover`, as committed; the page's first text shows it. The facts: how many
pages, solved exercises and tests, and how long the tests took; the last two from `results/suite.json`, which `pytest --page-times` writes.
"""

import base64
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / 'nbs' / 'images'


def text(cell):
    return ''.join(cell['source'])


def pages():
    return {
        p.stem: json.loads(p.read_text(encoding='utf-8'))
        for p in sorted((ROOT / 'nbs').glob('*.ipynb'))
        if p.stem != 'index'
    }


def cover(nb):
    "Ending and bytes of a page's cover; None without."
    for c in nb['cells']:
        if c['cell_type'] != 'code' or not re.search(r'^#\|\s*cover', text(c), re.M):
            continue
        for o in c['outputs']:
            for kind, ending in (('image/jpeg', 'jpg'), ('image/png', 'png')):
                if kind in o.get('data', {}):
                    return ending, base64.b64decode(''.join(o['data'][kind]))


def facts():
    "What the badges say."
    suite = json.loads((ROOT / 'results' / 'suite.json').read_text())
    solved = len(list((ROOT / 'nbs' / 'solutions').glob('*.ipynb')))
    return [
        ('pages', len(pages())),
        ('pages solved', solved),
        ('tests', f'{suite["passed"]:,}'),
        ('minutes to test, two cores', round(suite['seconds'] / 60)),
        ('GPUs needed', 0),
    ]


def badges(rows, letter=6.6, height=20):
    "One SVG of labels with values."
    x, out = 0, []
    for label, value in rows:
        a, b = (round(letter * len(str(t)) + 14) for t in (label, value))
        out += [
            (
                f'<rect x="{x}" width="{a}" height="{height}" fill="#555"/><rect x="{x + a}" '
                f'width="{b}" height="{height}" fill="#00796b"/>'
            ),
            *(
                f'<text x="{x + at}" y="14">{t}</text>'
                for at, t in ((a / 2, label), (a + b / 2, value))
            ),
        ]
        x += a + b + 6
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{x - 6}" height="{height}" role="img" '
        f'aria-label="{", ".join(f"{l}: {v}" for l, v in rows)}"><g fill="#fff" text-anchor="middle" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">{"".join(out)}</g></svg>\n'
    )


def files():
    "Path -> bytes of all that this writes."
    made = {IMAGES / 'pages' / f'{n}.{c[0]}': c[1] for n, nb in pages().items() if (c := cover(nb))}
    return made | {IMAGES / 'facts.svg': badges(facts()).encode()}


def main():
    wanted = files()
    stale = [p for p, data in wanted.items() if not p.exists() or p.read_bytes() != data]
    left = [p for p in (IMAGES / 'pages').glob('*') if p not in wanted]
    if '--check' in sys.argv:
        sys.exit(
            (
                f'{", ".join(p.name for p in stale + left)}: out of date; run `python '
                'tools/covers.py` and commit'
            )
            if stale + left
            else 0
        )
    (IMAGES / 'pages').mkdir(parents=True, exist_ok=True)
    for p in stale:
        p.write_bytes(wanted[p])
        print(p.relative_to(ROOT))
    for p in left:
        p.unlink()


if __name__ == '__main__':
    main()
