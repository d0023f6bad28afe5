"""Files in FLAME's own encodings, written from scratch: what Python 2, numpy 1.11, scipy 0.17 and
chumpy left behind."""

import struct

import numpy as np
import scipy.sparse


class Made:
    "An instance of a class that need not exist here."

    def __init__(self, module, name, **state):
        self.module = module
        self.name = name
        self.state = state


def ch(x):
    return Made(
        'chumpy.ch', 'Ch', x=x, _dirty_vars=set(), _itr=None, _depends_on_deps={}, _cached_parms={}
    )


def select(x, seed=0):
    "The same numbers as a chumpy selection out of a larger, shuffled array."
    r = np.random.default_rng(seed)
    n = x.size
    places = r.permutation(2 * n)[:n]
    big = r.normal(size=2 * n)
    big[places] = x.ravel()
    return Made(
        'chumpy.reordering',
        'Select',
        a=ch(big.reshape(2, n)),
        idxs=places,
        preferred_shape=x.shape,
        _dirty_vars={'a'},
    )


def csc(x):
    m = scipy.sparse.csc_matrix(x)
    return Made(
        'scipy.sparse.csc',
        'csc_matrix',
        _shape=m.shape,
        maxprint=50,
        data=m.data,
        indices=m.indices,
        indptr=m.indptr,
        format='csc',
    )


class Python2:
    """Writes pickles as Python 2's cPickle did: byte strings, old module names, the memo used for
    whatever comes twice."""

    def __init__(self, protocol):
        self.protocol = protocol
        self.memo = {}
        self.keep = []

    def dumps(self, x):
        return (b'\x80\x02' if self.protocol == 2 else b'') + self.write(x) + b'.'

    def put(self, x, code):
        n = self.memo[id(x)] = len(self.memo)
        self.keep.append(x)
        return code + (
            b'p%d\n' % n
            if self.protocol == 0
            else b'q' + bytes([n])
            if n < 256
            else b'r' + struct.pack('<I', n)
        )

    def write(self, x):
        if id(x) in self.memo:
            n = self.memo[id(x)]
            return (
                b'g%d\n' % n
                if self.protocol == 0
                else b'h' + bytes([n])
                if n < 256
                else b'j' + struct.pack('<I', n)
            )
        if x is None:
            return b'N'
        if isinstance(x, bool):
            return (
                (b'\x88' if x else b'\x89') if self.protocol == 2 else b'I01\n' if x else b'I00\n'
            )
        if isinstance(x, int):
            return self.number(x)
        if isinstance(x, float):
            return b'F%r\n' % x if self.protocol == 0 else b'G' + struct.pack('>d', x)
        if isinstance(x, (str, bytes)):
            return self.put(x, self.text(x.encode() if isinstance(x, str) else x))
        return self.put(x, getattr(self, type(x).__name__)(x))

    def number(self, x):
        if self.protocol == 0 or not -(2**31) <= x < 2**31:
            return b'I%d\n' % x
        return (
            b'K' + bytes([x])
            if 0 <= x < 256
            else b'M' + struct.pack('<H', x)
            if 0 <= x < 2**16
            else b'J' + struct.pack('<i', x)
        )

    def text(self, x):
        if self.protocol == 0:
            return b'S' + repr(x)[1:].encode() + b'\n'
        return b'U' + bytes([len(x)]) + x if len(x) < 256 else b'T' + struct.pack('<i', len(x)) + x

    def tuple(self, x):
        items = b''.join(map(self.write, x))
        if self.protocol == 2 and 1 <= len(x) <= 3:
            return items + b'\x85\x86\x87'[len(x) - 1 : len(x)]
        return b')' if self.protocol and not x else b'(' + items + b't'

    def list(self, x):
        if self.protocol == 0:
            return b'(l' + b''.join(self.write(i) + b'a' for i in x)
        return b']' + (b'(' + b''.join(map(self.write, x)) + b'e' if x else b'')

    def dict(self, x):
        pairs = [self.write(k) + self.write(v) for k, v in x.items()]
        if self.protocol == 0:
            return b'(d' + b''.join(p + b's' for p in pairs)
        return b'}' + (b'(' + b''.join(pairs) + b'u' if pairs else b'')

    def call(self, module, name, *args):
        return self.name(module, name) + self.write(args) + b'R'

    def name(self, module, name):
        return b'c' + module.encode() + b'\n' + name.encode() + b'\n'

    def set(self, x):
        return self.call('__builtin__', 'set', sorted(x))

    def ndarray(self, x):
        start = (
            b'(' + self.name('numpy', 'ndarray') + self.write((0,)) + self.write('b') + b't'
            if self.protocol < 2
            else self.name('numpy', 'ndarray') + self.write((0,)) + self.write('b') + b'\x87'
        )
        state = (
            1,
            x.shape,
            Dtype(x.dtype),
            bool(x.flags.fnc),
            x.tobytes('F' if x.flags.fnc else 'C'),
        )
        return (
            self.name('numpy.core.multiarray', '_reconstruct')
            + start
            + b'R'
            + self.write(state)
            + b'b'
        )

    def Dtype(self, x):
        t = x.dtype
        order = '|' if t.itemsize == 1 else '<'
        return (
            self.call('numpy', 'dtype', t.str[1:], 0, 1)
            + self.write((3, order, None, None, None, -1, -1, 0))
            + b'b'
        )

    def Made(self, x):
        new = (
            self.name(x.module, x.name) + b')\x81'
            if self.protocol == 2
            else self.name('copy_reg', '_reconstructor')
            + b'('
            + self.name(x.module, x.name)
            + self.name('__builtin__', 'object')
            + b'NtR'
        )
        return new + self.write(x.state) + b'b'


class Dtype:
    def __init__(self, dtype):
        self.dtype = dtype


def model(V=60, F=100, columns=400, seed=0, kintree=np.uint32):
    "Random arrays of FLAME's form, as plain numpy; the last 20 vertices are two eyeballs."
    r = np.random.default_rng(seed)
    J = np.zeros((5, V))
    for row in J:
        row[r.choice(V, 20, replace=False)] = 1 / 20
    faces = np.concatenate(
        [
            r.permuted(np.tile(np.arange(V - 20), (F - 16, 1)), axis=1)[:, :3]
            if V < 1000
            else np.stack(
                [(np.arange(F - 16) * k + s) % (V - 20) for k, s in ((1, 0), (1, 1), (1, 7))], 1
            ),
            *(V - 20 + 10 * e + np.array([[0, i + 1, i + 2] for i in range(8)]) for e in (0, 1)),
        ]
    )
    weights = r.dirichlet(np.ones(5), V)
    weights[-20:] = 0
    weights[-20:-10, 3] = 1
    weights[-10:, 4] = 1
    return dict(
        v_template=r.normal(size=(V, 3)) * 0.1,
        f=faces.astype(np.uint32),
        shapedirs=r.normal(size=(V, 3, columns)) * 1e-3,
        posedirs=r.normal(size=(V, 3, 36)) * 1e-3,
        J_regressor=J,
        weights=weights,
        kintree_table=np.array([[2**32 - 1, 0, 1, 1, 1], range(5)]).astype(kintree),
    )


def original(m):
    """The same arrays as FLAME's authors saved them: chumpy here and there, a sparse regressor, a
    few keys nobody needs."""
    return dict(
        m,
        v_template=ch(m['v_template']),
        shapedirs=select(m['shapedirs']) if m['shapedirs'].size < 10**6 else ch(m['shapedirs']),
        posedirs=ch(np.asfortranarray(m['posedirs'])),
        weights=ch(m['weights']),
        J_regressor=csc(m['J_regressor']),
        J=ch(m['J_regressor'] @ m['v_template']),
        bs_style='lbs',
        bs_type='lrotmin',
    )


def write_original(path, m, protocol=2):
    path.write_bytes(Python2(protocol).dumps(original(m)))
    return path
