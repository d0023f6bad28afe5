"""How the pages are built: definitions shown and checked, figures, words; and their times.

    python tools/statistics_of_pages.py [--json | --missing PAGE]

Shown: an exported function or class that a later cell of its page uses. Asserted: one that a
cell with a check uses, itself or by way of another definition of the page, at most three code
cells after its own; --missing lists those that are not. Words: markdown without code, formulas
and tables. Seconds: `results/pages.json`, written by `pytest tests/test_notebooks.py
--page-times` (cells marked slow or cuda left out). Budget: the time to run that a page's opening
states. How the code is laid out is measured by `tools/form.py`.
"""

import ast
import json
import re
import sys

import house

CHECK = re.compile(r'\bassert\b|\b(test_\w+|expect_fail|check|allclose|raises)\(')
CANVAS = re.compile(r'<(img|video|svg|iframe|canvas)')
PLOTLY = 'application/vnd.plotly.v1+json'
NOT_PROSE = re.compile(
    r'```.*?```|\$\$.*?\$\$|\$[^$]*\$|^\|.*$|!\[[^\]]*\]\([^)]*\)', re.DOTALL | re.MULTILINE
)
# lessons that stand beside the core of the method, and pages that continue a core lesson
BESIDE = 'splats.projection', 'capture.track'
GO_ON = '_collapse', '_inside'
NUMBERS = {
    'one': 1,
    'two': 2,
    'three': 3,
    'four': 4,
    'five': 5,
    'six': 6,
    'seven': 7,
    'eight': 8,
    'nine': 9,
    'ten': 10,
    'fifteen': 15,
    'twenty': 20,
    'thirty': 30,
    'forty': 40,
    'sixty': 60,
    'ninety': 90,
}


def definitions(cells):
    "Exported functions and classes of a page: name -> (cell, its code), private ones too."
    found = {}
    for i, cell in enumerate(cells):
        if not house.is_exported(cell):
            continue
        source = re.sub(r'^[%!].*$', '', house.text(cell), flags=re.M)
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                _, before = found.get(node.name, (i, ''))
                found[node.name] = i, before + ast.get_source_segment(source, node)
    return found


def named(source, made):
    "Those of the definitions whose name stands in a piece of code."
    return {name for name in made if re.search(rf'\b{name}\b', source)}


def used(source, made):
    "Definitions that a cell uses, itself or by way of others."
    seen = todo = named(source, made)
    while todo:
        todo = set().union(*(named(made[name][1], made) for name in todo)) - seen
        seen = seen | todo
    return seen


def words(source):
    "How many words of prose a text has."
    prose = re.sub(r'\]\([^)]*\)', ']', NOT_PROSE.sub(' ', source))
    return len(re.findall(r"[A-Za-zÀ-ÿ][\w'’-]*", prose))


def is_figure(kind, data):
    "Whether one form of an output is something to look at."
    if kind.startswith('image/') or kind == PLOTLY:
        return True
    return kind == 'text/html' and bool(CANVAS.search(''.join(data)))


def figures(cell):
    "Outputs of a cell that are pictures, with their kind."
    outputs = cell.get('outputs', [])
    kinds = [(o, kind) for o in outputs for kind in o.get('data', {})]
    return [(o, kind) for o, kind in kinds if is_figure(kind, o['data'][kind])]


def lacks_alt(output, kind):
    "Whether a picture says nothing to who cannot see it."
    return kind.startswith('image/') and not output.get('metadata', {}).get(kind, {}).get('alt')


def budget(notebook):
    "Seconds a page says it takes to run, if one of its first five cells says so."
    opening = [house.text(c) for c in notebook['cells'][:5] if c['cell_type'] == 'markdown']
    number = r'half a|an?|\d+|' + '|'.join(NUMBERS)
    pattern = (
        rf'\b({number})(?: to ({number}))? (second|minute)s?\b( and a half)?(?! to read|s? of )'
    )
    said = [m.groups() for m in re.finditer(pattern, ' '.join(opening).lower())]
    said = [m for m in said if (m[0], m[2]) != ('a', 'second')]
    if not said:
        return None
    least, most, unit, and_a_half = said[-1]
    return (amount(most or least) + 0.5 * bool(and_a_half)) * (60 if unit == 'minute' else 1)


def amount(word):
    "The number that a word says."
    if word == 'half a':
        return 0.5
    if word in ('a', 'an'):
        return 1
    return NUMBERS.get(word) or int(word)


def shown_names(cells, first_cell):
    "Definitions that a later cell uses."
    later = {name: map(house.text, cells[i + 1 :]) for name, i in first_cell.items()}
    return {n for n, texts in later.items() if any(re.search(rf'\b{n}\b', t) for t in texts)}


def asserted_names(cells, made, first_cell):
    "Definitions that a check uses at most three cells later."
    checks = {
        k: used(house.text(cell), made)
        for k, cell in enumerate(cells)
        if CHECK.search(house.text(cell)) and not house.is_exported(cell)
    }
    return {
        name
        for name, i in first_cell.items()
        if any(name in checks.get(k, ()) for k in range(i + 1, i + 4))
    }


def measure(notebook):
    "Numbers of one page."
    cells = [c for c in notebook['cells'] if c['cell_type'] == 'code']
    prose = [house.text(c) for c in notebook['cells'] if c['cell_type'] == 'markdown']
    made = definitions(cells)
    first_cell = {name: i for name, (i, _) in made.items() if not name.startswith('_')}
    asserted = asserted_names(cells, made, first_cell)
    pictures = [figure for c in cells for figure in figures(c)]
    return dict(
        definitions=len(first_cell),
        shown=len(shown_names(cells, first_cell)),
        asserted=len(asserted),
        missing=sorted(set(first_cell) - asserted, key=first_cell.get),
        figures=len(pictures),
        cells=len(cells),
        words=sum(map(words, prose)),
        bytes=len(json.dumps(notebook).encode()),
        without_alt=sum(lacks_alt(*picture) for picture in pictures),
        budget=budget(notebook),
    )


def total(found):
    "All pages together."
    made = max(sum(s['definitions'] for s in found), 1)
    cells = sum(s['cells'] for s in found)
    return dict(
        pages=len(found),
        definitions=made,
        shown=sum(s['shown'] for s in found) / made,
        asserted=sum(s['asserted'] for s in found) / made,
        figures_per_10_cells=10 * sum(s['figures'] for s in found) / cells,
        words=sum(s['words'] for s in found),
        largest_kb=max(s['bytes'] for s in found) // 1000,
        without_alt=sum(s['without_alt'] for s in found),
    )


def every_page():
    "Numbers by page, in the order of the house."
    return {house.name(p): measure(house.read(p)) for p in house.pages()}


def lessons(found):
    "The numbers of the core lessons, and of the pages that go on where those of Stage 1 end."
    wanted = {module for module in house.LESSONS if module not in BESIDE}
    pages = [house.name(p) for module, p in house.modules().items() if module in wanted]
    return [found[name] for name in pages] + [found[n] for n in found if n.endswith(GO_ON)]


def share(numbers, what):
    "A part of a page's definitions in per cent; nothing for a page without."
    return f'{numbers[what] / numbers["definitions"]:.0%}' if numbers['definitions'] else ''


def table(found, times):
    "A line a page."
    head = 'page', 'defs', 'shown', 'checked', 'fig/10', 'words', 'kB', 'budget', 'seconds'
    rows = [
        (
            name,
            numbers['definitions'] or '',
            share(numbers, 'shown'),
            share(numbers, 'asserted'),
            f'{10 * numbers["figures"] / max(numbers["cells"], 1):.1f}',
            numbers['words'],
            numbers['bytes'] // 1000,
            numbers['budget'] or '',
            times.get(name, ''),
        )
        for name, numbers in found.items()
    ]
    return '\n'.join(
        f'{row[0]:30}' + ''.join(f'{v!s:>9}' for v in row[1:]) for row in (head, *rows)
    )


def said(numbers):
    "Numbers in a row."
    plain = {k: f'{v:.2f}' if isinstance(v, float) else v for k, v in numbers.items()}
    return ', '.join(f'{k} {v}' for k, v in plain.items())


def main():
    found = every_page()
    if '--missing' in sys.argv:
        for name, numbers in found.items():
            if sys.argv[-1] in name:
                print(f'{name}: {", ".join(numbers["missing"])}')
        return
    if '--json' in sys.argv:
        return print(json.dumps(dict(total=total(list(found.values())), pages=found)))
    path = house.ROOT / 'results' / 'pages.json'
    times = json.loads(path.read_text()) if path.exists() else {}
    print(table(found, times))
    print('\nall pages:', said(total(list(found.values()))))
    print('lessons:', said(total(lessons(found))))
    late = [n for n, s in found.items() if s['budget'] and times.get(n, 0) > s['budget']]
    print('over budget:', ', '.join(late) or 'none')


if __name__ == '__main__':
    main()
