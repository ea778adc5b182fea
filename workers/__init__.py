"""The Celery worker: claims a job, supervises one child process that runs it, publishes the result. Linux only."""
