"""The application builders that serve_config.yaml names: `ingress` and `vae`. The one file that sees the whole graph.

No `from __future__ import annotations` here: Serve reads the builders' annotations as they stand, and a string would make
it pass the arguments as an unchecked dict.
"""

import logging
from typing import Any

import ray
from ray import serve
from ray.serve import Application

from remote_vae.transports.handle import MODEL_DEPLOYMENT
from remote_vae_serve.config import ASIDE, INGRESS_DEPLOYMENT, IngressConfig, VAEConfig
from remote_vae_serve.engine import threads
from remote_vae_serve.engine.memory import malloc_cache
from remote_vae_serve.ingress.ingress import Ingress
from remote_vae_serve.replica.description import describe_arguments
from remote_vae_serve.replica.replica import VAE

logger = logging.getLogger("ray.serve")

HEALTH_CHECK_PERIOD_S = 2.0
"""Serve replaces a replica after three failed checks. At its own ten seconds that is half a minute of 503s, longer than a client
with the usual three retries waits; a check here takes less than a millisecond."""
QUEUED = 64
"""Requests that wait for a model's first replica, of each process that sends any."""
SHUTDOWN_S = 10.0
"""A replica that is to go has the time-out of its door for the requests it has begun, and this on top. At Serve's own 20 seconds
a video is cut. One that answers nothing goes at once."""


def ingress(args: IngressConfig) -> Application:
    """The application at `/`: HTTP in, routed by model name to the VAE applications of the cluster."""
    deployment = serve.deployment(
        serve.ingress()(Ingress),
        name=INGRESS_DEPLOYMENT,
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": 0},
        max_ongoing_requests=1000,  # it only forwards: each model's own deployment says how much is too much
        graceful_shutdown_timeout_s=args.request_timeout_s + SHUTDOWN_S,
    )
    return deployment.bind(args)


def vae(args: VAEConfig) -> Application:
    """One model: an application of its own, named in the config, with one deployment `VAE`."""
    num_gpus = gpus_of_a_replica(args)
    config = args.model_copy(update={"num_gpus": num_gpus})
    deployment = serve.deployment(
        serve.ingress()(VAE),  # its own HTTP side is reached where the config gives the application a route_prefix
        name=MODEL_DEPLOYMENT,
        ray_actor_options={
            "num_cpus": args.num_cpus,
            "num_gpus": num_gpus,
            "runtime_env": environment_of(args, num_gpus),
        },
        max_ongoing_requests=args.max_requests + ASIDE,  # all that wait are in the replica, where clients take turns
        max_queued_requests=QUEUED,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        graceful_shutdown_timeout_s=args.request_timeout_s + SHUTDOWN_S,
        user_config=describe_arguments(config).to_plain(),
    )
    return deployment.bind(config)


def environment_of(args: VAEConfig, num_gpus: float) -> dict[str, Any]:
    """The `runtime_env` of a replica: where a decode runs on the CPU, what has its process keep memory, and its threads sleep."""
    return {} if num_gpus or args.fake is not None else {"env_vars": malloc_cache.ENVIRONMENT | threads.ENVIRONMENT}


def gpus_of_a_replica(args: VAEConfig) -> float:
    """`num_gpus`, with `auto` resolved by what the live nodes have: right on one machine, wrong where GPU nodes come later."""
    if args.num_gpus != "auto":
        return args.num_gpus
    if args.device == "cpu" or args.fake is not None:
        return 0
    found = any(node["Alive"] and node["Resources"].get("GPU", 0) >= 1 for node in ray.nodes())
    logger.info(
        "num_gpus: auto is %d for %s: %s", found, args.source, "a node has a GPU" if found else "no node has a GPU"
    )
    return 1 if found else 0
