"""Video-Free LoRA: new characters for an image-to-video model, from still images alone."""

__version__ = "0.1.0"
