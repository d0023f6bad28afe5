"""The README's pictures, from the results of the demo.

spatialavatar0 demo --out demo && python tools/picture.py demo
"""

import sys
from pathlib import Path

import house
import numpy as np
import torch
from PIL import Image

from spatialavatar0.avatar.avatar import Avatar
from spatialavatar0.avatar.portrait import head_square
from spatialavatar0.capture.track import fit
from spatialavatar0.ground.core import to_uint8
from spatialavatar0.ground.geometry import crop_intrinsics
from spatialavatar0.use.animate import both, render_motion, swing, turn, write_film

OUT = house.NBS / 'images'
SIDE = 300  # of a picture in the sheet, pixels
CUT = 0.11  # so much of the photo's square is cut off on each side
SMILE = dict(mouthSmile=0.75, cheekSquint=0.3)
# yaw in degrees and ARKit weights; None: the photo
SHEET = [
    [None, (0, SMILE), (-45, SMILE), (45, SMILE)],
    [
        (-20, dict(jawOpen=0.65)),
        (0, dict(eyeBlink=1.0)),
        (75, dict(mouthSmile=0.75)),
        (25, dict(browInnerUp=0.9, mouthPucker=0.7)),
    ],
]


def photo():
    "The portrait's square, cut as the camera below sees it."
    import skimage.data

    portrait = skimage.data.astronaut()
    x, y, side = head_square(fit(portrait))
    near, far = side * CUT, side * (1 - CUT)
    box = [int(v) for v in (x + near, y + near, x + far, y + far)]
    square = Image.fromarray(portrait).crop(box)
    return np.asarray(square.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


class Studio:
    "The avatar before the camera it was made with."

    def __init__(self, avatar):
        self.avatar = avatar
        camera = avatar.info['camera']
        self.size = camera['size']
        self.viewmat = torch.tensor(camera['viewmat'])
        self.K = torch.tensor(camera['K'])
        verts = avatar.verts()
        middle = (verts.amin(0) + verts.amax(0)) / 2 * verts.new_tensor([0, 1, 1])
        self.middle = middle.tolist()

    def lens(self, pixels):
        zoom = pixels / (self.size * (1 - 2 * CUT))
        return crop_intrinsics(self.K, self.size * CUT, self.size * CUT, zoom)

    def seen(self, yaw, weights):
        "A picture of it."
        viewmat = turn(self.viewmat, yaw, 0, self.middle)
        pose = self.avatar.head.arkit(both(**weights))
        rgb, _ = self.avatar.render(viewmat, self.lens(SIDE), SIDE, SIDE, background=1.0, **pose)
        return to_uint8(rgb)

    def turntable(self, frames=36, pixels=176):
        "A film of it."
        smile = self.avatar.head.arkit(both(**SMILE))
        views = [turn(self.viewmat, yaw, pitch, self.middle) for yaw, pitch in swing(frames, 55)]
        return render_motion(
            self.avatar, views, [smile] * frames, self.lens(pixels), pixels, pixels
        )


def main(folder):
    studio = Studio(Avatar.load(Path(folder) / 'avatar.safetensors'))
    rows = [[photo() if cell is None else studio.seen(*cell) for cell in row] for row in SHEET]
    sheet = np.concatenate([np.concatenate(row, 1) for row in rows], 0)
    OUT.mkdir(exist_ok=True)
    Image.fromarray(sheet).save(OUT / 'head.jpg', quality=88)
    write_film(studio.turntable(), OUT / 'turntable.gif', 12)


if __name__ == '__main__':
    main(*sys.argv[1:])
