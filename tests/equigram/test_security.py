"""Who may do what on a service, and what its jobs may read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from equigram.api.security import Readable, Tokens, User
from equigram.errors import ForbiddenUrlError, SpecError

LONG = "0123456789abcdef"


def test_tokens_are_told_apart_by_name_and_scope() -> None:
    tokens = Tokens(f"# who\nann write {LONG}-a\n\nbob read {LONG}-b # only looks\n", "the file")
    assert tokens.user(f"{LONG}-a") == User("ann", "write")
    assert tokens.user(f"{LONG}-b") == User("bob", "read")
    assert [tokens.user(text) for text in ("", LONG, f"{LONG}-c", f"{LONG}-a ", "\udcff")] == [None] * 5
    assert LONG not in repr(vars(tokens))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ann", "the file, line 1: write `name scope token`"),
        (f"\nann admin {LONG}", "the file, line 2: write `name scope token`, with the scope read or write"),
        ("ann write short", "the token of ann has 5 characters, and 16 are needed"),
        (f"ann write {LONG}\nbob read {LONG}", "line 2: the name or the token of bob is given twice"),
        (f"ann write {LONG}\nann read {LONG}2", "line 2: the name or the token of ann is given twice"),
        (f"a/b write {LONG}", "'a/b' is no name"),
    ],
)
def test_wrong_tokens_are_refused_without_being_repeated(text: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        Tokens(text, "the file")
    assert message in str(caught.value)
    assert LONG not in str(caught.value)


def test_tokens_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EQUIGRAM_TOKENS", raising=False)
    assert not Tokens.load(None)
    monkeypatch.setenv("EQUIGRAM_TOKENS", f"ann write {LONG},bob read {LONG}2")
    assert Tokens.load(None).user(f"{LONG}2") == User("bob", "read")
    file = tmp_path / "tokens"
    with pytest.raises(SpecError, match="cannot be read: No such file"):
        Tokens.load(file)
    file.write_text("# none\n")
    with pytest.raises(SpecError, match="holds no token"):
        Tokens.load(file)


@pytest.mark.parametrize(
    ("places", "url"),
    [
        (["/data"], "/data"),
        (["/data"], "/data/a/b.npz"),
        (["/data/"], "file:///data/a"),
        (["/data"], "zip://::/data/a.zip"),
        (["/data"], "zip://inside::/data/a.zip"),
        (["s3://b/images"], "s3://b/images/x"),
        (["s3://b"], "s3a://b/x"),
        (["s3://b/x", "/data"], "/data/y"),
        (["https://host/images"], "https://HOST/images/a.zip"),
    ],
)
def test_jobs_read_below_what_is_allowed(places: list[str], url: str) -> None:
    Readable(places).check(url, "data.train")


@pytest.mark.parametrize(
    ("places", "url"),
    [
        ([], "/data"),
        ([], "images"),
        (["/data"], "data/images"),
        (["/data"], "/database"),
        (["/data"], "/data/../etc/passwd"),
        (["/data"], "/etc/passwd"),
        (["/data"], "file:///etc/passwd"),
        (["/data"], "file://data/x"),
        (["/data"], "local:///etc/passwd"),
        (["/data"], "~/data"),
        (["/data"], "zip://::/etc/x.zip"),
        (["/data"], "simplecache::/data/x"),
        (["/data"], "simplecache::file:///etc/passwd"),
        (["/data"], "zip://::simplecache::/data/x.zip"),
        (["/data"], "zip://../x::/data/a.zip"),
        (["/data"], "reference://::/data/x.json"),
        (["/data"], "s3://data/x"),
        (["/data"], "memory://data"),
        (["s3://b/images"], "s3://b/images2/x"),
        (["s3://b/images"], "s3://b/images/../secret"),
        (["s3://b/images"], "s3://b/images/%2e%2e/secret"),
        (["s3://b/images"], "s3://key:secret@b/images/x"),
        (["s3://b/images"], "gcs://b/images/x"),
        (["https://host/images"], "http://host/images/x"),
        (["https://host/images"], "https://host:444/images/x"),
        (["https://host/images"], "https://host@evil/images/x"),
        (["https://host/images"], "https://evil/host/images"),
        (["https://host/images"], "https://host/images/..\\..\\x"),
        (["https://host/images"], "https://169.254.169.254/latest/meta-data"),
        (["https://host/images"], "https://host/images\n/x"),
        (["https://host/images"], "https://host/images/a.npz?signature=secret"),
        (["https://host/images"], "https://host/images/a.npz#x"),
        (["https://host/images"], "https://host/images/%2e%2e%2fsecret"),
        (["https://host"], "https://[bad"),
    ],
)
def test_jobs_read_nothing_else(places: list[str], url: str) -> None:
    with pytest.raises(ForbiddenUrlError, match=r"data\.train = ") as caught:
        Readable(places).check(url, "data.train")
    assert "signature" not in str(caught.value)


def test_a_link_out_of_a_readable_folder_is_followed_before_it_is_judged(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (inside / "link").symlink_to(outside)
    readable = Readable([str(inside)])
    readable.check(str(inside / "images"), "data.train")
    with pytest.raises(ForbiddenUrlError):
        readable.check(str(inside / "link/images"), "data.train")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("images", "write an absolute path"),
        ("/data/../etc", "write an absolute path"),
        ("simplecache::s3://b", "write an absolute path"),
        ("http://169.254.169.254/latest", "clouds keep credentials at such addresses"),
        ("http://metadata.google.internal/x", "clouds keep credentials at such addresses"),
    ],
)
def test_places_that_no_job_should_read_are_refused(place: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Readable([place])


def test_a_relative_path_never_depends_on_where_the_service_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ForbiddenUrlError):
        Readable([str(tmp_path)]).check(os.path.relpath(tmp_path / "x"), "data.train")
