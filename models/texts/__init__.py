"""From the user's texts to tokens, and text for those who have none."""
