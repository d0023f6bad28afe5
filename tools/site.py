"""The whole kit as a static site: every page with the outputs it was committed with, the API, search. Nothing is executed.

    pip install -e ".[site]"
    python tools/site.py                build ./site; open site/index.html, from the folder or from any web server
    python tools/site.py --out FOLDER   build there
    python tools/site.py --check FOLDER only check a built site: links, anchors, nothing fetched from elsewhere

Neither building nor reading needs a network: formulas become MathML, figures to turn bring plotly.js along, search runs from the folder, too.
Building fails on any warning of MkDocs, on a link to nowhere and on a formula that cannot be set. The tree stays as it is.
"""

import argparse
import ast
import base64
import html
import importlib.util
import io
import json
import logging
import os
import re
import shutil
import tempfile
import textwrap
import tokenize
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / 'nbs'
PACKAGE = ROOT / 'spatialavatar0'
GROUPS = {
    'Representation': '0-5',
    'Evaluation': '6 14 15c 22 23',
    'Data': '7-8',
    'Stage 1': '9-11',
    'Stage 2': '12',
    'Tracking': '13',
    'Use': '15-21',
    'Both stages, at scale': '24-25',
    'Teaching': '26-29',
    'Explanations': '30-39',
}  # the first that fits: 15c before 15-21
CSS = """.md-grid{max-width:76rem} .md-typeset table:not([class]){font-size:.68rem} math[display=block]{overflow:auto hidden;padding:.3em 0}
@font-face{font-family:Formulas;src:url(STIXTwoMath-Regular.ttf)} math{font-family:Formulas,math;font-size:1.06em}
.md-typeset .highlight span.filename{font-size:.6rem;font-weight:400;padding:.15rem .8rem;opacity:.7} .output img{background:#fff}
.output{overflow-x:auto} .output pre>code{background:none;border-left:.2rem solid var(--md-default-fg-color--lightest)}"""
WORKER = """// a file may not start workers: a hidden frame does the search
if (location.protocol=="file:") window.Worker = class extends EventTarget {
  constructor(url) {
    super(); const f = this.frame = document.createElement("iframe"), s = t => `<script${t}</` + "script>"; f.hidden = true;
    f.srcdoc = s(">postMessage = m => parent.postMessage(m, '*')") + s(` src="${new URL(url, location)}">`); this.ready = new Promise(done => f.onload = done);
    addEventListener("message", e => e.source==f.contentWindow && this.dispatchEvent(new MessageEvent("message", {data: e.data}))); document.body.append(f) }
  postMessage(m) { this.ready.then(() => postMessage.call(this.frame.contentWindow, m, "*")) } }"""
FINER = [
    ('<mo>&#x0005E;', '<mo stretchy="true">&#x00302;'),
    ('<mo stretchy="false">&#x0007C;', '<mo stretchy="false" lspace=".05em" rspace=".05em">|'),
    (
        '(<mo[^>]*>(?:=|&#x0003D;|&#x00028;|&#x0002C;)</mo>)<mo>&#x02212;',
        r'\1<mo form="prefix">&#x02212;',
    ),
]  # a wide hat, bars and minus signs set close
# (HTML, words for the search) that Markdown must not touch: a token stands for each until the pages
# are built
RAW = []


def keep(text, words=''):
    RAW.append((text, words))
    return f'zqraw{len(RAW) - 1}zq'


def installed(package, file):
    return (Path(importlib.util.find_spec(package).origin).parent / file).read_bytes()


def order(path):
    "Number and letter of a page: 15, 'c'; pages without come first."
    m = re.match(r'(\d+)([a-z]*)', path.stem)
    return (int(m[1]), m[2]) if m else (-1, '')


def group(path):
    "Where a page stands in the navigation, by its number as in the README's table."
    n, letter = order(path)
    path = path.relative_to(NBS)

    def covers(which):
        a, _, b = which.partition('-')
        return which == f'{n}{letter}' or a.isdigit() and int(a) <= n <= int(b or a)

    if len(path.parts) > 1 or n < 0:
        return (
            'Exercises'
            if path.parts[0] == 'solutions'
            else 'Start'
            if path.name == 'index.ipynb'
            else 'More'
        )
    return next((name for name, which in GROUPS.items() if any(map(covers, which.split()))), 'More')


def formula(m):
    "TeX to MathML, which browsers draw themselves."
    from latex2mathml.converter import convert

    tex = (m[1] or m[2]).strip()
    out = convert(tex.replace(r'\big\|', r'\|'), display='block' if m[1] else 'inline')
    if '\\' in out:
        raise SystemExit(f'cannot set this formula: {tex}')
    for a, b in FINER:
        out = re.sub(a, b, out)
    return keep(out, tex)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else f'{text}\n'.encode())


class Site:
    "Markdown of everything, in a folder, for MkDocs."

    def __init__(self, docs):
        paths = [
            p
            for p in NBS.rglob('*.ipynb')
            if not any(x.startswith(('_', '.')) for x in p.relative_to(NBS).parts)
        ]
        self.docs = docs
        self.lost = []
        self.modules = [Module(p) for p in sorted(PACKAGE.glob('[!_]*.py'))]
        self.pages = {
            p: json.loads(p.read_text(encoding='utf-8'))['cells']
            for p in sorted(paths, key=lambda p: (order(p), p))
        }
        self.titles = {
            p: f'{p.stem.split("_")[0]} ' * (order(p)[0] >= 0)
            + (re.findall(r'^# (.+)', ''.join(c[0]['source']), re.M) or [p.stem])[0]
            for p, c in self.pages.items()
        }
        found = [(n, m.name) for m in self.modules for n in m.names if n in m.defs]
        self.api = {
            n: m for n, m in found if sum(n == o for o, _ in found) == 1
        }  # names that say which module they are of

    def place(self, path):
        return self.docs / (
            path.relative_to(NBS)
            if path.is_relative_to(NBS)
            else Path('files') / path.relative_to(ROOT)
        )

    def up(self, page):
        return '../' * (len(self.place(page).relative_to(self.docs).parts) - 1)

    def link(self, url, page):
        """Where a link of a page leads on the site; a file or folder from elsewhere in the
        repository comes along."""
        part = urlsplit(url)
        target = (page.parent / unquote(part.path)).resolve()
        anchor = ''
        if part.scheme or not part.path:
            return url
        if not target.exists() or not target.is_relative_to(ROOT):
            self.lost.append(f'{page.relative_to(ROOT)}: no {url}')
            return '#'
        at = self.place(target)
        if target.suffix == '.ipynb':  # Jupyter's anchors keep capitals and signs
            at = at.with_suffix('.md')
            anchor = '#' * bool(part.fragment) + re.sub(
                r'[-\s]+', '-', re.sub(r'[^\w\s-]', '', unquote(part.fragment)).strip().lower()
            )
        elif target.is_dir():
            files = [
                f
                for f in sorted(target.iterdir())
                if f.is_file() and f.name[0] != '.' and f.suffix not in ('.md', '.html')
            ]
            for f in files:
                write(at / f.name, f.read_bytes())
            at /= 'contents.md'
            write(at, f'# {target.name}\n\n' + '\n'.join(f'- [{f.name}]({f.name})' for f in files))
        elif target.suffix == '.md':
            anchor = '#' * bool(part.fragment) + part.fragment
            if not at.exists():
                write(at, '')
                write(
                    at, self.prose(target.read_text(encoding='utf-8'), target)
                )  # first empty, as they may link in a circle
        else:
            at = at if at.suffix else at.with_name(f'{at.name}.txt')
            write(at, target.read_bytes())
        return Path(os.path.relpath(at, self.place(page).parent)).as_posix() + anchor

    def prose(self, text, page):
        """Markdown as Jupyter reads it: links, formulas, lists right after a line; names of the
        package lead to the API."""
        parts = re.split(r'(^```.*?^```[^\n]*$)', text, flags=re.M | re.S)
        for i in range(0, len(parts), 2):
            t = re.sub(
                r'^(?!\s|[-*|] |\d+\. |\|)(.*\S.*)\n(?=[-*] |\d+\. |\|)',
                r'\1\n\n',
                parts[i],
                flags=re.M,
            )
            t = re.split(r'(`[^`\n]+`)', t)
            for k in range(0, len(t), 2):
                t[k] = re.sub(
                    r'\$\$(.+?)\$\$|(?<![\\$\w])\$(?!\s)([^$]+?)(?<!\s)\$(?!\d)',
                    formula,
                    t[k],
                    flags=re.S,
                )
                t[k] = re.sub(
                    r'(\]\(|src="|href=")([^)"\s]+)', lambda m: m[1] + self.link(m[2], page), t[k]
                )
            for k in range(1, len(t), 2):
                n = t[k].strip('`').removesuffix('()')
                linked = t[k - 1].endswith('[') or re.match(r'[^\[\]]*\]\(', t[k + 1])
                if n in self.api and not linked and t[k - 1].rpartition('\n')[2][:1] != '#':
                    t[k] = f'[{t[k]}]({self.up(page)}api/{self.api[n]}.md#{n})'
            parts[i] = ''.join(t)
        return ''.join(parts)

    def output(self, o, page, name):
        "One output: a figure to turn, a picture, HTML, a table or text."

        def text(t):
            return (
                f'<div class="output" markdown>\n````` text\n{"".join(t).rstrip()}\n`````\n</div>'
                if ''.join(t).strip()
                else ''
            )

        if o['output_type'] == 'stream':
            return text(o['text'])
        if o['output_type'] == 'error':
            raise SystemExit(f'{page.name}: an output is an error')
        data = o['data']
        kind = next((k for k in ('image/jpeg', 'image/png', 'image/gif') if k in data), '')
        alt = html.escape(o.get('metadata', {}).get(kind, {}).get('alt', ''))
        if 'application/vnd.plotly.v1+json' in data:
            script = self.docs / 'assets' / 'plotly.min.js'
            f = json.dumps(data['application/vnd.plotly.v1+json']).replace('</', '<\\/')
            if not script.exists():
                write(script, installed('plotly', 'package_data/plotly.min.js'))
            shown = keep(
                f'<div id="{name}" role="img" aria-label="{alt}"></div><script src="{self.up(page)}assets/plotly.min.js"></script>'
                f'<script>((f) => Plotly.newPlot("{name}", f.data, f.layout, {{responsive: true, displaylogo: false}}))({f})</script>',
                alt,
            )
        elif kind:
            file = f'{name}.{kind[6:]}'
            write(
                self.place(page).parent / 'pictures' / file, base64.b64decode(''.join(data[kind]))
            )
            shown = keep(f'<img src="pictures/{file}" alt="{alt}" loading="lazy">', alt)
        elif 'text/html' in data:
            shown = keep(''.join(data['text/html']))
        else:
            return (
                self.prose(''.join(data['text/markdown']), page)
                if 'text/markdown' in data
                else text(data.get('text/plain', ''))
            )
        return f'<div class="output">{shown}</div>'

    def page(self, path, cells):
        parts = []
        module = next((m.name for m in self.modules if path == NBS / (m.page or '-')), None)
        for i, cell in enumerate(cells):
            text = ''.join(cell['source'])
            flags = set(re.findall(r'^#\|\s*(\w+)', text, re.M))
            code = re.sub(r'^#\|.*\n?', '', text, flags=re.M).strip()
            if cell['cell_type'] == 'markdown':
                parts.append(
                    self.prose(text, path)
                    if i
                    else re.sub(
                        '^# .+', lambda m: f'# {self.titles[path]}', self.prose(text, path), count=1
                    )
                )
                if i == 0 and module:
                    parts.append(
                        f'Source of [spatialavatar0.{module}]({self.up(path)}api/{module}.md).'
                    )
            elif cell['cell_type'] == 'code' and 'hide' not in flags:
                title = (
                    f' title="spatialavatar0/{module}.py"'
                    if module and flags & {'export', 'exporti', 'exports'}
                    else ''
                )
                if code and not flags & {'hide_input', 'echo'}:
                    parts.append(f'`````{{.python{title}}}\n{code}\n`````')
                parts += [
                    self.output(o, path, f'{path.stem}-{i}-{k}')
                    for k, o in enumerate(cell['outputs'])
                ]
        write(self.place(path).with_suffix('.md'), '\n\n'.join(filter(None, parts)))

    def all(self):
        "Write everything; returns the navigation."
        nav = {n: [] for n in ('Start', *GROUPS, 'More', 'Exercises')}
        for p, cells in self.pages.items():
            self.page(p, cells)
            nav[group(p)].append({self.titles[p]: p.relative_to(NBS).with_suffix('.md').as_posix()})
        if self.lost:
            raise SystemExit('\n'.join(self.lost))
        for m in self.modules:
            write(self.docs / 'api' / f'{m.name}.md', m.markdown(self.titles))
        write(self.docs / 'assets' / 'extra.css', CSS)
        write(self.docs / 'assets' / 'iframe-worker.js', WORKER)
        write(
            self.docs / 'assets' / 'STIXTwoMath-Regular.ttf',
            installed('ziamath', 'fonts/STIXTwoMath-Regular.ttf'),
        )
        return [
            {'Start': 'index.md'},
            *({n: p} for n, p in nav.items() if p and n != 'Start'),
            {'API': [{m.name: f'api/{m.name}.md'} for m in self.modules]},
        ]


# API


def escaped(text):
    return ''.join(
        t if k % 2 else re.sub(r'([*_\[\]|\\#])', r'\\\1', html.escape(t, quote=False))
        for k, t in enumerate(re.split(r'(`[^`\n]+`)', text))
    )


def code(text):
    return '`` ' + text.replace('|', r'\|') + ' ``'


def table(rows, head):
    return (
        '\n'.join([f'| {head} | |', '|---|---|', *(f'| {a} | {b} |' for a, b in rows)])
        if any(b for _, b in rows)
        else ''
    )


class Module:
    """What a module offers, read from its text: signatures, and the comments behind arguments and
    fields."""

    def __init__(self, path):
        text = path.read_text(encoding='utf-8')
        self.name = path.stem
        self.tree = ast.parse(text)
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        self.comments = {
            t.start[0]: escaped(t.string.lstrip('#-> ').rstrip())
            for t in tokens
            if t.type == tokenize.COMMENT
        }
        self.page = next(iter(re.findall(r'^# %% \.\./nbs/(\S+)', text, re.M)), None)
        self.defs = {
            s.name: s for s in self.tree.body if isinstance(s, (ast.FunctionDef, ast.ClassDef))
        }
        self.values = {
            s.targets[0].id: s
            for s in self.tree.body
            if isinstance(s, ast.Assign) and isinstance(s.targets[0], ast.Name)
        }
        self.names = (
            ast.literal_eval(self.values['__all__'].value) if '__all__' in self.values else []
        )
        self.patches = [
            s
            for s in self.defs.values()
            if any(ast.unparse(d) == 'patch' for d in s.decorator_list)
        ]

    def parameters(self, f, skip):
        """A row for each line of arguments, for which its comment speaks, and one for what is
        returned."""
        a = f.args
        both = [*a.posonlyargs, *a.args]
        given = {
            **dict(zip(both[::-1], a.defaults[::-1])),
            **dict(zip(a.kwonlyargs, a.kw_defaults)),
        }
        lines = {}
        returns = []
        stars = {a.vararg: '*', a.kwarg: '**'}
        ret = f.returns
        for x in filter(None, [*both[skip:], a.vararg, *a.kwonlyargs, a.kwarg]):
            d = given.get(x)
            words = [
                k.value.value
                for k in getattr(d, 'keywords', [])
                if k.arg == 'help' and isinstance(k.value, ast.Constant)
            ]  # typer's
            row = lines.setdefault(
                x if words else (d or x).end_lineno, ([], [escaped(w) for w in words])
            )
            row[0].append(
                code(
                    stars.get(x, '')
                    + x.arg
                    + (f':{ast.unparse(x.annotation)}' if x.annotation else '')
                    + (f'={ast.unparse(d)}' if d and not words else '')
                )
            )
        numbers = [n for n in lines if isinstance(n, int)]
        end = max([f.lineno, *numbers])
        for n in range(f.lineno, max(f.body[0].lineno, ret.end_lineno + 1 if ret else 0)):
            row = max((k for k in numbers if k <= n), default=None)
            if n not in self.comments or n == f.body[0].lineno:
                continue
            if n > end or ret and n >= ret.end_lineno or row is None:
                returns.append(self.comments[n])
            else:
                lines[row][1].append(self.comments[n])
        rows = [(', '.join(n), ' '.join(w)) for n, w in lines.values()]
        return table(
            rows
            + [('*returns* ' + (code(ast.unparse(ret)) if ret else ''), ' '.join(returns))]
            * bool(ret or returns),
            'parameter',
        )

    def words(self, s):
        "A docstring; or the comment behind a definition of one line."
        return escaped(ast.get_docstring(s) or '') or (
            self.comments.get(s.lineno, '') if s.body[0].lineno == s.lineno else ''
        )

    def function(self, f, owner=''):
        marks = {ast.unparse(d) for d in f.decorator_list}
        name = f'{owner}.{f.name}' if owner else f.name
        rows = self.parameters(f, bool(owner) and 'staticmethod' not in marks)
        f.args.defaults = [
            (d.args or [ast.Constant(...)])[0]
            if any(k.arg == 'help' for k in getattr(d, 'keywords', []))
            else d
            for d in f.args.defaults
        ]
        text = (
            f.name
            + ('' if 'property' in marks else f'({ast.unparse(f.args)})')
            + (f' -> {ast.unparse(f.returns)}' if f.returns else '')
        )
        text = '\n'.join(
            textwrap.wrap(
                text, 110, subsequent_indent=' ' * 4, break_long_words=False, break_on_hyphens=False
            )
        )
        return [
            f'##{"#" * bool(owner)} {escaped(name)} {{ #{name} }}',
            f'````` python\n{text}\n`````',
            self.words(f),
            rows,
        ]

    def cls(self, c):
        methods = [s for s in c.body if isinstance(s, ast.FunctionDef)] + [
            p
            for p in self.patches
            if ast.unparse(p.args.args[0]).replace(' ', '').endswith(f':{c.name}')
        ]
        fields = [
            (code(ast.unparse(s)), self.comments.get(s.end_lineno, ''))
            for s in c.body
            if isinstance(s, (ast.AnnAssign, ast.Assign))
        ]
        head = f'class {c.name}' + f'({", ".join(map(ast.unparse, c.bases))})' * bool(c.bases)
        return [
            f'## {escaped(c.name)} {{ #{c.name} }}',
            f'````` python\n{head}\n`````',
            self.words(c),
            *(self.parameters(m, 1) for m in methods if m.name == '__init__'),
            table(fields, 'field'),
            *(p for m in methods if m.name[0] != '_' for p in self.function(m, c.name)),
        ]

    def markdown(self, titles):
        page = NBS / (self.page or '-')
        parts = [
            f'# spatialavatar0.{escaped(self.name)}',
            escaped(ast.get_docstring(self.tree) or ''),
        ]
        if page in titles:
            parts.append(
                'Made, and explained, by page '
                f'[{titles[page]}](../{Path(self.page).with_suffix(".md")}).'
            )
        for s in [self.defs[n] for n in self.names if n in self.defs]:
            parts += self.cls(s) if isinstance(s, ast.ClassDef) else self.function(s)
        rows = [
            (
                f'{code(n)}',
                code(textwrap.shorten(ast.unparse(s.value), 80, placeholder=' …'))
                + ' '
                + self.comments.get(s.end_lineno, ''),
            )
            for n, s in self.values.items()
            if n in self.names
        ]
        return '\n\n'.join(
            filter(None, [*parts, *['## Constants', table(rows, 'name')] * bool(rows)])
        )


# checks


class Links(HTMLParser):
    "Anchors of a page, and everything it refers to."

    def __init__(self):
        super().__init__()
        self.ids = set()
        self.refs = []
        self.loads = []
        self.style = False

    def handle_starttag(self, tag, attrs):
        a = {k: v or '' for k, v in attrs}
        self.ids |= {a[k] for k in ('id', 'name') if k in a and (k == 'id' or tag == 'a')}
        self.style = tag == 'style'
        loaded = [
            a[k] for k in ('src', 'poster', 'data', 'xlink:href') if k in a and tag != 'a'
        ] + [s.split()[0] for s in a.get('srcset', '').split(',') if s.strip()]
        if (
            tag == 'link'
            and a.get('rel') not in ('canonical', 'alternate', 'license', 'prev', 'next')
            or tag in ('use', 'image')
        ):
            loaded.append(a.get('href', ''))
        self.loads += loaded + remote_in_css(a.get('style', ''))
        self.refs += loaded + [a[k] for k in ('href',) if k in a and tag in ('a', 'area', 'link')]

    def handle_data(self, text):
        if self.style:
            self.loads += remote_in_css(text)

    def handle_endtag(self, tag):
        self.style = False


def remote_in_css(text):
    return re.findall(r'(?:url\(|@import)\s*["\']?((?:https?:)?//[^"\')\s]+)', text)


def check(folder):
    """What is wrong with a built site, a line each: links and anchors that lead nowhere, things
    fetched from elsewhere."""
    folder = Path(folder).resolve()
    pages, wrong = {}, []
    for f in sorted(folder.rglob('*.html')):
        pages[f] = p = Links()
        p.feed(f.read_text(encoding='utf-8'))
        p.close()
    for f, p in pages.items():

        def say(what):
            return wrong.append(f'{f.relative_to(folder).as_posix()}: {what}')

        for url in dict.fromkeys(p.loads):
            if re.match(r'(https?:)?//', url):
                say(f'fetches {url}')
        for url in dict.fromkeys(p.refs):
            u = urlsplit(url)
            target = (f.parent / unquote(u.path)).resolve() if u.path else f
            if u.scheme or u.netloc:
                continue
            if u.path.startswith('/') or not target.is_relative_to(folder) or not target.is_file():
                say(f'no file {url}')
            elif (
                u.fragment
                and target in pages
                and unquote(u.fragment) not in pages[target].ids | {'top'}
            ):
                say(f'no anchor {url}')
    for f in sorted(folder.rglob('*.css')):
        wrong += [
            f'{f.relative_to(folder).as_posix()}: fetches {u}'
            for u in remote_in_css(f.read_text(encoding='utf-8'))
        ]
    return wrong if pages else ['no page']


def fill(folder):
    "Put back what the tokens stand for."
    for f in [*folder.rglob('*.html'), *folder.glob('search/*')]:
        plain = f.suffix != '.html'

        def put(m):
            return json.dumps(RAW[int(m[1])][1])[1:-1] if plain else RAW[int(m[1])][0]

        f.write_text(re.sub(r'zqraw(\d+)zq', put, f.read_text(encoding='utf-8')), encoding='utf-8')


def build(out):
    os.environ['NO_MKDOCS_2_WARNING'] = '1'
    from mkdocs.commands.build import build as make
    from mkdocs.config import load_config

    out = Path(out).resolve()
    RAW.clear()
    logging.basicConfig(level=logging.WARNING, format='%(levelname)s %(message)s')
    if out.exists() and any(out.iterdir()) and not (out / 'search' / 'search_index.js').exists():
        raise SystemExit(f'{out} is no site of ours: remove it first')
    with tempfile.TemporaryDirectory() as tmp:
        docs, site = Path(tmp) / 'docs', Path(tmp) / 'site'
        docs.mkdir()
        nav = Site(docs).all()
        make(
            load_config(
                str(ROOT / 'mkdocs.yml'),
                docs_dir=str(docs),
                site_dir=str(site),
                nav=nav,
                strict=True,
            )
        )
        for name in ('404.html', 'sitemap.xml', 'sitemap.xml.gz'):
            (site / name).unlink(missing_ok=True)  # they ask for an address
        fill(site)
        if wrong := check(site):
            raise SystemExit('\n'.join([*wrong, f'{len(wrong)} wrong; {out} is as it was']))
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(site, out)
    return len(list(out.rglob('*.html')))


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--out', default='site')
    p.add_argument('--check')
    a = p.parse_args()
    if a.check:
        raise SystemExit('\n'.join(check(a.check)) or 0)
    print(f'{build(a.out)} pages: open {Path(a.out) / "index.html"}')


if __name__ == '__main__':
    main()
