"""The whole kit as a static site: every page with the outputs it was committed with, the API,
search. Nothing is executed.

    python tools/site.py                build ./site; open site/index.html
    python tools/site.py --out FOLDER   build there
    python tools/site.py --check FOLDER only check a built site: links, anchors, nothing fetched

Neither building nor reading needs a network: formulas become MathML, figures to turn bring
plotly.js along, search runs from the folder, too. Building fails on any warning of MkDocs, on a
link to nowhere and on a formula that cannot be set. The tree stays as it is.
"""

import argparse
import base64
import html
import importlib.util
import json
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlsplit

import house
from site_api import Module
from site_links import check

MATH_FONT = 'STIXTwoMath-Regular.ttf'
PLOTLY = 'application/vnd.plotly.v1+json'
PICTURES = 'image/jpeg', 'image/png', 'image/gif'
FORMULA = re.compile(r'\$\$(.+?)\$\$|(?<![\\$\w])\$(?!\s)([^$]+?)(?<!\s)\$(?!\d)', re.DOTALL)
LINK = re.compile(r'(\]\(|src="|href=")([^)"\s]+)')
TIGHT_LIST = re.compile(r'^(?!\s|[-*|] |\d+\. |\|)(.*\S.*)\n(?=[-*] |\d+\. |\|)', re.MULTILINE)
CSS = """
.md-grid { max-width: 76rem }
.md-typeset table:not([class]) { font-size: .68rem }
.md-typeset .highlight span.filename {
  font-size: .6rem; font-weight: 400; padding: .15rem .8rem; opacity: .7
}
math { font-family: Formulas, math; font-size: 1.06em }
math[display=block] { overflow: auto hidden; padding: .3em 0 }
@font-face { font-family: Formulas; src: url(STIXTwoMath-Regular.ttf) }
.output { overflow-x: auto }
.output img { background: #fff }
.output pre > code {
  background: none; border-left: .2rem solid var(--md-default-fg-color--lightest)
}
"""
WORKER = """
// a file may not start workers: a hidden frame does the search
if (location.protocol == "file:") window.Worker = class extends EventTarget {
  constructor(url) {
    super();
    const frame = this.frame = document.createElement("iframe");
    const script = text => `<script${text}</` + "script>";
    frame.hidden = true;
    frame.srcdoc = script(">postMessage = m => parent.postMessage(m, '*')")
      + script(` src="${new URL(url, location)}">`);
    this.ready = new Promise(done => frame.onload = done);
    addEventListener("message", event => {
      if (event.source == frame.contentWindow)
        this.dispatchEvent(new MessageEvent("message", {data: event.data}));
    });
    document.body.append(frame);
  }
  postMessage(m) {
    this.ready.then(() => postMessage.call(this.frame.contentWindow, m, "*"));
  }
}
"""
# a wide hat; bars and minus signs set close
FINER = [
    ('<mo>&#x0005E;', '<mo stretchy="true">&#x00302;'),
    ('<mo stretchy="false">&#x0007C;', '<mo stretchy="false" lspace=".05em" rspace=".05em">|'),
    (
        '(<mo[^>]*>(?:=|&#x0003D;|&#x00028;|&#x0002C;)</mo>)<mo>&#x02212;',
        r'\1<mo form="prefix">&#x02212;',
    ),
]
# who searches for "Eq. 4" wants the paper's index, not the pages whose number begins with 4
BOOST = '---\nsearch:\n  boost: 50\n---\n\n'
# (HTML, words for the search) that Markdown must not touch: a token stands for each until the pages
# are built
RAW = []


def keep(text, words=''):
    "A token for a piece of HTML."
    RAW.append((text, words))
    return f'zqraw{len(RAW) - 1}zq'


def installed(package, file):
    "The bytes of a file that a Python package carries."
    return (Path(importlib.util.find_spec(package).origin).parent / file).read_bytes()


def group(path):
    "Where a page stands in the navigation."
    if path == house.NBS / 'index.ipynb':
        return 'Start'
    return house.CHAPTERS.get(house.chapter(path), 'Solutions')


def formula(found):
    "TeX to MathML, which browsers draw themselves."
    from latex2mathml.converter import convert

    tex = (found[1] or found[2]).strip()
    out = convert(tex.replace(r'\big\|', r'\|'), display='block' if found[1] else 'inline')
    if '\\' in out:
        raise SystemExit(f'cannot set this formula: {tex}')
    for pattern, better in FINER:
        out = re.sub(pattern, better, out)
    return keep(out, tex)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else f'{text}\n'.encode())


def anchor_of(fragment):
    "Jupyter's anchors keep capitals and signs; the site's do not."
    if not fragment:
        return ''
    plain = re.sub(r'[^\w\s-]', '', unquote(fragment)).strip().lower()
    return '#' + re.sub(r'[-\s]+', '-', plain)


def title_of(path, cells):
    "The number and heading of a page."
    heading = re.findall(r'^# (.+)', house.text(cells[0]), re.M) or [path.stem]
    return f'{house.number(path)} {heading[0]}'.strip()


def printed(text):
    "What a cell printed."
    text = ''.join(text).rstrip()
    return f'<div class="output" markdown>\n````` text\n{text}\n`````\n</div>' if text else ''


def flags_of(cell):
    return set(re.findall(r'^#\|\s*(\w+)', house.text(cell), re.M))


class Site:
    "Markdown of everything, in a folder, for MkDocs."

    def __init__(self, docs):
        self.docs = docs
        self.lost = []  # links to nowhere
        paths = [p.relative_to(house.PACKAGE) for p in house.PACKAGE.rglob('[!_]*.py')]
        order = list(house.modules())
        modules = [Module(house.PACKAGE / p) for p in paths]
        self.modules = sorted(modules, key=lambda m: order.index(m.name))
        self.pages = {p: house.read(p)['cells'] for p in house.notebooks()}
        self.titles = {p: title_of(p, cells) for p, cells in self.pages.items()}
        self.module_of = {m.page: m.name for m in self.modules}
        # names that say which module they are of
        found = [(n, m.name) for m in self.modules for n in m.names if n in m.defs]
        names = [n for n, _ in found]
        self.api = {n: module for n, module in found if names.count(n) == 1}

    def place(self, path):
        "Where a file of the repository lies on the site."
        if path.is_relative_to(house.NBS):
            return self.docs / path.relative_to(house.NBS)
        return self.docs / 'files' / path.relative_to(house.ROOT)

    def up(self, page):
        "From a page to the top of the site."
        return '../' * (len(self.place(page).relative_to(self.docs).parts) - 1)

    def bring(self, target):
        "Take a file or a folder of the repository along; where it lies."
        place = self.place(target)
        if target.is_dir():
            return self.bring_folder(target, place)
        if target.suffix != '.md':
            place = place if place.suffix else place.with_name(f'{place.name}.txt')
            write(place, target.read_bytes())
        elif not place.exists():
            write(place, '')  # first empty, as they may link in a circle
            write(place, self.prose(target.read_text(encoding='utf-8'), target))
        return place

    def bring_folder(self, target, place):
        "The files of a folder, and a page that lists them."
        left = '.md', '.html'
        files = [f for f in sorted(target.iterdir()) if f.is_file() and f.suffix not in left]
        files = [f for f in files if not f.name.startswith('.')]
        for file in files:
            write(place / file.name, file.read_bytes())
        names = '\n'.join(f'- [{f.name}]({f.name})' for f in files)
        write(place / 'contents.md', f'# {target.name}\n\n{names}')
        return place / 'contents.md'

    def link(self, url, page):
        "Where a link of a page leads on the site."
        parts = urlsplit(url)
        if not (parts.scheme or parts.path) and page.suffix == '.ipynb':
            return anchor_of(parts.fragment)
        if parts.scheme or not parts.path:
            return url
        target = (page.parent / unquote(parts.path)).resolve()
        if not target.exists() or not target.is_relative_to(house.ROOT):
            self.lost.append(f'{page.relative_to(house.ROOT)}: no {url}')
            return '#'
        anchor = ''
        if target.suffix == '.ipynb':
            place, anchor = self.place(target).with_suffix('.md'), anchor_of(parts.fragment)
        else:
            place = self.bring(target)
            anchor = f'#{parts.fragment}' if parts.fragment and target.suffix == '.md' else ''
        return Path(os.path.relpath(place, self.place(page).parent)).as_posix() + anchor

    def linked_name(self, text, before, after, page):
        "A name of the package in backticks leads to the API, unless it is a link or a heading."
        name = text.strip('`').removesuffix('()')
        is_link = before.endswith('[') or re.match(r'[^\[\]]*\]\(', after)
        in_heading = before.rpartition('\n')[2][:1] == '#'
        if name not in self.api or is_link or in_heading:
            return text
        return f'[{text}]({self.up(page)}api/{self.api[name]}.md#{name})'

    def paragraph(self, text, page):
        "Markdown without blocks of code."
        parts = re.split(r'(`[^`\n]+`)', TIGHT_LIST.sub(r'\1\n\n', text))
        for k in range(0, len(parts), 2):
            parts[k] = FORMULA.sub(formula, parts[k])
            parts[k] = LINK.sub(lambda m: m[1] + self.link(m[2], page), parts[k])
        for k in range(1, len(parts), 2):
            parts[k] = self.linked_name(parts[k], parts[k - 1], parts[k + 1], page)
        return ''.join(parts)

    def prose(self, text, page):
        "Markdown as Jupyter reads it: links, formulas, lists right after a line."
        parts = re.split(r'(^```.*?^```[^\n]*$)', text, flags=re.M | re.S)
        parts[::2] = [self.paragraph(part, page) for part in parts[::2]]
        return ''.join(parts)

    def plotly(self, data, page, name, alt):
        "A figure to turn, with the script that draws it."
        script = self.docs / 'assets' / 'plotly.min.js'
        if not script.exists():
            write(script, installed('plotly', 'package_data/plotly.min.js'))
        figure = json.dumps(data).replace('</', '<\\/')
        options = '{responsive: true, displaylogo: false}'
        draw = f'((f) => Plotly.newPlot("{name}", f.data, f.layout, {options}))({figure})'
        return keep(
            f'<div id="{name}" role="img" aria-label="{alt}"></div>'
            f'<script src="{self.up(page)}assets/plotly.min.js"></script><script>{draw}</script>',
            alt,
        )

    def picture(self, data, kind, page, name, alt):
        file = f'{name}.{kind.removeprefix("image/")}'
        raw = base64.b64decode(''.join(data[kind]))
        write(self.place(page).parent / 'pictures' / file, raw)
        return keep(f'<img src="pictures/{file}" alt="{alt}" loading="lazy">', alt)

    def output(self, output, page, name):
        "One output: a figure to turn, a picture, HTML, a table or text."
        if output['output_type'] == 'stream':
            return printed(output['text'])
        if output['output_type'] == 'error':
            raise SystemExit(f'{page.name}: an output is an error')
        data = output['data']
        kind = next((k for k in PICTURES if k in data), '')
        alt = html.escape(output.get('metadata', {}).get(kind, {}).get('alt', ''))
        if PLOTLY in data:
            shown = self.plotly(data[PLOTLY], page, name, alt)
        elif kind:
            shown = self.picture(data, kind, page, name, alt)
        elif 'text/html' in data:
            shown = keep(''.join(data['text/html']))
        elif 'text/markdown' in data:
            return self.prose(''.join(data['text/markdown']), page)
        else:
            return printed(data.get('text/plain', ''))
        return f'<div class="output">{shown}</div>'

    def first_cell(self, cell, path):
        "Title, and where the module's API is."
        title = f'# {self.titles[path]}'
        parts = [re.sub('^# .+', lambda _: title, self.prose(house.text(cell), path), count=1)]
        if module := self.module_of.get(path):
            api = f'{self.up(path)}api/{module}.md'
            parts.append(f'Source of [spatialavatar0.{module}]({api}).')
        return parts

    def code_cell(self, cell, path, number):
        "Code, then what it showed."
        flags = flags_of(cell)
        if 'hide' in flags:
            return []
        code = re.sub(r'^#\|.*\n?', '', house.text(cell), flags=re.M).strip()
        exported = flags & {'export', 'exporti', 'exports'}
        module = self.module_of.get(path, '').replace('.', '/')
        title = f' title="spatialavatar0/{module}.py"' if module and exported else ''
        parts = []
        if code and not flags & {'hide_input', 'echo'}:
            parts.append(f'`````{{.python{title}}}\n{code}\n`````')
        outputs = enumerate(cell['outputs'])
        return parts + [self.output(o, path, f'{path.stem}-{number}-{k}') for k, o in outputs]

    def page(self, path, cells):
        parts = self.first_cell(cells[0], path)
        for number, cell in enumerate(cells[1:], 1):
            if cell['cell_type'] == 'markdown':
                parts.append(self.prose(house.text(cell), path))
            elif cell['cell_type'] == 'code':
                parts += self.code_cell(cell, path, number)
        boost = BOOST if path.stem == 'paper_index' else ''
        write(self.place(path).with_suffix('.md'), boost + '\n\n'.join(filter(None, parts)))

    def assets(self):
        write(self.docs / 'assets' / 'extra.css', CSS)
        write(self.docs / 'assets' / 'iframe-worker.js', WORKER)
        write(self.docs / 'assets' / MATH_FONT, installed('ziamath', f'fonts/{MATH_FONT}'))

    def navigation(self):
        "Chapters with their pages, as MkDocs wants them."
        chapters = {name: [] for name in ('Start', *house.CHAPTERS.values(), 'Solutions')}
        for path, title in self.titles.items():
            place = path.relative_to(house.NBS).with_suffix('.md').as_posix()
            chapters[group(path)].append({title: place})
        api = [{m.name: f'api/{m.name}.md'} for m in self.modules]
        filled = [{name: pages} for name, pages in chapters.items() if pages and name != 'Start']
        return [{'Start': 'index.md'}, *filled, {'API': api}]

    def all(self):
        "Write everything; returns the navigation."
        for path, cells in self.pages.items():
            self.page(path, cells)
        if self.lost:
            raise SystemExit('\n'.join(self.lost))
        for module in self.modules:
            write(self.docs / 'api' / f'{module.name}.md', module.markdown(self.titles))
        self.assets()
        return self.navigation()


def fill(folder):
    "Put back what the tokens stand for."
    for file in [*folder.rglob('*.html'), *folder.glob('search/*')]:
        is_search = file.suffix != '.html'

        def put(found, is_search=is_search):
            shown, words = RAW[int(found[1])]
            return json.dumps(words)[1:-1] if is_search else shown

        text = file.read_text(encoding='utf-8')
        file.write_text(re.sub(r'zqraw(\d+)zq', put, text), encoding='utf-8')


def mkdocs(docs, out, navigation):
    "HTML from Markdown; any warning is an error."
    os.environ['NO_MKDOCS_2_WARNING'] = '1'
    from mkdocs.commands.build import build as make
    from mkdocs.config import load_config

    logging.basicConfig(level=logging.WARNING, format='%(levelname)s %(message)s')
    options = dict(docs_dir=str(docs), site_dir=str(out), nav=navigation, strict=True)
    make(load_config(str(house.ROOT / 'mkdocs.yml'), **options))
    for name in ('404.html', 'sitemap.xml', 'sitemap.xml.gz'):
        (out / name).unlink(missing_ok=True)  # they ask for an address


def build(out):
    "Build the site in a folder; how many pages."
    out = Path(out).resolve()
    RAW.clear()
    ours = (out / 'search' / 'search_index.js').exists()
    if out.exists() and any(out.iterdir()) and not ours:
        raise SystemExit(f'{out} is no site of ours: remove it first')
    with tempfile.TemporaryDirectory() as folder:
        docs, made = Path(folder) / 'docs', Path(folder) / 'site'
        docs.mkdir()
        mkdocs(docs, made, Site(docs).all())
        fill(made)
        if wrong := check(made):
            raise SystemExit('\n'.join([*wrong, f'{len(wrong)} wrong; {out} is as it was']))
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(made, out)
    return len(list(out.rglob('*.html')))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out', default='site')
    parser.add_argument('--check')
    given = parser.parse_args()
    if given.check:
        raise SystemExit('\n'.join(check(given.check)) or 0)
    print(f'{build(given.out)} pages: open {Path(given.out) / "index.html"}')


if __name__ == '__main__':
    main()
