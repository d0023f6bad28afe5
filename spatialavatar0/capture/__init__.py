"From photos and films of real people to heads and clips."

from spatialavatar0 import lazily

__getattr__ = lazily(__name__)
