"""The site: its link checker, how comments become tables, and all of it built, clicked and searched
without a network."""

import importlib.util
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT
from spatialavatar0.use.viewer import find_browser

spec = importlib.util.spec_from_file_location(
    'site_tool', ROOT / 'tools' / 'site.py'
)  # `site` is a module of Python
site = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site)

GOOD = (
    '<h1 id="top-of-a">A</h1><a href="b/c.html#deep">c</a> <a href="#top-of-a">up</a> <a '
    'href="https://example.org">away</a> <img src="x.png"> <img src="data:,">'
)


@pytest.fixture
def folder(tmp_path):
    "Two pages, a picture and a style that refer to each other as they should."
    (tmp_path / 'b').mkdir()
    (tmp_path / 'x.png').write_bytes(b'x')
    (tmp_path / 's.css').write_text('p{background:url(x.png)}')
    (tmp_path / 'a.html').write_text(GOOD)
    (tmp_path / 'b' / 'c.html').write_text(
        '<p id="deep"><a href="../a.html">a</a><a href="mailto:a@b.c">m</a> <link '
        'rel="stylesheet" href="../s.css">'
    )
    return tmp_path


def test_good_links(folder):
    assert site.check(folder) == []


def test_an_empty_folder_is_no_site(tmp_path):
    assert site.check(tmp_path) == ['no page']


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
        (
            '<style>@font-face{src:url("https://f.org/f.woff2")}</style>',
            'fetches https://f.org/f.woff2',
        ),
        ('<p style="background:url(http://h.org/p.png)">', 'fetches http://h.org/p.png'),
    ],
)
def test_bad_links(folder, text, wrong):
    (folder / 'a.html').write_text(GOOD + text)
    assert site.check(folder) == [f'a.html: {wrong}']


def test_a_style_that_fetches(folder):
    (folder / 's.css').write_text('@import "https://f.org/f.css";')
    assert site.check(folder) == ['s.css: fetches https://f.org/f.css']


def test_pages_are_grouped_as_in_the_readme():
    groups = dict(
        index='Start',
        **{
            '00_core': 'Representation',
            '05b_mesh': 'Representation',
            '14_evaluate': 'Evaluation',
            '15_animate': 'Use',
            '15c_subjects': 'Evaluation',
            '12c_densify': 'Stage 2',
            '20_photo': 'Use',
            '34_why': 'Explanations',
            '99_new': 'More',
            'solutions/12_refine': 'Exercises',
        },
    )
    assert {n: site.group(site.NBS / f'{n}.ipynb') for n in groups} == groups


SOURCE = """"What it is."
# %% ../nbs/07_clips.ipynb
__all__ = ['f', 'C', 'LIMIT']
LIMIT = 3 # of them
def f(
    x:int, y:int=1, # place | pixels
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


def test_comments_become_tables(tmp_path):
    (tmp_path / 'm.py').write_text(SOURCE)
    text = site.Module(tmp_path / 'm.py').markdown({site.NBS / '07_clips.ipynb': '07 Clips'})
    for line in (
        '# spatialavatar0.m',
        'page [07 Clips](../07_clips.md)',
        '## f { #f }',
        'f(x: int, y: int=1, *rest) -> float',
        r'| `` x:int ``, `` y:int=1 `` | place \| pixels |',
        '| *returns* `` float `` | how far |',
        'Far.',
        '| `` n: int = 0 `` | how many |',
        '### C.double { #C.double }',
        'twice as many',
        '### C.add',
        '| `` m:int `` | more of them |',
        '| `` LIMIT ``',
    ):
        assert line in text, line
    assert '_hidden' not in text


def test_links_to_nowhere_are_all_named(tmp_path):
    kit = site.Site(tmp_path)
    page = site.NBS / '00_core.ipynb'
    assert (
        kit.prose('[a](98_none.ipynb) `[b](97.ipynb)` [c](04_binding.ipynb#Who-sits-where)', page)
        == '[a](#) `[b](97.ipynb)` [c](04_binding.md#who-sits-where)'
    )
    assert kit.lost == ['nbs/00_core.ipynb: no 98_none.ipynb']
    assert kit.prose('[n](../NOTICE)', page) == '[n](files/NOTICE.txt)'
    assert (tmp_path / 'files' / 'NOTICE.txt').exists()
    assert kit.prose('[r](../README.md)', page) == '[r](files/README.md)'
    assert '](../05b_mesh.md)' in (tmp_path / 'files' / 'README.md').read_text()


def test_it_spares_a_folder_of_yours(tmp_path):
    pytest.importorskip('mkdocs')
    (tmp_path / 'mine.txt').write_text('x')
    with pytest.raises(SystemExit, match='no site of ours'):
        site.build(tmp_path)
    assert (tmp_path / 'mine.txt').exists()


# the whole site


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    for name in ('mkdocs', 'material', 'latex2mathml', 'ziamath'):
        pytest.importorskip(name)
    out = tmp_path_factory.mktemp('site')
    site.build(out)
    return out


def read(path):
    return path.read_text(encoding='utf-8')


def test_every_page_every_name_every_picture(built):
    assert site.check(built) == []
    assert 'head.jpg' in read(built / 'index.html')
    assert not (ROOT / 'docs').exists()
    kit = site.Site(built)
    pages = kit.pages
    assert len(pages) > 40
    for p, cells in pages.items():
        text = read(built / p.relative_to(site.NBS).with_suffix('.html'))
        assert 'zqraw' not in text and p.stem.split('_')[0] in text
        shown = sum(
            any(k.startswith(('image/', 'application/vnd.plotly')) for k in o.get('data', {}))
            for c in cells
            for o in c.get('outputs', [])
        )
        assert text.count('src="pictures/') + text.count('Plotly.newPlot') == shown, p.name
        if p.parent == site.NBS:
            assert f'{p.stem}.html' in read(built / 'index.html'), p.name
    for m in (m for m in kit.modules if m.names):
        ids = set(re.findall(r'id="([^"]+)"', read(built / 'api' / f'{m.name}.html')))
        assert {n for n in m.names if n in m.defs} <= ids, m.name
    api = read(built / 'api' / 'clips.html')
    assert 'top left corner of the square, pixels; may be negative' in api
    assert '(size,size), camera adjusted' in api
    assert read(built / '04_binding.html').count('<math') > 30
    assert '$$' not in re.sub(
        r'<(pre|code).*?</\1>', '', read(built / '04_binding.html'), flags=re.S
    )


def visit(built):
    """Front page, its search, formulas, a figure to turn, the API; from the folder, the network
    off. Returns what complained, or asked for more."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=find_browser(),
            args=['--no-sandbox', '--enable-unsafe-swiftshader', '--disable-background-networking'],
        )
        tab = browser.new_context(offline=True, viewport=dict(width=1280, height=900)).new_page()
        said = []
        tab.on('console', lambda m: said.append(m.text) if m.type == 'error' else None)
        tab.on('pageerror', lambda e: said.append(str(e)))
        tab.on(
            'request',
            lambda r: (
                None
                if r.url.startswith(('file:', 'data:', 'blob:', 'about:'))
                else said.append(r.url)
            ),
        )

        def go(page, ready):
            tab.goto((built / page).as_uri())
            tab.locator(ready).first.wait_for(state='attached', timeout=30_000)

        go('index.html', 'article img')
        assert tab.evaluate('document.querySelector("article img").naturalWidth') > 200
        tab.locator('.md-search__input').click()
        tab.locator('.md-search__input').press_sequentially('barycentric')
        tab.locator('.md-search-result__item').first.wait_for(timeout=30_000)
        go('04_binding.html', 'math')
        assert tab.evaluate('document.fonts.load("16px Formulas").then(f => f.length)') == 1
        go('04c_figures.html', '.js-plotly-plot canvas')
        go('api/clips.html', '#crop')
        browser.close()
    return said


def photographs(built, folder):
    """Every page, wide and as on a phone: pictures that did not load, text beside the screen, an
    empty screen. Screenshots stay in the folder."""
    from PIL import Image
    from playwright.sync_api import sync_playwright

    wrong = []
    with sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=find_browser(),
            args=['--no-sandbox', '--enable-unsafe-swiftshader', '--disable-background-networking'],
        )
        tab = browser.new_context(offline=True).new_page()
        for page in (
            p
            for p in sorted(built.rglob('*.html'))
            if 'md-content' in read(p) and p.parent.name != 'solutions'
        ):  # without md-content: films and heads
            name = str(page.relative_to(built))
            tab.set_viewport_size(dict(width=1280, height=900))
            tab.goto(page.as_uri())
            for width, height in ((1280, 900), (390, 844)):
                tab.set_viewport_size(dict(width=width, height=height))
                lost, over = tab.evaluate(
                    '[[...document.images].filter(i => i.loading!="lazy" && !(i.complete && '
                    'i.naturalWidth)).length, document.documentElement.scrollWidth-innerWidth]'
                )
                shot = folder / f'{width}_{name.replace("/", "_")[:-5]}.jpg'
                tab.screenshot(path=shot, type='jpeg', quality=60)
                dark, bright = Image.open(shot).convert('L').getextrema()
                if lost or over > 1 or bright - dark < 100:
                    wrong.append(
                        f'{name} at {width}: {lost} pictures lost, {over} pixels too wide, grey '
                        f'from {dark} to {bright}'
                    )
        browser.close()
    return wrong


browser_needed = pytest.mark.skipif(
    find_browser() is None,
    reason='needs Chromium (apt-get install chromium) and playwright (pip install playwright)',
)


@browser_needed
def test_in_a_browser(built):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(visit, built).result() == []


@browser_needed
def test_screenshots_of_every_page(built, tmp_path):
    "SHOTS=folder keeps them."
    folder = Path(os.environ.get('SHOTS') or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(photographs, built, folder).result() == []
    assert len(list(folder.glob('1280_*.jpg'))) > 60
