"""What a job may ask for as a whole, and what is wrong with it before it runs."""
