"Protocols and judges, many people, the paper beside ours."

from spatialavatar0 import lazily

__getattr__ = lazily(__name__)
