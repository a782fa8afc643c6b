"""`YieldWhenIdle`: the autoscaling policy of models that scale to zero. The last replica of an idle model goes after `idle_s`,
or at once when another model waits for what it holds; of a busy one, when the other has waited for `turn_s`.

The policy is named in serve_config.yaml; it runs in Serve's controller, which gets this module by value: keep its imports few.
`ask_to_yield` is how the ingress tells it that somebody waits, through Ray's key-value store: the controller holds every policy
and none of them sees another's deployment. `gives_way` is how the ingress hears that a model has yielded: Serve starts a replica
for any request that waits for one, whatever the policy says, and it would race for the GPU with the one that it went for.
"""

from __future__ import annotations

import logging
import math
import time
from typing import Any

from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy
from ray.serve.config import AutoscalingContext

from remote_vae.ray_internals import key_value_store

logger = logging.getLogger("ray.serve")
_get, _put = key_value_store()  # Ray's own functions: what is shipped by value must not ask for a module of ours

IDLE_S = 900.0
TURN_S = 5.0
"""Longer than `look_back_period_s` and `metrics_interval_s` together: Serve still counts the requests that waited for a replica's
start for so long, and a model that gave way meanwhile would have another started at once."""
ASKED_FOR_S = 6.0
"""How long a request to yield counts; the ingress renews it while somebody waits."""
GIVES_WAY_S = 2.0
"""How long it counts that a model gives way; its policy renews it, so that one that is no more holds nobody up."""
NOTICE_S = 1.0
"""For so long it is said that a model gives way before its last replica goes: a request that is on its way to it is answered yet,
and does not wait for a replica, for which Serve would start one."""
USED = "remote_vae_used"
"""Autoscaling metric of a replica, 0 or 1: whether it has decoded or encoded since it was last asked. Serve's own count of what
runs has a GET among it."""
FRESH_S = 5.0
"""Of a replica that has just started Serve knows no requests yet: for so long it is not idle."""


class YieldWhenIdle:
    """Serve's default policy, except that the last replica stays until the model has been idle for `idle_s`, goes at once if it
    was asked to yield while idle, and takes turns with who asks while it is busy: one replica goes after `turn_s`, finishes what
    it has begun, and comes again when nobody asks any more. Serve's `downscale_to_zero_delay_s` comes on top: set it to 0.

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
        self._running_since: float | None = None
        self._asked_since: float | None = None
        self._gives_way_since: float | None = None
        self._left = math.inf

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        desired, state = replica_queue_length_autoscaling_policy(context)
        if (used := _is_used(context)) is not None:
            desired = max(desired, 1) if used else 0
        now, running = time.monotonic(), context.current_num_replicas
        asked = asked_to_yield(str(context.app_name))
        if not running:
            self._running_since = None
        elif self._running_since is None:  # it has come, though perhaps out of turn: it answers those who wait for it
            self._running_since, self._asked_since, self._left = now, None, math.inf
        desired = min(desired, self._turns_left(now, running, asked))
        if self._running_since is None or desired > 0:
            self._idle_since = None
        else:
            self._idle_since = now if self._idle_since is None else self._idle_since
            if asked and now - self._running_since >= FRESH_S:
                self._left = 0
            desired = 0 if now - self._idle_since >= self._idle_s else 1
        if self._left > 0:
            self._gives_way_since = None
        else:
            self._gives_way_since = now if self._gives_way_since is None else self._gives_way_since
            _say("gives-way", str(context.app_name))
            desired = 1 if running and now - self._gives_way_since < NOTICE_S else 0
        return desired, state

    def _turns_left(self, now: float, running: int, asked: bool) -> float:
        """How many replicas a busy model may have: one less after each turn of being asked, until nobody asks. The next turn ends
        only once the replica of the one before has gone, for which Serve has a delay of its own."""
        if not asked:
            self._asked_since, self._left = None, math.inf
        elif running == 0:
            self._asked_since = None
        else:
            self._asked_since = now if self._asked_since is None else self._asked_since
            if now - self._asked_since >= self._turn_s and running <= self._left:
                self._asked_since, self._left = now, running - 1
        return self._left


def _is_used(context: AutoscalingContext) -> bool | None:
    """Whether a request waits for the model, or a replica of it has worked within `look_back_period_s`.

    None where a replica has not told yet: Serve's own count is all there is."""
    told = (context.aggregated_metrics or {}).get(USED, {})
    if not told or any(replica not in told for replica in context.running_replicas):
        return None
    return bool(context.total_queued_requests) or any(told.values())


def ask_to_yield(application: str) -> None:
    """Ask a model to give up a replica: its last one at once if it is idle, else when its turn is over."""
    _say("asked-to-yield", application)


def take_back(application: str) -> None:
    """Nobody waits any more for what a model was asked to give up: it may come again."""
    _put(_key("asked-to-yield", application), b"0", overwrite=True)


def asked_to_yield(application: str) -> bool:
    """Whether somebody asked within the last seconds."""
    return _was_said("asked-to-yield", application, ASKED_FOR_S)


def gives_way(application: str) -> bool:
    """Whether a model has yielded its last replica, and is still asked for what that held: a request for it is to wait."""
    return _was_said("gives-way", application, GIVES_WAY_S) and asked_to_yield(application)


def _say(what: str, application: str) -> None:
    _put(_key(what, application), str(time.time()).encode(), overwrite=True)


def _was_said(what: str, application: str, within_s: float) -> bool:
    said = _get(_key(what, application))
    return bool(said) and time.time() - float(said) < within_s


def _key(what: str, application: str) -> bytes:
    return f"remote-vae/{what}/{application}".encode()
