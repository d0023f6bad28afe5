"Motions, films and splat files: round trips, independent readers, bad input, interrupts."

import os
import subprocess
import sys
import textwrap

import imageio.v2 as imageio
import numpy as np
import pytest
import torch

from spatialavatar0.avatar.avatar import new_avatar
from spatialavatar0.ground.core import InputError
from spatialavatar0.ground.geometry import intrinsics, orbit, quat_to_mat
from spatialavatar0.head.head import open_head
from spatialavatar0.use import export
from spatialavatar0.use.animate import (
    both,
    render_motion,
    show_film,
    speak,
    swing,
    turn,
    write_film,
)
from spatialavatar0.use.export import (
    PLY_COLUMNS,
    read_ply,
    read_splats,
    write_ply,
    write_sequence,
    write_splats,
)


@pytest.fixture(scope='module')
def avatar():
    return new_avatar(open_head(), 48)


def film(n, h=48, w=64, seed=0):
    "Smooth moving colours, so that compression cannot confuse frames."
    y, x = np.mgrid[:h, :w]
    g = np.random.default_rng(seed).uniform(0, 6, 3)
    return [
        (127 + 120 * np.sin(x[..., None] / 17 + y[..., None] / 23 + g + i / 2)).astype(np.uint8)
        for i in range(n)
    ]


# turn, swing, both, speak


@pytest.mark.parametrize('seed', range(5))
def test_turn_is_an_orbit_and_comes_back(seed):
    g = torch.Generator().manual_seed(seed)
    yaw, pitch = (torch.rand(2, generator=g) * 140 - 70).tolist()
    c = torch.randn(3, generator=g) * 0.1
    V = orbit(0, 0, 0.7, c).double()
    assert torch.allclose(turn(V, yaw, pitch, c), orbit(yaw, pitch, 0.7, c).double(), atol=1e-5)
    there = turn(orbit(yaw, pitch, 0.7, c), yaw, 0, c)
    assert torch.allclose(turn(there, -yaw, 0, c), orbit(yaw, pitch, 0.7, c), atol=1e-5)
    assert torch.allclose(
        turn(V, yaw, 0, c) @ torch.cat([c, torch.ones(1)]).double(),
        V @ torch.cat([c, torch.ones(1)]).double(),
        atol=1e-6,
    )  # the centre stays


def test_swing_loops():
    assert swing(8)[0] == (0, 0)
    assert len(swing(8)) == 8
    assert swing(0) == []
    yaw = np.array(swing(400, yaw=30, pitch=5))
    assert np.abs(np.abs(yaw).max(0) - (30, 5)).max() < 0.01


def test_names():
    h = open_head()
    assert both(mouthSmile=0.5, jawOpen=0.1) == {
        'mouthSmileLeft': 0.5,
        'mouthSmileRight': 0.5,
        'jawOpen': 0.1,
    }
    for n in h.arkit_names:
        assert both(**{n: 0.3}) == {n: 0.3}
        assert (
            n[-4:] != 'Left'
            or n in ('jawLeft', 'mouthLeft')
            or both(**{n[:-4]: 0.3}) == {n: 0.3, n[:-4] + 'Right': 0.3}
        )
    for bad in ('jaw', 'mouth', 'smile', 'JawOpen', ''):
        with pytest.raises(InputError, match='not an ARKit weight'):
            both(**{bad: 1.0})


@pytest.mark.parametrize('fps', (12, 24, 60))
def test_speech(fps):
    for seed in range(8):
        s = speak(4 * fps, fps, seed)
        assert len(s) == 4 * fps
        assert all(0 <= w <= 1 for f in s for w in f.values())
        assert s == speak(4 * fps, fps, seed) != speak(4 * fps, fps, seed + 1)
        assert max(max(s[0].values()), max(s[-1].values())) < 0.03  # it loops
        jaw = [f['jawOpen'] for f in s]
        assert max(jaw) > 0.2
        assert np.ptp([f['eyeBlinkLeft'] for f in s]) > 0.5
        assert all(f['eyeBlinkLeft'] == f['eyeBlinkRight'] for f in s)
        assert all(
            min(f['eyeLookOutLeft'], f['eyeLookInLeft']) == 0
            and f['eyeLookOutLeft'] == f['eyeLookInRight']
            for f in s
        )
    for n in range(5):
        assert len(speak(n, fps)) == n
    open_head().arkit(s[9])


def test_render_motion(avatar):
    h = avatar.head
    K = intrinsics(130, 48, 40)
    V = orbit(0, 0, 0.9)
    frames = render_motion(
        avatar,
        [V, turn(V, 40)],
        [{}, h.arkit(both(jawOpen=0.6))],
        K,
        48,
        40,
        background=(1.0, 0.0, 0.0),
    )
    assert [f.shape for f in frames] == [(40, 48, 3)] * 2
    assert frames[0].dtype == np.uint8
    assert (frames[0] != frames[1]).any()
    assert frames[0][0, 0].tolist() == [255, 0, 0]
    with pytest.raises(ValueError, match='one camera per pose: got 1 cameras and 2 poses'):
        render_motion(avatar, [V], [{}, {}], K, 48, 40)


# films


@pytest.mark.parametrize('suffix', ('mp4', 'gif', 'MP4'))
@pytest.mark.parametrize('h,w', ((48, 64), (33, 51), (1, 1), (2, 99)))
def test_film_reads_back(tmp_path, suffix, h, w):
    frames = film(9, h, w)
    path = write_film(iter(frames), tmp_path / f'sub/film.{suffix}', 10)
    back = imageio.mimread(path, memtest=False)

    def even(n):
        return n + n % 2 if suffix != 'gif' else n

    assert len(back) == 9
    assert back[0].shape[:2] == (even(h), even(w))
    assert os.listdir(path.parent) == [path.name]
    if min(h, w) > 30:
        assert max(np.abs(a.astype(float) - b[:h, :w, :3]).mean() for a, b in zip(frames, back)) < 8
    if suffix != 'gif':
        assert abs(imageio.get_reader(path).get_meta_data()['duration'] - 0.9) < 0.06


@pytest.mark.parametrize('fps', (1, 7, 12, 24, 25, 30, 50))
def test_gif_keeps_its_length(tmp_path, fps):
    from PIL import Image

    path = write_film(film(13, 8, 8), tmp_path / 'a.gif', fps)
    with Image.open(path) as im:
        lengths = [im.seek(i) or im.info['duration'] for i in range(im.n_frames)]
    assert abs(sum(lengths) - 13000 / fps) <= 5
    assert len(lengths) == 13
    assert max(lengths) - min(lengths) <= 10


def test_still_gif_keeps_its_length(tmp_path):
    from PIL import Image

    with Image.open(write_film(film(1) * 10, tmp_path / 'a.gif', 10)) as im:
        assert sum(im.seek(i) or im.info['duration'] for i in range(im.n_frames)) == 1000


def test_floats_and_tensors_are_frames(tmp_path):
    frames = [torch.rand(16, 16, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    assert len(imageio.mimread(write_film(frames, tmp_path / 'a.gif'))) == 3


@pytest.mark.parametrize(
    'frames,name,fps,words',
    (
        ([], 'a.mp4', 25, 'at least one frame'),
        (iter(()), 'a.gif', 25, 'at least one frame'),
        (film(2), 'a.avi', 25, 'end in .mp4 or .gif; got a.avi'),
        (film(2), 'a', 25, 'end in'),
        (film(1) + film(1, 50), 'a.mp4', 25, r'like the first; frame 1 is \(50, 64, 3\)'),
        (film(1) + film(1, 50), 'a.gif', 25, 'like the first'),
        ([np.zeros((8, 8))], 'a.gif', 25, r'\(H,W,3\)'),
        ([np.zeros((8, 8, 4))], 'a.mp4', 25, r'\(H,W,3\)'),
        ([np.zeros((0, 8, 3))], 'a.mp4', 25, r'\(H,W,3\)'),
        (film(2), 'a.gif', 60, 'at most 50'),
        (film(2), 'a.mp4', 0, 'above 0'),
        (film(2), 'a.mp4', -5, 'above 0'),
    ),
)
def test_bad_film(tmp_path, frames, name, fps, words):
    with pytest.raises(InputError, match=words):
        write_film(frames, tmp_path / name, fps)
    assert not os.listdir(tmp_path)


def test_film_where_no_folder_can_be(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(InputError, match='cannot write'):
        write_film(film(2), tmp_path / 'file' / 'a.mp4')


@pytest.mark.parametrize('suffix', ('mp4', 'gif'))
def test_failure_leaves_the_old_film(tmp_path, suffix):
    path = write_film(film(4), tmp_path / f'a.{suffix}')
    old = path.read_bytes()

    def broken(error):
        yield from film(6)
        raise error

    for error in (KeyboardInterrupt, ValueError('lost')):
        with pytest.raises(type(error) if isinstance(error, Exception) else error):
            write_film(broken(error), path)
        assert path.read_bytes() == old
        assert os.listdir(tmp_path) == [path.name]


def test_ctrl_c_leaves_nothing(tmp_path):
    "The signal reaches the encoder, too, as it does in a terminal."
    code = f"""
        import os, signal, numpy as np
        from spatialavatar0.use.animate import write_film
        def frames():
            for i in range(1000):
                if i==30: os.killpg(0, signal.SIGINT)
                yield np.full((64,64,3), i%256, np.uint8)
        for suffix in ('mp4','gif'):
            try: write_film(frames(), {str(tmp_path)!r}+'/a.'+suffix)
            except KeyboardInterrupt: print('interrupted')"""
    done = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(code)],
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    assert done.stdout.split() == ['interrupted'] * 2, done.stderr
    assert not os.listdir(tmp_path)


def test_show_film(tmp_path):
    for name, tag in (
        ('a.gif', '<img src="data:image/gif;base64,'),
        ('a.mp4', '<video src="data:video/mp4;base64,'),
    ):
        html = show_film(write_film(film(2), tmp_path / name), 'a "quoted" film').data
        assert html.startswith(tag) and '&quot;quoted&quot;' in html


# splat files


def splats(n=50, seed=0):
    g = torch.Generator().manual_seed(seed)

    def r(*s):
        return torch.rand(*s, generator=g)

    return (
        r(n, 3) - 0.5,
        torch.randn(n, 4, generator=g),
        r(n, 3) * 0.01 + 1e-4,
        r(n) * 0.98 + 0.01,
        r(n, 3),
    )


def same(a, b, eps=1e-5):
    m, q, s, o, c = a
    M, Q, S, O, C = b
    return (
        torch.equal(m, M)
        and torch.allclose(quat_to_mat(q), quat_to_mat(Q), atol=eps)
        and torch.allclose(s, S, rtol=eps)
        and torch.allclose(o, O, atol=eps)
        and torch.allclose(c, C, atol=eps)
    )


@pytest.mark.parametrize('n', (0, 1, 50, 3000))
def test_ply_round_trip(tmp_path, n):
    s = splats(n, seed=n)
    path = write_ply(tmp_path / 'a.ply', *s)
    assert same(read_ply(path), s)
    assert same(read_ply(write_ply(tmp_path / 'b.ply', *read_ply(path))), s)
    assert path.read_bytes().startswith(
        f'ply\nformat binary_little_endian 1.0\nelement vertex {n}\nproperty float x\n'.encode()
    )


def test_same_picture(avatar, tmp_path):
    from spatialavatar0.pictures.metrics import psnr
    from spatialavatar0.splats.renderers import rasterize

    h = avatar.head
    s = avatar.world(**h.arkit(both(jawOpen=0.5)))
    V = orbit(30, 10, 0.9, h()[0].mean(0))
    K = intrinsics(280, 96, 96)

    def draw(s):
        return rasterize(*s, V[None], K[None], 96, 96, backgrounds=torch.zeros(1, 3))[0][0]

    with torch.no_grad():
        a = draw(s)
        b = draw(read_ply(write_ply(tmp_path / 'a.ply', *s)))
    assert a.std() > 0.05
    assert psnr(a.clamp(0, 1), b.clamp(0, 1)) >= 45


def ply(rows, columns=PLY_COLUMNS, types=None, before='', after='', lead=b'', nl='\n', count=None):
    "A PLY with chosen columns, types and tables around."
    types = types or ['float'] * len(columns)
    head = [
        'ply',
        'format binary_little_endian 1.0',
        'comment made for a test',
        before,
        f'element vertex {len(rows) if count is None else count}',
        *(f'property {t} {c}' for t, c in zip(types, columns)),
        *([after] if after else []),
        'end_header',
    ]
    head = [l for h in head for l in h.split('|') if l]
    kind = dict(float='<f4', double='<f8', uchar='u1', int='<i4')
    table = np.zeros(len(rows), [(c, kind[t]) for c, t in zip(columns, types)])
    for i, c in enumerate(columns):
        table[c] = rows[:, i]
    return (nl.join(head) + nl).encode() + lead + table.tobytes()


@pytest.fixture
def raw(tmp_path):
    "Rows of a file of ours, and what they mean."
    s = splats(20)
    data = write_ply(tmp_path / 'raw.ply', *s).read_bytes()
    return np.frombuffer(data[data.index(b'end_header\n') + 11 :], '<f4').reshape(20, 17), read_ply(
        tmp_path / 'raw.ply'
    )


def test_foreign_files(tmp_path, raw):
    rows, want = raw
    path = tmp_path / 'a.ply'
    order = np.random.default_rng(0).permutation(17)
    few = [i for i, c in enumerate(PLY_COLUMNS) if c[0] != 'n']
    extra = (
        PLY_COLUMNS[:9] + [f'f_rest_{i}' for i in range(45)] + PLY_COLUMNS[9:] + ['red', 'label']
    )
    wide = np.concatenate([rows[:, :9], np.ones((20, 45)), rows[:, 9:], np.full((20, 2), 200)], 1)
    for data in (
        ply(rows[:, order], [PLY_COLUMNS[i] for i in order]),
        ply(rows[:, few], [PLY_COLUMNS[i] for i in few]),
        ply(rows, types=['double'] * 17),
        ply(rows, nl='\r\n'),
        ply(wide, extra, ['float'] * 62 + ['uchar', 'int']),
        ply(rows, before='element chunk 3|property float a|property uchar b', lead=b'\n' * 15),
        ply(rows, after='element face 0|property list uchar int vertex_indices'),
        ply(rows) + b'more bytes behind',
    ):
        path.write_bytes(data)
        for got, w in zip(read_ply(path), want):
            assert torch.allclose(got, w, rtol=1e-6, atol=0)


def test_foreign_colours_below_black(tmp_path, raw):
    rows = raw[0].copy()
    rows[:, 6:9] = -5
    (tmp_path / 'a.ply').write_bytes(ply(rows))
    assert (read_ply(tmp_path / 'a.ply')[4] == 0).all()


BAD = dict(
    empty=(b'', 'not a PLY'),
    jpeg=(b'\xff\xd8\xff\xe0' * 50, 'not a PLY'),
    headless=(b'ply\nformat binary_little_endian 1.0\n', 'end_header'),
    words=(b'plywood\nend_header\n', 'not a PLY'),
)


@pytest.mark.parametrize('name', BAD)
def test_not_a_ply(tmp_path, name):
    (tmp_path / 'a.ply').write_bytes(BAD[name][0])
    with pytest.raises(InputError, match=BAD[name][1]):
        read_ply(tmp_path / 'a.ply')


def test_malformed(tmp_path, raw):
    rows, _ = raw
    path = tmp_path / 'a.ply'
    good = ply(rows)

    def swap(a, b):
        return good.replace(a.encode(), b.encode(), 1)

    def lost(c):
        return ply(np.delete(rows, PLY_COLUMNS.index(c), 1), [x for x in PLY_COLUMNS if x != c])

    uchar = ply(rows, types=['uchar' if c == 'opacity' else 'float' for c in PLY_COLUMNS])
    inf = rows.copy()
    inf[3, 10] = np.inf
    cases = [
        (swap('binary_little_endian', 'ascii'), 'binary little-endian'),
        (swap('binary_little_endian', 'binary_big_endian'), 'binary little-endian'),
        (good[:-1], 'cut short.*20 rows of "vertex", there are 19'),
        *((lost(c), f'lacks {c}') for c in ('x', 'opacity', 'rot_3', 'f_dc_0')),
        (uchar, 'opacity should be float or double; got uint8'),
        (swap('vertex 20', 'vertex -20'), 'cannot use'),
        (swap('vertex 20', 'vertex many'), 'cannot use'),
        (swap('vertex 20', 'vertex 20.5'), 'cannot use'),
        (swap('vertex 20', 'vertex'), 'cannot use'),
        (swap('float nx', 'list uchar int nx'), 'cannot use'),
        (swap('float nx', 'half nx'), 'unknown number type half'),
        (swap('float ny', 'float nx'), 'cannot use'),
        (swap('vertex', 'point'), 'a table "vertex"'),
        (ply(inf), 'damaged: scales hold nan or inf in 1 '),
        (ply(rows * np.nan), 'damaged'),
        (ply(rows, before='element face 2|property list uchar int vertex_indices'), 'cannot use'),
        *(
            (swap('vertex 20', f'vertex {n}'), 'cut short|cannot use')
            for n in (21, 2**31, 2**40, 10**14, 10**30, '9' * 5000)
        ),
    ]
    for data, words in cases:
        path.write_bytes(data)
        with pytest.raises(InputError, match=words):
            read_ply(path)


def test_damaged_headers_never_crash(tmp_path, raw):
    "Hundreds of files with flipped bytes or a missing end: read, or refused in one sentence."
    good = ply(raw[0])
    end = good.index(b'end_header') + 11
    rng = np.random.default_rng(0)
    refused = 0
    path = tmp_path / 'a.ply'
    for i in range(600):
        data = bytearray(good)
        for at in rng.integers(0, end, rng.integers(1, 4)):
            data[at] = rng.choice([rng.integers(256), ord('9'), ord('\n'), ord(' ')])
        path.write_bytes(data[: rng.integers(len(data))] if i % 5 == 0 else data)
        try:
            read_ply(path)
        except InputError as e:
            refused += 1
            assert '\n' not in str(e)
    assert refused > 300


def test_no_file(tmp_path):
    for p in (tmp_path / 'none.ply', tmp_path):
        with pytest.raises(InputError, match='cannot read'):
            read_ply(p)


def test_bad_splats(tmp_path):
    s = splats(5)
    for i, words in enumerate(
        (
            'means should be',
            'quats should be',
            'scales should be',
            'opacities should be',
            'colors should be',
        )
    ):
        with pytest.raises(ValueError, match=words):
            write_ply(
                tmp_path / 'a.ply',
                *(
                    t[:, :1] if j == i and t.ndim == 2 else t[:3] if j == i else t
                    for j, t in enumerate(s)
                ),
            )
        with pytest.raises(ValueError, match='nan or inf'):
            write_ply(
                tmp_path / 'a.ply', *(t * float('nan') if j == i else t for j, t in enumerate(s))
            )
    with pytest.raises(InputError, match='end in .ply'):
        write_ply(tmp_path / 'a.obj', *s)
    (tmp_path / 'file').write_text('')
    with pytest.raises(InputError, match='cannot write'):
        write_ply(tmp_path / 'file' / 'a.ply', *s)
    assert os.listdir(tmp_path) == ['file']


def test_interrupted_ply_keeps_the_old_one(tmp_path, monkeypatch):
    path = write_ply(tmp_path / 'a.ply', *splats(5))
    old = path.read_bytes()

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, 'replace', stop)
    with pytest.raises(KeyboardInterrupt):
        write_ply(path, *splats(6))
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ['a.ply']


@pytest.mark.parametrize('degree', (0, 3))
def test_gsplat_writes_what_we_write(tmp_path, raw, degree):
    gsplat = pytest.importorskip('gsplat', reason='gsplat is the referee of this test')
    rows, want = raw
    t = torch.from_numpy(rows.copy())
    rest = torch.ones(20, (degree + 1) ** 2 - 1, 3)
    args = (t[:, :3], t[:, 10:13], t[:, 13:], t[:, 9], t[:, None, 6:9], rest)
    data = gsplat.export_splats(*args, format='ply', save_to=str(tmp_path / 'g.ply'))
    for got, w in zip(read_ply(tmp_path / 'g.ply'), want):
        assert torch.equal(got, w)
    if not degree:
        assert data[data.index(b'end_header\n') + 11 :] == np.delete(rows, (3, 4, 5), 1).tobytes()
    gsplat.export_splats(*args, format='ply_compressed', save_to=str(tmp_path / 'c.ply'))
    places = read_ply(tmp_path / 'c.ply')[0]
    assert torch.cdist(places, want[0]).min(1).values.max() < 2e-3
    assert len(places) == 20


@pytest.mark.parametrize('end', ('.ply', '.compressed.ply', '.splat', '.npz'))
@pytest.mark.parametrize('n', (1, 255, 256, 257, 700))
def test_every_format_reads_back(tmp_path, end, n):
    "Small files know less and are in another order; each Gaussian is found by its place."
    s = splats(n, seed=n)
    got = read_splats(write_splats(tmp_path / f'a{end}', *s))
    assert [len(t) for t in got] == [n] * 5
    d, i = torch.cdist(got[0], s[0]).min(1)
    assert len(i.unique()) == n and d.max() < 2e-3
    assert (quat_to_mat(got[1]) - quat_to_mat(s[1][i])).abs().max() < 0.03
    assert (got[2].log() - s[2][i].log()).abs().max() < 0.01
    assert (got[3] - s[3][i]).abs().max() < 0.01
    assert (got[4] - s[4][i]).abs().max() < 0.01


@pytest.mark.parametrize('end', ('.compressed.ply', '.splat', '.npz'))
def test_damaged_small_files_never_crash(tmp_path, end):
    good = write_splats(tmp_path / f'a{end}', *splats(40)).read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / f'b{end}'
    for i in range(200):
        data = bytearray(good)
        for at in rng.integers(0, min(len(good), 600), rng.integers(1, 4)):
            data[at] = rng.integers(256)
        path.write_bytes(data[: rng.integers(len(data))] if i % 4 == 0 else data)
        try:
            read_splats(path)
        except InputError as e:
            assert '\n' not in str(e)


def test_a_failure_keeps_the_old_file(tmp_path, monkeypatch):
    for end in ('.compressed.ply', '.splat', '.npz'):
        path = write_splats(tmp_path / f'a{end}', *splats(5))
        old = path.read_bytes()
        with monkeypatch.context() as m:
            m.setattr('pathlib.Path.replace', lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
            m.setattr('os.replace', lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                write_splats(path, *splats(6))
        assert path.read_bytes() == old
        assert not [x for x in os.listdir(tmp_path) if 'part' in x or x.startswith('.')]


def test_sequence_goes_on(tmp_path, avatar, monkeypatch):
    poses = [avatar.head.arkit(dict(jawOpen=i / 5)) for i in range(5)]
    write, count = export.write_splats, []

    def broken(path, *s):
        count.append(path)
        return write(path, *s) if len(count) < 3 else (_ for _ in ()).throw(KeyboardInterrupt())

    with monkeypatch.context() as m:
        m.setattr(export, 'write_splats', broken)
        with pytest.raises(KeyboardInterrupt):
            write_sequence(avatar, poses, tmp_path / 's')
    first = {p.name: p.stat().st_mtime_ns for p in (tmp_path / 's').glob('frame*')}
    assert len(first) == 2
    write_sequence(avatar, poses, tmp_path / 's')
    assert len(list((tmp_path / 's').glob('frame*'))) == 5
    assert all((tmp_path / 's' / k).stat().st_mtime_ns == t for k, t in first.items())


def test_plyfile_reads_it(tmp_path):
    plyfile = pytest.importorskip(
        'plyfile', reason='plyfile is an independent reader, used only here: pip install plyfile'
    )
    s = splats(30)
    v = plyfile.PlyData.read(str(write_ply(tmp_path / 'a.ply', *s)))['vertex']
    assert [p.name for p in v.properties] == PLY_COLUMNS
    assert len(v.data) == 30

    def col(*names):
        return torch.from_numpy(np.stack([v[n] for n in names], -1).copy())

    assert torch.equal(col('x', 'y', 'z'), s[0])
    assert (col('nx', 'ny', 'nz') == 0).all()
    assert torch.allclose(col('opacity')[:, 0].sigmoid(), s[3], atol=1e-6)
    assert torch.allclose(col('scale_0', 'scale_1', 'scale_2').exp(), s[2], rtol=1e-5)
    assert torch.allclose(
        quat_to_mat(col('rot_0', 'rot_1', 'rot_2', 'rot_3')), quat_to_mat(s[1]), atol=1e-6
    )
    assert torch.allclose(
        0.5 + 0.28209479177387814 * col('f_dc_0', 'f_dc_1', 'f_dc_2'), s[4], atol=1e-6
    )
