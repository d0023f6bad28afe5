"Move it, drive it, show it, take it to other tools."

from spatialavatar0 import lazily

__getattr__ = lazily(__name__)
