"""How the pages are built: definitions shown and checked, lengths of cells, figures, words per line; and their times.

    python tools/statistics_of_pages.py [--json | --missing PAGE]

Shown: an exported function or class that a later cell of its page uses. Asserted: one that a cell with a check uses, itself or by way of
another definition of the page, at most three code cells after its own; --missing lists those that are not. Words: markdown without code, formulas and tables. Seconds: `results/pages.json`, written by
`pytest tests/test_notebooks.py --page-times` (cells marked slow or cuda left out). Budget: the time to run that a page's opening states.
"""

import ast
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORE = '03', '04', '05', '06', '09', '10', '11', '12', '14'
CHECK = re.compile(r'\bassert\b|\b(test_\w+|expect_fail|check|allclose|raises)\(')


def text(cell):
    return ''.join(cell['source'])


def pages():
    return [p for p in sorted((ROOT / 'nbs').glob('*.ipynb')) if p.stem != 'index']


def code(source):
    return '\n'.join(
        l for l in source.splitlines() if l.strip() and not l.startswith(('#|', '%', '!'))
    )


def definitions(cells):
    "Exported functions and classes of a page: name -> (cell, its code), private ones too."
    found = {}
    for i, c in enumerate(cells):
        if not re.search(r'^#\|\s*export', text(c), re.M):
            continue
        source = re.sub(r'^[%!].*$', '', text(c), flags=re.M)
        for n in ast.parse(source).body:
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)):
                found[n.name] = i, found.get(n.name, (i, ''))[1] + ast.get_source_segment(source, n)
    return found


def used(source, made):
    "Definitions that a cell uses, itself or by way of others."

    def named(t):
        return {n for n in made if re.search(rf'\b{n}\b', t)}

    seen = todo = named(source)
    while todo:
        todo = set().union(*(named(made[n][1]) for n in todo)) - seen
        seen = seen | todo
    return seen


def words(source):
    "Prose only."
    source = re.sub(
        r'```.*?```|\$\$.*?\$\$|\$[^$]*\$|^\|.*$|!\[[^\]]*\]\([^)]*\)',
        ' ',
        source,
        flags=re.S | re.M,
    )
    return len(re.findall(r"[A-Za-zÀ-ÿ][\w'’-]*", re.sub(r'\]\([^)]*\)', ']', source)))


def figures(cell):
    return [
        (o, k)
        for o in cell.get('outputs', [])
        for k in o.get('data', {})
        if k.startswith('image/')
        or k == 'application/vnd.plotly.v1+json'
        or k == 'text/html'
        and re.search(r'<(img|video|svg|iframe|canvas)', ''.join(o['data'][k]))
    ]


def measure(nb):
    "Numbers of one page."
    cells = [c for c in nb['cells'] if c['cell_type'] == 'code']
    made = definitions(cells)
    open_ = {n: i for n, (i, _) in made.items() if not n.startswith('_')}
    shown = {
        n for n, i in open_.items() if any(re.search(rf'\b{n}\b', text(c)) for c in cells[i + 1 :])
    }
    checked = {
        k: used(text(c), made)
        for k, c in enumerate(cells)
        if CHECK.search(text(c)) and not re.search(r'^#\|\s*export', text(c), re.M)
    }
    asserted = {
        n for n, i in open_.items() if any(n in checked.get(k, ()) for k in range(i + 1, i + 4))
    }
    pictures = [f for c in cells for f in figures(c)]
    return dict(
        definitions=len(open_),
        shown=len(shown),
        asserted=len(asserted),
        missing=sorted(set(open_) - asserted, key=open_.get),
        lines=[
            len(code(text(c)).splitlines()) for c in cells if code(text(c)) and not is_imports(c)
        ],
        figures=len(pictures),
        cells=len(cells),
        words=sum(words(text(c)) for c in nb['cells'] if c['cell_type'] == 'markdown'),
        bytes=len(json.dumps(nb).encode()),
        without_alt=sum(
            k.startswith('image/') and not o.get('metadata', {}).get(k, {}).get('alt')
            for o, k in pictures
        ),
        budget=budget(nb),
    )


def is_imports(cell):
    return all(re.match(r'(from|import|\s|\))', l) for l in code(text(cell)).splitlines())


NUMBERS = dict(
    zip(
        (
            'one two three four five six seven eight nine ten fifteen twenty thirty forty sixty '
            'ninety'
        ).split(),
        (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 20, 30, 40, 60, 90),
    )
)


def budget(nb):
    "Seconds a page says it takes to run, if one of its first five cells says so."
    opening = ' '.join(text(c) for c in nb['cells'][:5] if c['cell_type'] == 'markdown').lower()
    n = r'half a|an?|\d+|' + '|'.join(NUMBERS)
    said = [
        (m[2] or m[1], m[3], m[4])
        for m in re.finditer(
            rf'\b({n})(?: to ({n}))? (second|minute)s?\b( and a half)?(?! to read|s? of )', opening
        )
        if (m[1], m[3]) != ('a', 'second')
    ]
    if not said:
        return None
    k, unit, half = said[-1]
    return (
        (0.5 if k == 'half a' else 1 if k in ('a', 'an') else NUMBERS.get(k) or int(k))
        + 0.5 * bool(half)
    ) * (60 if unit == 'minute' else 1)


def quantile(values, q):
    v = sorted(values)
    return v[min(int(q * len(v)), len(v) - 1)]


def total(found):
    "All pages together."
    lines = [n for s in found for n in s['lines']]
    made = max(sum(s['definitions'] for s in found), 1)
    return dict(
        pages=len(found),
        definitions=made,
        shown=sum(s['shown'] for s in found) / made,
        asserted=sum(s['asserted'] for s in found) / made,
        median_lines=quantile(lines, 0.5),
        p90_lines=quantile(lines, 0.9),
        figures_per_10_cells=10 * sum(s['figures'] for s in found) / sum(s['cells'] for s in found),
        words_per_line=sum(s['words'] for s in found) / sum(lines),
        largest_kb=max(s['bytes'] for s in found) // 1000,
        without_alt=sum(s['without_alt'] for s in found),
    )


def main():
    found = {p.stem: measure(json.loads(p.read_text())) for p in pages()}
    path = ROOT / 'results' / 'pages.json'
    times = json.loads(path.read_text()) if path.exists() else {}
    if '--missing' in sys.argv:
        for n, s in found.items():
            if n.startswith(sys.argv[-1]):
                print(n + ': ' + ', '.join(s['missing']))
        return
    if '--json' in sys.argv:
        return print(json.dumps(dict(total=total(list(found.values())), pages=found)))
    print(
        f'{"page":24}{"defs":>5}{"shown":>7}{"checked":>8}{"median":>8}{"90 %":>6}{"fig/10":>8}{"words/line":>11}{"kB":>6}{"budget":>8}{"seconds":>9}'
    )
    for n, s in found.items():

        def share(k):
            return f'{100 * s[k] / s["definitions"]:.0f} %' if s['definitions'] else ''

        print(
            f'{n:24}{s["definitions"] or "":>5}{share("shown"):>7}{share("asserted"):>8}{quantile(s["lines"], 0.5):8}{quantile(s["lines"], 0.9):6}{10 * s["figures"] / s["cells"]:8.1f}{s["words"] / max(sum(s["lines"]), 1):11.1f}{s["bytes"] // 1000:6}{s["budget"] or "":>8}{times.get(n, ""):>9}'
        )
    t = total(list(found.values()))
    core = total([s for n, s in found.items() if n.split('_')[0] in CORE])
    print(
        '\nall pages: '
        + ', '.join(f'{k} {v:.2f}' if isinstance(v, float) else f'{k} {v}' for k, v in t.items())
    )
    print(
        f'core pages: figures_per_10_cells {core["figures_per_10_cells"]:.1f}, words_per_line '
        f'{core["words_per_line"]:.1f}'
    )
    late = [n for n, s in found.items() if s['budget'] and times.get(n, 0) > s['budget']]
    print('over budget:', ', '.join(late) or 'none')


if __name__ == '__main__':
    main()
