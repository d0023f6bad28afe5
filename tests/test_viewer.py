"""The page against our renderer in a real browser, sliders in a notebook's panel, the live viewer,
bad input."""

import asyncio
import contextlib
import io
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from spatialavatar0.avatar.avatar import new_avatar
from spatialavatar0.avatar.portrait import from_frame
from spatialavatar0.ground.core import InputError
from spatialavatar0.ground.geometry import intrinsics, orbit
from spatialavatar0.head.head import Head, open_head
from spatialavatar0.pictures.metrics import psnr
from spatialavatar0.pictures.people import make_person, paint, portrait_camera
from spatialavatar0.splats.binding import Binding
from spatialavatar0.use.animate import TURNS, control_names, pose_of
from spatialavatar0.use.viewer import (
    SHOW,
    Explorer,
    control_groups,
    find_browser,
    home_view,
    in_browser,
    pack,
    page,
    page_picture,
    picture,
    serve,
    signed_steps,
    steps,
    twin,
    viser_splats,
    wait_until,
)

browser = pytest.mark.skipif(
    find_browser() is None,
    reason='needs Chromium (apt-get install chromium) and playwright (pip install playwright)',
)


@pytest.fixture(scope='module')
def avatar():
    V, K = portrait_camera(open_head(), 256)
    return from_frame(paint(make_person(3), V, K, 256), 128)


@pytest.fixture(scope='module')
def small():
    "Grey, with colours that differ from texel to texel."
    a = new_avatar(open_head(), 48)
    a.splats['sh0'] = torch.randn(len(a), 3, generator=torch.Generator().manual_seed(0))
    return a


@pytest.fixture(scope='module')
def file(avatar, tmp_path_factory):
    return page(avatar, tmp_path_factory.mktemp('page') / 'avatar.html')


@pytest.fixture(scope='module')
def small_file(small, tmp_path_factory):
    return page(
        small,
        tmp_path_factory.mktemp('page') / 'small.html',
        title='</script><script>alert(1)</script>',
    )


def random_controls(seed, head):
    "A third of all weights, and every turn."
    g = np.random.default_rng(seed)
    names = control_names(head)
    return {
        n: float(g.uniform(0, 0.8)) for n in g.choice(names, len(names) // 3, replace=False)
    } | {n: float(g.uniform(*r)) * 0.6 for n, r in TURNS.items()}


def ours(avatar, V, K, w, h, values):
    with torch.no_grad():
        rgb, alpha = avatar.render(V, K, w, h, background=1.0, **pose_of(avatar.head, values))
    return rgb.clamp(0, 1), (alpha > 0.5).float()


# the page


def free():
    "Whether nobody else computes here: only then do times say anything."
    return os.getloadavg()[0] < os.cpu_count() / 2


@browser
def test_page_draws_what_we_draw_and_is_fast(avatar, file):
    assert len(avatar) > 15_000 and file.stat().st_size < 8e6
    V, K = portrait_camera(open_head(), 256)
    poses = [{}] + [random_controls(s, avatar.head) for s in (1, 2)]
    c = home_view(avatar)['target']
    cameras = [
        (V, K, 256, 256),
        (orbit(70, 20, 0.5, c), intrinsics(500, 320, 240), 320, 240),
        (orbit(-160, -30, 0.9, c), intrinsics(900, 301, 257), 301, 257),
    ]

    def do(tab):
        return tab.evaluate('avatar.measure(60)'), [
            page_picture(tab, *c, v) for c, v in zip(cameras, poses)
        ]

    speed, drawn = in_browser(file, do, (160, 120))
    for c, v, theirs in zip(cameras, poses, drawn):
        rgb, mask = ours(avatar, *c, v)
        assert mask.sum() > 2000 and psnr(rgb, theirs, mask) > 40, psnr(
            rgb, theirs, mask
        )  # 30 asked for; 52 to 57 measured
    assert speed['least']['work'] < 12 and (speed['work'] < 12 or not free()), speed


_GRAB = """() => { avatar.draw(); const g = document.createElement("canvas"), c = document.getElementById("view"); g.width = 96; g.height = 64;
    const x = g.getContext("2d"); x.drawImage(c, 0, 0, 96, 64); return Array.from(x.getImageData(0, 0, 96, 64).data) }"""


def grab(tab):
    return np.asarray(tab.evaluate(_GRAB)).reshape(64, 96, 4)[..., :3] / 255


def moved(a, b):
    return np.abs(a - b).max(-1) > 0.05


def use_sliders(tab):
    assert tab.title().startswith('</script>')  # shown, not run
    start = grab(tab)
    tab.locator('summary', has_text='Mouth').click()
    s = tab.locator('input[name=mouthSmileLeft]')
    s.focus()
    s.press('End')
    assert tab.evaluate('[avatar.values.mouthSmileLeft, avatar.values.mouthSmileRight]') == [1, 1]
    smile = moved(start, grab(tab))
    assert smile[32:].sum() > 3 and not smile[:20].any()  # the mouth, not the hair
    tab.locator('#linked').uncheck()
    r = tab.locator('input[name=mouthSmileRight]')
    r.focus()
    r.press('Home')
    assert tab.evaluate('[avatar.values.mouthSmileLeft, avatar.values.mouthSmileRight]') == [1, 0]
    tab.locator('#reset').click()
    assert not moved(start, grab(tab)).any()


def use_mouse_and_keys(tab):
    start = grab(tab)
    tab.mouse.move(100, 300)
    tab.mouse.down()
    tab.mouse.move(220, 280, steps=3)
    tab.mouse.up()
    assert tab.evaluate('[avatar.values.yaw, avatar.values.pitch]') == pytest.approx([-48, -8])
    tab.mouse.wheel(0, -300)
    wait_until(tab, 'avatar.values.zoom>1.2')
    tab.locator('#view').focus()
    tab.keyboard.press('ArrowLeft')
    assert tab.evaluate('avatar.values.yaw') == pytest.approx(-43)
    assert moved(start, grab(tab)).mean() > 0.05
    tab.evaluate('avatar.reset()')
    assert not moved(start, grab(tab)).any()


def use_two_fingers(tab):
    tab.evaluate("""() => { const c = document.getElementById("view"); c.setPointerCapture = () => 0;
        const fire = (type, id, x, y) => c.dispatchEvent(new PointerEvent(type, {pointerId: id, clientX: x, clientY: y, pointerType: "touch"}));
        fire("pointerdown",1,100,100); fire("pointermove",1,150,100); fire("pointerdown",2,250,100); fire("pointermove",2,350,100); fire("pointerup",1,0,0); fire("pointerup",2,0,0); fire("pointermove",1,0,0) }""")
    assert tab.evaluate('[avatar.values.yaw, avatar.values.zoom]') == pytest.approx([-20, 2])
    tab.evaluate('avatar.reset()')


def play_motions(tab):
    start = grab(tab)
    for name in ('talk', 'look', 'nod', 'blink'):
        b = tab.locator('#motions button', has_text=name)
        b.click()
        assert b.get_attribute('aria-pressed') == 'true'
        wait_until(
            tab, 'Object.entries(avatar.values).some(([k,v]) => k!="zoom" && Math.abs(v)>.1)'
        )
        b.click()
        assert not moved(start, grab(tab)).any()


def change_background_and_ask_nonsense(tab):
    tab.locator('#background').fill('#204060')
    assert np.allclose(grab(tab)[0, 0] * 255, [32, 64, 96], atol=1)
    for bad in (
        'avatar.set({smile:1})',
        'avatar.set({jawOpen:NaN})',
        'avatar.set({background:"red"})',
        'avatar.play("dance")',
    ):
        assert tab.evaluate(
            f'() => {{ try {{ {bad}; return "" }} catch (e) {{ return e.message }} }}'
        )


def lose_the_context(tab):
    before = grab(tab)
    tab.evaluate(
        '() => { const x = '
        'document.getElementById("view").getContext("webgl2").getExtension("WEBGL_lose_context"); x.loseContext(); setTimeout(() => x.restoreContext(), 100) }'
    )
    tab.wait_for_timeout(300)
    wait_until(tab, '!document.getElementById("view").getContext("webgl2").isContextLost()')
    assert not moved(before, grab(tab)).any()
    assert before.std() > 0.05


@browser
def test_a_person_uses_the_page(small, small_file):
    """Pixels change as they should, and nothing complains; Gaussians behind the camera, far outside
    and larger than the picture."""
    c = home_view(small)['target']
    K = intrinsics(200, 128, 96)
    near = [orbit(20, 10, 0.12, c), orbit(90, 0, 0.02, c)]

    def do(tab):
        for use in (
            use_sliders,
            use_mouse_and_keys,
            use_two_fingers,
            play_motions,
            change_background_and_ask_nonsense,
            lose_the_context,
        ):
            use(tab)
        tab.evaluate('avatar.set({background:"#ffffff"})')
        return [page_picture(tab, V, K, 128, 96, {}) for V in near]

    for V, theirs in zip(near, in_browser(small_file, do, (720, 420))):
        assert psnr(ours(small, V, K, 128, 96, {})[0], theirs) > 40


class Flame(Head):
    "The open head as FLAME would be: pose correctives, nameless expressions."


def flame_like():
    h = open_head()
    g = torch.Generator().manual_seed(1)
    arrays = {k: v for k, v in h._buffers.items() if not k.startswith('arkit')} | dict(
        part_names=h.part_names, mask_names=h.mask_names
    )
    return Flame(
        dict(arrays, pose_basis=0.002 * torch.randn(36, h.num_verts, 3, generator=g))
    ).requires_grad_(False)


@browser
def test_a_head_without_arkit_names(tmp_path):
    h = flame_like()
    a = new_avatar(h, 40)
    a.splats['sh0'] = torch.randn(len(a), 3)
    assert not hasattr(h, 'arkit_names')
    assert control_names(h)[:2] == ['expr0', 'expr1']
    v = dict(expr0=2.0, expr7=-1.5, jawPitch=14, jawYaw=4, neckYaw=25, neckRoll=-8, eyesYaw=20)
    V, K = portrait_camera(open_head(), 200)
    theirs = in_browser(
        page(a, tmp_path / 'flame.html'),
        lambda tab: page_picture(tab, V, K, 200, 200, v),
        (160, 120),
    )
    rgb, _ = ours(a, V, K, 200, 200, v)
    assert psnr(rgb, theirs) > 40


def test_page_text(small, tmp_path):
    text = page(small, tmp_path / 'a.html', title='</title><b>"me" & you').read_text()
    assert '</title><b>' not in text
    assert '&lt;/title&gt;&lt;b&gt;' in text
    assert '{{' not in text
    assert not re.search(r'https?://|import\s*\(|fetch\(|XMLHttpRequest|WebSocket', text)
    js = sum(
        len(
            (
                __import__('importlib.resources').resources.files('spatialavatar0')
                / 'assets'
                / 'viewer'
                / n
            )
            .read_text()
            .splitlines()
        )
        for n in ('data.js', 'head.js', 'draw.js', 'app.js')
    )
    assert js < 500
    assert page(small, tmp_path / 'b.html', motions={}).stat().st_size < len(text)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.html', 'b.html']


def test_bad_input(small, tmp_path):
    with pytest.raises(InputError, match='should end in .html'):
        page(small, tmp_path / 'a.txt')
    broken = replace(small, splats=dict(small.splats, quats=small.splats['quats'] * float('nan')))
    with pytest.raises(InputError, match='quats hold nan'):
        page(broken, tmp_path / 'a.html')
    b = small.binding
    empty = replace(
        small,
        binding=Binding(b.face_ids[:0], b.bary[:0], b.texels[:0], b.faces, b.resolution),
        splats={k: v[:0] for k, v in small.splats.items()},
    )
    with pytest.raises(InputError, match='no Gaussians'):
        page(empty, tmp_path / 'a.html')
    with pytest.raises(InputError, match='not a control'):
        page(small, tmp_path / 'a.html', motions=dict(nod=[dict(nodding=1)]))
    with pytest.raises(InputError, match='background'):
        page(small, tmp_path / 'a.html', background='white')
    with pytest.raises(InputError, match='show should be'):
        picture(small, {}, 8, 8, 'wires')
    with pytest.raises(InputError, match='not a control'):
        picture(small, dict(smile=1.0), 8, 8)
    assert not list(tmp_path.iterdir())


# numbers


@pytest.mark.parametrize('bits', [8, 16])
def test_steps_round_to_half_a_step(bits):
    x = torch.randn(100, 3) * torch.tensor([1, 1e-6, 0])
    n, low, step = steps(x, bits)
    assert n.dtype == f'uint{bits}'
    assert np.abs(low + step * n - x.numpy()).max(0) == pytest.approx(0, abs=1e9)
    assert (np.abs(low + step * n - x.double().numpy()) <= step / 2 * 1.001).all()
    assert n[:, :2].max() == 2**bits - 1


def test_signed_steps_keep_zero():
    b = torch.randn(4, 7, 3)
    b[0] = 0
    b[1, 3] = 0
    n, step = signed_steps(b)
    assert (n[0] == 0).all()
    assert (n[1, 3] == 0).all()
    assert np.abs(n * step[:, None, None] - b.numpy()).max() <= step.max() * 0.51


def test_packed_arrays_lie_apart_and_aligned(small):
    table, data = pack(small)
    at = 0
    for a in table.values():
        assert a['at'] % 4 == 0 and a['at'] >= at
        at = a['at'] + a['length'] * np.dtype(a['type']).itemsize
    assert at <= len(data) < at + 4 and json.dumps(table)


def test_groups_and_twins():
    names = control_names(open_head())
    groups = control_groups(names)
    listed = [n for rows in groups.values() for n, *_ in rows]
    assert len(listed) == len(set(listed))
    assert set(listed) == set(names) | set(TURNS)
    assert twin('eyeBlinkLeft', names) == 'eyeBlinkRight'
    assert twin('eyeBlinkRight', names) == 'eyeBlinkLeft'
    assert [twin(n, names) for n in ('jawLeft', 'mouthRight', 'jawOpen')] == [None] * 3


# the notebook's panel


@pytest.mark.parametrize('show', SHOW)
def test_every_picture_shows_the_head(small, show):
    rgb = picture(small, dict(jawOpen=0.3, yaw=30), 96, 64, show, (0, 0, 1.0))
    assert rgb.shape == (64, 96, 3)
    assert torch.allclose(rgb[0, 0], torch.tensor([0, 0, 1.0]), atol=1e-3)
    assert (rgb[20:40, 35:60, 0] > 0.05).float().mean() > 0.5


def test_panel(small):
    e = Explorer(small, 128)
    first = e.image.value
    e.sliders['jawOpen'].value = 0.7
    assert e.image.value != first and e.values['jawOpen'] == 0.7
    e.sliders['eyeBlinkLeft'].value = 1.0
    assert e.sliders['eyeBlinkRight'].value == 1 == e.values['eyeBlinkRight']
    e.linked.value = False
    e.sliders['eyeBlinkRight'].value = 0.0
    assert e.sliders['eyeBlinkLeft'].value == 1
    for s in SHOW:
        before = e.image.value
        e.show.value = s
        assert s == SHOW[0] or e.image.value != before
    e.background.value = '#000000'
    assert e.draw()[0, 0].max() < 0.01
    assert torch.equal(
        e.draw(64), picture(small, e.values, 64, 64, e.show.value, (0.0, 0.0, 0.0), e.home)
    )


def test_small_while_moving_full_when_still(small):
    e = Explorer(small, 256)
    e.last = 256, 0.2
    assert e.quick() == 128
    e.last = 64, 0.001
    assert e.quick() == 256
    e.last = 64, 9.0
    assert e.quick() == 64
    sizes = []
    draw = e.draw

    def spy(size=None):
        sizes.append(size or e.size)
        r = draw(size)
        e.last = e.last[0], 0.05 * (e.last[0] / 128) ** 2
        return r

    e.draw = spy
    e.last = 256, 0.2

    async def drag():
        for v in (0.1, 0.2, 0.3, 0.4):
            e.sliders['jawOpen'].value = v
            await asyncio.sleep(0.02)
        assert sizes == [128] * 4
        await asyncio.sleep(0.5)

    asyncio.run(drag())
    assert sizes == [128] * 4 + [256]


def test_panel_is_quick(avatar):
    e = Explorer(avatar, 256)
    took = []
    for i in range(15):
        start = time.perf_counter()
        e.values['jawOpen'] = i / 15
        e.draw(256)
        took.append(time.perf_counter() - start)
    assert len(avatar) >= 13_000 and (min(took) < 0.08 or not free() and min(took) < 0.5), took


def test_panel_for_a_head_without_names_and_layout(small):
    a = new_avatar(flame_like(), 24)
    b = a.binding
    e = Explorer(replace(a, binding=Binding(b.face_ids, b.bary, b.texels, b.faces, 0)), 64)
    before = e.image.value
    e.sliders['expr0'].value = 3.0
    assert e.image.value != before
    assert 'texels' not in e.show.options


# the live viewer


def test_live_viewer_listens_here_only_and_follows(small):
    pytest.importorskip('viser')

    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    server = serve(small, port, verbose=False)
    try:
        assert server.get_host() == '127.0.0.1'
        with socket.create_connection(('127.0.0.1', server.get_port()), timeout=5):
            pass
    finally:
        server.stop()


def test_viser_gets_the_posed_gaussians(small):
    v = dict(jawOpen=0.6, neckYaw=20)
    s = viser_splats(small, v)
    means, _, scales, opacities, colors = small.world(**pose_of(small.head, v))
    assert np.allclose(s['centers'] / 100, means, atol=1e-6)
    assert np.allclose(s['rgbs'], colors.clamp(0, 1))
    assert s['opacities'].shape == (len(small), 1)
    assert np.allclose(
        np.sort(np.linalg.eigvalsh(s['covariances'].astype(float))) ** 0.5 / 100,
        np.sort(scales),
        rtol=1e-2,
    )


# in JupyterLab, and in the live viewer's own page

QUIET = {
    '@jupyterlab/notebook-extension:tracker': dict(
        autoStartDefaultKernel=True, windowingMode='none'
    ),
    '@jupyterlab/apputils-extension:notification': dict(
        fetchNews='false', checkForUpdates=False, doNotDisturbMode=True
    ),
}
CELL = """from spatialavatar0.avatar.avatar import new_avatar
from spatialavatar0.head.head import open_head
from spatialavatar0.use.viewer import explore
a = new_avatar(open_head(), 40)
e = explore(a, 128)"""
LIVE = """from spatialavatar0.use.viewer import embed, serve
server = serve(a, PORT, verbose=False)
embed(server)"""
TURN = """from spatialavatar0.splats.figures import mesh_part, turnable
turnable([mesh_part(a.verts(), a.head.faces)], 'a head')"""


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def lab(folder):
    """A JupyterLab of its own, with nothing of the user's; yields its address, the token and a way
    to ask it."""
    port, token = free_port(), secrets.token_hex(8)
    base = f'http://127.0.0.1:{port}'
    settings = folder / 'cfg' / 'labconfig' / 'default_setting_overrides.json'
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps(QUIET))
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | dict(
        PYTHONPATH=str(ROOT),
        JUPYTERLAB_SETTINGS_DIR=str(folder / 'set'),
        JUPYTERLAB_WORKSPACES_DIR=str(folder / 'ws'),
        IPYTHONDIR=str(folder / 'ipy'),
        **{f'JUPYTER_{k}_DIR': str(folder / k.lower()) for k in ('DATA', 'RUNTIME')},
        JUPYTER_CONFIG_DIR=str(folder / 'cfg'),
    )
    options = (
        '--no-browser --allow-root --ip=127.0.0.1 --ServerApp.port_retries=0 '
        '--LabApp.news_url=None --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate --LabApp.extension_manager=readonly --LabApp.expose_app_in_browser=True'
    )
    server = subprocess.Popen(
        [
            sys.executable,
            '-m',
            'jupyterlab',
            *options.split(),
            f'--port={port}',
            f'--IdentityProvider.token={token}',
            f'--ServerApp.root_dir={folder}',
        ],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    direct = urllib.request.build_opener(
        urllib.request.ProxyHandler({})
    )  # urlopen keeps the proxy of its first call, which may be another test's dead one

    def ask(what):
        return json.load(direct.open(f'{base}/api/{what}?token={token}', timeout=5))

    try:
        until(lambda: ask('status'), 90)
        yield base, token, ask
    finally:
        server.terminate()
        server.wait(20)


def until(true, seconds):
    "Ask again until it is so; an error counts as no."
    end = time.time() + seconds
    while time.time() < end:
        with contextlib.suppress(Exception):
            if true():
                return
        time.sleep(0.25)
    raise AssertionError('it did not happen in time')


def with_tab(do):
    """Call `do` with the tab of a headless browser, in a thread of its own; returns what the
    console complained about."""
    from concurrent.futures import ThreadPoolExecutor

    from playwright.sync_api import sync_playwright

    def go():
        with sync_playwright() as p:
            browser = p.chromium.launch(
                executable_path=find_browser(),
                headless=True,
                args=['--no-sandbox', '--enable-unsafe-swiftshader', '--disable-dev-shm-usage'],
            )
            tab = browser.new_page(viewport=dict(width=1100, height=800))
            errors = []
            tab.on('console', lambda m: errors.append(m.text) if m.type == 'error' else None)
            tab.on('pageerror', lambda e: errors.append(str(e)))
            try:
                do(tab)
            finally:
                browser.close()
            return errors

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(go).result()


@browser
def test_panel_in_jupyterlab(tmp_path):
    pytest.importorskip('jupyterlab')
    sources = [CELL, TURN] + [LIVE.replace('PORT', str(free_port()))] * (
        find_spec('viser') is not None
    )
    cells = [
        dict(cell_type='code', id=f'a{i}', metadata={}, source=c, outputs=[], execution_count=None)
        for i, c in enumerate(sources)
    ]
    (tmp_path / 'demo.ipynb').write_text(
        json.dumps(
            dict(
                cells=cells,
                metadata=dict(
                    kernelspec=dict(display_name='python3', language='python', name='python3')
                ),
                nbformat=4,
                nbformat_minor=5,
            )
        )
    )

    def do(tab):
        tab.goto(f'{base}/lab/tree/demo.ipynb?token={token}&reset')
        tab.wait_for_selector('.jp-NotebookPanel .jp-Notebook .jp-Cell', timeout=90_000)

        def idle():
            ks = ask('kernels')
            return ks and ks[0]['execution_state'] == 'idle' and ks[0]['connections'] >= 1

        until(idle, 90)  # the toolbar says idle before there is a kernel
        tab.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        image = tab.locator('.jp-OutputArea img.widget-image')
        image.wait_for(timeout=120_000)
        before = image.get_attribute('src')
        handle = tab.locator('.jp-OutputArea .widget-slider', has_text='neckYaw').locator(
            '.noUi-handle'
        )
        handle.focus()
        for _ in range(8):
            handle.press('ArrowRight')
        until(lambda: image.get_attribute('src') != before, 30)
        tab.locator('.widget-label', has_text='128 x 128').wait_for(
            timeout=30_000
        )  # still again: the full picture
        figure = tab.locator('.jp-OutputArea .js-plotly-plot canvas').first
        figure.wait_for(timeout=30_000)
        figure.scroll_into_view_if_needed()
        until(
            lambda: (
                np.ptp(np.asarray(Image.open(io.BytesIO(figure.screenshot())).convert('L'))) > 50
            ),
            30,
        )
        if len(sources) > 2:
            frame = tab.locator('.jp-OutputArea iframe').first
            frame.scroll_into_view_if_needed()
            tab.frame_locator('.jp-OutputArea iframe').locator('canvas').first.wait_for(
                timeout=60_000
            )
            until(
                lambda: (
                    np.ptp(
                        np.asarray(
                            Image.open(io.BytesIO(frame.screenshot())).convert('L').resize((60, 40))
                        )[10:30, 20:40]
                    )
                    > 30
                ),
                60,
            )  # a grey head on white
        tab.screenshot(path=tmp_path / 'lab.png')

    with lab(tmp_path) as (base, token, ask):
        errors = with_tab(do)
    assert not [
        e for e in errors if 'Failed to load resource' not in e and 'computeBoundingSphere' not in e
    ], errors


@browser
def test_live_viewer_in_a_browser(small, tmp_path):
    pytest.importorskip('viser')
    server = serve(small, free_port(), verbose=False)
    shots = []

    def look(tab):
        return np.asarray(
            Image.open(io.BytesIO(tab.screenshot())).convert('RGB').resize((110, 80)), dtype=float
        )

    def do(tab):
        tab.goto(f'http://127.0.0.1:{server.get_port()}')
        handle = tab.get_by_role('slider').first
        handle.wait_for(timeout=90_000)

        def coloured():
            shots.append(look(tab)[:, 35:75])
            return (
                np.ptp(shots[-1], axis=-1).max() > 60
            )  # the splats are colourful, the rest is grey

        until(coloured, 60)
        handle.focus()
        for _ in range(15):
            handle.press('ArrowRight')
        until(lambda: np.abs(look(tab)[:, 35:75] - shots[-1]).max() > 40, 30)
        tab.screenshot(path=tmp_path / 'viser.png')

    try:
        errors = with_tab(do)
    finally:
        server.stop()
    assert not [e for e in errors if 'computeBoundingSphere' not in e], (
        errors
    )  # three.js says so of viser's own splat geometry
