"""`Ingress`: the Serve deployment at `/`. Parses HTTP (`http`) and routes by model (`catalogue`) over Ray handles. Knows no
torch: it never touches a latent."""

from __future__ import annotations

from typing import Any

from starlette.applications import Starlette

from remote_vae.errors import ModelFailed, ModelStarting
from remote_vae_serve.catalogue import Catalogue
from remote_vae_serve.config import IngressConfig
from remote_vae_serve.http import Decoder, create_app


class Ingress:
    """The models of the cluster, as an HTTP app."""

    def __init__(self, config: IngressConfig) -> None:
        self._config = config
        self._catalogue = Catalogue(config.models)

    def __serve_build_asgi_app__(self) -> Starlette:
        """Serve calls this after the constructor and serves what it returns."""
        return create_app(self, int(self._config.max_body_mib * 2**20), self._config.deadline_s)

    def find(self, name: str) -> Decoder:
        """The way to a model. Raises UnknownModel, ModelFailed or ModelStarting."""
        model = self._catalogue.get(name)
        if model.transport is not None:
            return model.transport.send_one_async
        if model.state == "failed":
            raise ModelFailed(f"{name} could not be deployed: {model.reason}", retry_after=30)
        raise ModelStarting(f"{name} is being deployed; try again", retry_after=2)

    def describe(self, name: str) -> dict[str, Any]:
        return self._catalogue.get(name).describe()

    def names(self) -> list[str]:
        return self._catalogue.names()
