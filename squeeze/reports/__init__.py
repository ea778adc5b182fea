"""What a job tells of what it did, part by part."""
