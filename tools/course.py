"""For teachers: a student edition, and grades.

    python tools/course.py student OUT                     copy the pages for a class: no solutions, exercises empty
    python tools/course.py grade FOLDER [--out grades.csv]  FOLDER has a folder of notebooks per student
    python tools/course.py list                             the exercises of every page

A page's exercises are what follows its heading "Exercises". Grading runs each page as it is here up to that heading, then the
student's cells; so a page somebody broke, or a `check` somebody rewrote, changes nothing. Counted is every `check(yours, truth)` of the
page whose truth is still the page's, and words written in answer to the rest: those a person reads. Students' code runs with your rights:
grade in a container, or an account of its own.
"""

import argparse
import ast
import csv
import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADING = re.compile(r'^#+ Exercises', re.M)


def text(cell):
    return ''.join(cell['source'])


def pages():
    "Pages of the course that have exercises."
    found = {p.name: json.loads(p.read_text()) for p in sorted((ROOT / 'nbs').glob('*.ipynb'))}
    return {
        n: nb
        for n, nb in found.items()
        if any(c['cell_type'] == 'markdown' and HEADING.search(text(c)) for c in nb['cells'])
    }


def parted(nb):
    "Cells before the exercises, and from them on."
    i = next(
        (
            i
            for i, c in enumerate(nb['cells'])
            if c['cell_type'] == 'markdown' and HEADING.search(text(c))
        ),
        len(nb['cells']),
    )
    return nb['cells'][:i], nb['cells'][i:]


def checks(cells):
    "The truth of every check(yours, truth), as text, and what is said to be equal to it."
    found = {}
    for c in cells:
        if c['cell_type'] != 'code':
            continue
        try:
            tree = ast.parse(re.sub(r'^[%!].*$', '', text(c), flags=re.M))
        except SyntaxError:
            continue
        for n in ast.walk(tree):
            if isinstance(n, ast.Call) and getattr(n.func, 'id', '') == 'check' and len(n.args) > 1:
                found[ast.unparse(n.args[1])] = ast.unparse(n.args[0])
    return found


def student(out):
    "Copy the pages; nothing of the solutions, no outputs below the exercises."
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f'{out} is not empty; give a new folder')
    (out / 'nbs').mkdir(parents=True)
    for p in sorted((ROOT / 'nbs').glob('*.ipynb')):
        nb = json.loads(p.read_text())
        for c in parted(nb)[1]:
            if c['cell_type'] == 'code':
                c['outputs'], c['execution_count'] = [], None
        (out / 'nbs' / p.name).write_text(json.dumps(nb, indent=1, ensure_ascii=False) + '\n')
    shutil.copytree(ROOT / 'nbs' / 'images', out / 'nbs' / 'images')
    shutil.copytree(ROOT / 'results', out / 'results')
    print(
        f'{len(list((out / "nbs").glob("*.ipynb")))} pages, '
        f'{sum(len(checks(parted(nb)[1])) for nb in pages().values())} checks: {out}'
    )


WATCH = """
import spatialavatar0.ground.core as _core
def check(yours, truth, *args, **more):
    ok = _core.check(yours, truth, *args, **more); print('\\x00check', int(bool(ok))); return ok
"""


def grade(original, handed, timeout=300):
    "Checks passed, checks there are, words written, what went wrong."
    import nbformat
    from nbclient import NotebookClient

    before, truth = parted(original)
    _, theirs = parted(handed)
    wanted, got = checks(truth), checks(theirs)
    cells = [
        c
        for c in before
        if c['cell_type'] == 'code' and not re.search(r'#\|\s*(cuda|eval:\s*false|fresh)', text(c))
    ]
    mine = [c for c in theirs if c['cell_type'] == 'code' and 'cleanup()' not in text(c)]

    def fresh(c):
        return nbformat.v4.new_code_cell(text(c))

    nb = nbformat.v4.new_notebook(
        cells=[*map(fresh, cells), nbformat.v4.new_code_cell(WATCH), *map(fresh, mine)]
    )
    try:
        NotebookClient(
            nb,
            timeout=timeout,
            kernel_name='python3',
            allow_errors=True,
            resources=dict(metadata=dict(path=str(ROOT / 'nbs'))),
        ).execute()
    except Exception as e:
        return (
            0,
            len(wanted),
            0,
            f'{type(e).__name__}: {str(e).strip().splitlines()[-1][:80]}'
            if str(e).strip()
            else type(e).__name__,
        )
    passed, errors = 0, []
    for c in nb.cells[len(cells) + 1 :]:
        said = ''.join(''.join(o.get('text', '')) for o in c.outputs)
        here = checks([c])
        honest = all(t in wanted and y != t for t, y in here.items()) and not re.search(
            r'def check\b|\bcheck\s*=|_core', text(c)
        )
        if honest:
            passed += min(said.count('\x00check 1'), len(here))
        errors += [
            f'{o["ename"]}: {o["evalue"][:60]}' for o in c.outputs if o['output_type'] == 'error'
        ]
    old = set(' '.join(text(c) for c in truth if c['cell_type'] == 'markdown').split())
    words = sum(
        len([w for w in text(c).split() if w not in old])
        for c in theirs
        if c['cell_type'] == 'markdown'
    )
    return (
        min(passed, len(wanted)),
        len(wanted),
        words,
        '; '.join(errors)
        or ('' if set(wanted) <= set(got) else 'a check is gone, or its truth was changed'),
    )


def grade_all(folder, out):
    "A line per student and page."
    book, rows = pages(), []
    students = sorted(p for p in Path(folder).iterdir() if p.is_dir())
    if not students:
        raise SystemExit(f'{folder} has no folders: expected one per student, with notebooks in it')
    for s in students:
        for p in sorted(s.rglob('*.ipynb')):
            if p.name not in book:
                print(f'{s.name}: {p.name} is no page with exercises; passed over')
                continue
            try:
                row = grade(book[p.name], json.loads(p.read_text()))
            except (ValueError, KeyError, TypeError) as e:
                row = (
                    0,
                    len(checks(parted(book[p.name])[1])),
                    0,
                    f'not a notebook: {type(e).__name__}',
                )
            rows.append((s.name, p.stem, *row))
            print(
                f'{s.name:20} {p.stem:20} {row[0]} of {row[1]} checks, {row[2]} words  {row[3]}',
                flush=True,
            )
    part = Path(out).with_suffix('.part')
    with open(part, 'w', newline='') as f:
        csv.writer(f).writerows([('student', 'page', 'passed', 'checks', 'words', 'remark'), *rows])
    part.replace(out)
    print(out)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sub = p.add_subparsers(dest='what', required=True)
    sub.add_parser('student').add_argument('out')
    g = sub.add_parser('grade')
    g.add_argument('folder')
    g.add_argument('--out', default='grades.csv')
    sub.add_parser('list')
    a = p.parse_args()
    if a.what == 'student':
        student(a.out)
    elif a.what == 'grade':
        grade_all(a.folder, a.out)
    else:
        for n, nb in pages().items():
            tasks = re.findall(
                r'^\d\. \*\*(\w+)',
                '\n'.join(text(c) for c in parted(nb)[1] if c['cell_type'] == 'markdown'),
                re.M,
            )
            print(f'{n:28} {", ".join(tasks):24} {len(checks(parted(nb)[1]))} checks')


if __name__ == '__main__':
    main()
