"""The only table from error codes to HTTP, and the only place that writes the error envelope."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request

from autovibe import schemas
from autovibe.domain.columns import now
from autovibe.errors import AutovibeError, InternalError, InvalidRequest, NotFound, RateLimited, Unavailable

logger = logging.getLogger(__name__)

HTTP_STATUS: dict[str, int] = {
    "ERROR": 500,
    "INVALID_REQUEST": 400,
    "UNAUTHORIZED": 401,
    "FORBIDDEN": 403,
    "NOT_FOUND": 404,
    "CONFLICT": 409,
    "IDEMPOTENCY_MISMATCH": 409,
    "RESOURCE_LIMIT_EXCEEDED": 409,
    "RATE_LIMITED": 429,
    "UNAVAILABLE": 500,
    "HYPERVISOR_UNAVAILABLE": 500,
    "GUEST_UNREACHABLE": 500,
    "DATABASE_UNAVAILABLE": 500,
    "OPERATION_FAILED": 500,
    "HYPERVISOR_TASK_FAILED": 500,
    "HYPERVISOR_REFUSED": 500,
    "GUEST_COMMAND_FAILED": 500,
    "PROVISION_FAILED": 500,
    "DEADLINE_EXCEEDED": 500,
    "INSUFFICIENT_SPACE": 500,
    "CONFIGURATION_ERROR": 500,
    "INTERNAL_ERROR": 500,
}

_RETRY_AFTER_SECONDS = 5


def envelope(error: AutovibeError, request_id: str) -> JSONResponse:
    """The error as every v1 route answers it."""
    body = schemas.ErrorReply(
        error=schemas.ErrorBody(
            code=error.code, message=error.message, details=error.details, request_id=request_id, timestamp=now()
        )
    )
    headers = {}
    if isinstance(error, Unavailable):
        headers["Retry-After"] = str(_RETRY_AFTER_SECONDS)
    if isinstance(error, RateLimited):
        headers["Retry-After"] = str(error.details.get("retry_after_seconds", _RETRY_AFTER_SECONDS))
    if error.code == "UNAUTHORIZED":
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body.model_dump(mode="json"), HTTP_STATUS.get(error.code, 500), headers)


def install(app: FastAPI) -> None:
    """Give `app` the envelope for every way a request can go wrong."""
    app.add_exception_handler(AutovibeError, _known)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _of_the_framework)
    app.add_exception_handler(Exception, _crashed)


def request_id_of(request: Request) -> str:
    return str(getattr(request.state, "request_id", "-"))


async def _known(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, AutovibeError):
        raise error
    status = HTTP_STATUS.get(error.code, 500)
    logger.log(
        logging.WARNING if status >= 500 else logging.INFO,
        "%s: %s%s",
        error.code,
        error.message,
        f" ({error.log_detail})" if error.log_detail else "",
        exc_info=error if isinstance(error, InternalError) else None,
    )
    return envelope(error, request_id_of(request))


async def _malformed(request: Request, error: Exception) -> JSONResponse:
    faults = error.errors() if isinstance(error, RequestValidationError) else []
    fields = [
        {"field": ".".join(str(part) for part in fault["loc"]), "message": fault["msg"], "type": fault["type"]}
        for fault in faults[:50]
    ]
    sentence = "; ".join(f"{fault['field']}: {fault['message']}" for fault in fields[:5])
    text = f"The request is malformed: {sentence.rstrip('.')}."
    kind = request.headers.get("content-type", "")
    if request.method == "POST" and "json" not in kind:
        text += f" Send JSON with 'Content-Type: application/json', not '{kind[:60]}'."
    return envelope(InvalidRequest(text, details={"fields": fields}), request_id_of(request))


async def _of_the_framework(request: Request, error: Exception) -> JSONResponse:
    status = error.status_code if isinstance(error, HTTPException) else 500
    known: AutovibeError
    if status in (404, 405):
        known = NotFound(f"There is no route '{request.method} {request.url.path}'.")
    elif status < 500:
        known = InvalidRequest(_sentence(getattr(error, "detail", "")) or InvalidRequest().message)
    else:
        known = InternalError()
    return envelope(known, request_id_of(request))


async def _crashed(request: Request, error: Exception) -> JSONResponse:
    logger.error("%s %s met a defect.", request.method, request.url.path, exc_info=error)
    return envelope(InternalError(), request_id_of(request))


def _sentence(detail: Any) -> str:
    text = str(detail or "").strip()
    return text if not text or text.endswith(".") else f"{text}."
