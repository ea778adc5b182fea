"""What `vocabulary` needs: tokenizers, the tokens that texts need, the trimmed model's quality."""
