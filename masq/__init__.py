"""masq: an open framework for post-training quantization of multimodal language models.

Importing this package loads nothing heavy; import the room you need (``masq.run``, ``masq.config``, ...). Once it is
imported, transformers' ``from_pretrained`` loads masq's packed checkpoints (``masq.export.registration``).
"""

from masq.export.registration import register_with_transformers

__version__ = "0.1.0"

register_with_transformers()
