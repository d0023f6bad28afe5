"""One test per notebook, by the rules of nbdev_test, within the time it states; exported code in
step with the pages; pages clean."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import house
import pages
import pytest
import statistics_of_pages as stats
import torch
from conftest import ROOT

PAGES = house.notebooks()
# a page that forks needs a process without threads: it runs in one of its own
ALONE = """
import sys
from pathlib import Path
from test_notebooks import run_page
sys.exit(not run_page(Path({page!r}), 'fresh'))
"""


def test_every_notebook_has_its_place():
    found = {p for p in house.NBS.rglob('*.ipynb') if not is_hidden(p)}
    assert found == set(PAGES), 'a folder of nbs/ that tools/house.py does not know'


def is_hidden(page):
    return any(part.startswith(('_', '.')) for part in page.relative_to(house.NBS).parts)


def run_page(page, *on):
    "Whether a page's cells run, by the rules of nbdev_test; `on`: flags not to skip."
    from nbdev.config import get_config
    from nbdev.test import test_nb

    if torch.cuda.is_available():
        on = (*on, 'cuda')
    skip = set(get_config(path=ROOT).tst_flags.split()) - set(on)
    passed, _ = test_nb(page, skip_flags=skip, force_flags=list(on), basepath=ROOT)
    return passed


def run_alone(page):
    code = ALONE.format(page=str(page))
    command = [sys.executable, '-c', code]
    env = {**os.environ, 'PYTHONPATH': str(ROOT / 'tools')}
    done = subprocess.run(command, cwd=ROOT / 'tests', env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize('page', PAGES, ids=house.name)
def test_notebook(page, page_times):
    start = time.perf_counter()
    if '"#| fresh' in page.read_text():
        run_alone(page)
    else:
        assert run_page(page), f'{page.name} failed (its traceback is in the captured stderr)'
    seconds = round(time.perf_counter() - start, 1)
    page_times[house.name(page)] = seconds
    budget = stats.budget(house.read(page))
    # a slower machine may have three times as long, and half a minute
    late = f'{page.name} says it runs in {budget} s, and took {seconds}'
    assert not budget or seconds < 3 * budget + 30, late


# ---- exported, and clean


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the source, to export and clean in."
    there = tmp_path_factory.mktemp('copy')
    left = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', 'assets', '_proc')
    for name in ('nbs', 'spatialavatar0'):
        shutil.copytree(ROOT / name, there / name, ignore=left)
    for name in ('settings.ini', 'pyproject.toml', 'ruff.toml'):
        shutil.copy(ROOT / name, there)
    return there


def contents(folder, ending):
    "Name -> bytes of the files with that ending."
    found = [p.relative_to(folder) for p in Path(folder).rglob(f'*{ending}')]
    left = {'__pycache__', '.ipynb_checkpoints'}
    return {str(p): (folder / p).read_bytes() for p in found if not left & set(p.parts)}


def differences(one, other, ending):
    "Names of files that are not the same in both folders."
    a, b = contents(one, ending), contents(other, ending)
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def test_exported_in_step(copy):
    # from nothing, so that a module whose page is gone shows up, too
    for path in (copy / 'spatialavatar0').rglob('*.py'):
        if path.name not in ('__init__.py', '__main__.py'):  # written by hand
            path.unlink()
    pages.export(copy)
    wrong = differences(copy / 'spatialavatar0', house.PACKAGE, '.py')
    assert not wrong, 'run `python tools/pages.py --export` and commit'


def test_notebooks_clean(copy):
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    code = 'from nbdev.clean import nbdev_clean; nbdev_clean()'
    subprocess.run([sys.executable, '-c', code], cwd=copy, env=env, check=True)
    assert not differences(copy / 'nbs', house.NBS, '.ipynb'), 'run nbdev_clean and commit'
