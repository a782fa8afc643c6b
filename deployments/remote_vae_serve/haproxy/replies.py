"""What HAProxy says on its own account, as the contract's JSON: lines of its configuration.

Quoted as a shell would: HAProxy reads its configuration so. `%[...]` is its own language for what only a request tells.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from remote_vae import errors
from remote_vae.errors import BadRequest, RemoteVAEError
from remote_vae_serve.allowed_origins import ANY, METHODS
from remote_vae_serve.middleware import serve_errors

ID = "%[unique-id]"
# Cut before it is escaped, so that no escape is cut in two.
PATH = f"%[path,bytes(0,{serve_errors.PATH_LENGTH}),json(ascii)]"
_PAGE = "txn.remote_vae_page"
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


def cors(allow_origins: Sequence[str]) -> Iterator[str]:
    """Of the frontend: every answer to a page that is allowed is readable to it, HAProxy's own among them. What an application
    answers says the same already (`middleware.origins`)."""
    for origin in allow_origins:  # a line each: one line holds 64 words
        matches = "found" if origin == ANY else f"str {shlex.quote(origin)}"
        yield f"acl is_allowed_page req.fhdr(origin) -m {matches}"
    said = f"str({ANY})" if ANY in allow_origins else "req.fhdr(origin)"
    yield f"http-request set-var({_PAGE}) {said} if is_allowed_page"
    to_a_page = f"if {{ var({_PAGE}) -m found }}"
    yield f"http-after-response set-header access-control-allow-origin %[var({_PAGE})] {to_a_page}"
    yield f"http-after-response set-header access-control-expose-headers * {to_a_page}"
    yield f"http-after-response add-header vary Origin {to_a_page} !{{ res.hdr(vary) -m sub -i origin }}"


def preflight() -> str:
    """Of the backend that has no server: a preflight is answered there too, or the page could not read that nothing is there."""
    asked = "%[req.fhdr(access-control-request-headers)]"
    return (
        f'http-request return status 200 hdr access-control-allow-methods "{", ".join(METHODS)}" '
        f"hdr access-control-allow-headers {asked} if METH_OPTIONS {{ var({_PAGE}) -m found }} "
        "{ req.fhdr(access-control-request-method) -m found }"
    )


def _reply(error: RemoteVAEError, status: int) -> str:
    error.request_id = _ID
    _, headers, body = errors.render(error)
    content_type = headers.pop("content-type")
    said = "".join(f" hdr {name} {value}" for name, value in (headers | {"x-request-id": ID}).items())
    text = body.decode().replace("%", "%%").replace(_ID, ID).replace(_PATH, PATH)
    return f"status {status} content-type {content_type}{said} lf-string {shlex.quote(text)}"
