"""The frozen components, the LoRA, and the identity embedder."""
