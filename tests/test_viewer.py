"""The page against our renderer in a real browser, sliders in a notebook's panel, the live viewer,
bad input."""

import asyncio
import contextlib
import html.parser
import http.client
import io
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import resources
from importlib.util import find_spec
from typing import NamedTuple

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
from spatialavatar0.use import viewer
from spatialavatar0.use.animate import TURNS, control_names, pose_of
from spatialavatar0.use.viewer import (
    SHOW,
    Explorer,
    control_groups,
    find_browser,
    home_view,
    in_browser,
    other_side,
    pack_avatar,
    page_picture,
    panel_picture,
    plain_title,
    serve,
    signed_steps,
    viser_splats,
    wait_until,
    whole_steps,
    write_page,
)

browser = pytest.mark.skipif(
    find_browser() is None,
    reason='needs Chromium (apt-get install chromium) and playwright (pip install playwright)',
)


@pytest.fixture(scope='module')
def avatar():
    return from_frame(paint(make_person(3), *portrait_camera(open_head(), 256), 256), 128)


@pytest.fixture(scope='module')
def small():
    "Grey, with colours that differ from texel to texel."
    avatar = new_avatar(open_head(), 48)
    random = torch.Generator().manual_seed(0)
    avatar.splats['sh0'] = torch.randn(len(avatar), 3, generator=random)
    return avatar


@pytest.fixture(scope='module')
def file(avatar, tmp_path_factory):
    return write_page(avatar, tmp_path_factory.mktemp('page') / 'avatar.html')


@pytest.fixture(scope='module')
def small_file(small, tmp_path_factory):
    return write_page(
        small,
        tmp_path_factory.mktemp('page') / 'small.html',
        title='</script><script>alert(1)</script>',
    )


TITLES = {
    '{{bytes}}': '{{bytes}}',
    '{{title}} {{header}}': '{{title}} {{header}}',
    '</title><script>alert(1)</script>': None,
    '"><img src=x onerror=alert(1)>': None,
    "' onload='x": None,
    '<!-- ]]> --> &amp; &#60;': None,
    'a\u2028b\u2029c': 'a b c',
    'a\0b\x1b[2J\x07\x85c': 'a b [2J c',
    '\u202egnp.exe': 'gnp.exe',
    '\udcff\ud800 half': 'half',
    '\\u003cscript\\g<0>': '\\u003cscript\\g<0>',
    'x' * 100_000: 'x' * 120,
    '\n' * 100_000: '',
    'Zoë 山田 👩': 'Zoë 山田 👩',
}


@pytest.mark.parametrize('title', TITLES, ids=lambda title: ascii(title)[:24])
def test_titles(small, tmp_path, title):
    """Whatever a file is called, the page has one script and that title, as text. (BeautifulSoup
    is no witness: it mends; html.parser reads what stands there.)"""
    path = write_page(small, tmp_path / 'a.html', title=title, motions={})
    page = path.read_bytes().decode('utf-8')
    seen = Seen()
    seen.feed(page)
    kept = plain_title(title)
    assert kept == (title if TITLES[title] is None else TITLES[title])
    assert seen.texts['title'] == seen.texts['h1'] == [kept] * bool(kept)
    plain = Seen()
    plain.feed(write_page(small, tmp_path / 'b.html', motions={}).read_text(encoding='utf-8'))
    assert seen.tags == plain.tags
    assert seen.texts['script'] == plain.texts['script']


class Seen(html.parser.HTMLParser):
    "Tags with their attributes, and the text in some of them."

    def __init__(self):
        super().__init__()
        self.tags = []
        self.texts = dict(title=[], h1=[], script=[])

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, attrs))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] in self.texts and data.strip():
            self.texts[self.tags[-1][0]].append(data.strip())


def test_motions_with_odd_names(small, tmp_path):
    "A motion of any name arrives in the page; what JavaScript reads is what we wrote."
    nod = [dict(neckPitch=5.0)] * 2
    names = ['__proto__', '</script>', '{{bytes}}', "'\u2028", '\udcff']
    page = write_page(small, tmp_path / 'a.html', motions=dict.fromkeys(names, nod))
    text = page.read_text(encoding='utf-8')
    assert text.count('</script>') == 1
    literal = re.search(r'const HEADER = JSON.parse\((".*")\);', text)[1]
    assert list(json.loads(json.loads(literal))['motions']) == names


@browser
def test_odd_names_in_a_browser(small, tmp_path):
    odd = ['__proto__', '</script><b>', '{{bytes}}']
    motions = dict.fromkeys(odd, [dict(neckPitch=5.0)] * 2)
    page = write_page(small, tmp_path / 'a.html', title=odd[2], motions=motions)

    def look(tab):
        buttons = tab.locator('#motions button').all_text_contents()
        return tab.title(), tab.locator('h1').text_content(), buttons

    assert in_browser(page, look, (160, 120)) == (odd[2], odd[2], odd)


def random_controls(seed, head):
    "A third of all weights, and every turn."
    rng = np.random.default_rng(seed)
    names = control_names(head)
    chosen = rng.choice(names, len(names) // 3, replace=False)
    weights = {name: float(rng.uniform(0, 0.8)) for name in chosen}
    return weights | {name: float(rng.uniform(*limits)) * 0.6 for name, limits in TURNS.items()}


def ours(avatar, viewmat, K, width, height, values):
    "Our renderer's picture, and where the head is."
    pose = pose_of(avatar.head, values)
    with torch.no_grad():
        rgb, alpha = avatar.render(viewmat, K, width, height, background=1.0, **pose)
    return rgb.clamp(0, 1), (alpha > 0.5).float()


# the page


def free():
    "Whether nobody else computes here: only then do times say anything."
    return os.getloadavg()[0] < os.cpu_count() / 2


@browser
def test_page_draws_what_we_draw_and_is_fast(avatar, file):
    assert len(avatar) > 15_000
    assert file.stat().st_size < 8e6
    poses = [{}] + [random_controls(seed, avatar.head) for seed in (1, 2)]
    middle = home_view(avatar)['target']
    cameras = [
        (*portrait_camera(open_head(), 256), 256, 256),
        (orbit(70, 20, 0.5, middle), intrinsics(500, 320, 240), 320, 240),
        (orbit(-160, -30, 0.9, middle), intrinsics(900, 301, 257), 301, 257),
    ]
    views = [(*camera, pose) for camera, pose in zip(cameras, poses)]

    def measure_and_draw(tab):
        return tab.evaluate('avatar.measure(60)'), [page_picture(tab, *view) for view in views]

    speed, drawn = in_browser(file, measure_and_draw, (160, 120))
    for view, theirs in zip(views, drawn):
        rgb, mask = ours(avatar, *view)
        assert mask.sum() > 2000
        dB = psnr(rgb, theirs, mask)
        assert dB > 40, dB  # 30 asked for; 52 to 57 measured
    assert speed['least']['work'] < 12, speed
    assert speed['work'] < 12 or not free(), speed


_GRAB = """() => {
    avatar.draw();
    const small = document.createElement("canvas"), view = document.getElementById("view");
    small.width = 96; small.height = 64;
    const context = small.getContext("2d");
    context.drawImage(view, 0, 0, 96, 64);
    return Array.from(context.getImageData(0, 0, 96, 64).data);
}"""


def grab(tab):
    "What the page shows, as (64,96,3)."
    return np.asarray(tab.evaluate(_GRAB)).reshape(64, 96, 4)[..., :3] / 255


def moved(before, after):
    return np.abs(before - after).max(-1) > 0.05


def values_of(tab, *names):
    "Controls of the page."
    return [tab.evaluate(f'avatar.values.{name}') for name in names]


def use_sliders(tab):
    assert tab.title().startswith('</script>')  # shown, not run
    start = grab(tab)
    tab.locator('summary', has_text='Mouth').click()
    sides = 'mouthSmileLeft', 'mouthSmileRight'
    left, right = (tab.locator(f'input[name={name}]') for name in sides)
    left.focus()
    left.press('End')
    assert values_of(tab, *sides) == [1, 1]
    smile = moved(start, grab(tab))
    assert smile[32:].sum() > 3 and not smile[:20].any()  # the mouth, not the hair
    tab.locator('#linked').uncheck()
    right.focus()
    right.press('Home')
    assert values_of(tab, *sides) == [1, 0]
    tab.locator('#reset').click()
    assert not moved(start, grab(tab)).any()


def use_mouse_and_keys(tab):
    start = grab(tab)
    tab.mouse.move(100, 300)
    tab.mouse.down()
    tab.mouse.move(220, 280, steps=3)
    tab.mouse.up()
    assert values_of(tab, 'yaw', 'pitch') == pytest.approx([-48, -8])
    tab.mouse.wheel(0, -300)
    wait_until(tab, 'avatar.values.zoom>1.2')
    tab.locator('#view').focus()
    tab.keyboard.press('ArrowLeft')
    assert values_of(tab, 'yaw') == pytest.approx([-43])
    assert moved(start, grab(tab)).mean() > 0.05
    tab.evaluate('avatar.reset()')
    assert not moved(start, grab(tab)).any()


_PINCH = """() => {
    const view = document.getElementById("view");
    view.setPointerCapture = () => 0;
    const fire = (type, id, x, y) => view.dispatchEvent(
        new PointerEvent(type, {pointerId: id, clientX: x, clientY: y, pointerType: "touch"}));
    fire("pointerdown", 1, 100, 100); fire("pointermove", 1, 150, 100);
    fire("pointerdown", 2, 250, 100); fire("pointermove", 2, 350, 100);
    fire("pointerup", 1, 0, 0); fire("pointerup", 2, 0, 0); fire("pointermove", 1, 0, 0);
}"""


def use_two_fingers(tab):
    tab.evaluate(_PINCH)
    assert values_of(tab, 'yaw', 'zoom') == pytest.approx([-20, 2])
    tab.evaluate('avatar.reset()')


_SOMETHING_MOVES = 'Object.entries(avatar.values).some(([k,v]) => k!="zoom" && Math.abs(v)>.1)'


def play_motions(tab):
    start = grab(tab)
    for name in ('talk', 'look', 'nod', 'blink'):
        button = tab.locator('#motions button', has_text=name)
        button.click()
        assert button.get_attribute('aria-pressed') == 'true'
        wait_until(tab, _SOMETHING_MOVES)
        button.click()
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


_LOSE = """() => {
    const context = document.getElementById("view").getContext("webgl2");
    const lost = context.getExtension("WEBGL_lose_context");
    lost.loseContext();
    setTimeout(() => lost.restoreContext(), 100);
}"""


def lose_the_context(tab):
    before = grab(tab)
    tab.evaluate(_LOSE)
    tab.wait_for_timeout(300)
    wait_until(tab, '!document.getElementById("view").getContext("webgl2").isContextLost()')
    assert not moved(before, grab(tab)).any()
    assert before.std() > 0.05


USES = (
    use_sliders,
    use_mouse_and_keys,
    use_two_fingers,
    play_motions,
    change_background_and_ask_nonsense,
    lose_the_context,
)


@browser
def test_a_person_uses_the_page(small, small_file):
    """Pixels change as they should, and nothing complains; Gaussians behind the camera, far outside
    and larger than the picture."""
    middle = home_view(small)['target']
    K = intrinsics(200, 128, 96)
    near = [orbit(20, 10, 0.12, middle), orbit(90, 0, 0.02, middle)]

    def use_all(tab):
        for use in USES:
            use(tab)
        tab.evaluate('avatar.set({background:"#ffffff"})')
        return [page_picture(tab, viewmat, K, 128, 96, {}) for viewmat in near]

    for viewmat, theirs in zip(near, in_browser(small_file, use_all, (720, 420))):
        assert psnr(ours(small, viewmat, K, 128, 96, {})[0], theirs) > 40


class Flame(Head):
    "The open head as FLAME would be: pose correctives, nameless expressions."


def flame_like():
    head = open_head()
    random = torch.Generator().manual_seed(1)
    arrays = {k: v for k, v in head._buffers.items() if not k.startswith('arkit')}
    names = dict(part_names=head.part_names, mask_names=head.mask_names)
    pose_basis = 0.002 * torch.randn(36, head.num_verts, 3, generator=random)
    return Flame(dict(arrays, **names, pose_basis=pose_basis)).requires_grad_(False)


@browser
def test_a_head_without_arkit_names(tmp_path):
    head = flame_like()
    avatar = new_avatar(head, 40)
    avatar.splats['sh0'] = torch.randn(len(avatar), 3)
    assert not hasattr(head, 'arkit_names')
    assert control_names(head)[:2] == ['expr0', 'expr1']
    values = dict(expr0=2.0, expr7=-1.5, jawPitch=14, jawYaw=4)
    values |= dict(neckYaw=25, neckRoll=-8, eyesYaw=20)
    view = *portrait_camera(open_head(), 200), 200, 200, values
    file = write_page(avatar, tmp_path / 'flame.html')
    theirs = in_browser(file, lambda tab: page_picture(tab, *view), (160, 120))
    assert psnr(ours(avatar, *view)[0], theirs) > 40


def test_page_text(small, tmp_path):
    text = write_page(small, tmp_path / 'a.html', title='</title><b>"me" & you').read_text()
    assert '</title><b>' not in text
    assert '&lt;/title&gt;&lt;b&gt;' in text
    assert '{{' not in text
    assert not re.search(r'https?://|import\s*\(|fetch\(|XMLHttpRequest|WebSocket', text)
    assert write_page(small, tmp_path / 'b.html', motions={}).stat().st_size < len(text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.html', 'b.html']


def test_the_script_stays_short():
    folder = resources.files('spatialavatar0') / 'assets' / 'viewer'
    scripts = [(folder / f'{name}.js').read_text() for name in ('data', 'head', 'draw', 'app')]
    assert sum(len(script.splitlines()) for script in scripts) < 500


def test_bad_input(small, tmp_path):
    with pytest.raises(InputError, match='should end in .html'):
        write_page(small, tmp_path / 'a.txt')
    broken = replace(small, splats=dict(small.splats, quats=small.splats['quats'] * float('nan')))
    with pytest.raises(InputError, match='quats hold nan'):
        write_page(broken, tmp_path / 'a.html')
    full = small.binding
    none = full.face_ids[:0], full.bary[:0], full.texels[:0]
    empty = replace(
        small,
        binding=Binding(*none, full.faces, full.resolution),
        splats={name: x[:0] for name, x in small.splats.items()},
    )
    with pytest.raises(InputError, match='no Gaussians'):
        write_page(empty, tmp_path / 'a.html')
    with pytest.raises(InputError, match='not a control'):
        write_page(small, tmp_path / 'a.html', motions=dict(nod=[dict(nodding=1)]))
    with pytest.raises(InputError, match='background'):
        write_page(small, tmp_path / 'a.html', background='white')
    with pytest.raises(InputError, match='show should be'):
        panel_picture(small, {}, 8, 8, 'wires')
    with pytest.raises(InputError, match='not a control'):
        panel_picture(small, dict(smile=1.0), 8, 8)
    assert not list(tmp_path.iterdir())


# numbers


@pytest.mark.parametrize('bits', [8, 16])
def test_steps_round_to_half_a_step(bits):
    x = torch.randn(100, 3) * torch.tensor([1, 1e-6, 0])
    whole, low, step = whole_steps(x, bits)
    assert whole.dtype == f'uint{bits}'
    assert (np.abs(low + step * whole - x.double().numpy()) <= step / 2 * 1.001).all()
    assert whole[:, :2].max() == 2**bits - 1


def test_signed_steps_keep_zero():
    basis = torch.randn(4, 7, 3)
    basis[0] = 0
    basis[1, 3] = 0
    whole, step = signed_steps(basis)
    assert (whole[0] == 0).all()
    assert (whole[1, 3] == 0).all()
    assert np.abs(whole * step[:, None, None] - basis.numpy()).max() <= step.max() * 0.51


def test_packed_arrays_lie_apart_and_aligned(small):
    table, data = pack_avatar(small)
    at = 0
    for place in table.values():
        assert place['at'] % 4 == 0
        assert place['at'] >= at
        at = place['at'] + place['length'] * np.dtype(place['type']).itemsize
    assert at <= len(data) < at + 4
    assert json.dumps(table)


def test_groups_and_sides():
    names = control_names(open_head())
    groups = control_groups(names)
    listed = [name for rows in groups.values() for name, *_ in rows]
    assert len(listed) == len(set(listed))
    assert set(listed) == set(names) | set(TURNS)
    assert other_side('eyeBlinkLeft', names) == 'eyeBlinkRight'
    assert other_side('eyeBlinkRight', names) == 'eyeBlinkLeft'
    for alone in ('jawLeft', 'mouthRight', 'jawOpen'):
        assert other_side(alone, names) is None


# the notebook's panel


@pytest.mark.parametrize('show', SHOW)
def test_every_picture_shows_the_head(small, show):
    rgb = panel_picture(small, dict(jawOpen=0.3, yaw=30), 96, 64, show, (0, 0, 1.0))
    assert rgb.shape == (64, 96, 3)
    assert torch.allclose(rgb[0, 0], torch.tensor([0, 0, 1.0]), atol=1e-3)
    assert (rgb[20:40, 35:60, 0] > 0.05).float().mean() > 0.5


def test_panel(small):
    panel = Explorer(small, 128)
    first = panel.image.value
    panel.sliders['jawOpen'].value = 0.7
    assert panel.image.value != first
    assert panel.values['jawOpen'] == 0.7
    panel.sliders['eyeBlinkLeft'].value = 1.0
    assert panel.sliders['eyeBlinkRight'].value == 1 == panel.values['eyeBlinkRight']
    panel.linked.value = False
    panel.sliders['eyeBlinkRight'].value = 0.0
    assert panel.sliders['eyeBlinkLeft'].value == 1


def test_what_the_panel_shows(small):
    panel = Explorer(small, 128)
    for show in SHOW:
        before = panel.image.value
        panel.show.value = show
        assert show == SHOW[0] or panel.image.value != before
    panel.background.value = '#000000'
    assert panel.draw()[0, 0].max() < 0.01
    black = (0.0, 0.0, 0.0)
    want = panel_picture(small, panel.values, 64, 64, panel.show.value, black, panel.home)
    assert torch.equal(panel.draw(64), want)


def test_pictures_fit_the_budget(small):
    panel = Explorer(small, 256)
    for size, took, fitting in ((256, 0.2, 128), (64, 0.001, 256), (64, 9.0, 64)):
        panel.last = size, took
        assert panel.quick_size() == fitting


def test_small_while_moving_full_when_still(small):
    panel = Explorer(small, 256)
    sizes = []
    draw = panel.draw

    def spy(size=None):
        sizes.append(size or panel.size)
        drawn = draw(size)
        panel.last = panel.last[0], 0.05 * (panel.last[0] / 128) ** 2
        return drawn

    panel.draw = spy
    panel.last = 256, 0.2

    async def drag():
        for weight in (0.1, 0.2, 0.3, 0.4):
            panel.sliders['jawOpen'].value = weight
            await asyncio.sleep(0.02)
        assert sizes == [128] * 4
        await asyncio.sleep(0.5)

    asyncio.run(drag())
    assert sizes == [128] * 4 + [256]


def test_panel_is_quick(avatar):
    panel = Explorer(avatar, 256)
    took = []
    for i in range(15):
        start = time.perf_counter()
        panel.values['jawOpen'] = i / 15
        panel.draw(256)
        took.append(time.perf_counter() - start)
    assert len(avatar) >= 13_000
    assert min(took) < (0.08 if free() else 0.5), took


def test_panel_for_a_head_without_names_and_layout(small):
    avatar = new_avatar(flame_like(), 24)
    full = avatar.binding
    without_layout = Binding(full.face_ids, full.bary, full.texels, full.faces, 0)
    panel = Explorer(replace(avatar, binding=without_layout), 64)
    before = panel.image.value
    panel.sliders['expr0'].value = 3.0
    assert panel.image.value != before
    assert 'texels' not in panel.show.options


# the live viewer


@pytest.fixture(scope='module')
def live(small):
    "A running viewer: its address up to the question mark, its token, its port."
    pytest.importorskip('viser')
    server = serve(small, verbose=False)
    base, _, token = server.url.partition('?token=')
    yield base, token, server.get_port()
    server.stop()


def ask(port, path='/', **headers):
    "Status, headers and body of an answer; headers of the request as they stand."
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=20)
    connection.putrequest('GET', path, skip_host=True)
    for name, value in (dict(Host=f'127.0.0.1:{port}') | headers).items():
        for each in value if isinstance(value, list) else [value] * (value is not None):
            connection.putheader(name, each)
    connection.endheaders()
    answer = connection.getresponse()
    found = answer.status, answer.headers, answer.read(200)
    connection.close()
    return found


def test_live_viewer_listens_here_only(live):
    base, token, port = live
    assert base == f'http://127.0.0.1:{port}/'
    assert len(token) >= 43  # 256 bits
    with socket.create_connection(('127.0.0.1', port), timeout=5):
        pass
    # another address of this machine: 127.0.0.2 is one on Linux
    with pytest.raises(OSError), socket.create_connection(('127.0.0.2', port), timeout=5):
        pass


def test_every_live_viewer_has_a_port_and_a_token_of_its_own(small, live):
    pytest.importorskip('viser')
    other = serve(small, verbose=False)
    try:
        assert other.url.partition('?token=')[2] != live[1]
        assert other.get_port() != live[2]
        assert ask(other.get_port(), f'/{live[1]}/')[0] == 403
    finally:
        other.stop()


def test_the_address_that_was_printed(live):
    _, token, port = live
    status, headers, _ = ask(port, f'/?token={token}')
    assert (status, headers['Location']) == (302, f'/{token}/')
    status, headers, body = ask(port, headers['Location'])
    assert status == 200
    assert b'<html' in body.lower()
    assert (headers['Referrer-Policy'], headers['Cache-Control']) == ('no-referrer', 'no-store')
    assert ask(port, f'/{token}/', Host=f'localhost:{port}')[0] == 200
    own = dict(Origin=f'http://127.0.0.1:{port}')
    assert ask(port, f'/{token}/', **own)[0] == 200


GUESSES = (
    '/',
    '/?token=',
    '/?token=guess',
    '/guess/',
    '/index.html',
    '/assets/../index.html',
    '//{token}/',
    '/x/{token}/',
    '/?xtoken={token}',
    '/?a=%26token={token}',
    '/{short}/',
    '/{token}x/',
    '/?token={token}&token=x',
    '/%s' % ('x' * 5000),
    '/\xff/',
    '/?token=%00',
)


@pytest.mark.parametrize('path', GUESSES, ids=lambda path: path[:24])
def test_without_the_token(live, path):
    _, token, port = live
    path = path.format(token=token, short=token[:-1])
    if path in (f'//{token}/', f'/?token={token}&token=x'):
        return  # it was given
    try:
        status, _, body = ask(port, path)
    except (UnicodeEncodeError, http.client.HTTPException):
        return
    assert status in (400, 403)
    assert b'<html' not in body.lower()


HOSTS = 'evil.example', 'evil.example:PORT', '127.0.0.1', '127.0.0.1:1', '0.0.0.0:PORT', '', None


@pytest.mark.parametrize('host', HOSTS)
def test_a_foreign_host(live, host):
    "A name that was pointed at this machine says itself here."
    _, token, port = live
    host = host and host.replace('PORT', str(port))
    assert ask(port, f'/{token}/', Host=host)[0] in (400, 403)


def test_two_hosts(live):
    _, token, port = live
    both = [f'127.0.0.1:{port}', 'evil.example']
    assert ask(port, f'/{token}/', Host=both)[0] in (400, 403)


ORIGINS = 'http://evil.example', 'null', 'https://127.0.0.1:PORT', 'http://127.0.0.1', ''


@pytest.mark.parametrize('origin', ORIGINS)
def test_a_foreign_origin(live, origin):
    _, token, port = live
    origin = origin.replace('PORT', str(port))
    assert ask(port, f'/{token}/', Origin=origin)[0] == 403


def open_socket(port, path, origin):
    "viser's protocol, as its page speaks it; the first bytes that come."
    import viser
    from websockets.sync.client import connect

    words = dict(subprotocols=[f'viser-v{viser.__version__}'], proxy=None, open_timeout=20)
    with connect(f'ws://127.0.0.1:{port}{path}', origin=origin, max_size=None, **words) as ws:
        return ws.recv(timeout=20)


def test_sockets(live):
    "Ours tells of the head; those of other pages are not opened."
    from websockets.exceptions import InvalidStatus

    _, token, port = live
    own = f'http://127.0.0.1:{port}'
    for path in (f'/{token}', f'/{token}/', f'/?token={token}'):
        assert len(open_socket(port, path, own)) > 10
    for path, origin in (
        ('/', own),
        ('/guess', own),
        (f'/{token}', 'http://evil.example'),
        (f'/{token}', f'http://localhost:{port}'),  # another page of this machine
        (f'/{token}', 'null'),
        (f'/{token}', None),
    ):
        with pytest.raises(InvalidStatus) as e:
            open_socket(port, path, origin)
        assert e.value.response.status_code == 403


def test_view_live_on_the_command_line(small, tmp_path):
    "It prints the address, answers there and nowhere else, and ends with Ctrl-C."
    pytest.importorskip('viser')
    small.save(tmp_path / 'a.safetensors')
    code = 'import sys; from spatialavatar0.cli import main; sys.exit(main())'
    command = [sys.executable, '-c', code, 'view', tmp_path / 'a.safetensors', '--live']
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        line = running.stdout.readline()
        port, token = re.search(r'http://127\.0\.0\.1:(\d+)/\?token=([\w-]{43}) ', line).groups()
        assert ask(int(port))[0] == 403
        assert ask(int(port), f'/{token}/')[0] == 200
        running.send_signal(signal.SIGINT)
        assert running.wait(30) == 130
    finally:
        running.kill()
        running.wait()


def test_a_viser_that_does_not_ask_us_is_stopped(small, monkeypatch):
    "As a later version might: no guard, no viewer."
    pytest.importorskip('viser')
    monkeypatch.setattr(viewer, '_guard', lambda token, plain: plain)
    with pytest.raises(InputError, match='answers strangers'):
        serve(small, verbose=False)


def test_only_viser_is_guarded():
    "A server that somebody else starts meanwhile is left alone."
    sockets = pytest.importorskip('websockets.asyncio.server')
    plain = sockets.serve

    async def started_meanwhile():
        def door(connection, request):
            return connection.respond(418, 'theirs')

        with viewer._guarded('secret'):
            theirs = sockets.serve(lambda ws: None, '127.0.0.1', 0, process_request=door)
        async with theirs as server:
            return await asyncio.to_thread(ask, server.sockets[0].getsockname()[1])

    assert asyncio.run(started_meanwhile())[::2] == (418, b'theirs')
    assert sockets.serve is plain


def test_viser_gets_the_posed_gaussians(small):
    values = dict(jawOpen=0.6, neckYaw=20)
    given = viser_splats(small, values)
    means, _, scales, _, colors = small.world(**pose_of(small.head, values))
    assert np.allclose(given['centers'] / 100, means, atol=1e-6)
    assert np.allclose(given['rgbs'], colors.clamp(0, 1))
    assert given['opacities'].shape == (len(small), 1)
    variances = np.sort(np.linalg.eigvalsh(given['covariances'].astype(float)))
    assert np.allclose(variances**0.5 / 100, np.sort(scales), rtol=1e-2)


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
    with socket.socket() as free_one:
        free_one.bind(('127.0.0.1', 0))
        return free_one.getsockname()[1]


def lab_settings(folder):
    "Environment of a JupyterLab with nothing of the user's."
    settings = folder / 'cfg' / 'labconfig' / 'default_setting_overrides.json'
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps(QUIET))
    outside = {name: value for name, value in os.environ.items() if name != 'IN_TEST'}
    return outside | dict(
        PYTHONPATH=str(ROOT),
        JUPYTERLAB_SETTINGS_DIR=str(folder / 'set'),
        JUPYTERLAB_WORKSPACES_DIR=str(folder / 'ws'),
        IPYTHONDIR=str(folder / 'ipy'),
        JUPYTER_DATA_DIR=str(folder / 'data'),
        JUPYTER_RUNTIME_DIR=str(folder / 'runtime'),
        JUPYTER_CONFIG_DIR=str(folder / 'cfg'),
    )


LAB_OPTIONS = """--no-browser --allow-root --ip=127.0.0.1 --ServerApp.port_retries=0
    --LabApp.news_url=None --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate
    --LabApp.extension_manager=readonly --LabApp.expose_app_in_browser=True"""


class Lab(NamedTuple):
    "A JupyterLab that runs."

    base: str  # its address
    token: str

    def ask(self, what):
        address = f'{self.base}/api/{what}?token={self.token}'
        # urlopen keeps the proxy of its first call, which may be another test's dead one
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        return json.load(direct.open(address, timeout=5))

    def is_idle(self):
        "Whether the kernel waits; the toolbar says so before there is a kernel."
        kernels = self.ask('kernels')
        if not kernels:
            return False
        return kernels[0]['execution_state'] == 'idle' and kernels[0]['connections'] >= 1


@contextlib.contextmanager
def lab(folder):
    "A JupyterLab of its own, with nothing of the user's."
    port, token = free_port(), secrets.token_hex(8)
    own = f'--port={port}', f'--IdentityProvider.token={token}', f'--ServerApp.root_dir={folder}'
    server = subprocess.Popen(
        [sys.executable, '-m', 'jupyterlab', *LAB_OPTIONS.split(), *own],
        env=lab_settings(folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    running = Lab(f'http://127.0.0.1:{port}', token)
    try:
        until(lambda: running.ask('status'), 90)
        yield running
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
    from playwright.sync_api import sync_playwright

    flags = ['--no-sandbox', '--enable-unsafe-swiftshader', '--disable-dev-shm-usage']

    def go():
        with sync_playwright() as p:
            chromium = dict(executable_path=find_browser(), headless=True, args=flags)
            browser = p.chromium.launch(**chromium)
            tab = browser.new_page(viewport=dict(width=1100, height=800))
            errors = []
            tab.on('console', lambda said: errors.append(said.text) if said.type == 'error' else 0)
            tab.on('pageerror', lambda error: errors.append(str(error)))
            try:
                do(tab)
            finally:
                browser.close()
            return errors

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(go).result()


def screenshot(what, mode='RGB'):
    "Pixels of a tab or of an element."
    return Image.open(io.BytesIO(what.screenshot())).convert(mode)


def write_notebook(path, sources):
    cell = dict(cell_type='code', metadata={}, outputs=[], execution_count=None)
    cells = [dict(cell, id=f'a{i}', source=source) for i, source in enumerate(sources)]
    kernel = dict(display_name='python3', language='python', name='python3')
    notebook = dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)
    path.write_text(json.dumps(notebook))


def move_a_slider(tab):
    "A slider of the panel changes its picture, and then draws the full one."
    image = tab.locator('.jp-OutputArea img.widget-image')
    image.wait_for(timeout=120_000)
    before = image.get_attribute('src')
    slider = tab.locator('.jp-OutputArea .widget-slider', has_text='neckYaw')
    handle = slider.locator('.noUi-handle')
    handle.focus()
    for _ in range(8):
        handle.press('ArrowRight')
    until(lambda: image.get_attribute('src') != before, 30)
    tab.locator('.widget-label', has_text='128 x 128').wait_for(timeout=30_000)


def see_the_figure(tab):
    "A figure to turn is not empty."
    figure = tab.locator('.jp-OutputArea .js-plotly-plot canvas').first
    figure.wait_for(timeout=30_000)
    figure.scroll_into_view_if_needed()
    until(lambda: np.ptp(np.asarray(screenshot(figure, 'L'))) > 50, 30)


def see_the_live_viewer(tab):
    "A grey head on white."
    frame = tab.locator('.jp-OutputArea iframe').first
    frame.scroll_into_view_if_needed()
    canvas = tab.frame_locator('.jp-OutputArea iframe').locator('canvas').first
    canvas.wait_for(timeout=60_000)

    def middle():
        return np.asarray(screenshot(frame, 'L').resize((60, 40)))[10:30, 20:40]

    until(lambda: np.ptp(middle()) > 30, 60)


@browser
def test_panel_in_jupyterlab(tmp_path):
    pytest.importorskip('jupyterlab')
    has_viser = find_spec('viser') is not None
    live = [LIVE.replace('PORT', str(free_port()))] * has_viser
    write_notebook(tmp_path / 'demo.ipynb', [CELL, TURN, *live])

    def run_and_look(tab):
        tab.goto(f'{running.base}/lab/tree/demo.ipynb?token={running.token}&reset')
        tab.wait_for_selector('.jp-NotebookPanel .jp-Notebook .jp-Cell', timeout=90_000)
        until(running.is_idle, 90)
        tab.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        move_a_slider(tab)
        see_the_figure(tab)
        if has_viser:
            see_the_live_viewer(tab)
        tab.screenshot(path=tmp_path / 'lab.png')

    with lab(tmp_path) as running:
        errors = with_tab(run_and_look)
    harmless = 'Failed to load resource', 'computeBoundingSphere'
    assert not [e for e in errors if not any(words in e for words in harmless)], errors


@browser
def test_live_viewer_in_a_browser(small, tmp_path):
    pytest.importorskip('viser')
    server = serve(small, verbose=False)
    shots = []

    def look(tab):
        return np.asarray(screenshot(tab).resize((110, 80)), dtype=float)[:, 35:75]

    def turn_the_head(tab):
        tab.goto(server.url)
        handle = tab.get_by_role('slider').first
        handle.wait_for(timeout=90_000)

        def coloured():  # the splats are colourful, the rest is grey
            shots.append(look(tab))
            return np.ptp(shots[-1], axis=-1).max() > 60

        until(coloured, 60)
        handle.focus()
        for _ in range(15):
            handle.press('ArrowRight')
        until(lambda: np.abs(look(tab) - shots[-1]).max() > 40, 30)
        tab.screenshot(path=tmp_path / 'viser.png')

    try:
        errors = with_tab(turn_the_head)
    finally:
        server.stop()
    # three.js says so of viser's own splat geometry
    assert not [error for error in errors if 'computeBoundingSphere' not in error], errors
