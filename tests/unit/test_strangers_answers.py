"""What Serve, uvicorn and HAProxy themselves answer, word for word, and which of our errors a client gets for it.

tests/serve/test_layers_below.py provokes them; docs/errors.md says when each of them comes.
"""

from __future__ import annotations

import pytest

from remote_vae import errors
from remote_vae.errors import RemoteVAEError

TEXT = "text/plain; charset=utf-8"
HTML = b"<html><body><h1>400 Bad request</h1>\nYour browser sent an invalid request.\n</body></html>\n"
ID = "842c9898-6aa7-4888-9b8c-86f94084fe20"

ANSWERS: dict[str, tuple[int, str, bytes, type[RemoteVAEError], str]] = {
    "uvicorn, malformed": (400, TEXT, b"Invalid HTTP request received.", errors.BadRequest, "Invalid HTTP request"),
    "uvicorn, handshake": (400, TEXT, b"Failed to open a WebSocket connection: missing Sec-WebSocket-Key header.\n",
                           errors.BadRequest, "missing Sec-WebSocket-Key"),
    "uvicorn, no WebSocket": (403, TEXT, b"", errors.BadRequest, "an empty body"),
    "HAProxy, malformed": (400, "text/html", HTML, errors.BadRequest, "Your browser sent an invalid request."),
    "Serve, ingress died": (500, TEXT, b"Internal Server Error", errors.Unavailable, "Internal Server Error"),
    "HAProxy, ingress died": (500, "text/plain", b"Internal Server Error", errors.Unavailable, "Internal Server Error"),
    "some server's page": (500, "text/html", b"<h1>Internal Server Error</h1>", errors.InternalError, "Internal Server Error"),
    "Serve, failed to deploy": (
        503, TEXT, b"Deployment(name='Ingress', app='remote-vae') is unavailable because it failed to deploy.",
        errors.Unavailable, "it failed to deploy"),
    "Serve, no application": (
        404, TEXT, b"Path '/sd-v1' not found. Ping http://.../-/routes for available routes.",
        errors.UnknownRoute, "Path '/sd-v1' not found."),
    "Serve, too late": (
        408, TEXT, b"Request 842c9898-6aa7-4888-9b8c-86f94084fe20 timed out after 0.3s.",
        errors.DeadlineExceeded, "timed out after 0.3s"),
    "HAProxy, too slow": (
        408, "text/html", b"<html><body><h1>408 Request Time-out</h1>\nYour browser didn't send a complete request in time.\n"
        b"</body></html>\n", errors.DeadlineExceeded, "complete request in time"),
    "Serve, full": (
        503, TEXT, b"Request dropped due to backpressure (num_queued_requests=1, max_queued_requests=1).",
        errors.Unavailable, "backpressure"),
    "Serve, full, as 429": (429, TEXT, b"Request dropped due to backpressure", errors.Overloaded, "backpressure"),
    "HAProxy, draining": (503, "text/plain", b"Service Unavailable", errors.Unavailable, "Service Unavailable"),
}  # fmt: skip


@pytest.mark.parametrize("who", ANSWERS)
def test_a_strangers_answer_is_one_of_our_errors_with_its_words_in_one_line(who: str) -> None:
    status, content_type, body, kind, words = ANSWERS[who]
    headers = {"content-type": content_type, "x-request-id": ID, "retry-after": "7"}
    error = errors.parse(status, headers, body)
    assert type(error) is kind
    assert str(status) in error.message
    assert words in error.message
    assert "\n" not in error.message
    assert (error.request_id, error.retry_after) == (ID, 7)
