"""Splat files of other programs: PLY, compressed PLY, .splat, .npz, GaussianAvatars, glTF."""

import json
import struct

import numpy as np

from spatialavatar0.avatar.avatar import new_avatar
from spatialavatar0.head.head import open_head
from spatialavatar0.use.export import read_splats, write_splats
from spatialavatar0.use.gaussian_avatars import read_gaussian_avatar, write_gaussian_avatar
from spatialavatar0.use.gltf import read_glb, write_glb

from .make import DEEP, ESCAPES, INSTEAD, file, instead, npy, samples, written, zeros_zip, zipped
from .room import HARMLESS, SOUND, WARNED, Case

COLUMNS = (
    'x y z f_dc_0 f_dc_1 f_dc_2 opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3'.split()
)


def head(count, columns=COLUMNS, form='binary_little_endian', kind='float', extra=''):
    rows = '\n'.join(f'property {kind} {name}' for name in columns)
    return f'ply\nformat {form} 1.0\n{extra}element vertex {count}\n{rows}\nend_header\n'.encode()


def rows(count=4, **values):
    "Sound splats, the first of which has other values."
    table = np.zeros((count, len(COLUMNS)), '<f4')
    table[:, COLUMNS.index('rot_0')] = 1
    table[:, 7:10] = -4
    for name, value in values.items():
        table[0, COLUMNS.index(name)] = value
    return table.tobytes()


def ply(**values):
    return head(4) + rows(**values)


PLYS = {
    'a header of 10^12 rows': ('bomb', head(10**12) + rows()),
    'a header of 10^30 rows': ('number', head(10**30) + rows()),
    'a header of -4 rows': ('number', head(-4) + rows()),
    'a header of 4.5 rows': ('number', head('4.5') + rows()),
    'a million digits of rows': ('number', lambda: head('9' * 10**6) + rows()),
    'rows beyond the file': ('cut', head(5) + rows()),
    'a column named with escapes': (
        'text',
        head(4, [ESCAPES.replace('\n', ''), *COLUMNS[1:]]) + rows(),
    ),
    'a type named with escapes': ('text', head(4, kind='\x1b[2J') + rows()),
    'a column twice': ('kind', head(4, [*COLUMNS, 'x']) + rows()),
    'a column that is missing': ('kind', head(4, COLUMNS[1:]) + rows()),
    '60,000 columns': ('bomb', lambda: head(1, [f'c{i}' for i in range(60_000)]) + rows()),
    'a header without an end': ('cut', head(4)[:-12] + b' ' * 10**6),
    'a list for a column': (
        'kind',
        head(4).replace(b'property float x', b'property list uchar int x') + rows(),
    ),
    'a format nobody knows': ('kind', head(4, form='text_of_moon') + rows()),
    'text of letters': ('kind', head(4, form='ascii') + b'a b c\n' * 4),
    'text of 10^400': ('number', head(1, form='ascii') + b'1' + b'0' * 400 + b' 0' * 13 + b'\n'),
    'text that ends early': ('cut', head(4, form='ascii') + b'0 ' * 14 + b'\n'),
    'a table before of 10^12 rows': (
        'bomb',
        head(4, extra=f'element other {10**12}\nproperty float a\n') + rows(),
    ),
    'a table before without columns': ('bomb', head(4, extra=f'element other {10**18}\n') + rows()),
    'no table of vertices': ('kind', head(4).replace(b'vertex', b'face') + rows()),
}
WARNS = {  # rows that are dropped and counted
    'a place of NaN': ply(x=np.nan),
    'a place of infinity': ply(y=np.inf),
    'a place of 1e38': ply(z=1e38),
    'a size of e^200': ply(scale_0=200),
    'a size of NaN': ply(scale_1=np.nan),
    'a turn of zeros': ply(rot_0=0),
    'an opacity of NaN': ply(opacity=np.nan),
    'a colour of infinity': ply(f_dc_0=np.inf),
    'a colour of 1e38': ply(f_dc_0=1e38),
}


def sound(name):
    "A maker of a sound splat file, kept."

    def make(folder):
        return written(folder / name, (samples() / name).read_bytes())

    return make


def compressed(change):
    def make(folder):
        return written(
            folder / 'x.compressed.ply', change((samples() / 'x.compressed.ply').read_bytes())
        )

    return make


def in_first_chunk(value):
    "Ranges of a compressed PLY's first chunk, all of one value."

    def change(data):
        at = data.index(b'end_header\n') + 11
        return data[:at] + struct.pack('<12f', *[value] * 12) + data[at + 48 :]

    return change


COMPRESSED = {
    'ranges of NaN': ('number', compressed(in_first_chunk(np.nan))),
    'ranges of infinity': ('number', compressed(in_first_chunk(np.inf))),
    'ranges of 1e38': ('number', compressed(in_first_chunk(1e38))),
    'fewer chunks than rows': (
        'cut',
        compressed(lambda d: d.replace(b'element chunk', b'element chink')),
    ),
    'cut in half': ('cut', compressed(lambda d: d[: len(d) // 2])),
}
ARRAYS = dict(means=(4, 3), quats=(4, 4), scales=(4, 3), opacities=(4,), colors=(4, 3))


def npz(**change):
    "A maker of an .npz of splats: name -> bytes of an array, or None."
    members = {n: npy(str(s), np.full(s, 0.5).tobytes()) for n, s in ARRAYS.items()} | change
    return file('x.npz', lambda: zipped([(f'{n}.npy', d) for n, d in members.items() if d]))


SPLATS = [
    Case('ply', SOUND, 'a sound one', file('x.ply', ply()), read_splats, HARMLESS),
    Case('compressed ply', SOUND, 'a sound one', sound('x.compressed.ply'), read_splats, HARMLESS),
    Case('splat npz', SOUND, 'a sound one', npz(), read_splats, HARMLESS),
    *(Case('ply', t, w, file('x.ply', data), read_splats) for w, (t, data) in PLYS.items()),
    *(
        Case('ply', 'number', w, file('x.ply', data), read_splats, WARNED)
        for w, data in WARNS.items()
    ),
    Case(
        'ply',
        'number',
        'all of NaN',
        file('x.ply', head(1) + np.full(14, np.nan, '<f4').tobytes()),
        read_splats,
    ),
    *(Case('compressed ply', t, w, make, read_splats) for w, (t, make) in COMPRESSED.items()),
    *(
        Case(kind, t, f'is {w}', instead(make, name), read_splats)
        for kind, name in (
            ('ply', 'x.ply'),
            ('splat', 'x.splat'),
            ('splat npz', 'x.npz'),
            ('compressed ply', 'x.compressed.ply'),
        )
        for w, (t, make) in INSTEAD.items()
        if not (name == 'x.splat' and w in ('an empty file', 'noise'))
    ),
    Case('splat', 'cut', '33 bytes', file('x.splat', bytes(33)), read_splats),
    Case(
        'splat',
        'number',
        'places of NaN',
        file('x.splat', b'\xff' * 32 + bytes(24) + b'\x00' * 4 + b'\xff' * 4),
        read_splats,
        WARNED,
    ),
    Case(
        'splat npz',
        'bomb',
        'unfolds to 10 GB',
        file('x.npz', lambda: zeros_zip('means.npy')),
        read_splats,
    ),
    Case(
        'splat npz',
        'code',
        'an array of objects',
        npz(means=npy('(4,)', bytes(32), "'|O'")),
        read_splats,
    ),
    Case(
        'splat npz',
        'kind',
        'an array of text',
        npz(means=npy('(4,3)', bytes(48), "'<U1'")),
        read_splats,
    ),
    Case('splat npz', 'kind', 'no colours', npz(colors=None), read_splats),
    Case(
        'splat npz', 'kind', 'five rows of four', npz(scales=npy('(5,3)', bytes(120))), read_splats
    ),
    Case(
        'splat npz',
        'number',
        'a header of 10^12 rows',
        npz(means=npy(f'({10**12},3)', bytes(96))),
        read_splats,
    ),
    Case(
        'splat npz',
        'number',
        'a place of NaN',
        npz(means=npy('(4,3)', np.array([np.nan] + [0.5] * 11).tobytes())),
        read_splats,
        WARNED,
    ),
]

# ---- GaussianAvatars


def bound(ply_file=None, params=None):
    "A maker of an avatar's folder in GaussianAvatars' form, bent; functions of the bytes."

    def make(folder):
        for name, change in (('point_cloud.ply', ply_file), ('flame_param.npz', params)):
            data = (samples() / 'bound' / name).read_bytes()
            path = folder / 'avatar' / name
            if change is None:
                written(path, data)
            elif change[0] == 'make':
                path.parent.mkdir(exist_ok=True)
                change[1](path)
            else:
                written(path, change[1](data))
        return folder / 'avatar'

    return make


def binding(value):
    "The first triangle number of the file, replaced."

    def change(data):
        at = data.index(b'end_header\n') + 11
        names = [row.split()[2] for row in data[:at].split(b'\n') if row.startswith(b'property')]
        at += 4 * names.index(b'binding_0')
        return data[:at] + struct.pack('<f', value) + data[at + 4 :]

    return change


def arrays(**change):
    "flame_param.npz with other arrays."

    def bend(data):
        import io

        with np.load(io.BytesIO(data)) as old:
            kept = dict(old) | change
        buffer = io.BytesIO()
        np.savez(buffer, **{n: x for n, x in kept.items() if x is not None})
        return buffer.getvalue()

    return bend


BOUND = {
    'triangle -1': ('number', bound(('', binding(-1)))),
    'triangle 1e30': ('number', bound(('', binding(1e30)))),
    'triangle 0.5': ('number', bound(('', binding(0.5)))),
    'no expression': ('kind', bound(None, ('', arrays(expr=None)))),
    'expression of NaN': ('number', bound(None, ('', arrays(expr=np.full((1, 100), np.nan))))),
    'expression of text': ('kind', bound(None, ('', arrays(expr=np.array([['a']]))))),
    'expression of no frames': ('kind', bound(None, ('', arrays(expr=np.zeros((0, 100)))))),
    'expression of 10^6 directions': ('bomb', bound(None, ('', arrays(expr=np.ones((1, 10**6)))))),
    'a jaw of five numbers': ('kind', bound(None, ('', arrays(jaw_pose=np.zeros((1, 5)))))),
    'a static offset of 7 vertices': (
        'kind',
        bound(None, ('', arrays(static_offset=np.ones((1, 7, 3))))),
    ),
    'parameters that unfold to 10 GB': ('bomb', bound(None, ('', lambda _: zeros_zip('expr.npy')))),
}
GAUSSIANS = [
    Case('GaussianAvatars', SOUND, 'a sound one', bound(), read_gaussian_avatar, HARMLESS),
    Case(
        'GaussianAvatars',
        'number',
        'triangle NaN',
        bound(('', binding(np.nan))),
        read_gaussian_avatar,
        WARNED,
    ),
    *(Case('GaussianAvatars', t, w, make, read_gaussian_avatar) for w, (t, make) in BOUND.items()),
    *(
        Case(
            'GaussianAvatars', t, f'the splats are {w}', bound(('make', make)), read_gaussian_avatar
        )
        for w, (t, make) in INSTEAD.items()
    ),
    *(
        Case(
            'GaussianAvatars',
            t,
            f'the parameters are {w}',
            bound(None, ('make', make)),
            read_gaussian_avatar,
        )
        for w, (t, make) in INSTEAD.items()
    ),
]

# ---- glTF


def all_tables(path):
    "Every table of a .glb."
    about, table = read_glb(path)
    return [table(i) for i in range(len(about['accessors']))]


def glb(change, total=None):
    "A maker of a .glb with another description: a function of it, or text."

    def make(folder):
        data = (samples() / 'x.glb').read_bytes()
        length = struct.unpack('<I', data[12:16])[0]
        text = data[20 : 20 + length]
        text = (
            change if isinstance(change, bytes) else json.dumps(change(json.loads(text))).encode()
        )
        text += b' ' * (-len(text) % 4)
        rest = data[20 + length :]
        size = total or 20 + len(text) + len(rest)
        start = struct.pack('<4sIIII', b'glTF', 2, size & 0xFFFFFFFF, len(text), 0x4E4F534A)
        return written(folder / 'x.glb', start + text + rest)

    return make


def accessor(**change):
    def bend(about):
        about['accessors'][0] |= change
        return about

    return glb(bend)


def view(**change):
    def bend(about):
        about['bufferViews'][0] |= change
        return about

    return glb(bend)


GLB = {
    'a description 100,000 deep': ('bomb', glb(b'[' * DEEP + b']' * DEEP)),
    'a description that is a list': ('kind', glb(b'[]')),
    'a description without tables': ('kind', glb(b'{}')),
    'a description that is no UTF-8': ('text', glb(b'{"a": "\xff"}')),
    'a table of 10^12 rows': ('bomb', accessor(count=10**12)),
    'a table of 10^8 rows of nothing': (
        'bomb',
        glb(lambda a: a | dict(accessors=[dict(count=10**8, componentType=5126, type='MAT4')])),
    ),
    'a table of -1 rows': ('number', accessor(count=-1)),
    'a table of 1.5 rows': ('number', accessor(count=1.5)),
    'a table of true rows': ('kind', accessor(count=True)),
    'a table of text rows': ('kind', accessor(count='3')),
    'a type with escapes': ('text', accessor(type=ESCAPES)),
    'a view of table 99,999': ('number', accessor(bufferView=99_999)),
    'a view of -1': ('number', accessor(bufferView=-99)),
    'a view that begins at 10^30': ('number', view(byteOffset=10**30)),
    'a view that begins at -4': ('number', view(byteOffset=-4)),
    'promises more than it has': ('cut', glb(lambda a: a, total=2**32 - 1)),
    'tables that are text': ('kind', glb(lambda a: a | dict(accessors='all'))),
    'views that are text': ('kind', glb(lambda a: a | dict(bufferViews='all'))),
}
GLBS = [
    Case('glb', SOUND, 'a sound one', sound('x.glb'), all_tables, HARMLESS),
    *(Case('glb', t, w, make, all_tables) for w, (t, make) in GLB.items()),
    *(
        Case('glb', t, f'is {w}', instead(make, 'x.glb'), all_tables)
        for w, (t, make) in INSTEAD.items()
    ),
]


def prepare():
    avatar = new_avatar(open_head(), 16)
    write_splats(samples() / 'x.compressed.ply', *avatar.world())
    write_gaussian_avatar(avatar, samples() / 'bound')
    write_glb(avatar, samples() / 'x.glb', motions={})


CASES = SPLATS + GAUSSIANS + GLBS
