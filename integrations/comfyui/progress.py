"""`Progress`: what a node shows while it waits for the server, by ComfyUI's own means: a bar, a line of text; and the user's
*Interrupt*, which ends the wait."""

from __future__ import annotations

import logging
import sys
from typing import Any

from remote_vae import Waiting

logger = logging.getLogger(__name__)
WHOLE = 1000
"""Steps of the bar."""
UNKNOWN_S = 2.0
"""By then the server has said what is waited for, or there is none that says it."""


class Progress:
    """An `on_wait` for one call to the server. Where these nodes run without ComfyUI, or with one that lacks a part of this, that
    part is not shown."""

    def __init__(self) -> None:
        self._bar = _bar()
        self._text = self._logged = ""

    def __call__(self, waiting: Waiting) -> None:
        """Raises ComfyUI's InterruptProcessingException once its user has interrupted."""
        if (management := _module("comfy.model_management")) is not None:
            management.throw_exception_if_processing_interrupted()
        if self._bar is not None:
            self._bar.update_absolute(round(WHOLE * share(waiting)), WHOLE)
        text = f"Remote VAE: {waiting}"
        if text != self._text and (waiting.state != "waiting" or waiting.seconds > UNKNOWN_S):
            self._text = text
            _say(text)
        if waiting.reason not in ("", self._logged):
            self._logged = waiting.reason
            logger.info(text)


def share(waiting: Waiting) -> float:
    """How much of what is waited for is done, 0 to 1, as far as it can be told; not of the whole call."""
    if waiting.state == "receiving":
        return waiting.received / waiting.total if waiting.total else 0.0
    if waiting.state == "starting" and waiting.expected_s:
        return min(waiting.seconds / waiting.expected_s, 1.0)
    return 0.0


def _module(name: str) -> Any:
    """A module of ComfyUI's; it has loaded them before it runs a node. None without ComfyUI."""
    return sys.modules.get(name)


def _bar() -> Any:
    make = getattr(_module("comfy.utils"), "ProgressBar", None)
    return None if make is None else make(WHOLE)


def _say(text: str) -> None:
    """Under the node that runs."""
    prompts = getattr(getattr(_module("server"), "PromptServer", None), "instance", None)
    send, node = getattr(prompts, "send_progress_text", None), _node(prompts)
    if send is not None and node is not None:
        send(text, node)


def _node(prompts: Any) -> str | None:
    """The id of the node that runs: that of the VAE's user, not of the one that loaded it."""
    executing = getattr(_module("comfy_execution.utils"), "get_executing_context", lambda: None)()
    return getattr(executing, "node_id", None) or getattr(prompts, "last_node_id", None)
