"""What a job takes: memory, operations, time; told beforehand."""
