"One Gaussian per texel, glued to its triangle; through the lens; onto the screen."

from spatialavatar0 import lazily

__getattr__ = lazily(__name__)
