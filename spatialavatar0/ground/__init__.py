"Small tools, conventions of geometry, files, foreign pickles, where data comes from."

from spatialavatar0 import lazily

__getattr__ = lazily(__name__)
