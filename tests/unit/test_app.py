"""What Serve is told of the two deployments: the options that only their builders know."""

from __future__ import annotations

import pytest

from remote_vae_serve.app import SHUTDOWN_S, environment_of, ingress, vae
from remote_vae_serve.config import IngressConfig, VAEConfig


@pytest.mark.parametrize(
    "application",
    [
        ingress(IngressConfig(request_timeout_s=1234)),
        vae(VAEConfig(source="nowhere", fake={"decode_s": 0.0}, request_timeout_s=1234)),
    ],
    ids=["ingress", "vae"],
)
def test_a_replica_that_is_to_go_has_the_time_out_of_its_door_for_what_it_has_begun(application: object) -> None:
    assert SHUTDOWN_S > 0
    config = application._bound_deployment._deployment_config  # type: ignore[attr-defined]
    assert config.graceful_shutdown_timeout_s == 1234 + SHUTDOWN_S


def test_where_a_decode_runs_on_the_cpu_freed_memory_is_kept_and_waiting_threads_sleep() -> None:
    config = VAEConfig(source="demo")
    assert environment_of(config, 0) == {"env_vars": {"MALLOC_ARENA_MAX": "1", "OMP_WAIT_POLICY": "passive"}}
    assert environment_of(config, 1) == {}
    assert environment_of(VAEConfig(source="nowhere", fake={"decode_s": 0.0}), 0) == {}
