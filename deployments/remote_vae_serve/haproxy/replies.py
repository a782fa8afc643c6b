"""What HAProxy says on its own account, as the contract's JSON: lines of its configuration.

Quoted as a shell would: HAProxy reads its configuration so. `%[...]` is its own language for what only a request tells.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from remote_vae import errors
from remote_vae.errors import BadRequest, RemoteVAEError
from remote_vae_serve.middleware import serve_errors

ID = "%[unique-id]"
# Cut before it is escaped, so that no escape is cut in two.
PATH = f"%[path,bytes(0,{serve_errors.PATH_LENGTH}),json(ascii)]"
_ID, _PATH = "REQUEST-ID", "THE-PATH"
"""What stands for them until the percent signs of a sentence are escaped."""


def http_errors() -> Iterator[str]:
    """Of a section `defaults`: HAProxy's own errors once it has read the headers of a request.

    Before that its 400 and 408 are HTML that is compiled in: its parser of HTTP/1 (`h1_send_error` of mux_h1.c) looks into its
    configuration for no more than whether to say nothing at all.
    """
    for status, error in (
        (400, BadRequest("The body of the request is no well-formed HTTP, or stopped coming")),
        (502, serve_errors.broke_off()),
        (503, serve_errors.cannot_answer()),
        (504, serve_errors.timed_out()),
    ):
        yield f"http-error {_reply(error, status)}"


def no_application() -> str:
    """Of the backend that has no server: no application is at the path. Without one, as in `OPTIONS *`, the path is empty."""
    error = serve_errors.nothing_at(_PATH)
    return f"http-request return {_reply(error, error.status)}"


def _reply(error: RemoteVAEError, status: int) -> str:
    error.request_id = _ID
    _, headers, body = errors.render(error)
    content_type = headers.pop("content-type")
    said = "".join(f" hdr {name} {value}" for name, value in (headers | {"x-request-id": ID}).items())
    text = body.decode().replace("%", "%%").replace(_ID, ID).replace(_PATH, PATH)
    return f"status {status} content-type {content_type}{said} lf-string {shlex.quote(text)}"
