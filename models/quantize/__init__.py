"""Weight quantization: one file a method, each a pure function of weights and statistics to codes."""
