"What a reader sees and what a maintainer relies on: layers, page hygiene, the README."

import ast
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from test_notebooks import PAGES

HEAVY = {
    'gsplat',
    'lpips',
    'timm',
    'mediapipe',
    'viser',
    'ipywidgets',
    'smplx',
    'torchvision',
    'accelerate',
    'plotly',
    'cv2',
    'skimage',
}
PLACE = re.compile(r'/(root|work|tmp|var|opt|home/\w+|Users/\w+|content)/')
TEXT = [
    'README.md',
    'NOTICE',
    'settings.ini',
    'setup.py',
    'pyproject.toml',
    'data_manifest.yaml',
    '.ci/run',
    *(
        str(p.relative_to(ROOT))
        for folder in ('spatialavatar0', 'tests', 'tools')
        for p in sorted((ROOT / folder).rglob('*.py'))
    ),
]


def cells(page, kind='code'):
    return [c for c in json.loads(page.read_text())['cells'] if c['cell_type'] == kind]


def source(cell):
    return ''.join(cell['source'])


def name(page):
    return page.stem


def first_line(cell):
    return next((l for l in source(cell).splitlines() if not l.startswith(('#|', '@'))), '')


def speaks(cell):
    "Whether a cell prints or shows something at its top level, going by its code."
    text = source(cell)
    if re.search(
        r'^#\|\s*(export|cuda|slow|notest|eval:\s*false)', text, re.M
    ) or text.lstrip().startswith(('%', '!')):
        return False
    calls = [
        n.value.func
        for n in ast.parse(text).body
        if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)
    ]
    return any(re.match(r'(print|display|show_\w+)$', getattr(f, 'id', '')) for f in calls)


def layers():
    "Module name -> number of its page."
    found = {}
    for p in PAGES:
        for c in cells(p):
            if m := re.search(r'^#\|\s*default_exp\s+(\S+)', source(c), re.M):
                found[m[1]] = p.stem
    return found


LAYERS = layers()
MODULES = sorted(p for p in (ROOT / 'spatialavatar0').glob('*.py') if not p.name.startswith('_'))


def test_every_module_has_a_page():
    assert {p.stem for p in MODULES} == set(LAYERS)
    numbers = [p.split('_')[0] for p in LAYERS.values()]
    assert all(re.fullmatch(r'\d\d[a-z]?', n) for n in numbers)
    assert len(set(numbers)) == len(numbers)


def imports(node):
    "Names of the modules an import statement asks for, package-relative ones with their full name."
    if isinstance(node, ast.Import):
        return [a.name for a in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    if not node.level:
        return [
            node.module,
            *(f'{node.module}.{a.name}' for a in node.names if node.module == 'spatialavatar0'),
        ]
    return (
        [f'spatialavatar0.{node.module}']
        if node.module
        else [f'spatialavatar0.{a.name}' for a in node.names]
    )


@pytest.mark.parametrize('module', MODULES, ids=name)
def test_layer(module):
    tree = ast.parse(module.read_text())
    used = {
        n.split('.')[1]
        for node in ast.walk(tree)
        for n in imports(node)
        if n.startswith('spatialavatar0.')
    }
    above = {u for u in used if LAYERS.get(u, '99') >= LAYERS[module.stem]}
    assert not above, f'{LAYERS[module.stem]} may import only pages before it, not {above}'
    top = {n.split('.')[0] for node in tree.body for n in imports(node)}
    assert not top & HEAVY, f'import {top & HEAVY} inside the function that needs it'


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_page(page):
    raw, code = page.read_text(), cells(page)
    nb = json.loads(raw)
    assert len(raw.encode()) < 1_000_000, f'{len(raw) // 1000} kB: smaller pictures, please'
    assert re.match(r'# \S.*\n\s*\n?> \S', source(nb['cells'][0])), (
        'a page starts with a title and a one-line subtitle'
    )
    assert set(nb['metadata']) == {'kernelspec'}
    outputs = [o for c in code for o in c['outputs']]
    assert not [o for o in outputs if o['output_type'] == 'error'], (
        'an error is stored in its outputs'
    )
    long = [first_line(c) for c in code if len(source(c).splitlines()) > 25]
    assert not long, f'cells longer than 25 lines: {long}'
    silent = [first_line(c) for c in code if speaks(c) and not c['outputs']]
    assert not silent, f'outputs are missing, run the page: {silent}'
    words = '\n'.join(source(c) for c in nb['cells']) + '\n'.join(visible(o) for o in outputs)
    assert not (m := PLACE.search(words)), (
        f'names a place on one machine: {words[max(0, m.start() - 60) : m.end() + 40]!r}'
    )


def visible(output):
    "The text of an output, without the bytes of pictures."
    data = output.get('data', {})
    return ''.join(output.get('text', '')) + ''.join(
        ''.join(v) for k, v in data.items() if k.startswith('text/') and isinstance(v, (str, list))
    )


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_pictures_have_alt_text(page):
    for c in cells(page):
        for o in c['outputs']:
            for kind in set(o.get('data', {})) & {'image/png', 'image/jpeg'}:
                assert o['metadata'].get(kind, {}).get('alt'), (
                    f'no alt text in the cell that starts {source(c)[:60]!r}'
                )
    for c in cells(page, 'markdown'):
        assert not re.search(r'!\[\s*\]\(', source(c)), 'a picture without alt text'


@pytest.mark.parametrize('file', TEXT)
def test_no_machine_paths(file):
    text = (ROOT / file).read_text()
    if file == 'tests/test_pages.py':
        text = text.replace(PLACE.pattern, '')
    assert not (m := PLACE.search(text)), text[max(0, m.start() - 60) : m.end() + 40]


def test_readme_in_step():
    done = subprocess.run(
        [sys.executable, ROOT / 'tools' / 'readme.py', '--check'], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_covers_in_step():
    """Each page's first picture is the one it makes; the README's facts are those of the last whole
    run."""
    done = subprocess.run(
        [sys.executable, ROOT / 'tools' / 'covers.py', '--check'], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for p in PAGES:
        if any(re.search(r'^#\|\s*cover', source(c), re.M) for c in cells(p)):
            assert f'](images/pages/{p.stem}.' in ''.join(map(source, cells(p, 'markdown')[:3])), (
                f'{p.name} does not show its cover'
            )


def test_readme_commands():
    "The two commands a reader types are the ones CI runs."
    done = subprocess.run(
        [sys.executable, ROOT / 'tools' / 'readme.py', '--commands'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [
        'pip install -e ".[all]" && spatialavatar0 demo',
        'pip install -e ".[all,dev]" && pytest',
    ]
    assert 'tools/readme.py --commands' in (ROOT / '.ci' / 'run').read_text()


def test_readme_links():
    "Every relative link and picture of the README exists."
    text = (ROOT / 'README.md').read_text()
    links = re.findall(r'\]\(([^)\s#]+)[^)]*\)|src="([^"]+)"', text)
    gone = [
        a or b for a, b in links if not re.match(r'\w+:', a or b) and not (ROOT / (a or b)).exists()
    ]
    assert not gone
