"""Writes docs/http.md from the OpenAPI schema of the service, so that it says what the service does.

.venv/bin/python docs/write_http.py
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from equigram import events
from equigram.api import models
from equigram.api.app import STATUSES, make_app
from equigram.api.job import Limits
from equigram.api.records import Records
from equigram.api.security import Readable, Tokens

HERE = Path(__file__).parent


class Route(NamedTuple):
    """What the schema does not say of a route.

    Attributes:
      example: a command.
      answer: its answer, where that is no JSON.
      errors: beyond those that every route has.
      mark: why the command is not run by tests.
      body: a file ``body.json`` that the command sends.
    """

    example: str
    answer: str = ""
    errors: str = ""
    mark: str = ""
    body: str = ""


SUBMIT = """\
{
  "spec": {
    "store": "histology",
    "data": {"train": "/data/NCT-CRC-HE-100K", "test": "/data/CRC-VAL-HE-7K", "size": 16},
    "gram": {"groups": ["C4"]}
  },
  "priority": 0
}"""
"""The job of docs/howto/service.md, so that the test submits it only once."""

UPLOAD = """\
python -c 'import numpy; numpy.savez("images.npz", x_train=numpy.ones((4, 8, 8)), y_train=[0, 0, 1, 1])'
curl "$EQUIGRAM_SERVER/uploads" -H 'X-Filename: images.npz' -H 'Content-Type: application/octet-stream' \\
  --data-binary @images.npz"""

CHANGES = "it changes the job; tests/equigram/test_api.py asks so"
JOB = "$EQUIGRAM_SERVER/jobs/histology"

ROUTES = {
    "POST /jobs": Route(
        """curl "$EQUIGRAM_SERVER/jobs" -H 'Content-Type: application/json' -d @body.json""",
        "201 with a new job, 200 with one that is there; the header `Location` has its path. A job that is there and "
        "failed, was cancelled or is incomplete goes on.",
        "409 another job, or something else, has this `store`; 413 more than 1 MiB; 422 the job is wrong, or reads "
        "where it may not; 429 the token has too many jobs that have not ended.",
        body=SUBMIT,
    ),
    "GET /jobs": Route('curl -i "$EQUIGRAM_SERVER/jobs?state=running,done&limit=20"'),
    "GET /jobs/{name}": Route(f'curl "{JOB}"'),
    "POST /jobs/{name}/cancel": Route(
        f'curl -X POST "{JOB}/cancel"',
        "It is cancelled once its driver has ended.",
        "409 it has ended.",
        CHANGES,
    ),
    "POST /jobs/{name}/resume": Route(
        f'curl -X POST "{JOB}/resume"',
        errors="409 it is done, or has not ended; 413 the token has too many jobs that have not ended; 422 it reads "
        "where jobs may not read any more.",
        mark=CHANGES,
    ),
    "DELETE /jobs/{name}": Route(
        f'curl -X DELETE "{JOB}"',
        "204 without a body.",
        "409 it has not ended: cancel it before; 503 Ray does not say whether it has.",
        CHANGES,
    ),
    "GET /jobs/{name}/log": Route(
        f'curl "{JOB}/log?lines=20"',
        "`text/plain`. Ray keeps it: it is gone with its cluster.",
        "404 Ray has none; 503 Ray does not answer.",
    ),
    "GET /jobs/{name}/events": Route(
        f'curl -N "{JOB}/events?follow=false"',
        "`text/event-stream`; see [Events](#events).",
    ),
    "GET /jobs/{name}/tiles": Route(
        f'curl "{JOB}/tiles?part=gram" --output tiles.bin',
        "`application/octet-stream`, `X-Rows` x `X-Cols` bytes; see [Tiles](#tiles).",
        "404 the images are not loaded yet, or there are no test images.",
    ),
    "GET /jobs/{name}/result": Route(f'curl "{JOB}/result"', errors="404 the images are not loaded yet."),
    "GET /jobs/{name}/predictions": Route(
        f'curl "{JOB}/predictions?group=C4&kernel=ntk&sort=confused&limit=10"',
        errors="404 this matrix is not solved, or there are no test images.",
    ),
    "GET /jobs/{name}/images/{split}/{index}.png": Route(
        f'curl "{JOB}/images/test/0.png" --output image.png',
        "`image/png`, small images enlarged by a whole factor to 96 pixels or more; grey, or the first three channels.",
        "404 there is no such image.",
    ),
    "GET /jobs/{name}/{part}/{group}/{kernel}": Route(
        f'curl "{JOB}/gram/C4/ntk?rows=0:10&cols=0:20" --output slice.npy',
        "`application/octet-stream`, an .npy file; see [Slices](#slices).",
        "404 there is no such matrix; 409 tiles of the slice are missing; 413 it has more than 64 MiB; 422 the window "
        "is not within the matrix.",
    ),
    "GET /jobs/{name}/{part}/{group}/{kernel}/picture.png": Route(
        f'curl "{JOB}/gram/C4/ntk/picture.png?pixels=256" --output gram.png',
        "`image/png`; of a window that is larger than `pixels`, or has more than 400 chunks, an even selection.",
        "404 there is no such matrix; 422 the window is not within it.",
    ),
    "GET /jobs/{name}/figures/{figure}": Route(
        f'curl "{JOB}/figures/spectrum.svg" --output spectrum.svg',
        "`image/png`, `image/svg+xml` or `text/csv`. The field `figures` of the job has the names.",
        "404 there is no such figure.",
    ),
    "POST /uploads": Route(
        UPLOAD,
        errors="413 it is larger than `equigram serve --max-upload`, holds more than 200,000 files, or is more than "
        "eight times that when it is unpacked; 422 it is not what its name says, encrypted, or holds Python objects.",
    ),
    "GET /service": Route('curl "$EQUIGRAM_SERVER/service"'),
}

MEANINGS = {
    "idempotency-key": "Names a job without `store`: the same key of the same token is the same job.",
    "limit": "So many at most.",
    "offset": "Leave out so many.",
    "lines": "The last ones.",
    "after": "The id of the event after which to begin.",
    "last-event-id": "The same, as browsers send it; `after` wins.",
    "follow": "Go on when the job has ended; else the stream ends with it.",
    "part": "`gram`: train x train. `cross`: test x train.",
    "group": "Group of the network.",
    "kernel": "Kernel.",
    "sort": "In their order, or those first that are most wrong.",
    "split": "Training or test images.",
    "index": "Its place among them, from 0.",
    "pixels": "Width and height at most.",
    "figure": "Its name, and what kind of file.",
    "x-filename": "Any name; its end says what kind of file it is.",
}
"""Of parameters of which the schema says nothing."""

FIELDS = {
    "NodeView": {"name": "Its name in Ray.", "alive": "Whether it is there.", "cpus": "CPUs.", "gpus": "GPUs."},
    "PredictionsAnswer": {
        "group": "Of the matrix.",
        "kernel": "Of the matrix.",
        "ridge": "The chosen one.",
        "classes": "Names; `null` in regression.",
        "total": "Test images.",
        "predictions": "Those that were asked for.",
    },
    "ResultAnswer": {
        "id": "The job.",
        "classes": "Names; `null` in regression.",
        "scores": "The chosen ones first; none before anything is solved.",
    },
    "Scores": {"group": "Of the matrix.", "kernel": "Of the matrix."},
    "ServiceView": {"version": "Of equigram.", "root": "Where the run stores are."},
    "Solved": {"group": "Of the matrix.", "kernel": "Of the matrix."},
    "UploadAnswer": {"bytes": "Its size.", "sha256": "Its SHA-256."},
}
"""Of fields of which the schema says nothing."""

BEGIN = """\
<!-- Written by docs/write_http.py from the OpenAPI schema of the service; change that. -->
# The HTTP interface

What `equigram serve` answers. [Run the service](howto/service.md) starts one, and [the client](client.md) asks it from
Python and the command line. The same as OpenAPI 3.1 is at `/openapi.json` of a service.

In the examples `EQUIGRAM_SERVER` is the URL of the service, such as `http://127.0.0.1:8786`. A service with tokens
needs `-H "Authorization: Bearer $EQUIGRAM_TOKEN"` as well; only the page, `/healthz` and `/readyz` are for everybody.
Tokens with the scope `read` may `GET`; everything else needs `write`. Bodies are JSON but where something else is said,
times ISO 8601 in UTC. Clients should ignore fields and kinds of events that they do not know.

## Errors

Every answer with a status of 400 or more, whichever part of the service it comes from, has the body

```json
{"error": {"type": "JobNotFoundError", "message": "there is no job 'mine'; `equigram jobs` lists them"}}
```

where `type` is a class in [equigram.errors](api.md) or `equikernel.errors`, and `message` one sentence for people: what
is wrong, both values, the remedy. What any request may get:

| status | when |
| --- | --- |
| 400 | the name in `Host` is not one of the service (`equigram serve --hostname`) |
| 401 | there is no token, or an unknown one |
| 403 | the scope of the token is `read`; or a page of another site asks for a change |
| 404 | there is no such job or path |
| 405 | the path has no such method |
| 413 | the body is too long: more than 1 MiB, of an upload more than `equigram serve --max-upload` |
| 422 | a parameter or field is wrong |
| 500 | a bug; the log of the service has it |
| 503 | the storage or the Ray cluster does not answer; the same request may do later |

By type, the first that fits (a type includes those derived from it):

"""

STATE = """\
### Events

`GET /jobs/{name}/events` is a stream of server-sent events. First come the state of the job and the events of its
present attempt, the last 5,000 of them at most; then those that happen. Every 15 s without an event a comment (`:
ping`) shows that the connection lives. A watcher that is too slow is cut off; whoever lost the connection comes back
with `Last-Event-ID`, or `after`, and gets what followed.

```text
event: state
data: {"id": "histology", "state": "running"}

id: 1.17
event: TileFinished
data: {"time": "2026-01-31T12:00:00.123+00:00", "event": "TileFinished", "tile": "gram[0, 1]", "worker": 0, …}
```

The id is `attempt.number`. `state` has none: it tells of the state of the job now, at the begin of a stream and
whenever it is another one. An event can be read about a second after it happened
([why](service.md#how-late-an-event-is)). The kinds:

"""

ABOUT_EVENTS = """\
All but `state` have `event`, their kind, and `time` as well. `tile` is `gram[row, column]` or `cross[row, column]`,
counted in tiles; `pause`, `seconds` and what ends in `_seconds` are numbers, `error` may be null; other counts are
whole numbers, and the rest is text. Of a kind of `Progress` only the last of half a second is kept.
"""

FORMATS = """\
### Tiles

A byte for each tile, row by row, `X-Rows` times `X-Cols` of them: 0 missing, 1 being computed, 2 stored, 3 failed and
tried again soon. Row and column are blocks of `tile` images (a field of the job): of the train matrix (`part=gram`)
both triangles are filled, though only tiles with row <= column are computed; of `part=cross` rows are test images. A
tile counts as stored when it is so in all passes.

<!-- given: tiles -->
```python
import numpy as np

states = np.frombuffer(tiles.content, np.uint8).reshape(int(tiles.headers["X-Rows"]), int(tiles.headers["X-Cols"]))
```

### Slices

An .npy file (version 1.0, C order, little-endian float32 or float64 as `gram.dtype` of the job), `rows` x `cols`
images, of at most 64 MiB. `rows=0:100` are the first hundred; `first:` and `:end` work, negative numbers and steps do
not. Slices along whole tiles, that is multiples of `tile`, read each chunk once.

```python
import numpy as np

k = np.load("slice.npy")
```
"""

OUTSIDE = """\
### `GET /healthz`, `GET /readyz`, `GET /metrics`, `GET /`

Not in the schema, because they are for monitoring and browsers. `/healthz`: 200 as long as the process answers.
`/readyz`: 200 when drivers can be started, else 503, and `trouble` of `/service` says why; jobs can be submitted all
the same, and wait. Neither asks for a token. `/metrics`: Prometheus's text; with a token, if there are any.
`/`: the page.

```sh
curl "$EQUIGRAM_SERVER/healthz"
curl "$EQUIGRAM_SERVER/readyz"
curl "$EQUIGRAM_SERVER/metrics"
```
"""

GROUPS = {
    "Jobs": ("/jobs", "/jobs/{name}", *(f"/jobs/{{name}}/{one}" for one in ("cancel", "resume", "log", "events"))),
    "Results": ("/jobs/",),
    "Uploads": ("/uploads",),
    "The service itself": ("/service",),
}


def render() -> str:
    """The whole page."""
    schema = _schema()
    methods = {
        f"{method.upper()} {path}": (path, route)
        for path, routes in schema["paths"].items()
        for method, route in routes.items()
    }
    if methods.keys() != ROUTES.keys():
        raise ValueError(f"docs/write_http.py lacks {methods.keys() - ROUTES.keys()}, or has too much")
    kinds = ["| type | status | meaning |", "| --- | --- | --- |", *_statuses()]
    parts = [BEGIN + "\n".join(kinds)]
    left = dict(methods)
    for title, places in GROUPS.items():
        parts.append(f"## {title}")
        for name, (path, route) in list(left.items()):
            if path in places or (places == ("/jobs/",) and path.startswith("/jobs/")):
                parts.append(_route(name, route))
                del left[name]
    parts += [OUTSIDE.strip(), "## Formats", STATE + _events(), FORMATS.strip(), "## Bodies", _submission(schema)]
    parts += [
        _model(name, one)
        for name, one in schema["components"]["schemas"].items()
        if name not in ("Submission", "ErrorAnswer")
    ]
    return "\n\n".join(parts) + "\n"


def _schema() -> Any:
    with tempfile.TemporaryDirectory() as root:
        records, readable, limits = Records(root), Readable([]), Limits()
        return make_app(records, _no_drivers, Tokens("", ""), readable, limits, None).openapi()


def _no_drivers() -> Any:
    raise NotImplementedError


def _statuses() -> Iterable[str]:
    for kind, status in STATUSES:
        more = "; 429 where it is the number of jobs" if kind.__name__ == "LimitError" else ""
        package = f"`{kind.__module__.partition('.')[0]}`"
        yield f"| `{kind.__name__}` | {status}{more} | {_first(kind).replace('this package', package)} |"


def _first(thing: Any) -> str:
    return _text(inspect.cleandoc(thing.__doc__ or "").split("\n\n")[0])


def _all(thing: Any) -> str:
    return _text(inspect.cleandoc(thing.__doc__ or ""))


def _text(text: str | None) -> str:
    """Words of docstrings as Markdown."""
    plain = re.sub(r":\w+:`~?([\w.]+)`", r"`\1`", text or "")
    return " ".join(plain.replace("``", "`").replace("`None`", "`null`").split()).replace("|", "\\|")


def _route(name: str, route: Any) -> str:
    about = ROUTES[name]
    parts = [f"### `{name}`", "\n\n".join(map(_text, route["description"].split("\n\n")))]
    if parameters := route.get("parameters"):
        ordered = sorted(parameters, key=lambda one: ("path", "query", "header").index(one["in"]))
        ordered = [one for one in ordered if one["name"] != "name"]
        rows = [_parameter(one) for one in ordered]
        head = ["| parameter | in | meaning | allowed | default |", "| --- | --- | --- | --- | --- |"]
        parts += ["\n".join([*head, *rows])] if rows else []
    if body := route.get("requestBody"):
        kinds = {kind: one["schema"] for kind, one in body["content"].items()}
        parts.append("Body: " + " or ".join(_body(kind, one) for kind, one in kinds.items()) + ".")
    answers = {code: one for code, one in route["responses"].items() if code[0] == "2"}
    said = {_body(kind, one["schema"]) for two in answers.values() for kind, one in two.get("content", {}).items()}
    answer = about.answer
    if not re.match(r"`|\d+ ", answer) or name == "POST /jobs":
        codes = " or ".join(sorted(answers))
        answer = f"{codes}, {' or '.join(sorted(said))}. {answer}".strip()
    parts.append(f"Answer: {answer}" + (f"\n\nErrors: {about.errors}" if about.errors else ""))
    if about.body:
        parts.append(f"<!-- file: body.json -->\n```json\n{about.body}\n```")
    mark = f"<!-- not run: {about.mark} -->\n" if about.mark else ""
    parts.append(f"{mark}```sh\n{about.example}\n```")
    return "\n\n".join(parts)


def _parameter(one: Any) -> str:
    schema, name = one["schema"], one["name"]
    allowed = "[states](#jobsummary)" if name == "state" else _allowed(schema)
    meaning = _text(one.get("description")) or MEANINGS[name]
    default = "required" if one.get("required") else f"`{_plain(schema['default'])}`" if "default" in schema else ""
    return f"| `{name}` | {one['in']} | {meaning} | {allowed} | {default} |".replace("|  |", "| |")


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _allowed(schema: Any) -> str:
    """What a value may be."""
    if "anyOf" in schema:
        return " or ".join(_allowed(one) for one in schema["anyOf"] if one.get("type") != "null")
    if "$ref" in schema:
        return _link(schema["$ref"].rsplit("/", 1)[1])
    if "enum" in schema:
        return ", ".join(f"`{one}`" for one in schema["enum"])
    if pattern := schema.get("pattern"):
        return "`" + str(pattern).strip("^$").replace("|", "\\|") + "`"
    if "prefixItems" in schema:
        return f"list of {len(schema['prefixItems'])} {_allowed(schema['prefixItems'][0])}s"
    kind = schema.get("type")
    if kind == "array":
        return f"list of {_allowed(schema['items'])}"
    if kind == "object":
        inside = schema.get("additionalProperties")
        return f"object of {_allowed(inside)}" if isinstance(inside, dict) and inside else "object"
    low, high = schema.get("minimum"), schema.get("maximum")
    word = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}[kind]
    if low is not None and high is not None:
        return f"{low:,.0f} to {high:,.0f}"
    return f"{word} of {schema['maxLength']} at most" if "maxLength" in schema else word


def _type(schema: Any) -> str:
    """What a field of an answer is."""
    if "anyOf" in schema:
        kinds = [_type(one) for one in schema["anyOf"] if one.get("type") != "null"]
        return " or ".join([*kinds, "null"])
    return _allowed(schema)


def _link(name: str) -> str:
    return f"[{name}](#{name.lower()})"


def _body(kind: str, schema: Any) -> str:
    if "$ref" in schema or schema.get("type") == "array":
        return _allowed(schema)
    return f"`{kind}`"


def _events() -> str:
    rows = ["| kind | meaning | fields |", "| --- | --- | --- |"]
    rows.append("| `state` | The job is in this state. | `id`, `state` (see [JobSummary](#jobsummary)) |")
    for kind in vars(events).values():
        if isinstance(kind, type) and issubclass(kind, events.Event) and kind is not events.Event:
            names = [f"`{one.name}`" for one in dataclasses.fields(kind)]
            rows.append(f"| `{kind.__name__}` | {_all(kind)} | {', '.join(names)} |")
    return "\n".join([*rows, "", ABOUT_EVENTS])


def _model(name: str, model: Any) -> str:
    about, properties = _text(model.get("description")), model["properties"]
    if name == "JobDetail":
        about += " All of [JobSummary](#jobsummary), and:"
        properties = {key: one for key, one in properties.items() if key not in models.JobSummary.model_fields}
    rows = []
    for key, one in properties.items():
        meaning = _text(one.get("description")) or FIELDS[name][key]
        if key == "state":
            meaning, kind = _text(_states()), "text"
        else:
            kind = _type(one)
        rows.append(f"| `{key}` | {meaning} | {kind} |".replace("|  |", "| |"))
    return "\n".join([f"### {name}", "", about, "", "| field | meaning | type |", "| --- | --- | --- |", *rows])


def _states() -> str:
    """What the docstring below ``State`` says."""
    source = inspect.getsource(models)
    (said,) = re.findall(r'(?s)^State: TypeAlias.*?\n"""(.*?)"""', source, re.MULTILINE)
    return str(said)


def _submission(schema: Any) -> str:
    return _model("Submission", schema["components"]["schemas"]["Submission"]) + (
        "\n\n[The job file](job.md) has the fields of `spec`."
    )


if __name__ == "__main__":
    (HERE / "http.md").write_text(render(), encoding="utf-8")
