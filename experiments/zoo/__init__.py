"""Every architecture of transformers and timm, and random networks."""
