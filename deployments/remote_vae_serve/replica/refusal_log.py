"""`RefusalsWithoutTracebacks`: the log of a replica, in which what a client did wrong is one line and not a stack of ours."""

from __future__ import annotations

import logging

from remote_vae.errors import InternalError, RemoteVAEError


class RefusalsWithoutTracebacks(logging.Filter):
    """For the logger that Serve logs exceptions of a deployment's methods to: some clients are refused all day."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, RemoteVAEError) and not isinstance(error, InternalError):
            record.msg, record.args = f"{record.getMessage()} {error.code}: {error.message}", ()
            record.exc_info = record.exc_text = None
        return True
