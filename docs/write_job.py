"""Writes docs/job.md from the model of a job, so that it says what the program does.

.venv/bin/python docs/write_job.py
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from equigram.spec import DataSpec, GramSpec, JobSpec, ResourceSpec, SolveSpec
from equikernel.fields import allowed
from equikernel.layers import Activation, AvgPool, Conv, Residual
from equikernel.network import Architecture

HERE = Path(__file__).parent
SECTIONS: dict[str, type[BaseModel]] = {
    "data": DataSpec,
    "network": Architecture,
    "gram": GramSpec,
    "resources": ResourceSpec,
    "solve": SolveSpec,
}

LAYERS = """\
## Layers

`network.layers` is a list of sections, each with a `kind`:

```yaml
network:
  layers:
    - {kind: conv, filter: 5, activation: gelu}
    - {kind: avg_pool, size: 2}
    - {kind: residual, layers: [{kind: activation, activation: relu}, {kind: conv}]}
  padding: SAME
```

Strides and pooling must keep the symmetry of the groups, and residual branches the size of the image; a size that does
not fit is refused with the nearest ones that do. Networks with strides or pooling take the engine `general`, which is
for small images. [Engines](engines.md) says what each engine can do and costs.
"""


def render() -> str:
    """The whole page."""
    example = (HERE.parent / "examples/histology.yaml").read_text(encoding="utf-8")
    parts = [
        f"""\
<!-- Written by docs/write_job.py from the models; change those. -->
# The job file

A job is a YAML file; `equigram run JOB.yaml` does all it asks for, and `equigram plan JOB.yaml` says before what that
costs. Everything but `store` and `data.train` has a default, so the smallest job is

```yaml
store: runs/mine
data: {{train: path/to/class-folders, test_fraction: 0.2}}
```

and a whole one, [examples/histology.yaml](../examples/histology.yaml):

```yaml
{example}```

A field that does not exist, that is given twice, or that has a value which is not allowed is refused before anything
starts. A list of one value may be written without brackets. Relative paths start in the folder where the command is
given. A path or URL is a local path or any URL that [fsspec](https://filesystem-spec.readthedocs.io) knows, such as
`s3://bucket/folder`.

A store belongs to one job: `data`, `network` and `gram` cannot change once it exists, the other sections can; images,
groups and kernels are added with `equigram extend`. A run that goes on compares the names and sizes of all image files,
and the content of up to 64 of them (of an .npy or .npz, all of it), with those the store was made of.

The regression is `μ(x) = ȳ + Θ(x, X) (Θ(X, X) + λ s I)⁻¹ (Y - ȳ)`: `Y` are one-hot or real targets, `ȳ` their mean over
the training images (so that a large ridge predicts the mean, not zero), `s` the mean diagonal of `Θ(X, X)`. The store
holds the coefficients and `ȳ` (as `offset`) in `solution/<group>/<kernel>`.
""",
        _table("The job", JobSpec),
        *(_table(f"`{name}`", model) for name, model in SECTIONS.items()),
        LAYERS,
        *(
            _table(f"`kind: {layer.model_fields['kind'].default}`", layer)
            for layer in (Conv, Activation, AvgPool, Residual)
        ),
    ]
    return "\n".join(parts)


def _table(title: str, model: type[BaseModel]) -> str:
    about = inspect.cleandoc(model.__doc__ or "").split("\n\n>>>")[0]
    rows = [
        f"| `{name}` | {' '.join(_code(field.description).split())} | {_allowed(model, name)} | {_default(field)} |"
        for name, field in model.model_fields.items()
    ]
    head = ["| field | meaning | allowed | default |", "| --- | --- | --- | --- |"]
    return "\n".join([f"## {title}", "", _code(about), "", *head, *rows, ""])


def _allowed(model: type[BaseModel], name: str) -> str:
    return f"[section](#{name})" if name in SECTIONS and model is JobSpec else allowed(model, name).replace("'", "`")


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    return "that of each field" if isinstance(field.default, BaseModel) else f"`{_yaml(field.default)}`"


def _yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _code(text: str | None) -> str:
    return (text or "").replace("``", "`")


if __name__ == "__main__":
    (HERE / "job.md").write_text(render(), encoding="utf-8")
