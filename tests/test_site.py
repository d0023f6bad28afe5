"""The site: its link checker, how comments become tables, and all of it built, clicked and searched
without a network."""

import importlib.util
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import house
import pytest
from conftest import ROOT
from site_api import Module
from site_links import check

from spatialavatar0.use.viewer import find_browser

# `site` is a module of Python, so ours is loaded from its file
spec = importlib.util.spec_from_file_location('site_tool', ROOT / 'tools' / 'site.py')
site = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site)

# ---- links

GOOD = (
    '<h1 id="top-of-a">A</h1><a href="b/c.html#deep">c</a> <a href="#top-of-a">up</a>'
    '<a href="https://example.org">away</a> <img src="x.png"> <img src="data:,">'
)
OTHER = (
    '<p id="deep"><a href="../a.html">a</a><a href="mailto:a@b.c">m</a>'
    '<link rel="stylesheet" href="../s.css">'
)
FONT = '<style>@font-face{src:url("https://f.org/f.woff2")}</style>'


@pytest.fixture
def folder(tmp_path):
    "Two pages, a picture and a style that refer to each other as they should."
    (tmp_path / 'b').mkdir()
    (tmp_path / 'x.png').write_bytes(b'x')
    (tmp_path / 's.css').write_text('p{background:url(x.png)}')
    (tmp_path / 'a.html').write_text(GOOD)
    (tmp_path / 'b' / 'c.html').write_text(OTHER)
    return tmp_path


def test_good_links(folder):
    assert check(folder) == []


def test_an_empty_folder_is_no_site(tmp_path):
    assert check(tmp_path) == ['no page']


@pytest.mark.parametrize(
    'text,wrong',
    [
        ('<a href="none.html">', 'no file none.html'),
        ('<a href="b">', 'no file b'),
        ('<a href="/a.html">', 'no file /a.html'),
        ('<a href="../a.html">', 'no file ../a.html'),
        ('<img src="none.png">', 'no file none.png'),
        ('<a href="#none">', 'no anchor #none'),
        ('<a href="b/c.html#none">', 'no anchor b/c.html#none'),
        ('<script src="https://cdn.org/x.js"></script>', 'fetches https://cdn.org/x.js'),
        ('<script src="//cdn.org/x.js"></script>', 'fetches //cdn.org/x.js'),
        ('<link rel="stylesheet" href="https://cdn.org/x.css">', 'fetches https://cdn.org/x.css'),
        ('<img srcset="x.png 1x, http://h.org/y.png 2x">', 'fetches http://h.org/y.png'),
        (FONT, 'fetches https://f.org/f.woff2'),
        ('<p style="background:url(http://h.org/p.png)">', 'fetches http://h.org/p.png'),
    ],
)
def test_bad_links(folder, text, wrong):
    (folder / 'a.html').write_text(GOOD + text)
    assert check(folder) == [f'a.html: {wrong}']


def test_a_style_that_fetches(folder):
    (folder / 's.css').write_text('@import "https://f.org/f.css";')
    assert check(folder) == ['s.css: fetches https://f.org/f.css']


# ---- pages and API


@pytest.mark.parametrize(
    'name,chapter',
    [
        ('index', 'Start'),
        ('ground/00_core', '0 Ground'),
        ('splats/25_mesh', '2 Splats'),
        ('cli', 'Commands'),
        ('why/why_bind', 'Why'),
        ('solutions/60_refine', 'Solutions'),
    ],
)
def test_pages_are_grouped_by_chapter(name, chapter):
    assert site.group(house.NBS / f'{name}.ipynb') == chapter


SOURCE = """"What it is."
# %% ../../nbs/pictures/32_clips.ipynb
__all__ = ['f', 'C', 'LIMIT']
LIMIT = 3 # of them
def f(
    x:int, y:int=1, # place | pixels
    # a comment that is
    # too long for its line
    z:int=2,
    *rest,
)->float:           # how far
    "Far."
class C:
    "A thing."
    n:int = 0 # how many
    def double(self): return 2*self.n # twice as many
    def _hidden(self): pass
@patch
def add(self:C, m:int): # more of them
    "Grow."
"""
TABLES = [
    '# spatialavatar0.m',
    'page [32 Clips](../pictures/32_clips.md)',
    '## f { #f }',
    'f(x: int, y: int=1, z: int=2, *rest) -> float',
    r'| `` x:int ``, `` y:int=1 `` | place \| pixels |',
    '| `` z:int=2 `` | a comment that is too long for its line |',
    '| *returns* `` float `` | how far |',
    'Far.',
    '| `` n: int = 0 `` | how many |',
    '### C.double { #C.double }',
    'twice as many',
    '### C.add',
    '| `` m:int `` | more of them |',
    '| `` LIMIT ``',
]


def test_comments_become_tables(tmp_path):
    (tmp_path / 'm.py').write_text(SOURCE)
    page = house.NBS / 'pictures' / '32_clips.ipynb'
    text = Module(tmp_path / 'm.py').markdown({page: '32 Clips'})
    for line in TABLES:
        assert line in text, line
    assert '_hidden' not in text


def test_links_to_nowhere_are_all_named(tmp_path):
    kit = site.Site(tmp_path)
    page = house.NBS / 'ground' / '00_core.ipynb'
    text = '[a](98_none.ipynb) `[b](97.ipynb)` [c](../splats/20_binding.ipynb#Who-sits-where)'
    made = '[a](#) `[b](97.ipynb)` [c](../splats/20_binding.md#who-sits-where)'
    assert kit.prose(text, page) == made
    assert kit.lost == ['nbs/ground/00_core.ipynb: no 98_none.ipynb']


def test_files_come_along(tmp_path):
    kit = site.Site(tmp_path)
    page = house.NBS / 'ground' / '00_core.ipynb'
    assert kit.prose('[n](../../NOTICE)', page) == '[n](../files/NOTICE.txt)'
    assert (tmp_path / 'files' / 'NOTICE.txt').exists()
    assert kit.prose('[r](../../README.md)', page) == '[r](../files/README.md)'
    assert '](../splats/25_mesh.md)' in (tmp_path / 'files' / 'README.md').read_text()


def test_it_spares_a_folder_of_yours(tmp_path):
    pytest.importorskip('mkdocs')
    (tmp_path / 'mine.txt').write_text('x')
    with pytest.raises(SystemExit, match='no site of ours'):
        site.build(tmp_path)
    assert (tmp_path / 'mine.txt').exists()


# ---- the whole site


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    for name in ('mkdocs', 'material', 'latex2mathml', 'ziamath'):
        pytest.importorskip(name)
    out = tmp_path_factory.mktemp('site')
    site.build(out)
    return out


def read(path):
    return path.read_text(encoding='utf-8')


def pictures_of(cells):
    "How many pictures and figures to turn a page has."
    outputs = [o for c in cells for o in c.get('outputs', [])]
    kinds = ('image/', site.PLOTLY)
    return sum(any(k.startswith(kinds) for k in o.get('data', {})) for o in outputs)


def test_every_page_and_picture(built):
    assert check(built) == []
    assert 'head.jpg' in read(built / 'index.html')
    assert not (ROOT / 'docs').exists()
    front = read(built / 'index.html')
    kit = site.Site(built)
    assert len(kit.pages) > 40
    for page, cells in kit.pages.items():
        place = page.relative_to(house.NBS).with_suffix('.html')
        text = read(built / place)
        assert 'zqraw' not in text
        assert house.number(page) in text
        shown = text.count('src="pictures/') + text.count('Plotly.newPlot')
        assert shown == pictures_of(cells), page.name
        assert place.as_posix() in front or page in house.solutions(), page.name


def test_every_name(built):
    for module in site.Site(built).modules:
        ids = set(re.findall(r'id="([^"]+)"', read(built / 'api' / f'{module.name}.html')))
        assert {n for n in module.names if n in module.defs} <= ids, module.name
    api = read(built / 'api' / 'pictures.clips.html')
    assert 'top left corner of the square, pixels; may be negative' in api
    assert '(size,size), camera adjusted' in api


def test_formulas_are_set(built):
    page = read(built / 'splats' / '20_binding.html')
    cells = house.read(house.NBS / 'splats' / '20_binding.ipynb')['cells']
    texts = [house.text(c) for c in cells if c['cell_type'] == 'markdown']
    plain = [re.sub(r'`[^`\n]+`', '', text) for text in texts]
    formulas = sum(len(site.FORMULA.findall(text)) for text in plain)
    assert page.count('<math') == formulas > 20
    assert '$$' not in re.sub(r'<(pre|code).*?</\1>', '', page, flags=re.DOTALL)


# ---- in a browser

FLAGS = ['--no-sandbox', '--enable-unsafe-swiftshader', '--disable-background-networking']
LOST_AND_WIDE = """[
    [...document.images].filter(i => i.loading != "lazy" && !(i.complete && i.naturalWidth)).length,
    document.documentElement.scrollWidth - innerWidth]"""
# what cells print may be wide: it is not to be read line by line
WIDE_BLOCKS = """[...document.querySelectorAll('.highlight pre code')]
    .filter(b => !b.closest('.output')).map(b => b.scrollWidth > b.clientWidth + 1)"""


@contextmanager
def tab(**options):
    "A page of a browser that has no network."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=find_browser(), args=FLAGS)
        yield browser.new_context(offline=True, **options).new_page()
        browser.close()


def visit(built):
    """Front page, its search, formulas, a figure to turn, the API; from the folder. Returns what
    complained, or asked for more."""
    said = []
    own = 'file:', 'data:', 'blob:', 'about:'
    with tab(viewport=dict(width=1280, height=900)) as page:
        page.on('console', lambda m: said.append(m.text) if m.type == 'error' else None)
        page.on('pageerror', lambda error: said.append(str(error)))
        page.on('request', lambda r: None if r.url.startswith(own) else said.append(r.url))

        def go(name, ready):
            page.goto((built / name).as_uri())
            page.locator(ready).first.wait_for(state='attached', timeout=30_000)

        go('index.html', 'article img')
        assert page.evaluate('document.querySelector("article img").naturalWidth') > 200
        found = page.locator('.md-search-result__item')
        page.locator('.md-search__input').click()
        page.locator('.md-search__input').press_sequentially('barycentric')
        found.first.wait_for(timeout=30_000)
        page.locator('.md-search__input').fill('Eq. 4')
        found.filter(has_text="The paper's index").first.wait_for(timeout=30_000)
        go('splats/20_binding.html', 'math')
        assert page.evaluate('document.fonts.load("16px Formulas").then(f => f.length)') == 1
        go('splats/26_figures.html', '.js-plotly-plot canvas')
        go('api/pictures.clips.html', '#crop')
    return said


def to_photograph(built):
    "Pages with a text; without are films and heads."
    files = sorted(built.rglob('*.html'))
    return [f for f in files if 'md-content' in read(f) and f.parent.name != 'solutions']


def flaws(page, name, shot, width):
    "What a page lacks at the width it has now; its screenshot stays."
    from PIL import Image

    lost, over = page.evaluate(LOST_AND_WIDE)
    page.screenshot(path=shot, type='jpeg', quality=60)
    dark, bright = Image.open(shot).convert('L').getextrema()
    if not lost and over <= 1 and bright - dark >= 100:
        return []
    said = f'{lost} pictures lost, {over} pixels too wide, grey from {dark} to {bright}'
    return [f'{name} at {width}: {said}']


def photographs(built, folder):
    "Every page, wide and as on a phone: what is wrong."
    wrong = []
    with tab() as page:
        for file in to_photograph(built):
            name = str(file.relative_to(built))
            page.set_viewport_size(dict(width=1280, height=900))
            page.goto(file.as_uri())
            for width, height in ((1280, 900), (390, 844)):
                page.set_viewport_size(dict(width=width, height=height))
                shot = folder / f'{width}_{name.replace("/", "_")[:-5]}.jpg'
                wrong += flaws(page, name, shot, width)
    return wrong


def sideways(built):
    "Blocks of code that scroll sideways on a laptop's screen, and how many blocks there are."
    found = []
    with tab(viewport=dict(width=1440, height=900)) as page:
        for file in to_photograph(built):
            page.goto(file.as_uri())
            blocks = page.evaluate(WIDE_BLOCKS)
            found += [(str(file.relative_to(built)), is_wide) for is_wide in blocks]
    return [name for name, is_wide in found if is_wide], len(found)


browser_needed = pytest.mark.skipif(
    find_browser() is None,
    reason='needs Chromium (apt-get install chromium) and playwright (pip install playwright)',
)


def apart(do, *given):
    "Playwright wants a thread without an event loop."
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(do, *given).result()


@browser_needed
def test_in_a_browser(built):
    assert apart(visit, built) == []


@browser_needed
def test_screenshots_of_every_page(built, tmp_path):
    "SHOTS=folder keeps them."
    folder = Path(os.environ.get('SHOTS') or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    assert apart(photographs, built, folder) == []
    assert len(list(folder.glob('1280_*.jpg'))) > 60


@browser_needed
def test_code_does_not_scroll_sideways(built):
    wide, blocks = apart(sideways, built)
    assert blocks > 1000
    assert len(wide) <= 0.01 * blocks, sorted(set(wide))
