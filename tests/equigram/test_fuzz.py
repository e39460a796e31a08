"""Requests that nobody would send, made from the description of the service: none is answered with a 500."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from equigram.api.app import make_app
from equigram.api.cluster import Status
from equigram.api.job import Limits
from equigram.api.models import NodeView
from equigram.api.records import Records
from equigram.api.security import Readable, Tokens
from equigram.errors import JobNotFoundError


class Nobody:
    """Drivers that never do anything."""

    def __call__(self) -> Nobody:
        return self

    def submit(self, name: str, arguments: list[str]) -> None:
        pass

    def statuses(self) -> dict[str, Status]:
        return {}

    def stop(self, name: str) -> None:
        pass

    def log(self, name: str) -> str:
        raise JobNotFoundError(f"Ray has no log of {name}")

    def nodes(self) -> list[NodeView]:
        return []


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, listen: Callable[..., Any]) -> Iterator[httpx.Client]:
    """A service whose jobs never start, and which lets them read a folder."""
    folder = tmp_path_factory.mktemp("fuzz")
    app = make_app(
        Records(str(folder / "root")),
        Nobody(),
        Tokens("", "test"),
        Readable([str(folder / "data")]),
        Limits(jobs=10**6),
        None,
    )
    with listen(app) as url, httpx.Client(base_url=url, timeout=60) as one:
        spec = {"store": "a", "data": {"train": f"{folder}/data/x.npz"}}
        assert one.post("/jobs", json={"spec": spec}).status_code == 201
        yield one


SENT = {"method": "method", "url": "url", "params": "params", "headers": "headers", "json": "json", "data": "content"}
"""Parts of a generated request, and what they are called where it is sent."""


def test_no_request_that_fits_the_description_or_not_is_answered_with_a_500(client: httpx.Client) -> None:
    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    found: list[Any] = list(schema.get_all_operations())
    operations = [one for one in (one.ok() for one in found) if not one.path.endswith("/events")]  # which does not end
    assert len(operations) > 15
    for operation in operations:

        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
        @given(operation.as_strategy())
        def no_request_is_answered_with_a_500(case: Any) -> None:
            if "name" in case.path_parameters:
                case.path_parameters["name"] = "a"
            request = case.as_transport_kwargs(base_url=str(client.base_url))
            try:
                answer = client.request(**{SENT[name]: part for name, part in request.items() if name in SENT})
            except (httpx.InvalidURL, httpx.LocalProtocolError, UnicodeEncodeError, TypeError, ValueError):
                return  # it cannot be sent
            assert answer.status_code < 500, f"{case.method} {case.formatted_path}: {answer.text}"
            if answer.status_code >= 400:
                assert answer.json()["error"]["message"]

        no_request_is_answered_with_a_500()


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=[])),
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(st.text(max_size=8), inside, max_size=4),
    max_leaves=12,
)
SECTIONS = ["store", "data", "network", "gram", "resources", "solve", "storage_options"]
sections = st.dictionaries(st.sampled_from(SECTIONS) | st.text(max_size=8), values, max_size=5)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(sections, st.dictionaries(st.text(max_size=12), values, max_size=3))
def test_no_body_of_a_submission_is_answered_with_a_500(
    client: httpx.Client, spec: dict[str, Any], data: dict[str, Any]
) -> None:
    for body in ({"spec": spec}, {"spec": {**spec, "data": {"train": "/x", **data}}}, spec):
        content = json.dumps(body)  # NaN, infinities and halves of characters as many programs write them
        answer = client.post("/jobs", content=content, headers={"content-type": "application/json"})
        assert 400 <= answer.status_code < 500, answer.text


@pytest.mark.parametrize(
    "content", [b"", b"[", b'"\xff"', b"[" * 100_000, b'{"spec": {"a": ' + b"[" * 50_000, b"1" * 5000]
)
def test_no_text_that_is_no_job_is_answered_with_a_500(client: httpx.Client, content: bytes) -> None:
    answer = client.post("/jobs", content=content, headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 500, answer.text


@pytest.mark.parametrize(
    "name", [".", "..", "%2e%2e", "a%2f..%2fb", "%00", "%ff", "x" * 300, "CON", "a b", "%ed%a0%80"]
)
@pytest.mark.parametrize("path", ["", "/result", "/tiles", "/events?follow=false", "/figures/x.png", "/gram/C4/ntk"])
def test_no_name_of_a_job_is_answered_with_a_500(client: httpx.Client, name: str, path: str) -> None:
    answer = client.get(f"/jobs/{name}{path}")
    assert 400 <= answer.status_code < 500 or answer.request.url.path in ("/", "/jobs")
