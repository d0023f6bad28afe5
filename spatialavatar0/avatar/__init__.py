"What an avatar is, and a head from one picture."

from spatialavatar0 import lazily

__getattr__ = lazily(__name__)
