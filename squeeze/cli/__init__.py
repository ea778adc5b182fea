"""The command line: `squeeze`.

Exit codes: 0 done; 1 the job failed or was cancelled; 2 the command line or the request is wrong, or a local file can't
be read or written; 3 the service can't be reached or can't answer; 130 interrupted (a job that was waited for goes on).
Results go to standard output, progress and errors to standard error.
"""

from squeeze.cli.main import main

__all__ = ["main"]
