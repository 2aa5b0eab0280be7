"""Sphinx's settings; docs/build_site.py lays out what it reads."""

import jforge

project = "jforge"
author = copyright = "the jforge authors"
release = version = jforge.__version__
extensions = ["myst_nb"]
html_theme = "furo"
html_title = "jforge"
html_show_sphinx = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
nb_execution_mode = "off"  # the outputs are stored, and tests/test_notebooks.py holds them equal to fresh ones
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
