"""As much of ComfyUI as these nodes use while they wait, with the names and signatures of ComfyUI:
`comfy.model_management`, `comfy.utils.ProgressBar`, `comfy_execution.utils`, `server.PromptServer`."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import pytest
import torch


class InterruptProcessingException(BaseException):
    """As ComfyUI's, which was an Exception once: raised once, and the wish is forgotten."""


@dataclass
class ComfyUI:
    """What its user does and sees.

    Attributes:
        bar: positions, from 0 to 1.
        texts: what stood under the node, and which node that was.
    """

    bar: list[float] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    asked: int = 0
    interrupted: threading.Event = field(default_factory=threading.Event)

    def throw_exception_if_processing_interrupted(self) -> None:
        self.asked += 1
        if self.interrupted.is_set():
            self.interrupted.clear()
            raise InterruptProcessingException

    def modules(self) -> dict[str, ModuleType]:
        """As they stand in `sys.modules` while it runs."""
        comfy = self

        class ProgressBar:
            def __init__(self, total: int, node_id: str | None = None) -> None:
                self.total = total

            def update_absolute(self, value: int, total: int | None = None, preview: object = None) -> None:
                comfy.bar.append(value / (total or self.total))

        class PromptServer:
            last_node_id = "4"

            def send_progress_text(self, text: str, node_id: str, sid: str | None = None) -> None:
                comfy.texts.append((text, node_id))

        PromptServer.instance = PromptServer()  # type: ignore[attr-defined]
        has = {
            "comfy": {},
            "comfy.model_management": {
                "throw_exception_if_processing_interrupted": self.throw_exception_if_processing_interrupted,
                "intermediate_device": lambda: torch.device("cpu"),
            },
            "comfy.utils": {"ProgressBar": ProgressBar},
            "comfy_execution": {},
            "comfy_execution.utils": {"get_executing_context": lambda: SimpleNamespace(prompt_id="p", node_id="7")},
            "server": {"PromptServer": PromptServer},
        }
        made = {name: ModuleType(name) for name in has}
        for name, attributes in has.items():
            for attribute, value in attributes.items():
                setattr(made[name], attribute, value)
        made["comfy"].model_management = made["comfy.model_management"]  # type: ignore[attr-defined]
        return made


@pytest.fixture
def comfyui(monkeypatch: pytest.MonkeyPatch) -> ComfyUI:
    """Runs, with these nodes in it."""
    running = ComfyUI()
    for name, module in running.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return running
