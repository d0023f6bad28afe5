"""Folders of clips in five formats, bent: their JSON, codes, pictures, links, and what vanishes."""

import math
import os
import pickle
from functools import partial

import numpy as np
import test_formats as tf
import torch

from spatialavatar0.pictures.formats import load_clip

from .make import (
    ESCAPES,
    INSTEAD,
    JSON,
    edited,
    instead,
    picture,
    png,
    touch,
    written,
    zeros_zip,
)
from .room import HARMLESS, SOUND, Case

FORMATS = {  # name -> its JSON file, a picture, a list of frames there
    'vhap': ('transforms.json', 'images/00001_00.png'),
    'imavatar': ('flame_params.json', 'image/2.png'),
    'insta': ('transforms_train.json', 'images/00001.png'),
    'flashavatar': (None, 'imgs/00002.png'),
    'gagavatar': (None, 'images/img_1.png'),
}
CODES = {
    'vhap': 'flame_param/00001.npz',
    'insta': 'flame/exp/00001.txt',
    'flashavatar': 'checkpoint/00001.frame',
    'gagavatar': 'smoothed.pkl',
}


def read(folder):
    "All frames of a folder."
    return [frame.image.shape for frame in load_clip(folder)]


def folder_of(name, change):
    "A maker of a folder in this format, with something changed."

    def make(folder):
        there = folder / 'data' / 'clip'
        tf.made(name, there)
        change(there)
        return there

    return make


def passing(name):
    "A maker of a sound folder whose files may vanish."

    def make(folder):
        there = folder.parent / 'out' / 'clip'
        return tf.made(name, there)

    return make


def unchanged(_):
    pass


def top(name, **changes):
    "Values at the top of a format's JSON."
    return folder_of(name, lambda there: edited(there / FORMATS[name][0], lambda t: t | changes))


def frame(name, **changes):
    "Values of the second frame; ... takes one away."

    def change(content):
        entry = content['frames'][1] | changes
        content['frames'][1] = {k: v for k, v in entry.items() if v is not ...}
        return content

    return folder_of(name, lambda there: edited(there / FORMATS[name][0], change))


def replaced(name, file, data):
    "A folder with another file in the place of one of its own."

    def change(there):
        path = there / file
        path.unlink()
        data(path) if callable(data) else written(path, data)

    return folder_of(name, change)


def sparse_json(path):
    INSTEAD['10 GB of nothing'][1](path)


LEADS = {
    'leads up': '../../../../etc/passwd',
    'is absolute': '/etc/passwd',
    'is a device': '/dev/zero',
    'leads up with backslashes': '..\\..\\..\\..\\etc\\passwd',
    'has NUL': 'images/a\0.png',
    'is full of escapes': f'images/{ESCAPES}.png',
    'has 10,000 letters': 'x' * 10_000,
    'is a list': ['images/1.png'],
    'is a number': 7,
    'is null': None,
    'is a link on the net': 'http://127.0.0.1:1/x.png',
    'is a lone surrogate': 'images/\ud800.png',
    'is empty': '',
}
SIZES = {
    'of 0 pixels': 0,
    'of -80 pixels': -80,
    'of 10^9 pixels': 10**9,
    'of 10^400 pixels': 10**400,
    'of 1e308 pixels': 1e308,
    'of NaN pixels': math.nan,
    'of text': '80',
    'of true': True,
    'of a list': [80],
}
NUMBERS = {
    '0': 0,
    '-1': -1.0,
    'NaN': math.nan,
    'infinity': math.inf,
    '10^400': 10**400,
    'text': '1',
    'true': True,
}
EYE = np.eye(4).tolist()
MATRICES = {
    'of zeros': np.zeros((4, 4)).tolist(),
    'of 1e200': (np.eye(4) * 1e200).tolist(),
    'of NaN': [[math.nan] * 4] * 4,
    'of 10^400': [[10**400, 0, 0, 0]] + EYE[1:],
    'of text': [['1'] * 4] * 4,
    'of truths': [[True] * 4] * 4,
    'ragged': [[1, 2], [3]],
    'a dict': dict(a=1),
    'a hundred dimensions deep': eval('[' * 90 + '1' + ']' * 90),
}
TIMES = {'10^400': 10**400, 'true': True, 'text': ESCAPES, 'a list': [1], '1.5': 1.5}


def json_cases(name):
    file, image = FORMATS[name]
    found = [
        Case(name, t, f'{file} {w}', replaced(name, file, text), read)
        for w, (t, text) in JSON.items()
    ]
    found += [
        Case(name, t, f'{file} is {w}', replaced(name, file, make), read)
        for w, (t, make) in INSTEAD.items()
    ]
    size = partial(frame, name) if name == 'vhap' else partial(top, name)
    for words, path in LEADS.items():
        found.append(
            Case(name, 'path', f'a picture that {words}', frame(name, file_path=path), read)
        )
    if name != 'imavatar':
        for words, value in SIZES.items():
            if name == 'insta' and words == 'of a list':
                continue  # a list of one number is that number there
            threat = 'number' if 'pixels' in words else 'kind'
            found.append(Case(name, threat, f'a width {words}', size(w=value), read))
        for words, value in NUMBERS.items():
            found.append(Case(name, 'number', f'a focal length of {words}', size(fl_x=value), read))
    matrix = 'world_mat' if name == 'imavatar' else 'transform_matrix'
    for words, value in MATRICES.items():
        found.append(
            Case(name, 'number', f'a camera {words}', frame(name, **{matrix: value}), read)
        )
    found += [
        Case(name, 'kind', 'frames that are text', top(name, frames='all'), read),
        Case(name, 'kind', 'frames that are numbers', top(name, frames=[1, 2]), read),
        Case(name, 'kind', 'a head that is a list', top(name, head=[1]), read),
        Case(
            name, 'text', 'a head full of escapes', top(name, head=ESCAPES, head_name=ESCAPES), read
        ),
        Case(name, 'text', 'keys full of escapes', frame(name, **{matrix: ..., ESCAPES: 1}), read),
    ]
    return found


def vhap_cases():
    found = [
        Case('vhap', 'number', f'a time of {w}', frame('vhap', timestep_index=v), read)
        for w, v in TIMES.items()
    ]
    found += [
        Case('vhap', 'path', f'parameters: the path {w}', frame('vhap', flame_param_path=v), read)
        for w, v in LEADS.items()
        if v is not None and v != ''
    ]
    return found + [
        Case(
            'vhap',
            'kind',
            'a camera named by a list',
            frame('vhap', camera_id=[1], camera_index=[1]),
            read,
            HARMLESS,
        ),
        Case('vhap', 'text', 'two frames of one camera of escapes', two_of_escapes, read),
        Case(
            'vhap',
            'bomb',
            'parameters that unfold to 10 GB',
            replaced('vhap', 'flame_param/00001.npz', lambda p: written(p, zeros_zip('expr.npy'))),
            read,
        ),
        Case(
            'vhap', 'code', 'parameters that are a pickle', order_in('flame_param/00001.npz'), read
        ),
    ]


def two_of_escapes(folder):
    there = folder_of('vhap', unchanged)(folder)

    def same(content):
        for entry in content['frames']:
            entry.update(timestep_index=1, camera_id=ESCAPES, camera_index=0)

    edited(there / 'transforms.json', same)
    return there


def order_in(file):
    "A VHAP folder with a pickle under some name."

    def make(folder):
        data = pickle.dumps(touch(folder))
        return replaced('vhap', file, data)(folder)

    return make


PICTURES = {
    'a picture of 10^5 x 10^5': ('bomb', png(10**5, 10**5)),
    'a picture of 2^31 x 1': ('bomb', png(2**31 - 1, 1)),
    'a picture of no pixels': ('number', png(0, 0)),
    'a picture of 16 bits': ('kind', png(80, 60, depth=16)),
    'a picture of another size': ('kind', picture(size=(81, 60), mode='RGBA')),
    'a picture cut short': ('cut', picture(size=(80, 60), mode='RGBA')[:70]),
    'a picture that is PostScript': (
        'code',
        b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 80 60\n%%EndComments\n(/etc/passwd) run\n',
    ),
}


def picture_cases(name):
    image = FORMATS[name][1]
    found = [
        Case(name, t, w, replaced(name, image, data), read)
        for w, (t, data) in PICTURES.items()
        if not (name == 'gagavatar' and 'another size' in w)
    ]
    found += [
        Case(name, t, f'a picture is {w}', replaced(name, image, make), read)
        for w, (t, make) in INSTEAD.items()
    ]
    return found


def code_cases(name):
    return [
        Case(name, t, f'codes: {w}', replaced(name, CODES[name], make), read)
        for w, (t, make) in INSTEAD.items()
    ]


# ---- pickles and torch files of the trackers


def tracked(**changes):
    "GAGAvatar's pickle with entries changed."

    def change(there):
        path = there / 'smoothed.pkl'
        content = pickle.loads(path.read_bytes())
        content['img_1'] = content['img_1'] | changes
        path.write_bytes(pickle.dumps(content))

    return folder_of('gagavatar', change)


def keyed(key):
    "GAGAvatar's pickle with another key."

    def change(there):
        path = there / 'smoothed.pkl'
        content = pickle.loads(path.read_bytes())
        content[key] = content.pop('img_1')
        path.write_bytes(pickle.dumps(content))

    return folder_of('gagavatar', change)


def saved(**changes):
    "FlashAvatar's checkpoint with values changed."
    return folder_of(
        'flashavatar',
        lambda there: torch.save(tf.payload(**changes), there / 'checkpoint/00001.frame'),
    )


def ordered_frame(folder):
    order = touch(folder)

    def change(there):
        torch.save(tf.payload(flame=order), there / 'checkpoint/00001.frame')

    return folder_of('flashavatar', change)(folder)


CV = tf.payload()['opencv']
FLAME = tf.payload()['flame']
TRACKERS = [
    *(
        Case('gagavatar', 'text' if isinstance(k, str) else 'kind', f'a key: {w}', keyed(k), read)
        for w, k in {
            'leads up': '../../../etc/passwd_1',
            'escapes': f'{ESCAPES}_1',
            'a number': 7,
            'None': None,
            'a tuple': ('a', 1),
            'a million letters': 'x' * 10**6 + '_1',
            'NUL': 'a\0_1',
        }.items()
    ),
    Case(
        'gagavatar',
        'number',
        'a camera of NaN',
        tracked(transform_matrix=np.full(12, np.nan)),
        read,
    ),
    Case('gagavatar', 'number', 'a camera of zeros', tracked(transform_matrix=np.zeros(12)), read),
    Case('gagavatar', 'kind', 'codes of text', tracked(shapecode='abc'), read),
    Case(
        'gagavatar', 'number', 'codes of 1e38 and more', tracked(expcode=np.full(50, 1e308)), read
    ),
    Case(
        'gagavatar', 'bomb', 'a million codes', tracked(shapecode=np.ones(10**6, np.float32)), read
    ),
    Case('flashavatar', 'code', 'a checkpoint that runs a command', ordered_frame, read),
    Case('flashavatar', 'number', 'a size of 10^12', saved(img_size=np.array([10**12, 1])), read),
    Case('flashavatar', 'number', 'a size of NaN', saved(img_size=np.array([np.nan, 1])), read),
    Case('flashavatar', 'kind', 'a size of text', saved(img_size=ESCAPES), read),
    Case(
        'flashavatar',
        'number',
        'a camera of NaN',
        saved(opencv=CV | dict(R=np.full((1, 3, 3), np.nan, np.float32))),
        read,
    ),
    Case('flashavatar', 'kind', 'a camera that is a list', saved(opencv=[1]), read),
    Case(
        'flashavatar',
        'number',
        'a focal length of -1',
        saved(opencv=CV | dict(K=-np.eye(3, dtype=np.float32))),
        read,
    ),
    Case(
        'flashavatar',
        'number',
        'codes of infinity',
        saved(flame=FLAME | dict(exp=np.full(50, np.inf, np.float32))),
        read,
    ),
    Case(
        'flashavatar',
        'number',
        'a jaw of zeros',
        saved(flame=FLAME | dict(jaw=np.zeros(6, np.float32))),
        read,
    ),
    Case('flashavatar', 'kind', 'flame that is text', saved(flame=ESCAPES), read),
    Case('flashavatar', 'text', 'a head full of escapes', saved(head=ESCAPES), read),
]

# ---- databases, links, and what vanishes


def database(data, lock=b''):
    "A GAGAvatar folder with a database of its pictures that is none."

    def change(there):
        data(there / 'img_lmdb')

    return folder_of('gagavatar', change)


def bad_lmdb(content):
    return lambda at: written(at / 'data.mdb', content)


def lmdb_is(make):
    def data(at):
        at.mkdir()
        make(at / 'data.mdb')

    return data


def bent_lmdb(at):
    "A sound database with its pages overwritten."
    at.mkdir()
    tf.database(at.parent, img_0=tf.red_png(), img_1=tf.red_png(), img_2=tf.red_png())
    path = at / 'data.mdb'
    data = bytearray(path.read_bytes())
    data[8192:] = b'\xff' * (len(data) - 8192)
    path.write_bytes(bytes(data))


DATABASES = [
    Case('lmdb', 'kind', 'noise', database(bad_lmdb(bytes(range(256)) * 64)), read),
    Case('lmdb', 'cut', 'empty', database(bad_lmdb(b'')), read),
    Case('lmdb', 'kind', 'is a file', database(lambda at: written(at, b'x')), read, HARMLESS),
    *(
        Case('lmdb', t, f'is {w}', database(lmdb_is(make)), read)
        for w, (t, make) in INSTEAD.items()
        if w not in ('an empty file', 'noise')
    ),
]


def out_link(name, file):
    "A file of a folder, replaced by a link that leads out of it."

    def change(there):
        secret = written(there.parents[1] / 'secret', (there / file).read_bytes())
        (there / file).unlink()
        (there / file).symlink_to(secret)

    return folder_of(name, change)


def gone_later(name, file):
    "Reads a folder whose file vanishes after it was opened."

    def door(folder):
        clip = load_clip(folder)
        os.unlink(folder / file)
        return [frame.image.shape for frame in clip]

    return door


def bent_later(name, file):
    "Reads a folder whose file becomes something else after it was opened."

    def door(folder):
        clip = load_clip(folder)
        os.unlink(folder / file)
        os.mkfifo(folder / file)
        return [frame.image.shape for frame in clip]

    return door


def deep_folder(folder):
    "A folder that links to itself."
    (folder / 'data').mkdir()
    (folder / 'data' / 'clip').symlink_to(folder / 'data')
    return folder / 'data' / 'clip'


LINKS = [
    *(
        Case(n, 'path', 'a picture is a link that leads out', out_link(n, FORMATS[n][1]), read)
        for n in FORMATS
    ),
    *(
        Case(n, 'race', 'a picture vanishes', passing(n), gone_later(n, FORMATS[n][1]))
        for n in FORMATS
    ),
    *(
        Case(n, 'race', 'a picture becomes a pipe', passing(n), bent_later(n, FORMATS[n][1]))
        for n in FORMATS
    ),
    *(
        Case(n, 'race', 'its codes vanish', passing(n), gone_later(n, CODES[n]))
        for n in CODES
        if n != 'gagavatar'
    ),
    Case('clip', 'path', 'a folder in itself', deep_folder, read),
    *(Case('clip', t, f'is {w}', instead(make, 'clip'), read) for w, (t, make) in INSTEAD.items()),
]
CASES = [
    *(Case(n, SOUND, 'a sound one', folder_of(n, unchanged), read, HARMLESS) for n in FORMATS),
    *(c for n in FORMATS if FORMATS[n][0] for c in json_cases(n)),
    *vhap_cases(),
    *(c for n in FORMATS for c in picture_cases(n)),
    *(c for n in CODES for c in code_cases(n)),
    *TRACKERS,
    *DATABASES,
    *LINKS,
]
