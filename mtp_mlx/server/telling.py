"""The routes that only tell: models, health, properties, counters, tokens of a text, the page."""

import asyncio
import time
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Response
from starlette.responses import HTMLResponse

from mtp_mlx.generation import check_tokens
from mtp_mlx.prompts import check_text
from mtp_mlx.server.asking import Asking
from mtp_mlx.server.metrics import Metrics
from mtp_mlx.server.refusal import DOCUMENTED
from mtp_mlx.server.service import Service
from mtp_mlx.server.spelling import token_text
from mtp_mlx.server.wire import DetokenizeRequest, TemplateRequest, TokenizeRequest

_PLACEHOLDER = "<!doctype html><title>mtp-mlx</title><p>mtp-mlx is running. Its API is under <code>/v1</code>."
# Scripts and styles come with the page, and it talks to nobody but this server.
_PAGE = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' "
    "'unsafe-inline'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


class Telling:
    """Answers what asks about the server."""

    def __init__(self, service: Service, asking: Asking, metrics: Metrics):
        self._service, self._asking, self._metrics = service, asking, metrics
        self._created = int(time.time())

    def router(self) -> APIRouter:
        router = APIRouter(responses=DOCUMENTED)
        router.get("/models", summary="List the one model that is served")(self.models)
        router.get("/models/{name:path}", summary="What is served under that name")(self.model)
        router.get("/health", summary="Whether requests are answered")(self.health)
        return router

    def llama_router(self) -> APIRouter:
        router = APIRouter(responses=DOCUMENTED)
        router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)(self.page)
        router.get("/props", summary="What the server is and was started with")(self.props)
        router.get("/metrics", summary="Counters in Prometheus' format", response_class=Response)(self.metrics)
        router.post("/tokenize", summary="Token ids of a text")(self.tokenize)
        router.post("/detokenize", summary="The text of token ids")(self.detokenize)
        router.post("/apply-template", summary="A conversation as the model reads it")(self.apply_template)
        return router

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._model()]}

    async def model(self, name: str) -> dict[str, Any]:
        self._service.check_name(name)
        return self._model()

    async def health(self) -> dict[str, Any]:
        load = self._service.engine.load
        return {"status": "ok", "live": load.live, "waiting": load.waiting}

    async def page(self) -> HTMLResponse:
        page = files("mtp_mlx.server") / "page.html"
        return HTMLResponse(page.read_text("utf-8") if page.is_file() else _PLACEHOLDER, headers=_PAGE)

    async def props(self) -> dict[str, Any]:
        service = self._service
        template = service.tokenizer.chat_template
        return {
            "default_generation_settings": {"n_ctx": service.context, "params": vars(service.defaults)},
            "total_slots": service.slots,
            "model_alias": service.name,
            "model_path": service.names[-1],
            "chat_template": template if isinstance(template, str) else "",
            "modalities": {"vision": False, "audio": False},
            "infill": service.infill is not None,
            **service.facts,
        }

    async def metrics(self) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def tokenize(self, body: TokenizeRequest) -> dict[str, Any]:
        self._service.check_name(body.model)
        check_text(body.content)
        return {"tokens": await asyncio.to_thread(self._tokens, body)}

    async def detokenize(self, body: DetokenizeRequest) -> dict[str, str]:
        self._service.check_name(body.model)
        check_tokens(body.tokens, self._service.vocabulary)
        return {"content": await asyncio.to_thread(self._service.tokenizer.decode, body.tokens)}

    async def apply_template(self, body: TemplateRequest) -> dict[str, str]:
        self._service.check_name(body.model)
        return {"prompt": await asyncio.to_thread(self._asking.template, body)}

    def _tokens(self, body: TokenizeRequest) -> list[Any]:
        tokenizer = self._service.tokenizer
        ids: list[int] = tokenizer.encode(body.content, add_special_tokens=body.add_special)
        if not body.with_pieces:
            return ids
        return [{"id": token, "piece": token_text(tokenizer, token)} for token in ids]

    def _model(self) -> dict[str, Any]:
        service = self._service
        return {
            "id": service.name,
            "object": "model",
            "created": self._created,
            "owned_by": "mtp-mlx",
            "aliases": list(service.names[1:]),
            "context_length": service.context,
            "max_model_len": service.context,
            "meta": {
                "n_ctx": service.context,
                "n_ctx_train": service.trained_context,
                "n_vocab": service.vocabulary,
                "size": service.facts.get("weights_bytes"),
                "drafter": service.facts.get("drafter"),
            },
            "capabilities": self._capabilities(),
        }

    def _capabilities(self) -> list[str]:
        service = self._service
        told = {
            "completion": True,
            "chat": service.conversations.has_template,
            "tools": service.conversations.has_template and service.dialect.syntax != "none",
            "infill": service.infill is not None,
        }
        return [name for name, has in told.items() if has]
