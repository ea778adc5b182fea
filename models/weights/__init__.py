"""How weights are held between a method and a format."""
