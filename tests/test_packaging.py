"""The wheel holds what it should, says what settings.ini says, and importing is quick, quiet and
light; what stands around the code agrees with it."""

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import HeaderParser

import house
import pytest
import readme
import yaml
from conftest import ROOT
from packaging.requirements import Requirement

OPTIONAL = 'gsplat lpips timm mediapipe viser smplx torchvision accelerate'.split()
USER_EXTRAS = 'track metrics viewer train lab data cluster'.split()
SOURCE_FILES = (
    'settings.ini',
    'setup.py',
    'pyproject.toml',
    'MANIFEST.in',
    'data_manifest.yaml',
    'LICENSE',
    'NOTICE',
    'README.md',
)
PIP = [sys.executable, '-m', 'pip']


def settings():
    parser = configparser.ConfigParser(delimiters=['='], interpolation=None)
    parser.read(ROOT / 'settings.ini')
    return parser['DEFAULT']


INI = settings()


def python(code, **options):
    "Run code in a Python of its own."
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | options.pop('env', {})
    command = [sys.executable, '-c', code]
    return subprocess.run(command, capture_output=True, text=True, env=env, **options)


# ---- the wheel


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The wheel, built from a copy of the source."
    source = tmp_path_factory.mktemp('src')
    package = source / 'spatialavatar0'
    shutil.copytree(house.PACKAGE, package, ignore=shutil.ignore_patterns('__pycache__'))
    for name in SOURCE_FILES:
        shutil.copy(ROOT / name, source)
    alone = ['--quiet', '--no-deps', '--no-build-isolation', '--no-index']
    command = [*PIP, 'wheel', *alone, '--wheel-dir', source / 'dist', source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return next((source / 'dist').glob('*.whl'))


def test_wheel_contents(wheel):
    files = [p for p in house.PACKAGE.rglob('*') if p.is_file() and p.parent.name != '__pycache__']
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        manifest = archive.read('spatialavatar0/data_manifest.yaml')
        for path in files:
            inside = f'spatialavatar0/{path.relative_to(house.PACKAGE).as_posix()}'
            assert archive.read(inside) == path.read_bytes(), inside
    assert manifest == (ROOT / 'data_manifest.yaml').read_bytes()
    top = {name.split('/')[0] for name in names}
    assert top == {'spatialavatar0', f'spatialavatar0-{INI["version"]}.dist-info'}
    assert {'LICENSE', 'NOTICE'} <= {name.rsplit('/')[-1] for name in names}
    assert wheel.stat().st_size < 12_000_000


@pytest.fixture(scope='module')
def metadata(wheel):
    "What the wheel says of itself: its metadata and its entry points."
    folder = f'spatialavatar0-{INI["version"]}.dist-info'
    with zipfile.ZipFile(wheel) as archive:
        said = archive.read(f'{folder}/METADATA').decode()
        points = archive.read(f'{folder}/entry_points.txt').decode()
    return HeaderParser().parsestr(said), points


def test_wheel_metadata(metadata):
    said, points = metadata
    script = INI['console_scripts'].split('=')[1]
    assert re.search(rf'^spatialavatar0 ?= ?{script}$', points, re.M)
    assert (said['Name'], said['Version']) == (INI['lib_name'], INI['version'])
    assert (said['Summary'], said['License-Expression']) == (INI['description'], 'Apache-2.0')
    assert said['Requires-Python'] == f'>={INI["min_python"]}'


def plain(requirement):
    return f'{requirement.name}{sorted(requirement.extras)}{requirement.specifier}'


def meant(key):
    "Requirements of settings.ini."
    return {plain(r) for r in map(Requirement, INI[key].split())}


def test_wheel_requirements(metadata):
    said = {}
    for requirement in map(Requirement, metadata[0].get_all('Requires-Dist')):
        extra = str(requirement.marker).split('"')[1] if requirement.marker else ''
        said.setdefault(extra, set()).add(plain(requirement))
    assert said.pop('') == meant('requirements')
    assert said.pop('all') == set().union(*(meant(f'{e}_requirements') for e in USER_EXTRAS))
    assert said == {e: meant(f'{e}_requirements') for e in [*USER_EXTRAS, 'dev']}


def test_both_nbdevs_read_the_same():
    table = tomllib.loads((ROOT / 'pyproject.toml').read_text())
    for key, value in table['tool']['nbdev'].items():
        assert str(value) == INI[key], key
    assert table['project']['name'] == INI['lib_name']


INSTALLED = """
import pathlib
import spatialavatar0
from spatialavatar0.ground.assets import asset, load_manifest

package = pathlib.Path(spatialavatar0.__file__).parent
head = asset('open_head', download=False)
print(package, spatialavatar0.__version__, len(load_manifest()), head.is_relative_to(package))
"""


def test_wheel_imports(wheel, tmp_path):
    alone = ['--quiet', '--no-deps', '--no-index', '--target', tmp_path]
    subprocess.run([*PIP, 'install', *alone, wheel], check=True, capture_output=True)
    done = python(INSTALLED, env={'PYTHONPATH': str(tmp_path)}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    package, version, entries, own = done.stdout.split()
    assert package == str(tmp_path / 'spatialavatar0')
    assert (version, own) == (INI['version'], 'True')
    assert int(entries) > 10
    assert (tmp_path / 'bin' / 'spatialavatar0').exists() or os.name == 'nt'


# ---- importing

BLOCK = f"""
import importlib
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {OPTIONAL}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)

sys.meta_path.insert(0, Block())
for name in {list(house.modules())}:
    importlib.import_module(f'spatialavatar0.{{name}}')
"""


def test_import_is_quiet_and_needs_no_option():
    "Every module imports without the optional packages, and says nothing."
    done = python(BLOCK)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')


SECONDS = """
import time
start = time.perf_counter()
import spatialavatar0
print(time.perf_counter() - start)
"""


def test_import_time():
    "At most a fifth of a second more than Python alone: the best of three, for a busy machine."
    assert min(float(python(SECONDS).stdout) for _ in range(3)) <= 0.2


# ---- the front door


def test_the_door_opens_on_demand():
    code = 'import sys, spatialavatar0 as sa\nprint("torch" in sys.modules, sorted(sa.DOOR))'
    done = python(code)
    assert done.stdout.startswith('False ['), done.stderr


def test_every_name_of_the_door():
    import spatialavatar0 as sa

    for name in sa.DOOR:
        assert getattr(sa, name).__doc__, f'{name} says nothing'
        assert name in dir(sa) and name in sa.__all__
    with pytest.raises(AttributeError, match="no attribute 'window'"):
        sa.window  # noqa: B018


def imports_of(cells):
    "What the code of these cells imports from the package."
    code = '\n'.join(house.text(c) for c in cells)
    return re.findall(r'^\s*(?:from|import) (spatialavatar0\S*).*$', code, re.M)


@pytest.mark.parametrize('page', sorted((house.NBS / 'doit').glob('*.ipynb')), ids=house.name)
def test_pages_that_do_it_use_the_door_only(page):
    cells = [c for c in house.read(page)['cells'] if c['cell_type'] == 'code']
    assert set(imports_of(cells)) <= {'spatialavatar0'}


def test_the_readme_uses_the_door_only():
    blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)
    found = re.findall(r'^\s*(?:from|import) (spatialavatar0\S*)', '\n'.join(blocks), re.M)
    assert set(found) == {'spatialavatar0'}


# ---- what stands around the code


def test_other_machines_run_the_same_commands():
    install, test = readme.commands()
    container = json.loads((ROOT / '.devcontainer' / 'devcontainer.json').read_text())
    assert container['postCreateCommand'].endswith(install)
    assert install in (ROOT / '.binder' / 'postBuild').read_text().splitlines()
    colab = json.loads((ROOT / 'tools' / 'colab.ipynb').read_text())
    assert any(house.text(c) == f'!{install}' for c in colab['cells'])
    assert test in (ROOT / 'CONTRIBUTING.md').read_text()
    workflow = yaml.safe_load((ROOT / '.github' / 'workflows' / 'test.yaml').read_text())
    steps = [s.get('run', '') for job in workflow['jobs'].values() for s in job['steps']]
    assert all(part in steps for part in test.split(' && '))


def test_system_libraries_are_the_readmes():
    text = (ROOT / 'README.md').read_text()
    named = re.search(r'apt-get install -y (lib[\w ]+)', text)[1].split()
    assert (ROOT / '.binder' / 'apt.txt').read_text().split() == named
    container = (ROOT / '.devcontainer' / 'devcontainer.json').read_text()
    assert all(name in container for name in named)


def test_one_version():
    import spatialavatar0

    version = spatialavatar0.__version__
    assert yaml.safe_load((ROOT / 'CITATION.cff').read_text())['version'] == version
    assert f'## {version}\n' in (ROOT / 'CHANGELOG.md').read_text()


@pytest.mark.parametrize('file', ['CONTRIBUTING.md', 'LICENCES.md', 'CHANGELOG.md'])
def test_files_that_are_named_exist(file):
    text = (ROOT / file).read_text()
    named = re.findall(r'`((?:tests|tools|nbs|benchmarks|spatialavatar0)/[\w./]*)`', text)
    named += re.findall(r'(?:python|pytest) ((?:tools|tests)/[\w./]+)', text)
    for path in named:
        assert (ROOT / path).exists(), path


def licence_rows():
    "The table of LICENCES.md, without its head."
    lines = (ROOT / 'LICENCES.md').read_text().splitlines()
    rows = [line.strip('|').split('|') for line in lines if line.startswith('|')]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def is_named(asset, name):
    "Whether an entry of the manifest is meant; FLAME 2023 and FLAME 2023 Open are two."
    is_open = 'Open' in name
    return name.split(' Open')[0] in asset.what and is_open == ('Open' in asset.what)


@pytest.mark.parametrize('name', ['FLAME 2020', 'FLAME 2023 Open', 'NeRSemble', 'ArcFace'])
def test_licences_agree_with_the_manifest(name):
    "What the manifest calls non-commercial, the table does not allow at work."
    from spatialavatar0.ground.assets import load_manifest

    asset = next(a for a in load_manifest().values() if is_named(a, name))
    row = next(row for row in licence_rows() if name in row[0])
    assert row[2].startswith('no') == ('non-commercial' in asset.licence), (row, asset.licence)


def test_the_own_manifest_is_read_once_and_again_when_it_changes(tmp_path, monkeypatch):
    import spatialavatar0.ground.assets as assets

    own = tmp_path / 'data_manifest.yaml'
    own.write_bytes(assets._packaged_manifest().read_bytes())
    monkeypatch.setattr(assets, '_packaged_manifest', lambda: own)
    first = assets.load_manifest()
    first.clear()  # whoever changes what was handed out changes only that
    again = assets.load_manifest()
    assert again and again == assets.load_manifest(own)
    monkeypatch.setattr(assets, '_read_yaml', lambda path: [])
    assert assets.load_manifest() == again
    own.write_bytes(own.read_bytes() + b'\n# a remark\n')
    assert assets.load_manifest() == {}
