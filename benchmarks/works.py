"""The works, each a question with a goal. Those of HTTP are here; those of memory, handles and routing in inside.py."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import bare_serve
from benchmarks.contenders import Ours, Peer, bare_loop
from benchmarks.costs import costs
from benchmarks.findings import Finding, Goal, figure
from benchmarks.turns import REQUESTS, Request, Settings, Turns

Run = Callable[[Ours, Settings], Finding]

DIRECT, INGRESS = "ours, direct door", "ours, ingress"
BARE, FASTAPI, LITSERVE, LOOP = "bare uvicorn", "FastAPI", "LitServe", "bare loop"
SERVE, RELAYED = "bare Ray Serve", "bare Ray Serve, ingress and handle"
ONE_URL, WRITTEN = "ours, /<model>", "ours, direct door by hand"
SMALL = Request((1, 4, 64, 64), {"output_type": "pt", "partial_postprocess": "True"})
LARGE = Request((1, 4, 256, 512), {"output_type": "pt", "partial_postprocess": "True"})
PICTURE = (1, 4, 128, 128)
DEVICE_S = 0.02
LEAN = (
    "The goals that are ratios to bare uvicorn were set with a client that it answered in 0.4 to 0.6 ms. The one of this "
    "benchmark costs a fifth of that, and `requests` more; ratios by it and by `requests` have them between them."
)


@dataclass(frozen=True)
class Work:
    """One work.

    Attributes:
        number: as chosen with `--only`; letters tell its parts.
        haproxy: which of our servers it is for.
        models: what that server must hold.
        more: applications besides.
    """

    number: str
    haproxy: bool
    models: Mapping[str, dict[str, Any]]
    run: Run
    more: tuple[dict[str, Any], ...] = field(default_factory=tuple)


def fake(pixels: tuple[int, int], **wait: float) -> dict[str, Any]:
    return {"fake": {"pixels": list(pixels), **wait}}


def serving_alone(ours: Ours, settings: Settings) -> Finding:
    job = {"pixels": [320, 320], "seconds": 0, "output": "raw", "shape": list(SMALL.shape)}
    with ExitStack() as stack:
        peers = {name: stack.enter_context(Peer(which, job)).url
                 for name, which in ((BARE, "bare"), (FASTAPI, "fastapi"), (LITSERVE, "litserve"))}  # fmt: skip
        contenders = {DIRECT: ours.direct("instant"), SERVE: ours.bare, **peers}
        turns = Turns(contenders, SMALL, settings, with_requests=True)
    goals = (
        Goal.of("p50 of one client, of bare uvicorn's", turns.p50(DIRECT, 1), turns.p50(BARE, 1), 6),
        by_requests(turns, DIRECT, 6),
        Goal.of("rate of 8 clients, of LitServe's", turns.rate(DIRECT, 8), turns.rate(LITSERVE, 8), 2, at_least=True),
    )
    title = "Serving alone: 64 KiB in, 300 KiB out, nothing between; at the model's own path, HAProxy"
    same = _same(turns.body(DIRECT), turns.body(FASTAPI), turns.body(LITSERVE))
    return Finding("1", title, tuple(turns.figures()), goals, (*turns.notes(), same, _floor(turns), LEAN))


def by_requests(turns: Turns, ours: str, limit: float) -> Goal:
    """The same goal with the client that diffusers' users have: the other one, of a tenth of a millisecond, nobody has."""
    return Goal.of(
        "the same by the library requests, of bare uvicorn's",
        turns.p50(ours, REQUESTS),
        turns.p50(BARE, REQUESTS),
        limit,
    )


def through_the_ingress(number: str, how: str, limit: float) -> Run:
    def run(ours: Ours, settings: Settings) -> Finding:
        job = {"pixels": [320, 320], "seconds": 0, "output": "raw", "shape": list(SMALL.shape)}
        with Peer("bare", job) as bare:
            contenders = {
                INGRESS: ours.ingress("instant"),
                DIRECT: ours.direct("instant"),
                SERVE: ours.bare,
                RELAYED: ours.relayed,
                BARE: bare.url,
            }
            turns = Turns(contenders, SMALL, settings, with_requests=True)
        goals = [
            Goal.of("p50 of one client, of bare uvicorn's", turns.p50(INGRESS, 1), turns.p50(BARE, 1), limit),
            by_requests(turns, INGRESS, limit),
        ]
        if how == "HAProxy":
            goals += [
                Goal.of("p50 of one client, of the direct door's", turns.p50(INGRESS, 1), turns.p50(DIRECT, 1), 3),
                Goal.of(
                    "rate of 8 clients, of the direct door's", turns.rate(INGRESS, 8), turns.rate(DIRECT, 8), 0.5, True
                ),
            ]
        else:
            empty = turns.rate(SERVE, 8)
            goals.append(
                Goal.of("rate of 8 clients, of an empty Serve application's", turns.rate(INGRESS, 8), empty, 0.65, True)
            )
        return Finding(
            number,
            f"The same through the ingress, {how}",
            tuple(turns.figures()),
            tuple(goals),
            (*turns.notes(), LEAN, _relay_floor(turns)),
        )

    return run


def one_url(ours: Ours, settings: Settings) -> Finding:
    """The path that the launcher gives a model, beside one that somebody has written for its twin."""
    turns = Turns({ONE_URL: ours.direct("instant"), WRITTEN: ours.direct("twin")}, SMALL, settings)
    goals = (
        Goal.of("p50 of one client, of the direct door's", turns.p50(ONE_URL, 1), turns.p50(WRITTEN, 1), 1.1),
        Goal.of("rate of 8 clients, of the direct door's", turns.rate(ONE_URL, 8), turns.rate(WRITTEN, 8), 0.95, True),
    )
    return Finding("10", "One URL, the model awake, HAProxy", tuple(turns.figures()), goals, tuple(turns.notes()))


def cost(ours: Ours, settings: Settings) -> Finding:
    ways = {
        "small, its own path": (ours.direct("instant"), SMALL),
        "small, ingress": (ours.ingress("instant"), SMALL),
        "small, an empty application": (ours.bare, SMALL),
        "large, its own path": (ours.direct("large"), LARGE),
        "large, ingress": (ours.ingress("large"), LARGE),
    }
    return costs(ours, ways, settings, "11")


def large(ours: Ours, settings: Settings) -> Finding:
    job = {"pixels": [2048, 2048], "seconds": 0, "output": "raw", "shape": list(LARGE.shape)}
    with Peer("bare", job) as bare, Peer("fastapi", job) as fastapi:
        contenders = {DIRECT: ours.direct("large"), SERVE: ours.bare, BARE: bare.url, FASTAPI: fastapi.url}
        turns = Turns(contenders, LARGE, settings)
    goals = (
        Goal.of("p50 of one client, of an empty Serve application's", turns.p50(DIRECT, 1), turns.p50(SERVE, 1), 1.25),
        Goal.of("p50 of one client, of bare uvicorn's", turns.p50(DIRECT, 1), turns.p50(BARE, 1), 1.4),
    )
    title = "2 MiB in, 12 MiB out; at the model's own path, HAProxy"
    return Finding("3", title, tuple(turns.figures()), goals, (*turns.notes(), _floor(turns)))


def busy_device(number: str, image_format: str) -> Run:
    """A device that takes 20 ms an image, and a codec after it."""

    def run(ours: Ours, settings: Settings) -> Finding:
        request = Request(PICTURE, {"image_format": image_format})
        job = {"pixels": [1024, 1024], "seconds": DEVICE_S, "output": image_format, "shape": list(PICTURE)}
        with Peer("fastapi", job) as fastapi, Peer("litserve", job) as litserve:
            contenders = {DIRECT: ours.direct("device"), FASTAPI: fastapi.url, LITSERVE: litserve.url}
            turns = Turns(contenders, request, settings, clients=(8,), seconds=2 * settings.seconds)
        rate = turns.rate(DIRECT, 8)
        against = 1.4 if image_format == "jpg" else 10
        goals = [Goal.of("rate, of FastAPI's", rate, turns.rate(FASTAPI, 8), against, at_least=True)]
        if image_format == "jpg":
            device = figure("the device", "rate", "/s", [1 / DEVICE_S] * len(rate.values))
            goals.insert(0, Goal.of("rate, of the device's own 50/s", rate, device, 0.9, at_least=True))
        same = _same_picture(turns.body(DIRECT), turns.body(FASTAPI), turns.body(LITSERVE))
        title = f"A device busy 20 ms an image, 1024x1024 pixels as {image_format}; 8 clients, direct door, HAProxy"
        ceiling = 1 / DEVICE_S / turns.rate(FASTAPI, 8).median
        most = f"The device alone would make {ceiling:.2f} times FastAPI's rate: no more can be had."
        notes = [*turns.notes(), same, most]
        if image_format == "png":
            notes.append(
                "How long Pillow takes over a PNG, and so this ratio, is the picture's doing: on the machine that this was "
                "written on 442 ms for this one, 256 for docs/demo.png enlarged, 167 for gradients under plain noise."
            )
        return Finding(number, title, tuple(turns.figures()), tuple(goals), tuple(notes))

    return run


def real_decode(number: str, folder: str, latents: int) -> Run:
    def run(ours: Ours, settings: Settings) -> Finding:
        shape = (1, 4, latents, latents)
        job = {"folder": folder, "output": "jpg", "shape": list(shape)}
        loops: list[float] = []
        rounds: list[Turns] = []
        once = Settings(1, settings.seconds)
        with Peer("fastapi", job) as fastapi, Peer("litserve", job) as litserve:
            contenders = {DIRECT: ours.direct("real"), FASTAPI: fastapi.url, LITSERVE: litserve.url}
            for _ in range(settings.repetitions):
                loops.append(bare_loop(job, 2 * settings.seconds))
                rounds.append(Turns(contenders, Request(shape), once, clients=(8,), seconds=2 * settings.seconds))
        rates = {name: figure(name, "rate, 8 clients", "/s", [turns.rate(name, 8).values[0] for turns in rounds])
                 for name in contenders}  # fmt: skip
        loop = figure(LOOP, "rate", "/s", loops)
        goals = (
            Goal.of("rate, of FastAPI's", rates[DIRECT], rates[FASTAPI], 1.15, at_least=True),
            Goal.of("rate, of a bare loop's", rates[DIRECT], loop, 0.95, at_least=True),
        )
        last = rounds[-1]
        same = _same_picture(last.body(DIRECT), last.body(FASTAPI), last.body(LITSERVE))
        title = f"A real decode: AutoencoderTiny, {8 * latents}x{8 * latents} pixels as JPEG; 8 clients, direct door, HAProxy"
        return Finding(number, title, (*rates.values(), loop), goals, (*last.notes(), same))

    return run


def _relay_floor(turns: Turns) -> str:
    """What an ingress on Serve cannot be faster than."""
    direct, relayed = ((turns.p50(who, 1).median, turns.rate(who, 8).median) for who in (DIRECT, RELAYED))
    return (
        f"An empty ingress that has an empty deployment answer, by value, has {relayed[0] / direct[0]:.1f} times the direct "
        f"door's p50 and {relayed[1] / direct[1]:.2f} of its rate: with a handle of Serve's nothing takes less."
    )


def _floor(turns: Turns) -> str:
    ratio = turns.p50(SERVE, 1).median / turns.p50(BARE, 1).median
    return (
        f"An empty application of Ray Serve's takes {ratio:.1f} times what bare uvicorn takes: nothing on Serve takes less. It "
        "is behind the same HAProxy as ours, with a connection for each request, which costs it as much (one_url.md)."
    )


def _same(*bodies: bytes) -> str:
    same = all(body == bodies[0] for body in bodies)
    return "All answers are the same bytes." if same else "The answers are NOT the same bytes."


def _same_picture(*files: bytes) -> str:
    pictures = [np.asarray(Image.open(io.BytesIO(file)), np.float32) for file in files]
    apart = max(float(np.abs(one - pictures[0]).mean()) for one in pictures)
    sizes = ", ".join(f"{len(file) / 1000:.0f}" for file in files)
    verdict = "All answers show the same picture" if apart < 1 else "The answers do NOT show the same picture"
    return f"{verdict} (mean difference {apart:.3f} of 255 at most; {sizes} kB)."


BARE_SMALL = bare_serve.application(320 * 320 * 3)
RELAYED_SMALL = bare_serve.relayed_application(320 * 320 * 3)
HTTP_WORKS = (
    Work("1", True, {"instant": fake((320, 320))}, serving_alone, (BARE_SMALL,)),
    Work(
        "2a", True, {"instant": fake((320, 320))}, through_the_ingress("2a", "HAProxy", 30), (BARE_SMALL, RELAYED_SMALL)
    ),
    Work("3", True, {"large": fake((2048, 2048))}, large, (bare_serve.application(2048 * 2048 * 3),)),
    Work("4", True, {"device": fake((1024, 1024), decode_s=DEVICE_S)}, busy_device("4", "jpg")),
    Work("5", True, {"device": fake((1024, 1024), decode_s=DEVICE_S)}, busy_device("5", "png")),
    Work("10", True, {"instant": fake((320, 320)), "twin": fake((320, 320)) | {"path": "/by/hand"}}, one_url),
    Work("11", True, {"instant": fake((320, 320)), "large": fake((2048, 2048))}, cost, (BARE_SMALL,)),
    Work(
        "2b",
        False,
        {"instant": fake((320, 320))},
        through_the_ingress("2b", "no flag", 60),
        (BARE_SMALL, RELAYED_SMALL),
    ),
)
