"The head model, FLAME's own files, teeth."

from spatialavatar0 import lazily

__getattr__ = lazily(__name__)
