"""Sphinx's settings. `make docs` builds with warnings as errors, so a dead link or a public name that is missing in
the reference fails the build.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import public  # noqa: E402
from docstrings import fields, markup  # noqa: E402
from sphinx.ext.autodoc.mock import MockFinder  # noqa: E402

sys.meta_path.insert(0, MockFinder(public.MOCKED))

project = "funczero"
copyright = "the authors of funczero"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "funczero"
html_static_path = ["_static"]
html_css_files = ["page.css"]
html_show_sphinx = False
html_copy_source = False
smartquotes = False  # or --flag in a docstring would lose a dash
language = "en"
needs_sphinx = "8.0"

myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # README's and docs' own levels
highlight_language = "python"
pygments_style = "friendly"

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Fields", "params_style")]
autodoc_typehints = "none"  # shapes, dtypes and units are in the text
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True
add_module_names = False


def setup(app):
    """The house's docstrings become markup, and the reference is compared with what the packages export."""
    app.connect("autodoc-process-docstring", markup, priority=100)  # before napoleon's
    app.connect("autodoc-process-docstring", fields, priority=90)
    app.connect("env-check-consistency", public.check)
