"Motions, films and splat files: round trips, independent readers, bad input, interrupts."

import os
import subprocess
import sys
import textwrap
import time
from typing import NamedTuple

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from PIL import Image

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


def film(n, height=48, width=64, seed=0):
    "Smooth moving colours, so that compression cannot confuse frames."
    y, x = np.mgrid[:height, :width][..., None]
    colours = np.random.default_rng(seed).uniform(0, 6, 3)
    waves = [np.sin(x / 17 + y / 23 + colours + i / 2) for i in range(n)]
    return [(127 + 120 * wave).astype(np.uint8) for wave in waves]


# turn, swing, both, speak


@pytest.mark.parametrize('seed', range(5))
def test_turn_is_an_orbit_and_comes_back(seed):
    generator = torch.Generator().manual_seed(seed)
    yaw, pitch = (torch.rand(2, generator=generator) * 140 - 70).tolist()
    center = torch.randn(3, generator=generator) * 0.1
    front = orbit(0, 0, 0.7, center).double()
    away = orbit(yaw, pitch, 0.7, center)
    assert torch.allclose(turn(front, yaw, pitch, center), away.double(), atol=1e-5)
    there = turn(away, yaw, 0, center)
    assert torch.allclose(turn(there, -yaw, 0, center), away, atol=1e-5)
    point = torch.cat([center, torch.ones(1)]).double()
    turned = turn(front, yaw, 0, center)
    assert torch.allclose(turned @ point, front @ point, atol=1e-6)  # the centre stays


def test_swing_loops():
    assert swing(8)[0] == (0, 0)
    assert len(swing(8)) == 8
    assert swing(0) == []
    yaw = np.array(swing(400, yaw=30, pitch=5))
    assert np.abs(np.abs(yaw).max(0) - (30, 5)).max() < 0.01


OPPOSITES = 'jawLeft', 'mouthLeft'  # these do not move together with their right


def test_names():
    both_sides = dict(mouthSmileLeft=0.5, mouthSmileRight=0.5, jawOpen=0.1)
    assert both(mouthSmile=0.5, jawOpen=0.1) == both_sides
    names = open_head().arkit_names
    for name in names:
        assert both(**{name: 0.3}) == {name: 0.3}
    for name in names:
        if name.endswith('Left') and name not in OPPOSITES:
            stem = name.removesuffix('Left')
            assert both(**{stem: 0.3}) == {name: 0.3, f'{stem}Right': 0.3}


@pytest.mark.parametrize('bad', ['jaw', 'mouth', 'smile', 'JawOpen', ''])
def test_unknown_names(bad):
    with pytest.raises(InputError, match='not an ARKit weight'):
        both(**{bad: 1.0})


@pytest.mark.parametrize('seed', range(8))
@pytest.mark.parametrize('fps', (12, 24, 60))
def test_speech(fps, seed):
    speech = speak(4 * fps, fps, seed)
    assert len(speech) == 4 * fps
    assert all(0 <= weight <= 1 for frame in speech for weight in frame.values())
    assert speech == speak(4 * fps, fps, seed) != speak(4 * fps, fps, seed + 1)
    for end in (speech[0], speech[-1]):
        assert max(end.values()) < 0.03  # it loops
    assert max(frame['jawOpen'] for frame in speech) > 0.2
    assert np.ptp([frame['eyeBlinkLeft'] for frame in speech]) > 0.5
    for frame in speech:
        assert frame['eyeBlinkLeft'] == frame['eyeBlinkRight']
        assert min(frame['eyeLookOutLeft'], frame['eyeLookInLeft']) == 0
        assert frame['eyeLookOutLeft'] == frame['eyeLookInRight']


@pytest.mark.parametrize('fps', (12, 24, 60))
def test_length_of_short_speech(fps):
    for n in range(5):
        assert len(speak(n, fps)) == n
    open_head().arkit(speak(10, fps)[9])


def test_render_motion(avatar):
    K = intrinsics(130, 48, 40)
    front = orbit(0, 0, 0.9)
    cameras = [front, turn(front, 40)]
    poses = [{}, avatar.head.arkit(both(jawOpen=0.6))]
    frames = render_motion(avatar, cameras, poses, K, 48, 40, background=(1.0, 0.0, 0.0))
    assert [frame.shape for frame in frames] == [(40, 48, 3)] * 2
    assert frames[0].dtype == np.uint8
    assert (frames[0] != frames[1]).any()
    assert frames[0][0, 0].tolist() == [255, 0, 0]
    with pytest.raises(ValueError, match='one camera per pose: got 1 cameras and 2 poses'):
        render_motion(avatar, [front], [{}, {}], K, 48, 40)


# films


def even(side, suffix):
    "A side of a film: only a gif may be odd."
    return side if suffix == 'gif' else side + side % 2


@pytest.mark.parametrize('suffix', ('mp4', 'gif', 'MP4'))
@pytest.mark.parametrize('height,width', ((48, 64), (33, 51), (1, 1), (2, 99)))
def test_film_reads_back(tmp_path, suffix, height, width):
    frames = film(9, height, width)
    path = write_film(iter(frames), tmp_path / f'sub/film.{suffix}', 10)
    back = imageio.mimread(path, memtest=False)
    assert len(back) == 9
    assert back[0].shape[:2] == (even(height, suffix), even(width, suffix))
    assert os.listdir(path.parent) == [path.name]
    if min(height, width) > 30:
        for frame, read in zip(frames, back):
            assert np.abs(frame.astype(float) - read[:height, :width, :3]).mean() < 8
    if suffix != 'gif':
        assert abs(imageio.get_reader(path).get_meta_data()['duration'] - 0.9) < 0.06


def durations(path):
    "Of the frames of a gif, milliseconds."
    from PIL import Image

    with Image.open(path) as image:
        return [image.seek(i) or image.info['duration'] for i in range(image.n_frames)]


@pytest.mark.parametrize('fps', (1, 7, 12, 24, 25, 30, 50))
def test_gif_keeps_its_length(tmp_path, fps):
    lengths = durations(write_film(film(13, 8, 8), tmp_path / 'a.gif', fps))
    assert abs(sum(lengths) - 13000 / fps) <= 5
    assert len(lengths) == 13
    assert max(lengths) - min(lengths) <= 10


def test_colours_chosen_side_by_side_are_the_same(tmp_path):
    frames = [np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8) for i in range(5)]
    path = write_film(frames, tmp_path / 'ours.gif', 10)
    first, *others = map(Image.fromarray, frames)
    more = dict(save_all=True, append_images=others, duration=[100] * 5, loop=0)
    first.save(tmp_path / 'theirs.gif', **more)
    assert path.read_bytes() == (tmp_path / 'theirs.gif').read_bytes()


def test_still_gif_keeps_its_length(tmp_path):
    path = write_film(film(1) * 10, tmp_path / 'a.gif', 10)
    assert sum(durations(path)) == 1000


def test_floats_and_tensors_are_frames(tmp_path):
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    frames = [torch.rand(16, 16, 3, generator=generator) for generator in generators]
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
        kind = type(error) if isinstance(error, Exception) else error
        with pytest.raises(kind):
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
        assert html.startswith(tag)
        assert '&quot;quoted&quot;' in html


# splat files


class Splats(NamedTuple):
    means: torch.Tensor
    quats: torch.Tensor
    scales: torch.Tensor
    opacities: torch.Tensor
    colors: torch.Tensor


def splats(n=50, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    return Splats(
        means=uniform(n, 3) - 0.5,
        quats=torch.randn(n, 4, generator=generator),
        scales=uniform(n, 3) * 0.01 + 1e-4,
        opacities=uniform(n) * 0.98 + 0.01,
        colors=uniform(n, 3),
    )


def same(found, truth, eps=1e-5):
    found = Splats(*found)
    truth = Splats(*truth)
    turned = quat_to_mat(found.quats), quat_to_mat(truth.quats)
    return (
        torch.equal(found.means, truth.means)
        and torch.allclose(*turned, atol=eps)
        and torch.allclose(found.scales, truth.scales, rtol=eps)
        and torch.allclose(found.opacities, truth.opacities, atol=eps)
        and torch.allclose(found.colors, truth.colors, atol=eps)
    )


@pytest.mark.parametrize('n', (0, 1, 50, 3000))
def test_ply_round_trip(tmp_path, n):
    ours = splats(n, seed=n)
    path = write_ply(tmp_path / 'a.ply', *ours)
    again = write_ply(tmp_path / 'b.ply', *read_ply(path))
    assert same(read_ply(path), ours)
    assert same(read_ply(again), ours)
    start = f'ply\nformat binary_little_endian 1.0\nelement vertex {n}\nproperty float x\n'
    assert path.read_bytes().startswith(start.encode())


def test_same_picture(avatar, tmp_path):
    from spatialavatar0.pictures.metrics import psnr
    from spatialavatar0.splats.renderers import rasterize

    head = avatar.head
    world = avatar.world(**head.arkit(both(jawOpen=0.5)))
    viewmat = orbit(30, 10, 0.9, head()[0].mean(0))
    K = intrinsics(280, 96, 96)
    black = torch.zeros(1, 3)

    def draw(gaussians):
        rgb, *_ = rasterize(*gaussians, viewmat[None], K[None], 96, 96, backgrounds=black)
        return rgb[0].clamp(0, 1)

    with torch.no_grad():
        ours = draw(world)
        theirs = draw(read_ply(write_ply(tmp_path / 'a.ply', *world)))
    assert ours.std() > 0.05
    assert psnr(ours, theirs) >= 45


KINDS = dict(float='<f4', double='<f8', uchar='u1', int='<i4')


def ply(rows, columns=PLY_COLUMNS, types=None, before='', after='', lead=b'', nl='\n'):
    "A PLY with chosen columns, types and tables around."
    types = types or ['float'] * len(columns)
    lines = [
        'ply',
        'format binary_little_endian 1.0',
        'comment made for a test',
        *before.split('|'),
        f'element vertex {len(rows)}',
        *(f'property {kind} {column}' for kind, column in zip(types, columns)),
        *after.split('|'),
        'end_header',
    ]
    header = nl.join(filter(None, lines)) + nl
    table = np.zeros(len(rows), [(column, KINDS[kind]) for column, kind in zip(columns, types)])
    for i, column in enumerate(columns):
        table[column] = rows[:, i]
    return header.encode() + lead + table.tobytes()


def body(data):
    "What follows the header."
    return data[data.index(b'end_header\n') + 11 :]


@pytest.fixture
def raw(tmp_path):
    "Rows of a file of ours, and what they mean."
    path = write_ply(tmp_path / 'raw.ply', *splats(20))
    rows = np.frombuffer(body(path.read_bytes()), '<f4').reshape(20, 17)
    return rows, read_ply(path)


def foreign_files(rows):
    "The same splats as other programs write them."
    order = np.random.default_rng(0).permutation(17)
    few = [i for i, column in enumerate(PLY_COLUMNS) if column[0] != 'n']
    rest = [f'f_rest_{i}' for i in range(45)]
    extra = [*PLY_COLUMNS[:9], *rest, *PLY_COLUMNS[9:], 'red', 'label']
    ones = np.ones((20, 45))
    others = np.full((20, 2), 200)
    wide = np.concatenate([rows[:, :9], ones, rows[:, 9:], others], 1)
    chunk = 'element chunk 3|property float a|property uchar b'
    faces = 'element face 0|property list uchar int vertex_indices'
    return [
        ply(rows[:, order], [PLY_COLUMNS[i] for i in order]),
        ply(rows[:, few], [PLY_COLUMNS[i] for i in few]),
        ply(rows, types=['double'] * 17),
        ply(rows, nl='\r\n'),
        ply(wide, extra, ['float'] * 62 + ['uchar', 'int']),
        ply(rows, before=chunk, lead=b'\n' * 15),
        ply(rows, after=faces),
        ply(rows) + b'more bytes behind',
    ]


def test_foreign_files(tmp_path, raw):
    rows, truth = raw
    path = tmp_path / 'a.ply'
    for data in foreign_files(rows):
        path.write_bytes(data)
        for found, want in zip(read_ply(path), truth):
            assert torch.allclose(found, want, rtol=1e-6, atol=0)


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


HEADERS = [
    ('binary_little_endian', 'ascii', 'should be rows of numbers'),
    ('binary_little_endian', 'binary_big_endian', 'damaged: .* of 20 splats are bad'),
    ('binary_little_endian', 'binary_middle_endian', 'the format should be .* got binary_middle'),
    ('binary_little_endian 1.0', 'binary_little_endian 2.0', 'the format should be'),
    ('format binary_little_endian 1.0', 'form binary', 'the format should be .* got none'),
    ('vertex 20', 'vertex -20', 'cannot use'),
    ('vertex 20', 'vertex many', 'cannot use'),
    ('vertex 20', 'vertex 20.5', 'cannot use'),
    ('vertex 20', 'vertex', 'cannot use'),
    ('float nx', 'list uchar int nx', 'cannot use'),
    ('float nx', 'half nx', 'unknown number type half'),
    ('float ny', 'float nx', 'cannot use'),
    ('vertex', 'point', 'a table "vertex"'),
]
COUNTS = 21, 2**31, 2**40, 10**14, 10**30, '9' * 5000
HEADERS += [('vertex 20', f'vertex {count}', 'cut short|cannot use') for count in COUNTS]


def refuses(path, data, words):
    path.write_bytes(data)
    with pytest.raises(InputError, match=words):
        read_ply(path)


def test_malformed_headers(tmp_path, raw):
    good = ply(raw[0])
    for old, new, words in HEADERS:
        refuses(tmp_path / 'a.ply', good.replace(old.encode(), new.encode(), 1), words)


@pytest.mark.parametrize('column', ('x', 'opacity', 'rot_3', 'f_dc_0'))
def test_lost_columns(tmp_path, raw, column):
    others = [other for other in PLY_COLUMNS if other != column]
    rows = np.delete(raw[0], PLY_COLUMNS.index(column), 1)
    refuses(tmp_path / 'a.ply', ply(rows, others), f'lacks {column}')


def test_malformed_rows(tmp_path, raw):
    rows, _ = raw
    path = tmp_path / 'a.ply'
    types = ['uchar' if column == 'opacity' else 'float' for column in PLY_COLUMNS]
    faces = 'element face 2|property list uchar int vertex_indices'
    refuses(path, ply(rows)[:-1], 'cut short.*20 rows of "vertex", there are 19')
    refuses(path, ply(rows, types=types), 'opacity should be float or double; got uint8')
    refuses(path, ply(rows * np.nan), 'damaged: 20 of 20 splats are bad')
    refuses(path, ply(rows, before=faces), 'cannot use')


SPOILT = dict(  # column, value -> what is said of it
    place=(0, np.nan, 'nan or inf'),
    endless=(2, -np.inf, 'nan or inf'),
    far=(1, 1e9, 'an absurd place'),
    color=(7, np.nan, 'nan or inf'),
    bright=(6, 1e20, 'an absurd size or colour'),
    unsure=(9, np.nan, 'nan or inf'),
    huge=(10, 1e3, 'nan or inf'),
    large=(12, 40.0, 'an absurd size or colour'),
    unturned=(slice(13, 17), 0.0, 'no rotation'),
    turned_away=(16, np.nan, 'nan or inf'),
)


@pytest.mark.parametrize('name', SPOILT)
@pytest.mark.parametrize('form', ('little', 'big', 'ascii'))
def test_bad_rows_are_left_out_and_counted(tmp_path, raw, name, form):
    column, value, words = SPOILT[name]
    rows = raw[0].copy()
    rows[[3, 11], column] = value
    (tmp_path / 'a.ply').write_bytes(in_form(rows, form))
    with pytest.warns(UserWarning, match=f'left out 2 of 20 splats .2 with {words}') as said:
        found = read_ply(tmp_path / 'a.ply')
    assert len(said) == 1
    keep = [i for i in range(20) if i not in (3, 11)]
    for got, want in zip(found, raw[1], strict=True):
        assert torch.allclose(got, want[keep], rtol=1e-6)


def test_full_and_empty_splats_are_kept(tmp_path, raw):
    "Some programs write a logit of inf for opaque, and a log size of -inf for flat."
    rows = raw[0].copy()
    rows[0, 9], rows[1, 9], rows[2, 12] = np.inf, -np.inf, -np.inf
    (tmp_path / 'a.ply').write_bytes(ply(rows))
    found = Splats(*read_ply(tmp_path / 'a.ply'))
    assert found.opacities[:2].tolist() == [1, 0]
    assert found.scales[2, 2] == 0
    assert len(found.means) == 20


def text_of(rows, sep=' ', nl='\n'):
    return nl.join(sep.join(f'{value:.9g}' for value in row) for row in rows.tolist()).encode()


def in_form(rows, form, **how):
    "A PLY in one of the three forms of the format."
    data = ply(rows, **how)
    start = data.index(b'end_header') + len('end_header') + len(how.get('nl', '\n'))
    header = data[:start].decode()
    if form == 'little':
        return data
    if form == 'ascii':
        return header.replace('binary_little_endian', 'ascii').encode() + text_of(rows)
    types = [(column, '>f4') for column in how.get('columns', PLY_COLUMNS)]
    turned = np.array([tuple(row) for row in rows], types)
    return header.replace('little', 'big').encode() + turned.tobytes()


@pytest.mark.parametrize('form', ('big', 'ascii'))
@pytest.mark.parametrize('nl', ('\n', '\r\n', '\r'))
def test_other_byte_orders_and_text(tmp_path, raw, form, nl):
    (tmp_path / 'a.ply').write_bytes(in_form(raw[0], form, nl=nl))
    for got, want in zip(read_ply(tmp_path / 'a.ply'), raw[1], strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize('text', (True, False), ids=('text', 'big'))
@pytest.mark.parametrize('degree', (0, 1, 2, 3, 4))
def test_files_by_plyfile(tmp_path, raw, text, degree):
    "An independent writer: colours of any degree, unknown columns and tables around."
    plyfile = pytest.importorskip('plyfile')
    rest = [f'f_rest_{i}' for i in range(3 * ((degree + 1) ** 2 - 1))]
    names = [*PLY_COLUMNS[:9], *rest, *PLY_COLUMNS[9:], 'confidence']
    table = np.zeros(20, [(name, 'f8' if name in ('x', 'confidence') else 'f4') for name in names])
    for i, name in enumerate(PLY_COLUMNS):
        table[name] = raw[0][:, i]
    cameras = np.ones(3, [('fov', 'f4'), ('number', 'u2')])
    tables = [plyfile.PlyElement.describe(cameras, 'camera')]
    tables.append(plyfile.PlyElement.describe(table, 'vertex'))
    order = '=' if text else '>'
    path = tmp_path / 'a.ply'
    plyfile.PlyData(tables, text=text, byte_order=order).write(str(path))
    for got, want in zip(read_ply(path), raw[1], strict=True):
        assert torch.allclose(got, want, rtol=1e-6, atol=1e-7)


TEXTS = {
    'a word': (lambda text: text.replace(b' ', b' word ', 1), 'rows of numbers'),
    'a comma': (lambda text: text.replace(b' ', b',', 1), 'rows of numbers'),
    'a number more': (lambda text: text.replace(b' ', b' 7 ', 1), 'rows of numbers'),
    'one row less': (lambda text: text[: text.rindex(b'\n')], 'got 19 of 17'),
    'nothing': (lambda text: b'', 'cut short'),
    'bytes': (lambda text: bytes(range(256)) * 8, 'rows of numbers'),
    'blank lines': (lambda text: b'\n' * 1000, 'should be 20 rows of 17 numbers'),
}


@pytest.mark.parametrize('name', TEXTS)
@pytest.mark.filterwarnings('error')
def test_malformed_text(tmp_path, raw, name):
    change, words = TEXTS[name]
    header = in_form(raw[0], 'ascii')[: -len(text_of(raw[0]))]
    refuses(tmp_path / 'a.ply', header + change(text_of(raw[0])), words)


@pytest.mark.parametrize('form', ('little', 'big', 'ascii'))
def test_counts_that_lie_cost_nothing(tmp_path, raw, form):
    good = in_form(raw[0], form)
    for count in (21, 10**6, 10**12, 10**15 - 1):
        lying = good.replace(b'vertex 20', f'vertex {count}'.encode(), 1)
        start = time.perf_counter()
        refuses(tmp_path / 'a.ply', lying, 'cut short|got 20 of 17')
        assert time.perf_counter() - start < 1


def test_tables_without_columns(tmp_path, raw):
    empty = b'ply\nformat binary_little_endian 1.0\nelement vertex 1000000000000\nend_header\n'
    refuses(tmp_path / 'a.ply', empty, 'lacks x, y, z')
    before = 'element nothing 1000000000000'
    (tmp_path / 'a.ply').write_bytes(ply(raw[0], before=before))
    assert len(read_ply(tmp_path / 'a.ply')[0]) == 20


@pytest.mark.parametrize('end', ('.compressed.ply', '.splat', '.npz'))
def test_bad_rows_of_small_files(tmp_path, end):
    path = write_splats(tmp_path / f'a{end}', *splats(600))
    data = bytearray(path.read_bytes())
    nan = np.float32('nan').tobytes()
    if end == '.compressed.ply':  # a chunk is 18 ranges of 256 splats
        start = data.index(b'end_header\n') + 11
        data[start : start + 4] = nan
        lost = 256
    elif end == '.splat':
        data[0:4], data[32 * 5 + 28 : 32 * 6] = nan, bytes([128] * 4)
        lost = 2
    else:
        arrays = dict(zip(Splats._fields, (x.numpy().copy() for x in splats(600))))
        arrays['scales'][7] = 1e30
        arrays['opacities'] = arrays['opacities'].astype('f8')
        arrays['opacities'][9] = -0.5
        np.savez(path, **arrays)
        data, lost = path.read_bytes(), 2
    path.write_bytes(data)
    with pytest.warns(UserWarning, match=f'left out {lost} of 600 splats') as said:
        assert len(read_splats(path)[0]) == 600 - lost
    assert len(said) == 1


def test_a_packed_npz_that_unfolds_is_refused(tmp_path, monkeypatch):
    "Ten kilobytes on disk, ten megabytes in memory; the limit stands lower here than in use."
    monkeypatch.setattr(export, '_MOST', 5_000_000)
    np.savez_compressed(tmp_path / 'a.npz', **dict.fromkeys(Splats._fields, np.zeros((99_999, 4))))
    assert (tmp_path / 'a.npz').stat().st_size < 100_000
    with pytest.raises(InputError, match='unfolds to'):
        read_splats(tmp_path / 'a.npz')


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
    for path in (tmp_path / 'none.ply', tmp_path):
        with pytest.raises(InputError, match='cannot read|a file was expected'):
            read_ply(path)


@pytest.mark.parametrize('name', Splats._fields)
def test_bad_splats(tmp_path, name):
    good = splats(5)
    value = getattr(good, name)
    narrow = value[:, :1] if value.ndim == 2 else value[:3]
    with pytest.raises(ValueError, match=f'{name} should be'):
        write_ply(tmp_path / 'a.ply', *good._replace(**{name: narrow}))
    with pytest.raises(ValueError, match='nan or inf'):
        write_ply(tmp_path / 'a.ply', *good._replace(**{name: value * float('nan')}))
    assert not os.listdir(tmp_path)


def test_bad_places(tmp_path):
    with pytest.raises(InputError, match='end in .ply'):
        write_ply(tmp_path / 'a.obj', *splats(5))
    (tmp_path / 'file').write_text('')
    with pytest.raises(InputError, match='cannot write'):
        write_ply(tmp_path / 'file' / 'a.ply', *splats(5))
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
    rows, truth = raw
    table = torch.from_numpy(rows.copy())
    rest = torch.ones(20, (degree + 1) ** 2 - 1, 3)
    means, sh0, opacities = table[:, :3], table[:, None, 6:9], table[:, 9]
    args = (means, table[:, 10:13], table[:, 13:], opacities, sh0, rest)
    plain = tmp_path / 'g.ply'
    small = tmp_path / 'c.ply'
    data = gsplat.export_splats(*args, format='ply', save_to=str(plain))
    for found, want in zip(read_ply(plain), truth):
        assert torch.equal(found, want)
    if not degree:
        assert body(data) == np.delete(rows, (3, 4, 5), 1).tobytes()
    gsplat.export_splats(*args, format='ply_compressed', save_to=str(small))
    places = read_ply(small)[0]
    assert torch.cdist(places, truth[0]).min(1).values.max() < 2e-3
    assert len(places) == 20


@pytest.mark.parametrize('end', ('.ply', '.compressed.ply', '.splat', '.npz'))
@pytest.mark.parametrize('n', (1, 255, 256, 257, 700))
def test_every_format_reads_back(tmp_path, end, n):
    "Small files know less and are in another order; each Gaussian is found by its place."
    ours = splats(n, seed=n)
    found = Splats(*read_splats(write_splats(tmp_path / f'a{end}', *ours)))
    assert [len(values) for values in found] == [n] * 5
    distances, order = torch.cdist(found.means, ours.means).min(1)
    truth = Splats(*(values[order] for values in ours))
    assert len(order.unique()) == n
    assert distances.max() < 2e-3
    assert (quat_to_mat(found.quats) - quat_to_mat(truth.quats)).abs().max() < 0.03
    assert (found.scales.log() - truth.scales.log()).abs().max() < 0.01
    assert (found.opacities - truth.opacities).abs().max() < 0.01
    assert (found.colors - truth.colors).abs().max() < 0.01


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


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_failure_keeps_the_old_file(tmp_path, monkeypatch):
    for end in ('.compressed.ply', '.splat', '.npz'):
        path = write_splats(tmp_path / f'a{end}', *splats(5))
        old = path.read_bytes()
        with monkeypatch.context() as patched:
            patched.setattr('pathlib.Path.replace', interrupt)
            patched.setattr('os.replace', interrupt)
            with pytest.raises(KeyboardInterrupt):
                write_splats(path, *splats(6))
        assert path.read_bytes() == old
        names = os.listdir(tmp_path)
        assert not [name for name in names if 'part' in name or name.startswith('.')]


def test_sequence_goes_on(tmp_path, avatar, monkeypatch):
    poses = [avatar.head.arkit(dict(jawOpen=i / 5)) for i in range(5)]
    folder = tmp_path / 's'
    write = export.write_splats
    written = []

    def broken(path, *gaussians):
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        return write(path, *gaussians)

    with monkeypatch.context() as patched:
        patched.setattr(export, 'write_splats', broken)
        with pytest.raises(KeyboardInterrupt):
            write_sequence(avatar, poses, folder)
    first = {path: path.stat().st_mtime_ns for path in folder.glob('frame*')}
    assert len(first) == 2
    write_sequence(avatar, poses, folder)
    assert len(list(folder.glob('frame*'))) == 5
    assert all(path.stat().st_mtime_ns == time for path, time in first.items())


def test_plyfile_reads_it(tmp_path):
    plyfile = pytest.importorskip(
        'plyfile', reason='plyfile is an independent reader, used only here: pip install plyfile'
    )
    ours = splats(30)
    path = write_ply(tmp_path / 'a.ply', *ours)
    vertex = plyfile.PlyData.read(str(path))['vertex']
    assert [p.name for p in vertex.properties] == PLY_COLUMNS
    assert len(vertex.data) == 30

    def columns(*names):
        return torch.from_numpy(np.stack([vertex[name] for name in names], -1).copy())

    assert torch.equal(columns('x', 'y', 'z'), ours.means)
    assert (columns('nx', 'ny', 'nz') == 0).all()
    assert torch.allclose(columns('opacity')[:, 0].sigmoid(), ours.opacities, atol=1e-6)
    scales = columns('scale_0', 'scale_1', 'scale_2').exp()
    assert torch.allclose(scales, ours.scales, rtol=1e-5)
    turned = quat_to_mat(columns('rot_0', 'rot_1', 'rot_2', 'rot_3'))
    assert torch.allclose(turned, quat_to_mat(ours.quats), atol=1e-6)
    colors = 0.5 + 0.28209479177387814 * columns('f_dc_0', 'f_dc_1', 'f_dc_2')
    assert torch.allclose(colors, ours.colors, atol=1e-6)
