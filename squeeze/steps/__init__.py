"""What a step of a job takes, a class for each method."""
