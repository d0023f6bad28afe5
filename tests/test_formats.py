"""Other people's folders: golden ones written by hand, damaged ones, hostile ones, random ones."""

import io
import json
import math
import os
import pickle
import re
import struct
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from spatialavatar0 import cli
from spatialavatar0.ground.core import InputError
from spatialavatar0.head.head import open_head
from spatialavatar0.pictures import clips
from spatialavatar0.pictures.clips import head_fingerprint, write_vhap
from spatialavatar0.pictures.formats import READERS, detect, load_clip, train_test, turn_6d

HEAD = open_head()
MARK = head_fingerprint(HEAD)
WIDTH, HEIGHT = 80, 60
SHAPE = np.linspace(-1, 1, 100)
EXPR = np.linspace(0, 0.5, 50)
# turns about x by asin .6 and about y by asin .28, as matrices and as the first two rows of them
JAW = [[1, 0, 0], [0, 0.8, -0.6], [0, 0.6, 0.8]]
EYE = [[0.96, 0, 0.28], [0, 1, 0], [-0.28, 0, 0.96]]
STILL = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
JAW_ROWS = [*JAW[0], *JAW[1]]
EYES_ROWS = [*EYE[0], *EYE[1], *STILL[0], *STILL[1]]
TURN_X, TURN_Y = math.asin(0.6), math.asin(0.28)
# world -> camera, OpenCV: seen from (.45,.02,.6), a little from the left
VIEW = [
    [0.8, 0, -0.6, 0],
    [0, -1, 0, 0.02],
    [-0.6, 0, -0.8, 0.75],
    [0, 0, 0, 1],
]
K = [[160, 0, 36], [0, 150, 33], [0, 0, 1]]


def picture(path, step=0, mode='RGBA', size=(WIDTH, HEIGHT)):
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = np.zeros((*size[::-1], 4), np.uint8)
    channels[..., 0] = min(10 * step, 255)
    channels[..., 3] = min(51 * step, 255)
    Image.fromarray(channels).convert(mode).save(path)


def double(tensor):
    return tensor.double().numpy()


def posed(rotation=STILL, neck=STILL, jaw=JAW, eye=EYE):
    """The head by the textbook: joints turn about their own places, each vertex takes the mean of
    what they would do to it."""
    verts = (
        double(HEAD.template)
        + np.tensordot(SHAPE, double(HEAD.shape_basis), 1)
        + np.tensordot(EXPR, double(HEAD.expr_basis[:50]), 1)
    )
    joints = double(HEAD.J_regressor) @ verts
    turns = [np.array(turn, float) for turn in (rotation, neck, jaw, eye, STILL)]
    R, T = [turns[0]], [joints[0]]
    for j, parent in ((1, 0), (2, 1), (3, 1), (4, 1)):
        T.append(T[parent] + R[parent] @ (joints[j] - joints[parent]))
        R.append(R[parent] @ turns[j])
    weights = double(HEAD.weights)[..., None]
    return sum(weights[:, j] * ((verts - joints[j]) @ R[j].T + T[j]) for j in range(5))


def distance(frame, verts):
    "The largest one between the frame's mesh and what it should be, metres."
    return np.abs(double(HEAD(**frame.params)[0]) - verts).max()


# ---- folders by hand, from the formats' descriptions alone


def imavatar(folder, T=3, **change):
    for t in range(T):
        picture(folder / f'image/{t + 1}.png', t)
    # OpenGL rows 1 and 2 have the other sign, the shift is in quarters of a metre
    frame = dict(
        world_mat=[[0.8, 0, -0.6, 0], [0, 1, 0, -0.08], [0.6, 0, 0.8, -3.0]],
        expression=EXPR.tolist(),
        pose=[0] * 3 + [0] * 3 + [TURN_X, 0, 0] + [0, TURN_Y, 0, 0, 0, 0],
        bbox=[0, 0, 1],
        flame_keypoints=[[0, 0]] * 68,
    )
    top = dict(
        head=MARK,
        intrinsics=[-2, 2.5, 0.45, 0.55],
        shape_params=SHAPE.tolist(),
        frames=[dict(frame, file_path=f'./image/{t + 1}') for t in range(T)],
    )
    (folder / 'flame_params.json').write_text(json.dumps({**top, **change}))


def insta_codes(folder, t):
    for name, code in dict(
        exp=EXPR,
        shape=SHAPE,
        jaw=JAW_ROWS,
        eyes=EYES_ROWS,
        eyelids=[0, 0],
    ).items():
        path = folder / f'flame/{name}/{t:05d}.txt'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('\n'.join(f'{number:.8f}' for number in code))


def insta(folder, T=3, flip=1, **change):
    # camera to world: columns are the camera's axes and its place
    matrix = [
        [0.8, 0, -0.6 * flip, 0.45],
        [0, -1 * flip, 0, 0.02],
        [-0.6, 0, -0.8 * flip, 0.6],
        [0, 0, 0, 1],
    ]
    frames = []
    for t in range(T):
        picture(folder / f'images/{t:05d}.png', t)
        insta_codes(folder, t)
        paths = dict(file_path=f'images/{t:05d}.png', exp_path=f'flame/exp/{t:05d}.txt')
        frames.append(dict(paths, transform_matrix=matrix))
    top = dict(head=MARK, w=80.0, h=60.0, fl_x=160.0, fl_y=150.0, cx=36.0, cy=33.0, x_fov=28.0)
    for name, part in dict(train=frames[:-1], val=frames[-1:], test=frames[-1:]).items():
        content = json.dumps({**top, 'frames': part, **change})
        (folder / f'transforms_{name}.json').write_text(content)


def N32(*x):
    return np.array(x, np.float32)


def payload(**change):
    "What a .frame of metrical-tracker holds."
    view = np.array(VIEW, np.float32)
    flame = dict(
        exp=EXPR.astype(np.float32)[None],
        shape=SHAPE.astype(np.float32)[None],
        jaw=N32(JAW_ROWS),
        eyes=N32(EYES_ROWS),
        eyelids=N32([0, 0]),
        tex=N32([1]),
    )
    content = dict(
        flame=flame,
        opencv=dict(R=view[None, :3, :3], t=view[None, :3, 3], K=N32(K)),
        img_size=np.array([HEIGHT, WIDTH]),
        frame_id='00000',
        global_step=3,
        head=MARK,
    )
    return {**content, **change}


def flash(folder, T=3, **change):
    (folder / 'checkpoint').mkdir(parents=True)
    (folder / 'alpha').mkdir()
    for t in range(T):
        picture(folder / f'imgs/{t + 1:05d}.png', t, 'RGB')
        Image.new('L', (WIDTH, HEIGHT), 51 * t).save(folder / f'alpha/{t + 1:05d}.png')
        torch.save(payload(**change), folder / f'checkpoint/{t:05d}.frame')


def gaga(folder, T=3, keys=None, **change):
    keys = keys or [f'img_{t}' for t in range(T)]
    # rows of the transpose, x to the left and y up, five to a metre
    entry = dict(
        bbox=N32(0, 0, 1, 1),
        shapecode=SHAPE.astype(np.float32),
        expcode=EXPR.astype(np.float32),
        posecode=N32(0, 0, 0, TURN_X, 0, 0),
        eyecode=N32(0, TURN_Y, 0, 0, 0, 0),
        transform_matrix=N32([-0.8, 0, -0.6, 0], [0, 1, 0, -0.1], [0.6, 0, -0.8, 3.75]),
    )
    for t, key in enumerate(keys):
        picture(folder / f'images/{key}.png', t)
    folder.mkdir(exist_ok=True)
    entries = {key: {**entry, **change} for key in keys}
    (folder / 'smoothed.pkl').write_bytes(pickle.dumps({**entries, 'head': MARK}))


def our_frame(time, camera='0', **params):
    image, mask = torch.rand(HEIGHT, WIDTH, 3), torch.rand(HEIGHT, WIDTH)
    view, intrinsics = torch.tensor(VIEW), torch.tensor(K).float()
    return clips.Frame(image, mask, view, intrinsics, params, time, camera)


def vhap(folder, T=3):
    write_vhap([our_frame(t) for t in range(T)], folder)


MAKE = dict(imavatar=imavatar, insta=insta, flashavatar=flash, gagavatar=gaga, vhap=vhap)
FOREIGN = ['imavatar', 'insta', 'flashavatar', 'gagavatar']


def made(name, folder, **change):
    "A folder in the format of this name."
    folder.mkdir(parents=True, exist_ok=True)
    MAKE[name](folder, **change)
    return folder


@pytest.mark.parametrize('name', FOREIGN)
def test_golden(tmp_path, name):
    folder = made(name, tmp_path / 'c')
    clip = load_clip(folder)
    assert detect(folder) == name and len(clip) == 3
    lens = [[480.0, 0, 40], [0, 360, 30], [0, 0, 1]] if name == 'gagavatar' else K
    for t, frame in enumerate(clip):
        assert torch.allclose(frame.viewmat, torch.tensor(VIEW), atol=1e-5)
        assert torch.allclose(frame.K, torch.tensor(lens).float(), atol=1e-4)
        assert distance(frame, posed()) < 1e-5
        assert torch.allclose(frame.mask, torch.tensor(0.2 * t))
        assert torch.allclose(frame.image[..., 0], torch.tensor(10 * t / 255))
        assert frame.time == t + (name == 'imavatar')


def test_insta_in_opengl(tmp_path):
    folder = made('insta', tmp_path / 'a', flip=-1)
    frame = load_clip(folder)[1]
    assert torch.allclose(frame.viewmat, torch.tensor(VIEW), atol=1e-5)
    assert distance(frame, posed()) < 1e-5
    sizes = [len(load_clip(folder, split=name)) for name in ('train', 'val', 'test', None)]
    assert sizes == [2, 1, 1, 3]


def test_insta_from_checkpoints(tmp_path):
    folder = made('insta', tmp_path / 'b')
    (folder / 'checkpoint').mkdir()
    for t in range(3):
        for name in ('shape', 'jaw', 'eyes', 'eyelids'):
            (folder / f'flame/{name}/{t:05d}.txt').unlink()
        torch.save(payload(), folder / f'checkpoint/{t:05d}.frame')
    frame = load_clip(folder)[1]
    assert torch.allclose(frame.viewmat, torch.tensor(VIEW), atol=1e-5)
    assert distance(frame, posed()) < 1e-5


def test_imavatar_turns_and_its_own_masks(tmp_path):
    imavatar(tmp_path, 1)
    neck = jaw = [TURN_X, 0, 0]
    pose = [0, 0, math.pi / 2] + neck + jaw + [0, TURN_Y, 0, 0, 0, 0]
    edit(tmp_path / 'flame_params.json', lambda top: top['frames'][0].update(pose=pose))
    picture(tmp_path / 'image/1.png', 1, 'RGB')
    (tmp_path / 'mask').mkdir()
    Image.new('L', (WIDTH, HEIGHT), 102).save(tmp_path / 'mask/1.png')
    frame = load_clip(tmp_path)[0]
    quarter = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    assert distance(frame, posed(rotation=quarter, neck=JAW)) < 1e-5
    assert torch.allclose(frame.mask, torch.tensor(0.4))


def from_neighbour(entry, name, k):
    "An entry of the k-th sequence, as a set of both has it."
    paths = ('file_path', 'fg_mask_path', 'flame_param_path')
    moved = {key: f'../{name}/{entry[key]}' for key in paths}
    return dict(entry, timestep_index=entry['timestep_index'] + 2 * k, **moved)


def test_union_and_cameras_of_vhap(tmp_path):
    frames = []
    for k, name in enumerate('ab'):
        shots = [(t, f'cam{camera}') for t in range(2) for camera in range(3)]
        film = [our_frame(*shot, jaw=torch.tensor([[0.1 * shot[0], 0, 0]])) for shot in shots]
        write_vhap(film, tmp_path / name)
        top = json.loads((tmp_path / name / 'transforms.json').read_text())
        frames += [from_neighbour(entry, name, k) for entry in top['frames']]
    (tmp_path / 'union').mkdir()
    (tmp_path / 'union/transforms.json').write_text(json.dumps(dict(top, frames=frames)))
    clip = load_clip(tmp_path / 'union')
    assert len(clip) == 12
    places = [(frame.time, frame.camera) for frame in clip]
    assert places[::5] == [(0, 'cam0'), (1, 'cam2'), (3, 'cam1')]
    assert clip[11].params['jaw'][0, 0] == pytest.approx(0.1)


# ---- the order of time, whatever the file's


def test_imavatar_in_the_order_of_time(tmp_path):
    imavatar(tmp_path, 12)

    def mix(top):
        top['frames'] = [top['frames'][i] for i in (7, 3, 11, 0, 1, 2, 10, 9, 8, 6, 5, 4)]

    edit(tmp_path / 'flame_params.json', mix)
    clip = load_clip(tmp_path)
    assert [frame.time for frame in clip] == list(range(1, 13))
    assert clip[11].image[..., 0].max() == pytest.approx(110 / 255)


@pytest.mark.parametrize('prefix', ['frame_', 'cam2_f', 'x'])
def test_names_that_end_in_numbers(tmp_path, prefix):
    "img_9 comes before img_10, and is moment 9."
    imavatar(tmp_path, 12)

    def rename(top):
        for t, frame in enumerate(top['frames'], 1):
            (tmp_path / f'image/{t}.png').rename(tmp_path / f'image/{prefix}{t}.png')
            frame['file_path'] = f'./image/{prefix}{t}'
        top['frames'].sort(key=lambda frame: frame['file_path'])  # 1, 10, 11, 12, 2 ...

    edit(tmp_path / 'flame_params.json', rename)
    clip = load_clip(tmp_path)
    assert [frame.time for frame in clip] == list(range(1, 13))
    reds = [frame.image[..., 0].max().item() * 25.5 for frame in clip]
    assert np.allclose(reds, range(12), atol=1e-3)


def test_names_without_numbers(tmp_path):
    "Then the order of the file is all there is."
    imavatar(tmp_path, 3)

    def rename(top):
        for name, t in zip('cab', (1, 2, 3)):
            (tmp_path / f'image/{t}.png').rename(tmp_path / f'image/{name}.png')
            top['frames'][t - 1]['file_path'] = f'./image/{name}'

    edit(tmp_path / 'flame_params.json', rename)
    clip = load_clip(tmp_path)
    assert [frame.time for frame in clip] == [0, 1, 2]
    assert clip[2].image[..., 0].max() == pytest.approx(20 / 255)


def test_insta_in_the_order_of_time(tmp_path):
    insta(tmp_path, 5)
    path = tmp_path / 'transforms_train.json'
    edit(path, lambda top: top['frames'].reverse())
    assert [frame.time for frame in load_clip(tmp_path)] == list(range(5))
    assert [frame.time for frame in load_clip(tmp_path, split='train')] == list(range(4))


def test_gagavatar_in_the_order_of_time(tmp_path):
    gaga(tmp_path, keys=[f'img_{t}' for t in (10, 9, 100, 1)])
    assert [frame.time for frame in load_clip(tmp_path)] == [1, 9, 10, 100]


@pytest.mark.parametrize('ending', ['.JPG', '.Jpeg', '.PNG'])
def test_endings_in_capitals(tmp_path, ending):
    made('flashavatar', tmp_path / 'f', T=2)
    for path in [*tmp_path.glob('f/imgs/*'), *tmp_path.glob('f/alpha/*')]:
        path.rename(path.with_suffix(ending))
    assert [frame.time for frame in load_clip(tmp_path / 'f')] == [0, 1]


def test_splits_of_the_papers(tmp_path):
    imavatar(tmp_path, 360)
    train, test = (load_clip(tmp_path, split=name) for name in ('train', 'test'))
    assert (len(train), len(test), test[0].time) == (10, 350, 11)


@pytest.mark.parametrize('name', MAKE)
def test_train_and_test_of_any_folder(tmp_path, name):
    folder = made(name, tmp_path / name, T=5)
    assert [len(clip) for clip in train_test(folder)] == [4, 1]


def unmarked(name, folder):
    "A folder that does not say whose codes it holds."
    made(name, folder, T=2)
    for path in folder.glob('*.json'):
        edit(path, lost('head'))
    for path in folder.glob('smoothed.pkl'):
        entries = pickle.loads(path.read_bytes())
        path.write_bytes(pickle.dumps({key: x for key, x in entries.items() if key != 'head'}))
    for path in folder.glob('checkpoint/*'):
        torch.save({key: x for key, x in payload().items() if key != 'head'}, path)
    return folder


@pytest.mark.parametrize('name', FOREIGN)
def test_whose_codes(tmp_path, name):
    import flame_files as ff

    from spatialavatar0.head.flame_files import load_flame

    folder = unmarked(name, tmp_path / name)
    says = 'does not say which; pass the head it was tracked with'
    for head in (None, HEAD):
        with pytest.raises(InputError, match=says):
            load_clip(folder, head)
    flame = load_flame(ff.write_original(tmp_path / 'm.pkl', ff.model()))
    params = load_clip(folder, flame)[0].params
    assert params['shape'].shape == (1, 300)
    assert params['expr'].shape == (1, 100)
    assert not params['expr'][0, 50:].any()
    assert flame(**params).shape == (1, 60, 3)


def test_eyelids_warn(tmp_path):
    flash(tmp_path / 'f', 1)
    content = payload()
    content['flame']['eyelids'] = np.ones((1, 2), np.float32)
    torch.save(content, tmp_path / 'f/checkpoint/00000.frame')
    with pytest.warns(UserWarning, match='eyelids are a direction'):
        load_clip(tmp_path / 'f')[0]


# ---- pictures in a database


def red_png():
    file = io.BytesIO()
    Image.new('RGB', (WIDTH, HEIGHT), (200, 0, 0)).save(file, 'png')
    return file.getvalue()


def database(folder, **pictures):
    "A folder of the tracker whose pictures lie in a database."
    lmdb = pytest.importorskip('lmdb')
    gaga(folder)
    env = lmdb.open(str(folder / 'img_lmdb'), map_size=1 << 22)
    with env.begin(write=True) as txn:
        for key, content in pictures.items():
            txn.put(key.encode(), content)
    env.close()
    return folder


def test_no_database(tmp_path, monkeypatch):
    gaga(tmp_path / 'g')
    (tmp_path / 'g/img_lmdb').mkdir()
    with pytest.raises(InputError, match='data.mdb is missing'):
        load_clip(tmp_path / 'g')
    (tmp_path / 'g/img_lmdb/data.mdb').write_bytes(b'no database')
    with monkeypatch.context() as patched:
        patched.setitem(__import__('sys').modules, 'lmdb', None)
        with pytest.raises(InputError, match='needs the package lmdb'):
            load_clip(tmp_path / 'g')
    pytest.importorskip('lmdb')
    with pytest.raises(InputError, match='not a readable database'):
        load_clip(tmp_path / 'g')


def test_pictures_in_a_database(tmp_path):
    png = red_png()
    folder = database(tmp_path / 'k', img_0=png, img_1=b'not a picture', img_2=png)
    clip, again = load_clip(folder), load_clip(folder)
    red = pytest.approx(200 / 255)
    assert clip[2].image[0, 0, 0] == again[2].image[0, 0, 0] == red
    assert clip[0].mask.min() == 1
    with pytest.raises(InputError, match='img_lmdb: img_1 is not a readable picture'):
        clip[1]


def test_a_database_that_lacks_a_picture(tmp_path):
    png = red_png()
    with pytest.raises(InputError, match='1 of 3 keys have no picture, the first is img_2'):
        load_clip(database(tmp_path / 'h', img_0=png, img_1=png))


# ---- damage: what was done, and what the error must name


def edit(path, change):
    "Change a JSON file; a list or an object that `change` returns takes its place."
    top = json.loads(path.read_text())
    instead = change(top)
    path.write_text(json.dumps(instead if isinstance(instead, (dict, list)) else top))


def json_(file, change):
    return lambda folder: edit(folder / file, change)


def changed(**change):
    return lambda top: top.update(change)


def lost(name):
    def change(top):
        top.pop(name)

    return change


def frame_(i, **change):
    return lambda top: top['frames'][i].update(change)


def drop_(i, name):
    def change(top):
        top['frames'][i].pop(name)

    return change


def out_(file):
    "A link to a file outside of the folder and its parent."

    def damage(folder):
        inner, outer = folder / file, folder.parents[1] / 'secret'
        outer.write_bytes(inner.read_bytes())
        inner.unlink()
        inner.symlink_to(outer)

    return damage


def pic_(file, **how):
    return lambda folder: picture(folder / file, **how)


def deep_(file):
    deep = np.zeros((HEIGHT, WIDTH), np.uint16)
    return lambda folder: Image.fromarray(deep).save(folder / file)


def chunk(name, content):
    "A part of a PNG file."
    checksum = struct.pack('>I', zlib.crc32(name + content))
    return struct.pack('>I', len(content)) + name + content + checksum


def deep_rgb(file):
    "A PNG with 16 bits in three channels, by hand: PIL would read it as if it had 8."
    header = struct.pack('>IIBBBBB', WIDTH, HEIGHT, 16, 2, 0, 0, 0)
    rows = zlib.compress((b'\0' + bytes(6 * WIDTH)) * HEIGHT)
    chunks = chunk(b'IHDR', header) + chunk(b'IDAT', rows) + chunk(b'IEND', b'')
    return lambda folder: (folder / file).write_bytes(b'\x89PNG\r\n\x1a\n' + chunks)


def torn_(file, size=70):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size])


def gone_(file):
    return lambda folder: (folder / file).unlink()


def text_(file, words):
    return lambda folder: (folder / file).write_text(words)


def large_(file):
    return lambda folder: os.truncate(folder / file, 600_000_000)


class Trap:
    def __init__(self, call=os.system, *words):
        self.call, self.words = call, words or ('echo broken in',)

    def __reduce__(self):
        return self.call, self.words


def ckpt_(**change):
    return lambda folder: torch.save(payload(**change), folder / 'checkpoint/00001.frame')


def inner_(group, name, value):
    "Another value in a group of a checkpoint; None: the name is missing."

    def damage(folder):
        content = payload()
        content[group][name] = value
        if value is None:
            content[group].pop(name)
        torch.save(content, folder / 'checkpoint/00001.frame')

    return damage


def bomb_(folder):
    path = folder / 'checkpoint/00001.frame'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data.pkl', b'\0' * 100_000_000)


def pkl_(change):
    def damage(folder):
        path = folder / 'smoothed.pkl'
        top = pickle.loads(path.read_bytes())
        instead = change(top)
        path.write_bytes(pickle.dumps(top if instead is None else instead))

    return damage


def rec_(name, value):
    "Another value in a record of the tracker; None: the name is missing."

    def change(top):
        top['img_1'][name] = value
        if value is None:
            top['img_1'].pop(name)

    return pkl_(change)


TABLE = 'flame_params.json'
FRAME = 'flame_params.json: frame 1'
TRAIN = 'transforms_train.json'


BAD = {
    'imavatar': {
        'not JSON': (text_(TABLE, '{"frames": ['), f'{TABLE} is not readable JSON'),
        'a list': (text_(TABLE, '[]'), 'list of frames'),
        'not UTF-8': (
            lambda folder: (folder / TABLE).write_bytes(b'\xff\xfe{'),
            'not readable JSON',
        ),
        'endless nesting': (text_(TABLE, '[' * 200_000), 'not readable JSON'),
        'huge JSON': (large_(TABLE), r'has 600,000,000 bytes'),
        'no frames list': (json_(TABLE, lost('frames')), 'list of frames'),
        '0 frames': (json_(TABLE, changed(frames=[])), 'frames is empty'),
        'a frame is null': (
            json_(TABLE, lambda top: top['frames'].__setitem__(1, None)),
            f'{FRAME} should be an object with file_path',
        ),
        'no shape': (
            json_(TABLE, lost('shape_params')),
            f'{TABLE} has no shape_params',
        ),
        'no intrinsics': (json_(TABLE, lost('intrinsics')), 'has no intrinsics'),
        'three intrinsics': (
            json_(TABLE, changed(intrinsics=[1, 1, 0.5])),
            'intrinsics should be 4 numbers; got 3',
        ),
        'focal 0': (
            json_(TABLE, changed(intrinsics=[0, 1, 0.5, 0.5])),
            'focal lengths should be positive',
        ),
        'no pose': (json_(TABLE, drop_(1, 'pose')), f'{FRAME} has no pose'),
        'NaN pose': (
            json_(TABLE, frame_(1, pose=[math.nan] * 15)),
            f'{FRAME}: pose should be finite',
        ),
        'pose of 12': (
            json_(TABLE, frame_(1, pose=[0] * 12)),
            f'{FRAME}: pose should be 15 numbers; got 12',
        ),
        'pose of text': (json_(TABLE, frame_(1, pose=['0'] * 15)), 'pose should be 15 numbers'),
        'ragged matrix': (json_(TABLE, frame_(1, world_mat=[[1, 0], [0]])), f'{FRAME}: world_mat'),
        '3 x 3 matrix': (
            json_(TABLE, frame_(1, world_mat=np.eye(3).tolist())),
            'world_mat should be 3 x 4',
        ),
        'mirrored': (
            json_(TABLE, frame_(1, world_mat=np.diag([-1, 1, 1, 1])[:3].tolist())),
            'world_mat should hold a rotation',
        ),
        'expression null': (
            json_(TABLE, frame_(1, expression=None)),
            f'{FRAME}: expression should be',
        ),
        'too many codes': (
            json_(TABLE, frame_(1, expression=[0.1] * 100)),
            'expr has 100 numbers, open head has 52',
        ),
        'infinite shape': (
            json_(TABLE, changed(shape_params=[math.inf])),
            'shape_params should be finite',
        ),
        'path is a number': (json_(TABLE, frame_(1, file_path=7)), f'{FRAME}: expected a path'),
        '../ path': (json_(TABLE, frame_(1, file_path='../../secret')), 'leads out'),
        'absolute path': (json_(TABLE, frame_(1, file_path='/etc/secret')), 'leads out'),
        'first path out': (
            json_(TABLE, frame_(0, file_path='../../secret')),
            'frame 0: the path .* leads out',
        ),
        'NUL in a path': (json_(TABLE, frame_(1, file_path='a\0b')), 'expected a path'),
        'a link out': (out_('image/2.png'), 'is a link that leads out'),
        'picture gone': (
            gone_('image/2.png'),
            r'1 of 3 files are missing, the first is .*image/2.png',
        ),
        'first picture gone': (gone_('image/1.png'), 'files are missing'),
        'torn picture': (torn_('image/2.png'), r'image/2.png is not a readable picture'),
        '16 bits': (deep_('image/2.png'), 'expected 8 bits'),
        '16 bits RGB': (deep_rgb('image/2.png'), 'expected 8 bits'),
        'grey': (pic_('image/2.png', mode='L'), 'image/2.png .*grey; expected RGB'),
        'another size': (pic_('image/2.png', size=(40, 30)), 'is 40 x 30 pixels'),
        'the same twice': (
            json_(TABLE, frame_(2, file_path='image/2')),
            'frames 1 and 2 are both time step 2',
        ),
        'another head': (json_(TABLE, changed(head='0' * 16)), 'made on another head'),
    },
    'insta': {
        'not JSON': (text_(TRAIN, '?'), f'{TRAIN} is not readable JSON'),
        'no transforms': (gone_('transforms_test.json'), 'transforms_test.json is not readable'),
        '0 frames': (
            lambda folder: [edit(p, changed(frames=[])) for p in folder.glob('*.json')],
            'is not a clip|frames is empty',
        ),
        'no matrix': (
            json_(TRAIN, drop_(1, 'transform_matrix')),
            'frame 1 has no transform_matrix',
        ),
        '3 x 4': (
            json_(TRAIN, frame_(1, transform_matrix=np.eye(4)[:3].tolist())),
            'transform_matrix should be 16 numbers; got 12',
        ),
        'scaled': (
            json_(TRAIN, frame_(1, transform_matrix=np.diag([2, 2, 2, 1]).tolist())),
            'with a rotation in it',
        ),
        'NaN matrix': (
            json_(TRAIN, frame_(1, transform_matrix=[[math.nan] * 4] * 4)),
            'transform_matrix should be finite',
        ),
        'flips its axes': (
            json_(
                TRAIN,
                frame_(
                    1,
                    transform_matrix=[
                        [0.8, 0, 0.6, 0.45],
                        [0, 1, 0, 0.02],
                        [-0.6, 0, 0.8, 0.6],
                        [0, 0, 0, 1],
                    ],
                ),
            ),
            'head behind the camera',
        ),
        'no width': (json_(TRAIN, lost('w')), 'frame 0 has no w'),
        'no focal': (json_(TRAIN, lost('fl_x')), 'has no camera_angle_x'),
        'focal NaN': (json_(TRAIN, changed(fl_x=math.nan)), 'fl_x should be finite'),
        'no exp_path': (json_(TRAIN, drop_(1, 'exp_path')), 'frame 1 has no exp_path'),
        'exp_path out': (json_(TRAIN, frame_(1, exp_path='../../../x.txt')), 'leads out'),
        'absolute picture': (json_(TRAIN, frame_(1, file_path='/x.png')), 'leads out'),
        'codes gone': (
            gone_('flame/jaw/00001.txt'),
            r'flame/jaw/00001.txt is missing, and so is .*00001.frame',
        ),
        'codes of text': (
            text_('flame/exp/00001.txt', 'one two'),
            'exp/00001.txt should hold numbers',
        ),
        'codes empty': (text_('flame/exp/00001.txt', ''), 'exp should be some numbers; got 0'),
        'codes NaN': (text_('flame/shape/00001.txt', 'nan'), 'shape should be finite'),
        'jaw of 3': (text_('flame/jaw/00001.txt', '0 0 0'), 'jaw should be 6 numbers; got 3'),
        'eyes zero': (
            text_('flame/eyes/00001.txt', '0 ' * 12),
            'eyes should be two rows of a rotation',
        ),
        'a link out': (out_('flame/exp/00001.txt'), 'is a link that leads out'),
        'size': (json_(TRAIN, frame_(1, w=81)), 'is 80 x 60 pixels, .* says 81 x 60'),
        'endless width': (json_(TRAIN, frame_(1, w=math.inf)), 'w should be finite'),
        'the same twice': (
            json_(TRAIN, frame_(1, file_path='images/00000.png')),
            'are both time step 0',
        ),
        'torn picture': (torn_('images/00001.png'), 'not a readable picture'),
    },
    'flashavatar': {
        'no frames': (
            lambda folder: [p.unlink() for p in (folder / 'checkpoint').iterdir()],
            r'checkpoint has no NNNNN.frame',
        ),
        'torn': (
            torn_('checkpoint/00001.frame', 500),
            '00001.frame is not a torch file, or breaks off',
        ),
        'empty': (torn_('checkpoint/00001.frame', 0), 'not a torch file'),
        'a malicious pickle': (
            lambda folder: torch.save(Trap(), folder / 'checkpoint/00001.frame'),
            '00001.frame: refused, it asks for .*system',
        ),
        'malicious inside': (ckpt_(flame=Trap()), 'refused, it asks for'),
        'malicious, old form': (
            lambda folder: (folder / 'checkpoint/00001.frame').write_bytes(pickle.dumps(Trap())),
            'not a torch file',
        ),
        'an array of another kind': (
            lambda folder: torch.save(
                dict(x=Trap(np.zeros(1).__reduce__()[0], np.matrix, (0,), b'b')),
                folder / 'checkpoint/00001.frame',
            ),
            'not a sound torch file|refused',
        ),
        'objects': (ckpt_(flame=np.array([{}], object)), 'refused|not a sound'),
        'a zip bomb': (bomb_, 'unfolds to 100,000,000 bytes'),
        'a large file': (
            lambda folder: os.truncate(folder / 'checkpoint/00001.frame', 100_000_000),
            'has 100,000,000 bytes',
        ),
        'not a dictionary': (
            lambda folder: torch.save([1], folder / 'checkpoint/00001.frame'),
            'should hold a dictionary; got list',
        ),
        'no flame': (ckpt_(flame=None), 'flame should be an object with'),
        'no exp': (inner_('flame', 'exp', None), '00001.frame: flame has no exp'),
        'no R': (inner_('opencv', 'R', None), 'opencv has no R|has no R'),
        'scaled R': (
            inner_('opencv', 'R', 2 * np.eye(3, dtype=np.float32)),
            'R should hold a rotation',
        ),
        'NaN K': (inner_('opencv', 'K', N32(*[math.nan] * 9)), 'K should be finite'),
        'focal < 0': (
            inner_('opencv', 'K', -np.eye(3, dtype=np.float32)),
            'focal lengths should be positive',
        ),
        'eyes of 6': (inner_('flame', 'eyes', N32(*[0] * 6)), 'eyes should be 12 numbers; got 6'),
        'size of text': (ckpt_(img_size='large'), 'img_size should be 2 numbers'),
        'another size': (
            ckpt_(img_size=np.array([WIDTH, HEIGHT])),
            'is 80 x 60 pixels, 00001.frame says 60 x 80',
        ),
        'too few pictures': (
            gone_('imgs/00003.png'),
            'imgs has 2 pictures for 3 frames; 00003 is the first',
        ),
        'too few mattes': (gone_('alpha/00002.png'), 'alpha has 2 mattes for 3 frames; 00002'),
        'one number twice': (
            pic_('imgs/2.png', mode='RGB'),
            'imgs have the same number|in imgs have the same number',
        ),
        'a link out': (out_('checkpoint/00001.frame'), 'link that leads out'),
        'small matte': (
            lambda folder: Image.new('L', (4, 4)).save(folder / 'alpha/00002.png'),
            'alpha/00002.png is 4 x 4 pixels',
        ),
        'another head later': (ckpt_(head='f' * 16), '00001.frame was made on another head'),
    },
    'gagavatar': {
        'torn': (torn_('smoothed.pkl', 300), 'smoothed.pkl breaks off'),
        'empty': (torn_('smoothed.pkl', 0), 'is empty'),
        'a malicious pickle': (pkl_(lambda top: Trap()), 'refused, it asks for .*system'),
        'malicious inside': (rec_('expcode', Trap()), 'refused, it asks for'),
        'not a dictionary': (pkl_(lambda top: [1]), 'should hold a dictionary'),
        '0 frames': (pkl_(lambda top: dict(head=MARK)), 'is empty'),
        'a key without number': (
            pkl_(lambda top: top.update(me=1)),
            "the key 'me' should end in a number",
        ),
        'two films': (pkl_(lambda top: top.update(other_1=top['img_1'])), 'holds 2 films'),
        'the same twice': (
            pkl_(lambda top: top.update(img_01=top['img_1'])),
            'are both time step 1',
        ),
        'no code': (rec_('expcode', None), r'smoothed.pkl: img_1 has no expcode'),
        'NaN code': (rec_('shapecode', N32(math.nan)), 'img_1: shapecode should be finite'),
        'pose of 3': (rec_('posecode', N32(0, 0, 0)), 'posecode should be 6 numbers; got 3'),
        'scaled camera': (
            rec_('transform_matrix', 2 * np.eye(4)[:3]),
            'transform_matrix should hold a rotation',
        ),
        '3 x 3 camera': (
            rec_('transform_matrix', np.eye(3)),
            'transform_matrix should be 12 numbers',
        ),
        'record is text': (pkl_(lambda top: top.update(img_1='no')), 'img_1 should be an object'),
        'picture gone': (
            gone_('images/img_1.png'),
            '1 of 3 keys have no picture, the first is img_1',
        ),
        'torn picture': (torn_('images/img_1.png'), 'not a readable picture'),
        'a link out': (out_('smoothed.pkl'), 'link that leads out'),
        'picture links out': (out_('images/img_1.png'), 'link that leads out'),
        'a web page': (text_('smoothed.pkl', '<!DOCTYPE html>'), 'is a web page'),
        'zipped': (
            lambda folder: (folder / 'smoothed.pkl').write_bytes(b'\x1f\x8b' + bytes(9)),
            'packed with gzip',
        ),
    },
    'vhap': {
        'a link out': (out_('images/00001_00.png'), 'link that leads out'),
        'codes link out': (out_('flame_param/00001.npz'), 'link that leads out'),
        'the same twice': (
            json_('transforms.json', frame_(1, timestep_index=0)),
            "frames 0 and 1 are both time step 0 of camera '0'",
        ),
        'grey': (pic_('images/00001_00.png', mode='L'), 'grey; expected RGB'),
        '16 bits RGB': (deep_rgb('images/00001_00.png'), 'expected 8 bits'),
        'endless nesting': (text_('transforms.json', '[' * 200_000), 'not readable JSON'),
        'huge JSON': (large_('transforms.json'), 'has 600,000,000 bytes'),
    },
}
KINDS = [(reader, kind) for reader in BAD for kind in BAD[reader]]
every_kind = pytest.mark.parametrize('reader,kind', KINDS, ids=['-'.join(k) for k in KINDS])


def damaged(tmp_path, reader, kind):
    "A damaged folder, and what an error must say of it."
    folder = made(reader, tmp_path / 'a' / 'c')
    spoil, says = BAD[reader][kind]
    spoil(folder)
    return folder, says


@every_kind
def test_damage_is_named(tmp_path, reader, kind, capfd):
    folder, says = damaged(tmp_path, reader, kind)
    with pytest.raises(InputError, match=says) as error:
        list(load_clip(folder))
    text = str(error.value)
    assert '\n' not in text
    assert len(text) < 700 + 2 * len(str(tmp_path))
    assert str(folder) in text
    assert 'broken in' not in capfd.readouterr().out


def test_kinds():
    assert len(KINDS) >= 45


@every_kind
def test_damage_on_the_command_line(tmp_path, reader, kind, capfd):
    "One line and exit code 1, no traceback."
    folder, says = damaged(tmp_path, reader, kind)
    out = tmp_path / 'r.jsonl'
    words = ['evaluate', 'warp', str(folder), '--protocol', 'last:1', '--out', str(out)]
    assert cli.main(words) == 1
    printed = capfd.readouterr().err.splitlines()
    lines = [line for line in printed if not line.startswith('note: ')]
    assert len(lines) == 1, lines
    assert lines[0].startswith('error: ')
    assert re.search(says, lines[0])
    assert not out.exists()


@pytest.mark.parametrize('name', FOREIGN)
def test_absent_mattes_warn(tmp_path, name):
    folder = made(name, tmp_path / name)
    for path in [*folder.glob('alpha/*')]:
        path.unlink()
    for path in [*folder.glob('im*/*.png')]:
        Image.open(path).convert('RGB').save(path)
    with pytest.warns(UserWarning, match='no matte for .*the whole picture counts'):
        assert load_clip(folder)[1].mask.min() == 1


def test_bad_calls(tmp_path):
    imavatar(tmp_path)
    for call, says in (
        (dict(format='nerf'), "format should be 'auto'"),
        (dict(split='val'), "split should be 'train', 'test' or None"),
        (dict(split='test'), 'has 3 frames, its split holds out the last 350'),
    ):
        with pytest.raises(InputError, match=says):
            load_clip(tmp_path, **call)
    for name, says in (
        ('no', 'no clip at'),
        ('image', 'is not a clip this version reads'),
        ('flame_params.json', 'is not a clip'),
    ):
        with pytest.raises(InputError, match=says):
            load_clip(tmp_path / name)


def test_bad_splits(tmp_path):
    with pytest.raises(InputError, match='split should be'):
        load_clip(made('insta', tmp_path / 'i'), split='all')
    with pytest.raises(InputError, match='has no split'):
        load_clip(made('gagavatar', tmp_path / 'g'), split='test')
    assert READERS['insta'](tmp_path / 'i', None, None, 0)


@pytest.mark.parametrize('name', FOREIGN)
def test_reading_is_lazy(tmp_path, name):
    folder = made(name, tmp_path / name, T=4)
    clip = load_clip(folder)
    for path in [*folder.glob('im*/*')]:
        if '3' not in path.stem[-1:] and '4' not in path.stem[-1:]:
            path.unlink()
    assert clip[2:][-1].height == HEIGHT
    with pytest.raises(InputError):
        clip[0]


def test_turns():
    from scipy.spatial.transform import Rotation

    random = Rotation.random(20, random_state=0)
    rows = random.as_matrix()[:, :2].ravel()
    expected = random.as_rotvec().ravel()
    assert np.allclose(turn_6d(rows), expected, atol=1e-9)
    assert np.allclose(turn_6d(3 * rows), expected, atol=1e-9)  # any length, as its network gives


# ---- anything at all: a clip or one clear error. FUZZ=10000 for the long run
MANY = settings(
    max_examples=int(os.environ.get('FUZZ', 25)),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    derandomize='FUZZ' not in os.environ,
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-3, 10**20)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(['image/1', '../x', '/', '\0'])
)


def nested(stuff):
    return st.lists(stuff, max_size=4) | st.dictionaries(st.text(max_size=4), stuff, max_size=2)


STUFF = st.recursive(LEAVES, nested, max_leaves=6)


def places(x, at=()):
    "Where something may be put into nested lists and objects."
    yield at
    inner = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ()
    for key, value in inner:
        yield from places(value, (*at, key))


def put(x, at, value):
    "x with another value at a place."
    if not at:
        return value
    inner = x
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    return x


FORMAT = dict(i='imavatar', n='insta', f='flashavatar', g='gagavatar', v='vhap')


def ends_well(folder):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            clip = load_clip(folder, format=FORMAT.get(folder.name, 'vhap'))
            assert all(isinstance(frame, clips.Frame) for frame in clip)
        except InputError as e:
            assert '\n' not in str(e)


@pytest.fixture(scope='module')
def ready(tmp_path_factory):
    top = tmp_path_factory.mktemp('fuzz')
    for name, format in FORMAT.items():
        made(format, top / name, T=2)
    whole = json.loads((top / 'v/transforms.json').read_text())
    (top / 'u').mkdir()
    for part, k in (('train', 0), ('test', 1)):
        part_of = dict(whole, frames=[from_neighbour(whole['frames'][k], 'v', 0)])
        (top / f'u/transforms_{part}.json').write_text(json.dumps(part_of))
    return top


@pytest.mark.parametrize(
    'folder,file', [('i', TABLE), ('n', TRAIN), ('v', 'transforms.json'), ('u', TRAIN)]
)
@MANY
@given(data=st.data())
def test_any_json(ready, folder, file, data):
    path = ready / folder / file
    good = path.read_text()
    try:
        content = json.loads(good)
        for _ in range(data.draw(st.integers(1, 2))):
            at = data.draw(st.sampled_from([*places(content)]))
            content = put(content, at, data.draw(STUFF))
            if not isinstance(content, (dict, list)):
                break
        path.write_text(json.dumps(content))
        ends_well(ready / folder)
    finally:
        path.write_text(good)


@pytest.mark.parametrize(
    'folder,file',
    [
        ('i', TABLE),
        ('i', 'image/2.png'),
        ('n', 'flame/jaw/00001.txt'),
        ('f', 'checkpoint/00001.frame'),
        ('f', 'alpha/00002.png'),
        ('g', 'smoothed.pkl'),
        ('v', 'flame_param/00001.npz'),
    ],
)
@MANY
@given(data=st.data())
def test_any_bytes(ready, folder, file, data):
    path = ready / folder / file
    good = path.read_bytes()
    content = bytearray(good)
    try:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        end = data.draw(st.just(len(content)) | st.integers(0, len(content)))
        path.write_bytes(content[:end])
        ends_well(ready / folder)
    finally:
        path.write_bytes(good)
