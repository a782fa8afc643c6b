"""Draining: the doors first, then the models; for so long and no longer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from remote_vae_serve.launcher import graceful_shutdown
from remote_vae_serve.launcher.graceful_shutdown import drain


class Serve:
    """Applications by name, and for how many looks each stays after it was deleted."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        stays: dict[str, float],
        paths: dict[str, str],
        asleep: tuple[str, ...] = (),
    ) -> None:
        self.log: list[str] = []
        self._stays = dict(stays)
        self._going: set[str] = set()
        replica = {"replica_id": "one", "state": "RUNNING"}
        applications = {
            name: {
                "route_prefix": paths.get(name),
                "deployments": {"VAE": {"replicas": [] if name in asleep else [replica]}},
            }
            for name in stays
        }
        monkeypatch.setattr(graceful_shutdown, "serve_details", lambda: {"applications": applications})
        monkeypatch.setattr("ray.serve.delete", self._delete)
        monkeypatch.setattr("ray.serve.status", self._status)
        monkeypatch.setattr(graceful_shutdown, "INTERVAL_S", 0.0)

    def _delete(self, name: str, _blocking: bool) -> None:
        assert not _blocking
        self.log.append(f"delete {name}")
        self._going.add(name)

    def _status(self) -> SimpleNamespace:
        for name in tuple(self._going):
            self._stays[name] -= 1
            if self._stays[name] <= 0:
                self._going.remove(name)
                del self._stays[name]
                self.log.append(f"{name} gone")
        return SimpleNamespace(applications=dict.fromkeys(self._stays))


def test_models_go_when_the_doors_have_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    serve = Serve(monkeypatch, {"sd": 1, "ingress": 3, "flux": 1, "warm": 1}, {"ingress": "/", "warm": "/warm"})
    assert drain(60) == ()
    assert serve.log == ["delete ingress", "delete warm", "warm gone", "ingress gone",
                         "delete sd", "delete flux", *sorted(["sd gone", "flux gone"], key=serve.log.index)]  # fmt: skip


def test_a_model_that_is_being_woken_through_the_ingress_goes_when_that_has_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    serve = Serve(monkeypatch, {"sd": 1, "ingress": 3}, {"ingress": "/", "sd": "/sd"}, asleep=("sd",))
    assert drain(60) == ()
    assert serve.log == ["delete ingress", "ingress gone", "delete sd", "sd gone"]


def test_what_does_not_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    Serve(monkeypatch, {"sd": 1, "ingress": float("inf")}, {"ingress": "/"})
    assert drain(0.01) == ["ingress"]


def test_nothing_to_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    Serve(monkeypatch, {}, {})
    assert drain(60) == ()
