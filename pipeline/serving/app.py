"""The routes: what is taken, what is refused before its body is read, and what is answered at once.

Routes are plain functions on the event loop. One that needs the model hands a job to the batcher and returns; the answer goes
out from the job's end. So a request costs no task, no future and no switch of context but those of its batch.
"""

import json
import traceback
import urllib.parse
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

import pipeline
from pipeline.errors import nearest
from pipeline.serving import v2
from pipeline.serving.answer import prediction_response
from pipeline.serving.batching import Batcher, Block, Job, Upload
from pipeline.serving.exchange import AGAIN, RefusedError, Request, Response, json_response
from pipeline.serving.formdata import read_form
from pipeline.serving.metrics import Board, exposition
from pipeline.serving.pages import page
from pipeline.serving.served import Answers, ServedModel
from pipeline.serving.settings import ServeSettings

# Whatever the type says, the bytes decide which of the formats it is.
IMAGE_TYPE = "image/"
FORM = "multipart/form-data"
TENSOR_TYPE = "application/octet-stream"
QUERY = ("top_k", "probabilities")
# Prometheus asks for it by this name.
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Parsing more JSON than this on the event loop would be felt by the other requests.
SMALL_JSON_BYTES = 50_000


@dataclass(frozen=True)
class Route:
    """What answers a path: its method, by which name it is counted, and whether it needs the model."""

    method: str
    answer: Callable[[Request], None]
    name: str = "other"
    needs_model: bool = False


class App:
    """What a worker answers. `is_ready` once its model is warm; `is_draining` when it stops."""

    def __init__(self, settings: ServeSettings, board: Board, batcher: Batcher) -> None:
        self.settings, self.board, self.batcher = settings, board, batcher
        self.is_draining = False
        self.json_reader = ThreadPoolExecutor(1, thread_name_prefix="json")
        self.routes = {
            "/predict": Route("POST", self._predict, "predict", True),
            "/predict/tensor": Route("POST", self._predict_tensor, "tensor", True),
            "/health": Route("GET", lambda request: request.respond(json_response({"status": "alive"}))),
            "/ready": Route("GET", self._ready),
            "/metrics": Route("GET", self._metrics),
            "/model": Route("GET", lambda request: request.respond(json_response(self.model.describe())), needs_model=True),
            "/openapi.json": Route("GET", lambda request: request.respond(page("openapi.json"))),
            "/docs": Route("GET", lambda request: request.respond(page("docs.html"))),
            "/": Route("GET", lambda request: request.respond(page("upload.html"))),
            "/favicon.ico": Route("GET", lambda request: request.respond(Response(204))),
            "/v2": Route("GET", lambda request: request.respond(json_response(v2.server_metadata(pipeline.__version__)))),
            "/v2/health/live": Route("GET", lambda request: request.respond(json_response({"live": True}))),
            "/v2/health/ready": Route("GET", self._ready),
        }

    @property
    def model(self) -> ServedModel:
        """The model that answers now."""
        assert self.batcher.model is not None
        return self.batcher.model

    @property
    def is_ready(self) -> bool:
        """Whether requests should be sent here."""
        return self.batcher.model is not None and not self.is_draining

    # ---- what connections call ----

    def admit(self, request: Request) -> None:
        """Refuse what no body could make right. Raises RefusedError."""
        route = self._route_of(request)
        request.route = route.name
        if request.method != route.method and not (request.method == "HEAD" and route.method == "GET"):
            allowed = "GET, HEAD" if route.method == "GET" else route.method
            raise RefusedError(405, f"{request.path} takes {allowed}.", (("allow", allowed),))
        if route.needs_model and self.batcher.model is None:
            raise RefusedError(503, "the model is not loaded yet.", AGAIN)
        coding = request.header(b"content-encoding").lower()
        if coding not in ("", "identity"):
            raise RefusedError(415, f"Content-Encoding {coding[:40]} is not taken; send the body as it is.")

    def handle(self, request: Request) -> None:
        """Answer a request whose body is there."""
        try:
            self._route_of(request).answer(request)
        except RefusedError as refusal:
            request.respond(refusal.response())
        except Exception:
            request.respond(_failure(request))

    def count(self, request: Request, status: int, seconds: float) -> None:
        """Take note of an answer."""
        self.board.count_request(request.route, status, seconds)
        if self.settings.access_log:
            line = {"method": request.method, "path": request.path[:200], "status": status, "ms": round(1000 * seconds, 3)}
            print(json.dumps(line), flush=True)

    def _route_of(self, request: Request) -> Route:
        route = self.routes.get(urllib.parse.unquote(request.path))
        if route is None and request.path.startswith("/v2/models/"):
            route = self._v2_route(request)
        if route is None:
            raise RefusedError(404, f"no route {request.path[:200]}.{nearest(request.path, self.routes)} See /docs.")
        return route

    # ---- predictions ----

    def _predict(self, request: Request) -> None:
        top_k, all_classes = self._wishes(request)
        kind = request.media_type
        if kind == FORM:
            uploads = read_form(request.header(b"content-type"), request.body, self.settings.max_images)
        elif kind.startswith(IMAGE_TYPE) or kind == TENSOR_TYPE:
            if not request.body:
                raise RefusedError(400, "the body is empty; send the bytes of an image.")
            uploads = [Upload("image", request.body)]
        else:
            raise RefusedError(415, f"Content-Type '{kind[:60]}' is not taken; send image/*, {TENSOR_TYPE} or {FORM}.")
        self._submit(request, uploads, self._finish(request, top_k, all_classes))

    def _predict_tensor(self, request: Request) -> None:
        top_k, all_classes = self._wishes(request)
        if request.media_type != TENSOR_TYPE:
            raise RefusedError(415, f"Content-Type '{request.media_type[:60]}' is not taken; send {TENSOR_TYPE}.")
        height, width = self.model.size
        number, rest = divmod(len(request.body), 3 * height * width)
        if rest or not number:
            each = f"images are uint8 (N, 3, {height}, {width}), {3 * height * width:,} each"
            raise RefusedError(400, f"the body has {len(request.body):,} bytes; {each}.")
        block = np.frombuffer(request.body, dtype=np.uint8).reshape(number, 3, height, width)
        self._submit(request, self._parts_of(block), self._finish(request, top_k, all_classes))

    def _finish(self, request: Request, top_k: int, all_classes: bool) -> Callable[[ServedModel, Answers], None]:
        def finish(model: ServedModel, answers: Answers) -> None:
            request.respond(prediction_response(model, answers, top_k, all_classes=all_classes))

        return finish

    def _submit(
        self, request: Request, parts: Sequence[Upload | Block], finish: Callable[[ServedModel, Answers], None]
    ) -> None:
        job = Job(parts, finish, lambda refused: request.respond(refused.response()))
        self.batcher.submit(job)
        request.abandon = job.cancel

    def _parts_of(self, block: Block) -> list[Block]:
        """Pixels (N, 3, H, W) in parts of which each fits in a batch."""
        most, at_once = self.settings.max_images, self.settings.max_batch
        if len(block) > most:
            raise RefusedError(413, f"a request may have {most} images, not {len(block):,}.")
        return [block[first : first + at_once] for first in range(0, len(block), at_once)]

    def _wishes(self, request: Request) -> tuple[int, bool]:
        """`top_k` and `probabilities` of the query."""
        top_k, all_classes = self.settings.top_k, False
        if not request.query:
            return top_k, all_classes
        for name, value in _query_of(request):
            if name == "top_k":
                if not (value.isascii() and value.isdecimal() and len(value) < 8 and int(value)):
                    raise RefusedError(400, f"`top_k` is '{value[:40]}'; it must be 1 or more.")
                top_k = int(value)
            elif name == "probabilities":
                if value not in ("0", "1", "true", "false"):
                    raise RefusedError(400, f"`probabilities` is '{value[:40]}'; it must be 0 or 1.")
                all_classes = value in ("1", "true")
            else:
                raise RefusedError(400, f"no parameter '{name[:40]}'.{nearest(name[:40], QUERY)}")
        return top_k, all_classes

    # ---- the Open Inference Protocol ----

    def _v2_route(self, request: Request) -> Route | None:
        asked = v2.read_path(request.path)
        if asked is None:
            return None
        if asked.action == "infer":
            return Route("POST", self._infer, "infer", True)
        answer = self._ready if asked.action == "ready" else self._v2_metadata
        return Route("GET", answer, needs_model=asked.action != "ready")

    def _v2_metadata(self, request: Request) -> None:
        v2.require_model(request.path, self.model)
        request.respond(json_response(v2.model_metadata(self.model)))

    def _infer(self, request: Request) -> None:
        v2.require_model(request.path, self.model)
        size = v2.json_length(request)
        if size <= SMALL_JSON_BYTES:
            self._infer_read(request, v2.read_infer(request.body, size, self.model))
            return
        v2.require_modest(request.body, size, self.model.size, self.settings.max_images)
        # Elsewhere, and the rest here again.
        body, model, loop = request.body, self.model, self.batcher.loop

        def read() -> None:
            try:
                found = v2.read_infer(body, size, model)
            except RefusedError as refusal:
                loop.call_soon_threadsafe(request.respond, refusal.response())
            except Exception:
                loop.call_soon_threadsafe(request.respond, _failure(request))
            else:
                loop.call_soon_threadsafe(self._infer_later, request, found)

        request.abandon = self.json_reader.submit(read).cancel

    def _infer_later(self, request: Request, found: "v2.Inference") -> None:
        if request.is_over:
            return
        try:
            self._infer_read(request, found)
        except RefusedError as refusal:
            request.respond(refusal.response())
        except Exception:
            request.respond(_failure(request))

    def _infer_read(self, request: Request, found: "v2.Inference") -> None:
        height, width = self.model.size
        if found.images.shape[2:] != (height, width):
            raise RefusedError(422, f"the model was just replaced by one that takes {height} x {width} pixels.")

        def finish(model: ServedModel, answers: Answers) -> None:
            request.respond(v2.infer_response(model, answers, found))

        self._submit(request, self._parts_of(found.images), finish)

    # ---- about the server ----

    def _ready(self, request: Request) -> None:
        if request.path.startswith("/v2/models/") and self.batcher.model is not None:
            v2.require_model(request.path, self.model)
        state = "draining" if self.is_draining else "ready" if self.batcher.model is not None else "loading"
        request.respond(json_response({"ready": self.is_ready, "state": state}, 200 if self.is_ready else 503))

    def _metrics(self, request: Request) -> None:
        model = self.batcher.model
        info = {} if model is None else {"name": model.name, "version": model.version, "sha256": model.sha256}
        request.respond(Response(200, exposition(self.board, info).encode(), METRICS_TYPE))


def _failure(request: Request) -> Response:
    """The answer to what should not happen, which the log tells in full. To be called where the exception is handled."""
    print(f"serve: {request.method} {request.path[:200]}\n{traceback.format_exc()}", flush=True)
    return RefusedError(500, "a mistake of the server; its log says more.").response()


def _query_of(request: Request) -> list[tuple[str, str]]:
    try:
        return urllib.parse.parse_qsl(request.query, keep_blank_values=True, max_num_fields=10)
    except ValueError as error:
        raise RefusedError(400, f"the query cannot be read ({error}).") from error
