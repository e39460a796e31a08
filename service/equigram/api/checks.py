"""What a service accepts as a job, and what it calls it."""

from __future__ import annotations

import hashlib
import json
import uuid
from typing import TYPE_CHECKING, Any

from equigram.api.records import ID, UPLOAD
from equigram.errors import SpecError
from equigram.spec import JobSpec

if TYPE_CHECKING:
    from equigram.api.records import Record, Records
    from equigram.api.security import Readable

SOURCES = ("train", "test", "train_labels", "test_labels")
"""Fields of ``data`` that name what is read."""


def job_name(fields: dict[str, Any], root: str, owner: str, key: str | None) -> str:
    """What a job is called: after its store, else after the key of the request, else a new name.

    Raises:
      SpecError: its store is not below the root, or cannot be a name.
    """
    store = fields.get("store")
    if store is None:
        seed = uuid.uuid4().hex if key is None else f"{owner}\0{key}"
        return f"job-{hashlib.sha256(seed.encode()).hexdigest()[:12]}"
    text = str(store)
    inside = text.removeprefix(f"{root}/")
    if inside.startswith(("/", "~")) or "://" in inside or ".." in inside.split("/"):
        raise SpecError(
            f"store = {text!r} is not below the root of this service; write a name, such as `store: "
            f"{text.rstrip('/').rsplit('/', 1)[-1] or 'mine'}`"
        )
    name = inside.strip("/").replace("/", "-")
    if not ID.fullmatch(name):
        raise SpecError(
            f"store = {text!r} cannot name a job: write up to 100 letters, digits and . _ - /, with a letter or digit "
            "first"
        )
    return name


def checked_spec(fields: dict[str, Any], source: str, readable: Readable, records: Records) -> JobSpec:
    """A job that may run on a service.

    Args:
      fields: its fields.
      source: what it is called in errors.
      readable: what it may read.
      records: where uploads are.

    Raises:
      SpecError: it is not usable, or asks for what is the service's to say.
      ForbiddenUrlError: it reads what it may not.
    """
    _check_text(fields)
    if fields.get("storage_options") is not None:  # before anything could repeat what they are
        raise SpecError(
            "storage_options: a service opens its storage itself, so that credentials are in no request; remove them, "
            "and have its operator set them in its environment (FSSPEC_S3_KEY, AWS_PROFILE, …)"
        )
    spec = JobSpec.parse(fields, source)
    if spec.resources.address is not None:
        raise SpecError(
            f"resources.address = {spec.resources.address!r}: a service has its own cluster; remove it from the job"
        )
    if spec.resources.workers == 0:
        raise SpecError("resources.workers = 0: a service computes with workers; remove it, or write auto")
    for name in SOURCES:
        url = getattr(spec.data, name)
        if url is None:
            continue
        if not url.startswith("upload:"):
            readable.check(url, f"data.{name}")
        elif (match := UPLOAD.fullmatch(url)) is None or not records.has_upload(match[1]):
            raise SpecError(f"data.{name} = {url!r}: nothing of that name was uploaded here")
    return spec


def _check_text(fields: dict[str, Any]) -> None:
    """Raise :class:`SpecError` if a text holds what cannot be written: half of a character."""
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise SpecError(f"the job cannot be written as text ({error.__class__.__name__}); correct its texts") from None


def differences(known: Record, record: Record) -> list[str]:
    """The fields in which two jobs differ."""
    before, after = _flat(known.spec), _flat(record.spec)
    return [name for name in {**before, **after} if after.get(name) != before.get(name)]


def _flat(spec: dict[str, Any]) -> dict[str, Any]:
    """The fields of a job by their names: ``gram.groups``."""
    found: dict[str, Any] = {}
    for section, value in spec.items():
        inside = value.items() if isinstance(value, dict) else ()
        found |= {f"{section}.{name}": one for name, one in inside} or {section: value}
    return found
