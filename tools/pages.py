"""Run pages, keep their fresh outputs, export, and bring the README up to date.

    python tools/pages.py                     every page, in the order of its number
    python tools/pages.py 09 14_evaluate      these pages (a beginning of the name is enough)

Cells that `nbdev_test` never runs (`#| eval: false`) and, without a GPU, `#| cuda` cells keep the outputs they have. A page that fails
keeps its old outputs altogether, and the command says so and ends with 1.
"""
import argparse, os, re, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
for name, value in dict(MPLBACKEND='module://matplotlib_inline.backend_inline', OMP_WAIT_POLICY='PASSIVE', GLOG_minloglevel='2', PYTHONWARNINGS='ignore::UserWarning:jupyter_client').items(): os.environ.setdefault(name, value)

def pages(names=()):
    "Notebooks whose name begins with one of the names; all without names."
    found = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if not any(part.startswith(('_', '.')) for part in p.relative_to(ROOT).parts))
    unknown = [n for n in names if not any(p.stem.startswith(n) for p in found)]
    if unknown: raise SystemExit(f'no page begins with {unknown[0]}')
    return [p for p in found if not names or any(p.stem.startswith(n) for n in names)]

def skipped(cell, gpu):
    "Whether a code cell is not for running here."
    flags = re.findall(r'^#\|[ \t]*(\S+)[ \t]*(\S*)', ''.join(cell['source']), re.M)
    return ('eval:', 'false') in flags or not gpu and ('cuda', '') in flags

def joined(outputs):
    "Pieces of one stream that came one after the other become one output."
    out = []
    for o in outputs:
        if out and o['output_type'] == 'stream' == out[-1]['output_type'] and o['name'] == out[-1]['name']: out[-1]['text'] += o['text']
        else: out.append(o)
    return out

def run(path, gpu):
    "Execute a page in a kernel of its own; returns its seconds. Outputs are written only if all of it went well."
    import nbformat
    from nbclient import NotebookClient
    nb = nbformat.read(path, 4); start = time.perf_counter()
    client = NotebookClient(nb, timeout=1800, kernel_name='python3', resources=dict(metadata=dict(path=str(path.parent))))
    with client.setup_kernel():
        for i, cell in enumerate(nb.cells):
            if cell.cell_type == 'code' and cell.source.strip() and not skipped(cell, gpu): client.execute_cell(cell, i); cell.outputs = joined(cell.outputs)
    seconds = time.perf_counter()-start
    part = path.with_name(f'.{path.name}.part'); nbformat.write(nb, part); part.replace(path)
    subprocess.run(['nbdev_clean', '--fname', str(path)], cwd=ROOT, check=True)
    return seconds

def main():
    import torch
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('names', nargs='*'); a = p.parse_args()
    os.environ.pop('IN_TEST', None); failed = []
    subprocess.run(['nbdev_export'], cwd=ROOT, check=True)                     # pages import the modules of earlier ones
    for path in pages(a.names):
        name = str(path.relative_to(ROOT/'nbs').with_suffix(''))
        try: print(f'{run(path, torch.cuda.is_available()):7.1f} s  {name}', flush=True)
        except Exception as e: failed.append(name); print(f' failed    {name}: {type(e).__name__}\n{str(e)[-1500:]}', flush=True)
    for tool in ('covers.py','readme.py'): subprocess.run([sys.executable, ROOT/'tools'/tool], cwd=ROOT, check=True)
    raise SystemExit(f'{len(failed)} failed: {", ".join(failed)}' if failed else 0)

if __name__ == '__main__': main()
