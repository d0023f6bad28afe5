"The generator, its loss, its schedule, and the machine that trains it."

from spatialavatar0 import lazily

__getattr__ = lazily(__name__)
