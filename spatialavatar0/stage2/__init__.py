"The refinement for one person."

from spatialavatar0 import lazily

__getattr__ = lazily(__name__)
