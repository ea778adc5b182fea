"""How many bits each linear gets under one budget."""
