"""The documentation. From the repository root, with `pip install -e '.[docs]'`:

    python -m sphinx -W --keep-going -n -b html docs docs/_build/html

Warnings are fatal and the notebooks are executed. Their cache, docs/_build/.jupyter_cache, sees
changes of a notebook but not of the library: remove docs/_build after changing the code. Nothing
is fetched at build time or by the built pages.

KaTeX's script comes with sphinxcontrib-katex, which insists on its own copy; the style sheet and
fonts that match it stand in _static/katex: `npm pack katex@VERSION`, then dist/katex.min.css less
its woff and ttf sources, dist/fonts/*.woff2 and LICENSE.
"""

import importlib
import inspect
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

from docutils import nodes
from sphinx.util import logging
from sphinxcontrib import katex

import sde_diffusion

project = "sde_diffusion"
version = release = sde_diffusion.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.bibtex",
    "sphinxcontrib.katex",
]
exclude_patterns = ["_build", "jupyter_execute"]

html_theme = "furo"
html_title = "sde_diffusion"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = html_show_sphinx = False

# Mathematics: KaTeX alone, from this site; Sphinx's default is MathJax from a CDN.
KATEX = "0.16.22"  # of the style sheet and fonts in _static/katex
html_math_renderer = "katex"
katex_css_path = "katex/katex.min.css"
katex_options = "{throwOnError: true, strict: true}"
myst_update_mathjax = False
if katex.katex_version != KATEX:
    raise RuntimeError(
        f"sphinxcontrib-katex brings KaTeX {katex.katex_version}, but docs/_static/katex holds "
        f"{KATEX}: install the version in pyproject.toml, or replace the files (see docs/conf.py)"
    )

# Notebooks: MyST text, executed. Their tensors are small, and one thread is then much the fastest.
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 180
nb_merge_streams = True
nb_render_markdown_format = "myst"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("MPLBACKEND", None)  # set outside, it would leave the pages without figures

bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "plain"
bibtex_reference_style = "author_year"

copybutton_exclude = ".linenos, .gp, .go"

# The library's docstrings are Google style in plain text; see `as_rst`.
autodoc_default_options = {
    "members": True,
    "special-members": "__call__",
    "ignore-module-all": True,
}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 110
highlight_language = "text"
add_module_names = False
toc_object_entries_show_parents = "hide"

# There is no inventory to link other packages' names to; our own must resolve.
nitpick_ignore_regex = [
    (r"py:class", r"(torch|numpy|pathlib|jaxtyping|collections\.abc|contextlib|datetime)\..*"),
    # Tensor in jaxtyping's words; type variables
    (r"py:class", r"Tensor|P|sde_diffusion\.(processes\.level\.S|validate\.T)"),
]

logger = logging.getLogger(__name__)
formulas: set[str] = set()


def as_rst(app, what, name, obj, options, lines):
    """Plain text to reStructuredText, in front of napoleon.

    Indented paragraphs, and those with columns (three spaces within a line), are formulas, to be
    shown as they stand. In all others the characters that RST takes for markup are escaped.
    """
    paragraphs = [part.splitlines() for part in re.split(r"\n\s*\n", "\n".join(lines)) if part]
    # Napoleon takes a property's words before a colon for its type, unless a comment stands first.
    result = ["..", ""] if what == "property" else []
    in_section = was_formula = False
    for number, paragraph in enumerate(paragraphs):
        indented = paragraph[0].startswith(" ")
        if not indented:
            in_section = bool(re.fullmatch(r"[A-Z][a-z]+:", paragraph[0]))
        columns = any(re.search(r"\S {3,}\S", line) for line in paragraph)
        formula = number > 0 and not in_section and (indented or columns)
        if formula and not was_formula:
            result += ["::", ""]
        result += [
            f"    {line}" if formula else re.sub(MARKUP, escaped, line) for line in paragraph
        ]
        result.append("")
        was_formula = formula
    lines[:] = result


MARKUP = r"`[^`]+`|[*|]|_(?!\w)|(?<!\w)\w(?=\.(?:\s|$))"  # the last would number a list


def escaped(match):
    """`code` as RST's ``code``; anything else with a backslash."""
    return f"`{match[0]}`" if match[0].startswith("`") else "\\" + match[0]


def skip_member(app, what, name, obj, skip, options):
    """Show a module's __all__ in the order of its source, less what has nothing to say.

    The fields of a NamedTuple stand in its signature; an undocumented __call__ is its protocol's.
    """
    if what == "module":
        module = sys.modules.get(getattr(obj, "__module__", ""))
        return name not in getattr(module, "__all__", ())
    silent = type(obj).__name__ == "_tuplegetter" or (name == "__call__" and not obj.__doc__)
    return True if silent else None


def hide_signature(app, what, name, obj, options, signature, returns):
    """A protocol is never called; what `(*args, **kwargs)` it seems to take says nothing."""
    return ("", "") if getattr(obj, "_is_protocol", False) else None


def collect_formulas(app, doctree, docname):
    """Remember every formula of a page that is written."""
    formulas.update(node.astext() for node in doctree.findall(nodes.math))
    formulas.update(node.astext() for node in doctree.findall(nodes.math_block))


def check_formulas(app, exception):
    """KaTeX runs in the reader's browser; where node is installed, let it run here too."""
    node = shutil.which("node")
    if exception or node is None or not formulas:
        return
    script = """
        const katex = require(process.argv[1]), lines = require("fs").readFileSync(0, "utf8");
        for (const tex of JSON.parse(lines))
            try { katex.renderToString(tex, {throwOnError: true, strict: "error"}); }
            catch (error) { console.log(error.message.replaceAll("\\n", " ")); }
    """
    source = Path(katex.__file__).with_name("katex.min.js")
    checked = subprocess.run(
        [node, "-e", script, source],
        input=json.dumps(sorted(formulas)),
        capture_output=True,
        text=True,
    )
    for message in (checked.stdout + checked.stderr).splitlines():
        logger.warning(message, type="katex")


def hide_rules():
    """Show the types of arguments and fields without the rules that `validate` reads in them."""
    for module in pkgutil.walk_packages(sde_diffusion.__path__, "sde_diffusion."):
        if module.name.startswith("sde_diffusion.verify.peers."):
            continue  # its libraries may be missing
        for value in vars(importlib.import_module(module.name)).values():
            if not getattr(value, "__module__", "").startswith("sde_diffusion"):
                continue
            members = vars(value).values() if isinstance(value, type) else ()
            for each in (value, *members):
                own = getattr(inspect.unwrap(each), "__dict__", {}).get("__annotations__")
                if own is None:
                    own = getattr(inspect.unwrap(each), "__annotations__", None)
                if own:
                    hints = typing.get_type_hints(inspect.unwrap(each))
                    own.update({name: hints[name] for name in own})


def setup(app):
    hide_rules()
    app.connect("autodoc-process-docstring", as_rst, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", skip_member)
    app.connect("autodoc-process-signature", hide_signature)
    app.connect("doctree-resolved", collect_formulas)
    app.connect("build-finished", check_formulas)
