"""README.md from the committed nbs/index.ipynb: nothing is executed, no Quarto.

python tools/readme.py             write README.md
python tools/readme.py --check     exit 1 and say so if README.md is out of date
python tools/readme.py --commands  print the two commands the README tells a reader to type
"""

import base64
import re
import sys

import house

README = house.ROOT / 'README.md'
INDEX = house.NBS / 'index.ipynb'
PICTURES = house.ROOT / 'docs' / 'images'
HEADER = '<!-- Made from nbs/index.ipynb by tools/readme.py: edit that page. -->\n'
ENDINGS = {'image/jpeg': 'jpg', 'image/png': 'png'}


def relink(text):
    "Links are relative to nbs/ in the page and to the repository in the README."

    def mend(found):
        before, link = found.groups()
        if re.match(r'(\w+:|#|/)', link):
            return found[0]
        return before + (link[3:] if link.startswith('../') else f'nbs/{link}')

    return re.sub(r'(\]\(|src="|href=")([^)"\s]+)', mend, text)


def block(text):
    return f'```\n{"".join(text).rstrip()}\n```'


def output_text(output, number, pictures):
    "One output as markdown; a picture becomes a file beside the README's other pictures."
    if output['output_type'] == 'stream':
        return block(output['text'])
    data = output.get('data', {})
    for kind in set(ENDINGS) & set(data):
        path = f'docs/images/index-{number}.{ENDINGS[kind]}'
        pictures[path] = base64.b64decode(''.join(data[kind]))
        alt = output.get('metadata', {}).get(kind, {}).get('alt', '')
        return f'![{alt}]({path})'
    if 'text/markdown' in data:
        return relink(''.join(data['text/markdown']))
    return block(data['text/plain']) if 'text/plain' in data else ''


def cell_parts(cell, number, pictures):
    "Markdown of one cell: its text or code, then its outputs."
    text = house.text(cell)
    if cell['cell_type'] == 'markdown':
        return [relink(text)]
    flags = set(re.findall(r'^#\|\s*(\w+)', text, re.M))
    if cell['cell_type'] != 'code' or 'hide' in flags:
        return []
    code = re.sub(r'^#\|.*\n?', '', text, flags=re.M).strip()
    shown = [f'```python\n{code}\n```'] if code and not flags & {'echo', 'hide_input'} else []
    outputs = enumerate(cell['outputs'])
    return shown + [output_text(o, f'{number}-{i}', pictures) for i, o in outputs]


def build():
    "The README's text and the pictures it needs, by path."
    pictures, parts = {}, []
    for number, cell in enumerate(house.read(INDEX)['cells']):
        parts += cell_parts(cell, number, pictures)
    text = re.sub(r'\n{3,}', '\n\n', '\n\n'.join(filter(None, parts))).strip()
    return f'{HEADER}{text}\n', pictures


def commands():
    "The lines of the README that install and do something."
    return re.findall(r'^pip install -e .*&&.*$', README.read_text(encoding='utf-8'), re.M)


def stale(files):
    "Files that are not what they should be, and pictures that nothing shows."
    old = [n for n, data in files.items() if not is_file_of(n, data)]
    made = [p.relative_to(house.ROOT).as_posix() for p in PICTURES.glob('index-*')]
    return old + [name for name in made if name not in files]


def is_file_of(name, data):
    path = house.ROOT / name
    return path.exists() and path.read_bytes() == data


def main():
    if '--commands' in sys.argv:
        return print('\n'.join(commands()))
    text, pictures = build()
    files = {'README.md': text.encode(), **pictures}
    names = stale(files)
    if '--check' in sys.argv:
        said = f'{", ".join(names)}: out of date; run `python tools/readme.py` and commit'
        sys.exit(said if names else 0)
    for name in names:
        path = house.ROOT / name
        if name not in files:
            path.unlink()
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[name])
    print('changed: ' + ', '.join(names) if names else 'nothing changed')


if __name__ == '__main__':
    main()
