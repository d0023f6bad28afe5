"""The house: chapters in their order, and where pages, solutions and modules lie."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / 'nbs'
PACKAGE = ROOT / 'spatialavatar0'
SOLUTIONS = NBS / 'solutions'

# folder of nbs/ -> what it is called. A chapter of the package has a sub-package of the same name,
# and its pages' numbers begin with its digit; '' is the folder nbs/ itself.
CHAPTERS = {
    'ground': '0 Ground',
    'head': '1 The head',
    'splats': '2 Splats',
    'pictures': '3 Pictures',
    'avatar': '4 The avatar',
    'stage1': '5 Stage 1',
    'stage2': '6 Stage 2',
    'capture': '7 Capture',
    'use': '8 Use',
    'judge': '9 Judge',
    '': 'Commands',
    'doit': 'Do it',
    'why': 'Why',
    'course': 'Course',
}

# pages that teach one idea of the paper each, in readable torch; the other pages with a module are
# machine rooms: what makes a lesson fast, or safe from broken input
LESSONS = (
    'head.head',
    'splats.binding',
    'splats.projection',
    'splats.rasterize',
    'pictures.metrics',
    'avatar.avatar',
    'avatar.warp',
    'avatar.hair',
    'avatar.portrait',
    'stage1.network',
    'stage1.generator',
    'stage1.objective',
    'stage1.schedule',
    'stage2.refine',
    'capture.track',
    'judge.evaluate',
)


def text(cell):
    "The source of a cell."
    return ''.join(cell['source'])


def read(page):
    "A notebook as a dict."
    return json.loads(page.read_text(encoding='utf-8'))


def name(page):
    "How a page is called in commands and tables: its path in nbs/, without the ending."
    return page.relative_to(NBS).with_suffix('').as_posix()


def pages():
    "Pages in the order of the house, without the front page and the solutions."
    found = [p for folder in CHAPTERS for p in sorted((NBS / folder).glob('*.ipynb'), key=place)]
    return [p for p in found if p.stem != 'index']


def place(page):
    "Pages of a chapter go by their numbers; the commands come after what they do."
    return page.stem == 'cli', page.stem


def solutions():
    "Solved exercises, in the same order."
    found = {p.stem: p for p in SOLUTIONS.glob('*.ipynb')}
    return [found[p.stem] for p in pages() if p.stem in found]


def notebooks():
    "All of them: front page, pages, solutions."
    return [NBS / 'index.ipynb', *pages(), *solutions()]


def chapter(page):
    "The folder a page lies in; 'solutions' for solved exercises."
    return page.parent.relative_to(NBS).as_posix().replace('.', '')


def number(page):
    "'20' of 20_binding; '' where a page has none."
    found = re.match(r'(\d\d)_', page.stem)
    return found[1] if found else ''


def module(notebook):
    "The module that a page makes, as 'splats.binding'; None where it makes none."
    for cell in notebook['cells']:
        if found := re.search(r'^#\|\s*default_exp\s+(\S+)', text(cell), re.M):
            return found[1]
    return None


def modules():
    "Module -> its page, in the order of the house."
    made = {module(read(p)): p for p in pages()}
    return {m: p for m, p in made.items() if m}


def is_exported(cell):
    "Whether a cell becomes part of a module."
    is_code = cell['cell_type'] == 'code'
    return is_code and bool(re.search(r'^#\|\s*export', text(cell), re.M))


def cover(page):
    "The file of a page's picture, without its ending."
    return NBS / 'images' / 'pages' / page.stem
