"""How `make docs` builds the site: the Markdown files of this repository as they are, and the docstrings.

The root of the sources is the root of the repository, so that one link leads to the same page here and in a
checkout. The navigation is the list of links in `docs/index.md`.
"""

import re
from importlib.metadata import version as version_of
from pathlib import Path

ROOT = Path(__file__).parents[2]

project = "shardkv"
author = copyright = "The shardkv maintainers"
version = release = version_of("shardkv")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_click", "sphinxcontrib.mermaid"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md"]

html_theme = "furo"
html_title = f"shardkv {release}"
html_extra_path = ["extra"]
html_copy_source = False

default_role = "code"  # docstrings mark names by single backticks, as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
myst_heading_anchors = 3
myst_fence_as_directive = ["mermaid"]

LINK = re.compile(r"\]\((?!https?:)([^)#]+)\.md\)")


def add_navigation(app, document, source):
    """The links of the index, as the toctree from which Sphinx makes the navigation."""
    if document == root_doc:
        here = (ROOT / document).parent
        pages = [
            "/" + str((here / link).resolve().relative_to(ROOT.resolve())) for link in LINK.findall(source[0])
        ]
        source[0] += "\n".join(["\n```{toctree}", ":hidden:", *dict.fromkeys(pages), "```\n"])


def setup(app):
    app.connect("source-read", add_navigation)
