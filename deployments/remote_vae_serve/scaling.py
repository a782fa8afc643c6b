"""`YieldWhenIdle`: the autoscaling policy of models that scale to zero. The last replica of an idle model goes after `idle_s`,
or at once when another model waits for what it holds; of a busy one, when the other has waited for `turn_s`.

The policy is named in serve_config.yaml; it runs in Serve's controller, which gets this module by value: keep its imports few.
`ask_to_yield` is how the ingress tells it that somebody waits, through Ray's key-value store: the controller holds every policy
and none of them sees another's deployment.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy
from ray.serve.config import AutoscalingContext

from remote_vae.ray_internals import key_value_store

logger = logging.getLogger("ray.serve")
_get, _put = key_value_store()  # Ray's own functions: what is shipped by value must not ask for a module of ours

IDLE_S = 900.0
TURN_S = 10.0
ASKED_FOR_S = 6.0
"""How long a request to yield counts; the ingress renews it while somebody waits."""


class YieldWhenIdle:
    """Serve's default policy, except that the last replica stays until the model has been idle for `idle_s`, goes at once if it
    was asked to yield while idle, and takes turns with who asks while it is busy: one replica goes after `turn_s`, finishes what
    it has begun, and comes again when it is its turn. Serve's `downscale_to_zero_delay_s` comes on top: set it to seconds.

    Args:
        idle_s: seconds without a request after which the last replica goes.
        turn_s: seconds that another model waits for what a busy one holds.
        mistakes: whatever else stands under `policy_kwargs`. It is logged and left aside, and so are seconds that are no
            number: to raise here would stop Serve's controller, and with it every model, again and again.
            `remote-vae-serve check` refuses both.
    """

    def __init__(self, idle_s: float = IDLE_S, turn_s: float = TURN_S, **mistakes: object) -> None:
        if not isinstance(idle_s, (int, float)):
            mistakes["idle_s"], idle_s = idle_s, IDLE_S
        if not isinstance(turn_s, (int, float)):
            mistakes["turn_s"], turn_s = turn_s, TURN_S
        if mistakes:
            logger.error(
                "policy_kwargs of YieldWhenIdle: %s mean nothing; known are idle_s and turn_s, in seconds", mistakes
            )
        self._idle_s, self._turn_s = idle_s, turn_s
        self._idle_since: float | None = None
        self._asked_since: float | None = None

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        desired, state = replica_queue_length_autoscaling_policy(context)
        if desired > 0 and self._is_turn_over(context):
            return context.current_num_replicas - 1, state
        if context.current_num_replicas == 0 or desired > 0:
            self._idle_since = None
            return desired, state
        if self._idle_since is None:
            self._idle_since = time.monotonic()
        goes = time.monotonic() - self._idle_since >= self._idle_s or asked_to_yield(str(context.app_name))
        return 0 if goes else 1, state

    def _is_turn_over(self, context: AutoscalingContext) -> bool:
        """Whether somebody has waited, all the time, for as long as a busy model may keep what it holds."""
        if context.current_num_replicas == 0 or not asked_to_yield(str(context.app_name)):
            self._asked_since = None
            return False
        if self._asked_since is None:
            self._asked_since = time.monotonic()
        return time.monotonic() - self._asked_since >= self._turn_s


def ask_to_yield(application: str) -> None:
    """Ask a model to give up a replica: its last one at once if it is idle, else when its turn is over."""
    _put(_key(application), str(time.time()).encode(), overwrite=True)


def asked_to_yield(application: str) -> bool:
    """Whether somebody asked within the last seconds."""
    asked = _get(_key(application))
    return bool(asked) and time.time() - float(asked) < ASKED_FOR_S


def _key(application: str) -> bytes:
    return b"remote-vae/asked-to-yield/" + application.encode()
