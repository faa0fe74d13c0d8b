"""The application: routes, what guards them, and how errors are told."""

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from mtp_mlx.errors import MTPError
from mtp_mlx.server.answer import fault
from mtp_mlx.server.asking import Asking
from mtp_mlx.server.guard import Access, Guard
from mtp_mlx.server.ledger import Account, Ledger
from mtp_mlx.server.limits import Limits
from mtp_mlx.server.metrics import Metrics
from mtp_mlx.server.refusal import RefusedError, refusal, unfit
from mtp_mlx.server.service import Service
from mtp_mlx.server.telling import Telling
from mtp_mlx.server.writing import Writing


def make_app(service: Service, limits: Limits | None = None, access: Access | None = None) -> FastAPI:
    """An application that serves one service. `access` says who may ask; by default clients on this machine."""
    limits = limits or Limits()
    # The pages that FastAPI has for its documentation load scripts from elsewhere.
    app = FastAPI(title="mtp-mlx", docs_url=None, redoc_url=None, redirect_slashes=False)
    metrics = Metrics(service.engine)
    asking = Asking(service, limits)
    writing, telling = Writing(service, asking, limits), Telling(service, asking, metrics)
    for router in (writing.router(), telling.router()):
        app.include_router(router, prefix="/v1")
        app.include_router(router, include_in_schema=False)
        metrics.routes |= {prefix + path for path in _paths(router) for prefix in ("", "/v1")}
    for router in (writing.llama_router(), telling.llama_router()):
        app.include_router(router)
        metrics.routes |= _paths(router)
    app.add_middleware(Guard, access=access or Access(), limits=limits)
    app.add_middleware(Ledger, metrics=metrics)
    _tell_errors(app, ", ".join(sorted(metrics.routes)))
    return app


def _paths(router: APIRouter) -> set[str]:
    return {route.path for route in router.routes if isinstance(route, APIRoute)}


def _tell_errors(app: FastAPI, routes: str) -> None:
    """Every error leaves in the same shape."""

    @app.exception_handler(RefusedError)
    async def refused(request: Request, error: RefusedError) -> JSONResponse:
        return error.response()

    @app.exception_handler(MTPError)
    async def failed(request: Request, error: MTPError) -> JSONResponse:
        return refusal(error).response()

    @app.exception_handler(RequestValidationError)
    async def misfit(request: Request, error: RequestValidationError) -> JSONResponse:
        return unfit(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def lost(request: Request, error: HTTPException) -> JSONResponse:
        return _explained(request, error, routes).response()

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        account: Account = request.state.account
        account.status = 500
        answer = fault(account).response()
        answer.headers["X-Request-Id"] = account.id
        return answer


def _explained(request: Request, error: HTTPException, routes: str) -> RefusedError:
    where = f"{request.method} {request.url.path}"[:120]
    if error.status_code == 404:
        return RefusedError(404, f"there is no {where}; there are {routes}", code="no_route")
    if error.status_code == 405:
        return RefusedError(405, f"{where} is not served; use another method", headers=error.headers)
    return RefusedError(error.status_code, str(error.detail), headers=error.headers)
