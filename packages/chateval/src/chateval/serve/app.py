"""HTTP: the routes, who may ask, streams, and OpenAI's error object for every error.

On a loopback address the Host header must name this machine and a POST must be JSON, so that no other web page can ask
through the user's browser. On any other address clients need a token.
"""

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from chatdata.progress import say
from chateval.ask.generate import Completion
from chateval.ask.subject import Subject, load_subject
from chateval.errors import ChatevalError
from chateval.serve.answer import Answer, ApiError, api_error
from chateval.serve.batching import Batcher
from chateval.serve.request import read_request
from chattrain.run.start import find_device

MAX_BODY = 2**20  # bytes
LOCAL = ("127.0.0.1", "localhost")


def make_app(subject: Subject, batcher: Batcher, token: str | None) -> Starlette:
    """The routes. Without a token the API only answers requests to a local name."""
    about: dict[str, Any] = {"id": Path(subject.label).resolve().name, "object": "model", "created": int(time.time())}
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")

    def check(request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")
        if token and not secrets.compare_digest(given, f"Bearer {token}".encode()):
            raise ApiError(401, "needs the header Authorization: Bearer TOKEN", None, "invalid_api_key")
        if not token and request.headers.get("host", "").partition(":")[0] not in LOCAL:
            raise ApiError(403, f"this server only answers to the names {' and '.join(LOCAL)}")

    async def list_models(request: Request) -> Response:
        check(request)
        return JSONResponse({"object": "list", "data": [{**about, "owned_by": "chateval"}]})

    async def complete(request: Request) -> Response:
        check(request)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "needs the header Content-Type: application/json")
        body = bytearray()
        with contextlib.suppress(ClientDisconnect):
            async for chunk in request.stream():  # to its end: a client that is still sending reads no error
                body += chunk[: MAX_BODY + 1 - len(body)]
        if len(body) > MAX_BODY:
            raise ApiError(413, f"a request has at most {MAX_BODY} bytes")
        asked, prompt = read_request(bytes(body), subject, about["id"])
        answer = Answer(prompt, asked.stop, subject.tokenizer, request.receive)
        batcher.submit(answer)
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": asked.model}
        if asked.stream:
            return StreamingResponse(_events(answer, head, asked.stream_options), media_type="text/event-stream")
        content = "".join([text async for text in answer.texts()])
        finish_reason, usage = _ending(answer)
        choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish_reason}
        return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": usage})

    routes = [Route("/v1/models", list_models), Route("/v1/chat/completions", complete, methods=["POST"])]
    routes.append(Route("/", HTMLResponse(page, headers={"x-frame-options": "DENY"}), methods=["GET"]))
    return Starlette(routes=routes, exception_handlers=dict.fromkeys((ApiError, HTTPException, Exception), _show_error))


async def _events(answer: Answer, head: dict[str, Any], options: Mapping[Any, bool]) -> AsyncIterator[str]:
    """Server-sent events. An error after the first byte is the last event."""

    def event(*choices: dict[str, Any], **more: Any) -> str:
        return f"data: {json.dumps({**head, 'object': 'chat.completion.chunk', 'choices': choices, **more})}\n\n"

    yield event({"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})
    try:
        async for text in answer.texts():
            yield event({"index": 0, "delta": {"content": text}, "finish_reason": None})
    except ApiError as error:
        yield f"data: {json.dumps(error.body)}\n\n"
        return
    finish_reason, usage = _ending(answer)
    yield event({"index": 0, "delta": {}, "finish_reason": finish_reason})
    if options.get("include_usage"):
        yield event(usage=usage)
    yield "data: [DONE]\n\n"


def _ending(answer: Answer) -> tuple[str, dict[str, int]]:
    """finish_reason and usage."""
    assert isinstance(answer.end, Completion)
    asked, answered = len(answer.prompt.tokens), len(answer.end.tokens)
    usage = {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered}
    return "length" if answer.end.ending in ("max_tokens", "context") else "stop", usage


async def _show_error(request: Request, error: Exception) -> Response:
    known = api_error(error)
    return JSONResponse(known.body, known.status, {"retry-after": "1"} if known.status in (429, 503) else None)


def serve(checkpoint: Path, host: str, port: int, token: str | None, batch_size: int, device: str | None) -> None:
    """Answer until Ctrl-C, then end the process. Raises ChatevalError without a needed token, OSError for the port."""
    if host not in LOCAL and not token:
        raise ChatevalError(f"--host {host} lets other machines ask: set a --token (or CHATEVAL_TOKEN) for them")
    listener = socket.create_server((host, port))
    subject = load_subject(checkpoint, find_device(device))
    batcher = Batcher(subject, batch_size, lambda: server.should_exit)
    app = make_app(subject, batcher, token)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level="critical", timeout_graceful_shutdown=1))
    say(f"http://{host}:{listener.getsockname()[1]}: {checkpoint} (API at /v1; Ctrl-C stops it)")
    with contextlib.suppress(KeyboardInterrupt):
        server.run([listener])
    os._exit(0)  # the thread may be reading a long prompt, where nothing can stop it
