"""Records of the user's texts, as they stand in files."""
