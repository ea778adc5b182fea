"""ggml's block types, which GGUF files hold: their bytes, and an encoder that searches scales. No file, no module."""
