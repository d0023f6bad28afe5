"""Pictures that stand for pages: the cover of each, and the facts in the README.

    python tools/covers.py            write nbs/images/pages/*.jpg and nbs/images/facts.svg
    python tools/covers.py --check    exit 1 if a file is not what it should be

A page's cover is the first picture of its cell marked `#| cover`, as committed; the page's first
text shows it. The facts: how many pages, solved exercises and tests, and how long the tests
took; the last two from `results/suite.json`, which `pytest --page-times` writes.
"""

import base64
import json
import re
import sys

import house

IMAGES = house.NBS / 'images'
ENDINGS = {'image/jpeg': 'jpg', 'image/png': 'png'}
LETTER, HEIGHT = 6.6, 20  # of a badge, pixels
FONT = 'font-family="Verdana,DejaVu Sans,sans-serif" font-size="11"'


def is_cover(cell):
    return cell['cell_type'] == 'code' and re.search(r'^#\|\s*cover', house.text(cell), re.M)


def cover(notebook):
    "Ending and bytes of a page's cover; None without."
    outputs = [o for c in notebook['cells'] if is_cover(c) for o in c['outputs']]
    for output in outputs:
        for kind, ending in ENDINGS.items():
            if kind in output.get('data', {}):
                return ending, base64.b64decode(''.join(output['data'][kind]))


def facts():
    "What the badges say."
    suite = json.loads((house.ROOT / 'results' / 'suite.json').read_text())
    return [
        ('pages', len(house.pages())),
        ('pages solved', len(house.solutions())),
        ('tests', f'{suite["passed"]:,}'),
        ('minutes to test, two cores', round(suite['seconds'] / 60)),
        ('GPUs needed', 0),
    ]


def badge(x, label, value):
    "SVG of a label with its value that begins at x, and where it ends."
    left, right = (round(LETTER * len(str(t)) + 14) for t in (label, value))
    boxes = [(x, left, '#555', label), (x + left, right, '#00796b', value)]
    drawn = [f'<rect x="{a}" width="{w}" height="{HEIGHT}" fill="{c}"/>' for a, w, c, _ in boxes]
    drawn += [f'<text x="{a + w / 2}" y="14">{t}</text>' for a, w, _, t in boxes]
    return ''.join(drawn), x + left + right + 6


def badges(rows):
    "One SVG of labels with values."
    x, drawn = 0, []
    for label, value in rows:
        picture, x = badge(x, label, value)
        drawn.append(picture)
    words = ', '.join(f'{label}: {value}' for label, value in rows)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{x - 6}" height="{HEIGHT}" role="img" '
        f'aria-label="{words}"><g fill="#fff" text-anchor="middle" {FONT}>'
        f'{"".join(drawn)}</g></svg>\n'
    )


def files():
    "Path -> bytes of all that this writes."
    made = {IMAGES / 'facts.svg': badges(facts()).encode()}
    for page in house.pages():
        if found := cover(house.read(page)):
            ending, data = found
            made[house.cover(page).with_suffix(f'.{ending}')] = data
    return made


def main():
    wanted = files()
    stale = [p for p, data in wanted.items() if not p.exists() or p.read_bytes() != data]
    left = [p for p in (IMAGES / 'pages').glob('*') if p not in wanted]
    if '--check' in sys.argv:
        names = ', '.join(p.name for p in stale + left)
        sys.exit(f'{names}: out of date; run `python tools/covers.py` and commit' if names else 0)
    (IMAGES / 'pages').mkdir(parents=True, exist_ok=True)
    for path in stale:
        path.write_bytes(wanted[path])
        print(path.relative_to(house.ROOT))
    for path in left:
        path.unlink()


if __name__ == '__main__':
    main()
