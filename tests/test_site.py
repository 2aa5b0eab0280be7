"""The site: it builds without a warning, every mechanism and public function has its page, its examples run."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jforge

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("site_script", DOCS / "build_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(the folder, what the command said)."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, DOCS / "build_site.py", folder]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "html"


def test_every_page_is_there(script, built):
    for name in jforge.names():
        text = (built / "mechanism" / f"{name}.html").read_text(encoding="utf-8")
        assert jforge.get(name).traded in text and "Where" in text
    functions = [page.removesuffix(".md") for page in script.reference()]
    assert len(functions) > 100
    for page in functions:
        assert (built / f"{page}.html").exists()
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert (built / "notebooks" / f"{notebook.stem}.html").exists()


def test_every_public_name_has_a_page(script):
    pages = script.reference()
    for op in script.OPS:
        for place in ("jforge.ops", "torch_ref.ops", "triton_kernels", "pallas_kernels"):
            assert f"api/{place}.{op}.md" in pages
    promised = (DOCS / "own_mechanism.md").read_text(encoding="utf-8")
    for place, name in re.findall(r"^\| `(jforge(?:\.\w+)+)\.(\w+)\(", promised, re.MULTILINE):
        assert f"api/{place}.{name}.md" in pages, (place, name)


def test_no_link_leads_nowhere(built):
    """Within the site, anchors too."""
    pages = {page: page.read_text(encoding="utf-8") for page in built.rglob("*.html")}
    ids = {page: set(re.findall(r'\bid="([^"]+)"', text)) for page, text in pages.items()}
    checked = 0
    for page, text in pages.items():
        for target in re.findall(r'href="([^"]+)"', text):
            path, _, anchor = target.partition("#")
            if "://" in target or target.startswith(("mailto:", "data:")):
                continue
            at = (page.parent / path.partition("?")[0]).resolve() if path else page
            assert at.exists(), (page.name, target)
            if anchor and at in ids:
                assert anchor in ids[at], (page.name, target)
            checked += 1
    assert checked > 1000


def test_no_markup_is_left_on_a_page(built):
    """Terms of a definition list, escapes inside code, links and roles that nothing understood."""
    left = r"<p>[^<]*\n: |<span class=\"pre\">[^<]*\\[_*<|\[\]]|\]\([\w./#]+\)</|\{\w+\}<code"
    for page in built.rglob("*.html"):
        found = re.search(left, re.sub(r"<pre>.*?</pre>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL))
        assert not found, (page.name, found[0])


def test_mechanisms_stand_in_the_order_of_the_registry(built):
    index = (built / "index.html").read_text(encoding="utf-8")
    listed = re.findall(r'toctree-l1"><a[^>]*href="mechanism/(\w+)\.html"', index)
    assert listed == list(jforge.names())


def test_search_needs_no_server(built):
    """The index comes as a script, which a page opened as a file may load; a fetch it may not."""
    index = (built / "searchindex.js").read_text(encoding="utf-8")
    terms = json.loads(re.fullmatch(r"Search\.setIndex\((.*)\)", index, re.DOTALL)[1])["terms"]
    assert {"ring", "latent"} <= terms.keys()
    page = (built / "search.html").read_text(encoding="utf-8")
    assert re.search(r"<script[^>]*searchindex\.js", page)


def test_a_link_to_nothing_is_an_error(script, tmp_path):
    document = tmp_path / "page.md"
    document.write_text("[here](gone.md)")
    with pytest.raises(FileNotFoundError, match="page.md links to gone.md"):
        script._relinked(document)


def test_ops_of_a_step(script):
    csa, gqa = jforge.get("csa"), jforge.get("gqa")
    assert script.ops_of(gqa, gqa.examples[0]) == ["decode_attention"]
    assert set(script.ops_of(csa, csa.examples[0])) == {
        "index_scores", "topk_indices", "decode_attention", "decode_block_sparse", "merge_states"
    }  # fmt: skip


def test_a_byte_formula_gives_the_bytes(script):
    """`stored = fixed + per token x tokens`, read from the page."""
    for name in jforge.names():
        att = jforge.get(name)
        cfg = next(iter(att.models.values()))
        page = script._formula(att, cfg).replace(",", "")
        fixed, up, down = re.search(r"stored = (\d+) \+ (\d+)(?: / (\d+))? x tokens", page).groups()
        tokens = 2**20
        want = sum(att.cost(cfg, context=tokens).stored.values())
        assert int(fixed) + int(up) * tokens / int(down or 1) == want, name


def test_conventions_name_tests_that_exist():
    rows = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (DOCS / "concepts.md").read_text(encoding="utf-8"))
    assert len(rows) >= 25
    for path, test in rows:
        assert re.search(rf"^def {test}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), (path, test)


@pytest.mark.parametrize("name", ["index", "own_family"])
def test_examples_run(name):
    text, scope = (DOCS / f"{name}.md").read_text(encoding="utf-8"), {}
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, scope)


def test_the_kernel_of_the_page_is_judged():
    text, scope = (DOCS / "own_kernel.md").read_text(encoding="utf-8"), {}
    kernel, judged = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(kernel, scope)
    exec(judged, scope)
    assert scope["verdict"].ok
