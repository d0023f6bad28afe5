"""Build spatialavatar0/assets/open_landmarks.npz: MediaPipe's 478 face landmarks on the open head.

    python tools/build_landmarks.py [--model face_landmarker.task] [--out FILE.npz]
                                    [--picture FILE.png]

Nobody publishes this table for this head, so we measure it: paint 16 people from 13 sides, let
MediaPipe find its landmarks, look up in the z-buffer which triangle lies under each, and take a
robust mean over people and views. Three precautions (all matter). Landmarks slide along the
silhouette when they are turned away, up to the nose: each is taken only from views that do not turn
its side away, those of the face's outline from nearly frontal views. Closed lips meet in one line:
the inner lips are taken from open mouths. And every landmark gets a spread `sigma`, so that a fit
can weight it by 1/sigma. The result is symmetric. Needs the extra `track`; some minutes.
"""

import argparse
import io
import zipfile
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from scipy.optimize import linear_sum_assignment

from spatialavatar0.ground.assets import asset
from spatialavatar0.ground.core import atomic_path, set_seed, to_uint8
from spatialavatar0.ground.geometry import intrinsics, orbit, project
from spatialavatar0.head.head import open_head
from spatialavatar0.pictures.people import STUDIO, Light, face_centre, make_person, paint
from spatialavatar0.splats.mesh import rasterize_mesh, shade_mesh, vertex_normals, visible_points

PEOPLE = 16
FIRST_SEED = 500
SIZE = 384
LEVEL = [(yaw, 0) for yaw in (-45, -30, -15, 0, 15, 30, 45)]
VIEWS = LEVEL + [(yaw, pitch) for yaw in (-20, 0, 20) for pitch in (-15, 15)]
LIGHTS = [STUDIO, Light((0.5, 0.5, 0.7), 0.6, 0.4, in_room=False)]
IRIS = list(range(468, 478))
# MediaPipe's numbers on one side, in the same order on the other; the rest is paired by position
RIGHT = dict(
    contour=[109, 67, 103, 54, 21, 162, 127, 234, 93, 132, 58, 172, 136, 150, 149, 176, 148],
    eyes=[33, 7, 163, 144, 145, 153, 154, 155, 133, 173, 157, 158, 159, 160, 161, 246],
    brows=[70, 63, 105, 66, 107, 55, 65, 52, 53, 46],
    lips_out=[61, 146, 91, 181, 84, 37, 39, 40, 185],
    lips_in=[78, 95, 88, 178, 87, 82, 81, 80, 191],
    nose=[97, 98, 129, 48, 115],
)
LEFT = dict(
    contour=[338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377],
    eyes=[263, 249, 390, 373, 374, 380, 381, 382, 362, 398, 384, 385, 386, 387, 388, 466],
    brows=[300, 293, 334, 296, 336, 285, 295, 282, 283, 276],
    lips_out=[291, 375, 321, 405, 314, 267, 269, 270, 409],
    lips_in=[308, 324, 318, 402, 317, 312, 311, 310, 415],
    nose=[326, 327, 358, 278, 344],
)
MIDDLE = dict(
    contour=[10, 152],
    eyes=[],
    brows=[],
    lips_out=[0, 17],
    lips_in=[13, 14],
    nose=[1, 2, 4, 5, 6, 19, 94, 168, 195, 197],
)
GROUPS = {**{k: RIGHT[k] + LEFT[k] + MIDDLE[k] for k in RIGHT}, 'iris': IRIS}
LOWER_LIP = [95, 88, 178, 87, 14, 317, 402, 318, 324]  # of the inner lips
FLOOR = 0.0015  # least sigma, metres
UNSEEN = 0.05  # sigma of a landmark that was hardly seen, metres
MIN_SEEN = 12  # observations
OFF = 8  # pixels beside the skin that still count as its edge
OPEN = {'jawOpen': 0.3}  # every second person: only so the upper lip is told from the lower


# ---------------------------------------------------------------- look
def detector(model):
    "MediaPipe's face landmarker for single pictures: image (H,W,3) -> (478,2) pixels or None."
    import mediapipe as mp
    from mediapipe.tasks import python as tasks
    from mediapipe.tasks.python import vision

    file = tasks.BaseOptions(model_asset_path=str(model))
    options = vision.FaceLandmarkerOptions(base_options=file, num_faces=1)
    landmarker = vision.FaceLandmarker.create_from_options(options)

    def detect(image):
        rgb = np.ascontiguousarray(to_uint8(image))
        height, width = rgb.shape[:2]
        image = mp.Image(image_format=mp.ImageFormat.SRGB, data=rgb)
        found = landmarker.detect(image).face_landmarks
        return np.array([[p.x * width, p.y * height] for p in found[0]]) if found else None

    detect.close = landmarker.close
    return detect


def camera(yaw, pitch, head):
    "A camera 55 cm from the middle of the head."
    return orbit(yaw, pitch, 0.55, face_centre(head)), intrinsics(1.95 * SIZE, SIZE, SIZE)


def under(lmks, ids, bary, head, fine):
    "Triangle and barycentrics under each landmark: the iris on the eyeballs, the others on skin."
    face_ids = np.full(478, -1)
    weights = np.zeros((478, 3), np.float32)
    for which, names, off in (
        (np.arange(468), ('skin',), OFF),
        (np.array(IRIS), ('eye_l', 'eye_r'), 0.5),
    ):
        parts = torch.tensor([head.part_names.index(name) for name in names])
        wanted = (ids >= 0) & torch.isin(head.parts[ids.clamp_min(0)], parts)
        found = look_up(lmks[which] * fine, wanted.numpy(), ids.numpy(), bary.numpy(), off * fine)
        face_ids[which], weights[which] = found
    return face_ids, weights


def facing_camera(verts, faces, face_ids, bary, viewmat):
    "Cosine between the surface's normal and the way to the camera."
    normalize = torch.nn.functional.normalize
    corners = faces[torch.as_tensor(face_ids).clamp_min(0)]

    def at(values):
        return (values[corners] * torch.as_tensor(bary)[..., None]).sum(1)

    eye = -viewmat[:3, :3].T @ viewmat[:3, 3]
    normal = normalize(at(vertex_normals(verts, faces)), dim=-1)
    return (normal * normalize(eye - at(verts), dim=-1)).sum(-1).numpy()


def observe(person, params, view, light, head, detect):
    """One painted picture: for each landmark the triangle, barycentrics and facing (cosine) under
    it; -1 where there is none; or None."""
    viewmat, K = camera(*view, head)
    fine = 2  # z-buffer pixels per picture pixel
    lmks = detect(paint(person, viewmat, K, SIZE, params=params, light=light).image)
    if lmks is None:
        return None
    verts = head(shape=person.shape, static_offset=person.static_offset, **params)[0]
    fine_K = K * torch.tensor([fine, fine, 1.0])[:, None]
    size = SIZE * fine
    ids, bary, _ = rasterize_mesh(verts, head.faces, viewmat, fine_K, size, size)
    face_ids, weights = under(lmks, ids, bary, head, fine)
    return face_ids, weights, facing_camera(verts, head.faces, face_ids, weights, viewmat)


def look_up(xy, wanted, ids, bary, off):
    """Face and barycentrics at pixels (n,2), or at the nearest wanted pixel if that is at most
    `off` pixels away; else -1."""
    x, y = xy.astype(int).clip(0, len(ids) - 1).T
    gap, near = distance_transform_edt(~wanted, return_indices=True)
    gap = gap[y, x]
    y, x = near[:, y, x]
    return np.where(gap <= off, ids[y, x], -1), bary[y, x]


def observations(head, detect, people=PEOPLE):
    """All pictures: arrays (M,478) face ids, (M,478,3) barycentrics, (M,478) facing, and (M,2)
    person and view."""
    out = []
    tags = []
    for p in range(people):
        person = make_person(FIRST_SEED + p, head)
        person.static_offset = torch.zeros_like(person.static_offset)
        params = head.arkit(OPEN if p % 2 else {})
        for v, view in enumerate(VIEWS):
            seen = observe(person, params, view, LIGHTS[p // 2 % 2], head, detect)
            if seen is not None:
                out.append(seen)
                tags.append((p, v))
    print(f'MediaPipe found the face in {len(out)} of {people * len(VIEWS)} pictures')
    return [np.stack(x) for x in zip(*out)] + [np.array(tags)]


# ---------------------------------------------------------------- average
def geometric_median(x, w, steps=30):
    """The point with the least weighted sum of distances (Weiszfeld); outliers hardly move it.
    Metres."""
    centre = np.median(x, 0)
    for _ in range(steps):
        pull = w / (np.linalg.norm(x - centre, axis=1) + 5e-4)
        centre = (pull[:, None] * x).sum(0) / pull.sum()
    return centre


def counts(i, ok, facing, side, tags):
    "Which observations of a landmark count, and how much each."
    yaw, pitch = np.array([VIEWS[v] for _, v in tags]).T
    towards = (yaw * side >= 0) | (abs(side) < 0.02)  # not from the side that is turned away
    use = ok & towards
    weight = facing**2
    if i in GROUPS['contour']:
        use = use & (np.abs(yaw) <= 15) & (pitch == 0)
        weight = np.ones(len(weight))
    else:
        use = use & (facing > 0.35)
    if i in GROUPS['lips_in']:
        use = use & (tags[:, 0] % 2 == 1)
    return use, weight


def average(points, ok, facing, tags):
    "Robust mean (478,3), spread (478,) in metres and number of observations of each landmark."
    from_front = np.array([VIEWS[v][0] for _, v in tags]) == 0
    mean = np.zeros((478, 3))
    spread = np.full(478, np.nan)
    seen = np.zeros(478, int)
    for i in range(478):
        front = ok[:, i] & from_front
        if not front.any():
            continue
        side = np.median(points[front, i, 0])
        use, weight = counts(i, ok[:, i], facing[:, i], side, tags)
        seen[i] = use.sum()
        if seen[i] < MIN_SEEN:
            continue
        x = points[use, i]
        mean[i] = geometric_median(x, weight[use])
        spread[i] = np.median(np.linalg.norm(x - mean[i], axis=1))
    return mean, spread, seen


def mirror_table(mean):
    "Each landmark's twin on the other side, by the best one-to-one matching of mirrored positions."
    mirror = np.arange(478)
    for group in RIGHT:
        mirror[RIGHT[group]] = LEFT[group]
        mirror[LEFT[group]] = RIGHT[group]
    rest = np.setdiff1d(np.arange(468), sum(GROUPS.values(), []))
    for ids in (rest, np.array(IRIS)):
        cost = np.linalg.norm(mean[ids][:, None] - mean[ids][None] * [-1, 1, 1], axis=-1)
        mirror[ids] = ids[linear_sum_assignment(cost + cost.T)[1]]
    assert (mirror[mirror] == np.arange(478)).all(), 'the mirror table is not an involution'
    return mirror


def in_plane(p, tri):
    "Barycentrics (F,3) of p's nearest point in each triangle's plane."
    ab = tri[:, 1] - tri[:, 0]
    ac = tri[:, 2] - tri[:, 0]
    ap = p - tri[:, 0]
    bb = (ab * ab).sum(1)
    bc = (ab * ac).sum(1)
    cc = (ac * ac).sum(1)
    bp = (ab * ap).sum(1)
    cp = (ac * ap).sum(1)
    det = np.maximum(bb * cc - bc**2, 1e-30)
    v = (cc * bp - bc * cp) / det
    w = (bb * cp - bc * bp) / det
    return np.stack([1 - v - w, v, w], 1)


def on_edge(p, tri, i, j):
    "Barycentrics (F,3) of p's nearest point on an edge of each triangle."
    edge = tri[:, j] - tri[:, i]
    length2 = np.maximum((edge * edge).sum(1), 1e-30)
    t = (((p - tri[:, i]) * edge).sum(1) / length2).clip(0, 1)
    bary = np.zeros((len(tri), 3))
    bary[:, i] = 1 - t
    bary[:, j] = t
    return bary


def closest(p, tri):
    "Closest point to p on triangles (F,3,3): (index, barycentrics, distance)."
    edges = [on_edge(p, tri, i, j) for i, j in ((0, 1), (1, 2), (2, 0))]
    bary = np.stack([in_plane(p, tri), *edges], 1)
    distance = np.linalg.norm((bary[..., None] * tri[:, None]).sum(2) - p, axis=-1)
    distance[(bary < -1e-9).any(-1)] = np.inf
    best = distance.argmin()
    return best // 4, bary.reshape(-1, 3)[best], distance.flat[best]


def snap(points, which, verts, faces):
    "Points onto the triangles `which[i]`: face ids, barycentrics, distances."
    found = [closest(p, verts[faces[ids]]) for p, ids in zip(points, which)]
    face_ids = np.array([ids[k] for (k, _, _), ids in zip(found, which)])
    return face_ids, np.stack([bary for _, bary, _ in found]), np.array([d for *_, d in found])


# ---------------------------------------------------------------- build
def triangles_of(head, *names):
    "The triangles of some parts."
    parts = [head.part_names.index(name) for name in names]
    return np.flatnonzero(np.isin(np.asarray(head.parts), parts))


def places(head):
    """The triangles on which each landmark lies. At rest the lips touch: the opening jaw tells one
    from the other."""
    faces = head.faces.numpy()
    skin = triangles_of(head, 'skin')
    left, right = triangles_of(head, 'eye_l'), triangles_of(head, 'eye_r')
    where = [skin] * 468 + [right] * 5 + [left] * 5
    opened = head(**head.arkit({'jawOpen': 1.0})) - head()
    swing = opened[0].norm(dim=-1).numpy()[faces].mean(1)
    jaw = swing[skin] > 0.35 * swing.max()
    for i in set(GROUPS['lips_in']) - {78, 308}:
        where[i] = skin[jaw == (i in LOWER_LIP)]
    return where


def build(head, detect):
    "The table, and what it was measured from."
    ids, bary, facing, tags = observations(head, detect)
    verts = head()[0].numpy().astype(float)
    faces = head.faces.numpy()
    points = (verts[faces[ids.clip(0)]] * bary[..., None]).sum(2)
    ok = ids >= 0
    mean, spread, seen = average(points, ok, facing, tags)
    valid = seen >= MIN_SEEN
    mirror = mirror_table(mean)
    valid &= valid[mirror]
    flipped = mean[mirror] * [-1, 1, 1]
    apart = np.linalg.norm(mean - flipped, axis=1)[valid]
    assert apart.max() < 0.012, f'twins {apart.max() * 1e3:.0f} mm apart'
    spread = np.fmax(spread, spread[mirror])
    face_ids, weights, gap = snap((mean + flipped) / 2, places(head), verts, faces)
    sigma = np.where(valid, np.fmax(spread, FLOOR), UNSEEN)
    sigma[gap > 0.003] = np.maximum(sigma[gap > 0.003], 0.006)
    table = dict(
        face_ids=face_ids.astype(np.int32),
        bary=weights.round(6).astype(np.float32),
        sigma=sigma.round(6).astype(np.float32),
        contour=np.isin(np.arange(478), GROUPS['contour']),
        valid=valid,
        mirror=mirror.astype(np.int32),
    )
    return table, dict(points=points, ok=ok, facing=facing, tags=tags, spread=spread, gap=gap)


def write_npz(path, arrays):
    "An npz which is the same file, byte for byte, for the same arrays."
    with atomic_path(path) as tmp, zipfile.ZipFile(tmp, 'w', zipfile.ZIP_DEFLATED) as package:
        for name, array in arrays.items():
            data = io.BytesIO()
            np.lib.format.write_array(data, np.ascontiguousarray(array), version=(1, 0))
            info = zipfile.ZipInfo(f'{name}.npy', (1980, 1, 1, 0, 0, 0))
            package.writestr(info, data.getvalue(), zipfile.ZIP_DEFLATED)


# ---------------------------------------------------------------- report
def split_half(raw):
    "Distance between the tables of the first and the second half of the people, metres."
    first = raw['tags'][:, 0] < PEOPLE // 2
    names = 'points', 'ok', 'facing', 'tags'
    one, two = (average(*(raw[name][half] for name in names))[0] for half in (first, ~first))
    apart = np.linalg.norm(one - two, axis=1)
    return apart[(one != 0).any(1) & (two != 0).any(1)]


def report(table, raw):
    "Numbers per group, in millimetres."
    mm = raw['spread'] * 1e3
    valid = table['valid']
    print(f'usable {valid.sum()} of 478; not: {np.flatnonzero(~valid).tolist()}')
    print(f'median spread {np.nanmedian(mm[valid]):.2f} mm')
    print(f'split-half {np.median(split_half(raw)) * 1e3:.2f} mm')
    print(f'distance to the mesh, median {np.median(raw["gap"][valid]) * 1e3:.2f} mm')
    rest = sorted(set(range(478)) - set(sum(GROUPS.values(), [])))
    for name, ids in {**GROUPS, 'rest': rest}.items():
        ids = np.array(ids)
        used = mm[ids[valid[ids]]]
        print(
            f'{name:9} usable {len(used):3} of {len(ids):3}  median {np.median(used):.2f}  p90 '
            f'{np.quantile(used, 0.9):.2f} mm'
        )


def colours(table):
    "Green below 2 mm, orange below 4, red above, blue: contour."
    sigma = table['sigma']
    by_spread = np.where(sigma < 0.004, 'darkorange', 'red')
    by_spread = np.where(sigma < 0.002, 'green', by_spread)
    return np.where(table['contour'], 'royalblue', by_spread)


def draw(ax, table, head, yaw):
    "The landmarks on the grey head from one side."
    verts = head()[0]
    corners = verts[head.faces[table['face_ids']]]
    points = (corners * torch.as_tensor(table['bary'])[..., None]).sum(1)
    viewmat, _ = camera(yaw, 0, head)
    K = intrinsics(1900, 900, 900)
    ax.imshow(shade_mesh(verts, head.faces, viewmat, K, 900, 900)[0])
    ax.axis('off')
    depth = rasterize_mesh(verts, head.faces, viewmat, K, 900, 900)[2]
    seen = visible_points(points, depth, viewmat, K).numpy() & table['valid']
    xy = project(points, viewmat, K)[0].numpy()
    ax.scatter(*xy[seen].T, s=9, c=colours(table)[seen])
    for i in np.flatnonzero(seen):
        ax.annotate(str(i), xy[i], fontsize=4.5)


def picture(table, head, path):
    "The landmarks on the grey head, front and side."
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    fig, axs = plt.subplots(1, 2, figsize=(18, 9.3), layout='constrained')
    for ax, yaw in zip(axs, (0, 50)):
        draw(ax, table, head, yaw)
    fig.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', help="face_landmarker.task; default: the manifest's")
    default = Path(__file__).parents[1] / 'spatialavatar0/assets/open_landmarks.npz'
    parser.add_argument('--out', default=default, type=Path)
    parser.add_argument('--picture', type=Path, help='also draw the table here')
    given = parser.parse_args()
    set_seed(0)
    head = open_head()
    detect = detector(given.model or asset('face_landmarker'))
    table, raw = build(head, detect)
    detect.close()
    write_npz(given.out, table)
    report(table, raw)
    print(f'wrote {given.out} ({given.out.stat().st_size / 1e3:.0f} kB)')
    if given.picture:
        picture(table, head, given.picture)


if __name__ == '__main__':
    main()
