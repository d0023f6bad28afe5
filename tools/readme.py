"""README.md from the committed nbs/index.ipynb: nothing is executed, no Quarto.

python tools/readme.py             write README.md
python tools/readme.py --check     exit 1 and say so if README.md is out of date
python tools/readme.py --commands  print the two commands the README tells a reader to type (standard library only)
"""

import base64
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADER = '<!-- Made from nbs/index.ipynb by tools/readme.py: edit that page. -->\n'


def relink(text):
    "Links are relative to nbs/ in the page and to the repository in the README."

    def fix(m):
        link = m[2]
        if re.match(r'(\w+:|#|/)', link):
            return m[0]
        return m[1] + (link[3:] if link.startswith('../') else f'nbs/{link}')

    return re.sub(r'(\]\(|src="|href=")([^)"\s]+)', fix, text)


def output_text(output, number, pictures):
    "One output as markdown; a picture becomes a file beside the README's other pictures."
    if output['output_type'] == 'stream':
        return f'```\n{"".join(output["text"]).rstrip()}\n```'
    data = output.get('data', {})
    for kind in ('image/jpeg', 'image/png'):
        if kind in data:
            path = f'docs/images/index-{number}.{kind.split("/")[1].replace("jpeg", "jpg")}'
            pictures[path] = base64.b64decode(''.join(data[kind]))
            return f'![{output.get("metadata", {}).get(kind, {}).get("alt", "")}]({path})'
    if 'text/markdown' in data:
        return relink(''.join(data['text/markdown']))
    return f'```\n{"".join(data["text/plain"]).rstrip()}\n```' if 'text/plain' in data else ''


def cell_parts(cell, number, pictures):
    "Markdown of one cell: its text or code, then its outputs."
    flags = set(re.findall(r'^#\|\s*(\w+)', ''.join(cell['source']), re.M))
    text = ''.join(cell['source'])
    if cell['cell_type'] == 'markdown':
        return [relink(text)]
    if 'hide' in flags:
        return []
    code = re.sub(r'^#\|.*\n?', '', text, flags=re.M).strip()
    shown = [f'```python\n{code}\n```'] if code and not flags & {'echo', 'hide_input'} else []
    return shown + [
        output_text(o, f'{number}-{i}', pictures) for i, o in enumerate(cell['outputs'])
    ]


def build():
    "The README's text and the pictures it needs, by path."
    pictures, parts = {}, []
    for number, cell in enumerate(
        json.loads((ROOT / 'nbs/index.ipynb').read_text(encoding='utf-8'))['cells']
    ):
        if cell['cell_type'] in ('markdown', 'code'):
            parts += cell_parts(cell, number, pictures)
    return HEADER + re.sub(
        r'\n{3,}', '\n\n', '\n\n'.join(p for p in parts if p)
    ).strip() + '\n', pictures


def commands():
    "The lines of the README that install and do something."
    return re.findall(
        r'^pip install -e .*&&.*$', (ROOT / 'README.md').read_text(encoding='utf-8'), re.M
    )


def main():
    if '--commands' in sys.argv:
        return print('\n'.join(commands()))
    text, pictures = build()
    files = {'README.md': text.encode(), **pictures}
    stale = [
        name
        for name, data in files.items()
        if not (ROOT / name).exists() or (ROOT / name).read_bytes() != data
    ]
    stale += [
        str(p.relative_to(ROOT))
        for p in (ROOT / 'docs/images').glob('index-*')
        if p.relative_to(ROOT).as_posix() not in files
    ]
    if '--check' in sys.argv:
        sys.exit(
            f'{", ".join(stale)}: out of date; run `python tools/readme.py` and commit'
            if stale
            else 0
        )
    for name in stale:
        path = ROOT / name
        if name not in files:
            path.unlink()
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[name])
    print('changed: ' + ', '.join(stale) if stale else 'nothing changed')


if __name__ == '__main__':
    main()
