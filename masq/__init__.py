"""masq: an open framework for post-training quantization of multimodal language models.

Importing this package loads nothing heavy; import the room you need (``masq.run``, ``masq.config``, ...).
"""

__version__ = "0.1.0"
