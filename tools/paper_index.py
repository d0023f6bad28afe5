"""The paper's index: where each equation, section and table of the paper is in the code.

    python tools/paper_index.py             write nbs/course/paper_index.ipynb
    python tools/paper_index.py --check     exit 1 if the page is old or a row lacks something

Rows come from tools/paper_index.yaml. What a row shows is read from the pages: the heading under
which a function is defined, the first check that uses it, the first figure after it.
"""

import ast
import json
import re
import sys
from dataclasses import dataclass
from functools import cache

import house
import statistics_of_pages as stats
import yaml

PAGE = house.NBS / 'course' / 'paper_index.ipynb'
TITLE = """# The paper's index
> Every equation, section and table of SpatialAvatar-0 (arXiv 2606.15659), and the code that does it

You have the paper open, and want the function of an equation; or you read a function, and want
its place in the paper. One row is one place: what it says in our words, the function, a check that
would fail if it were wrong, and what there is to see. Five minutes to read; the page has no code
and takes one second to run.

The page is made by `python tools/paper_index.py`. A test refuses a row without a function, and a
function of the method whose docstring does not name its place."""
HEAD = '| paper | what | function |\n|---|---|---|'
WIDTH = 110  # of a figure's words


@dataclass
class Place:
    "Where one function lies, and what shows it."

    name: str
    page: object  # path
    heading: str  # under which it is defined; '' at the top
    words: str  # its docstring
    check: str = ''  # first line of the check
    figure: str = ''  # alt text


def rows():
    return yaml.safe_load((house.ROOT / 'tools' / 'paper_index.yaml').read_text())


@cache
def pages():
    return {module: (page, house.read(page)['cells']) for module, page in house.modules().items()}


def definition(cell, name):
    "The function or class of that name in a cell; None without."
    if not house.is_exported(cell):
        return None
    source = re.sub(r'^[%!].*$', '', house.text(cell), flags=re.M)
    kinds = (ast.FunctionDef, ast.ClassDef)
    found = [n for n in ast.parse(source).body if isinstance(n, kinds) and n.name == name]
    return found[0] if found else None


def last_heading(cells):
    "The nearest heading before the end of these cells."
    texts = [house.text(c) for c in cells if c['cell_type'] == 'markdown']
    found = [h for text in texts for h in re.findall(r'^##+ (.+)$', text, re.M)]
    return found[-1] if found else ''


def check_line(cells, name):
    "The line of the first check that names a function."
    for cell in cells:
        source = house.text(cell)
        if cell['cell_type'] != 'code' or house.is_exported(cell) or name not in source:
            continue
        lines = [line.strip() for line in source.splitlines() if stats.CHECK.search(line)]
        if lines:
            return next((line for line in lines if name in line), lines[0])
    return ''


def alt_text(cells):
    "What the first picture in these cells says to who cannot see it."
    for cell in cells:
        for output, kind in stats.figures(cell):
            words = output.get('metadata', {}).get(kind, {}).get('alt', '')
            if words:
                return words
    return ''


def find(path):
    "The place of module.name; None where it is not."
    module, _, name = path.rpartition('.')
    if module not in pages():
        return None
    page, cells = pages()[module]
    for i, cell in enumerate(cells):
        node = definition(cell, name)
        if node:
            place = Place(name, page, last_heading(cells[:i]), ast.get_docstring(node) or '')
            place.check = check_line(cells[i + 1 :], name)
            place.figure = alt_text(cells[i + 1 :])
            return place
    return None


def anchor(heading):
    "As Jupyter makes it: spaces become hyphens."
    return '#' + re.sub(r'\s', '-', heading) if heading else ''


def link(place):
    relative = f'../{place.page.relative_to(house.NBS).as_posix()}'
    return f'[`{place.name}`]({relative}{anchor(place.heading)})'


def short(text):
    "The beginning of a text, to the end of a word."
    return text if len(text) <= WIDTH else text[:WIDTH].rsplit(' ', 1)[0] + ' ...'


def title(row):
    return f'{row["cite"]}: {row["name"]}'


def line(row):
    "One row of the table; its place leads to what is said below."
    places = [place for path in row['functions'] if (place := find(path))]
    heading = f'[{row["cite"]}]({anchor(title(row))})'
    return f'| {heading} | {row["name"]} | {", ".join(map(link, places))} |'


def section(row):
    "What a row says, with a check and a figure."
    places = [place for path in row['functions'] if (place := find(path))]
    checks = [p.check for p in places if p.check]
    figures = [p.figure for p in places if p.figure]
    lines = [f'### {title(row)}', row['says'], f'Code: {", ".join(map(link, places))}.']
    if checks:
        lines.append(f'A check: `{short(checks[0])}`')
    if figures:
        lines.append(f'To see there: {short(figures[0])}')
    return '\n\n'.join(lines)


def notebook():
    table = '\n'.join([HEAD, *map(line, rows())])
    places = '\n\n'.join(['## One by one', *map(section, rows())])
    cells = [
        dict(cell_type='markdown', id=f'paper{i}', metadata={}, source=text.splitlines(True))
        for i, text in enumerate((TITLE, table, places))
    ]
    spec = dict(display_name='python3', language='python', name='python3')
    return dict(cells=cells, metadata=dict(kernelspec=spec), nbformat=4, nbformat_minor=5)


def text():
    return json.dumps(notebook(), indent=1, ensure_ascii=False) + '\n'


def lacks(row):
    "What a row misses, a sentence each."
    wrong = [] if row['functions'] else [f'{row["cite"]} has no function']
    for path in row['functions']:
        place = find(path)
        if place is None:
            wrong.append(f'{row["cite"]}: there is no {path}')
        elif not cites(place.words, row['cite']):
            wrong.append(f'{path} does not name {row["cite"]} in its docstring')
    return wrong


def cites(words, place):
    "Whether a docstring names a place, alone or in a range like Tab. 1 to 9."
    if re.search(rf'{re.escape(place)}(?!\d)', words):
        return True
    kind, _, number = place.partition(' ')
    ranges = re.findall(rf'{re.escape(kind)} (\d+) to (\d+)', words)
    return number.isdigit() and any(int(a) <= int(number) <= int(b) for a, b in ranges)


def main():
    wrong = [words for row in rows() for words in lacks(row)]
    if '--check' in sys.argv:
        stale = not PAGE.exists() or PAGE.read_text() != text()
        wrong += ['the page is out of date: run `python tools/paper_index.py`'] * stale
        sys.exit('\n'.join(wrong) or 0)
    PAGE.write_text(text())
    print('\n'.join([*wrong, str(PAGE.relative_to(house.ROOT))]))


if __name__ == '__main__':
    main()
