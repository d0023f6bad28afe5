"What a reader sees and what a maintainer relies on: layers, page hygiene, the README."

import ast
import re
import subprocess
import sys

import house
import pytest
from conftest import ROOT
from test_notebooks import PAGES

HEAVY = {
    'accelerate',
    'cv2',
    'gsplat',
    'ipywidgets',
    'lpips',
    'mediapipe',
    'plotly',
    'skimage',
    'smplx',
    'timm',
    'torchvision',
    'viser',
}
PLACE = re.compile(r'/(root|work|tmp|var|opt|home/\w+|Users/\w+|content)/')
FOLDERS = 'spatialavatar0', 'tests', 'tools', 'benchmarks'
FILES = [
    'README.md',
    'NOTICE',
    'settings.ini',
    'setup.py',
    'pyproject.toml',
    'data_manifest.yaml',
    '.ci/run',
    *(str(p.relative_to(ROOT)) for f in FOLDERS for p in sorted((ROOT / f).rglob('*.py'))),
]
MODULES = house.modules()


def cells(page, kind='code'):
    return [c for c in house.read(page)['cells'] if c['cell_type'] == kind]


def tool(name, *words):
    "A tool of the project, run."
    command = [sys.executable, ROOT / 'tools' / f'{name}.py', *words]
    return subprocess.run(command, capture_output=True, text=True)


# ---- layers


def test_every_module_has_a_page():
    made = {p.relative_to(house.PACKAGE).with_suffix('') for p in house.PACKAGE.rglob('[!_]*.py')}
    assert {'.'.join(p.parts) for p in made} == set(MODULES)


def test_numbers_begin_with_the_digit_of_their_chapter():
    numbers = [house.number(p) for p in house.pages() if house.number(p)]
    assert numbers == sorted(set(numbers))
    for page in house.pages():
        chapter = house.CHAPTERS[house.chapter(page)]
        first = chapter[0] if chapter[0].isdigit() else ''
        assert house.number(page)[:1] == first, f'{house.name(page)} lies in {chapter}'


def rank(module):
    "Place of a module's page in the house; pages without a number come last."
    return list(MODULES).index(module)


def imported(node, module):
    "Full names of the modules an import statement may ask for."
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    package = f'spatialavatar0.{module}'.split('.')[: -node.level] if node.level else []
    source = '.'.join([*package, *([node.module] if node.module else [])])
    return [source, *(f'{source}.{alias.name}' for alias in node.names)]


def asks_for(module):
    "Modules of the package that a module imports, inside functions, too."
    path = house.PACKAGE / f'{module.replace(".", "/")}.py'
    tree = ast.parse(path.read_text())
    names = [n for node in ast.walk(tree) for n in imported(node, module)]
    own = {n.removeprefix('spatialavatar0.') for n in names if n.startswith('spatialavatar0.')}
    first = {n.split('.')[0] for node in tree.body for n in imported(node, module)}
    return own & set(MODULES), first


@pytest.mark.parametrize('module', MODULES)
def test_layer(module):
    own, first = asks_for(module)
    above = {m for m in own if rank(m) >= rank(module)}
    assert not above, f'a page may import only pages before it, not {above}'
    assert not first & HEAVY, f'import {first & HEAVY} inside the function that needs it'


@pytest.mark.parametrize('module', house.LESSONS)
def test_lesson(module):
    "One sitting; what is there for speed or for broken input has a machine room."
    found = cells(MODULES[module])
    assert len(found) <= 45, f'{len(found)} code cells'
    exported = '\n'.join(house.text(c) for c in found if house.is_exported(c))
    assert 'numba' not in exported, 'compiled loops have a page of their own'


# ---- pages


def first_line(cell):
    lines = house.text(cell).splitlines()
    return next((line for line in lines if not line.startswith(('#|', '@'))), '')


def speaks(cell):
    "Whether a cell prints or shows something at its top level, going by its code."
    text = house.text(cell)
    not_run = re.search(r'^#\|\s*(export|cuda|slow|notest|eval:\s*false)', text, re.M)
    if not_run or text.lstrip().startswith(('%', '!')):
        return False
    body = ast.parse(text).body
    calls = [n.value for n in body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)]
    names = [getattr(call.func, 'id', '') for call in calls]
    return any(re.match(r'(print|display|show_\w+)$', name) for name in names)


def visible(output):
    "The text of an output, without the bytes of pictures."
    data = output.get('data', {})
    texts = [v for k, v in data.items() if k.startswith('text/') and isinstance(v, (str, list))]
    return ''.join(output.get('text', '')) + ''.join(''.join(text) for text in texts)


def around(text, found):
    return repr(text[max(0, found.start() - 60) : found.end() + 40])


@pytest.mark.parametrize('page', PAGES, ids=house.name)
def test_page(page):
    size = page.stat().st_size
    assert size < 1_000_000, f'{size // 1000} kB: smaller pictures, please'
    notebook = house.read(page)
    title = house.text(notebook['cells'][0])
    assert re.match(r'# \S.*\n\s*\n?> \S', title), 'a title and a one-line subtitle come first'
    assert set(notebook['metadata']) == {'kernelspec'}
    outputs = [o for c in cells(page) for o in c['outputs']]
    errors = [o for o in outputs if o['output_type'] == 'error']
    assert not errors, 'an error is stored in its outputs'
    silent = [first_line(c) for c in cells(page) if speaks(c) and not c['outputs']]
    assert not silent, f'outputs are missing, run the page: {silent}'
    words = '\n'.join([*map(house.text, notebook['cells']), *map(visible, outputs)])
    found = PLACE.search(words)
    assert not found, f'names a place on one machine: {around(words, found)}'


@pytest.mark.parametrize('page', PAGES, ids=house.name)
def test_pictures_have_alt_text(page):
    for cell in cells(page):
        for output in cell['outputs']:
            for kind in set(output.get('data', {})) & {'image/png', 'image/jpeg'}:
                alt = output['metadata'].get(kind, {}).get('alt')
                assert alt, f'no alt text in the cell that starts {first_line(cell)!r}'
    for cell in cells(page, 'markdown'):
        assert not re.search(r'!\[\s*\]\(', house.text(cell)), 'a picture without alt text'


@pytest.mark.parametrize('file', FILES)
def test_no_machine_paths(file):
    text = (ROOT / file).read_text()
    if file == 'tests/test_pages.py':
        text = text.replace(PLACE.pattern, '')
    found = PLACE.search(text)
    assert not found, around(text, found)


# ---- README and covers


def test_readme_in_step():
    done = tool('readme', '--check')
    assert done.returncode == 0, done.stderr


def test_covers_in_step():
    "Each page's first picture is the one it makes; the README's facts are of the last whole run."
    done = tool('covers', '--check')
    assert done.returncode == 0, done.stderr
    for page in house.pages():
        if any(re.search(r'^#\|\s*cover', house.text(c), re.M) for c in cells(page)):
            opening = ''.join(map(house.text, cells(page, 'markdown')[:3]))
            shown = f'images/pages/{page.stem}.'
            assert shown in opening, f'{page.name} does not show its cover'


def test_readme_commands():
    "The two commands a reader types are the ones CI runs."
    assert tool('readme', '--commands').stdout.splitlines() == [
        'pip install -e ".[all]" && spatialavatar0 demo',
        'pip install -e ".[all,dev]" && pytest',
    ]
    assert 'tools/readme.py --commands' in (ROOT / '.ci' / 'run').read_text()


def is_there(link):
    return bool(re.match(r'\w+:', link)) or (ROOT / link).exists()


def test_readme_links():
    "Every relative link and picture of the README exists."
    text = (ROOT / 'README.md').read_text()
    links = re.findall(r'\]\(([^)\s#]+)[^)]*\)|src="([^"]+)"', text)
    assert not [link or source for link, source in links if not is_there(link or source)]


def relative_links(page):
    "Where the texts of a page lead, as far as that is in this repository."
    text = '\n'.join(map(house.text, cells(page, 'markdown')))
    text = re.sub(r'```.*?```|`[^`\n]*`', '', text, flags=re.DOTALL)
    links = re.findall(r'\]\(([^)\s#]+)[^)]*\)', text)
    return [link for link in links if not re.match(r'\w+:', link)]


@pytest.mark.parametrize('page', PAGES, ids=house.name)
def test_links_of_a_page(page):
    gone = [link for link in relative_links(page) if not (page.parent / link).exists()]
    assert not gone
