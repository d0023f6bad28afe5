"""Run pages, keep their fresh outputs, export, and bring the README up to date.

    python tools/pages.py                         every page, in the order of the house
    python tools/pages.py 30 judge/90_evaluate    these (a beginning of name or path)
    python tools/pages.py --export                only write the modules, in the form of ruff.toml

Cells that `nbdev_test` never runs (`#| eval: false`) and, without a GPU, `#| cuda` cells keep the
outputs they have. A page that fails keeps its old outputs altogether, and the command says so and
ends with 1.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import house

ENVIRONMENT = {
    'MPLBACKEND': 'module://matplotlib_inline.backend_inline',
    'OMP_WAIT_POLICY': 'PASSIVE',
    'GLOG_minloglevel': '2',
    'PYTHONWARNINGS': 'ignore::UserWarning:jupyter_client',
}


def pages(names=()):
    "Notebooks whose name or path begins with one of the names; all without names."
    found = house.notebooks()

    def is_meant(page, name):
        return page.stem.startswith(name) or house.name(page).startswith(name)

    for name in names:
        if not any(is_meant(p, name) for p in found):
            raise SystemExit(f'no page begins with {name}')
    return [p for p in found if not names or any(is_meant(p, n) for n in names)]


def skipped(cell, gpu):
    "Whether a code cell is not for running here."
    flags = re.findall(r'^#\|[ \t]*(\S+)[ \t]*(\S*)', house.text(cell), re.M)
    return ('eval:', 'false') in flags or (not gpu and ('cuda', '') in flags)


def joined(outputs):
    "Pieces of one stream that came one after the other become one output."
    out = []
    for o in outputs:
        same = out and o['output_type'] == 'stream' == out[-1]['output_type']
        if same and o['name'] == out[-1]['name']:
            out[-1]['text'] += o['text']
        else:
            out.append(o)
    return out


def run(path, gpu):
    "Execute a page in a kernel of its own, and write its outputs if all went well: seconds."
    import nbformat
    from nbclient import NotebookClient

    nb = nbformat.read(path, 4)
    start = time.perf_counter()
    place = dict(metadata=dict(path=str(path.parent)))
    client = NotebookClient(nb, timeout=1800, kernel_name='python3', resources=place)
    with client.setup_kernel():
        for i, cell in enumerate(nb.cells):
            if cell.cell_type == 'code' and cell.source.strip() and not skipped(cell, gpu):
                client.execute_cell(cell, i)
                cell.outputs = joined(cell.outputs)
    seconds = time.perf_counter() - start
    part = path.with_name(f'.{path.name}.part')
    nbformat.write(nb, part)
    part.replace(path)
    subprocess.run(['nbdev_clean', '--fname', str(path)], cwd=house.ROOT, check=True)
    return seconds


def export(
    root=house.ROOT,  # of a checkout
):
    "Write the modules from the pages, in the form of everything else."
    package = Path(root) / 'spatialavatar0'
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    code = 'from nbdev.doclinks import nbdev_export; nbdev_export()'
    subprocess.run([sys.executable, '-c', code], cwd=root, env=env, check=True)
    ruff = [sys.executable, '-m', 'ruff']
    sort = [*ruff, 'check', '-q', '--select', 'I', '--fix', package]
    subprocess.run(sort, cwd=root, check=True)
    subprocess.run([*ruff, 'format', '-q', package], cwd=root, check=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('names', nargs='*')
    parser.add_argument('--export', action='store_true')
    given = parser.parse_args()
    export()  # pages import the modules of earlier ones
    if given.export:
        return
    import torch

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.pop('IN_TEST', None)
    failed = []
    for path in pages(given.names):
        name = house.name(path)
        try:
            print(f'{run(path, torch.cuda.is_available()):7.1f} s  {name}', flush=True)
        except Exception as e:
            failed.append(name)
            print(f' failed    {name}: {type(e).__name__}\n{str(e)[-1500:]}', flush=True)
    for tool in ('covers.py', 'readme.py'):
        subprocess.run([sys.executable, house.ROOT / 'tools' / tool], cwd=house.ROOT, check=True)
    raise SystemExit(f'{len(failed)} failed: {", ".join(failed)}' if failed else 0)


if __name__ == '__main__':
    main()
