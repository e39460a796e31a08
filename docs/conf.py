"""The site: `make docs` makes docs/_build/html of the pages here. GitHub shows the same pages as they are.

Pages are plain Markdown. docs/index.md names all of them, and the site takes its navigation from the links there.
"""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from equigram import __version__

if TYPE_CHECKING:
    from docutils.nodes import Element  # type: ignore[import-untyped]
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

HERE = Path(__file__).parent
INCLUDED = {"readme": "../README.md", "howto/deploy": "../deploy/README.md"}
"""Pages that are shown in place of others: those that live beside the files they are about."""

OTHERS = r"(numpy|np|jax|zarr|sklearn|collections|typing|pathlib|types|contextlib|concurrent)\..*|NDArray|ArrayLike"
KEPT = (
    r"Float64s|GroupName|KernelName|Listener|Padding|Part|Pass|Path|SplitName|Triple|[A-Z_]+|.* .*|"
    r"equigram\.(data|spec|solve|screen|api|client\.connection)\..*|equikernel\.(layers|activations)\..*|datetime\..*"
)
"""Also constants, whose values docstrings do not need, and words after ``Returns:``, which have spaces."""

ATTRIBUTES: dict[str, list[str]] = {}

project = "equigram"
author = "the authors of equigram"
version = release = __version__
html_title = f"equigram {__version__}"
html_theme = "furo"
html_show_sourcelink = False
html_copy_source = False
html_static_path: list[str] = []

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
nitpicky = True
# What other packages define, and what modules of this one keep to themselves but for annotations.
nitpick_ignore_regex = [(r"py:(class|exc)", OTHERS), (r"py:(class|data|obj)", KEPT)]

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100


def read(app: Sphinx, name: str, source: list[str]) -> None:
    """The text of a page: that of another file, or with links to one, or with the navigation of the site."""
    origin = HERE / INCLUDED.get(name, f"{name}.md")
    if name in INCLUDED:
        app.env.note_dependency(origin.resolve())
        source[0] = origin.read_text(encoding="utf-8")

    def link(match: re.Match[str]) -> str:
        target = (origin.parent / match[1]).resolve()
        shown = {(HERE / file).resolve(): HERE / f"{page}.md" for page, file in INCLUDED.items()}
        inside = shown.get(target, target)
        return f"]({os.path.relpath(inside, (HERE / name).parent)}{match[2] or ''})"

    source[0] = re.sub(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)", link, source[0])
    if name == "index":
        source[0] += navigation(source[0])


def navigation(index: str) -> str:
    """Hidden tables of contents: a section of the index becomes a caption, and the links in it the pages."""
    made = ""
    for section in re.split(r"(?m)^## ", index)[1:]:
        pages = re.findall(r"(?m)^- \[[^\]]*\]\(([\w/.-]+)\.md\)", section)
        if pages:
            made += "\n\n```{toctree}\n:hidden:\n:caption: " + "\n".join([section.splitlines()[0], "", *pages, "```"])
    return made


def signature(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, text: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """Fields and defaults of a model without what pydantic checks of them, which docs/job.md says in words."""
    if isinstance(thing, type) and issubclass(thing, BaseModel):
        given = inspect.signature(thing)
        bare = [one.replace(annotation=one.empty) for one in given.parameters.values()]
        return str(given.replace(parameters=bare)), returned
    return text, returned


def before_napoleon(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Keep what is said of an attribute: "(n, k): targets" would be taken for a type and a description."""
    if what in ("attribute", "property"):
        ATTRIBUTES[name] = list(lines)


def after_napoleon(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Put it back."""
    if name in ATTRIBUTES:
        lines[:] = ATTRIBUTES.pop(name)


def missing(app: Sphinx, env: BuildEnvironment, node: pending_xref, shown: Element) -> Element | None:
    """A name without its module, as docstrings have it, if one module here has it."""
    if node["refdomain"] != "py":
        return None
    domain = env.domains.python_domain
    last = node["reftarget"].rpartition(".")[2]
    found = [full for full, one in domain.objects.items() if full.rpartition(".")[2] == last and not one.aliased]
    if len(found) != 1:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], found[0], node, shown)


def setup(app: Sphinx) -> None:
    """Connect what is above."""
    app.connect("source-read", read)
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-process-docstring", before_napoleon, priority=400)
    app.connect("autodoc-process-docstring", after_napoleon, priority=600)
    app.connect("missing-reference", missing)
