"""The server that `remote-vae-serve run` starts: `serve run`, with the startup probe before it and a graceful shutdown after it.

`python -m remote_vae_serve.launcher.server ADDRESS CONFIG DRAIN_S`
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from os import environ
from pathlib import Path
from types import FrameType

import yaml

from remote_vae.ray_internals import is_haproxy, serve_run, start_serve
from remote_vae_serve.launcher.graceful_shutdown import drain
from remote_vae_serve.launcher.session import end_with_parent
from remote_vae_serve.launcher.startup_probe import MiddlewareMissing, Probe, begin, goes_on, refuse
from remote_vae_serve.middleware.settings import Settings
from remote_vae_serve.model_paths import with_model_paths

INTERVAL_S = 1.0


def main(address: str, path: str, drain_s: float) -> None:
    """Serve the configuration until Ctrl-C or SIGTERM, then let requests in flight finish; a second signal ends that.

    Under HAProxy each model gets a path of its own. Exits with 1 where tokens are set and would not be asked for.

    Args:
        address: of a Ray; `local` starts one.
        path: a serve_config.yaml.
        drain_s: seconds that requests in flight have at the end.
    """
    import ray
    from ray import serve
    from ray.serve.config import ProxyLocation
    from ray.serve.schema import ServeDeploySchema

    settings = Settings.of(environ)
    written = yaml.safe_load(Path(path).read_text())
    if is_haproxy():
        written = with_model_paths(written)
    config = ServeDeploySchema.model_validate(written)
    deployed = False
    try:
        start_serve(address, config)
        with _interrupted_by_sigterm():  # after ray.init, which has a handler of its own that stops everything at once
            probe = Probe(config.http_options.host, bool(config.http_options.ssl_certfile), bool(settings.tokens))
            watching = config.proxy_location is not ProxyLocation.Disabled and begin(probe)
            serve_run(written)
            deployed = True
            while True:
                time.sleep(INTERVAL_S)
                watching = watching and goes_on(probe)
    except MiddlewareMissing as error:
        if address == "local":
            ray.shutdown()  # the whole Ray is ours: sooner gone than Serve, which lets its replicas finish
        elif deployed:
            serve.shutdown()
        refuse(error)
    except KeyboardInterrupt:
        _stop(drain_s if deployed else 0)


def _stop(drain_s: float) -> None:
    from ray import serve

    with _interrupted_by_sigterm():
        try:
            if drain_s > 0:
                print(f"Stopping: requests in flight have {drain_s:g} s to finish; again to stop at once", flush=True)
                if left := drain(drain_s):
                    print(f"After {drain_s:g} s there were still requests for {', '.join(left)}", flush=True)
        except KeyboardInterrupt:
            print("Stopping at once", flush=True)
    serve.shutdown()


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Within it SIGTERM is a KeyboardInterrupt, and SIGINT too, which is ignored where a script runs us in the background."""

    def interrupt(signal_number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    end_with_parent()
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
