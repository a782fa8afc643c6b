"""The log of a replica: a refusal is a line, a fault of ours has its traceback."""

from __future__ import annotations

import logging

import pytest

from remote_vae.errors import BadRequest, InternalError, Overloaded
from remote_vae_serve.replica.refusal_log import RefusalsWithoutTracebacks


def logged(error: Exception, caplog: pytest.LogCaptureFixture) -> str:
    """What stands in the log where the error is logged as Serve logs one."""
    logger = logging.getLogger("test_refusal_log")
    kept = RefusalsWithoutTracebacks()
    logger.addFilter(kept)
    try:
        raise error
    except Exception:
        logger.exception("Request failed.")
    finally:
        logger.removeFilter(kept)
    return caplog.text


@pytest.mark.parametrize("error", [BadRequest("shape is 3", parameter="shape"), Overloaded("Full.", retry_after=1)])
def test_a_refusal_is_one_line(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    text = logged(error, caplog)
    assert len(text.splitlines()) == 1
    assert str(error) in text


@pytest.mark.parametrize("error", [ValueError("ours"), InternalError("ours")])
def test_a_fault_of_ours_has_its_traceback(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    assert "Traceback" in logged(error, caplog)
