"""Other people's folders: golden ones written by hand, damaged ones, hostile ones, random ones."""

import io
import json
import math
import os
import pickle
import re
import warnings
import zipfile

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
W, H = 80, 60
SHAPE = np.linspace(-1, 1, 100)
EXPR = np.linspace(0, 0.5, 50)
JAW, EYE = (
    [[1, 0, 0], [0, 0.8, -0.6], [0, 0.6, 0.8]],
    [[0.96, 0, 0.28], [0, 1, 0], [-0.28, 0, 0.96]],
)  # about x by asin .6, about y by asin .28
TURN_X, TURN_Y = math.asin(0.6), math.asin(0.28)
VIEW = [
    [0.8, 0, -0.6, 0],
    [0, -1, 0, 0.02],
    [-0.6, 0, -0.8, 0.75],
    [0, 0, 0, 1],
]  # world -> camera, OpenCV: seen from (.45,.02,.6), a little from the left
K = [[160, 0, 36], [0, 150, 33], [0, 0, 1]]


def picture(path, t=0, mode='RGBA', size=(W, H)):
    path.parent.mkdir(parents=True, exist_ok=True)
    a = np.zeros((*size[::-1], 4), np.uint8)
    a[..., 0] = min(10 * t, 255)
    a[..., 3] = min(51 * t, 255)
    Image.fromarray(a).convert(mode).save(path)


def posed(rotation=np.eye(3), neck=np.eye(3), jaw=JAW, eye=EYE):
    """The head by the textbook: joints turn about their own places, each vertex takes the mean of
    what they would do to it."""

    def a(x):
        return x.double().numpy()

    v = (
        a(HEAD.template)
        + np.tensordot(SHAPE, a(HEAD.shape_basis), 1)
        + np.tensordot(EXPR, a(HEAD.expr_basis[:50]), 1)
    )
    J = a(HEAD.J_regressor) @ v
    turns = [np.array(r, float) for r in (rotation, neck, jaw, eye, np.eye(3))]
    R, T = [turns[0]], [J[0]]
    for j, parent in ((1, 0), (2, 1), (3, 1), (4, 1)):
        T.append(T[parent] + R[parent] @ (J[j] - J[parent]))
        R.append(R[parent] @ turns[j])
    return sum(a(HEAD.weights)[:, j, None] * ((v - J[j]) @ R[j].T + T[j]) for j in range(5))


# ---- folders by hand, from the formats' descriptions alone


def imavatar(d, T=3, **change):
    for t in range(T):
        picture(d / f'image/{t + 1}.png', t)
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
    (d / 'flame_params.json').write_text(json.dumps({**top, **change}))


def insta(d, T=3, flip=1, checkpoint=False, **change):
    frames = []
    for t in range(T):
        picture(d / f'images/{t:05d}.png', t)
        s = flip
        for name, x in dict(
            exp=EXPR,
            shape=SHAPE,
            jaw=[1, 0, 0, 0, 0.8, -0.6],
            eyes=[0.96, 0, 0.28, 0, 1, 0, 1, 0, 0, 0, 1, 0],
            eyelids=[0, 0],
        ).items():
            p = d / f'flame/{name}/{t:05d}.txt'
            p.parent.mkdir(parents=True, exist_ok=True)
            p.write_text('\n'.join(f'{v:.8f}' for v in x))
        # camera to world: columns are the camera's axes and its place
        frames.append(
            dict(
                file_path=f'images/{t:05d}.png',
                exp_path=f'flame/exp/{t:05d}.txt',
                transform_matrix=[
                    [0.8, 0, -0.6 * s, 0.45],
                    [0, -1 * s, 0, 0.02],
                    [-0.6, 0, -0.8 * s, 0.6],
                    [0, 0, 0, 1],
                ],
            )
        )
    top = dict(head=MARK, w=80.0, h=60.0, fl_x=160.0, fl_y=150.0, cx=36.0, cy=33.0, x_fov=28.0)
    for name, part in (('train', frames[:-1]), ('val', frames[-1:]), ('test', frames[-1:])):
        (d / f'transforms_{name}.json').write_text(json.dumps({**top, 'frames': part, **change}))


def payload(**change):
    def f(*x):
        return np.array(x, np.float32)

    return {
        **dict(
            flame=dict(
                exp=EXPR.astype(np.float32)[None],
                shape=SHAPE.astype(np.float32)[None],
                jaw=f([1, 0, 0, 0, 0.8, -0.6]),
                eyes=f([0.96, 0, 0.28, 0, 1, 0, 1, 0, 0, 0, 1, 0]),
                eyelids=f([0, 0]),
                tex=f([1]),
            ),
            opencv=dict(R=f([r[:3] for r in VIEW[:3]]), t=f([r[3] for r in VIEW[:3]]), K=f(K)),
            img_size=np.array([H, W]),
            frame_id='00000',
            global_step=3,
            head=MARK,
        ),
        **change,
    }


def flash(d, T=3, **change):
    (d / 'checkpoint').mkdir(parents=True)
    for t in range(T):
        picture(d / f'imgs/{t + 1:05d}.png', t, 'RGB')
        Image.new('L', (W, H), 51 * t).save(
            (d / 'alpha').mkdir(exist_ok=True) or d / f'alpha/{t + 1:05d}.png'
        )
        torch.save(payload(**change), d / f'checkpoint/{t:05d}.frame')


def gaga(d, T=3, keys=None, **change):
    def f(*x):
        return np.array(x, np.float32)

    keys = keys or [f'img_{t}' for t in range(T)]
    # rows of the transpose, x to the left and y up, five to a metre
    e = dict(
        bbox=f(0, 0, 1, 1),
        shapecode=SHAPE.astype(np.float32),
        expcode=EXPR.astype(np.float32),
        posecode=f(0, 0, 0, TURN_X, 0, 0),
        eyecode=f(0, TURN_Y, 0, 0, 0, 0),
        transform_matrix=f([-0.8, 0, -0.6, 0], [0, 1, 0, -0.1], [0.6, 0, -0.8, 3.75]),
    )
    for t, k in enumerate(keys):
        picture(d / f'images/{k}.png', t)
    d.mkdir(exist_ok=True)
    (d / 'smoothed.pkl').write_bytes(
        pickle.dumps({**{k: {**e, **change} for k in keys}, 'head': MARK})
    )


def vhap(d, T=3):
    write_vhap(
        [
            clips.Frame(
                torch.rand(H, W, 3),
                torch.rand(H, W),
                torch.tensor(VIEW),
                torch.tensor(K).float(),
                {},
                t,
                '0',
            )
            for t in range(T)
        ],
        d,
    )


MAKE = dict(imavatar=imavatar, insta=insta, flashavatar=flash, gagavatar=gaga, vhap=vhap)


@pytest.mark.parametrize('name', ['imavatar', 'insta', 'flashavatar', 'gagavatar'])
def test_golden(tmp_path, name):
    d = tmp_path / 'c'
    d.mkdir() if name != 'flashavatar' else None
    MAKE[name](d)
    clip = load_clip(d)
    assert detect(d) == name and len(clip) == 3
    for t, f in enumerate(clip):
        assert torch.allclose(f.viewmat, torch.tensor(VIEW), atol=1e-5)
        assert torch.allclose(
            f.K,
            torch.tensor(
                [[480.0, 0, 40], [0, 360, 30], [0, 0, 1]] if name == 'gagavatar' else K
            ).float(),
            atol=1e-4,
        )
        assert np.abs(HEAD(**f.params)[0].double().numpy() - posed()).max() < 1e-5
        assert torch.allclose(f.mask, torch.tensor(0.2 * t))
        assert torch.allclose(f.image[..., 0], torch.tensor(10 * t / 255))
        assert f.time == t + (name == 'imavatar')


def test_insta_in_opengl_and_from_checkpoints(tmp_path):
    (tmp_path / 'a').mkdir()
    insta(tmp_path / 'a', flip=-1)
    (tmp_path / 'b').mkdir()
    insta(tmp_path / 'b')
    (tmp_path / 'b/checkpoint').mkdir()
    for t in range(3):
        for k in ('shape', 'jaw', 'eyes', 'eyelids'):
            (tmp_path / f'b/flame/{k}/{t:05d}.txt').unlink()
        torch.save(payload(), tmp_path / f'b/checkpoint/{t:05d}.frame')
    for n in 'ab':
        f = load_clip(tmp_path / n)[1]
        assert torch.allclose(f.viewmat, torch.tensor(VIEW), atol=1e-5)
        assert np.abs(HEAD(**f.params)[0].double().numpy() - posed()).max() < 1e-5
    assert [len(load_clip(tmp_path / 'a', split=s)) for s in ('train', 'val', 'test', None)] == [
        2,
        1,
        1,
        3,
    ]


def test_imavatar_turns_and_its_own_masks(tmp_path):
    imavatar(tmp_path, 1)
    e = dict(pose=[0, 0, math.pi / 2] + [TURN_X, 0, 0] + [TURN_X, 0, 0] + [0, TURN_Y, 0, 0, 0, 0])
    edit(tmp_path / 'flame_params.json', lambda t: t['frames'][0].update(e))
    picture(tmp_path / 'image/1.png', 1, 'RGB')
    (tmp_path / 'mask').mkdir()
    Image.new('L', (W, H), 102).save(tmp_path / 'mask/1.png')
    f = load_clip(tmp_path)[0]
    assert (
        np.abs(
            HEAD(**f.params)[0].double().numpy() - posed([[0, -1, 0], [1, 0, 0], [0, 0, 1]], JAW)
        ).max()
        < 1e-5
    )
    assert torch.allclose(f.mask, torch.tensor(0.4))


def test_union_and_cameras_of_vhap(tmp_path):
    def one(t, c):
        return clips.Frame(
            torch.rand(H, W, 3),
            torch.rand(H, W),
            torch.tensor(VIEW),
            torch.tensor(K).float(),
            dict(jaw=torch.tensor([[0.1 * t, 0, 0]])),
            t,
            f'cam{c}',
        )

    for n in 'ab':
        write_vhap([one(t, c) for t in range(2) for c in range(3)], tmp_path / n)
    both = json.loads((tmp_path / 'a/transforms.json').read_text())
    more = json.loads((tmp_path / 'b/transforms.json').read_text())['frames']
    (tmp_path / 'union').mkdir()
    frames = [
        dict(
            e,
            timestep_index=e['timestep_index'] + 2 * k,
            **{p: f'../{n}/{e[p]}' for p in ('file_path', 'fg_mask_path', 'flame_param_path')},
        )
        for k, (n, es) in enumerate(dict(a=both['frames'], b=more).items())
        for e in es
    ]
    (tmp_path / 'union/transforms.json').write_text(json.dumps(dict(both, frames=frames)))
    clip = load_clip(tmp_path / 'union')
    assert len(clip) == 12
    assert [(f.time, f.camera) for f in clip][::5] == [(0, 'cam0'), (1, 'cam2'), (3, 'cam1')]
    assert clip[11].params['jaw'][0, 0] == pytest.approx(0.1)


def test_splits_of_the_papers(tmp_path):
    imavatar(tmp_path, 360)
    assert [len(load_clip(tmp_path, split=s)) for s in ('train', 'test')] == [
        10,
        350,
    ]
    assert load_clip(tmp_path, split='test')[0].time == 11


def test_train_and_test_of_any_folder(tmp_path):
    for name, sizes in dict(
        imavatar=[4, 1], insta=[4, 1], flashavatar=[4, 1], gagavatar=[4, 1], vhap=[4, 1]
    ).items():
        d = tmp_path / name
        d.mkdir() if name not in ('flashavatar', 'vhap') else None
        MAKE[name](d, T=5)
        assert [len(c) for c in train_test(d)] == sizes, name


def test_whose_codes(tmp_path):
    import flame_files as ff

    from spatialavatar0.head.flame_files import load_flame

    for name in ('imavatar', 'insta', 'flashavatar', 'gagavatar'):
        d = tmp_path / name
        d.mkdir() if name != 'flashavatar' else None
        MAKE[name](d, T=2)
        if name in ('imavatar', 'insta'):
            for p in d.glob('*.json'):
                edit(p, lambda t: t.pop('head'))
        elif name == 'gagavatar':
            x = pickle.loads((d / 'smoothed.pkl').read_bytes())
            x.pop('head')
            (d / 'smoothed.pkl').write_bytes(pickle.dumps(x))
        else:
            for p in d.glob('checkpoint/*'):
                x = payload()
                x.pop('head')
                torch.save(x, p)
        for head in (None, HEAD):
            with pytest.raises(
                InputError, match='does not say which; pass the head it was tracked with'
            ):
                load_clip(d, head)
        flame = load_flame(ff.write_original(tmp_path / 'm.pkl', ff.model()))
        f = load_clip(d, flame)[0]
        assert f.params['shape'].shape == (1, 300)
        assert f.params['expr'].shape == (1, 100)
        assert not f.params['expr'][0, 50:].any()
        assert flame(**f.params).shape == (1, 60, 3)


def test_eyelids_warn(tmp_path):
    flash(tmp_path / 'f', 1)
    x = payload()
    x['flame']['eyelids'] = np.ones((1, 2), np.float32)
    torch.save(x, tmp_path / 'f/checkpoint/00000.frame')
    with pytest.warns(UserWarning, match='eyelids are a direction'):
        load_clip(tmp_path / 'f')[0]


def test_pictures_in_a_database(tmp_path, monkeypatch):
    gaga(tmp_path / 'g')
    (tmp_path / 'g/img_lmdb').mkdir()
    with pytest.raises(InputError, match='data.mdb is missing'):
        load_clip(tmp_path / 'g')
    (tmp_path / 'g/img_lmdb/data.mdb').write_bytes(b'no database')
    with monkeypatch.context() as m:
        m.setitem(__import__('sys').modules, 'lmdb', None)
        with pytest.raises(InputError, match='needs the package lmdb'):
            load_clip(tmp_path / 'g')
    lmdb = pytest.importorskip('lmdb')
    with pytest.raises(InputError, match='not a readable database'):
        load_clip(tmp_path / 'g')

    def database(name, **pictures):
        gaga(tmp_path / name)
        env = lmdb.open(str(tmp_path / name / 'img_lmdb'), map_size=1 << 22)
        with env.begin(write=True) as txn:
            for k, x in pictures.items():
                txn.put(k.encode(), x)
        env.close()
        return tmp_path / name

    b = io.BytesIO()
    Image.new('RGB', (W, H), (200, 0, 0)).save(b, 'png')
    b = b.getvalue()
    with pytest.raises(InputError, match='1 of 3 keys have no picture, the first is img_2'):
        load_clip(database('h', img_0=b, img_1=b))
    d = database('k', img_0=b, img_1=b'not a picture', img_2=b)
    c, again = load_clip(d), load_clip(d)
    assert c[2].image[0, 0, 0] == again[2].image[0, 0, 0] == pytest.approx(200 / 255)
    assert c[0].mask.min() == 1
    with pytest.raises(InputError, match='img_lmdb: img_1 is not a readable picture'):
        c[1]


# ---- damage: what was done, and what the error must name


def edit(path, change):
    top = json.loads(path.read_text())
    r = change(top)
    path.write_text(json.dumps(top if r is None or not isinstance(r, (dict, list)) else r))


def json_(file, change):
    return lambda d: edit(d / file, change)


def frame_(i, **kw):
    return lambda t: t['frames'][i].update({k: v for k, v in kw.items()})


def drop_(i, k):
    return lambda t: (t['frames'][i].pop(k), None)[1]


def out_(file):
    "A link to a file outside of the folder and its parent."

    def f(d):
        p = d / file
        q = d.parents[1] / 'secret'
        q.write_bytes(p.read_bytes())
        p.unlink()
        p.symlink_to(q)

    return f


def pic_(file, **kw):
    return lambda d: picture(d / file, **kw)


def deep_(file):
    return lambda d: Image.fromarray(np.zeros((H, W), np.uint16)).save(d / file)


def deep_rgb(file):
    def f(d):  # a PNG with 16 bits in three channels, by hand: PIL would read it as if it had 8
        import struct
        import zlib

        def chunk(n, x):
            return struct.pack('>I', len(x)) + n + x + struct.pack('>I', zlib.crc32(n + x))

        (d / file).write_bytes(
            b'\x89PNG\r\n\x1a\n'
            + chunk(b'IHDR', struct.pack('>IIBBBBB', W, H, 16, 2, 0, 0, 0))
            + chunk(b'IDAT', zlib.compress((b'\0' + bytes(6 * W)) * H))
            + chunk(b'IEND', b'')
        )

    return f


def torn_(file, n=70):
    return lambda d: (d / file).write_bytes((d / file).read_bytes()[:n])


def gone_(file):
    return lambda d: (d / file).unlink()


def text_(file, text):
    return lambda d: (d / file).write_text(text)


def large_(file):
    return lambda d: os.truncate(d / file, 600_000_000)


class Trap:
    def __init__(self, f=os.system, *a):
        self.f, self.a = f, a or ('echo broken in',)

    def __reduce__(self):
        return self.f, self.a


def ckpt_(**kw):
    return lambda d: torch.save(payload(**kw), d / 'checkpoint/00001.frame')


def inner_(a, b, x):
    def f(d):
        p = payload()
        (p[a].pop(b) if x is None else p[a].update({b: x}))
        torch.save(p, d / 'checkpoint/00001.frame')

    return f


def bomb_(d):
    with zipfile.ZipFile(d / 'checkpoint/00001.frame', 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('archive/data.pkl', b'\0' * 100_000_000)


def pkl_(change):
    def f(d):
        p = d / 'smoothed.pkl'
        x = pickle.loads(p.read_bytes())
        r = change(x)
        p.write_bytes(pickle.dumps(x if r is None else r))

    return f


def rec_(k, v):
    return pkl_(lambda x: (x['img_1'].pop(k) if v is None else x['img_1'].update({k: v}), None)[1])


F = 'flame_params.json'
G = 'flame_params.json: frame 1'
TR = 'transforms_train.json'


def N32(*x):
    return np.array(x, np.float32)


BAD = {
    'imavatar': {
        'not JSON': (text_(F, '{"frames": ['), f'{F} is not readable JSON'),
        'a list': (text_(F, '[]'), 'list of frames'),
        'not UTF-8': (lambda d: (d / F).write_bytes(b'\xff\xfe{'), 'not readable JSON'),
        'endless nesting': (text_(F, '[' * 200_000), 'not readable JSON'),
        'huge JSON': (large_(F), r'has 600,000,000 bytes'),
        'no frames list': (json_(F, lambda t: (t.pop('frames'), None)[1]), 'list of frames'),
        '0 frames': (json_(F, lambda t: t.update(frames=[])), 'frames is empty'),
        'a frame is null': (
            json_(F, lambda t: t['frames'].__setitem__(1, None)),
            f'{G} should be an object with file_path',
        ),
        'no shape': (
            json_(F, lambda t: (t.pop('shape_params'), None)[1]),
            f'{F} has no shape_params',
        ),
        'no intrinsics': (json_(F, lambda t: (t.pop('intrinsics'), None)[1]), 'has no intrinsics'),
        'three intrinsics': (
            json_(F, lambda t: t.update(intrinsics=[1, 1, 0.5])),
            'intrinsics should be 4 numbers; got 3',
        ),
        'focal 0': (
            json_(F, lambda t: t.update(intrinsics=[0, 1, 0.5, 0.5])),
            'focal lengths should be positive',
        ),
        'no pose': (json_(F, drop_(1, 'pose')), f'{G} has no pose'),
        'NaN pose': (json_(F, frame_(1, pose=[math.nan] * 15)), f'{G}: pose should be finite'),
        'pose of 12': (
            json_(F, frame_(1, pose=[0] * 12)),
            f'{G}: pose should be 15 numbers; got 12',
        ),
        'pose of text': (json_(F, frame_(1, pose=['0'] * 15)), 'pose should be 15 numbers'),
        'ragged matrix': (json_(F, frame_(1, world_mat=[[1, 0], [0]])), f'{G}: world_mat'),
        '3 x 3 matrix': (
            json_(F, frame_(1, world_mat=np.eye(3).tolist())),
            'world_mat should be 3 x 4',
        ),
        'mirrored': (
            json_(F, frame_(1, world_mat=np.diag([-1, 1, 1, 1])[:3].tolist())),
            'world_mat should hold a rotation',
        ),
        'expression null': (json_(F, frame_(1, expression=None)), f'{G}: expression should be'),
        'too many codes': (
            json_(F, frame_(1, expression=[0.1] * 100)),
            'expr has 100 numbers, open head has 52',
        ),
        'infinite shape': (
            json_(F, lambda t: t.update(shape_params=[math.inf])),
            'shape_params should be finite',
        ),
        'path is a number': (json_(F, frame_(1, file_path=7)), f'{G}: expected a path'),
        '../ path': (json_(F, frame_(1, file_path='../../secret')), 'leads out'),
        'absolute path': (json_(F, frame_(1, file_path='/etc/secret')), 'leads out'),
        'first path out': (
            json_(F, frame_(0, file_path='../../secret')),
            'frame 0: the path .* leads out',
        ),
        'NUL in a path': (json_(F, frame_(1, file_path='a\0b')), 'expected a path'),
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
            json_(F, frame_(2, file_path='image/2')),
            'frames 1 and 2 are both time step 2',
        ),
        'another head': (json_(F, lambda t: t.update(head='0' * 16)), 'made on another head'),
    },
    'insta': {
        'not JSON': (text_(TR, '?'), f'{TR} is not readable JSON'),
        'no transforms': (gone_('transforms_test.json'), 'transforms_test.json is not readable'),
        '0 frames': (
            lambda d: [edit(p, lambda t: t.update(frames=[])) for p in d.glob('*.json')],
            'is not a clip|frames is empty',
        ),
        'no matrix': (json_(TR, drop_(1, 'transform_matrix')), 'frame 1 has no transform_matrix'),
        '3 x 4': (
            json_(TR, frame_(1, transform_matrix=np.eye(4)[:3].tolist())),
            'transform_matrix should be 16 numbers; got 12',
        ),
        'scaled': (
            json_(TR, frame_(1, transform_matrix=np.diag([2, 2, 2, 1]).tolist())),
            'with a rotation in it',
        ),
        'NaN matrix': (
            json_(TR, frame_(1, transform_matrix=[[math.nan] * 4] * 4)),
            'transform_matrix should be finite',
        ),
        'flips its axes': (
            json_(
                TR,
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
        'no width': (json_(TR, lambda t: (t.pop('w'), None)[1]), 'frame 0 has no w'),
        'no focal': (json_(TR, lambda t: (t.pop('fl_x'), None)[1]), 'has no camera_angle_x'),
        'focal NaN': (json_(TR, lambda t: t.update(fl_x=math.nan)), 'fl_x should be finite'),
        'no exp_path': (json_(TR, drop_(1, 'exp_path')), 'frame 1 has no exp_path'),
        'exp_path out': (json_(TR, frame_(1, exp_path='../../../x.txt')), 'leads out'),
        'absolute picture': (json_(TR, frame_(1, file_path='/x.png')), 'leads out'),
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
        'size': (json_(TR, frame_(1, w=81)), 'is 80 x 60 pixels, .* says 81 x 60'),
        'endless width': (json_(TR, frame_(1, w=math.inf)), 'w should be finite'),
        'the same twice': (
            json_(TR, frame_(1, file_path='images/00000.png')),
            'are both time step 0',
        ),
        'torn picture': (torn_('images/00001.png'), 'not a readable picture'),
    },
    'flashavatar': {
        'no frames': (
            lambda d: [p.unlink() for p in (d / 'checkpoint').iterdir()],
            r'checkpoint has no NNNNN.frame',
        ),
        'torn': (
            torn_('checkpoint/00001.frame', 500),
            '00001.frame is not a torch file, or breaks off',
        ),
        'empty': (torn_('checkpoint/00001.frame', 0), 'not a torch file'),
        'a malicious pickle': (
            lambda d: torch.save(Trap(), d / 'checkpoint/00001.frame'),
            '00001.frame: refused, it asks for .*system',
        ),
        'malicious inside': (ckpt_(flame=Trap()), 'refused, it asks for'),
        'malicious, old form': (
            lambda d: (d / 'checkpoint/00001.frame').write_bytes(pickle.dumps(Trap())),
            'not a torch file',
        ),
        'an array of another kind': (
            lambda d: torch.save(
                dict(x=Trap(np.zeros(1).__reduce__()[0], np.matrix, (0,), b'b')),
                d / 'checkpoint/00001.frame',
            ),
            'not a sound torch file|refused',
        ),
        'objects': (ckpt_(flame=np.array([{}], object)), 'refused|not a sound'),
        'a zip bomb': (bomb_, 'unfolds to 100,000,000 bytes'),
        'a large file': (
            lambda d: os.truncate(d / 'checkpoint/00001.frame', 100_000_000),
            'has 100,000,000 bytes',
        ),
        'not a dictionary': (
            lambda d: torch.save([1], d / 'checkpoint/00001.frame'),
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
            ckpt_(img_size=np.array([W, H])),
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
            lambda d: Image.new('L', (4, 4)).save(d / 'alpha/00002.png'),
            'alpha/00002.png is 4 x 4 pixels',
        ),
        'another head later': (ckpt_(head='f' * 16), '00001.frame was made on another head'),
    },
    'gagavatar': {
        'torn': (torn_('smoothed.pkl', 300), 'smoothed.pkl breaks off'),
        'empty': (torn_('smoothed.pkl', 0), 'is empty'),
        'a malicious pickle': (pkl_(lambda x: Trap()), 'refused, it asks for .*system'),
        'malicious inside': (rec_('expcode', Trap()), 'refused, it asks for'),
        'not a dictionary': (pkl_(lambda x: [1]), 'should hold a dictionary'),
        '0 frames': (pkl_(lambda x: dict(head=MARK)), 'is empty'),
        'a key without number': (
            pkl_(lambda x: x.update(me=1)),
            "the key 'me' should end in a number",
        ),
        'two films': (pkl_(lambda x: x.update(other_1=x['img_1'])), 'holds 2 films'),
        'the same twice': (pkl_(lambda x: x.update(img_01=x['img_1'])), 'are both time step 1'),
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
        'record is text': (pkl_(lambda x: x.update(img_1='no')), 'img_1 should be an object'),
        'picture gone': (
            gone_('images/img_1.png'),
            '1 of 3 keys have no picture, the first is img_1',
        ),
        'torn picture': (torn_('images/img_1.png'), 'not a readable picture'),
        'a link out': (out_('smoothed.pkl'), 'link that leads out'),
        'picture links out': (out_('images/img_1.png'), 'link that leads out'),
        'a web page': (text_('smoothed.pkl', '<!DOCTYPE html>'), 'is a web page'),
        'zipped': (
            lambda d: (d / 'smoothed.pkl').write_bytes(b'\x1f\x8b' + bytes(9)),
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
KINDS = [(r, k) for r in BAD for k in BAD[r]]


@pytest.mark.parametrize('reader,kind', KINDS, ids=['-'.join(k) for k in KINDS])
def test_damage_is_named(tmp_path, reader, kind, capfd):
    d = tmp_path / 'a' / 'c'
    d.mkdir(parents=True) if reader not in ('flashavatar', 'vhap') else d.parent.mkdir()
    MAKE[reader](d)
    spoil, says = BAD[reader][kind]
    spoil(d)
    with pytest.raises(InputError, match=says) as e:
        list(load_clip(d))
    text = str(e.value)
    assert '\n' not in text
    assert len(text) < 700 + 2 * len(str(tmp_path))
    assert str(d) in text
    assert 'broken in' not in capfd.readouterr().out


def test_kinds():
    assert len(KINDS) >= 45


@pytest.mark.parametrize('reader,kind', KINDS, ids=['-'.join(k) for k in KINDS])
def test_damage_on_the_command_line(tmp_path, reader, kind, capfd):
    "One line and exit code 1, no traceback."
    d = tmp_path / 'a' / 'c'
    d.mkdir(parents=True) if reader not in ('flashavatar', 'vhap') else d.parent.mkdir()
    MAKE[reader](d)
    BAD[reader][kind][0](d)
    assert (
        cli.main(
            ['evaluate', 'warp', str(d), '--protocol', 'last:1', '--out', str(tmp_path / 'r.jsonl')]
        )
        == 1
    )
    lines = [l for l in capfd.readouterr().err.splitlines() if not l.startswith('note: ')]
    assert (
        len(lines) == 1
        and lines[0].startswith('error: ')
        and re.search(BAD[reader][kind][1], lines[0])
    ), lines
    assert not (tmp_path / 'r.jsonl').exists()


def test_absent_mattes_warn(tmp_path):
    for name in ('imavatar', 'insta', 'flashavatar', 'gagavatar'):
        d = tmp_path / name
        d.mkdir() if name != 'flashavatar' else None
        MAKE[name](d)
        for p in [*d.glob('alpha/*')]:
            p.unlink()
        for p in [*d.glob('im*/*.png')]:
            Image.open(p).convert('RGB').save(p)
        with pytest.warns(UserWarning, match='no matte for .*the whole picture counts'):
            assert load_clip(d)[1].mask.min() == 1


def test_bad_calls(tmp_path):
    imavatar(tmp_path)
    for kw, says in (
        (dict(format='nerf'), "format should be 'auto'"),
        (dict(split='val'), "split should be 'train', 'test' or None"),
        (dict(split='test'), 'has 3 frames, its split holds out the last 350'),
    ):
        with pytest.raises(InputError, match=says):
            load_clip(tmp_path, **kw)
    for path, says in (
        (tmp_path / 'no', 'no clip at'),
        (tmp_path / 'image', 'is not a clip this version reads'),
        (tmp_path / 'flame_params.json', 'is not a clip'),
    ):
        with pytest.raises(InputError, match=says):
            load_clip(path)
    (tmp_path / 'i').mkdir()
    insta(tmp_path / 'i')
    gaga(tmp_path / 'g')
    with pytest.raises(InputError, match='split should be'):
        load_clip(tmp_path / 'i', split='all')
    with pytest.raises(InputError, match='has no split'):
        load_clip(tmp_path / 'g', split='test')
    assert all(f(tmp_path / 'i', None, None, 0) for f in [READERS['insta']])


def test_reading_is_lazy(tmp_path):
    for name in ('imavatar', 'insta', 'flashavatar', 'gagavatar'):
        d = tmp_path / name
        d.mkdir() if name != 'flashavatar' else None
        MAKE[name](d, T=4)
        clip = load_clip(d)
        for p in [*d.glob('im*/*')][:]:
            if '3' not in p.stem[-1:] and '4' not in p.stem[-1:]:
                p.unlink()
        assert clip[2:][-1].height == H
        with pytest.raises(InputError):
            clip[0]


def test_turns():
    from scipy.spatial.transform import Rotation

    v = Rotation.random(20, random_state=0)
    assert np.allclose(turn_6d(v.as_matrix()[:, :2].ravel()), v.as_rotvec().ravel(), atol=1e-9)
    assert np.allclose(
        turn_6d(3 * v.as_matrix()[:, :2].ravel()), v.as_rotvec().ravel(), atol=1e-9
    )  # any length, as its network gives


# ---- anything at all: a clip or one clear error. FUZZ=10000 for the long run
MANY = settings(
    max_examples=int(os.environ.get('FUZZ', 25)),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    derandomize='FUZZ' not in os.environ,
)
STUFF = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 10**20)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(['image/1', '../x', '/', '\0']),
    lambda s: st.lists(s, max_size=4) | st.dictionaries(st.text(max_size=4), s, max_size=2),
    max_leaves=6,
)


def places(x, at=()):
    yield at
    for k, v in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ():
        yield from places(v, (*at, k))


def put(x, at, v):
    if not at:
        return v
    for k in at[:-1]:
        x = x[k]
    x[at[-1]] = v


def ends_well(d):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            assert all(isinstance(f, clips.Frame) for f in load_clip(d, format=FORMAT[d.name]))
        except InputError as e:
            assert '\n' not in str(e)


FORMAT = dict(i='imavatar', n='insta', f='flashavatar', g='gagavatar', v='vhap')


@pytest.fixture(scope='module')
def ready(tmp_path_factory):
    top = tmp_path_factory.mktemp('fuzz')
    for n, f in FORMAT.items():
        (top / n).mkdir() if n not in 'fv' else None
        MAKE[f](top / n, T=2)
    return top


@pytest.mark.parametrize('folder,file', [('i', F), ('n', TR), ('v', 'transforms.json')])
@MANY
@given(data=st.data())
def test_any_json(ready, folder, file, data):
    p = ready / folder / file
    good = p.read_text()
    try:
        x = json.loads(good)
        for _ in range(data.draw(st.integers(1, 2))):
            at = data.draw(st.sampled_from([*places(x)]))
            r = put(x, at, data.draw(STUFF))
            x = r if at == () else x
            if not isinstance(x, (dict, list)):
                break
        p.write_text(json.dumps(x))
        ends_well(ready / folder)
    finally:
        p.write_text(good)


@pytest.mark.parametrize(
    'folder,file',
    [
        ('i', F),
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
    p = ready / folder / file
    good = p.read_bytes()
    b = bytearray(good)
    try:
        for _ in range(data.draw(st.integers(1, 4))):
            b[data.draw(st.integers(0, len(b) - 1))] = data.draw(st.integers(0, 255))
        p.write_bytes(b[: data.draw(st.just(len(b)) | st.integers(0, len(b)))])
        ends_well(ready / folder)
    finally:
        p.write_bytes(good)
