"How pictures are compared, read and painted."

from spatialavatar0 import lazily

__getattr__ = lazily(__name__)
